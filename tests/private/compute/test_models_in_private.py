"""From a model in torch to the private program: the same logits, for everything the model room offers."""

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("jax")

from entropi.model.architectures import ARCHITECTURES
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.folding import fold
from entropi.private.compute.description import Description
from entropi.private.compute.program import run_plain
from entropi.softmax import KINDS, SoftmaxForm

SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=24)
VARIANTS = {
    "grouped queries, rotary positions": dict(
        num_key_value_heads=2, position_embedding="rotary", rotary_fraction=0.5, bias="all"
    ),
    "parallel residual": dict(parallel_residual=True, bias="all"),
    "no final norm": dict(final_norm=False, tie_word_embeddings=False),
    "polynomial": dict(softmax="polynomial-1", position_embedding="rotary"),
    "norms of queries and keys, wide heads, scaled embeddings": dict(
        query_key_norm=True, head_width=12, num_key_value_heads=2, bias="attention", embedding_scale=3.0
    ),
    "rotary frequencies by layer": dict(
        position_embedding="rotary",
        rotary_fraction=0.5,
        rotary_frequencies=[[1.0, 0.1], [0.5, 0.0]],
        rotary_layers=[0, 1, 0],
    ),
}
KERNEL = "power-4"


def make_model(architecture, **options):
    torch.manual_seed(3)
    model = EntropiForCausalLM(EntropiConfig(architecture=architecture, **{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def compare(model, **how):
    """Two tokens generated from 15 in both, and the logits they come from; the kernel is the model's own."""
    folded = fold(model)
    description = msgspec.convert(folded.description, Description)
    weights = {name: weight.astype(np.float32) for name, weight in folded.weights.items()}
    assert {name: weight.shape for name, weight in weights.items()} == description.weight_shapes()
    prompt = np.random.default_rng(0).integers(0, 61, 15).tolist()
    generated, logits = run_plain(description, weights, prompt, 2, KERNEL, **how)
    for step, row in enumerate(logits):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + generated[:step]])).logits[0, -1].numpy()
        yield row, expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_the_private_program_are_the_models(architecture):
    options = {} if ARCHITECTURES[architecture].powers else dict(softmax=KERNEL)
    for ours, theirs in compare(make_model(architecture, **options), exact=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+RMS+Bilinear", "SM+LeakyR", "SM(t)+ScFuFFN"])
def test_options_of_the_model(architecture, options):
    for ours, theirs in compare(make_model(architecture, **{"softmax": KERNEL, **options}), exact=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(
    ("kind", "divisor"),
    [(name, "sum") for name, known in KINDS.items() if known.trained] + [("polynomial", "keys"), ("polynomial", 9)],
)
def test_every_softmax_is_computed_on_both_sides(kind, divisor):
    form = SoftmaxForm(kind, min(2, KINDS[kind].most_in_models), divisor)
    architecture = "Pow(t)+ScFuFFN" if form.public_divisor else "SM(t)+ScFuFFN"
    for ours, theirs in compare(make_model(architecture, softmax=str(form)), exact=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("architecture", ["SM+RMS+GeGLU", "SM(t)+RMS+G"])
def test_norms_of_branches(architecture):
    options = dict(branch_norm=True, query_key_norm=True, bias="all", softmax=KERNEL)
    for ours, theirs in compare(make_model(architecture, **options), exact=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("architecture", ["SM(t)+ScFuFFN", "SM+LN+R"])
def test_trained_with_the_kernel_nothing_is_lost(architecture):
    """The function that the secure engine evaluates is the model's own softmax; with another one it is not.

    Divisions and roots, which are polynomials in private, are exact where the model has the kernel, and only there.
    """
    errors = {}
    for trained_with in (KERNEL, "exact"):
        pairs = compare(make_model(architecture, softmax=trained_with), exact=trained_with == KERNEL)
        errors[trained_with] = max(np.abs(ours - theirs).max() for ours, theirs in pairs)
    assert errors[KERNEL] < 2e-5
    assert errors["exact"] > 10 * errors[KERNEL]
