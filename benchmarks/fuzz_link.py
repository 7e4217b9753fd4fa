"""Look for bytes that the guard of the engines' link passes although no engine should get them, guided by coverage.

    pip install atheris
    PYTHONPATH=tests python benchmarks/fuzz_link.py -max_total_time=600 CORPUS

An input is a list of pieces, each with one byte before it that says in which direction and on which connection it
travels. What arrives is given to the model of an engine that the tests use, which reads with a decoder of its own; its
`Malformed` is a finding. The corpus starts from honest conversations and the attack that the guard was made for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["entropi.private.wire.link_frames"]):
    from entropi.private.wire.link_frames import BadFrame, LinkGuard

from link_messages import SESSION, Engine, chunk, conversation, place, question_of, two_chunks


def one_input(data: bytes) -> None:
    """Let one list of pieces pass between a client's engine and a guard."""
    guard, engine = LinkGuard(1, SESSION, 1 << 20), Engine(1)
    at = 0
    try:
        while at + 3 <= len(data):
            way, size = data[at], int.from_bytes(data[at + 1 : at + 3], "big")
            piece, at = data[at + 3 : at + 3 + size], at + 3 + size
            stream = way & 1
            if way & 2:
                left = guard.leaves(stream, piece)
                if piece[:4] == b"PRPC" and len(left) == len(piece):
                    (engine.asks if stream == 1 else engine.answers)(question_of(piece))
            else:
                engine.take(stream, guard.arrives(stream, piece))
    except BadFrame:
        return


def seeds(folder: Path) -> None:
    """Conversations, and attacks, as inputs."""
    folder.mkdir(exist_ok=True)

    def packed(said: list[tuple[int, int, bytes]]) -> bytes:
        return b"".join(bytes([2 * sender + stream]) + len(d).to_bytes(2, "big") + d for sender, stream, d in said)

    for seed in range(6):
        (folder / f"honest-{seed}").write_bytes(packed(list(conversation(seed, 4))))
    attack = [(0, 0, frame) for frame in two_chunks(0)]
    (folder / "attack").write_bytes(packed([*list(conversation(1, 0))[:8], *attack]))
    (folder / "chunk").write_bytes(packed([(0, 0, chunk(0, 2, place(0, 1, 1), b"x" * 9, 0, 9))]))


if __name__ == "__main__":
    seeds(Path(sys.argv[-1]))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
