"""Measure how far a reader has to walk through the code, and print each number beside its goal.

`python tools/acceptance.py` ends with exit code 1 if a number misses its goal; with `--places` it
prints what each number counts. docs/development/layout.md describes the layout behind them.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sae_fast"

# Code that asks objects of other libraries for attributes that only some of them have.
FOREIGN = {
    "activations/capture/": "models and tokenizers of transformers, data sets",
    "activations/imports/arrow_files.py": "columns of pyarrow",
    "ops/row_factors.py": "parameters of torch",
    "output_streams.py": "streams of Python",
}
FEWEST_NAMES = 3  # of settings, in a table
FLAG = ("--shard-dir", "DIR", "--k", "64", "--checkpoint-dir", "RUN")
MAP = {  # in the README: what a newcomer looks for, and words of the code that is it
    "the loop": "while not (self.is_done",
    "the loss": "def batch_loss",
    "the update": "weight_decay",
}


class Measure(NamedTuple):
    """A number, the goal for it, and the places that it counts."""

    name: str
    value: int
    goal: int
    places: list[str]
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the number meets its goal."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        word = "ok  " if self.is_met else "MISS"
        return f"{word}  {self.value:>4}  {bound:>8} {self.goal:>3}  {self.name}"


def main() -> int:
    """Print every measure; return the exit code."""
    sys.path.insert(0, str(ROOT))  # before an installed package
    measures = [measure() for measure in MEASURES]
    for one in measures:
        print(one)
        if "--places" in sys.argv or not one.is_met:
            print("".join(f"      {place}\n" for place in one.places), end="")
    return 0 if all(one.is_met for one in measures) else 1


def circles() -> Measure:
    """Count the circles of imports; the first one found hides others."""
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        places = [" -> ".join(reversed(error.args[1]))]
    else:
        places = []
    return Measure("circles of imports", len(places), 0, places)


def guessed_attributes() -> Measure:
    """Count calls of `getattr` with a default on objects of our own types."""
    places = []
    for path, tree in _trees():
        name = _name(path)
        if not any(name.startswith(place) for place in FOREIGN):
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            places += [f"{name}:{call.lineno}" for call in calls if _is_guess(call)]
    return Measure("getattr with a default on our own types", len(places), 0, places)


def tables_of_settings() -> Measure:
    """Count tuples, lists, sets and dictionaries of setting names outside the declarations."""
    from sae_fast.config import SAEConfig, TrainConfig
    from sae_fast.config.fields import field_names
    from sae_fast.config.model_text import CaptureConfig, FromModelConfig

    configs = (SAEConfig, TrainConfig, CaptureConfig, FromModelConfig)
    settings = {name for config in configs for name in field_names(config)}
    places = []
    for path, tree in _trees():
        if "config" not in path.relative_to(PACKAGE).parts[:1]:
            for node in ast.walk(tree):
                names = _strings(node)
                if len(names) >= FEWEST_NAMES and settings.issuperset(names):
                    assert isinstance(node, ast.expr)
                    places.append(f"{_name(path)}:{node.lineno}: {', '.join(names)}")
    return Measure("tables of setting names as strings", len(places), 0, places)


def verbs() -> Measure:
    """Return the percentage of functions' docstrings that begin with a verb."""
    import prose

    n_functions, places = 0, []
    for path, tree in _trees():
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, prose.FUNCTIONS) else None
            if text and isinstance(node, prose.FUNCTIONS) and not prose._is_property(node):
                n_functions += 1
                if text.split()[0].rstrip(".,:;") not in prose.VERBS:
                    places.append(f"{_name(path)}:{node.lineno}: {node.name}")
    share = 100 - -(-100 * len(places) // max(n_functions, 1))
    return Measure("percent of docstrings begin with a verb", share, 80, places, at_least=True)


def files_of_a_flag() -> Measure:
    """Count the files whose functions run between a flag and the configuration that holds it."""
    from sae_fast.train import parse_arguments

    files = _files_that_run(lambda: parse_arguments(FLAG))
    return Measure("files that a flag passes", len(files), 12, sorted(files))


def map_of_the_readme() -> Measure:
    """Count the loop, the loss and the update that no link in the README's map leads to."""
    text = (ROOT / "README.md").read_text("utf-8").partition("## Where to look")[2]
    links = re.findall(r"\]\(([\w/.]+)\)", text.partition("\n## ")[0])
    code = [(ROOT / link).read_text("utf-8") for link in links if (ROOT / link).is_file()]
    places = [what for what, words in MAP.items() if not any(words in one for one in code)]
    return Measure("of loop, loss and update not linked in the README", len(places), 0, places)


MEASURES: tuple[Callable[[], Measure], ...] = (
    circles,
    guessed_attributes,
    tables_of_settings,
    verbs,
    files_of_a_flag,
    map_of_the_readme,
)


def import_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports; packages that only re-export are left out."""
    files = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        if name != "sae_fast" and not _only_reexports(path):
            homes = {_home(module, known, files) for module, known in imports_of(path)}
            graph[name] = (homes & files.keys()) - {name, "sae_fast"}
    return graph


def module_name(path: Path) -> str:
    """Return the name by which a file of the package is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of each import, except for type checking."""
    left: list[ast.AST] = [_tree(path)]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            left += node.orelse
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def _home(module: str, name: str, files: dict[str, Path]) -> str:
    """Return the module that defines a name, through packages that re-export it."""
    if f"{module}.{name}" in files:
        return f"{module}.{name}"
    if module in files and _only_reexports(files[module]):
        # A package may import them for type checking only, and load them when first asked for.
        for node in ast.walk(_tree(files[module])):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if name in (alias.name for alias in node.names):
                return _home(node.module, name, files)
    return module


def _only_reexports(path: Path) -> bool:
    return path.name == "__init__.py" and "def " not in path.read_text("utf-8")


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, _tree(path)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _is_guess(call: ast.Call) -> bool:
    is_getattr = ast.unparse(call.func) == "getattr"
    return is_getattr and len(call.args) == 3 and isinstance(call.args[1], ast.Constant)


def _strings(node: ast.AST) -> list[str]:
    """Return the elements of a literal, or the keys of a dictionary, if all are strings."""
    elements: list[Any] = []
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        for item in node.elts:
            inner = item.value if isinstance(item, ast.Starred) else item
            elements += inner.elts if isinstance(inner, ast.Tuple | ast.List) else [inner]
    elif isinstance(node, ast.Dict):
        elements = list(node.keys)
    values = [item.value for item in elements if isinstance(item, ast.Constant)]
    names = [value for value in values if isinstance(value, str)]
    return names if len(names) == len(elements) else []


def _files_that_run(call: Callable[[], object]) -> set[str]:
    """Return the files of the package with a function that a call runs."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>":
            files.add(code.co_filename)

    call()  # imports what it needs
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    inside = {_name(Path(name)) for name in files if Path(name).is_relative_to(PACKAGE)}
    assert inside, "another copy of the package was imported"
    return inside


if __name__ == "__main__":
    sys.exit(main())
