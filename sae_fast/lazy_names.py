"""Names of a package that are imported from their modules when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package (PEP 562).

    Args:
        package: the name of the package.
        homes: the names that each module of the package defines, by the module's name.
    """
    home = {name: module for module, names in homes.items() for name in names}
    own = sys.modules[package].__dict__

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        own[name] = getattr(importlib.import_module(home[name]), name)
        return own[name]

    def names() -> list[str]:
        return sorted({*home, *(name for name in own if name.startswith("__"))})

    return get, names
