"""What MkDocs needs beside mkdocs.yml: files of the repository outside docs/, and pages made from the program itself.

Documents link to results, recipes, examples and scripts as they lie in the repository. All files of these kinds become
part of the site, at the same paths, and links to them are rewritten, so that every link works offline and a strict
build finds those that do not.
"""

from __future__ import annotations

import argparse
import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = (
    "*.md",
    "LICENSE",
    "benchmarks/*.py",
    "benchmarks/results/**/*.md",
    "configs/**/*.yaml",
    "deploy/*",
    "examples/*.py",
    "src/entropi/model/folding.py",
)
LINK = re.compile(r"(\]\()([^)#\s]*)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/, and a list of files for every folder among them."""
    folders: dict[str, set[str]] = {}
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith("README") or files.get_file_from_path(place) is not None:
                continue
            files.append(File.generated(config, place, abs_src_path=str(path)))
            while place:
                place, name = posixpath.split(place)
                folders.setdefault(place, set()).add(name)
    for folder, names in folders.items():
        if folder:
            listed = "\n".join(f"- [{name}]({name}{'' if '.' in name else '/index.md'})" for name in sorted(names))
            files.append(File.generated(config, f"{folder}/index.md", content=f"# {folder}\n\n{listed}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what the program knows, and rewrite links to files outside docs/."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    if "<!-- records -->" in markdown:
        markdown = markdown.replace("<!-- records -->", kinds_of_records())
    markdown = re.sub(r"^::: result of ([\w.]+)", lambda match: f"::: {home_of_result(match[1])}", markdown, flags=re.M)
    here = page.file.src_uri
    # A page that lies in docs/ is one folder deeper in the repository than on the site.
    repository_path = f"docs/{here}" if (ROOT / "docs" / here).exists() else here

    def rewritten(match: re.Match[str]) -> str:
        before, link, anchor, after = match[1], match[2], match[3] or "", match[4]
        if not link or "://" in link:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path), link))
        place = re.sub(r"^docs/", "", target)
        if target == "README.md":
            place = "index.md"
        elif (ROOT / target).is_dir():
            place = f"{place}/index.md"
        if files.get_file_from_path(place) is None:
            return match[0]  # MkDocs says what is wrong with it
        return f"{before}{posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor}{after}"

    return LINK.sub(rewritten, markdown)


def home_of_result(name: str) -> str:
    """Where the class of what a public function returns is defined, for example of `entropi.cost`."""
    parts = name.split(".")
    found: Any = import_module(parts[0])
    for part in parts[1:]:
        if not hasattr(found, part):
            import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    result = get_type_hints(getattr(found, "__wrapped__", found))["return"]
    result = (get_args(result) or (result,))[0]
    return f"{result.__module__}.{result.__qualname__}"


def kinds_of_records() -> str:
    """Every kind of record with its first sentence and its fields."""
    from entropi import records

    rows = []
    for kind in records.Base.__subclasses__():
        sentence = cell((kind.__doc__ or "").strip().partition("\n")[0])
        fields = ", ".join(f"`{name}`" for name in kind.__struct_fields__ if name != "version")
        rows.append(f"| `{kind.__struct_config__.tag}` | {sentence} | {fields} |")
    return "| kind | what | fields |\n|---|---|---|\n" + "\n".join(rows)


def commands() -> str:
    """Every command with its options, from the parser that reads them."""
    from entropi.cli import build_parser

    found = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    return "\n\n".join(command(name, parser) for name, parser in found.choices.items())


def command(name: str, parser: argparse.ArgumentParser) -> str:
    """One command: what it does, its arguments and its options."""
    rows = []
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):  # arguments come first
        if isinstance(action, argparse._HelpAction):
            continue
        options = ", ".join(f"`{option.replace('_', '-')}`" for option in action.option_strings)
        rows.append((options or f"`{action.dest.upper()}`", values(action), cell(action.help or "")))
    table = "\n".join(f"| {option} | {value} | {text} |" for option, value, text in rows)
    return f"## entropi {name}\n\n{parser.description}\n\n| option | value | |\n|---|---|---|\n{table}"


def values(action: argparse.Action) -> str:
    """What an option takes, and its default."""
    if action.nargs == 0:
        return "flag"
    kind = getattr(action, "_typehint", None) or action.type
    choices = [str(choice) for choice in choices_in(kind)] or [name_of(kind)]
    default = "" if action.default in (None, argparse.SUPPRESS, [], "") else f"; default `{action.default}`"
    return cell(" or ".join(f"`{choice}`" for choice in choices)) + default


def choices_in(kind: Any) -> list[Any]:
    """The values of a `Literal`, also of one that may be None."""
    found: list[Any] = []
    for part in get_args(kind):
        found += [part] if isinstance(part, str) else choices_in(part)
    return found


def name_of(kind: Any) -> str:
    """int, float, path or text."""
    names = [part for part in (get_args(kind) or (kind,)) if part not in (type(None), None)]
    known = {int: "integer", float: "number", str: "text", Path: "path"}
    return " or ".join(dict.fromkeys(known.get(one, "text") for one in names)) or "text"


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
