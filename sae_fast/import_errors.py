"""Failure of `import sae_fast`: an ImportError, or one line where one of its commands runs."""

import importlib.util
import os
import sys
from typing import NoReturn


def refuse(error: ImportError) -> NoReturn:
    """Raise the error, or in a command of sae_fast print it in a line and exit with code 2."""
    if not _is_own_command():
        raise error
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def require_torch() -> None:
    """Refuse the import in a Python without torch, such as the one outside a checkout's .venv."""
    if importlib.util.find_spec("torch") is None:
        refuse(
            ImportError(
                f"sae_fast needs torch, which {sys.executable} does not have: run `pip install "
                "torch`, or in a checkout `make build` and then .venv/bin/python"
            )
        )


def _is_own_command() -> bool:
    arguments = sys.orig_argv
    if os.path.basename(sys.argv[0]) == "sae-fast":  # the console script
        return True
    places = [place for place, word in enumerate(arguments[:-1]) if word == "-m"]
    return bool(places) and arguments[places[0] + 1].partition(".")[0] == "sae_fast"
