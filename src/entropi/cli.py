"""The command line: a parser made from the signatures and docstrings of the commands, and what their errors become."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, Namespace

from entropi import __version__, commands
from entropi.console import without_controls
from entropi.errors import UserError
from entropi.training.recipe import Recipe, load_recipe, recipe_of_run

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": commands.demo,
    "train": commands.train,
    "evaluate": commands.evaluate,
    "diagnose": commands.diagnose_heads,
    "cost": commands.cost_of,
    "fold": commands.fold_model,
    "serve": commands.serve,
    "ask": commands.ask,
    "certificates": commands.certificates,
    "study": commands.study,
    "report": commands.report,
}


class _Parser(ArgumentParser):
    """Options are written with dashes, as everywhere; an error is one line and status 2."""

    def format_help(self) -> str:
        text = re.sub(r"--[a-z_]+", lambda match: match[0].replace("_", "-"), super().format_help())
        return re.sub(r"<class\s+'Path'>", "Path", text)  # with a line break in it, as the help is wrapped

    def error(self, message: str, ex: Exception | None = None) -> Any:
        command = self.prog.replace(" [options]", "")
        text = " ".join(message.split())
        if match := re.search(r"arguments are required: (\w+)\.(\w+)", text):  # the parser of all commands says so
            command = f"{command} {match[1]}"
            text = f"{match[2].upper()} is missing"
        text = re.sub(r"--\w+", lambda match: match[0].replace("_", "-"), text)
        text = re.sub(r"Parser key \"(\w+)\": ", r"\1: ", text)
        # An option that may be left out says so at length, and what it may be otherwise in the same words.
        text = re.sub(r"Does not validate .*? Errors: - (Expected .*?) - .* Given value:", r"\1. Got value:", text)
        text = re.sub(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])\. Got value:", _expectation, text)
        raise UserError(f"{text} (see {command} --help)")


def _expectation(match: re.Match[str]) -> str:
    return f"expected {match[1] or 'one of ' + match[2]}, got"


def build_parser(recipe: Recipe | None = None) -> ArgumentParser:
    """The parser of all commands, made from their signatures and docstrings; `recipe` holds `train`'s defaults."""
    parser = _Parser(
        prog="entropi",
        description="Language models with few nonlinear operations, run in private.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"entropi {__version__}")
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, function in COMMANDS.items():
        doc = parse_docstring(function.__doc__ or "")
        helps = {p.arg_name: p.description for p in doc.params}
        command = _Parser(description=doc.short_description)
        skipped = set()
        for flag, kind in function.__annotations__.items():
            if kind not in (bool, "bool"):  # these are flags, where jsonargparse would want "true"
                continue
            skipped.add(flag)
            command.add_argument(f"--{flag}", action="store_true", help=helps[flag])
        if function is commands.report:
            skipped.add("runs")
            command.add_argument("runs", nargs="+", type=Path, help=helps["runs"])
        if function is commands.cost_of:
            skipped |= {"compare", "runs"}
            command.add_argument("--compare", nargs="+", metavar="MODEL", help=helps["compare"])
            command.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help=helps["runs"])
        if function is commands.certificates:
            for option in ("server", "client", "revoke"):
                skipped.add(option)
                command.add_argument(f"--{option}", nargs="+", default=[], metavar="NAME", help=helps[option])
        if function is commands.ask:
            skipped |= {"prompt", "stop"}
            command.add_argument("prompt", nargs="?", help=helps["prompt"])
            command.add_argument("--stop", nargs="+", metavar="TOKEN", help=helps["stop"])
        if function is commands.train:
            skipped.add("recipe")
            command.add_argument("--config", type=str, help="YAML file of a recipe; options override it")
        command.add_function_arguments(function, as_group=False, as_positional=True, skip=skipped)
        if function is commands.train:
            command.add_class_arguments(Recipe, as_group=False)
            if recipe is not None:
                command.set_defaults(dataclasses.asdict(recipe))
        subcommands.add_subcommand(name, command, help=doc.short_description)
    return parser


def _arguments(function: Callable[..., None], given: Namespace) -> dict[str, Any]:
    """Parsed values as the arguments of a command."""
    values = {k: v for k, v in given.as_dict().items() if k != "config"}
    if function is commands.train:
        own = {name: values.pop(name) for name in ("run", "report_to", "shard", "prepare_only")}
        return {**own, "recipe": Recipe(**values)}
    return values


def main(arguments: list[str] | None = None) -> int:
    """Run a command; status 0, 1 after a failure of ours, 2 after a mistake of the user's, 130 when interrupted."""
    given = _with_underscores(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 are printed as they are
    try:
        if not given:
            raise UserError(f"a command is missing: one of {', '.join(COMMANDS)} (see entropi --help)")
        recipe = _recipe_file(given)
        parsed = build_parser(recipe).parse_args(given)
        if parsed.command == "train" and recipe is None and (own := recipe_of_run(parsed.train.run)) is not None:
            parsed = build_parser(own).parse_args(given)  # a run goes on with its own settings
        function = COMMANDS[parsed.command]
        function(**_arguments(function, parsed[parsed.command]))
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


def _recipe_file(words: list[str]) -> Recipe | None:
    """The recipe that `train --config` names, read here because its mistakes are then told all at once."""
    found = None
    if words[0] == "train":
        for word, following in zip(words, [*words[1:], "--"]):
            if word == "--":
                break
            if word.startswith("--config="):
                found = word.partition("=")[2]
            elif word == "--config" and not following.startswith("--"):
                found = following
    return load_recipe(Path(found)) if found else None
