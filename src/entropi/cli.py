"""The command line: a parser made from the signatures and docstrings of the commands, and what their errors become."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from docstring_parser import Docstring
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from entropi import __version__
from entropi.commands import COMMANDS
from entropi.commands.common import Command
from entropi.console import without_controls
from entropi.errors import UserError


class _Parser(ArgumentParser):
    """Options are written with dashes, as everywhere; an error is one line and status 2."""

    def format_help(self) -> str:
        text = re.sub(r"--[a-z_]+", lambda match: match[0].replace("_", "-"), super().format_help())
        return re.sub(r"<class\s+'Path'>", "Path", text)  # with a line break in it, as the help is wrapped

    def error(self, message: str, ex: Exception | None = None) -> Any:
        command = self.prog.replace(" [options]", "")
        text = " ".join(message.split())
        if match := re.search(r"unrecognized arguments:.* ?--(exp_iterations|polynomial)\b", text):
            option = match[1].replace("_", "-")
            text = f"--{option} is part of --softmax now, such as --softmax power-2 or --softmax polynomial-1"
        if match := re.search(r"arguments are required: (\w+)\.(\w+)", text):  # the parser of all commands says so
            command = f"{command} {match[1]}"
            text = f"{match[2].upper()} is missing"
        text = re.sub(r"--\w+", lambda match: match[0].replace("_", "-"), text)
        text = re.sub(r"Parser key \"(\w+)\": ", r"\1: ", text)
        # An option that may be left out says so at length, and what it may be otherwise in the same words.
        text = re.sub(r"Does not validate .*? Errors: - (Expected .*?) - .* Given value:", r"\1. Got value:", text)
        text = re.sub(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])\. Got value:", _expectation, text)
        text = re.sub(r"^(\w+): expected float, got (-?(?:nan|inf)\b)", _not_finite, text, flags=re.IGNORECASE)
        raise UserError(f"{text} (see {command} --help)")


def _expectation(match: re.Match[str]) -> str:
    return f"expected {match[1] or 'one of ' + match[2]}, got"


def _not_finite(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')}: expected a finite number, got {match[2]}"


def build_parser(only: str | None = None, defaults: Any = None) -> ArgumentParser:
    """The parser of all commands, made from their signatures, docstrings and declarations.

    With `only` the others have no arguments: making these takes longer than reading a command line. `defaults` are
    settings that take the place of their dataclass's own.
    """
    parser = _Parser(
        prog="entropi",
        description="Language models with few nonlinear operations, run in private.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"entropi {__version__}")
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        doc = parse_docstring(command.function.__doc__ or "")
        parser_of_command = _Parser(description=doc.short_description)
        if only in (None, name):
            _add_arguments(parser_of_command, command, doc, defaults)
        subcommands.add_subcommand(name, parser_of_command, help=doc.short_description)
        usage = f"entropi {name} {_usage(parser_of_command)}[options]"
        parser_of_command.prog, parser_of_command.usage = f"entropi {name}", usage
    return parser


def _usage(parser: ArgumentParser) -> str:
    """The arguments of a command that are no options, as its line of usage shows them."""
    positional = [action for action in parser._actions if not action.option_strings and action.nargs != 0]
    marks = {"?": "[{}] ", "+": "{} [{} ...] "}
    return "".join(marks.get(str(action.nargs), "{} ").replace("{}", action.dest.upper()) for action in positional)


def _add_arguments(parser: ArgumentParser, command: Command, doc: Docstring, defaults: Any) -> None:
    helps = {p.arg_name: p.description for p in doc.params}
    declared = set(command.words)

    for flag, kind in command.function.__annotations__.items():
        if kind in (bool, "bool"):  # jsonargparse would want "true"
            declared.add(flag)
            parser.add_argument(f"--{flag}", action="store_true", help=helps[flag])
    for name, words in command.words.items():
        flag = name if words.positional else f"--{name}"
        more = {} if words.metavar is None else {"metavar": words.metavar}
        default = {} if words.positional and words.nargs == "+" else {"default": words.default}
        parser.add_argument(flag, nargs=words.nargs, type=words.kind, help=helps[name], **more, **default)

    settings = command.settings
    if settings is not None:
        declared.add(settings.argument)
        parser.add_argument("--config", type=str, help="YAML file of settings; options override it")
    parser.add_function_arguments(command.function, as_group=False, as_positional=True, skip=declared)
    if settings is not None:
        parser.add_class_arguments(settings.kind, as_group=False)
        if defaults is not None:
            parser.set_defaults(dataclasses.asdict(defaults))


def _parse(given: list[str]) -> tuple[Command, dict[str, Any]]:
    """The command that was called, and the values of its arguments."""
    named, called = _settings_file(given), next((word for word in given if word in COMMANDS), given[0])
    parsed = build_parser(called, named).parse_args(given)
    command, values = COMMANDS[parsed.command], parsed[parsed.command].as_dict()
    settings = command.settings
    if settings is None:
        return command, values

    if named is None and (kept := settings.kept(values)) is not None:
        values = build_parser(called, kept).parse_args(given)[parsed.command].as_dict()
    fields = {field.name: values.pop(field.name) for field in dataclasses.fields(settings.kind)}
    del values["config"]
    return command, {**values, settings.argument: settings.kind(**fields)}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; status 0, 1 after a failure of ours, 2 after a mistake of the user's, 130 when interrupted."""
    given = _with_underscores(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 are printed as they are
    try:
        if not given:
            raise UserError(f"a command is missing: one of {', '.join(COMMANDS)} (see entropi --help)")
        command, values = _parse(given)
        command.function(**values)
        sys.stdout.flush()
    except UserError as error:
        print(f"entropi: {without_controls(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("; ".join(["entropi: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush, of the interpreter
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(without_controls(f"entropi: {error.filename}: {error.strerror}"), file=sys.stderr)
        return 2
    return 0


def _with_underscores(words: list[str]) -> list[str]:
    """`--max-new-tokens` as Python spells it; what follows a lone `--` is no option."""
    options = words[: words.index("--")] if "--" in words else words
    spelt = []
    for word in options:
        name, equals, value = word.partition("=")
        spelt.append("--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word)
    return spelt + words[len(options) :]


def _settings_file(words: list[str]) -> Any:
    """The settings that `--config` names, read here because their mistakes are then told all at once."""
    command = COMMANDS.get(words[0])
    if command is None or command.settings is None:
        return None
    found = None
    for word, following in zip(words, [*words[1:], "--"]):
        if word == "--":
            break
        if word.startswith("--config="):
            found = word.partition("=")[2]
        elif word == "--config" and not following.startswith("--"):
            found = following
    return command.settings.read(Path(found)) if found else None
