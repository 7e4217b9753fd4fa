"""A pass with prepared products: messages of masked numbers, and what the engine computes between them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import numpy as np

from entropi.private.compute.engine import Engine
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import SERVER
from entropi.private.preparation.cutting import Product, Shape, cut
from entropi.private.preparation.material import Masks, Material
from entropi.private.preparation.products import bilinear, masking
from entropi.private.preparation.ring import Ring, times_small
from entropi.records import StageCommunication


class PreparedPasses:
    """Runs stages of passes on an engine, with one session's material.

    Args:
        of_server: names of the server's weights, and at the server the weights as whole numbers.
    """

    def __init__(
        self, engine: Engine, material: Material, fraction_bits: int, of_server: Mapping[str, np.ndarray | None]
    ) -> None:
        self._engine, self._material, self._bits = engine, material, fraction_bits
        self._matrices = of_server
        self._names = set(of_server)
        self._opened: dict[str, Ring] = {}  # keys and values under their masks, of all tokens so far

    def run(self, stage: Stage, token: int, keys: int) -> Iterable[StageCommunication]:
        """Run one stage of the pass after which there are `keys` tokens, and say what each part of it cost."""
        engine = self._engine
        shapes: dict[str, Shape] = {name: engine.shape(name) for name in stage.inputs}
        for step in cut(stage, shapes, self._bits):
            if step.products:
                yield self._multiply(stage, step.products, token, keys)
            for part in step.parts:
                yield engine.run(part, token)

    def _multiply(self, stage: Stage, products: tuple[Product, ...], token: int, keys: int) -> StageCommunication:
        """Compute products that do not wait for each other by one message each way, or one to the server."""
        started = time.perf_counter()
        todo = [(product, self._material.masks(product, stage.layer, keys)) for product in products]
        masked = [self._masked(product, masks, stage.layer) for product, masks in todo]
        sent, received, theirs = self._exchange(products, masked)
        for (product, masks), own, other in zip(todo, masked, theirs):
            self._engine.set_numbers(product.result, self._finish(product, masks, own, other, stage.layer))
        return StageCommunication(
            name=stage.name,
            layer=stage.layer,
            token=token,
            seconds=time.perf_counter() - started,
            sent_bytes=sent,
            received_bytes=received,
            sent_messages=int(sent > 0),
            received_messages=int(received > 0),
        )

    def _masked(self, product: Product, masks: Masks, layer: int) -> list[Ring]:
        """This party's shares of the operands less its masks, as far as they are to be sent."""
        who = masking(product, self._names)
        first = self._engine.numbers(product.operands[0])
        if who != "pair":
            return [first if masks.a is None else first - masks.a]
        second = self._engine.numbers(product.operands[1])
        assert masks.a is not None and masks.b is not None
        if product.kind in ("scores", "mix"):  # of keys and values only those that were not opened before
            known = self._opened.get(f"{layer}.{product.kind}")
            start = 0 if known is None else known.shape[1]
            return [first - masks.a, second[:, start:] - masks.b[:, start:]]
        return [first - masks.a, second - masks.b]

    def _exchange(
        self, products: tuple[Product, ...], masked: list[list[Ring]]
    ) -> tuple[int, int, list[list[Ring] | None]]:
        """Send what the other party is to see, and receive what we are; None where that is nothing."""
        engine = self._engine
        to_server_only = [masking(product, self._names) == "server" for product in products]
        sends = [not only or engine.rank != SERVER for only in to_server_only]
        receives = [not only or engine.rank == SERVER for only in to_server_only]
        content = b"".join(x.astype("<u8", copy=False).tobytes() for some, s in zip(masked, sends) if s for x in some)
        if content:
            engine.send(content)
        size = 8 * sum(x.size for some, r in zip(masked, receives) if r for x in some)
        arrived = np.frombuffer(engine.receive(size) if size else b"", "<u8").astype(np.uint64)
        theirs: list[list[Ring] | None] = []
        place = 0
        for some, wanted in zip(masked, receives):
            if not wanted:
                theirs.append(None)
                continue
            parts = []
            for x in some:
                parts.append(arrived[place : place + x.size].reshape(x.shape))
                place += x.size
            theirs.append(parts)
        return len(content), size, theirs

    def _finish(self, product: Product, masks: Masks, own: list[Ring], other: list[Ring] | None, layer: int) -> Ring:
        """This party's share of the product, with twice the fraction bits."""
        who = masking(product, self._names)
        server = self._engine.rank == SERVER
        if who == "server":
            if other is None:
                return masks.c
            matrix = self._matrices[product.operands[1]]
            assert matrix is not None
            return times_small(own[0] + other[0], matrix) + masks.c

        assert other is not None and masks.a is not None
        opened = [x + y for x, y in zip(own, other)]
        if who == "self":
            whole = masks.a + masks.a + (opened[0] if server else np.uint64(0))  # d^2 + 2 d a + a^2
            return bilinear(product.kind, opened[0], whole) + masks.c

        assert masks.b is not None
        left, right = opened
        if product.kind in ("scores", "mix"):
            place = f"{layer}.{product.kind}"
            if place in self._opened:
                right = np.concatenate([self._opened[place], right], axis=1)
            self._opened[place] = right
        # d e + d b + a e + a b, the first of them the server's
        share = bilinear(product.kind, left, right + masks.b if server else masks.b)
        share += bilinear(product.kind, masks.a, right)
        return share + masks.c
