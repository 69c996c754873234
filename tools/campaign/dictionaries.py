"""Read damaged and hostile dictionaries of all other libraries.

Every try damages one file of a dictionary that the library's own code has made, or the sizes and
names in its settings, and converts it. It must end soon, in a limited address space, with one line
of error, or with a dictionary that gives the codes written with it.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

from campaign.damage import SIZES, damage
from campaign.frame import Campaign, Failed, Try, leftovers, refusal, run_here, success
from sae_fast import convert, verify
from sae_fast.autoencoder import expected_codes, exporting  # noqa: F401  (not by every try)
from sae_fast.config import SAEConfig

ADDRESS_SPACE = 3 << 30  # more than before the try
LEAK = 77
FOREIGN = Path(__file__).resolve().parents[2] / "python_tests" / "interop" / "foreign"
EXPECTED = "expected.safetensors"
DICTIONARIES = sorted(path.parent for path in FOREIGN.rglob(EXPECTED))
SAEConfig()  # finds the types of its fields, which is slow and is kept
STRANGE: tuple[Any, ...] = (*SIZES, True, 1.5, "x", "", None, [], {}, [1], "layer_norm", "../x")


def attempt(this: Try) -> str:
    """Convert one damaged dictionary; return its format and the outcome."""
    good = this.random.choice(DICTIONARIES)
    source = this.folder / good.relative_to(FOREIGN)
    shutil.copytree(good, source)
    (source / EXPECTED).unlink()
    files = sorted(path for path in source.rglob("*") if path.is_file())
    target = this.random.choice(files)
    if target.suffix == ".json" and this.random.random() < 0.6:
        _change_setting(this, target)
    elif this.random.random() < 0.1:
        target.write_bytes(this.random.choice(files).read_bytes())
    else:
        content = bytearray(target.read_bytes())
        damage(this.random, content)
        target.write_bytes(bytes(content))
    lone = [path for path in files if path.suffix in (".pt", ".pth") and path.name != "ae.pt"]
    out = this.folder / "out"
    arguments = [str(lone[0] if lone else source), str(out)]
    ended = run_here(lambda: _converted(arguments), folder=this.folder, address_space=ADDRESS_SPACE)
    leftovers(this.folder)
    label = good.relative_to(FOREIGN).parts[0]
    if ended.code == LEAK:
        raise Failed(f"descriptors stay open, {ended}")
    if ended.code == 0:
        success(ended)
        return f"{label}: converted"
    refusal(ended)
    return f"{label}: refused"


def _change_setting(this: Try, path: Path) -> None:
    """Give a setting, or one in a section, a strange value, another name, or none."""
    content = json.loads(path.read_text())
    section = content
    while True:
        name = this.random.choice(sorted(section))
        if not isinstance(section[name], dict) or not section[name]:
            break
        section = section[name]
    value = section.pop(name)
    kind = this.random.choice(("value", "value", "name", "none"))
    if kind == "value":
        section[name] = this.random.choice(STRANGE)
    elif kind == "name":
        section[f"{name}_"] = value
    path.write_text(json.dumps(content))


def _converted(arguments: list[str]) -> int:
    before = len(os.listdir("/proc/self/fd"))
    code = convert.main(arguments)
    if code == 0:
        code = verify.main(arguments[1:])
    gc.collect()
    return LEAK if len(os.listdir("/proc/self/fd")) > before else code


CAMPAIGN = Campaign(attempt, tries=10_000, short=60)
