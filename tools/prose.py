"""Check the English of docstrings, comments of Python and C++, messages and texts, for `make lint`.

A function's docstring starts with a verb in the imperative, such as "Return", so that it can be
understood alone; prose_verbs.txt lists the verbs and can be extended. Other docstrings and comments
do not begin with a question word ("What a shard holds"), except "Whether" in a property. Phrases
that make readers guess and words for persons are refused in all of them, and in the strings of the
package: errors, log lines and the texts of settings. The exit code is 1 if there are findings; each
is printed with its place.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = ("sae_fast", "tools", "benchmarks", "setup.py", "python_tests")
CPP = ("*.h", "*.cpp", "*.cu", "*.cuh")  # in csrc
TEXTS = {
    **dict.fromkeys(("README.md", "CONTRIBUTING.md", "CHANGELOG.md"), "*.md"),
    **{"docs": "*.md", "benchmarks": "*.md", "cmake": "*.cmake"},
    **dict.fromkeys(("CMakeLists.txt", "Makefile"), "*"),
    **{f"benchmarks/{name}.sh": "*" for name in ("first_light", "gpu", "gpu_parts")},
}
VERBS = frozenset(Path(__file__).with_name("prose_verbs.txt").read_text("utf-8").split())
PERSONS = r"\b(?:nobody|whoever|whomever|(?:some|every|any)(?:body|one(?! of))|contestants?)\b"
RIDDLES = (
    r"\blikewise\b",
    r"\bthe same of\b",
    r"\bto be had\b",
    r"\bwhat (?:\w+ ){0,3}is to\b",
    r"\b(?:[Tt]hat|[Tt]hose) of\b",
    r"\bof which there (?:is|are) no\b",
    r"\b(?:[Bb]y|[Ff]or|[Oo]f|[Ww]ith|[Aa]fter) so many\b",
    r"\bfrom which on\b",
    r"\bgo(?:es|ing)? on with\b",
    r"\bfor want of\b",
    r"\b(?:tells?|comes) of\b",
    r"\banother than\b",
    r"(?<!many\s)(?<!much\s)\bas are\b",
    r"\b[Ss]o are (?:the|its|their|those|all)\b",
    r"\b(?:would|may|might|could|as) else\b",
    r"(?:^|(?<=[.;:]\s))(?:Were|Had) (?:the|an?|it|there|they)\b",
    # Left by rewrites: a second sentence within the first, and a word twice.
    r"\bReturn\b[^.;:]*\bReturn\b",
    r"\b(?P<twice>the|of|to|is|in|and|that|a|for|with) (?P=twice)\b(?![\[(])",
)
# A phrase may be broken over lines.
PHRASES = re.compile("|".join([PERSONS, *RIDDLES]).replace(" ", r"\s+"))
QUESTIONS = re.compile(r"(?:What|Whether|How|Which|Who)\b|Where\b[^,]*?(?:\.\s|\.?$)")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> int:
    """Print every finding; return the exit code."""
    findings: list[str] = []
    for path in _files(dict.fromkeys(PYTHON, "*.py")):
        findings += in_python(_name(path), path.read_text("utf-8"))
    for path in [path for kind in CPP for path in _files({"csrc": kind})]:
        findings += in_cpp(_name(path), path.read_text("utf-8"))
    for path in _files(TEXTS):
        findings += in_text(_name(path), path.read_text("utf-8"))
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def in_python(name: str, source: str) -> Iterator[str]:
    """Yield the findings in Python code; a test's docstring may state the fact that it tests."""
    for line, text in _comments(source):
        yield from _phrases(f"{name}:{line}", text)
        yield from _question(f"{name}:{line}", "comment", text)
    tree = ast.parse(source)
    if name.startswith("sae_fast/"):
        for line, text in _messages(tree):
            yield from _phrases(f"{name}:{line}", text)
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED) or not (text := ast.get_docstring(node) or ""):
            continue
        place = f"{name}:{getattr(node, 'lineno', 1)}"
        yield from _phrases(place, text)
        if not isinstance(node, FUNCTIONS) or _is_property(node):
            yield from _question(place, "docstring", _without_whether(node, text))
        elif node.name.startswith("test_"):
            continue
        elif (first := text.split()[0].rstrip(".,:;")) not in VERBS:
            yield f"{place}: {node.name}'s docstring starts with {first!r}, not with a verb"


def in_cpp(name: str, source: str) -> Iterator[str]:
    """Yield the findings in the comments of C++ or CUDA code."""
    lines = []
    for number, line in enumerate(source.splitlines(), 1):
        code, slashes, text = line.partition("//")
        if slashes and code.count('"') % 2 == 0:
            lines.append((number, not code.strip(), text.strip()))
    for number, text in _blocks(lines):
        yield from _phrases(f"{name}:{number}", text)
        yield from _question(f"{name}:{number}", "comment", text)


def in_text(name: str, text: str) -> Iterator[str]:
    """Yield the phrases in a text that make readers guess, with the lines they begin in.

    Text in backquotes is left out, because a program prints or reads it.
    """
    text = re.sub(r"`[^`\n]*`", lambda quoted: "`" * len(quoted[0]), text)
    for match in PHRASES.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield from _phrases(f"{name}:{line}", match[0])


def _phrases(place: str, text: str) -> Iterator[str]:
    for match in PHRASES.finditer(text):
        yield f"{place}: {' '.join(match[0].split())!r} makes readers guess"


def _messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string that is no docstring; an expression in one is a blank."""
    seen: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) and node.body:
            seen.update(map(id, ast.iter_child_nodes(node.body[0])))
        if isinstance(node, ast.JoinedStr):
            seen.update(map(id, node.values))
            parts = [part.value if isinstance(part, ast.Constant) else " " for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in seen
        ):
            yield node.lineno, node.value


def _question(place: str, kind: str, text: str) -> Iterator[str]:
    if match := QUESTIONS.match(text):
        yield f"{place}: the {kind} starts with {match[0].split()[0]!r} and makes readers guess"


def _files(patterns: dict[str, str]) -> Iterator[Path]:
    for name, pattern in patterns.items():
        path = ROOT / name
        yield from [path] if path.is_file() else sorted(path.rglob(pattern))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _comments(source: str) -> Iterator[tuple[int, str]]:
    yield from _blocks(_comment_lines(source))


def _blocks(comments: Iterable[tuple[int, bool, str]]) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment, with comments on successive lines as one text.

    Args:
        comments: the line of each, whether it has the line to itself, and its text.
    """
    block: list[str] = []
    begin = end = -1
    for line, is_alone, text in comments:
        if not (is_alone and line == end + 1):
            yield from _joined(begin, block)
            begin, block = line, []
        block.append(text)
        end = line if is_alone else -1
    yield from _joined(begin, block)


def _comment_lines(source: str) -> Iterator[tuple[int, bool, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_alone = token.line.lstrip().startswith("#")
            yield token.start[0], is_alone, token.string.lstrip("#").strip()


def _joined(line: int, block: Iterable[str]) -> Iterator[tuple[int, str]]:
    if text := " ".join(block):
        yield line, text


def _without_whether(node: ast.AST, text: str) -> str:
    return text.removeprefix("Whether") if isinstance(node, FUNCTIONS) else text


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any("property" in name or name.endswith(".setter") for name in names)


if __name__ == "__main__":
    sys.exit(main())
