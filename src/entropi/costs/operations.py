"""Exact nonlinear-operation counts, FLOPs and parameters of a configuration, as the paper counts them.

Everything here is arithmetic on integers; no model is built and torch is not imported. L layers, H heads,
d hidden size, m FFN width, T sequence length, P positions, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from entropi.activations import folded_name
from entropi.errors import UserError
from entropi.model.shape import BIASES
from entropi.records import CountRecord, OperationCount
from entropi.softmax import SoftmaxForm


class Parts(Protocol):
    """What an architecture string stands for."""

    @property
    def powers(self) -> bool: ...  # of logits over the number of keys, in the softmax's place
    @property
    def temperature(self) -> bool: ...
    @property
    def norm(self) -> str: ...  # "layernorm", "rmsnorm" or "none"
    @property
    def activation(self) -> str: ...  # "gelu", "relu", "leaky_relu", "square", "bilinear", "swiglu", "identity"
    @property
    def gated(self) -> bool: ...  # two halves of the inner width are multiplied
    @property
    def ffn(self) -> str: ...  # "plain", "scaled" or "fused"


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
    def num_key_value_heads(self) -> int | None: ...  # None stands for num_attention_heads
    @property
    def head_dim(self) -> int: ...
    @property
    def query_key_norm(self) -> bool: ...
    @property
    def branch_norm(self) -> bool: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def position_embedding(self) -> str: ...  # "learned" or "rotary"
    @property
    def temperature_granularity(self) -> str: ...  # "position" or "head"
    @property
    def log_length_scaling(self) -> bool: ...
    @property
    def leaky_slope_learned(self) -> str: ...  # "fixed", "layer" or "global"
    @property
    def bias(self) -> str: ...  # a key of `shape.BIASES`
    @property
    def final_norm(self) -> bool | None: ...
    @property
    def softmax_form(self) -> SoftmaxForm: ...
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


def _key_value_width(config: Configuration) -> int:
    """Columns of all keys, or values, of one token; less than of queries where queries share them."""
    return config.head_dim * (config.num_key_value_heads or config.num_attention_heads)


def _query_width(config: Configuration) -> int:
    """Columns of all queries of one token; d unless the model has another width of heads."""
    return config.head_dim * config.num_attention_heads


def _has_linear_map(config: Configuration) -> bool:
    """Whether folding leaves a d x d matrix of each feed-forward network: the linear part of one behind a norm."""
    return config.parts.norm != "none" and config.parts.activation in ("identity", "leaky_relu")


def nonlinear_operations(config: Configuration, seq_len: int, *, folded: bool = False) -> list[OperationCount]:
    """Nonlinear operations of one forward pass over `seq_len` tokens (2501.03489, Tables 2, 3, 5 and 6).

    Softmax, or powers of logits, L*H times on `(T, T)`; LayerNorm or RMSNorm 2L times on `(T, d)`, 4L times where
    branches have norms of their own, and L (H + G) times on `(T, k)` where queries and keys have; the activation L
    times on `(T, m)`, m = 4d in the paper; a square and a bilinear product count as what they are, multiplications of
    two secrets, and SwiGLU as one function of its two halves.
    Folding turns LayerNorm into RMSNorm without parameters and leaky ReLU into ReLU. Like the paper, this leaves out
    the one norm before the language-model head. Raises `UserError` for a `seq_len` that the model has no positions for.
    """
    _check_length(config, seq_len)
    layers, parts = config.num_hidden_layers, config.parts
    attention = "powers" if parts.powers else "softmax"
    counts = [OperationCount(operation=attention, count=layers * config.num_attention_heads, shape=(seq_len, seq_len))]
    if parts.norm != "none":
        norm = "rmsnorm" if folded else parts.norm
        norms = 4 if config.branch_norm else 2
        counts.append(OperationCount(operation=norm, count=norms * layers, shape=(seq_len, config.hidden_size)))
    if config.query_key_norm:
        heads = config.num_attention_heads + (config.num_key_value_heads or config.num_attention_heads)
        counts.append(OperationCount(operation="rmsnorm", count=heads * layers, shape=(seq_len, config.head_dim)))
    if parts.activation != "identity":
        activation = folded_name(parts.activation) if folded else parts.activation
        counts.append(OperationCount(operation=activation, count=layers, shape=(seq_len, _ffn_width(config))))
    return counts


def ffn_flops(config: Configuration, seq_len: int, *, folded: bool = False) -> int:
    """FLOPs of all feed-forward blocks for `seq_len` tokens; a multiplication and an addition count as two.

    4 d m T L with two matrices, which is 16 d^2 T L at m = 4d, or 2 d^2 T L with the fused one; these give
    the FFN figures of Tables 2, 3, 5 and 6. A bilinear network and SwiGLU have three matrices. Folding leaves nothing
    of a linear network, or one d x d matrix where a norm stands before it. Raises `UserError` as
    `nonlinear_operations`.
    """
    _check_length(config, seq_len)
    width, parts = config.hidden_size, config.parts
    matrices = 3 if parts.gated else 2
    per_token = 2 * width * width if parts.ffn == "fused" else 2 * matrices * width * _ffn_width(config)
    if folded:
        if parts.activation == "identity":
            per_token = 0
        if _has_linear_map(config):
            per_token += 2 * width * width
    return per_token * seq_len * config.num_hidden_layers


def attention_flops(config: Configuration, seq_len: int) -> int:
    """FLOPs of all attention blocks for `seq_len` tokens: 8 d^2 T L + 3 T^2 d L.

    This is the formula behind the attention figures of Tables 2, 3, 5 and 6: the four projections in full (less
    with grouped queries), and 3 T^2 d a layer for scores and weighted values. Folding changes nothing here. Raises
    `UserError` as `nonlinear_operations`.
    """
    _check_length(config, seq_len)
    own = _query_width(config)
    projections = 4 * config.hidden_size * (own + _key_value_width(config))
    return (projections * seq_len + 3 * seq_len * seq_len * own) * config.num_hidden_layers


def parameters(config: Configuration) -> int:
    """Number of parameters inference needs, exactly as the model has them; a head tied to the embedding is free.

    V d + P d for the embeddings (V d with rotary positions) and 2d for the final LayerNorm; in each layer 2 d H k +
    2 d G k for attention with G heads of keys and values, 2 k for norms of queries and keys, 2 d for norms of branches,
    2 d m (bilinear and SwiGLU: 3 d m, fused: d^2) for the FFN,
    4d for two LayerNorms (RMSNorms: 2d), 2 for alpha and beta of Eq. 8, H P (or H) for the temperature, H for the
    gains of log-length scaling, 1 for a leaky ReLU's learned slope, and the biases that `config.bias` keeps. A
    normalised weight counts as the matrix it is; the regulariser's thresholds take no part in inference and are left
    out.
    """
    parts, biased = config.parts, BIASES[config.bias]
    width, inner, shared = config.hidden_size, _ffn_width(config), _key_value_width(config)
    own, fused = _query_width(config), parts.ffn == "fused"
    up = 2 * inner if parts.gated else inner
    layer = 2 * width * (own + shared) + (width * width if fused else width * (up + inner))
    sizes = {"query": own, "key": shared, "value": shared, "output": width, "ffn": width if fused else up + width}
    layer += sum(size for name, size in sizes.items() if name in biased)
    layer += 2 * config.head_dim * config.query_key_norm + 2 * width * config.branch_norm
    gains = {"layernorm": 2, "rmsnorm": 1, "none": 0}
    layer += 2 * gains[parts.norm] * width
    if parts.ffn != "plain":
        layer += 2
    if parts.temperature:
        positions = config.max_position_embeddings if config.temperature_granularity == "position" else 1
        layer += config.num_attention_heads * positions
    if config.log_length_scaling:
        layer += config.num_attention_heads
    slopes = {"layer": config.num_hidden_layers, "global": 1, "fixed": 0}[config.leaky_slope_learned]
    rows = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    if config.position_embedding == "learned":
        rows += config.max_position_embeddings
    final = (gains["rmsnorm"] if parts.norm == "rmsnorm" else gains["layernorm"]) * width if config.final_norm else 0
    leaky = slopes if parts.activation == "leaky_relu" else 0
    return rows * width + config.num_hidden_layers * layer + final + leaky


def folded_parameters(config: Configuration) -> int:
    """Numbers that the folded form holds, all temperatures by position taken to differ and every layer to fold.

    Embedding and head are two matrices there, every matrix has a bias, and a model without norms has one d x d
    matrix before its final norm. Matrices before a norm of queries and keys, or of a branch, stand there twice.
    """
    parts = config.parts
    width, inner, shared = config.hidden_size, _ffn_width(config), _key_value_width(config)
    own, written = _query_width(config), (2 if config.branch_norm else 1) * width
    plain = own + shared if config.query_key_norm else 0
    layer = (width + 1) * (own + 2 * shared + plain) + (own + 1) * written
    by_position, softmax = config.num_attention_heads * config.max_position_embeddings, config.softmax_form
    if parts.temperature and config.temperature_granularity == "position" and not softmax.has_offsets:
        layer += by_position
    if not softmax.of_distance:  # which has offsets beside temperatures, or with them in it
        layer += by_position
    if parts.activation != "identity":
        up = 2 * inner if parts.gated else inner
        layer += (width + 1) * up + (inner + 1) * written
    if _has_linear_map(config):
        layer += (width + 1) * width
    ends = config.vocab_size * width + (width + 1) * config.vocab_size
    if config.position_embedding == "learned":
        ends += config.max_position_embeddings * width
    if config.final_norm and parts.norm == "none":
        ends += width * width
    return ends + config.num_hidden_layers * layer


def count(config: Configuration, seq_len: int, *, folded: bool = False) -> CountRecord:
    """All counts for one forward pass over `seq_len` tokens, before folding or after.

    Raises `UserError` for a `seq_len` that the model has no positions for.
    """
    return CountRecord(
        architecture=config.architecture,
        seq_len=seq_len,
        parameters=folded_parameters(config) if folded else parameters(config),
        nonlinear=nonlinear_operations(config, seq_len, folded=folded),
        ffn_flops=ffn_flops(config, seq_len, folded=folded),
        attention_flops=attention_flops(config, seq_len),
        folded=folded,
    )
