"""The siege of a server, in small: honest answers are compared, attacks are counted, and nothing outlives it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("spu")

from serving import HANGING, marked_processes, wait_for

pytest_plugins = ["serving"]  # its fixtures
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("setpriv"), reason="ties processes to their parent by setpriv"
)

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "benchmarks" / "siege.py"
KINDS = ("half_open", "wrong_certificate", "malformed", "two_chunk_pushes", "killed")


def siege(*words, **how):
    options = ("--sessions", "4", "--pause", "2", "--every", "1", "--no-warm-up", "--kinds", *KINDS)
    return subprocess.Popen(
        [sys.executable, SCRIPT, *options, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )


@pytest.fixture(scope="module")
def besieged(scratch):
    """Output and status of a short siege."""
    process = siege("--minutes", "0.2")
    out, said = process.communicate(timeout=20 * HANGING)
    return process.returncode, out, said


@pytest.mark.two_party
@pytest.mark.slow
def test_honest_clients_are_answered_while_others_attack(besieged, scratch):
    status, out, said = besieged
    assert status == 0, said
    found = json.loads(out.splitlines()[-1])
    assert found["honest"] == {"right": sum(found["honest"].values())}
    assert 0 < found["largest_logit_error"] < 0.1
    assert set(found["hostile"]) <= set(KINDS)
    assert found["hostile_after_warm_up"] >= 3
    assert found["breaches"] == []
    assert found["survived"]
    assert found["before"]["rss"] > 50
    assert found["after"]["sessions"] == 0
    assert "| at rest afterwards |" in out
    assert not marked_processes(scratch)


@pytest.mark.two_party
@pytest.mark.slow
def test_nothing_is_left_of_one_that_is_killed(besieged, scratch):
    process = siege("--minutes", "10")
    try:
        for line in process.stderr:
            if "killed" in line or "two_chunk" in line:  # several processes are at work
                break
        assert len(marked_processes(scratch)) > 3
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not marked_processes(scratch))


@pytest.mark.parametrize(
    "changed",
    [
        {"honest": {"right": 3, "wrong": 1}},
        {"honest": {"right": 3, "failed": 1}},
        {"honest": {"refused": 3}},
        {"breaches": ["mallory was let in"]},
        {"tracebacks": 1},
        {"survived": False},
    ],
)
def test_what_may_not_happen_makes_the_status(changed, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from siege import failed

    fine = {"honest": {"right": 3, "refused": 1}, "breaches": [], "tracebacks": 0, "survived": True}
    assert not failed(fine)
    assert failed({**fine, **changed})


def test_every_test_that_the_table_of_attacks_names_exists():
    file, named = "", []
    for found in re.finditer(r"`([\w/]+\.py)?::(test_\w+)`", (ROOT / "docs" / "attacks.md").read_text()):
        file = found[1] or file
        named.append((file, found[2]))
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
