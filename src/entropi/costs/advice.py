"""What to change: the paper's figures beside a prediction, what would help most, and what fits a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from entropi.costs.calibration import Calibration
from entropi.costs.operations import parameters
from entropi.costs.prediction import Network, Options, predict
from entropi.errors import UserError
from entropi.model.shape import Shape
from entropi.records import PredictionRecord

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


@dataclass(frozen=True)
class Change:
    """Another way to build or serve the model, and what it would save of the prompt's pass."""

    words: str
    saved_bytes: float
    saved_latency: float  # seconds


def changes(
    shape: Shape, seq_len: int, calibration: Calibration, line: Network, options: Options, now: PredictionRecord
) -> list[Change]:
    """Changes that save bytes, the one that saves most first."""
    found = []
    for words, other, chosen in _alternatives(shape, options):
        then = predict(other, seq_len, calibration, line, chosen)
        saved = now.prompt.bytes - then.prompt.bytes
        if saved > 0.005 * now.prompt.bytes:
            found.append(Change(words, saved, now.prompt.latency - then.prompt.latency))
    return sorted(found, key=lambda change: change.saved_bytes, reverse=True)


def _alternatives(shape: Shape, options: Options) -> Iterator[tuple[str, Shape, Options]]:
    parts, name = shape.parts, shape.architecture
    if parts.activation == "gelu":
        yield "ReLU in place of GELU", replace(shape, architecture=re.sub(r"\+G$", "+R", name)), options
    if parts.activation == "swiglu":
        bilinear = replace(shape, architecture=name.replace("+SwiGLU", "+Bilinear"))
        yield "a bilinear network in place of SwiGLU", bilinear, options
    if parts.norm != "none":
        bare = re.sub(r"\+(LN|RMS)(?=\+|$)", "", name)
        yield "no norms in the layers", replace(shape, architecture=bare), options
    if not parts.softmax_only:
        softmax_only = "SM(t)+ScFuFFN" if parts.temperature else "SM+ScFuFFN"
        words = f"softmax only ({softmax_only}): linear networks fold away"
        yield words, replace(shape, architecture=softmax_only), options
    if parts.temperature and shape.temperature_granularity == "position" and not shape.polynomial:
        words = "temperatures by head, which fold away"
        yield words, replace(shape, temperature_granularity="head"), options
    if not shape.polynomial:
        words = "training with squares of logits as attention weights (polynomial, t=1)"
        yield words, replace(shape, exp_iterations=1, polynomial=True), options
        iterations = shape.exp_iterations or options.exp_iterations
        if iterations > 2:
            words = f"training with the softmax kernel t=2 in place of t={iterations}"
            yield words, replace(shape, exp_iterations=2), options
    if options.embedding == "private":
        yield "a public token table", shape, replace(options, embedding="public")
    if shape.num_key_value_heads == shape.num_attention_heads and shape.num_attention_heads % 4 == 0:
        fewer = shape.num_attention_heads // 4
        yield f"{fewer} heads of keys and values for all queries", replace(shape, num_key_value_heads=fewer), options


@dataclass(frozen=True)
class Budget:
    """The most that the pass over a prompt may take: bytes, or seconds."""

    text: str
    limit: float
    measure: Callable[[PredictionRecord], float]


def budget(text: str) -> Budget:
    """From "2GB", "500MB" or "30s", "5min".

    Raises:
        UserError: none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GB|MB|s|min)\s*", text)
    if match is None or float(match.group(1)) == 0:
        raise UserError(f"{text!r} is no budget: write bytes such as 2GB or 500MB, or a time such as 30s or 5min")
    number, unit = float(match.group(1)), match.group(2)
    if unit in ("GB", "MB"):
        return Budget(text, number * {"GB": 1e9, "MB": 1e6}[unit], lambda record: record.prompt.bytes)
    return Budget(text, number * {"s": 1, "min": 60}[unit], lambda record: record.prompt.latency)


@dataclass(frozen=True)
class Fitting:
    """A configuration within a budget."""

    shape: Shape
    parameters: int  # in the layers, before folding
    prediction: PredictionRecord


SEARCHED = ("SM+LN+G", "SM+LN+R", "SM+R", "SM(t)+ScFuFFN")
WIDTHS = (256, 384, 512, 768, 1024, 1536)
DEPTHS = (2, 3, 4, 6, 8, 12, 16, 18, 24, 36, 48)
_HEAD = 64


def fitting(
    limit: Budget,
    shape: Shape,
    seq_len: int,
    calibration: Calibration,
    line: Network,
    options: Options,
    progress: Callable[[int, int], None] | None = None,
) -> list[Fitting]:
    """For every architecture and width the deepest model within a budget; most parameters in the layers first.

    Vocabulary, positions and kernel are those of `shape`, heads are 64 wide. A layer more costs the same at any depth,
    so two depths are predicted to find the deepest, which is then predicted itself.
    """
    found = []
    combinations = [(architecture, width) for architecture in SEARCHED for width in WIDTHS]
    for number, (architecture, width) in enumerate(combinations):
        base = replace(
            shape,
            architecture=architecture,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // _HEAD,
            num_key_value_heads=width // _HEAD,
        )

        def at(layers: int, base: Shape = base) -> PredictionRecord:
            return predict(replace(base, num_hidden_layers=layers), seq_len, calibration, line, options)

        two, three = limit.measure(at(2)), limit.measure(at(3))
        deepest = [depth for depth in DEPTHS if two + (depth - 2) * (three - two) <= limit.limit]
        while deepest:
            prediction = at(deepest[-1])
            if limit.measure(prediction) <= limit.limit:
                chosen = replace(base, num_hidden_layers=deepest[-1])
                found.append(Fitting(chosen, _in_layers(chosen), prediction))
                break
            deepest.pop()
        if progress is not None:
            progress(number + 1, len(combinations))
    return sorted(found, key=lambda one: one.parameters, reverse=True)


def _in_layers(shape: Shape) -> int:
    more = replace(shape, num_hidden_layers=shape.num_hidden_layers + 1)
    return (parameters(more) - parameters(shape)) * shape.num_hidden_layers
