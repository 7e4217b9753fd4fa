"""Exact nonlinear-operation counts, FLOPs and parameters of a configuration, as the paper counts them.

Everything here is arithmetic on integers; no model is built and torch is not imported. L layers, H heads,
d hidden size, m FFN width, T sequence length, P positions, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, Protocol

from entropi.errors import UserError
from entropi.records import CostRecord, OperationCount


class Parts(Protocol):
    """What an architecture string stands for."""

    @property
    def temperature(self) -> bool: ...
    @property
    def norm(self) -> Literal["layernorm", "none"]: ...
    @property
    def activation(self) -> Literal["gelu", "relu", "identity"]: ...
    @property
    def ffn(self) -> Literal["plain", "scaled", "fused"]: ...


class Configuration(Protocol):
    """The attributes of `entropi.EntropiConfig` that decide a model's cost; any object with them will do."""

    @property
    def architecture(self) -> str: ...
    @property
    def parts(self) -> Parts: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int | None: ...  # None stands for 4 * hidden_size
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def bias(self) -> str: ...  # "all", "qk" or "none"
    @property
    def final_norm(self) -> bool: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


def _check_length(config: Configuration, seq_len: int) -> None:
    if not 1 <= seq_len <= config.max_position_embeddings:
        raise UserError(
            f"seq_len is {seq_len}, but has to be 1 to {config.max_position_embeddings}, the positions that"
            " this model has (max_position_embeddings)"
        )


def _ffn_width(config: Configuration) -> int:
    return 4 * config.hidden_size if config.intermediate_size is None else config.intermediate_size


def nonlinear_operations(config: Configuration, seq_len: int) -> list[OperationCount]:
    """Nonlinear operations of one forward pass over `seq_len` tokens (2501.03489, Tables 2, 3, 5 and 6).

    Softmax L*H times on `(T, T)`; LayerNorm 2L times on `(T, d)`; GELU or ReLU L times on `(T, m)`, m = 4d in
    the paper. Like the paper, this leaves out the one LayerNorm before the language-model head. Raises
    `UserError` for a `seq_len` that the model has no positions for.
    """
    _check_length(config, seq_len)
    layers, parts = config.num_hidden_layers, config.parts
    counts = [OperationCount(operation="softmax", count=layers * config.num_attention_heads, shape=(seq_len, seq_len))]
    if parts.norm == "layernorm":
        counts.append(OperationCount(operation="layernorm", count=2 * layers, shape=(seq_len, config.hidden_size)))
    if parts.activation != "identity":
        shape = (seq_len, _ffn_width(config))
        counts.append(OperationCount(operation=parts.activation, count=layers, shape=shape))
    return counts


def ffn_flops(config: Configuration, seq_len: int) -> int:
    """FLOPs of all feed-forward blocks for `seq_len` tokens; a multiplication and an addition count as two.

    4 d m T L with two matrices, which is 16 d^2 T L at m = 4d, or 2 d^2 T L with the fused one; these give
    the FFN figures of Tables 2, 3, 5 and 6. Raises `UserError` as `nonlinear_operations`.
    """
    _check_length(config, seq_len)
    width = config.hidden_size
    per_token = 2 * width * width if config.parts.ffn == "fused" else 4 * width * _ffn_width(config)
    return per_token * seq_len * config.num_hidden_layers


def attention_flops(config: Configuration, seq_len: int) -> int:
    """FLOPs of all attention blocks for `seq_len` tokens: 8 d^2 T L + 3 T^2 d L.

    This is the formula behind the attention figures of Tables 2, 3, 5 and 6: the four projections in full,
    and 3 T^2 d a layer for scores and weighted values. Raises `UserError` as `nonlinear_operations`.
    """
    _check_length(config, seq_len)
    width = config.hidden_size
    return (8 * width * width * seq_len + 3 * seq_len * seq_len * width) * config.num_hidden_layers


def parameters(config: Configuration) -> int:
    """Number of parameters inference needs, exactly as the model has them; a head tied to the embedding is free.

    V d + P d for the embeddings and 2d for the final LayerNorm; in each layer 4 d^2 for attention, 2 d m
    (fused: d^2) for the FFN, 4d for two LayerNorms, 2 for alpha and beta of Eq. 8, H P for the temperature,
    and the biases that `config.bias` keeps. The regulariser's thresholds take no part in inference and are left out.
    """
    parts = config.parts
    width, inner = config.hidden_size, _ffn_width(config)
    fused = parts.ffn == "fused"
    layer = 4 * width * width + (width * width if fused else 2 * width * inner)
    if config.bias == "all":
        layer += 4 * width + (width if fused else inner + width)
    elif config.bias == "qk":
        layer += 2 * width
    if parts.norm == "layernorm":
        layer += 4 * width
    if parts.ffn != "plain":
        layer += 2
    if parts.temperature:
        layer += config.num_attention_heads * config.max_position_embeddings
    rows = config.vocab_size * (1 if config.tie_word_embeddings else 2) + config.max_position_embeddings
    return rows * width + config.num_hidden_layers * layer + (2 * width if config.final_norm else 0)


def count(config: Configuration, seq_len: int) -> CostRecord:
    """All counts for one forward pass over `seq_len` tokens, before folding.

    Raises `UserError` for a `seq_len` that the model has no positions for.
    """
    return CostRecord(
        architecture=config.architecture,
        seq_len=seq_len,
        parameters=parameters(config),
        nonlinear=nonlinear_operations(config, seq_len),
        ffn_flops=ffn_flops(config, seq_len),
        attention_flops=attention_flops(config, seq_len),
    )
