"""Imports inside sae_fast have no circles, and each layer imports only from lower layers."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import sae_fast

PACKAGE = Path(sae_fast.__file__).parent
# From the lowest layer up. A module imports from its own layer and from the layers before it.
LAYERS = (
    (
        *("import_errors", "json_files", "tensor_files", "text_links"),
        *(
            "atomic_files",
            "directory_lock",
            "memory",
            "output_streams",
            "progress_bar",
            "command_errors",
        ),
    ),
    ("config",),
    ("ops",),
    ("activations",),
    ("autoencoder",),
    ("evaluation",),
    ("report",),
    ("training",),
    ("ground_truth",),
    ("train", "capture", "convert_shards", "plot", "info", "presets", "biographies", "swap"),
    ("__main__", "completion"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FACES = {name: path for name, path in FILES.items() if path.name == "__init__.py"}
# Some packages hold code beside their public names.
FACADES = {name for name, path in FACES.items() if "def " not in path.read_text("utf-8")}


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Return module and name of each import of sae_fast, except for type checking."""
    left: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
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


def home(module: str, name: str) -> str:
    """Return the module that defines a name, through packages that re-export it."""
    if f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    if module in FACADES:
        for inner, known in imports_of(FACES[module]):
            if known == name:
                return home(inner, name)
    return module


def graph() -> dict[str, set[str]]:
    """Return the modules that each module imports; packages that only re-export are left out."""
    found: dict[str, set[str]] = {}
    for name, path in FILES.items():
        if name in FACADES or name == "sae_fast":
            continue
        homes = {home(module, known) for module, known in imports_of(path)}
        found[name] = (homes & FILES.keys()) - {name, "sae_fast"}
    return found


def test_no_circle_of_imports():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
    else:
        circle = ""
    assert circle == ""


def test_imports_point_from_a_layer_to_those_below():
    upward = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if LAYER[other.split(".")[1]] > LAYER[name.split(".")[1]]
    ]
    assert upward == []


def test_every_module_is_in_a_layer():
    names = {name.split(".")[1] for name in FILES if "." in name}
    assert names - {"_reference_install"} == LAYER.keys()
