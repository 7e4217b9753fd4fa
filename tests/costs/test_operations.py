"""Counts, FLOPs and parameters against the paper's tables and against sums done by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from entropi.costs.operations import (
    attention_flops,
    count,
    ffn_flops,
    folded_parameters,
    nonlinear_operations,
    parameters,
)
from entropi.errors import UserError
from entropi.model.architectures import ARCHITECTURES, PAPER_ARCHITECTURES, parse_architecture
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.folding import fold
from entropi.softmax import EXACT, SoftmaxForm

ROOT = Path(__file__).parents[2]


@dataclass
class FakeConfig:
    architecture: str
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_size: int = 768
    intermediate_size: int = 3072
    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    bias: str = "all"
    final_norm: bool = True
    tie_word_embeddings: bool = True
    num_key_value_heads: int | None = None
    position_embedding: str = "learned"
    temperature_granularity: str = "position"
    log_length_scaling: bool = False
    leaky_slope_learned: str = "fixed"
    query_key_norm: bool = False
    branch_norm: bool = False
    parts: Any = field(init=False)
    softmax_form: SoftmaxForm = EXACT

    def __post_init__(self) -> None:
        self.parts = parse_architecture(self.architecture)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def counted(config: FakeConfig, seq_len: int) -> dict[str, tuple[int, tuple[int, int]]]:
    return {c.operation: (c.count, c.shape) for c in nonlinear_operations(config, seq_len)}


def billions(flops: int) -> float:
    return round(flops / 1e9, 1)


FULL, FUSED = ("SM+LN+G", "SM+LN+R"), ("SM+ScFuFFN", "SM(t)+ScFuFFN")

# layers, seq_len, printed FFN and attention FLOPs in billions (Tables 2, 3, 5, 6)
TABLES = [
    (12, 128, 14.5, 1.8, 7.7),
    (12, 256, 29.0, 3.6, 16.3),
    (18, 128, 21.7, 2.7, 11.6),
    (12, 512, 58.0, 7.2, 36.2),  # fused is printed 7.3, an eighth of the rounded 58.0; exact: 7.248
]


@pytest.mark.parametrize(("layers", "seq_len", "full", "fused", "attention"), TABLES)
def test_flops_are_those_printed_in_the_paper(
    layers: int, seq_len: int, full: float, fused: float, attention: float
) -> None:
    for architecture in PAPER_ARCHITECTURES:
        config = FakeConfig(architecture, num_hidden_layers=layers)
        assert billions(ffn_flops(config, seq_len)) == (fused if architecture in FUSED else full)
        assert billions(attention_flops(config, seq_len)) == attention


@pytest.mark.parametrize(("layers", "seq_len"), [row[:2] for row in TABLES])
@pytest.mark.parametrize("architecture", PAPER_ARCHITECTURES)
def test_nonlinear_operations_are_those_printed_in_the_paper(layers: int, seq_len: int, architecture: str) -> None:
    softmaxes, norms = {12: (144, 24), 18: (216, 36)}[layers]
    expected = {"softmax": (softmaxes, (seq_len, seq_len))}
    if "LN" in architecture:
        expected["layernorm"] = (norms, (seq_len, 768))
    if architecture.endswith("+G"):
        expected["gelu"] = (layers, (seq_len, 3072))
    if architecture.endswith("+R"):
        expected["relu"] = (layers, (seq_len, 3072))
    assert counted(FakeConfig(architecture, num_hidden_layers=layers), seq_len) == expected


def test_baseline_with_all_biases_has_the_published_size_of_gpt2_small() -> None:
    assert parameters(FakeConfig("SM+LN+G")) == 124_439_808


TINY = {  # 2 layers, d=8, H=2, m=32, V=10, P=4, no biases: 14*8 + 2*(4*64 + FFN) + 16
    "SM": 112 + 2 * (256 + 512) + 16,
    "SM+R": 112 + 2 * (256 + 512) + 16,
    "SM+LN": 112 + 2 * (256 + 512 + 32) + 16,
    "SM+ScFFN": 112 + 2 * (256 + 512 + 2) + 16,
    "SM+ScFuFFN": 112 + 2 * (256 + 64 + 2) + 16,
    "SM(t)+ScFuFFN": 112 + 2 * (256 + 64 + 2 + 8) + 16,
}


@pytest.mark.parametrize(("architecture", "expected"), TINY.items())
def test_parameters_by_hand(architecture: str, expected: int) -> None:
    config = FakeConfig(architecture, 2, 2, 8, 32, 10, 4, bias="none")
    assert parameters(config) == expected
    config.bias = "qk"
    assert parameters(config) == expected + 2 * 16
    config.bias = "all"
    assert parameters(config) == expected + 2 * (32 + (8 if "Fu" in architecture else 40))


def test_record_holds_all_counts() -> None:
    config = FakeConfig("SM+LN+R")
    record = count(config, 128)
    assert (record.architecture, record.seq_len) == ("SM+LN+R", 128)
    assert record.parameters == parameters(config)
    assert record.nonlinear == nonlinear_operations(config, 128)
    assert (record.ffn_flops, record.attention_flops) == (14_495_514_624, 7_700_742_144)


@pytest.mark.parametrize("seq_len", [0, -3, 1025])
@pytest.mark.parametrize("function", [nonlinear_operations, ffn_flops, attention_flops, count])
def test_length_outside_the_positions_is_refused(function: Any, seq_len: int) -> None:
    with pytest.raises(UserError, match="1024"):
        function(FakeConfig("SM"), seq_len)


def test_counting_needs_no_torch() -> None:
    code = "import sys, entropi.costs.operations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("architecture", PAPER_ARCHITECTURES)
def test_folding_leaves_no_linear_network(architecture: str) -> None:
    """GPT-2 small, T=128: the feed-forward FLOPs of SM+ScFuFFN go from 1.8 G to 0."""
    before, after = (count(FakeConfig(architecture), 128, folded=folded) for folded in (False, True))
    assert after.attention_flops == before.attention_flops
    if architecture == "SM+LN":
        assert billions(after.ffn_flops) == 1.8
    else:
        linear = FakeConfig(architecture).parts.activation == "identity"
        assert after.ffn_flops == (0 if linear else before.ffn_flops)
    names = {c.operation for c in after.nonlinear}
    assert names == {c.operation.replace("layernorm", "rmsnorm") for c in before.nonlinear}


OPTIONS: list[dict[str, Any]] = [
    {"bias": "all"},
    {"bias": "qk", "intermediate_size": 40},
    {"bias": "none", "final_norm": False, "tie_word_embeddings": False},
    {"entropy_regularizer": {"weight": 1e-5}},
    {"num_key_value_heads": 2, "position_embedding": "rotary", "bias": "all"},
    {"leaky_slope_learned": "global", "temperature_granularity": "head"},
    {"log_length_scaling": True},
    {"leaky_slope_learned": "layer", "parallel_residual": True, "bias": "qk", "num_key_value_heads": 1},
]


def check_parameters(architecture: str, options: dict[str, Any]) -> None:
    config = EntropiConfig(
        architecture=architecture,
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        **options,
    )
    model = EntropiForCausalLM(config)
    assert parameters(config) == model.inference_parameters(), options
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("temperature.parameter"):
                parameter.add_(torch.rand_like(parameter))
    folded = fold(model, worst_condition=1e9)
    assert folded_parameters(config) == sum(weight.size for weight in folded.weights.values()), options


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_equal_those_of_the_real_model(architecture: str) -> None:
    for options in OPTIONS:
        check_parameters(architecture, options)


@pytest.mark.parametrize("architecture", ["SM+ScFuFFN", "SM(t)+ScFuFFN", "SM+LN+G"])
@pytest.mark.parametrize("granularity", ["position", "head"])
def test_offsets_of_a_polynomial_count(architecture: str, granularity: str) -> None:
    check_parameters(architecture, {"softmax": "polynomial-1", "temperature_granularity": granularity})


def test_the_table_in_the_documentation_is_what_is_counted() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from architectures import table
    finally:
        sys.path.pop(0)
    assert table() in (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
