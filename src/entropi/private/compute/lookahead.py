"""The next layer's queries, keys and values from what attention writes to the stream, where that is linear.

Without a norm, an activation or a matrix between two layers, x' = x + heads W_O + b_O is all that the next one reads:

    x' W + b = x W + heads (W_O W) + b_O W + b

So x' - x and the next layer's queries, keys and values are one product,

                 [ 0     W    ]
    [x | heads]  [ W_O   W_O W ]  +  [b_O | b_O W + b]

Where products are prepared, that saves the opening and the truncation of x'. What is opened, prepared and kept is as
much as without: as many masked numbers, and as many results, which are what ciphertexts are sent for; it takes twice
the multiplications. The matrix is made once, by the server, and not by every party: what was prepared holds for one
rounding of it alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from entropi.private.compute.description import Description

MATRIX, BIAS = "ahead", "ahead_bias"  # of a layer, see `shapes`


def looks_ahead(model: Description, layer: int) -> bool:
    """Whether what follows a layer is computed together with the next layer's queries, keys and values."""
    linear = model.norm == "none" and model.activation == "identity" and layer not in model.explicit_ffn
    return linear and 0 <= layer < model.layers - 1


def shapes(model: Description) -> dict[str, tuple[int, ...]]:
    """Shapes of what the server has beside the folded weights for sessions whose products are prepared.

    Of each layer that is looked ahead from `(d + H k, d + c)` and `(d + c,)`, c the columns of the next one's queries,
    keys and values.
    """
    found: dict[str, tuple[int, ...]] = {}
    folded = model.weight_shapes()
    for layer in filter(lambda one: looks_ahead(model, one), range(model.layers)):
        width = model.hidden_size + folded[f"{layer + 1}.qkv_bias"][0]
        found[f"{layer}.{MATRIX}"], found[f"{layer}.{BIAS}"] = (model.hidden_size + model.query_size, width), (width,)
    return found


def weights(model: Description, folded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `shapes` describes, of the folded weights, float32."""
    found = {}
    for layer in filter(lambda one: looks_ahead(model, one), range(model.layers)):
        output, output_bias, qkv, bias = (
            np.asarray(folded[name], np.float64)
            for name in (f"{layer}.output", f"{layer}.output_bias", f"{layer + 1}.qkv", f"{layer + 1}.qkv_bias")
        )
        matrix = np.block([[np.zeros((len(qkv), len(qkv))), qkv], [output, output @ qkv]])
        found[f"{layer}.{MATRIX}"] = matrix.astype(np.float32)
        found[f"{layer}.{BIAS}"] = np.concatenate([output_bias, output_bias @ qkv + bias]).astype(np.float32)
    return found
