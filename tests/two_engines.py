"""Two processes that are both parties of the engine, which prepare the products of a session and use them."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from entropi.private.compute.description import Description
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.records import StageCommunication


def metered_session(
    model: Description, settings: Settings, passes: Sequence[int], read: Sequence[int] = ()
) -> tuple[list[StageCommunication], list[list[StageCommunication]], list[int]]:
    """What a session of random weights and tokens costs by both engines' own count.

    Args:
        passes: tokens of each.
        read: after so many of these tokens, the last ones, each of them has logits; after one unless given.

    Returns:
        the costs of its material, of every pass, and the bytes of material that server and client keep.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    addresses = [f"127.0.0.1:{port}" for port in _free_ports()]
    arguments = (addresses, model, settings, passes, read or [1] * len(passes), results)
    parties = [context.Process(target=_take_part, args=(rank, *arguments)) for rank in (SERVER, CLIENT)]
    for party in parties:
        party.start()
    found = dict(results.get(timeout=600) for _ in parties)
    for party in parties:
        party.join()
        assert party.exitcode == 0
    (_, _, kept_by_server), (offline, online, kept_by_client) = found[SERVER], found[CLIENT]
    return offline, online, [kept_by_server, kept_by_client]


def _free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _take_part(
    rank: int,
    addresses: list[str],
    model: Description,
    settings: Settings,
    passes: Sequence[int],
    read: Sequence[int],
    results: Any,
) -> None:
    from entropi.private.compute import lookahead
    from entropi.private.compute.engine import Engine
    from entropi.private.compute.program import compute_on_processor, stages_of_pass, warm_up
    from entropi.private.preparation.dealing import deal
    from entropi.private.preparation.material import Material, joined, needs
    from entropi.private.preparation.online import PreparedPasses
    from entropi.private.preparation.ring import encode
    from entropi.private.sessions.engine_link import open_link

    compute_on_processor()
    engine = Engine(rank, open_link(rank, addresses), settings)
    stage, shapes = warm_up()
    for name, (shape, party) in shapes.items():
        engine.hold(name, shape, np.zeros(shape) if (party == "server") == (rank == SERVER) else None)
    engine.run(stage, 0)

    random = np.random.default_rng(0)
    matrices: dict[str, Any] = {}
    weights = {name: 0.05 * random.standard_normal(shape) for name, shape in model.weight_shapes().items()}
    weights |= lookahead.weights(model, weights)
    for name, weight in weights.items():
        engine.hold(name, weight.shape, weight if rank == SERVER else None)

    offline = []
    material = {}
    needed = needs(model, settings, sum(passes))
    for need in needed:
        if need.matrix is not None:
            whole = encode(weights[need.matrix], settings.fraction_bits)
            matrices[need.matrix] = whole if rank == SERVER else None
        pieces, costs = zip(*deal(engine, need, matrices.get(need.matrix or "")))
        offline += costs
        material |= joined(need, pieces)

    online, past = [], 0
    prepared = PreparedPasses(engine, Material(needed, material), settings.fraction_bits, matrices)
    for number, new in enumerate(passes):
        embedded = random.standard_normal((new, model.hidden_size))
        engine.hold("embedded", embedded.shape, embedded if rank == CLIENT else None)
        stages = stages_of_pass(model, settings, new, past, last_rows=read[number], prepared=True)
        past += new
        costs = [cost for stage in stages for cost in prepared.run(stage, number, past)]
        online.append([*costs, _revealed(engine, number)])
    results.put((rank, (offline, online, sum(array.nbytes for array in material.values()))))
    engine.close()


def _revealed(engine: Any, token: int) -> StageCommunication:
    """What it takes to show the client the logits of a pass, as this party counts it."""
    _, size = engine.reveal_to_client("logits")
    sends = engine.rank == SERVER
    return StageCommunication(
        name="reveal",
        layer=-1,
        token=token,
        seconds=0.0,
        sent_bytes=size if sends else 0,
        received_bytes=0 if sends else size,
        sent_messages=int(sends),
        received_messages=int(not sends),
    )
