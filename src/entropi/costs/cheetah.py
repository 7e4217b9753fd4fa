"""What SPU's CHEETAH exchanges for one call of a protocol: its bookkeeping, replayed on public sizes.

SPU decides by size alone how matrices are cut into ciphertexts, when prepared triples are made and when oblivious
transfers run out, so that the number of everything it sends can be known before. This module counts; what each counted
thing costs is measured (`calibration`). The rules are those of SPU 0.9.5 (`mpc/cheetah`), ring of 64 bits.

The names of counted things are readable keys: they appear in the calibration file. "by server" and "by client" say
which party encrypts; the other one computes on the ciphertexts and answers. "calls" are what rounds are attributed to,
as the pieces of one call travel together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from entropi.costs.tracing import ProtocolCall
from entropi.private.compute.tiling import SLOTS, tiling

_TILE = 2048  # least numbers for another worker with oblivious transfers of its own
_RESERVED = 452_000 + 13 * 1280  # transfers that an extension keeps for the next one
_FIRST, _EXTENSION = 470_016 - _RESERVED, 10_485_760 - _RESERVED  # transfers from the set-up, from every extension
# Transfers a number takes, where the server's side sends and where the client's does: a comparison has 16 digits of 4
# bits with four transfers each, and 15 conjunctions with one each way. Both words of an "and" have 64 bits.
_TRANSFERS = {
    "compare": (64 + 15, 15),
    "select": (1, 1),
    "select public": (1, 0),
    "truncate": (1, 0),
    "truncate with sign": (1, 0),
    "and": (64, 64),
}
_TRIPLES = 4096  # products that one ciphertext each way prepares
_DIRECT = 2 * SLOTS  # from so many numbers on products are made directly, without prepared ones

CALLS = " calls"  # how names of counted things end that only rounds are attributed to


class Cheetah:
    """The parties' state: what is set up, and what is left of prepared triples and transfers.

    Args:
        workers: instances of oblivious transfer a party runs side by side, one a processor core.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._triples = 0
        self._transfers: list[list[int]] = []  # left, by worker: sent by the server, sent by the client
        self._keys: set[str] = set()

    def count(self, call: ProtocolCall) -> Counter[str]:
        """Everything that one call exchanges, set-up and refills included."""
        counted: Counter[str] = Counter()
        if call.kind == "product":
            self._product(call, counted)
        elif call.kind == "multiply":
            known = {call.left, call.right} - {"shared"}
            # The engine treats numbers that are known to one party each as if nobody knew any of them.
            self._multiply(call.size, known if len(known) == 1 else set(), counted)
        elif call.kind == "square":
            self._square(call.size, counted)
        else:
            self._transferred(call.kind, call.size, counted)
        return counted

    def _transferred(self, kind: str, size: int, counted: Counter[str]) -> None:
        """A protocol of oblivious transfers on `size` numbers."""
        tiles = self._transfer(kind, size, counted)
        counted[f"{kind} numbers"] += size
        counted[f"{kind} tiles"] += tiles
        counted[f"{kind}{CALLS}"] += 1

    def _transfer(self, kind: str, size: int, counted: Counter[str]) -> int:
        """Take transfers, extend them where they run out; returns the number of workers that share the numbers."""
        tiles = min(self.workers, -(-size // _TILE))
        while len(self._transfers) < tiles:
            self._transfers.append([_FIRST, _FIRST])
            counted["transfer set-ups"] += 1
        share = -(-size // tiles)
        waited = False
        for worker in range(tiles):
            numbers = min(share, size - worker * share)
            for way, each in enumerate(_TRANSFERS[kind]):
                left = self._transfers[worker][way] - each * numbers
                while left < 0:
                    left += _EXTENSION
                    counted["transfer extensions"] += 1
                    waited = True
                self._transfers[worker][way] = left
        counted["transfer extension calls"] += waited
        return tiles

    def _key(self, name: str, counted: Counter[str]) -> None:
        if name not in self._keys:
            self._keys.add(name)
            counted[name] += 1

    def _product(self, call: ProtocolCall, counted: Counter[str]) -> None:
        cut = tiling(*call.shape)
        self._key("matrix keys", counted)
        if call.left == call.right == "shared":
            # Each party's share of the smaller operand with the other's share of the larger.
            encrypting = ["server", "client"]
        else:
            # A share of what one party knows is held by the other one.
            left = call.left if call.left != "shared" else _other(call.right)
            right = call.right if call.right != "shared" else _other(call.left)
            encrypting = [left if cut.left <= cut.right else right]
        for party in encrypting:
            counted[f"operand ciphertexts by {party}"] += min(cut.left, cut.right)
            counted[f"{'answer' if cut.packed else 'bare answer'} ciphertexts by {party}"] += cut.answers
            counted["polynomial products"] += cut.products
            counted["rotations"] += cut.rotations
        counted["matrix product calls"] += 1

    def _multiply(self, size: int, known: Collection[str], counted: Counter[str]) -> None:
        self._key("number keys", counted)
        if known:
            counted[f"blocks by {'server' if 'server' in known else 'client'}"] += -(-size // SLOTS)
            counted["multiply calls"] += 1
        elif size >= _DIRECT:
            counted["shared blocks"] += -(-(size // 2) // SLOTS) + -(-(size - size // 2) // SLOTS)
            counted["multiply calls"] += 1
        else:
            if self._triples < size:
                blocks = -(-2 * size // SLOTS)
                counted["blocks by client"] += blocks
                counted["triple calls"] += 1
                self._triples += blocks * _TRIPLES
            self._triples -= size
            counted["opened numbers"] += size
            counted["opening calls"] += 1

    def _square(self, size: int, counted: Counter[str]) -> None:
        """An exponential of one squaring: half, of known sign, then the square; both truncated."""
        self._key("number keys", counted)
        first = size if size <= SLOTS else size // 2
        counted["blocks by client"] += -(-first // SLOTS)
        counted["blocks by server"] += -(-(size - first) // SLOTS)
        counted["multiply calls"] += 1
        for kind in ("truncate with sign", "truncate"):
            self._transferred(kind, size, counted)


def _other(party: str) -> str:
    return "client" if party == "server" else "server"
