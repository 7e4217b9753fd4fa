"""What a private run will cost: the private program's own stages, counted and priced, none of them executed.

Bytes are those of both directions, of all parties. Messages are asynchronous; a round is one message latency, one way,
that the next computation waits for. Seconds are the calibrated machine's, with all parties on it. The latency under a
network adds to them every round's delay and every byte's carriage, and is an upper bound: nothing is taken to overlap
but the two directions of a product of two shared operands.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
import numpy as np

from entropi.costs import exchanges
from entropi.costs.calibration import Calibration, ProtocolName, call_counter, shipped
from entropi.costs.network import Network, parse_network
from entropi.costs.tracing import ProtocolCall, Value, trace_calls
from entropi.errors import UserError
from entropi.model.shape import expected_description
from entropi.private.compute import prefix
from entropi.private.compute.description import LEAST_PAIR_FRACTION_BITS, Description, Embedding, Output
from entropi.private.compute.layout import Layout
from entropi.private.compute.program import Stage, forward, warm_up, warms_up
from entropi.private.compute.settings import TRUST
from entropi.records import BatchCost, OperationCost, PassCost, PredictionRecord
from entropi.softmax import USUAL_FOR_EXACT

TRUST_MODELS = {
    "cheetah": TRUST["cheetah"].split(":")[0],
    "semi2k": "two parties and a trusted dealer, semi-honest; the dealer's part, done beforehand, is not counted",
    "aby3": "three parties of which no two collude, semi-honest",
}


@dataclass(frozen=True)
class Options:
    """What a server chooses beside the model."""

    embedding: Embedding = "private"
    output: Output = "logits"
    choices: int = 8
    exact_softmax_as: str = USUAL_FOR_EXACT  # what is evaluated for models that were trained with the exact softmax
    fraction_bits: int = 18
    prefix_tokens: int = 0  # public ones that every prompt continues


@dataclass(frozen=True)
class CostModel:
    """What a prediction depends on beside the model: prices, the network, and what the server chooses."""

    calibration: Calibration  # its protocol is the prediction's
    network: Network
    options: Options

    @classmethod
    def shipped(cls, protocol: ProtocolName = "cheetah", network: str = "wan") -> CostModel:
        """With the prices that come with the package and a server's usual choices.

        Raises:
            UserError: an unknown network.
        """
        calibration = shipped(protocol)
        return cls(calibration, parse_network(network), Options(fraction_bits=calibration.fraction_bits))

    def predict(self, config: Any, seq_len: int, *, drafts: int = 0, prompts: int = 0) -> PredictionRecord:
        """A session of the model: set-up, a prompt of `seq_len` tokens and one further token; also one with `drafts`.

        And passes that several `prompts` of this length share. All follow the public prefix of the options, which costs
        nothing itself.

        `config` is a `Shape`, an `EntropiConfig` or, folded, a `Description`. No further token is predicted where the
        model has no position for it.

        Raises:
            UserError: the model cannot run in private, or has no positions for so many tokens.
        """
        options, protocol = self.options, self.calibration.protocol
        model = config if isinstance(config, Description) else described(config)
        predictor = Predictor(model, self)
        set_up = predictor.set_up()
        prompt = predictor.run(seq_len)
        drafted = predictor.run_drafted(drafts) if drafts else None
        further = predictor.run(1) if options.prefix_tokens + seq_len < model.positions else None

        return PredictionRecord(
            architecture=model.architecture,
            layers=model.layers,
            heads=model.heads,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            seq_len=seq_len,
            prefix_tokens=options.prefix_tokens,
            protocol=protocol,
            trust=TRUST_MODELS[protocol],
            network=self.network.name,
            embedding=options.embedding,
            softmax=str(model.computed_softmax(options.exact_softmax_as)),
            calibrated_on=self.calibration.machine,
            set_up=set_up,
            prompt=prompt,
            further=further,
            draft_tokens=drafts,
            drafted=drafted,
            own_kernel=not model.softmax_form.exact,
            batch=self.predict_batch(model, seq_len, prompts) if prompts else None,
        )

    def predict_batch(self, model: Description, seq_len: int, prompts: int) -> BatchCost:
        """The passes that so many prompts of `seq_len` tokens share; raises as `predict`."""
        predictor = Predictor(model, self)
        predictor.set_up()
        layout = Layout.first([seq_len] * prompts, self.options.prefix_tokens)
        first = predictor.run_batch(layout)
        further = max(layout.following().lengths()) <= model.positions
        return BatchCost(
            prompts=prompts, prompt=first, further=predictor.run_batch(layout.following()) if further else None
        )


def described(config: Any) -> Description:
    """What private inference will know of a `Shape` or an `EntropiConfig`.

    Raises:
        UserError: it cannot run in private.
    """
    try:
        return msgspec.convert(expected_description(config), Description)
    except (msgspec.ValidationError, ValueError) as error:
        raise UserError(f"this model cannot run in private: {error}") from None


# A stage, and what it calls of the engine's protocols or is counted already.
Traced: TypeAlias = tuple[Stage, list[ProtocolCall | Counter[str]]]
_TRACED = 3  # passes of many


def summed(*passes: PassCost) -> PassCost:
    """All of them together, by operation."""
    found: dict[str, OperationCost] = {}
    for operation in (operation for one in passes for operation in one.operations):
        name = operation.name
        found[name] = found[name] + operation if name in found else operation
    return PassCost(operations=list(found.values()))


class Predictor:
    """Prices stages in the order in which they would run, from the first message on.

    Args:
        model: what is to run.
        costs: by what it is priced.
    """

    _prepared = False  # whether the program is the one with prepared products

    def __init__(self, model: Description, costs: CostModel) -> None:
        self._model, self._costs = model, costs
        self._counter = call_counter(costs.calibration.protocol, costs.calibration.workers)
        public = costs.options.embedding == "public"
        self._values = {
            name: Value(shape, "server")
            for name, shape in model.weight_shapes().items()
            if name != "embedding" or not public
        }
        self._past = costs.options.prefix_tokens
        if self._past:
            kept = prefix.shape(model, self._past)
            self._values |= {name: Value(kept, "server") for name in prefix.names(model)}

    def set_up(self, *, prepared: bool = False) -> PassCost:
        """Keys and the first oblivious transfers, which a session pays once; with `prepared` products no keys.

        Nothing at all where all that is left to the engine is to reveal logits.
        """
        if not warms_up(self._costs.options.output != "logits", prepared=prepared):
            return PassCost(operations=[])
        stage, shapes = warm_up(prepared=prepared)
        self._values |= {name: Value(shape, party) for name, (shape, party) in shapes.items()}
        return self._price([(stage, list(trace_calls(stage, self._values)))])

    def run(self, tokens: int, *, every_row: bool = False, last_rows: int = 1) -> PassCost:
        """A pass over `tokens` more tokens after those before it; with the logits after the last of them, or more."""
        cost = self._price(self._trace_pass(tokens, every_row=every_row, last_rows=last_rows))
        return PassCost(operations=[*cost.operations, self._reveal(tokens if every_row else last_rows)])

    def run_batch(self, layout: Layout) -> PassCost:
        """A pass that several prompts share, and what it reveals; of the first one, or of another after it."""
        cost = self._price(self._trace_pass(layout.tokens, layout=layout))
        return PassCost(operations=[*cost.operations, self._reveal(layout.prompts)])

    def _reveal(self, rows: int) -> OperationCost:
        """What the server's shares of so many tokens' results take on their way to the client: nothing is computed."""
        options, network = self._costs.options, self._costs.network
        # Numbers of a row, and values that they come in: see `Engine.reveal_to_client`.
        numbers, values = {
            "logits": (self._model.vocab_size, 1),
            "top_k": (2 * options.choices, 2),
            "argmax": (1, 1),
        }[options.output]
        size = float(8 * rows * numbers)
        return OperationCost(
            name="reveal",
            layer=-1,
            bytes=size,
            messages=values,
            rounds=1,
            seconds=0.0,
            latency=network.delay_s + 8 * size / network.bits_per_second,
        )

    def run_drafted(self, drafts: int) -> PassCost:
        """A pass over one further token and so many drafts, and the logits after each; what follows is as before it."""
        before = self._past, dict(self._values), copy.deepcopy(self._counter)
        cost = self.run(1 + drafts, last_rows=1 + drafts)
        self._past, self._values, self._counter = before
        return cost

    def run_further(self, passes: int) -> PassCost:
        """So many passes over one token each, one after another, summed over passes and layers.

        They grow evenly with the tokens before them, so a few are traced, and each of the others is counted as the
        nearest of these.
        """
        start = self._past
        traced = {}
        for past in sorted({start + round(place) for place in np.linspace(0, passes - 1, min(passes, _TRACED))}):
            self._continue_after(past)
            traced[past] = self._trace_pass(1)
        cost = PassCost(operations=[])
        for past in range(start, start + passes):
            nearest = min(traced, key=lambda one: abs(one - past))
            cost = summed(cost, self._price(traced[nearest]), PassCost(operations=[self._reveal(1)]))
        self._continue_after(start + passes)
        return cost

    def _continue_after(self, past: int) -> None:
        """Take so many tokens, the prefix included, as those that were there before the next pass."""
        self._past = past
        if past > self._costs.options.prefix_tokens:
            kept = Value(prefix.shape(self._model, past))
            self._values |= dict.fromkeys(prefix.names(self._model), kept)

    def _trace_pass(
        self, tokens: int, *, every_row: bool = False, last_rows: int = 1, layout: Layout | None = None
    ) -> list[Traced]:
        model, options = self._model, self._costs.options
        if tokens < 1:
            raise UserError(f"{tokens} tokens cannot be a pass; at least 1 is needed")
        longest = self._past + tokens if layout is None else max(layout.lengths())
        if longest > model.positions:
            raise UserError(
                f"{longest} tokens{' with the prefix' * bool(options.prefix_tokens)} are more than the "
                f"{model.positions} positions that this model has"
            )

        paired = self._paired
        if options.embedding == "public":
            self._values["embedded"] = Value((tokens, model.hidden_size), "client")
        else:
            rows = -(-tokens // 2) if paired else tokens
            self._values["tokens"] = Value((rows, model.vocab_size), "client")

        stages = forward(
            model,
            tokens,
            self._past,
            options.exact_softmax_as,
            embedding=options.embedding,
            paired=paired,
            fraction_bits=options.fraction_bits,
            output=options.output,
            choices=options.choices,
            every_row=every_row,
            last_rows=last_rows,
            prepared=self._prepared,
            layout=layout,
        )
        traced = [(stage, self._trace(stage)) for stage in stages]
        self._past += tokens
        return traced

    @property
    def _paired(self) -> bool:
        options = self._costs.options
        return (
            options.embedding == "private"
            and self._costs.calibration.protocol == "cheetah"
            and options.fraction_bits >= LEAST_PAIR_FRACTION_BITS
        )

    def _trace(self, stage: Stage) -> list[ProtocolCall | Counter[str]]:
        """What a stage of a pass calls, and what it writes among the values."""
        return list(trace_calls(stage, self._values))

    def _price(self, traced: Iterable[Traced]) -> PassCost:
        operations: dict[tuple[str, int], OperationCost] = {}
        for stage, calls in traced:
            counted: Counter[str] = Counter()
            for call in calls:
                counted.update(self._counter.count(call) if isinstance(call, ProtocolCall) else call)
            cost = self._cost(stage, counted)
            key = (stage.name, stage.layer)
            operations[key] = operations[key] + cost if key in operations else cost
        return PassCost(operations=list(operations.values()))

    def _cost(self, stage: Stage, counted: Counter[str]) -> OperationCost:
        size = messages = seconds = rounds = overlapping = 0.0
        both = all(any(f"ciphertexts by {party}" in name for name in counted) for party in ("server", "client"))
        for name, number in counted.items():
            price = self._costs.calibration.prices.get(name)
            if price is None:
                raise UserError(f"the calibration has no price for {name!r}; measure one with --calibrate")
            size += number * price.bytes
            messages += number * price.messages
            seconds += number * price.seconds
            rounds += number * price.rounds
            if (both and "ciphertexts by" in name) or name in exchanges.BOTH_AT_ONCE:
                overlapping += number * price.bytes / 2

        # Both directions of a product of two shared operands, and of masked numbers, travel at the same time.
        network = self._costs.network
        latency = seconds + rounds * network.delay_s + 8 * (size - overlapping) / network.bits_per_second
        return OperationCost(
            name=stage.name,
            layer=stage.layer,
            bytes=size,
            messages=messages,
            rounds=rounds,
            seconds=seconds,
            latency=latency,
        )
