"""Nonlinear operations that leave a trained model: what may leave, the modules that fade, and what they merge into.

A `TaperedModel` begins as a copy of its teacher. Every operation that its target has not is under a gate g: at 1 the
teacher's operation alone is computed, at 0 what takes its place (for norms, TaperNorm: 2602.10408).

| operation | at gate g | left at g = 0 |
|---|---|---|
| norm | g norm(x) + (1 - g) map(x), map(x) = c centred(x) * gain + bias | map: into the matrices that read it |
| activation f | g f(u) + (1 - g) s h(u), h the target's or the identity | h; the learned s into the second matrix |
| softmax | g A(x) + (1 - g) A'(x) of heads' outputs and row entropies | the target's form A' |
| final norm that goes | as a norm, with a map that has no bias, as the head has none | map: into the head |
| final RMSNorm of a model whose norms go | g RMS(x) + (1 - g) LN(x), of one gain | LayerNorm |

c is a running mean of 1 / rms(x) over the tokens of a batch, no parameter; centred(x) is x - mean(x) after LayerNorm
and x after RMSNorm. With all gates at 0 `TaperedModel.merged` gives the plain model of the target, which computes the
same function.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from entropi.entropy.attention import entropy_attention
from entropi.errors import UserError
from entropi.model.architectures import Parts, parse_architecture
from entropi.model.attention import EntropiAttention
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.feedforward import ACTIVATIONS, FusedFeedForward, PlainFeedForward
from entropi.model.shape import BIASES
from entropi.softmax import SoftmaxForm, parse_of_model

OPERATIONS = ("norm", "activation", "softmax", "final_norm")  # that may leave
# What each activation may fade into.
_FADES = {
    "gelu": ("identity", "relu", "square"),
    "relu": ("identity", "square"),
    "leaky_relu": ("identity", "relu", "square"),
    "square": ("identity",),
    "swiglu": ("bilinear", "identity"),
    "geglu": ("bilinear", "identity"),
    "bilinear": ("identity",),
}
# Where the learned slope s of what takes its place starts: at the linear term of GELU around 0, its even term, ReLU
# itself, and of SiLU(a) b the linear term of SiLU.
_SLOPES = {"identity": 0.5, "relu": 1.0, "square": 0.4, "bilinear": 0.5}
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
_NETWORKS = ("plain", "scaled", "fused")  # each can be merged into those after it
_SLOWEST = 0.01  # least weight of a batch in the running mean of 1 / rms


def target_of(
    teacher: EntropiConfig,
    architecture: str,
    *,
    softmax: str = "exact",
    final_norm: bool = True,
    bias: str | None = None,
    embedding_dropout: float = 0.0,
    temperature_granularity: str = "position",
    temperature_parametrization: str = "literal",
) -> EntropiConfig:
    """The configuration of what `teacher` becomes; sizes, positions and vocabulary are the teacher's.

    Args:
        teacher: a model of this family, converted ones included.
        architecture: what is to be left of it, in the paper's notation.
        softmax: form of the softmax that is to be left.
        final_norm: whether the norm before the head stays; where it goes, the head is a matrix of its own.
        bias: which linear layers have a bias; by default the fewest that hold what is merged into them.
        embedding_dropout: share of the embeddings' numbers set to 0 while it trains.
        temperature_granularity, temperature_parametrization: of learnable temperatures that the teacher has not, which
            start at 1.

    Raises:
        UserError: nothing leaves, or the target has what the teacher has not; names all that is wrong.
    """
    before, after = teacher.parts, parse_architecture(architecture)
    problems = _problems_of_parts(before, after, teacher)
    if parse_of_model(softmax).exact and not teacher.softmax_form.exact:
        problems.append(f"the teacher's softmax is {teacher.softmax}, which does not become exact")
    needed = set(BIASES[teacher.bias])
    if before.norm == "layernorm" and after.norm == "none":
        needed |= {"query", "key", "value", "ffn"}
    if bias is None:
        bias = min((name for name, where in BIASES.items() if needed <= where), key=lambda name: len(BIASES[name]))
    elif missing := needed - BIASES.get(bias, frozenset()):
        problems.append(
            f"bias {bias!r} has no place for the biases of {', '.join(sorted(missing))}, which the norms leave"
        )
    if problems:
        raise UserError(f"{teacher.architecture} cannot be tapered to {architecture}: {'; '.join(problems)}")

    config = copy.deepcopy(teacher)
    config.architecture, config.softmax, config.bias = architecture.replace(" ", ""), softmax, bias
    config.final_norm = final_norm and teacher.final_norm
    config.entropy_regularizer, config.embedding_dropout = None, embedding_dropout
    if teacher.final_norm and not final_norm:
        config.tie_word_embeddings = False
    if after.temperature and not before.temperature:
        config.temperature_init = 1.0
        config.temperature_granularity = temperature_granularity
        config.temperature_parametrization = temperature_parametrization
    if problems := config.problems():
        raise UserError("; ".join(problems))
    if not leaving(teacher, config):
        raise UserError(
            f"nothing leaves {teacher.architecture} on the way to {architecture}: there is nothing to taper"
        )
    return config


def _problems_of_parts(before: Parts, after: Parts, teacher: EntropiConfig) -> list[str]:
    """Why a model of some parts cannot become one of others."""
    problems = []
    if before.weight_norm != "none" or after.weight_norm != "none":
        problems.append("norms on weights (WNorm, SNorm) cannot be tapered")
    if after.norm not in (before.norm, "none"):
        problems.append(f"the teacher has no {_NORMS[after.norm]}")
    if before.temperature and not after.temperature:
        problems.append("the teacher has temperatures, so the target has them, as SM(t) or Pow(t)")
    if after.activation not in (before.activation, *_FADES.get(before.activation, ())):
        has = "none" if before.activation == "identity" else before.activation
        problems.append(f"the teacher's activation is {has}, which does not become {after.activation}")
    if _NETWORKS.index(after.ffn) < _NETWORKS.index(before.ffn):
        problems.append(f"the teacher's feed-forward networks are {before.ffn}, which cannot become {after.ffn} ones")
    if teacher.branch_norm and after.norm == "none":
        problems.append("the teacher normalises what its branches add (branch_norm), which cannot be tapered")
    return problems


def leaving(teacher: EntropiConfig, target: EntropiConfig) -> list[str]:
    """Those of `OPERATIONS` that `teacher` has and `target` has not, or not as they are."""
    differs = {
        "norm": teacher.parts.norm != target.parts.norm,
        "activation": teacher.parts.activation != target.parts.activation,
        "softmax": teacher.softmax != target.softmax,
        "final_norm": teacher.final_norm and (not target.final_norm or _final_kind(teacher) != _final_kind(target)),
    }
    return [name for name in OPERATIONS if differs[name]]


def _final_kind(config: EntropiConfig) -> str:
    """As `make_final_norm`: models without norms have a LayerNorm there."""
    return "rmsnorm" if config.parts.norm == "rmsnorm" else "layernorm"


class TaperedNorm(nn.Module):
    """g norm(x) + (1 - g) map(x); the map is linear, or LayerNorm in an RMSNorm's place.

    Args:
        norm: the teacher's, whose gain and bias the map shares.
        into: "map"; "map_without_bias" for a reader that has none; or "layernorm".
    """

    scale: Tensor
    batches: Tensor

    def __init__(
        self, norm: nn.LayerNorm | nn.RMSNorm, into: Literal["map", "map_without_bias", "layernorm"] = "map"
    ) -> None:
        super().__init__()
        assert norm.eps is not None
        self.norm, self.into, self.gate, self.epsilon = norm, into, 1.0, norm.eps
        self.register_buffer("scale", torch.ones(()))  # c, running mean of 1 / rms
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # in that mean

    @property
    def centres(self) -> bool:
        return isinstance(self.norm, nn.LayerNorm)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(B, T, d)` -> `(B, T, d)`; in training c follows the inputs for as long as the norm is there."""
        if self.training and self.gate > 0.0 and self.into != "layernorm":
            self._measure(hidden)
        if self.gate == 1.0:
            return self.norm(hidden)
        left = self._left(hidden)
        return left if self.gate == 0.0 else self.gate * self.norm(hidden) + (1.0 - self.gate) * left

    @torch.no_grad()
    def _measure(self, hidden: Tensor) -> None:
        squares = self._centred(hidden.to(self.scale.dtype)).square().mean(dim=-1)
        now = (squares + self.epsilon).rsqrt().mean()
        self.batches = self.batches + 1
        # A tensor of its own: the one before may be needed for a gradient yet.
        self.scale = torch.lerp(self.scale, now, (1.0 / self.batches).clamp(min=_SLOWEST).to(now.dtype))

    def _centred(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(dim=-1, keepdim=True) if self.centres else hidden

    def _left(self, hidden: Tensor) -> Tensor:
        """What is left at g = 0."""
        gain, bias = self.norm.weight, self._bias
        if self.into == "layernorm":
            return functional.layer_norm(hidden, gain.shape, gain, None, self.epsilon)
        left = self._centred(hidden) * (self.scale * gain)
        return left if bias is None else left + bias

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self.norm, "bias", None) if self.into == "map" else None

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight `(out, d)` and bias `(out,)` of a Linear that reads map(x), for reading x; float64."""
        merged = weight * (self.scale * self.norm.weight).double()
        if self.centres:
            merged = merged - merged.mean(dim=1, keepdim=True)
        if self._bias is not None:
            shift = weight @ self._bias.double()
            bias = shift if bias is None else bias + shift
        return merged, bias


class TaperedFeedForward(nn.Module):
    """X + W_out (g f(u) + (1 - g) s h(u)) with u = W_in norm(X): a network whose activation f becomes h.

    Where f is gated and h is not, h takes the second half of u, which f multiplies by a function of the first.
    """

    def __init__(self, network: PlainFeedForward, becomes: str) -> None:
        super().__init__()
        self.network, self.becomes, self.gate = network, becomes, 1.0
        self.halves = network.gated and becomes == "identity"
        self.slope = nn.Parameter(torch.tensor(_SLOPES[becomes]))

    def forward(self, hidden: Tensor, common_slope: Tensor | None = None) -> Tensor:
        network, gate = self.network, self.gate
        inner = network.up(network.norm(hidden))
        if gate == 1.0:
            faded = network.activate(inner, common_slope)
        elif gate == 0.0:
            faded = self._left(inner)
        else:
            faded = gate * network.activate(inner, common_slope) + (1.0 - gate) * self._left(inner)
        return hidden + network.branch_norm(network.down(faded))

    def _left(self, inner: Tensor) -> Tensor:
        """s h(u)."""
        if self.halves:
            inner = inner.chunk(2, dim=-1)[1]
        return self.slope * (inner if self.becomes == "identity" else ACTIVATIONS[self.becomes](inner))


class TaperedAttention(EntropiAttention):
    """Attention whose outputs and row entropies are g times those of one softmax and 1 - g times those of another."""

    def __init__(self, config: EntropiConfig, layer_idx: int, becomes: SoftmaxForm) -> None:
        super().__init__(config, layer_idx)
        self.becomes, self.gate = becomes, 1.0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.gate == 1.0:
            return super().attend(query, key, value, settings)
        heads, entropy = entropy_attention(query, key, value, **{**settings, "softmax": self.becomes})
        if self.gate == 0.0:
            return heads, entropy
        before, entropy_before = super().attend(query, key, value, settings)
        return (
            self.gate * before + (1.0 - self.gate) * heads,
            self.gate * entropy_before + (1.0 - self.gate) * entropy,
        )


class TaperedModel(EntropiForCausalLM):
    """A copy of a teacher on its way to another architecture, all gates at 1: the teacher's function.

    Args:
        teacher: stays as it is.
        target: see `target_of`.

    Attributes:
        target: what it becomes.
        gates: by operation that leaves, the gate of every layer; of the final norm one.
    """

    def __init__(self, teacher: EntropiForCausalLM, target: EntropiConfig) -> None:
        own = copy.deepcopy(teacher.config)
        own.entropy_regularizer, own.embedding_dropout = None, target.embedding_dropout
        if target.parts.temperature and not own.parts.temperature:  # from the start, at 1
            own.architecture = re.sub(r"^(SM|Pow)", r"\1(t)", own.architecture)
            for name in ("temperature_init", "temperature_granularity", "temperature_parametrization"):
                setattr(own, name, getattr(target, name))
        super().__init__(own)
        self.target = target
        theirs = {n: v for n, v in teacher.state_dict().items() if not n.startswith("entropy_regularizer.")}
        missing, unexpected = self.load_state_dict(theirs, strict=False)
        assert not unexpected
        assert all(".temperature." in name for name in missing)
        self.generation_config = copy.deepcopy(teacher.generation_config)
        self._fading = self._fade(leaving(teacher.config, target))
        self.gates = {name: [1.0] * len(modules) for name, modules in self._fading.items()}

    def _fade(self, names: Sequence[str]) -> dict[str, list[list[Any]]]:
        """Put what is to fade in the place of what is there; by operation, a list of modules a layer."""
        fading: dict[str, list[list[Any]]] = {name: [] for name in names}
        blocks: list[Any] = list(self.model.blocks)
        for index, block in enumerate(blocks):
            if "norm" in fading:
                block.attention_norm = TaperedNorm(block.attention_norm)
                block.feed_forward.norm = TaperedNorm(block.feed_forward.norm)
                fading["norm"].append([block.attention_norm, block.feed_forward.norm])
            if "activation" in fading:
                block.feed_forward = TaperedFeedForward(block.feed_forward, self.target.parts.activation)
                fading["activation"].append([block.feed_forward])
            if "softmax" in fading:
                attention = TaperedAttention(self.config, index, self.target.softmax_form)
                attention.load_state_dict(block.attention.state_dict())
                block.attention = attention
                fading["softmax"].append([attention])
        if "final_norm" in fading:
            norm: Any = self.model.final_norm
            self.model.final_norm = TaperedNorm(norm, "layernorm" if self.target.final_norm else "map_without_bias")
            fading["final_norm"].append([self.model.final_norm])
        return fading

    def set_gates(self, gates: Mapping[str, Sequence[float]]) -> None:
        """Set the gates, by operation and layer; operations that are not named stay as they are."""
        for name, values in gates.items():
            for modules, gate in zip(self._fading[name], values, strict=True):
                for module in modules:
                    module.gate = gate
            self.gates[name] = list(values)

    @torch.no_grad()
    def merged(self) -> EntropiForCausalLM:
        """The plain model of the target architecture that this one is with all gates at 0; on the same device.

        Matrices are multiplied in float64 and rounded once.
        """
        state: dict[str, Tensor] = {"model.token_embedding.weight": self.model.token_embedding.weight}
        if self.model.position_embedding is not None:
            state["model.position_embedding.weight"] = self.model.position_embedding.weight
        for index, block in enumerate(self.model.blocks):
            state |= _named(f"model.blocks.{index}", _merged_block(block, self.target))
        if self.model.leaky_slope is not None and self.target.parts.activation == "leaky_relu":
            state["model.leaky_slope"] = self.model.leaky_slope

        head, norm = self.lm_head.weight.double(), self.model.final_norm
        if isinstance(norm, TaperedNorm) and norm.into == "map_without_bias":
            head, _ = norm.merge(head, None)
        elif isinstance(norm, TaperedNorm):  # LayerNorm in an RMSNorm's place
            weight = norm.norm.weight
            state |= _named("model.final_norm", {"weight": weight, "bias": torch.zeros_like(weight)})
        else:
            state |= _named("model.final_norm", norm.state_dict())
        state["lm_head.weight"] = head

        model = EntropiForCausalLM(copy.deepcopy(self.target))
        model.load_state_dict(state)  # strict: nothing is left as it was drawn
        model.tie_weights()
        model.generation_config = copy.deepcopy(self.generation_config)
        model.config.eos_token_id = self.config.eos_token_id
        return model.to(self.device).train(self.training)


def _named(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _merged_block(block: Any, target: EntropiConfig) -> dict[str, Tensor]:
    """The state of a block of the target."""
    attention, biased = block.attention, BIASES[target.bias]
    linears = ("query", "key", "value", "output")
    state = {n: v for n, v in attention.state_dict().items() if n.partition(".")[0] not in linears}
    for name in linears:
        weight, bias = _merged_linear(getattr(attention, name), None if name == "output" else block.attention_norm)
        state |= _linear(name, weight, bias, name in biased)
    state = _named("attention", state)
    if target.parts.norm != "none":
        state |= _named("attention_norm", block.attention_norm.state_dict())
    state |= _named("branch_norm", block.branch_norm.state_dict())
    return state | _named("feed_forward", _merged_feed_forward(block.feed_forward, target))


def _merged_feed_forward(network: Any, target: EntropiConfig) -> dict[str, Tensor]:
    """The state of a feed-forward network of the target; alpha and beta are 1 where the teacher has none (Eq. 8)."""
    biased, kind = "ffn" in BIASES[target.bias], target.parts.ffn
    inner = network.network if isinstance(network, TaperedFeedForward) else network
    one = torch.ones((), device=next(inner.parameters()).device)
    scales = {name: getattr(inner, name, one) for name in ("alpha", "beta")} if kind != "plain" else {}
    if isinstance(inner, FusedFeedForward):
        return _linear("fused", *_merged_linear(inner.fused, None), biased) | scales
    (up, up_bias), (down, down_bias) = _merged_linear(inner.up, inner.norm), _merged_linear(inner.down, None)
    if isinstance(network, TaperedFeedForward):
        down = down * network.slope.double()
        if network.halves:
            up, up_bias = up.chunk(2)[1], None if up_bias is None else up_bias.chunk(2)[1]
    if kind == "fused":
        shift = 0.0 if up_bias is None else down @ up_bias
        bias = None if up_bias is None and down_bias is None else shift + (0.0 if down_bias is None else down_bias)
        return _linear("fused", down @ up, bias, biased) | scales
    state = _linear("up", up, up_bias, biased) | _linear("down", down, down_bias, biased) | scales
    if target.parts.norm != "none":
        state |= _named("norm", inner.norm.state_dict())
    if target.parts.activation == "leaky_relu" and isinstance(inner.leaky_slope, nn.Parameter):
        state["leaky_slope"] = inner.leaky_slope
    return state | _named("branch_norm", inner.branch_norm.state_dict())


def _merged_linear(linear: nn.Linear, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64, with the map in them that a norm has become."""
    weight, bias = linear.weight.double(), None if linear.bias is None else linear.bias.double()
    return norm.merge(weight, bias) if isinstance(norm, TaperedNorm) else (weight, bias)


def _linear(name: str, weight: Tensor, bias: Any, biased: bool) -> dict[str, Tensor]:
    """The state of a Linear, with a bias of 0 where the target has one and the model none."""
    state = {f"{name}.weight": weight}
    if biased:
        state[f"{name}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    else:
        assert bias is None
    return state
