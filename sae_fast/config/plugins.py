"""Code outside of the package that registers architectures: a file, a module, an installed package.

A package that is installed names its architectures as entry points of the group
`sae_fast.architectures`: NAME = module, or module:class. It is imported when NAME is asked for.
Only a word of the user's command or code starts an import; a file that was saved never does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sae_fast.json_files import bounded
from sae_fast.own_code import place_of

GROUP = "sae_fast.architectures"


def load_plugin(reference: str) -> None:
    """Import a Python file, or a module by its name; raise ValueError, one line, where it fails."""
    path = Path(reference)
    if path.suffix != ".py" and not path.is_file():
        _attempt(f"plugin {reference}", lambda: importlib.import_module(reference))
        return
    if not path.is_file():
        raise ValueError(f"plugin {reference}: there is no such file")
    known = sys.modules.get(path.stem)
    if known is not None and _is_file_of(known, path):
        return
    if known is not None:
        raise ValueError(
            f"plugin {reference}: a module of the name {path.stem} is loaded already: rename it"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    loader = spec.loader
    try:
        _attempt(f"plugin {reference}", lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[path.stem]
        raise


def load_installed(name: str) -> bool:
    """Import the installed package that has an architecture of this name; return False for none.

    Raises ValueError, one line, where the import fails.
    """
    found = importlib.metadata.entry_points(group=GROUP, name=name)
    for entry in found:
        _attempt(f"{GROUP} {name} = {entry.value}", entry.load)
    return bool(found)


def _attempt(what: str, work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        reason = bounded(" ".join(str(error).split()))
        place = "" if isinstance(error, SyntaxError) else place_of(error)  # whose text has it
        raise ValueError(f"{what}: {type(error).__name__}: {reason}{place}") from error


def _is_file_of(module: ModuleType, path: Path) -> bool:
    return module.__file__ is not None and Path(module.__file__).resolve() == path.resolve()
