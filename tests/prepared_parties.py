"""Two processes that prepare material for small models under CHEETAH and use it, for tests of them together."""

import multiprocessing
import socket

import numpy as np

from entropi.private.compute import lookahead
from entropi.private.compute.prefix import with_prefix
from entropi.private.compute.program import cached_tokens, compute_on_processor, warm_up
from entropi.private.compute.settings import SERVER, Settings
from entropi.private.preparation.material import Material, joined, needs
from masked_passes import inputs_of_passes, plain_passes, run_passes, told_apart
from private_reference import VARIANTS, describe, random_weights

PASSES = [[7, 3, 11, 2], [5], [5, 9]]  # a prompt, one further token, a message
ALL = dict(layers=2, temperature=True, activation="geglu")
# Changes of a variant, settings, and a prefix.
CASES = {
    "every kind of product": ({**VARIANTS["qwen3"], **ALL}, dict(embedding="public"), []),
    "layer norm": (
        dict(layers=2, norm="layer", activation="gelu", intermediate_size=40, final_norm="layer", centre=False),
        dict(embedding="public"),
        [],
    ),
    "private table": (dict(layers=2, activation="square", intermediate_size=40), dict(paired=True), []),
    "polynomial, prefix": (
        {**VARIANTS["polynomial"], "layers": 2, "norm": "rms", "explicit_ffn": [0]},
        dict(embedding="public"),
        [4, 4, 8],
    ),
    "looking ahead": (VARIANTS["polynomial"], dict(embedding="public"), []),
}
AGAIN = "every kind of product, once more"  # the same with other material


class Case:
    """What both parties know of a case, and the tests."""

    def __init__(self, name):
        changes, settings, prefix = CASES[name.removesuffix(AGAIN[AGAIN.index(",") :])]
        self.model, self.settings = describe(**changes), Settings(**settings)
        weights = random_weights(self.model)
        self.weights = with_prefix(self.model, weights, prefix) | lookahead.weights(self.model, weights)
        self.past = len(prefix)
        self.needs = needs(self.model, self.settings, self.past + sum(map(len, PASSES)))

    def plain_logits(self):
        return plain_passes(PASSES, self.model, self.settings, self.weights)


def play(folder, names):
    """Run both parties, which leave what they did of every case in `folder`, as arrays by name."""
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    context = multiprocessing.get_context("spawn")
    parties = [context.Process(target=party, args=(rank, addresses, names, str(folder))) for rank in (0, 1)]
    for process in parties:
        process.start()
    for process in parties:
        process.join()
    assert [process.exitcode for process in parties] == [0, 0]


def party(rank, addresses, names, folder):
    from entropi.private.compute.engine import Engine
    from entropi.private.sessions.engine_link import open_link

    compute_on_processor()
    link = open_link(rank, addresses)
    for number, name in enumerate(names):
        case = Case(name)
        engine = Engine(rank, link, case.settings)
        if not number:
            stage, shapes = warm_up()
            for value, (shape, owner) in shapes.items():
                engine.hold(value, shape, np.zeros(shape) if (owner == "server") == (rank == SERVER) else None)
            engine.run(stage, 0)
        np.savez(f"{folder}/{name}-{rank}.npz", **played(engine, case))
    engine.close()


def played(engine, case):
    """Prepare, then run all passes: arrays of the material, and what was sent, opened and found."""
    from entropi.private.preparation.dealing import deal
    from entropi.private.preparation.ring import encode

    server, sent, send = engine.rank == SERVER, [], engine.send
    whole = {need.matrix: None for need in case.needs if need.matrix}
    if server:
        whole = {name: encode(case.weights[name], case.settings.fraction_bits) for name in whole}
    arrays = {}
    for need in case.needs:
        pieces = [piece for piece, _ in deal(engine, need, whole.get(need.matrix))]
        arrays |= joined(need, pieces)

    def recorded(content):
        sent.append(content)
        send(content)

    engine.send = recorded
    for name, weight in case.weights.items():
        engine.hold(name, weight.shape, weight if server else None)
    rows = inputs_of_passes(PASSES, case.model, case.settings, case.weights["embedding"])
    material = Material(case.needs, arrays)
    assert case.past == cached_tokens(case.weights)
    logits, recorded_passes = run_passes(engine, rows, material, case.model, case.settings, whole, case.past)
    found = {f"material {name}": array for name, array in arrays.items()}
    numbers, found["bits"] = told_apart(sent, recorded_passes.in_messages)
    found["sent"] = np.concatenate(numbers)
    found["opened"] = np.concatenate([part.reshape(-1) for part in recorded_passes.opened])
    return found | {f"logits {number}": value for number, value in enumerate(logits) if value is not None}
