"""Passes with prepared products as tests run them: recorded, under an ideal engine or a real one; and what they show.

The ideal engine is both parties as threads of this process, and computes every local part on the values that the
parties' shares add up to; so it tests everything but the engine, in a fraction of its time.
"""

import queue
import threading

import jax
import msgspec
import numpy as np

from entropi.private.compute import lookahead
from entropi.private.compute.embedding import one_hot
from entropi.private.compute.program import Comparable, cached_tokens, keep_first, run_stages, stages_of_pass
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.gates import multiplied
from entropi.private.preparation.material import (
    BITS,
    KEPT,
    SIGNS,
    TRUNCATE,
    WINNERS,
    Material,
    array_name,
    gates_of,
    needs,
)
from entropi.private.preparation.online import PreparedPasses
from entropi.private.preparation.products import multiply
from entropi.private.preparation.ring import encode
from entropi.private.preparation.truncation import packed
from entropi.records import StageCommunication


def chi_square(numbers):
    """Of how often each byte occurs, against all equally often; 255 degrees of freedom."""
    counts = np.bincount(np.ascontiguousarray(numbers).view(np.uint8).reshape(-1), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


def smallest_gap(numbers):
    """Between any two, around the ring. A mask that hides two values leaves them as far apart as the values are."""
    ordered = np.sort(np.concatenate([part.reshape(-1) for part in numbers]))
    return int((np.append(ordered[1:], ordered[0]) - ordered).min())


class RecordedPasses(PreparedPasses):
    """Keeps all opened operands of products, as `opened`, at the client those that it sees; and of every message how
    many bytes of masked numbers it begins with, and how many bits are behind these."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.opened, self.in_messages = [], []

    def _swap(self, own):
        theirs = super()._swap(own)
        self.in_messages[-1] = 0, own.size  # without those that fill the last byte
        return theirs

    def _trade(self, content):
        self.in_messages.append((0, 8 * (len(content) - 1)))  # the last byte may be filled with zeros
        return super()._trade(content)

    def _exchange(self, products, own, bits):
        found = super()._exchange(products, own, bits)
        if found[2][0]:
            self.in_messages.append((found[2][0] - len(bits), 8 * len(bits)))
        return found

    def _finished(self, product, masks, opened, layer):
        self.opened += opened
        return super()._finished(product, masks, opened, layer)


def run_passes(engine, passes, material, model, settings, whole, past, drafts=()):
    """Logits after each pass, and what did the passes, at the party of `engine`; the client knows `passes`' rows.

    `whole` are the server's matrices as whole numbers; `past` is the length of a prefix, which the server holds.
    `drafts` tell of each of the first passes how many of its last tokens are drafts, and how many are then dropped.
    """
    recorded, found = RecordedPasses(engine, material, settings.fraction_bits, whole), []
    for number, (count, name, rows) in enumerate(passes):
        engine.hold(name, rows.shape, rows if engine.rank == CLIENT else None)
        drafted, dropped = drafts[number] if number < len(drafts) else (0, 0)
        for stage in stages_of_pass(model, settings, count, past, last_rows=1 + drafted, prepared=True):
            for _ in recorded.run(stage, number, past + count):
                pass
        past += count
        found.append(engine.reveal_to_client("logits")[0])
        if dropped:
            recorded.drop(dropped, past)
            past -= dropped
            engine.run(keep_first(model, past), number)
    return found, recorded


def inputs_of_passes(passes, model, settings, table):
    """For each list of tokens their number, and name and rows of what the client puts in."""
    for tokens in passes:
        if settings.embedding == "public":
            yield len(tokens), "embedded", table[tokens].astype(np.float32)
        else:
            yield len(tokens), "tokens", one_hot(tokens, model.vocab_size)  # prepared ones are never in pairs


def plain_passes(passes, model, settings, weights, last_rows=1):
    """What the unprepared program computes in plaintext: logits after each pass. Pairs of tokens need the ring."""
    settings = msgspec.structs.replace(settings, embedding="public", paired=False)
    values, past, found = dict(weights), cached_tokens(weights), []
    for count, name, rows in inputs_of_passes(passes, model, settings, weights["embedding"]):
        values[name] = rows
        run_stages(stages_of_pass(model, settings, count, past, last_rows=last_rows), values)
        past += count
        found.append(np.asarray(values["logits"]))
    return found


# --- An ideal engine --------------------------------------------------------------------------------------------------


class IdealEngine:
    """One of two parties; `pair` makes both."""

    @classmethod
    def pair(cls, fraction_bits, random):
        engines = cls(), cls()
        barrier, links, lock = threading.Barrier(2, timeout=600), (queue.Queue(), queue.Queue()), threading.Lock()
        for rank, engine in enumerate(engines):
            engine.rank, engine.other, engine.random = rank, engines[1 - rank], random
            engine.bits = engine.fraction_bits = fraction_bits
            engine.barrier, engine.links, engine.lock = barrier, links, lock
            engine.shares, engine.sent = {}, []
        return engines

    def hold(self, name, shape, value):
        whole = np.zeros(shape, np.int64) if value is None else np.rint(value.astype(np.float64) * 2.0**self.bits)
        self.shares[name] = whole.astype(np.int64).view(np.uint64)

    def shape(self, name):
        return self.shares[name].shape

    def numbers(self, name):
        return self.shares[name]

    def set_numbers(self, name, numbers):
        assert numbers.dtype == np.uint64
        self.shares[name] = numbers

    def value(self, name):
        return (self.shares[name] + self.other.shares[name]).view(np.int64) / 2.0**self.bits

    def run(self, stage, token):
        self.barrier.wait()
        if self.rank == SERVER:
            for name, whole in zip(stage.outputs, self.results(stage)):
                self.other.shares[name] = self.random.integers(0, 2**64, whole.shape, dtype=np.uint64)
                self.shares[name] = whole - self.other.shares[name]
        self.barrier.wait()
        return StageCommunication(
            name=stage.name, layer=stage.layer, token=token, seconds=0.0,
            sent_bytes=0, received_bytes=0, sent_messages=0, received_messages=0,
        )  # fmt: skip

    def results(self, stage):
        operands = [self.value(name).astype(np.float32) for name in stage.inputs]
        results = compiled(Comparable.of(stage.function))(*operands)
        for result in results if len(stage.outputs) > 1 else [results]:
            yield np.rint(np.asarray(result, np.float64) * 2.0**self.bits).astype(np.int64).view(np.uint64)

    def reveal_to_client(self, name):
        self.barrier.wait()
        value = self.value(name)
        self.barrier.wait()
        return (value if self.rank == CLIENT else None), 0

    def send(self, content):
        self.sent.append(content)
        self.links[1 - self.rank].put(content)

    def receive(self, size):
        content = self.links[self.rank].get(timeout=600)
        assert len(content) == size
        return content


_compiled = {}


def compiled(program):
    return _compiled.setdefault(program, jax.jit(program.function))


def ideal_arrays(need, weights, bits, random):
    """Both parties' arrays of one need, exact."""

    def draw(shape):
        return random.integers(0, 2**64, shape, dtype=np.uint64)

    if need.kind == TRUNCATE:
        return ideal_truncations(need.rows, bits, random)
    if need.kind in (SIGNS, WINNERS, BITS, KEPT):
        return ideal_bits(need, draw)
    a, b = draw(need.shapes[0]), draw(need.shapes[1])
    if need.masking == "server":
        b = encode(weights[need.matrix], bits).astype(np.int64).view(np.uint64)
    product = multiply(need.kind, a, a if need.masking == "self" else b)
    parties = {}, {}
    for which, whole in dict(a=a, b=b, c=product).items():
        if which == "b" and need.masking != "pair":
            continue
        ours = draw(whole.shape)
        if which == "a" and need.masking == "server":
            parties[CLIENT][array_name(need.name, which)] = whole
            continue
        parties[CLIENT][array_name(need.name, which)] = ours
        parties[SERVER][array_name(need.name, which)] = whole - ours
    return parties


def ideal_truncations(count, bits, random):
    """Both parties' arrays for so many truncations."""
    drawn = random.integers(0, 2, (2, count), dtype=np.uint8)
    ours = random.integers(0, 2**bits, count, dtype=np.uint32)
    shares = ours, (drawn[0] * drawn[1] - ours) % np.uint32(2**bits)
    names = [array_name(TRUNCATE, which) for which in ("a", "c")]
    return [dict(zip(names, packed(*party))) for party in zip(drawn, shares)]


def ideal_bits(need, draw):
    """Both parties' arrays for signs and winners, or for what follows from signs."""
    if need.kind in (SIGNS, WINNERS):
        masks = draw(need.shapes[0])
        whole = dict(a=masks, c=products_of_masks(masks, gates_of(need)))
        theirs = {which: draw(one.shape) for which, one in whole.items()}
        ours = {which: one ^ theirs[which] for which, one in whole.items()}
    else:
        bit, a = draw(need.result) >> np.uint64(63), draw(need.result)
        whole = dict(b=bit) if need.kind == BITS else dict(a=a, b=bit, c=bit * a)
        theirs = {which: draw(one.shape) for which, one in whole.items()}
        ours = {which: one - theirs[which] for which, one in whole.items()}
    return [{array_name(need.name, which): one for which, one in party.items()} for party in (ours, theirs)]


def products_of_masks(masks, gates):
    """Of known words, what both parties find shares of."""
    multiplying = multiplied(masks, gates)
    left, right = next(multiplying)
    while True:
        try:
            left, right = multiplying.send(left & right)
        except StopIteration as done:
            return done.value


def ideal_material(model, settings, weights, tokens, random, read=None):
    """Needs, and each party's arrays; for the logits after `read` tokens."""
    weights = {**weights, **lookahead.weights(model, weights)}
    wanted = needs(model, settings, tokens, read)
    dealt = [ideal_arrays(need, weights, settings.fraction_bits, random) for need in wanted]
    return wanted, [{name: array for one in dealt for name, array in one[rank].items()} for rank in (SERVER, CLIENT)]


def told_apart(sent, in_messages):
    """Masked numbers in messages, and all bits behind them."""
    numbers, bits = [], []
    for content, (size, count) in zip(sent, in_messages, strict=True):
        numbers.append(np.frombuffer(content[:size], "<u8"))
        bits.append(np.unpackbits(np.frombuffer(content[size:], np.uint8), count=count))
    return numbers, np.concatenate(bits)


class Session:
    """What both did in some passes: `logits`, `opened` numbers, and masked numbers and `bits` that each has sent."""

    def __init__(self, model, settings, weights, passes, materials, random, drafts=()):
        engines = IdealEngine.pair(settings.fraction_bits, random)
        weights = {**weights, **lookahead.weights(model, weights)}
        client_rows = list(inputs_of_passes(passes, model, settings, weights["embedding"]))
        results, failures = {}, []
        matrices = [need.name for need in needs(model, settings, model.positions) if need.matrix]

        def party(engine):
            server = engine.rank == SERVER
            for name, weight in weights.items():
                engine.hold(name, weight.shape, weight if server else None)
            whole = {name: encode(weights[name], settings.fraction_bits) if server else None for name in matrices}
            material, past = materials[engine.rank], cached_tokens(weights)
            try:
                found = run_passes(engine, client_rows, material, model, settings, whole, past, drafts)
                results[engine.rank] = found
            except BaseException as error:
                failures.append(error)
                engine.barrier.abort()

        threads = [threading.Thread(target=party, args=(engine,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            first = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
            raise [*first, *failures][0]
        self.logits = results[CLIENT][0]
        self.opened = results[SERVER][1].opened  # the server sees all of them
        recorded = [results[rank][1].in_messages for rank in (SERVER, CLIENT)]
        self.sent, self.bits = zip(*(told_apart(engine.sent, bits) for engine, bits in zip(engines, recorded)))


def ideal_session(model, settings, weights, passes, tokens, seed=0, drafts=(), read=None):
    """Passes with ideal material, and both parties' arrays."""
    random = np.random.default_rng(seed)
    wanted, arrays = ideal_material(model, settings, weights, tokens, random, read)
    materials = [Material(wanted, one) for one in arrays]
    return Session(model, settings, weights, passes, materials, random, drafts), arrays
