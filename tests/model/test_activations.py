"""The tables of activations agree: what models are trained with, what is served, what private inference computes."""

import numpy as np
import pytest
import torch

pytest.importorskip("spu", reason="what private inference computes needs the extra private")
from entropi import EntropiConfig, UserError
from entropi.activations import ACTIVATIONS, folded_names
from entropi.model.architectures import parse_architecture
from entropi.model.feedforward import make_feed_forward
from entropi.private.compute import description, layers


def test_what_can_be_trained_can_be_served():
    assert set(layers.ACTIVATIONS) == set(folded_names())
    assert {known.folds_to for known in ACTIVATIONS.values() if known.folds_to} <= set(folded_names())


@pytest.mark.parametrize("part", [part for part, known in ACTIVATIONS.items() if known.folds_to is None])
def test_both_sides_compute_the_same_function(part):
    """What the private program's function stands for is what the model is trained with."""
    config = EntropiConfig(architecture=f"SM+{part}", hidden_size=4, num_attention_heads=1, intermediate_size=16)
    network = make_feed_forward(config, torch.nn.Identity())
    branches = 2 if ACTIVATIONS[part].gated else 1
    hidden = torch.randn(5, branches * 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network.up, network.down = torch.nn.Identity(), torch.nn.Identity()
    function, exact = layers.ACTIVATIONS[ACTIVATIONS[part].name]
    found = (exact or function)(hidden.numpy().astype(np.float32))
    np.testing.assert_allclose(found, network.branch(hidden, None).numpy(), atol=1e-5)


def test_an_unknown_activation_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"'Softplus' is unknown.*\+SwiGLU"):
        parse_architecture("SM+Softplus")
    sizes = dict(layers=1, heads=1, key_value_heads=1, hidden_size=4, vocab_size=8, positions=8, intermediate_size=16)
    rest = dict(
        format=description.FORMAT,
        architecture="SM",
        position_embedding="learned",
        rotary_dimensions=0,
        rotary_base=10000.0,
        temperature=False,
        softmax="power-3",
        norm="none",
        norm_epsilon=1e-5,
        parallel_residual=False,
        explicit_ffn=[],
        final_norm="rms",
        centre=False,
    )
    with pytest.raises(ValueError, match=r"'softplus' is unknown; known are gelu, relu"):
        description.Description(activation="softplus", **sizes, **rest)
