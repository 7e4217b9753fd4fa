"""What to change: the paper's figures beside a prediction, and what would help most."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from entropi.costs.prediction import CostModel, Options, described
from entropi.model.shape import Shape
from entropi.records import BatchCost, PredictionRecord
from entropi.softmax import SoftmaxForm

# GB and minutes of GPT-2 small's shape by (layers, T, architecture): 2501.03489, Tables 2, 3, 5 and 6.
PAPER = {
    (12, 128, "SM+LN+G"): (25.32, 8.21),
    (12, 128, "SM+LN+R"): (9.44, 6.06),
    (12, 128, "SM+ScFuFFN"): (6.43, 4.76),
    (12, 128, "SM(t)+ScFuFFN"): (6.43, 4.76),
    (12, 256, "SM+LN+G"): (58.51, 16.57),
    (12, 256, "SM+LN+R"): (26.73, 12.59),
    (12, 256, "SM+ScFuFFN"): (20.72, 10.45),
    (12, 256, "SM(t)+ScFuFFN"): (20.72, 10.45),
    (18, 128, "SM+LN+G"): (37.17, 10.77),
    (18, 128, "SM+LN+R"): (13.34, 8.04),
    (18, 128, "SM+ScFuFFN"): (8.83, 6.07),
    (18, 128, "SM(t)+ScFuFFN"): (8.83, 6.07),
    (12, 512, "SM+LN+G"): (145.24, 30.74),
    (12, 512, "SM+LN+R"): (81.71, 23.54),
    (12, 512, "SM+ScFuFFN"): (69.68, 19.44),
    (12, 512, "SM(t)+ScFuFFN"): (69.68, 19.44),
}
PAPER_REMARK = (
    "The paper's minutes are not comparable: the network it states, 100 Mbit/s, cannot carry its stated bytes in its"
    " stated time."
)


def paper_figures(shape: Shape, seq_len: int) -> tuple[float, float] | None:
    """GB and minutes that the paper prints for a configuration, None where it is not one of the paper's."""
    if shape.hidden_size != 768 or shape.num_attention_heads != 12:
        return None
    return PAPER.get((shape.num_hidden_layers, seq_len, shape.architecture))


def size_options(shape: Shape) -> str | None:
    """The options of `entropi cost` that give an architecture by name these sizes; None where there are none.

    What no prediction depends on is left out.
    """
    options = {
        "num_hidden_layers": "--layers",
        "num_attention_heads": "--heads",
        "num_key_value_heads": "--key-value-heads",
        "hidden_size": "--hidden-size",
        "intermediate_size": "--intermediate-size",
        "vocab_size": "--vocab-size",
        "position_embedding": "--position-embedding",
        "bias": "--bias",
    }
    without_effect = (
        *("max_position_embeddings", "layer_norm_epsilon", "eos_token_id", "tie_word_embeddings", "rotary_base"),
        "softmax",
    )
    kept = {name: getattr(shape, name) for name in (*options, *without_effect)}
    if Shape(architecture=shape.architecture, **kept) != shape:
        return None
    return " ".join(f"{option} {kept[name]}" for name, option in options.items())


_TOGETHER, _WORTHWHILE = 8, 1.5  # prompts a pass that servers allow, and times the tokens a minute


def together(shape: Shape, seq_len: int, costs: CostModel, now: PredictionRecord) -> BatchCost | None:
    """As many prompts a pass as servers usually allow, where they make far more tokens a minute than one by one."""
    if now.further is None:
        return None
    if now.batch is not None:
        found = now.batch
    else:
        found = costs.predict_batch(described(shape), seq_len, _TOGETHER)
    return found if found.tokens_a_minute > _WORTHWHILE * now.tokens_a_minute else None


@dataclass(frozen=True)
class Change:
    """Another way to build or serve the model, and what it would save of the prompt's pass."""

    words: str
    saved_bytes: float
    saved_latency: float  # seconds


def changes(shape: Shape, seq_len: int, costs: CostModel, now: PredictionRecord) -> list[Change]:
    """Changes that save bytes, the one that saves most first; `now` is the prediction without any."""
    found = []
    for words, other, chosen in _alternatives(shape, costs.options):
        then = replace(costs, options=chosen).predict(other, seq_len)
        saved = now.prompt.bytes - then.prompt.bytes
        if saved > 0.005 * now.prompt.bytes:
            found.append(Change(words, saved, now.prompt.latency - then.prompt.latency))
    return sorted(found, key=lambda change: change.saved_bytes, reverse=True)


def _alternatives(shape: Shape, options: Options) -> Iterator[tuple[str, Shape, Options]]:
    parts, name = shape.parts, shape.architecture
    if parts.activation == "gelu":
        relu = re.sub(r"\+G$", "+R", name)
        yield f"ReLU in place of GELU ({relu})", replace(shape, architecture=relu), options
    if parts.activation in ("swiglu", "geglu"):
        gated = "SwiGLU" if parts.activation == "swiglu" else "GeGLU"
        bilinear = name.replace(f"+{gated}", "+Bilinear")
        words = f"a bilinear network in place of {gated} ({bilinear})"
        yield words, replace(shape, architecture=bilinear), options

    if parts.norm != "none":
        bare = re.sub(r"\+(LN|RMS)(?=\+|$)", "", name)
        yield f"no norms in the layers ({bare})", replace(shape, architecture=bare, branch_norm=False), options
    if not parts.softmax_only:
        softmax_only = f"{name.split('+')[0]}+ScFuFFN"
        words = f"{'attention' if parts.powers else 'softmax'} only ({softmax_only}): linear networks fold away"
        yield words, replace(shape, architecture=softmax_only, branch_norm=False), options
    if shape.query_key_norm:
        yield "no norms of queries and keys", replace(shape, query_key_norm=False), options
    if shape.branch_norm:
        yield "no norms after attention and feed-forward networks", replace(shape, branch_norm=False), options
    if parts.temperature and shape.temperature_granularity == "position" and not shape.softmax_form.has_offsets:
        words = "temperatures by head, which fold away"
        yield words, replace(shape, temperature_granularity="head"), options

    if not parts.powers:
        powers = re.sub("^SM", "Pow", name)
        words = f"training with powers of logits over the number of keys ({powers}): no division"
        yield words, replace(shape, architecture=powers, softmax="exact"), options
    if shape.softmax_form.of_distance:
        words = "training with squares of logits as attention weights (polynomial-1)"
        yield words, replace(shape, softmax="polynomial-1"), options
        served = SoftmaxForm.parse(options.exact_softmax_as) if shape.softmax_form.exact else shape.softmax_form
        if served.kind == "quartic" or (served.kind == "power" and served.iterations > 2):
            words = f"training with the softmax kernel t=2 (power-2) in place of the {served.words}"
            yield words, replace(shape, softmax="power-2"), options

    if options.embedding == "private":
        yield "a public token table", shape, replace(options, embedding="public")
    if shape.num_key_value_heads == shape.num_attention_heads and shape.num_attention_heads % 4 == 0:
        fewer = shape.num_attention_heads // 4
        words = f"{fewer} head{'s' if fewer > 1 else ''} of keys and values for all queries"
        yield words, replace(shape, num_key_value_heads=fewer), options
