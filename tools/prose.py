"""Check the English of docstrings, comments and texts; `make lint` runs it.

A function's docstring starts with a verb in the imperative, "Return the …", so that it reads alone.
The verbs are in prose_verbs.txt, to which any other that says what a function does can be added.
Phrases that make readers guess are refused in docstrings, comments and texts. Exits with 1 and the
place of each finding.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = ("sae_fast", "tools", "benchmarks", "setup.py")
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs")
# Files and folders that are not rewritten yet, one a line; they become fewer.
EXEMPT = Path(__file__).with_name("prose_exempt.txt").read_text("utf-8").split()
VERBS = frozenset(Path(__file__).with_name("prose_verbs.txt").read_text("utf-8").split())
# Words with which a sentence is a riddle, and what they stand for in no text of ours.
RIDDLES = re.compile(
    r"\blikewise\b|\bnobody\b|\bwhoever\b|\beverybody\b|\bthe same of\b|\bto be had\b"
    r"|\bwhat (?:\w+ ){0,3}is to\b|\b[Tt]hat of\b|\b[Tt]hose of\b|\bgoes? on with\b",
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> int:
    """Print every finding; return the exit code."""
    findings = [*_in_python(), *_in_texts()]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def _in_python() -> Iterator[str]:
    for path in _files(PYTHON, "*.py"):
        source = path.read_text("utf-8")
        name = path.relative_to(ROOT)
        for line, text in _comments(source):
            yield from _riddles(f"{name}:{line}", text)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, DOCUMENTED):
                continue
            text = ast.get_docstring(node) or ""
            place = f"{name}:{getattr(node, 'lineno', 1)}"
            yield from _riddles(place, text)
            if isinstance(node, ast.Module | ast.ClassDef) or not text or _is_property(node):
                continue
            if (first := text.split()[0].rstrip(".,:;")) not in VERBS:
                yield f"{place}: {node.name}'s docstring starts with {first!r}, not with a verb"


def _in_texts() -> Iterator[str]:
    for path in _files(TEXTS, "*.md"):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            # What stands in backquotes is what a program prints or reads.
            yield from _riddles(f"{path.relative_to(ROOT)}:{number}", re.sub("`[^`]*`", "", line))


def _riddles(place: str, text: str) -> Iterator[str]:
    found = RIDDLES.findall(" ".join(text.split()))
    yield from (f"{place}: {phrase!r} makes readers guess" for phrase in found)


def _files(names: tuple[str, ...], pattern: str) -> Iterator[Path]:
    for name in names:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob(pattern)):
            if not any(_is_under(file.relative_to(ROOT), exempt) for exempt in EXEMPT):
                yield file


def _is_under(file: Path, exempt: str) -> bool:
    if exempt.endswith("/*.py"):
        return file.parent == Path(exempt).parent
    return file.is_relative_to(exempt)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any("property" in name or name.endswith(".setter") for name in names)


if __name__ == "__main__":
    sys.exit(main())
