"""The model family: configuration, attention, feed-forward, normalisation, decoder, folding."""
