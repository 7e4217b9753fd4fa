"""What both parties know of a model and of how it is computed: architecture, sizes, limits; no weight, and no JAX."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from entropi.activations import folded_names, known_activation
from entropi.errors import UserError
from entropi.softmax import SoftmaxForm, parse_for_exact, parse_of_model

TokenId = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Norm: TypeAlias = Literal["none", "rms", "layer"]
Embedding: TypeAlias = Literal["private", "public"]
Output: TypeAlias = Literal["logits", "top_k", "argmax"]
SoftmaxText: TypeAlias = Annotated[str, msgspec.Meta(max_length=32)]  # of an `entropi.softmax.SoftmaxForm`
RotarySet: TypeAlias = Annotated[list[Annotated[float, msgspec.Meta(ge=0, le=1e3)]], msgspec.Meta(max_length=1024)]

FORMAT = 3  # of folded models; `folded` reads older ones

LEAST_PAIR_FRACTION_BITS = 18  # with fewer, the shift of a pair is more than the 24 digits of a float32 can tell apart
# By a polynomial softmax a row's mean weight is about 16 (see folding). The division is right from 2^-8 to 2^8 of
# MIDDLE_WEIGHT, soon below that too small, and soon above it 0: so the middle leaves a bit more room above the mean.
MIDDLE_WEIGHT, MEAN_WEIGHT_BITS = 32.0, 8


class Description(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What both parties know of a model: its architecture and sizes, no weight. Read from `folded.json`.

    What the fields mean for the computation is `forward`'s docstring.
    """

    format: Annotated[int, msgspec.Meta(ge=FORMAT, le=FORMAT)]
    architecture: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[ -~]*\Z")]  # callers print it
    layers: Annotated[int, msgspec.Meta(ge=1, le=256)]
    heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    key_value_heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # fewer than heads: groups of queries share theirs
    hidden_size: Size
    vocab_size: Size
    positions: Size
    intermediate_size: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]  # between up and down; 0 without an activation
    position_embedding: Literal["learned", "rotary"]
    rotary_dimensions: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]  # first columns of a head that rotate; even
    rotary_base: Annotated[float, msgspec.Meta(ge=1, le=1e9)]
    temperature: bool  # q is scaled by a private factor per head and position
    softmax: SoftmaxText  # which it was trained with
    norm: Norm  # before attention and before the FFN; gains and biases are folded away
    norm_epsilon: Annotated[float, msgspec.Meta(gt=0, le=0.1)]
    parallel_residual: bool  # the FFN reads what attention reads
    activation: Annotated[str, msgspec.Meta(max_length=32)]  # "identity", or one of `folded_names`
    explicit_ffn: Annotated[list[int], msgspec.Meta(max_length=256)]  # layers with a linear map in the FFN's place
    final_norm: Norm
    centre: bool  # a matrix multiplies the state before the final norm or the head
    # The token ids that end an answer: one, or several, as chat models have. Clients do not ask: an end that a server
    # chooses would tell it which tokens an answer has.
    end_of_text: TokenId | Annotated[list[TokenId], msgspec.Meta(max_length=64)] | None = None
    log_length: bool = False  # q is scaled by log(n) / log(positions), n the keys that its row sees
    head_width: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] = 0  # 0: hidden_size / heads
    query_key_norm: bool = False  # rows of q and k are divided by their root mean square, before they rotate
    branch_norm: bool = False  # what attention and FFN add to the state is divided by its root mean square
    # Angles a position by pair of rotating columns, in sets, and the set of each layer; without, powers of rotary_base.
    rotary_frequencies: Annotated[list[RotarySet], msgspec.Meta(max_length=8)] = []
    rotary_layers: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=7)]], msgspec.Meta(max_length=256)] = []

    def __post_init__(self) -> None:
        problems = []
        if not self.head_width and self.hidden_size % self.heads:
            problems.append(f"hidden_size {self.hidden_size} is not a multiple of {self.heads} heads")
        if self.heads % self.key_value_heads:
            problems.append(f"{self.heads} heads are not a multiple of {self.key_value_heads} key_value_heads")
        if any(not 0 <= layer < self.layers for layer in self.explicit_ffn):
            problems.append(f"explicit_ffn names layers outside 0..{self.layers - 1}")
        if self.activation not in ("identity", *folded_names()):
            problems.append(f"activation {self.activation!r} is unknown; known are {', '.join(folded_names())}")
        if (self.activation == "identity") != (self.intermediate_size == 0):
            problems.append(f"intermediate_size is {self.intermediate_size} with activation {self.activation}")
        try:
            if parse_of_model(self.softmax).has_offsets and self.temperature:
                problems.append(f"the softmax {self.softmax} has offsets instead of a temperature")
        except UserError as error:
            problems.append(str(error))
        if self.log_length and self.positions < 2:
            problems.append("log_length needs at least 2 positions")
        rotary = self.position_embedding == "rotary"
        if self.rotary_dimensions % 2 or self.rotary_dimensions > self.head_size:
            problems.append(f"rotary_dimensions {self.rotary_dimensions} are odd or more than a head has")
        if rotary != (self.rotary_dimensions > 0):
            problems.append(f"rotary_dimensions are {self.rotary_dimensions} with {self.position_embedding} positions")
        if self.rotary_frequencies:
            if any(2 * len(one) != self.rotary_dimensions for one in self.rotary_frequencies):
                problems.append(f"rotary_frequencies are not {self.rotary_dimensions // 2} a set")
            if len(self.rotary_layers) != self.layers or max(self.rotary_layers) >= len(self.rotary_frequencies):
                problems.append(f"rotary_layers do not name one of rotary_frequencies for each of {self.layers} layers")
        elif self.rotary_layers:
            problems.append("rotary_layers name no rotary_frequencies")
        if self.branch_norm and (self.norm != "rms" or self.activation == "identity" or self.explicit_ffn):
            problems.append("branch_norm needs the norm rms, an activation, and no explicit_ffn")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def softmax_form(self) -> SoftmaxForm:
        """The parsed softmax."""
        return SoftmaxForm.parse(self.softmax)

    def computed_softmax(self, exact_softmax_as: str) -> SoftmaxForm:
        """What private inference evaluates: the model's own softmax, or `exact_softmax_as` in an exact one's place."""
        return parse_for_exact(exact_softmax_as) if self.softmax_form.exact else self.softmax_form

    @property
    def head_size(self) -> int:
        """k, the width of a head."""
        return self.head_width or self.hidden_size // self.heads

    @property
    def query_size(self) -> int:
        """H k, the width of all heads side by side."""
        return self.heads * self.head_size

    def frequencies(self, layer: int) -> list[float]:
        """Angle a position of every pair of rotating columns in a layer."""
        if self.rotary_frequencies:
            return self.rotary_frequencies[self.rotary_layers[layer]]
        turning = self.rotary_dimensions
        return [self.rotary_base ** (-j / turning) for j in range(0, turning, 2)]

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the server's weights; the client needs them to hold its empty shares.

        Before a norm whose gain folding multiplied into the matrix, the matrix also stands without it: the gained rows
        are divided by the root mean square of the plain ones.
        """
        d, v, m = self.hidden_size, self.vocab_size, self.intermediate_size
        q, k = self.query_size, self.key_value_heads * self.head_size
        joint = q + 2 * k + (q + k if self.query_key_norm else 0)
        written = 2 * d if self.branch_norm else d
        activation = known_activation(self.activation)
        up = 2 * m if activation is not None and activation.gated else m
        shapes: dict[str, tuple[int, ...]] = {"embedding": (v, d)}
        if self.position_embedding == "learned":
            shapes["positions"] = (self.positions, d)
        for layer in range(self.layers):
            shapes[f"{layer}.qkv"], shapes[f"{layer}.qkv_bias"] = (d, joint), (joint,)
            shapes[f"{layer}.output"], shapes[f"{layer}.output_bias"] = (q, written), (written,)
            if self.temperature:
                shapes[f"{layer}.inverse_temperature"] = (self.heads, self.positions)
            if not self.softmax_form.of_distance:
                shapes[f"{layer}.offset"] = (self.heads, self.positions)
            if self.activation != "identity":
                shapes[f"{layer}.up"], shapes[f"{layer}.up_bias"] = (d, up), (up,)
                shapes[f"{layer}.down"], shapes[f"{layer}.down_bias"] = (m, written), (written,)
            if layer in self.explicit_ffn:
                shapes[f"{layer}.ffn"], shapes[f"{layer}.ffn_bias"] = (d, d), (d,)
        if self.centre:
            shapes["centre"] = (d, d)
        shapes["head"], shapes["head_bias"] = (d, v), (v,)
        return shapes
