"""Check that the kernels of different instruction sets share no symbol.

    python tools/isa_symbols.py build/native

The linker keeps one copy of a weak symbol (a template, an inline function). If it kept a copy that
was compiled for AVX-512, the portable code would stop with an illegal instruction on an older CPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LEVELS = ("avx2", "avx512", "avx512vnni", "amx")  # portable code runs on every CPU


def foreign_symbols(objects: list[Path], level: str) -> list[str]:
    """Return weak or global symbols that these objects define outside the namespace `level`."""
    done = subprocess.run(
        ["nm", "--defined-only", "--extern-only", *map(str, objects)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    names = re.findall(r"^[0-9a-f]* [A-Za-z] (\S+)$", done.stdout, re.M)
    inside = f"{len(level)}{level}"  # the namespace in a mangled name
    # DW.ref.* are pointers to libstdc++'s own functions, equal in every copy.
    return sorted({name for name in names if inside not in name and not name.startswith("DW.ref.")})


def main() -> None:
    """Check a build folder; exit with the names of symbols in the wrong namespace."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    objects_folder, found = Path(sys.argv[1]) / "CMakeFiles", 0
    if not (objects_folder / "kernels_portable.dir").exists():
        sys.exit(f"{sys.argv[1]} is not a build folder of sae_fast's kernels")
    for level in LEVELS:
        folder = objects_folder / f"kernels_{level}.dir"
        objects = sorted(folder.rglob("*.o"))
        found += len(objects)
        if foreign := foreign_symbols(objects, level) if objects else []:
            names = "\n  ".join(foreign)
            sys.exit(f"{folder.name} defines symbols outside namespace {level}:\n  {names}")
    print(f"{found} objects of {len(LEVELS)} instruction sets share no symbol")


if __name__ == "__main__":
    main()
