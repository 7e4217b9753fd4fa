"""What commands share: how one is declared, how it refuses a mistake early, ends on a signal and prints JSON."""

from __future__ import annotations

import json
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from entropi import record_files
from entropi.console import escaped_json
from entropi.errors import UserError
from entropi.model.convert import family_of

# What SPU 0.9.5 has wheels for, as the marker of the extra `private` in pyproject.toml says, too.
ENGINE_PYTHONS = ("CPython 3.10", "CPython 3.11")
ENGINE_MACHINES = (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))


@dataclass(frozen=True)
class Words:
    """An argument of a command that takes a list of words, or a positional one that may be left out."""

    metavar: str | None = None
    kind: type = str
    nargs: str = "+"
    positional: bool = False
    default: Any = None


@dataclass(frozen=True)
class Settings:
    """A dataclass whose fields are options of a command, and which arrives as one argument of it.

    `read` reads the file that `--config` names; without one, `kept` finds an earlier call's settings, so that they need
    not be typed again.
    """

    argument: str
    kind: type
    read: Callable[[Path], Any]
    kept: Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Command:
    """A command: a function whose signature is its options and whose docstring is its help.

    Args:
        function: what runs; flags are its boolean parameters.
        place: among the commands that `entropi --help` lists.
        words: those of its parameters that take lists, by name.
        settings: its parameter that is a whole dataclass, if there is one.
    """

    function: Callable[..., None]
    place: int
    words: Mapping[str, Words] = field(default_factory=dict)
    settings: Settings | None = None


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does: folded weights must not stay behind in a temporary folder."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is asked about signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a missing optional dependency into advice."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "entropi":
            raise
        raise UserError(f"{package} is not installed: pip install 'entropi[{name}]'") from None
    except ImportError as error:  # there, but it does not load
        reason = " ".join(str(error).split())
        raise UserError(f"{reason}; the extra has to be installed anew: pip install 'entropi[{name}]'") from None


@contextmanager
def secure_engine() -> Iterator[None]:
    """Turn missing parts of the extra `private` into advice that this machine and Python can follow.

    Raises:
        UserError: SPU is missing and has no wheel for them, so that installing the extra would not help; or as `extra`.
    """
    system, machine = platform.system(), platform.machine()
    python = platform.python_version_tuple()
    interpreter = f"{platform.python_implementation()} {python[0]}.{python[1]}"
    fits_machine = (system, machine) in ENGINE_MACHINES
    if not (fits_machine and interpreter in ENGINE_PYTHONS) and not _is_installed("spu"):
        mend = "make an environment with Python 3.11" if fits_machine else "use such a machine and Python 3.11"
        raise UserError(
            f"the secure engine, SPU, has wheels for {' and '.join(ENGINE_PYTHONS)} on Linux (x86-64, ARM) and macOS "
            f"14 (ARM) only, and this is {interpreter} on {system} ({machine}): {mend} and pip install "
            "'entropi[private]' there; everything but serve, ask, demo and cost --calibrate works here"
        )
    with extra("private"):
        yield


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def refuse_ignored_softmax(asked: str | None, own: str, whose: str) -> None:
    """Raise `UserError` if --softmax `asked` would be ignored, as the model `whose` is trained with another, `own`."""
    if asked is not None and own not in ("exact", asked):
        raise UserError(f"--softmax {asked} would be ignored: {whose} is trained with a softmax of its own, {own}")


def read_text(path: Path, what: str) -> str:
    """The content of a file that has to be UTF-8 text.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from None


def read_given(path: Path | None, what: str) -> str | None:
    """`read_text` of a file that may be left out; None then."""
    return None if path is None else read_text(path, what)


def drafter(draft: str) -> Any:
    """What `--draft` names: None for "off", "ngram", or a small model, which is opened.

    Raises:
        UserError: no such model, or one that cannot be opened.
    """
    from entropi.private.sessions.drafting import NGRAM, ModelDrafter, NgramDrafter

    if draft == "off":
        return None
    if draft == NGRAM:
        return NgramDrafter()
    path = Path(draft)
    if not path.exists():
        raise UserError(f"--draft is off, {NGRAM} or the folder of a model, and there is no folder {draft}")
    from entropi.model.reading import Reader
    from entropi.training.loading import open_reading

    model, tokenizer = open_reading(path)
    return ModelDrafter(Reader(model, tokenizer.get_vocab(), draft))


def check_parents(*paths: Path | None) -> None:
    """Refuse, before long work, files to write whose folders do not exist, or that are folders.

    Raises:
        UserError: names the first.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")


def refuse_unknown_families(model: Path) -> None:
    """Refuse a model of a family that can neither be opened nor converted, before anything slow is imported.

    Raises:
        UserError: names the families that can.
    """
    folder = model / "model" if (model / "model").is_dir() else model
    try:
        family = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # whoever opens it says what is wrong
    if family != "entropi":
        family_of(family)


def print_json(value: Any) -> None:
    """One line on standard output that no terminal is upset by."""
    print(as_json(value))


def as_json(value: Any) -> str:
    """One line of JSON that no terminal is upset by."""
    return escaped_json(record_files.encode(value).decode())
