"""What the README says works: its Python runs, its commands parse, its files exist."""

import re
import shlex
from pathlib import Path

import pytest

from entropi.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("entropi ")]


def test_python_blocks_run(capsys):
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "heads" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, monkeypatch):
    words = [w if not w.startswith("--") else "--" + w[2:].replace("-", "_") for w in shlex.split(command)[1:]]
    assert build_parser().parse_args(words).command == words[0]


def test_every_command_is_listed():
    from entropi.cli import COMMANDS

    listed = README.partition("Commands:")[2].partition("([all options]")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(COMMANDS)


def test_it_is_short():
    assert len(README.splitlines()) <= 90


def test_figures_are_those_of_the_results():
    """The GB of private passes stand in the measurement that the line links to, beside the paper's."""
    measured = (ROOT / "benchmarks" / "results" / "private_forward.md").read_text(encoding="utf-8")
    claims = re.findall(r"`(SM[^`]+)` ([\d.]+)(?: GB)? where (?:the paper|it) has ([\d.]+)", README)
    assert len(claims) == 2
    for name, ours, theirs in claims:
        row = re.search(rf"^\| {re.escape(name)} T=128 \| ([\d.]+) \|.*?\*\*([\d.]+)\*\*", measured, flags=re.MULTILINE)
        assert row[1] == theirs
        assert round(float(row[2]), 2) == float(ours)


def test_linked_files_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
