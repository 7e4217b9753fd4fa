"""The commands, one module each, by their names on the command line.

A module of this package that has a `COMMAND` is one: to add a command, add its module. The module declares the
function, whose signature and docstring are the command's options and help, and what the signature cannot say.

Commands import what they need when they run, so that `entropi ask` loads no torch. The parser would undo that in two
ways, which is why no module here has an `if TYPE_CHECKING` (the parser executes it) and no command's function is named
like a public name of the package, such as `fold` (the parser looks its functions up there, which imports their homes):
all are called `run`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from entropi.commands.common import Command


def find_commands() -> dict[str, Command]:
    """The commands of this package by name, in the order of the help."""
    found: dict[str, Command] = {}
    for module in pkgutil.iter_modules(__path__):
        command = getattr(import_module(f"{__name__}.{module.name}"), "COMMAND", None)
        if command is not None:
            found[module.name] = command
    return dict(sorted(found.items(), key=lambda item: item[1].place))


COMMANDS = find_commands()
