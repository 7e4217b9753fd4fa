"""A pass with prepared products and comparisons: masked messages, what each party computes itself, and the engine."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

import numpy as np

from entropi.private.compute.attention import visible
from entropi.private.compute.compiling import Compiler
from entropi.private.compute.engine import Engine
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import SERVER
from entropi.private.preparation import comparisons
from entropi.private.preparation.cutting import Product, Shape, Step, cut
from entropi.private.preparation.linear import LinearPart
from entropi.private.preparation.material import Masks, Material
from entropi.private.preparation.products import masking, multiply, token_rows
from entropi.private.preparation.ring import Ring, SmallMatrix
from entropi.private.preparation.truncation import Bits, masked_signs, truncated
from entropi.records import StageCommunication

_OPENED_ONCE = ("scores", "mix")  # kinds whose second operands, keys and values, grow from pass to pass


class PreparedPasses:
    """Runs stages of passes on an engine, with one session's material.

    An operand x under its mask a is x - a, which is uniformly random to whoever does not know a: each party sends its
    share of it, and both know it. What a product lacks is linear in masks and operands, thus local on shares:
    x y = d e + d b + a e + a b with d = x - a and e = y - b. That is exact modulo 2^64, so a product, which has twice
    the fraction bits, must fit the ring before it is truncated, as any product of the engine's own.

    Tokens have places in the material, in the order in which they were computed. One that is taken back keeps its own:
    another's keys and values under the same masks would tell the difference of both. So it stays in products of
    attention as a key whose scores are thrown away and whose weights are zeros.

    Args:
        of_server: names of the server's weights, and at the server the weights as whole numbers.
    """

    def __init__(
        self, engine: Engine, material: Material, fraction_bits: int, of_server: Mapping[str, np.ndarray | None]
    ) -> None:
        self._engine, self._material, self._bits = engine, material, fraction_bits
        self._weights = set(of_server)
        self._matrices = {name: None if matrix is None else SmallMatrix(matrix) for name, matrix in of_server.items()}
        self._opened: dict[str, Ring] = {}  # keys and values under their masks, of all tokens so far
        self._shares: dict[str, Ring] = {}  # of values that were computed here, by name
        self._dropped: list[int] = []  # places of tokens that were taken back

    def drop(self, count: int, keys: int) -> None:
        """Take back the last `count` of `keys` tokens, all of the latest pass.

        Their keys and values among the engine's values are the caller's to forget.
        """
        places = keys + len(self._dropped)
        self._dropped += range(places - count, places)

    def run(self, stage: Stage, token: int, keys: int) -> Iterator[StageCommunication]:
        """Run one stage of the pass after which there are `keys` tokens, and say what each part of it cost.

        Raises:
            MaterialUsedUp: before anything is sent for the product that lacks it.
            EngineError: the other party sent something else, or is gone.
        """
        engine = self._engine
        shapes: dict[str, Shape] = {name: engine.shape(name) for name in stage.inputs}
        for step in cut(stage, shapes):
            if step.products or step.comparisons:
                yield self.cross(stage, step, token, keys)
            for part in step.parts:
                if isinstance(part, LinearPart):
                    yield self._compute(stage, part, token)
                else:
                    yield self._run(part, token)
        for name in [name for name in self._shares if name not in stage.outputs]:
            del self._shares[name]  # the engine has results of stages, and inner values are no more
        for name in stage.outputs:
            if name in self._shares:
                engine.set_numbers(name, self._shares.pop(name))

    def parts(self, stages: Iterable[Stage], compiler: Compiler) -> Iterator[Stage]:
        """What the engine runs of `stages`, without running it: for `compile_ahead` with this compiler."""
        for stage in stages:
            shapes: dict[str, Shape] = {name: compiler.shape(name) for name in stage.inputs}
            for step in cut(stage, shapes):
                for part in step.parts:
                    if isinstance(part, LinearPart):
                        for name, shape in zip(part.outputs, part.shapes):
                            compiler.note(name, shape)
                    else:
                        yield part

    def _share(self, name: str) -> Ring:
        """This party's share of a value."""
        return self._shares[name] if name in self._shares else self._engine.numbers(name)

    def _run(self, part: Stage, token: int) -> StageCommunication:
        """Have the engine compute a part."""
        for name in part.inputs:
            if name in self._shares:
                self._engine.set_numbers(name, self._shares[name])
        for name in part.outputs:
            self._shares.pop(name, None)
        return self._engine.run(part, token)

    def _compute(self, stage: Stage, part: LinearPart, token: int) -> StageCommunication:
        """Compute what is linear on this party's shares, and truncate by one message each way."""
        started, server = time.perf_counter(), self._engine.rank == SERVER
        computing = part.evaluate([self._share(name) for name in part.inputs], self._bits, server=server)
        size, messages = 0, 0
        try:
            values = next(computing)
            while True:
                results, sent = self._truncate(values)
                size, messages = size + sent, messages + 1
                values = computing.send(results)
        except StopIteration as done:
            self._shares.update(zip(part.outputs, done.value))
        return _cost(stage, token, started, (size, size), (messages, messages))

    def _truncate(self, values: list[Ring]) -> tuple[list[Ring], int]:
        """Shares of values without half their fraction bits, and the bytes that either party sends for it."""
        flat, server = np.concatenate([value.reshape(-1) for value in values]), self._engine.rank == SERVER
        masks = self._material.of_truncation(flat.size)
        own = masked_signs(flat, masks, server=server)
        theirs = self._swap(own)
        result = truncated(flat, own, theirs, masks, self._bits, server=server)
        ends = np.cumsum([value.size for value in values])[:-1]
        parts = [part.reshape(value.shape) for part, value in zip(np.split(result, ends), values)]
        return parts, -(-own.size // 8)

    def _swap(self, own: Bits) -> Bits:
        """Send the other party these bits, and receive as many."""
        theirs = self._trade(np.packbits(own).tobytes())
        return np.unpackbits(np.frombuffer(theirs, np.uint8), count=own.size)

    def _trade(self, content: bytes) -> bytes:
        """Send the other party something, and receive as much."""
        self._engine.send(content)
        return self._engine.receive(len(content))

    def cross(self, stage: Stage, step: Step, token: int, keys: int) -> StageCommunication:
        """Compute the products and comparisons of a step, which do not wait for each other.

        Products take one message each way, or one to the server; comparisons send their first bits in it.
        """
        started, places = time.perf_counter(), keys + len(self._dropped)
        comparing = self._comparing(step)
        bits = next(comparing, b"")
        masks = [self._material.masks(product, stage.layer, places) for product in step.products]
        own = [self._masked(*pair, stage.layer) for pair in zip(step.products, masks)]
        theirs, arrived, moved = self._exchange(step.products, own, bits)
        messages = int(moved[0] > 0), int(moved[1] > 0)
        for product, mask, ours, other in zip(step.products, masks, own, theirs):
            opened = [x + y for x, y in zip(ours, other)]
            self._shares[product.result] = self._finished(product, mask, opened, stage.layer)
        while bits:
            try:
                bits = comparing.send(arrived)
            except StopIteration:
                break
            arrived = self._trade(bits)
            moved = moved[0] + len(bits), moved[1] + len(bits)
            messages = messages[0] + 1, messages[1] + 1
        return _cost(stage, token, started, moved, messages)

    def _comparing(self, step: Step) -> Generator[bytes, bytes, None]:
        """Compute a step's comparisons; yields what is sent, and is sent what the other party did."""
        if step.comparisons:
            shares = [self._share(comparison.operand) for comparison in step.comparisons]
            server = self._engine.rank == SERVER
            results = yield from comparisons.compute(
                step.comparisons, shares, self._material, self._bits, server=server
            )
            self._shares.update(zip((comparison.result for comparison in step.comparisons), results))

    def _masked(self, product: Product, masks: Masks, layer: int) -> list[Ring]:
        """This party's shares of the operands less its masks, of keys and values those that were not opened before.

        Of an operand of the server's matrix the server has a share and no mask: that one it keeps.
        """
        if masking(product, self._weights) == "server":
            share = self._share(product.operands[0])
            return [share if masks.a is None else share - masks.a]
        operands = [self._share(name) for name in product.operands]
        drawn = [mask for mask in (masks.a, masks.b) if mask is not None]
        assert len(drawn) == len(operands)
        if product.kind in _OPENED_ONCE:
            known = self._opened.get(f"{layer}.{product.kind}")
            start = 0 if known is None else known.shape[1]
            drawn[1] = drawn[1][:, start:]
            operands[1] = operands[1][:, -drawn[1].shape[1] :]
        if product.kind == "mix" and self._dropped:
            weights = np.zeros(drawn[0].shape, np.uint64)
            weights[:, self._kept_pairs(product, masks)] = operands[0]
            operands[0] = weights
        return [operand - mask for operand, mask in zip(operands, drawn)]

    def _kept_pairs(self, product: Product, masks: Masks) -> np.ndarray:
        """Which of the packed pairs that a product of attention has material for are of a key that was kept, bool."""
        assert masks.b is not None
        kept = np.ones(masks.b.shape[1], bool)
        kept[self._dropped] = False
        rows = token_rows(product.kind, product.shapes[0], product.result_shape)
        pairs: np.ndarray = kept[visible(rows, len(kept))[1]]
        return pairs

    def _exchange(
        self, products: Sequence[Product], own: list[list[Ring]], bits: bytes
    ) -> tuple[list[list[Ring]], bytes, tuple[int, int]]:
        """Send what the other party is to see, and receive what we are, in `own`'s shapes; and bytes sent and received.

        The client sees nothing of what is for the server alone: empty lists there. Both send `bits`, of one size.
        """
        engine = self._engine
        to_server = [masking(product, self._weights) == "server" for product in products]
        sends = [not only or engine.rank != SERVER for only in to_server]
        receives = [not only or engine.rank == SERVER for only in to_server]
        numbers = [x.astype("<u8", copy=False).tobytes() for some, sending in zip(own, sends) if sending for x in some]
        content = b"".join([*numbers, bits])
        if content:
            engine.send(content)

        size = 8 * sum(x.size for some, wanted in zip(own, receives) if wanted for x in some)
        whole = engine.receive(size + len(bits)) if size + len(bits) else b""
        arrived = np.frombuffer(whole[:size], "<u8").astype(np.uint64, copy=False)
        theirs: list[list[Ring]] = []
        for some, wanted in zip(own, receives):
            theirs.append([])
            for x in some if wanted else []:
                theirs[-1].append(arrived[: x.size].reshape(x.shape))
                arrived = arrived[x.size :]
        return theirs, whole[size:], (len(content), len(whole))

    def _finished(self, product: Product, masks: Masks, opened: list[Ring], layer: int) -> Ring:
        """This party's share of the product, with twice the fraction bits."""
        server = self._engine.rank == SERVER
        who = masking(product, self._weights)
        if who == "server":
            if not server:
                return masks.c
            matrix = self._matrices[product.operands[1]]
            assert matrix is not None
            return matrix.after(opened[0]) + masks.c

        assert masks.a is not None
        if who == "self":  # d d + 2 d a + a a, the first of them the server's
            (left,) = opened
            rest = masks.a + masks.a + left if server else masks.a + masks.a
            return multiply(product.kind, left, rest) + masks.c

        assert masks.b is not None
        left, right = opened
        if product.kind in _OPENED_ONCE:
            place = f"{layer}.{product.kind}"
            if place in self._opened:
                right = np.concatenate([self._opened[place], right], axis=1)
            self._opened[place] = right
        share = multiply(product.kind, left, masks.b + right if server else masks.b)
        share = share + multiply(product.kind, masks.a, right) + masks.c
        if product.kind == "scores" and self._dropped:
            share = share[:, self._kept_pairs(product, masks)]
        return share


def _cost(
    stage: Stage, token: int, started: float, moved: tuple[int, int], messages: tuple[int, int]
) -> StageCommunication:
    """What was begun at `started` cost: bytes `moved`, and messages, each sent and received."""
    return StageCommunication(
        name=stage.name,
        layer=stage.layer,
        token=token,
        seconds=time.perf_counter() - started,
        sent_bytes=moved[0],
        received_bytes=moved[1],
        sent_messages=messages[0],
        received_messages=messages[1],
    )
