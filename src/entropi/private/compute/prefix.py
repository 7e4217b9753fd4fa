"""A public text that every prompt continues: the server computes its keys and values in the clear.

In a causal model the states of a text's first tokens depend on these tokens alone. Where the text is public (a
beginning-of-text token, a chat template's header, a system prompt), nothing of it needs to be computed in secret: its
keys and values enter every session as constants of the server, and private tokens attend to them. The massive
activations of pretrained models, which sit in a text's first token, stay outside of fixed-point arithmetic.

Keys and values stand beside the weights, as "l.k" and "l.v" `(G, p, k)`; functions that take weights find them there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from entropi.private.compute.description import Description
from entropi.private.compute.program import forward, run_stages
from entropi.softmax import USUAL_FOR_EXACT


def with_prefix(model: Description, weights: Mapping[str, np.ndarray], prefix: Sequence[int]) -> dict[str, np.ndarray]:
    """`weights` and the keys and values of `prefix`'s token ids, by the model's own functions in float32."""
    if not prefix:
        return dict(weights)
    values = {**weights, "embedded": weights["embedding"][np.asarray(prefix)]}
    run_stages(forward(model, len(prefix), 0, USUAL_FOR_EXACT, embedding="public"), values, exact=True)
    return {**weights, **{name: np.asarray(values[name]) for name in names(model)}}


def names(model: Description) -> list[str]:
    """Names of a prefix's keys and values."""
    return [f"{layer}.{kind}" for layer in range(model.layers) for kind in ("k", "v")]


def shape(model: Description, tokens: int) -> tuple[int, int, int]:
    """Shape of the keys, and of the values, of a prefix of so many tokens."""
    return model.key_value_heads, tokens, model.head_size
