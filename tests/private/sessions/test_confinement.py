"""A party's process that somebody else has taken over: what is left to it."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("spu")
from entropi.private.sessions import confinement, party_handle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's means are Linux's")

TAKEN_OVER = """
import json, os, resource, signal, socket, subprocess, sys, threading
from pathlib import Path
from entropi.private.sessions import confinement
folder, secret, port, lost, parent = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], os.getppid()
if lost == "user":
    confinement._python = lambda: []
before = socket.socket(socket.AF_UNIX)
told = confinement.confine(folder)

def fork():
    if os.fork() == 0:
        os._exit(0)

def connect(family, kind, address):
    with socket.socket(family, kind) as attempt:
        attempt.connect(address)

deeds = {
    "read a file": lambda: open(secret).read(),
    "read a key of another": lambda: open(f"/proc/{parent}/environ").read(),
    "read another's memory": lambda: open(f"/proc/{parent}/mem", "rb").read(1),
    "list the root": lambda: os.listdir("/"),
    "write a file": lambda: open(secret + ".new", "w"),
    "write to Python": lambda: open(Path(confinement.__file__).parent / "x.py", "w"),
    "speak TCP": lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port)),
    "speak UDP": lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", port)),
    "speak to the kernel": lambda: connect(socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)),
    "start a program": lambda: os.execv("/bin/true", ["true"]),
    "fork": fork,
    "fork by clone3": lambda: subprocess.run(["/bin/true"]),
    "signal another": lambda: os.kill(parent, signal.SIGCONT),
    "become root": lambda: os.setuid(0),
}
done = []

def act():
    for name, deed in deeds.items():
        try:
            deed()
            done.append(name)
        except OSError:
            pass

act()
thread = threading.Thread(target=act)
thread.start()
thread.join()
(folder / "log").write_text("x")
own = socket.socket(socket.AF_UNIX)
own.bind(str(folder / "engine"))
import decimal
import numpy
status = Path("/proc/self/status").read_text()
print(json.dumps({"told": told, "done": done, "core": resource.getrlimit(resource.RLIMIT_CORE)[0], "user": os.getuid(),
    "dumpable": confinement._libc.prctl(3, 0, 0, 0, 0), "no_new": "NoNewPrivs:\\t1" in status}))
"""


def take_over(tmp_path, lost="all", searched=()):
    secret = tmp_path / "key.pem"
    secret.write_text("secret")
    secret.chmod(0o600)
    environment, how = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}, ("9", lost)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        ran = subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:0] = {[*searched]!r}\n{TAKEN_OVER}",
                name,
                str(secret),
                *how,
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
    assert ran.returncode == 0 or lost == "user", ran.stderr
    return ran


@pytest.mark.parametrize("searched", ["", "the working folder", "/"])
def test_nothing_is_left_to_a_process_that_was_taken_over(tmp_path, searched):
    """Also where the folder of the keys, in which a server was started, is on Python's search path."""
    path = {"": (), "the working folder": (str(tmp_path),), "/": ("/",)}[searched]
    found = json.loads(take_over(tmp_path, searched=path).stdout)
    line = confinement.summary(found["told"])
    if not re.search(r"Landlock ([6-9]|\d\d)", line) or "(seccomp)" not in line:
        pytest.skip(f"this kernel has less: {line}")
    root = os.geteuid() == 0 and "a user of its own" not in found["told"]
    assert found["done"] == (["become root"] * 2 if root else [])  # it is root already, with none of root's means
    assert found["core"] == 0
    assert found["dumpable"] == 0
    assert found["no_new"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_becomes_a_user_whom_nobody_else_is(tmp_path):
    ran = take_over(tmp_path, lost="user")
    if ran.returncode:  # Python's own files are root's here, and so it can import nothing any more
        assert "PermissionError" in ran.stderr or "ModuleNotFoundError" in ran.stderr
        pytest.skip("only root may read Python here")
    found = json.loads(ran.stdout)
    assert found["user"] >= 60_000
    assert "become root" not in found["done"]


def test_what_is_missing_is_said():
    assert confinement.summary(["no core dumps", "not: Landlock (files, TCP)"]) == (
        "no core dumps; not in force: Landlock (files, TCP)"
    )
    assert confinement.summary(["a", "b"]) == "a, b"


def test_a_kernel_without_these_means_is_told_apart(monkeypatch, tmp_path):
    class Old:
        def syscall(self, *_):
            return -1

        def prctl(self, *_):
            return -1

    monkeypatch.setattr(confinement, "_libc", Old())
    assert confinement._landlock(tmp_path) == "not: Landlock (files, TCP)"
    assert confinement._seccomp().startswith("not: seccomp")
    monkeypatch.setattr(confinement.platform, "machine", lambda: "riscv64")
    assert confinement._seccomp() == "not: seccomp (its numbers are not known here for riscv64)"


def test_the_process_says_what_is_in_force(tmp_path):
    line = asyncio.run(party_handle.confinement())
    assert line.startswith("no core dumps, ")
    found = json.loads(take_over(tmp_path).stdout)
    assert line == confinement.summary(found["told"])


def test_a_party_is_told_no_passwords(monkeypatch):
    monkeypatch.setenv("ENTROPI_REDIS_PASSWORD", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told = party_handle._environment()
    assert "hunter" not in " ".join(told.values())
    assert told["OMP_NUM_THREADS"] == "1"


def test_nothing_is_imported_from_the_working_folder(tmp_path):
    """A party is not started by -m, which would put that folder first."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working folder')")
    command = [*party_handle.PARTY_COMMAND, "--confinement", str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "no core dumps" in confinement.summary(json.loads(ran.stdout))
