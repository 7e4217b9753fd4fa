"""Text on which a model's values are looked at before anybody is served: prose, code and numbers as users write them.

Random tokens do not show what text does: the massive activations of pretrained models sit in a text's first token, in
special tokens and in delimiters. So the text is the model's own: behind the tokens that its tokenizer puts in front,
with its special tokens between the paragraphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources

import numpy as np

from entropi.private.compute.description import Description
from entropi.private.compute.fixed_point import CALIBRATION_LENGTH, calibration_text, largest_embeddings
from entropi.private.compute.program import cached_tokens
from entropi.private.sessions.tokenization import text_ids

MOST_SEQUENCES = 4  # of 512 tokens at most
PLAIN_LENGTH = 128  # tokens without what the tokenizer puts in front


@cache
def usual_text() -> str:
    """The text that comes with the package."""
    return resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")


def calibration_sequences(
    tokenizer: str, model: Description, weights: Mapping[str, np.ndarray], text: str | None = None
) -> list[list[int]]:
    """Token ids to find ranges on: `text`, or the usual one, and the tokens with the largest embeddings.

    Behind a public prefix, whose keys and values stand beside the weights, no other beginning is put in front.

    Args:
        tokenizer: content of its tokenizer.json.

    Raises:
        UserError: a text of the caller's own that the tokenizer cannot encode, or of no tokens.
    """
    past = cached_tokens(weights)
    length = min(model.positions - past, CALIBRATION_LENGTH)
    front, paragraphs, special = text_ids(tokenizer, usual_text() if text is None else text)
    front = [] if past else front[: length - 1]

    between = [token for token in special if token < model.vocab_size]
    ids = list[int]()
    for place, paragraph in enumerate(paragraphs):
        ids += [*([between[(place - 1) % len(between)]] if place and between else []), *paragraph]
    ids = [token for token in ids if token < model.vocab_size]  # a tokenizer may have more than the model

    step = max(length - len(front), 1)
    parts = [ids[start : start + step] for start in range(0, len(ids), step)][:MOST_SEQUENCES]
    if not parts:
        return calibration_text(model, weights)
    sequences = [*([*front, *part] for part in parts), largest_embeddings(weights, length)]
    if front:  # which a client's prompt does not have: its first token is any
        sequences.append(parts[0][:PLAIN_LENGTH])
    if model.position_embedding == "learned" and model.positions - past > length:  # rows of their own
        sequences.append(calibration_text(model, weights)[0])
    return sequences
