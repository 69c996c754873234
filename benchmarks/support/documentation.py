"""English text found on every machine: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 40  # least number of characters in a documentation string that is used
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_WITH_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)


@functools.cache
def documentation_strings() -> tuple[str, ...]:
    """Return the standard library's documentation strings, file by file, each once."""
    found: dict[str, None] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _OTHERS & set(path.relative_to(library).parts):
            found.update(dict.fromkeys(_strings_in(path)))
    return tuple(found)


def write_documentation(path: Path) -> int:
    """Write the documentation strings to a JSONL file, in the column text; return their number."""
    texts = documentation_strings()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return len(texts)


def _strings_in(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some modules contain outdated escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in _statements(tree):
        if isinstance(node, _DOCUMENTED):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= SHORTEST:
                yield text


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a tree's nodes without expressions, which are most of it and hold no docstrings."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        waiting.extend(
            child for child in ast.iter_child_nodes(node) if isinstance(child, _WITH_STATEMENTS)
        )
        yield node
