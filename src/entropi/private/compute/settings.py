"""How the engines compute and what they reveal: the settings on which both parties agree, and what each then learns."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from entropi.private.compute.description import LEAST_PAIR_FRACTION_BITS, SoftmaxText
from entropi.softmax import USUAL_FOR_EXACT, parse_for_exact

SERVER: Literal[0] = 0  # ranks of the two parties
CLIENT: Literal[1] = 1
MOST_MEMORY_GB = 1_000_000  # which no machine has; a system's numbers end at 2^63 bytes


MOST_SHIFT = 12  # of `Settings.norm_shifts`
NormShift: TypeAlias = Annotated[int, msgspec.Meta(ge=-MOST_SHIFT, le=MOST_SHIFT)]


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How the secure engine computes; both parties must agree.

    The ring has 64 bits: a product carries twice the fraction bits until it is truncated, so that in 32 bits, with the
    12 fraction bits that our functions need at least, it would have to stay below 2^6; 128 bits would double the bytes.
    """

    protocol: Literal["cheetah"] = "cheetah"
    ring_bits: Literal[64] = 64
    # More resolve smaller numbers and hold less large ones; `select_fraction_bits` chooses or checks them for a model.
    fraction_bits: Annotated[int, msgspec.Meta(ge=12, le=22)] = 18
    # Binary places by which rows are moved before their squares are summed, by layer and last before the final norm; a
    # norm does not change by that, and what is summed then fits the numbers. None move where this is empty.
    norm_shifts: Annotated[tuple[NormShift, ...], msgspec.Meta(max_length=257)] = ()
    # What logits of the calibration text reach; far larger ones are of values that left the range of the numbers.
    largest_logit: Annotated[float, msgspec.Meta(gt=0)] | None = None
    # The largest logit behind a final row of zeros, which a norm makes of rows that are too large: of the head's bias.
    blank_logit: float | None = None
    # What is evaluated for a model trained with the exact softmax: "quartic" is right to 0.0002 for 550 bytes a score;
    # of the powers (1 + x / 2^t)^(2^t) each t costs 110 and halves the error. Other models bring their own softmax.
    exact_softmax_as: SoftmaxText = USUAL_FOR_EXACT
    # Whose the token table is: the server's, read by a one-hot product, or everybody's, read by the client alone.
    embedding: Literal["private", "public"] = "private"
    # Two tokens in one row of the private table's product: half of its bytes, where `select_fraction_bits` allows it.
    paired: bool = False
    # What the client learns of each token's logits: all, the `choices` largest, or which one is the largest.
    output: Literal["logits", "top_k", "argmax"] = "logits"
    choices: Annotated[int, msgspec.Meta(ge=1, le=16)] = 8
    # Binary places that these logits are rounded to, in secret; None for all there are.
    logit_bits: Annotated[int, msgspec.Meta(ge=0, le=8)] | None = None

    def __post_init__(self) -> None:
        parse_for_exact(self.exact_softmax_as, "exact_softmax_as")
        if self.paired and self.embedding == "public":
            raise ValueError("tokens are paired in the product with a private table, and the embedding is public")
        if self.paired and self.fraction_bits < LEAST_PAIR_FRACTION_BITS:
            raise ValueError(f"tokens cannot be paired with fewer than {LEAST_PAIR_FRACTION_BITS} fraction bits")
        if self.logit_bits is not None and self.output == "argmax":
            raise ValueError("no logits are revealed that could be rounded")

    @property
    def chooses(self) -> bool:
        """Whether something is computed of the logits before they are revealed: by the engine, also where all else is
        prepared."""
        return self.output != "logits" or self.logit_bits is not None


TRUST = {
    "cheetah": "two parties, semi-honest, no third party: the server learns how many tokens there are and nothing "
    "else of prompt and answer; the client learns the logits, the architecture and the tokenizer, and nothing else "
    "of the weights"
}


def trust(settings: Settings, prefix_tokens: int = 0, *, drafts: bool = False, several: bool = False) -> str:
    """`TRUST` in the case of these settings and of a public prefix of so many tokens: what each side learns.

    With `drafts` the client had some in its passes; `several` prompts shared theirs.
    """
    learned = {
        "logits": "the logits",
        "top_k": f"the {settings.choices} likeliest tokens and their logits",
        "argmax": "the likeliest token",
    }[settings.output]
    if settings.logit_bits is not None:
        learned += f", rounded to {2.0**-settings.logit_bits:g},"
    text = TRUST[settings.protocol].replace("the logits", learned).replace(",,", ",")
    if drafts:
        text = text.replace("how many tokens there are", "how many tokens there are, how many were drafted and held")
    if several:
        text = text.replace(
            "how many tokens there are and nothing else of prompt and answer",
            "how many prompts share a pass, how many tokens each of them and its answer have, and nothing else of them",
        )
    text += ", whose token embeddings are public" if settings.embedding == "public" else ""
    return text + (f"; every prompt continues {prefix_tokens} public tokens" if prefix_tokens else "")
