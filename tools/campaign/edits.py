"""Replace every value of a checkpoint's trainer.json by every kind of value, and resume.

A value may also be left out. The edited file is signed, so that its digest does not show the edit.

The random edits of `checkpoints` would need many thousand tries to combine every value with every
kind. Here the number of a try selects the value and the kind, so that the long form has all pairs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign import checkpoints
from campaign.frame import Campaign, Try

_VARIANT = "gated"  # its run has --amp fp16, so that the state of the loss scaler is in use
# Raw JSON texts; the empty one leaves the value out.
_KINDS = (
    *("null", "true", "-1", "0.5", "1e308", "9" * 400, '"x"', "[]", "{}", "[null]", "[1, 2]"),
    *('[["a", 1]]', '{"a": 1}', ""),
)
_MARK = "@@value@@"


def prepare(shared: Path) -> None:
    """Make the shards and a run, and write the list of pairs (value, kind) in random order."""
    checkpoints.prepare(shared)
    (shared / _VARIANT).mkdir()
    checkpoints.finish_run(shared / _VARIANT, _VARIANT)
    _, state = checkpoints.newest_state(shared / _VARIANT / "run")
    names = [name for _, _, name in checkpoints.places(state)]
    # The settings are read like a configuration file, which `checkpoints` edits.
    names = [name for name in names if not name.startswith("config.")]
    pairs = [(name, kind) for name in names for kind in _KINDS]
    random.Random(0).shuffle(pairs)  # the short form is a sample
    (shared / "pairs.json").write_text(json.dumps(pairs))


def attempt(this: Try) -> str:
    """Make the edit with this try's number and resume; return the outcome."""
    pairs = json.loads((this.shared / "pairs.json").read_text())
    name, kind = pairs[this.number % len(pairs)]
    run = checkpoints.copied(this, checkpoints.finished_run(this, _VARIANT) / "run")
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


CAMPAIGN = Campaign(attempt, tries=1100, short=3, prepare=prepare, seconds=30)
