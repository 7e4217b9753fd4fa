"""Every matrix of every architecture starts as the configuration says, however the model comes into being.

transformers calls a model's `_init_weights` for some modules and not for others, which changes between its versions: in
5.23 the scaling with depth was lost so, silently. Standard deviations are therefore measured here, on the weights.
"""

import math
import shutil

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from entropi.errors import UserError
from entropi.model.architectures import ARCHITECTURES
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.training.recipe import Recipe
from entropi.training.run import train

SIZES = dict(vocab_size=211, hidden_size=64, num_hidden_layers=5, num_attention_heads=4, max_position_embeddings=80)
WRITE_TO_STREAM = ("attention.output", "feed_forward.down", "feed_forward.fused")


def configuration(architecture, **options):
    return EntropiConfig(architecture=architecture, tie_word_embeddings=False, **{**SIZES, **options})


def matrices(model):
    """(name, the matrix that was drawn) of every Linear and Embedding: under a spectral norm what it divides."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight
            if parametrize.is_parametrized(module) and hasattr(module.parametrizations.weight, "original"):
                weight = module.parametrizations.weight.original
            yield name, weight.detach()


def check(model, deviation, residual_deviation):
    found = dict(matrices(model))
    per_block = 4 + (1 if "ScFuFFN" in model.config.architecture else 2)
    assert len(found) == 3 + per_block * model.config.num_hidden_layers, sorted(found)
    for name, weight in found.items():
        wanted = residual_deviation if name.endswith(WRITE_TO_STREAM) else deviation
        noise = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
        assert weight.std().item() == pytest.approx(wanted, rel=noise), name
        assert abs(weight.mean().item()) < 5 * wanted / math.sqrt(weight.numel()), name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("initialization", ["depth_scaled", "plain"])
@pytest.mark.parametrize("way", ["constructor", "from_config"])
def test_standard_deviations(architecture, initialization, way):
    torch.manual_seed(1)
    config = configuration(architecture, initialization=initialization, bias="all")
    model = EntropiForCausalLM(config) if way == "constructor" else AutoModelForCausalLM.from_config(config)
    deviation = 0.02 * math.sqrt(768 / 64)
    check(model, deviation, deviation / math.sqrt(10) if initialization == "depth_scaled" else deviation)


@pytest.mark.parametrize("way", ["constructor", "from_config"])
@pytest.mark.parametrize("initialization", ["depth_scaled", "plain"])
def test_heads_of_their_own_width_and_norms_of_heads_and_branches(initialization, way):
    config = configuration(
        "SM+RMS+GeGLU",
        initialization=initialization,
        head_width=40,
        query_key_norm=True,
        branch_norm=True,
        embedding_scale=8.0,
        bias="attention",
    )
    model = EntropiForCausalLM(config) if way == "constructor" else AutoModelForCausalLM.from_config(config)
    deviation = 0.02 * math.sqrt(768 / 64)
    check(model, deviation, deviation / math.sqrt(10) if initialization == "depth_scaled" else deviation)
    gains = {name: p for name, p in model.named_parameters() if "norm" in name}
    assert len(gains) == 6 * 5 + 1
    assert all((gain == 1).all() for gain in gains.values())


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+WNorm(QKVO+FFN)", "SM+SNorm(QKVO+FFN)"])
def test_the_deviation_can_be_given(architecture):
    check(EntropiForCausalLM(configuration(architecture, initializer_range=0.1)), 0.1, 0.1 / math.sqrt(10))


def test_gpt2_small():
    """The two numbers that were 0.0200 while transformers skipped the blocks."""
    model = EntropiForCausalLM(EntropiConfig(vocab_size=50, num_hidden_layers=12))
    block = model.model.blocks[7]
    for layer in (block.attention.output, block.feed_forward.down):
        assert layer.weight.std().item() == pytest.approx(0.00408, rel=0.01)
    assert block.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("options", [{}, {"spectral_gain": True}])
def test_spectral_norms_start_at_one(options):
    """A power iteration has found the largest singular value of what was drawn last, not of an earlier weight."""
    model = EntropiForCausalLM(configuration("SM+SNorm(QKVO+FFN)", **options)).eval()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            assert torch.linalg.matrix_norm(module.weight, 2).item() == pytest.approx(1.0, abs=0.1), name


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM(t)+WNorm(QKV+FFN)+ScFFN", "SM+SNorm(QKVO+FFN)"])
def test_what_was_saved_is_loaded_and_nothing_drawn_anew(architecture, tmp_path):
    model = EntropiForCausalLM(configuration(architecture, num_hidden_layers=2, spectral_gain="SNorm" in architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    model.save_pretrained(tmp_path)
    loaded = EntropiForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+WNorm(QKVO+FFN)", "SM+SNorm(QKVO+FFN)"])
def test_what_a_file_lacks_is_drawn_as_in_a_new_model(architecture, tmp_path):
    torch.manual_seed(3)
    model = EntropiForCausalLM(configuration(architecture, num_hidden_layers=2, bias="none"))
    lacking = [name for name in model.state_dict() if ".blocks.1." in name and "norm." not in name]
    kept = {name: value for name, value in model.state_dict().items() if name not in lacking}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = EntropiForCausalLM.from_pretrained(tmp_path)
    check(loaded, 0.02 * math.sqrt(12), 0.02 * math.sqrt(12 / 4))  # by the root of two branches a layer
    for name, value in kept.items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_resized_embeddings():
    model = EntropiForCausalLM(EntropiConfig(**SIZES))
    before = model.model.token_embedding.weight.detach().clone()
    model.resize_token_embeddings(400, mean_resizing=False)
    grown = model.model.token_embedding.weight.detach()
    assert torch.equal(grown[:211], before)
    assert grown[211:].std().item() == pytest.approx(0.02 * math.sqrt(12), rel=0.1)


def test_an_unknown_initialization_is_refused():
    with pytest.raises(UserError, match="initialization must be 'depth_scaled' or 'plain', got 'xavier'"):
        EntropiConfig(initialization="xavier")


def test_a_resumed_run_has_the_weights_it_began_with(tmp_path):
    """Resuming builds a new model and loads a checkpoint: at a learning rate of nearly 0 the start is still there."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        text = "\n".join(f"def f{i}(x):\n    return x * {i} + {number}\n" for i in range(60))
        (corpus / f"{number}.py").write_text(text, encoding="utf-8")
    recipe = Recipe(
        architecture="SM+LN+G", corpus=str(corpus), vocab_size=300, context_length=16, layers=5, heads=2,
        hidden_size=64, steps=2, batch_size=4, learning_rate=1e-12, precision="fp32", save_every=1, evaluate_every=0,
    )  # fmt: skip
    run = tmp_path / "run"
    train(recipe, run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    model = EntropiForCausalLM.from_pretrained(train(recipe, run))
    for name, weight in matrices(model):
        wanted = 0.02 * math.sqrt(12) / (math.sqrt(10) if name.endswith(WRITE_TO_STREAM) else 1)
        noise = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(wanted, rel=noise), name
