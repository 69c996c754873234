"""English text that is on every machine: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 40  # characters of a documentation string that is taken
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_WITH_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)


def documentation_strings() -> list[str]:
    """All of them, file by file, each once."""
    found: dict[str, None] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _OTHERS & set(path.relative_to(library).parts):
            found.update(dict.fromkeys(_strings_in(path)))
    return list(found)


def write_documentation(path: Path) -> int:
    """Write them as a JSONL file with the column text; gives how many there are."""
    texts = documentation_strings()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return len(texts)


def _strings_in(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in some modules
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in _statements(tree):
        if isinstance(node, _DOCUMENTED):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= SHORTEST:
                yield text


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As ast.walk, but not into expressions, which are most of a tree and document nothing."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        waiting.extend(
            child for child in ast.iter_child_nodes(node) if isinstance(child, _WITH_STATEMENTS)
        )
        yield node
