"""Shapes of this family and of others, and what folding leaves of them."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("jax")

from cost_shapes import GPT2_XL, LLAMA_7B, PYTHIA, SMALL, written
from entropi.costs.operations import parameters
from entropi.costs.prediction import described
from entropi.errors import UserError
from entropi.model.architectures import ARCHITECTURES
from entropi.model.shape import Shape, expected_description, read_shape


def test_a_shape_has_the_configuration_s_defaults():
    from entropi.model.configuration import EntropiConfig

    config = EntropiConfig()
    for field in fields(Shape):
        assert getattr(Shape(), field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize(
    ("older", "softmax"),
    [
        ({"exp_iterations": None, "polynomial": False}, "exact"),
        ({"exp_iterations": 3, "polynomial": False}, "power-3"),
        ({"exp_iterations": 1, "polynomial": True}, "polynomial-1"),
    ],
)
def test_configurations_with_two_settings_for_the_softmax_are_read(older: dict, softmax: str, tmp_path: Path):
    shape = read_shape(written({"model_type": "entropi", "num_hidden_layers": 2, **older}, tmp_path))
    assert shape == Shape(num_hidden_layers=2, softmax=softmax)
    with pytest.raises(UserError, match=r"softmax must be exact, .*, got 'power-17'"):
        read_shape(written({"model_type": "entropi", "exp_iterations": 17}, tmp_path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_expected_of_folding_is_what_it_leaves(architecture: str):

    from entropi.model.configuration import EntropiConfig
    from entropi.model.decoder import EntropiForCausalLM
    from entropi.model.folding import fold

    sizes = {name: getattr(SMALL, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = EntropiConfig(architecture=architecture, num_attention_heads=4, max_position_embeddings=64, **sizes)
    model = EntropiForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("temperature.parameter"):
                parameter.add_(torch.rand_like(parameter))
    expected = expected_description(replace(SMALL, architecture=architecture, final_norm=None))
    assert expected == fold(model, worst_condition=math.inf).description


@pytest.mark.parametrize(
    ("config", "architecture", "count"),
    [(GPT2_XL, "SM+LN+G", 1_557_611_200), (PYTHIA, "SM+LN+G", 70_426_624), (LLAMA_7B, "SM+RMS+SwiGLU", 6_738_415_616)],
    ids=["GPT-2 XL", "Pythia 70M", "Llama 7B"],
)
def test_other_families_have_their_published_sizes(config: dict, architecture: str, count: int, tmp_path: Path):
    shape = read_shape(written(config, tmp_path))
    assert shape.architecture == architecture
    assert parameters(shape) == count
    assert described(shape).layers == shape.num_hidden_layers


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "models of type 'bert' cannot be converted; those of gemma,"),
        ({"model_type": "gpt2"}, "lacks 'vocab_size'"),
        ({**LLAMA_7B, "hidden_act": "relu2"}, "'relu2' has no secure form"),
        ({**PYTHIA, "hidden_act": "tanh"}, "'tanh' has no secure form"),
        ({**GPT2_XL, "n_head": 7}, "hidden_size 1600 is no multiple of 7 heads"),
        ({**GPT2_XL, "n_embd": "wide"}, "value of the wrong kind"),
    ],
)
def test_configurations_that_cannot_be_used_say_why(config: dict, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        read_shape(written(config, tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_shape(tmp_path)
