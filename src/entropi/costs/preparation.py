"""What a session costs whose products are prepared, offline and online, beside one without preparation.

Offline the parties multiply random numbers: the very functions that `preparation.dealing` runs are traced, on whole
numbers. Online the same stages as ever are cut at their products and comparisons: exchanges of masked numbers and of
bits, and what is left for the engine, which is traced like other stages.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from entropi.costs import exchanges
from entropi.costs.prediction import CostModel, Predictor, described, summed
from entropi.costs.tracing import Numbers, ProtocolCall, Value, trace_calls
from entropi.errors import UserError
from entropi.private.compute import lookahead
from entropi.private.compute.description import Description
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.preparation.cutting import Shape, cut
from entropi.private.preparation.dealing import Owner, pieces
from entropi.private.preparation.linear import LinearPart
from entropi.private.preparation.material import Need, needs
from entropi.private.preparation.parts import kept_bytes
from entropi.records import PassCost, PreparedRecord


class PreparedPredictor(Predictor):
    """Prices what a session takes, and its passes with that."""

    _prepared = True
    _paired = False

    def __init__(self, model: Description, costs: CostModel) -> None:
        super().__init__(model, costs)
        more = lookahead.shapes(model)
        self._of_server = model.weight_shapes() | more
        self._values |= {name: Value(shape, "server") for name, shape in more.items()}

    def needs(self, tokens: int, passes: int | None = None) -> list[Need]:
        """What a session of at most `tokens` tokens in so many passes takes, the prefix included."""
        options = self._costs.options
        settings = Settings(
            fraction_bits=options.fraction_bits,
            exact_softmax_as=options.exact_softmax_as,
            embedding=options.embedding,
            output=options.output,
            choices=options.choices,
        )
        return needs(self._model, settings, tokens, passes)

    def offline(self, material: list[Need]) -> PassCost:
        """Computing material, by kind of product."""
        traced = []
        for need in material:
            for piece in pieces(need, self._costs.options.fraction_bits):
                values = {name: _operand(*operand) for name, operand in piece.operands.items()}
                calls = list[ProtocolCall | Counter[str]](trace_calls(piece.stage, values))
                traced.append((Stage(need.kind, -1, piece.stage.function, (), ()), calls))
        return self._price(traced)

    def _trace(self, stage: Stage) -> list[ProtocolCall | Counter[str]]:
        """As the program without preparation, cut at its products and comparisons."""
        prefix_tokens = self._costs.options.prefix_tokens
        opened = self._past if self._past > prefix_tokens else 0  # the first pass opens the prefix's keys and values
        shapes = {name: self._values[name].shape for name in stage.inputs}
        calls: list[ProtocolCall | Counter[str]] = []
        for step in cut(stage, shapes):
            if step.products or step.comparisons:
                calls.append(exchanges.count(step, self._of_server, opened, self._costs.options.fraction_bits))
            for part in step.parts:
                if isinstance(part, LinearPart):
                    calls += map(exchanges.count_truncation, part.truncations)
                    self._values |= {name: Value(shape) for name, shape in zip(part.outputs, part.shapes)}
                else:
                    calls += trace_calls(part, self._values)
        return calls


_OF_BOTH: dict[Owner, Numbers] = {"numbers": "real", "words": "whole", "bits": "bits"}


def _operand(shape: Shape, owner: Owner) -> Value:
    """What the engine computes with: whole numbers of one party, or what both have shares of."""
    if owner in _OF_BOTH:
        return Value(shape, numbers=_OF_BOTH[owner])
    return Value(shape, "server" if owner == SERVER else "client", "whole")


def predict(costs: CostModel, config: Any, seq_len: int, new_tokens: int, drafts: int = 0) -> PreparedRecord:
    """A session of a prompt and `new_tokens` answered to it, with and without preparation, set-up included.

    The last new token is not computed with, so that material is needed for one token less. Preparing is taken to be a
    session of its own, which sets up as one without preparation does. With `drafts` also a pass over one further token
    and so many drafts.

    Raises:
        UserError: no protocol that products are prepared for, or too few positions.
    """
    if costs.calibration.protocol != "cheetah":
        raise UserError(f"products are prepared under cheetah alone, not under {costs.calibration.protocol}")
    if new_tokens < 1:
        raise UserError(f"--new-tokens is {new_tokens} but must be at least 1")
    model = config if isinstance(config, Description) else described(config)
    tokens = costs.options.prefix_tokens + seq_len + new_tokens - 1
    if tokens > model.positions:
        raise UserError(f"a session of {tokens:,} tokens is longer than the {model.positions:,} that this model takes")

    before, online = PreparedPredictor(model, costs), PreparedPredictor(model, costs)
    unprepared = Predictor(model, costs)
    material = before.needs(tokens, new_tokens)
    set_up, offline = before.set_up(), before.offline(material)
    online_set_up = online.set_up(prepared=True)
    prompt = online.run(seq_len)
    drafted = online.run_drafted(drafts) if drafts else None
    first = online.run(1) if new_tokens > 1 else None
    later = online.run_further(new_tokens - 2) if new_tokens > 2 else PassCost(operations=[])
    ordinary = summed(unprepared.set_up(), unprepared.run(seq_len), unprepared.run_further(new_tokens - 1))
    return PreparedRecord(
        new_tokens=new_tokens,
        tokens=tokens,
        set_up=set_up,
        offline=offline,
        online_set_up=online_set_up,
        client_bytes=kept_bytes(material, CLIENT),
        server_bytes=kept_bytes(material, SERVER),
        prompt=prompt,
        further=first,
        drafted=drafted,
        all_further=later if first is None else summed(first, later),
        unprepared=ordinary,
    )
