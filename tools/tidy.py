"""Run clang-tidy on changed C++ sources: `python tools/tidy.py [--base main] [--all]`.

It checks the sources that differ from a branch; a changed header is checked in the sources that
include it. build/native must hold a configured build.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "native"


def compiled_sources(build: Path) -> list[Path]:
    """Return the C++ sources of a configured build, each once."""
    commands = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    files = dict.fromkeys(Path(command["file"]) for command in commands)
    return [path for path in files if path.suffix == ".cpp"]


def included(source: Path, root: Path) -> set[Path]:
    """Return a source and all files of root/csrc that it includes, directly or not."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), flags=re.M)
            places = [root / "csrc" / name for name in names]
            waiting += [place for place in places if place.exists()]
    return found


def changed_since(base: str) -> set[Path]:
    """Return the files that differ from the last commit shared with a branch."""
    line = ["git", "diff", "--name-only", "--diff-filter=d", "--merge-base", base, "--", "csrc"]
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    return {ROOT / name for name in done.stdout.splitlines()}


def main() -> int:
    """Check the sources; return 1 where clang-tidy found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="main", help="branch to compare with")
    parser.add_argument("--all", action="store_true", help="check every source")
    options = parser.parse_args()
    sources = compiled_sources(BUILD)
    if not options.all:
        changed = changed_since(options.base)
        sources = [source for source in sources if included(source, ROOT) & changed]
    print(f"clang-tidy: {len(sources)} sources", flush=True)
    failed = [
        source
        for source in sources
        if subprocess.run(["clang-tidy", "-p", BUILD, "--quiet", source], cwd=ROOT).returncode
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
