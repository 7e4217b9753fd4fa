"""What one configuration costs, all that is known about it: counts, prediction, the paper's figures and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from entropi.costs import advice, preparation
from entropi.costs.calibration import ProtocolName
from entropi.costs.operations import count
from entropi.costs.prediction import CostModel
from entropi.model.shape import Shape
from entropi.records import BatchCost, CountRecord, PassCost, PredictionRecord


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """What a configuration costs: counted as the paper counts, counted after folding, and predicted in private."""

    name: str
    counts: CountRecord
    folded: CountRecord
    prediction: PredictionRecord
    paper: tuple[float, float] | None = None  # GB and minutes that the paper prints
    changes: Sequence[advice.Change] = ()  # what would save bytes, most first
    size_options: str | None = None  # what gives another architecture the same sizes on the command line
    together: BatchCost | None = None  # several prompts at once, where they would make far more tokens a minute

    def to_json(self) -> dict[str, Any]:
        """What JSON has a form for, sums over the operations included."""
        found: dict[str, Any] = msgspec.to_builtins(
            {"name": self.name, "counts": self.counts, "folded": self.folded, "prediction": self.prediction}
        )
        _add_sums(found["prediction"], self.prediction, ("set_up", "prompt", "further", "drafted"))
        if self.prediction.batch is not None:
            _add_sums(found["prediction"]["batch"], self.prediction.batch, ("prompt", "further"))
            found["prediction"]["batch"]["tokens_a_minute"] = self.prediction.batch.tokens_a_minute
        if self.prediction.prepared is not None:
            prepared = found["prediction"]["prepared"]
            passes = ("set_up", "offline", "online_set_up", "prompt", "further", "drafted", "all_further", "unprepared")
            _add_sums(prepared, self.prediction.prepared, passes)
            totals = self.prediction.prepared.totals()
            prepared["totals"] = {name: {key: getattr(one, key) for key in _SUMS} for name, one in totals.items()}
        found["prediction"]["kernel"] = self.prediction.kernel
        found["paper"] = None if self.paper is None else {"GB": self.paper[0], "minutes": self.paper[1]}
        found["changes"] = [asdict(change) for change in self.changes]
        found["size_options"] = self.size_options
        found["together"] = None
        if (one := self.together) is not None:
            found["together"] = {"prompts": one.prompts, "tokens_a_minute": one.tokens_a_minute}
        return found


_SUMS = ("bytes", "messages", "rounds", "seconds", "latency")


def _add_sums(plain: dict[str, Any], record: Any, passes: Sequence[str]) -> None:
    """Sums over the operations of passes of a record, among its plain values."""
    for name in passes:
        part: PassCost | None = getattr(record, name)
        if part is not None:
            plain[name]["total"] = {key: getattr(part, key) for key in _SUMS}


def make_report(
    costs: CostModel,
    shape: Shape,
    seq_len: int,
    name: str,
    *,
    new_tokens: int | None = None,
    drafts: int = 0,
    prompts: int = 0,
    advise: bool = True,
) -> CostReport:
    """Counts, prediction, the paper's figures and advice for one configuration.

    With `new_tokens` also what a session of so many costs with prepared products; with `drafts` a pass with so many;
    with `prompts` passes that so many prompts share.

    Raises:
        UserError: no positions for so many tokens, or a model that cannot run in private.
    """
    counts, folded = count(shape, seq_len), count(shape, seq_len, folded=True)  # they refuse impossible lengths
    prediction = costs.predict(shape, seq_len, drafts=drafts, prompts=prompts)
    if new_tokens is not None:
        prepared = preparation.predict(costs, shape, seq_len, new_tokens, drafts)
        prediction = msgspec.structs.replace(prediction, prepared=prepared)
    return CostReport(
        name=name,
        counts=counts,
        folded=folded,
        prediction=prediction,
        paper=advice.paper_figures(shape, seq_len),
        changes=advice.changes(shape, seq_len, costs, prediction) if advise else (),
        size_options=advice.size_options(shape) if advise else None,
        together=advice.together(shape, seq_len, costs, prediction) if advise else None,
    )


def cost(config: Any, seq_len: int, protocol: ProtocolName = "cheetah", network: str = "wan") -> CostReport:
    """What a model costs for a prompt of `seq_len` tokens; nothing is run.

    The prediction is for the model's own softmax; for a model that is trained with the exact one for "quartic", which
    stands for it in private. `prediction.softmax` and `prediction.kernel` say which.

    Args:
        config: `EntropiConfig` or `Shape`.
        protocol: "cheetah" (two parties), "semi2k" (two and a trusted dealer) or "aby3" (three parties).
        network: "lan", "wan", or a rate and a round trip such as "300Mbps,20ms".

    Raises:
        UserError: no positions for so many tokens, an unknown network, or a model that cannot run in private.
    """
    return make_report(CostModel.shipped(protocol, network), config, seq_len, config.architecture, advise=False)
