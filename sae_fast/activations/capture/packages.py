"""Packages that only some captures need: importing them, or saying how to install them."""

from __future__ import annotations

import importlib
from typing import Any

# Remedies where a package of a further extra is missing, by the name that is imported.
_EXTRAS = {
    "PIL": "needs pillow: install it (pip install 'sae_fast[images]')",
    "accelerate": "needs accelerate: install it (pip install 'sae_fast[devices]')",
    "bitsandbytes": "needs bitsandbytes: install it (pip install 'sae_fast[quantized]')",
}


def capture_package(name: str) -> Any:
    """Import transformers or datasets; raise ValueError saying how to install them."""
    return _imported(name, f"capturing needs {name}: install it (pip install 'sae_fast[capture]')")


def extra_package(name: str, purpose: str) -> Any:
    """Import a package of a further extra; raise ValueError saying how to install it.

    Args:
        name: by which it is imported, one of the keys of _EXTRAS.
        purpose: what needs it, the subject of the error.
    """
    return _imported(name, f"{purpose} {_EXTRAS[name]}")


def _imported(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(remedy) from error
