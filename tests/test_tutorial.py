"""The tutorial and the examples, run as a reader would run them: in order, in one folder."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving import free_port, model  # noqa: F401

pytest.importorskip("spu", reason="asking in private needs the extra private")
pytest.importorskip("matplotlib", reason="pictures need the extra report")

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
HANGING = 900  # seconds after which something hangs, on a machine with other work too


@pytest.fixture
def environment(tmp_path):
    """The reader's shell: `entropi` and `python` are this Python's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("entropi", "-m entropi"), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def run(words, folder, environment):
    done = subprocess.run(
        words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANGING
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def begin(command, folder, environment):
    """A program in the background, once it says that it listens."""
    log = folder / "server.log"
    with open(log, "wb") as file:
        program = subprocess.Popen(
            ["sh", "-c", f"exec {command}"], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + HANGING
    while "listening on" not in log.read_text():
        assert program.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return program


@pytest.mark.two_party
def test_every_block_of_the_tutorial_runs_in_order(tmp_path, environment):
    folder = tmp_path / "work"
    folder.mkdir()
    blocks = BLOCK.findall(TUTORIAL)
    assert blocks[0][1].startswith("pip install")  # what the test's own environment is made with
    port, background, said = free_port(), [], []
    try:
        for language, block in blocks[1:]:
            block = block.replace("127.0.0.1:9000", f"127.0.0.1:{port}")
            if language == "python":
                said.append(run(["python", "-c", block], folder, environment))
            elif block.rstrip().endswith("&"):
                background.append(begin(block.strip().removesuffix("&"), folder, environment))
            else:
                said.append(run(["sh", "-e", "-c", block], folder, environment))
    finally:
        for program in background:
            program.terminate()
            program.wait(60)
    assert len(said) == 7
    assert len(background) == 1
    for name in ("first-entropy.png", "my-model.png", "runs/first/report.html"):
        assert (folder / name).is_file()


def test_the_tutorial_installs_what_the_package_offers():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    install = BLOCK.search(TUTORIAL)[2]
    for extra in re.search(r"\.\[(.*?)\]", install)[1].split(","):
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)
    assert re.search(r"torch==\S+", install)[0] in constraints.splitlines()


# --- Examples ---------------------------------------------------------------------------------------------------------


def example(name, *words, folder, environment):
    return run(["python", str(ROOT / "examples" / name), *map(str, words)], folder, environment)


@pytest.mark.slow
def test_entropy_of_a_random_model(tmp_path, environment):
    said = example("entropy_of_a_model.py", folder=tmp_path, environment=environment)
    assert "4 layers of 4 heads over 128 tokens" in said
    assert (tmp_path / "entropy.png").is_file()


@pytest.mark.slow
def test_entropy_of_a_pretrained_model(tmp_path, environment, smollm2_folder):
    """Of a folder, and not overloaded everywhere as untrained models are."""
    said = example("entropy_of_a_model.py", smollm2_folder, folder=tmp_path, environment=environment)
    assert "30 layers of 9 heads over 128 tokens" in said
    assert int(re.search(r"(\d+)% of the heads lie between M/4 and 3M/4", said)[1]) > 50


@pytest.mark.slow
def test_a_loop_of_ones_own_learns_and_moves_the_thresholds(tmp_path, environment):
    said = example("training_loop.py", 30, folder=tmp_path, environment=environment)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < losses[0] - 0.5
    low, high = map(float, re.search(r"between ([\d.]+) and ([\d.]+)", said).groups())
    assert low != 0.5 or high != 0.5


@pytest.mark.slow
def test_prices_order_the_architectures(tmp_path, environment):
    said = example("price_of_an_architecture.py", folder=tmp_path, environment=environment)
    prices = {name: float(size) for name, size in re.findall(r"^(SM\S+) +[\d,]+ +([\d.]+)", said, flags=re.MULTILINE)}
    assert prices["SM+LN+G"] > prices["SM+LN+R"] > prices["SM+ScFuFFN"]
    assert "softmax 144 x (128, 128)" in said


@pytest.mark.two_party
def test_a_private_question(tmp_path, environment, model):  # noqa: F811
    said = example("ask_in_private.py", model[0], "the keeper", folder=tmp_path, environment=environment)
    assert "'the keeper' -> " in said
    assert "MB in both directions" in said


@pytest.mark.slow
def test_a_new_activation_is_trained_folded_and_right_in_private(tmp_path, environment):
    said = example("new_activation.py", folder=tmp_path, environment=environment)
    assert float(re.search(r"loss ([\d.]+)", said)[1]) < 3.5  # of log 64 = 4.16 before training
    private, plain = re.search(r"next token (\d+), in plaintext (\d+)", said).groups()
    assert private == plain
    assert float(re.search(r"difference of a logit ([\d.]+)", said)[1]) < 0.01
    assert float(re.search(r": ([\d.]+) MB", said)[1]) > 0
