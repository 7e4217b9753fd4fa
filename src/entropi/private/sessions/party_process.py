"""The process of one party of one session: `python -m entropi.private.sessions.party_process`.

It reads a `Job` and the files that the job names, gives up what `confinement` takes from it, and becomes a `party`. All
that is large is imported after that, for some of it holds only for threads that begin later.

`--confinement FOLDER`, with an empty folder, only says in one line of JSON what is in force on this system, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import tempfile
import threading
from pathlib import Path

from entropi.private.sessions.confinement import confine


def main() -> int:
    """Run the job on standard input; status 1 after a `Failed` event."""
    if sys.argv[1:2] == ["--confinement"]:
        print(json.dumps(confine(Path(sys.argv[2]))), flush=True)
        return 0
    # SPU and its libraries may print; only events go to the parent.
    # Buffered: a plain write that a signal interrupts, a stop and go on, may write a part only.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    line, begun = _first_line()
    try:
        job = json.loads(line)
        names = ("weights", "ahead", "prefix", "table", "material")
        files = {name: Path(job[name]).read_bytes() for name in names if job.get(name)}
        if "material" in files:
            os.close(int(Path(job["material"]).name))  # of a file in memory, which is here now
        folder = Path(job["links"][job["rank"]].removeprefix("unix:")).parent
        confine(folder)
    except Exception as error:  # the parent's user reads one line, wherever it comes from
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        events.write(json.dumps({"type": "Failed", "reason": reason}).encode() + b"\n")
        events.flush()
        return 1
    tempfile.tempdir = str(folder)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(begun, lines), daemon=True).start()
    from entropi.private.sessions.party import run

    return run(line, files, lines, events)


def _first_line() -> tuple[bytes, bytes]:
    """Of standard input; and what came behind it."""
    read = b""
    while b"\n" not in read and (part := os.read(0, 1 << 16)):
        read += part
    line, _, rest = read.partition(b"\n")
    return line, rest


def _read_lines(begun: bytes, lines: queue.SimpleQueue[bytes]) -> None:
    """Pass on what the parent says; end this process, whatever it is doing, once the parent is gone."""
    # By the system's own call: at exit the interpreter could not take the lock that a blocked reader holds.
    while part := os.read(0, 1 << 16):
        begun += part
        while b"\n" in begun:
            line, _, begun = begun.partition(b"\n")
            lines.put(line)
    os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
