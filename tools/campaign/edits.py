"""Give each value of a checkpoint's trainer.json each kind of value, or leave it out, and resume.

The edited file is signed, so that its sum does not tell of the edit.

Edits by chance, which `checkpoints` makes, need many thousand tries before each value has met each
kind. Here the number of a try says which value and which kind, so that the long form has all.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign import checkpoints
from campaign.frame import Campaign, Try

_VARIANT = "gated"  # by --amp fp16, so that the state of the loss scaler is in use
# As raw JSON text; the empty one leaves the value out.
_KINDS = (
    *("null", "true", "-1", "0.5", "1e308", "9" * 400, '"x"', "[]", "{}", "[null]", "[1, 2]"),
    *('[["a", 1]]', '{"a": 1}', ""),
)
_MARK = "@@value@@"


def prepare(shared: Path) -> None:
    """Make the shards and a run, and list what is edited in which order."""
    checkpoints.prepare(shared, (_VARIANT,))
    _, state = checkpoints.newest_state(shared / _VARIANT)
    names = [name for _, _, name in checkpoints.places(state)]
    # The settings are read as a configuration file is, which `checkpoints` edits.
    names = [name for name in names if not name.startswith("config.")]
    pairs = [(name, kind) for name in names for kind in _KINDS]
    random.Random(0).shuffle(pairs)  # the short form is a sample
    (shared / "pairs.json").write_text(json.dumps(pairs))


def attempt(this: Try) -> str:
    """Make the edit that has this number."""
    pairs = json.loads((this.shared / "pairs.json").read_text())
    name, kind = pairs[this.number % len(pairs)]
    run = checkpoints.copied(this, _VARIANT)
    path, state = checkpoints.newest_state(run)
    (place,) = [place for place in checkpoints.places(state) if place[2] == name]
    holder, key, _ = place
    if kind:
        holder[key] = _MARK
    else:
        del holder[key]
    text = json.dumps(state).replace(f'"{_MARK}"', kind)
    checkpoints.write_signed(path, text)
    exact = not name.startswith(checkpoints.FREE_EDITS)
    return checkpoints.resumed(this, _VARIANT, run, f"{name} = {kind[:60]}", exact=exact)


CAMPAIGN = Campaign(attempt, tries=1100, short=16, prepare=prepare, seconds=30)
