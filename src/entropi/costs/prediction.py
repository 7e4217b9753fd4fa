"""What a private run will cost: the private program's own stages, counted and priced, none of them executed.

Bytes are those of both directions, of all parties. Messages are asynchronous; trips are those of them that wait for
each other, one way. Seconds are the calibrated machine's, with all parties on it. The latency under a network adds to
them every trip's delay and every byte's carriage, and is an upper bound: nothing is taken to overlap but the two
directions of a product of two shared operands.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from entropi.costs.calibration import Calibration, ProtocolName, bookkeeper, shipped
from entropi.costs.operations import count
from entropi.costs.tracing import Value, uses
from entropi.errors import UserError
from entropi.model.shape import expected_description
from entropi.private.compute.description import LEAST_PAIR_FRACTION_BITS, Description, Embedding, Output
from entropi.private.compute.program import Stage, forward, warm_up
from entropi.private.compute.settings import TRUST
from entropi.records import CostRecord, OperationCost, PassCost, PredictionRecord

TRUST_MODELS = {
    "cheetah": TRUST["cheetah"].split(":")[0],
    "semi2k": "two parties and a trusted dealer, semi-honest; the dealer's part, done beforehand, is not counted",
    "aby3": "three parties of which no two collude, semi-honest",
}


@dataclass(frozen=True)
class Network:
    """A line between the parties: bits a second each way, and seconds one way (half of a round trip)."""

    name: str
    bits_per_second: float
    delay_s: float


NETWORKS = {
    "lan": Network("lan: 1 Gbit/s, 0.5 ms", 1e9, 0.00025),
    "wan": Network("wan: 100 Mbit/s, 80 ms", 100e6, 0.04),
}


def line_of(text: str) -> Network:
    """A preset, "lan" or "wan", or "RATE,ROUNDTRIP" such as "300Mbps,20ms".

    Raises:
        UserError: neither.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    match = re.fullmatch(r"\s*([0-9.]+)\s*([MG])(?:bps|bit/s)\s*,\s*([0-9.]+)\s*ms\s*", text)
    try:
        rate, delay = (float(match.group(1)), float(match.group(3))) if match else (0.0, 0.0)
    except ValueError:
        rate = 0.0
    if match is None or rate <= 0:
        raise UserError(f"{text!r} is no network: write lan, wan, or a rate and a round trip such as 300Mbps,20ms")
    return Network(text, rate * {"M": 1e6, "G": 1e9}[match.group(2)], delay / 2000)


@dataclass(frozen=True)
class Options:
    """What a server chooses beside the model."""

    embedding: Embedding = "private"
    output: Output = "logits"
    choices: int = 8
    exp_iterations: int = 8  # of the softmax kernel, for models that were trained with the exact softmax
    fraction_bits: int = 18


def described(config: Any) -> Description:
    """What private inference will know of a `Shape` or an `EntropiConfig`.

    Raises:
        UserError: it cannot run in private.
    """
    try:
        return msgspec.convert(expected_description(config), Description)
    except (msgspec.ValidationError, ValueError) as error:
        raise UserError(f"this model cannot run in private: {error}") from None


