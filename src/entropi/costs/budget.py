"""What fits a budget: the deepest model of every width within so many bytes or seconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from entropi.costs.operations import parameters
from entropi.costs.prediction import CostModel
from entropi.errors import UserError
from entropi.model.shape import Shape
from entropi.records import PredictionRecord

SEARCHED = ("SM+LN+G", "SM+LN+R", "SM+R", "SM(t)+ScFuFFN")
WIDTHS = (256, 384, 512, 768, 1024, 1536)
DEPTHS = (2, 3, 4, 6, 8, 12, 16, 18, 24, 36, 48)
HEAD = 64  # columns of an attention head


@dataclass(frozen=True)
class Budget:
    """The most that the pass over a prompt may take: bytes, or seconds."""

    text: str
    limit: float
    measure: Callable[[PredictionRecord], float]


def parse_budget(text: str) -> Budget:
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
class Candidate:
    """A configuration of the search, and what it costs."""

    shape: Shape
    parameters: int  # in the layers, before folding
    prediction: PredictionRecord


@dataclass(frozen=True)
class Search:
    """What a search found within its budget, most parameters first, and the cheapest of all that it looked at."""

    fitting: list[Candidate]
    cheapest: Candidate


def search(
    budget: Budget,
    shape: Shape,
    seq_len: int,
    costs: CostModel,
    progress: Callable[[int, int], None] | None = None,
) -> Search:
    """For every architecture and width the deepest model within a budget; most parameters in the layers first.

    Vocabulary, positions and kernel are those of `shape`, heads are 64 wide.
    """
    fitting, cheapest = [], None
    combinations = [(architecture, width) for architecture in SEARCHED for width in WIDTHS]
    for number, (architecture, width) in enumerate(combinations):
        base = replace(
            shape,
            architecture=architecture,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // HEAD,
            num_key_value_heads=width // HEAD,
        )
        shallowest, deepest = _deepest(budget, base, seq_len, costs)
        if deepest is not None:
            fitting.append(deepest)
        if cheapest is None or budget.measure(shallowest.prediction) < budget.measure(cheapest.prediction):
            cheapest = shallowest
        if progress is not None:
            progress(number + 1, len(combinations))

    assert cheapest is not None
    return Search(sorted(fitting, key=lambda one: one.parameters, reverse=True), cheapest)


def _deepest(budget: Budget, base: Shape, seq_len: int, costs: CostModel) -> tuple[Candidate, Candidate | None]:
    """The model of fewest layers, and the deepest that fits.

    A layer more costs the same at any depth, so two depths are predicted to find the deepest, which is then predicted
    itself.
    """

    def at(layers: int) -> Candidate:
        shape = replace(base, num_hidden_layers=layers)
        return Candidate(shape, _in_layers(shape), costs.predict(shape, seq_len))

    first, second = DEPTHS[0], DEPTHS[1]
    shallowest = at(first)
    least = budget.measure(shallowest.prediction)
    layer = (budget.measure(at(second).prediction) - least) / (second - first)

    for depth in reversed([depth for depth in DEPTHS if least + (depth - first) * layer <= budget.limit]):
        candidate = shallowest if depth == first else at(depth)
        if budget.measure(candidate.prediction) <= budget.limit:
            return shallowest, candidate
    return shallowest, None


def _in_layers(shape: Shape) -> int:
    more = replace(shape, num_hidden_layers=shape.num_hidden_layers + 1)
    return (parameters(more) - parameters(shape)) * shape.num_hidden_layers
