"""What fixed point does to a model's answers, as it is summed up, and the process in which it is found out."""

import math

import pytest

pytest.importorskip("jax")

from entropi.errors import UserError
from entropi.private.compute.accuracy import Accuracy, Compared
from entropi.private.compute.process import answers


def test_losses_that_no_perplexity_holds_are_infinite():
    """Numbers that wrapped may give logits of any size."""
    found = Accuracy.of([Compared(3, 2 * math.log(2), 2e4, 1, 1e5)])
    assert found.plain_perplexity == pytest.approx(2)
    assert math.isinf(found.private_perplexity)
    assert math.isinf(found.change)


@pytest.mark.parametrize(
    ("program", "got"),
    [
        ("print(1); print(2)", [1, 2]),
        ("print(1); raise SystemExit(3)", [1]),
        ("print(1); print('[')", [1]),
    ],
)
def test_a_child_that_fails_is_one_line_behind_what_it_said(tmp_path, monkeypatch, program, got):
    (tmp_path / "child.py").write_text(f"import sys; assert sys.stdin.read() == '[5]'; {program}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = []

    def listen():
        for one in answers("child", [5], int, "it failed"):
            found.append(one)

    if len(got) == 2:
        listen()
    else:
        with pytest.raises(UserError, match="it failed"):
            listen()
    assert found == got


def test_a_child_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"it failed: it was not done after 0\.5 s"):
        list(answers("child", [5], int, "it failed", seconds=0.5))


def test_a_child_that_was_killed_is_told_from_one_that_failed(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="it failed: its process was killed, as happens where memory runs out"):
        list(answers("child", [5], int, "it failed"))
