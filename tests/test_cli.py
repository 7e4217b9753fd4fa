"""The command line: help that suffices, one line and status 2 for every mistake, and what is not loaded."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from command_line import SOURCES, Done, assert_refused, spawn
from entropi import cli, commands
from entropi.cli import main
from entropi.commands import COMMANDS, common
from entropi.commands.common import Command

pytestmark = pytest.mark.usefixtures("surroundings")


def options_of(name: str) -> set[str]:
    """What the signature of a command says it takes."""
    import dataclasses
    import inspect

    command = COMMANDS[name]
    found = set(inspect.signature(command.function).parameters)
    if command.settings is not None:
        options = {field.name for field in dataclasses.fields(command.settings.kind)}
        found = found - {command.settings.argument} | {"config"} | options
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(entropi: Callable[..., Done], name: str):
    done = entropi(name, "--help")
    assert (done.status, done.err) == (0, "")
    listed = re.findall(
        r"^  (?:-h, )?(--)?([\w-]+)(?: [A-Z{\[][^ ]*)?(?: \[\w+ \.\.\.\])?(?:  +|\n +)(\S.*)$", done.out, re.M
    )
    explained = {word.replace("-", "_"): text for _, word, text in listed}
    assert options_of(name) <= explained.keys()
    for option in options_of(name):
        assert re.match(r"[\w\"(.]", explained[option]), option
        assert not explained[option].startswith("(type"), option
    assert "_" not in "".join(re.findall(r"--\S+", done.out))
    assert "<class" not in done.out


@pytest.mark.parametrize(
    ("name", "usage"),
    [("train", "RUN [options]"), ("ask", "[PROMPT] [options]"), ("report", "RUNS [RUNS ...] [options]")],
)
def test_usage_names_the_command(entropi: Callable[..., Done], name: str, usage: str):
    assert entropi(name, "--help").out.splitlines()[0] == f"usage: entropi {name} {usage}"


def test_help_of_the_whole(entropi: Callable[..., Done]):
    done = entropi("--help")
    assert done.status == 0
    for name, command in COMMANDS.items():
        assert command.function.__doc__
        assert re.search(rf"^    {name} +\S", done.out, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_parser_of_one_command_reads_it_as_that_of_all(name: str):
    """The others have no arguments there, which take longer to make than all else that a short command does."""
    one, every = (
        next(action for action in parser._actions if isinstance(action.choices, dict)).choices
        for parser in (cli.build_parser(name), cli.build_parser())
    )
    assert one[name].format_help() == every[name].format_help()
    assert {len(parser._actions) for other, parser in one.items() if other != name} == {1}  # --help


def test_version(entropi: Callable[..., Done]):
    assert entropi("--version").out == f"entropi {cli.__version__}\n"


def test_no_command():
    assert_refused(spawn(), "a command is missing: one of demo, train, evaluate")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["invalid choice: 'trian'", "'train'"]),
        (["train"], ["RUN is missing (see entropi train --help)"]),
        (["fold", "model"], ["OUTPUT is missing (see entropi fold --help)"]),
        (["report"], ["RUNS is missing"]),
        (["ask"], ["PROMPT is missing"]),
        (["train", "run", "--stpes", "3"], ["unrecognized arguments: --stpes 3"]),
        (["train", "run", "--conf", "x"], ["unrecognized arguments: --conf x"]),  # no guessing of abbreviations
        (["train", "run", "--steps", "many"], ["steps: expected int, got many"]),
        (["train", "run", "--steps", "1.5"], ["steps: expected int, got 1.5"]),
        (["train", "run", "--steps"], ["--steps: expected one argument"]),
        (["train", "run", "--learning-rate", "fast"], ["learning_rate: expected float, got fast"]),
        (["train", "run", "--bias", "some"], ["bias: expected one of 'qk', 'all', 'none', got some"]),
        (["train", "run", "--steps", "0", "--layers", "-1"], ["steps is 0", "layers is -1"]),
        (["train", "run", "--hidden-size", "10"], ["hidden_size is 10, not a multiple of heads, 4"]),
        (["train", "run", "--architecture", "SM+BN"], ["unknown architecture 'SM+BN'", "SM(t)+ScFuFFN", "SM+LN+G"]),
        (["train", "run", "--config", "none.yaml"], ["cannot read the recipe none.yaml: No such file"]),
        (["train", "run", "--config"], ["--config: expected one argument"]),
        (
            ["evaluate", "run", "--exp-iterations", "3"],
            ["--exp-iterations is part of --softmax now, such as --softmax"],
        ),
        (["cost", "--layers", "2", "--polynomial"], ["--polynomial is part of --softmax now"]),
        (["evaluate", "run", "--packing", "tight"], ["packing: expected one of 'stream', 'document', got tight"]),
        (["evaluate", "nowhere"], ["there is no model at nowhere"]),
        (["evaluate", "nowhere", "--json", "3"], ["unrecognized arguments: 3"]),
        (["diagnose", "nowhere"], ["there is no model at nowhere"]),
        (["fold", "nowhere", "output"], ["there is no model at nowhere"]),
        (["report", "nowhere"], ["nowhere is not a run folder"]),
        (["cost", "--seq-len", "0"], ["seq_len is 0"]),
        (["cost", "--seq-len", "-5"], ["seq_len is -5"]),
        (["cost", "--layers", "0"], ["num_hidden_layers must be 1 to 1048576, got 0"]),
        (["cost", "--heads", "5"], ["hidden_size 768 is no multiple of 5 heads"]),
        (["cost", "--network", "fast"], ["'fast' is no network: write lan, wan, or a rate and a round trip"]),
        (["cost", "--budget", "2"], ["'2' is no budget: write bytes such as 2GB"]),
        (["cost", "--architecture", "./none/config.json"], ["there is no file or folder none/config.json"]),
        (["cost", "--architecture", "none.gguf"], ["there is no file or folder none.gguf"]),
        (["cost", "--architecture", "./none/of/these"], ["there is no file or folder none/of/these"]),
        (
            ["cost", "--softmax", "power-9"],
            [
                "--softmax must be quartic, power-1 to power-8 or polynomial-1 to polynomial-8 with or without /keys "
                "or a number such as /128, got 'power-9'"
            ],
        ),
        (["cost", "--prefix-tokens", "1", "--seq-len", "0"], ["seq_len is 0"]),
        (["cost", "--compare", "SM", "LSTM"], ["unknown architecture 'LSTM'"]),
        (["cost", "--calibration", "nowhere.json"], ["nowhere.json: No such file"]),
        (["cost", "--softmax", "exact"], ["--softmax exact has no private counterpart"]),
        (["cost", "--compare", "SM", "SM+R", "--budget", "2GB"], ["--compare and --budget exclude each other"]),
        (["cost", "--budget", "2GB", "--layers", "3"], ["--layers would be ignored: --budget searches"]),
        (["cost", "--budget", "2GB", "--picture", "x.png"], ["--picture has nothing to draw with --budget"]),
        (["cost", "--budget", "2GB", "--intermediate-size", "3"], ["--intermediate-size would be ignored: --budget"]),
        (["cost", "--intermediate-size", "0"], ["intermediate_size is 0, at least 1 is needed"]),
        (["cost", "--key-value-heads", "5"], ["12 heads are no multiple of 5 key-value heads"]),
        (["cost", "--record"], ["--record needs --architecture with one run folder"]),
        (
            ["cost", "--architecture", "LSTM"],
            ["unknown architecture 'LSTM': it begins with 'LSTM' ", "legal are SM, SM(t), Pow or Pow(t); "],
        ),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line(
    entropi: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
):
    monkeypatch.chdir(tmp_path)
    assert_refused(entropi(*words), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_parse", lambda given: (Command(lambda: 1 / 0, 0), {}))
    with pytest.raises(ZeroDivisionError):
        main(["cost"])


def test_a_reader_that_leaves_is_no_error():
    """As in `entropi cost | head -0`."""
    words = [sys.executable, "-m", "entropi", "cost"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_interrupted_elsewhere(entropi: Callable[..., Done], monkeypatch: pytest.MonkeyPatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", lambda given: (Command(interrupted, 0), {}))
    done = entropi("cost")
    assert (done.status, done.out, done.err) == (130, "", "entropi: interrupted\n")


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("matplotlib", ["diagnose", "model"], "report"),
        ("matplotlib", ["report", "run"], "report"),
        pytest.param("jinja2", ["report", "run"], "report", marks=pytest.mark.slow),
        ("jax", ["ask", "hello"], "private"),
        pytest.param("aiohttp", ["ask", "hello"], "private", marks=pytest.mark.slow),
        pytest.param("jax", ["serve", "model"], "private", marks=pytest.mark.slow),
        ("jax", ["demo"], "private"),
        pytest.param("matplotlib", ["demo"], "report", marks=pytest.mark.slow),
    ],
)
def test_a_missing_extra_is_named(missing: str, words: list[str], extra: str):
    if extra == "private" or words == ["demo"]:
        pytest.importorskip("spu")
    done = spawn(*words, code=f"import sys; sys.modules['{missing}'] = None")
    assert_refused(done, f"{missing} is not installed: pip install 'entropi[{extra}]'")


@pytest.mark.parametrize("words", [["ask", "hello"], ["demo"]], ids=" ".join)
def test_a_missing_engine_is_named(words: list[str]):
    """The engine runs in a process of its own, so that it is missed is asked of what is installed."""
    pytest.importorskip("jax")
    code = """
