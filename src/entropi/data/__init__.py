"""Corpora, tokenizer and packing; needs numpy and tokenizers, no torch."""
