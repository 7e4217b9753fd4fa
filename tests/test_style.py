"""What CONTRIBUTING.md says of the style and a linter does not hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from command_line import SOURCES

MOST_LINES = 60


def lengths(source: str) -> Iterator[tuple[str, int]]:
    """Every function's name and lines of code: without signature, docstring, comments and blank lines."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
            body = lines[statements[0].lineno - 1 : node.end_lineno] if statements else []
            yield node.name, sum(not line.strip().startswith("#") for line in body if line.strip())


def test_lengths_are_counted_without_signature_docstring_and_comments():
    source = '''
async def one(
    first,
):
    """Of two lines,

    and one more."""
    # why
    first += 1

    def two(): return 0
    return first
'''
    assert dict(lengths(source)) == {"one": 3, "two": 1}


def test_functions_are_short():
    files = sorted((SOURCES / "entropi").rglob("*.py"))
    assert len(files) > 100
    long = [
        f"{path.relative_to(SOURCES)}: {name} has {count} lines"
        for path in files
        for name, count in lengths(path.read_text(encoding="utf-8"))
        if count > MOST_LINES
    ]
    assert not long, f"functions of more than {MOST_LINES} lines: {'; '.join(long)}"