from importlib import metadata
version = metadata.version
def without_spu(name):
    if name == "spu":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without_spu
"""
    assert_refused(spawn(*words, code=code), "spu is not installed: pip install 'entropi[private]'")


@pytest.mark.parametrize(
    ("system", "machine", "python", "here", "mend"),
    [
        ("Linux", "x86_64", "3.12.1", "CPython 3.12 on Linux (x86_64)", "make an environment with Python 3.11"),
        ("Linux", "aarch64", "3.13.0", "CPython 3.13 on Linux (aarch64)", "make an environment with Python 3.11"),
        ("Darwin", "x86_64", "3.11.7", "CPython 3.11 on Darwin (x86_64)", "use such a machine and Python 3.11"),
        ("Windows", "AMD64", "3.10.0", "CPython 3.10 on Windows (AMD64)", "use such a machine and Python 3.11"),
    ],
)
@pytest.mark.parametrize(
    "words", [["serve", "model"], ["ask", "hello"], ["demo"], ["cost", "--calibrate", "prices.json"]], ids=" ".join
)
def test_where_the_engine_cannot_be_had_that_is_said(
    entropi: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    system: str,
    machine: str,
    python: str,
    here: str,
    mend: str,
):
    pytest.importorskip("jax")
    version = metadata.version

    def without_spu(name: str) -> str:
        if name == "spu":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metadata, "version", without_spu)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "python_version_tuple", lambda: tuple(python.split(".")))
    done = entropi(*words)
    assert_refused(done, "SPU, has wheels for CPython 3.10 and CPython 3.11", f"this is {here}: {mend}")
    assert list(tmp_path.iterdir()) == []


def test_the_extra_and_the_refusal_name_the_same_machines():
    """The marker of `spu` in pyproject.toml, evaluated for each machine, is true where nothing is refused."""
    tomllib = pytest.importorskip("tomllib")
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((SOURCES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (line,) = (line for line in project["optional-dependencies"]["private"] if line.startswith("spu"))
    marker = requirements.Requirement(line).marker
    names = {"Linux": "linux", "Darwin": "darwin"}
    for system, machine in common.ENGINE_MACHINES:
        for minor in range(10, 14):
            surroundings = {
                "python_version": f"3.{minor}",
                "sys_platform": names[system],
                "platform_machine": machine,
            }
            assert marker.evaluate(surroundings) == (f"CPython 3.{minor}" in common.ENGINE_PYTHONS)


def test_predictions_need_no_engine():
    """`entropi cost` traces with JAX alone."""
    pytest.importorskip("jax")
    done = spawn("cost", "--layers", "1", "--seq-len", "8", code="import sys; sys.modules['spu'] = None")
    assert (done.status, done.err) == (0, "")
    assert "bytes" in done.out or "MB" in done.out


def test_an_extra_that_does_not_load(entropi: Callable[..., Done], monkeypatch: pytest.MonkeyPatch):
    code = """