class Predictor:
    """Prices stages in the order in which they would run, from the first message on.

    Args:
        model: what is to run.
        calibration: prices; their protocol is the prediction's.
    """

    def __init__(self, model: Description, calibration: Calibration, line: Network, options: Options) -> None:
        self._model, self._calibration, self._line, self._options = model, calibration, line, options
        self._books = bookkeeper(calibration.protocol, calibration.workers)
        public = options.embedding == "public"
        self._values = {
            name: Value(shape, "server")
            for name, shape in model.weight_shapes().items()
            if name != "embedding" or not public
        }
        self._past = 0

    def set_up(self) -> PassCost:
        """Keys and the first oblivious transfers, which a session pays once."""
        stage, shapes = warm_up()
        self._values |= {name: Value(shape, party) for name, (shape, party) in shapes.items()}
        return self._price([stage])

    def run(self, tokens: int, *, every_row: bool = False) -> PassCost:
        """A pass over `tokens` more tokens after those before it."""
        model, options = self._model, self._options
        if tokens < 1:
            raise UserError(f"{tokens} tokens cannot be a pass; at least 1 is needed")
        if self._past + tokens > model.positions:
            raise UserError(
                f"{self._past + tokens} tokens are more than the {model.positions} positions that this model has"
            )
        paired = (
            options.embedding == "private"
            and self._calibration.protocol == "cheetah"
            and options.fraction_bits >= LEAST_PAIR_FRACTION_BITS
        )
        if options.embedding == "public":
            self._values["embedded"] = Value((tokens, model.hidden_size), "client")
        else:
            rows = -(-tokens // 2) if paired else tokens
            self._values["tokens"] = Value((rows, model.vocab_size), "client")
        stages = forward(
            model,
            tokens,
            self._past,
            options.exp_iterations,
            embedding=options.embedding,
            paired=paired,
            fraction_bits=options.fraction_bits,
            output=options.output,
            choices=options.choices,
            every_row=every_row,
        )
        self._past += tokens
        return self._price(stages)

    def _price(self, stages: Iterable[Stage]) -> PassCost:
        operations: dict[tuple[str, int], OperationCost] = {}
        for stage in stages:
            counted: Counter[str] = Counter()
            for use in uses(stage, self._values):
                counted.update(self._books.count(use))
            cost = self._cost(stage, counted)
            key = (stage.name, stage.layer)
            operations[key] = operations[key] + cost if key in operations else cost
        return PassCost(operations=list(operations.values()))

    def _cost(self, stage: Stage, counted: Counter[str]) -> OperationCost:
        size = messages = seconds = trips = overlapping = 0.0
        both = all(any(f"ciphertexts by {party}" in name for name in counted) for party in ("server", "client"))
        for name, number in counted.items():
            price = self._calibration.prices.get(name)
            if price is None:
                raise UserError(f"the calibration has no price for {name!r}; measure one with --calibrate")
            size += number * price.bytes
            messages += number * price.messages
            seconds += number * price.seconds
            trips += number * price.trips
            if both and "ciphertexts by" in name:
                overlapping += number * price.bytes / 2
        # Both directions of a product of two shared operands travel at the same time.
        latency = seconds + trips * self._line.delay_s + 8 * (size - overlapping) / self._line.bits_per_second
        return OperationCost(
            name=stage.name,
            layer=stage.layer,
            bytes=size,
            messages=messages,
            trips=trips,
            seconds=seconds,
            latency=latency,
        )


def predict(
    config: Any, seq_len: int, calibration: Calibration, line: Network, options: Options | None = None
) -> PredictionRecord:
    """A session of the model: set-up, a prompt of `seq_len` tokens and one further token.

    `config` is a `Shape`, an `EntropiConfig` or, folded, a `Description`. No further token is predicted where the
    model has no position for it.

    Raises:
        UserError: the model cannot run in private, or has no positions for so many tokens.
    """
    options = options or Options(fraction_bits=calibration.fraction_bits)
    model = config if isinstance(config, Description) else described(config)
    predictor = Predictor(model, calibration, line, options)
    set_up = predictor.set_up()
    prompt = predictor.run(seq_len)
    further = predictor.run(1) if seq_len < model.positions else None
    return PredictionRecord(
        architecture=model.architecture,
        layers=model.layers,
        heads=model.heads,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        seq_len=seq_len,
        protocol=calibration.protocol,
        trust=TRUST_MODELS[calibration.protocol],
        network=line.name,
        embedding=options.embedding,
        exp_iterations=options.exp_iterations if model.exp_iterations is None else model.exp_iterations,
        calibrated_on=calibration.machine,
        set_up=set_up,
        prompt=prompt,
        further=further,
        polynomial=model.polynomial,
        own_kernel=model.exp_iterations is not None,
    )


@dataclass(frozen=True)
class Cost:
    """What a configuration costs: counted as the paper counts, counted after folding, and predicted in private."""

    counts: CostRecord
    folded: CostRecord
    prediction: PredictionRecord


def cost(config: Any, seq_len: int, protocol: ProtocolName = "cheetah", network: str = "wan") -> Cost:
    """What a model costs for a prompt of `seq_len` tokens; nothing is run.

    The prediction is for the model's own softmax kernel; for a model that is trained with the exact softmax
    (`exp_iterations=None`) for the kernel t=8. `prediction.kernel` says which.

    Args:
        config: `EntropiConfig` or `Shape`.
        protocol: "cheetah" (two parties), "semi2k" (two and a trusted dealer) or "aby3" (three parties).
        network: "lan", "wan", or a rate and a round trip such as "300Mbps,20ms".

    Raises:
        UserError: no positions for so many tokens, an unknown network, or a model that cannot run in private.
    """
    prediction = predict(config, seq_len, shipped(protocol), line_of(network))
    return Cost(count(config, seq_len), count(config, seq_len, folded=True), prediction)