import sys, importlib.abc
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "matplotlib":
            raise ImportError("libpng.so:\\n cannot open")
sys.meta_path.insert(0, Broken())
"""
    assert_refused(spawn("report", "run", code=code), "libpng.so: cannot open", "entropi[report]")


HEAVY = ("torch", "jax", "transformers", "spu", "matplotlib", "accelerate", "aiohttp", "scipy")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh Python has loaded after `code`."""
    report = f"import sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_light():
    assert loaded_by("import entropi; dir(entropi); entropi.UserError, entropi.__version__") == set()


def test_the_parser_is_light():
    """It is built for every command, so whatever it loads, they all wait for."""
    assert loaded_by("from entropi.cli import build_parser; build_parser()") == set()


@pytest.mark.parametrize("module", ["entropi.records", "entropi.console", "entropi.training.recipe"])
def test_light_modules(module: str):
    assert loaded_by(f"import {module}") == set()


def test_the_client_loads_no_torch():
    pytest.importorskip("spu")
    assert not loaded_by("import entropi.private.sessions.client") & {"torch", "transformers", "spu"}
    words = "['ask', 'hello', '--server', '127.0.0.1:1']"
    loaded = loaded_by(f"from entropi.cli import main\nassert main({words}) == 2\nprint()")
    assert not loaded & {"torch", "transformers", "matplotlib"}


def test_the_report_loads_no_torch(trained: Path, tmp_path: Path):
    words = ["report", str(trained), "--output", str(tmp_path / "r.html")]
    loaded = loaded_by(f"from entropi.cli import main\nassert main({words!r}) == 0\nprint()")
    assert not loaded & {"torch", "transformers", "jax"}


@pytest.mark.slow
def test_training_loads_no_jax():
    assert not loaded_by("import entropi.training.run") & {"jax", "spu", "matplotlib", "aiohttp"}


def test_a_command_is_one_file(entropi: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Options, lists and help of a command come from its module alone."""
    (tmp_path / "greet.py").write_text(
        "from entropi.commands.common import Command, Words\n"
        "def run(names: list[str], loud: bool = False, times: int = 1) -> None:\n"
        '    """Greet somebody.\n\n    Args:\n'
        '        names: whom\n        loud: shout\n        times: how often\n    """\n'
        "    print(' '.join(times * names).upper() if loud else times * names)\n"
        "COMMAND = Command(run, place=99, words={'names': Words('NAME', positional=True)})\n"
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    found = commands.find_commands()
    assert list(found) == [*COMMANDS, "greet"]
    monkeypatch.setattr(cli, "COMMANDS", found)
    assert entropi("greet", "ann", "bo", "--loud", "--times", "2").out == "ANN BO ANN BO\n"
    assert "Greet somebody." in entropi("--help").out
    monkeypatch.delitem(sys.modules, "entropi.commands.greet")
