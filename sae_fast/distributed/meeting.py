"""A common name for the processes of one start, found in the store of a launcher.

After a failure torchrun starts all processes again, and the store may still have what those before
have written, the addresses of dead processes among it. So each process writes a new word of its
own; rank 0 lists the words that it finds, and the list is the common name of the processes once
each of them has confirmed its own word in it.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_PAUSE = 0.02  # seconds


def common_name(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that the processes of this start have in common, and no others before them.

    Raises RuntimeError where a process does not come within the time.
    """
    own = uuid.uuid4().hex
    store.set(f"word/{rank}", own)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            words = [store.get(f"word/{number}").decode() for number in range(size)]
            name = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
            store.set("words", json.dumps(words))
            if store.check([f"{name}/{number}" for number in range(1, size)]):
                store.set(f"{name}/all", "")
                return name
        elif store.check(["words"]):
            text = store.get("words")
            name = hashlib.sha256(text).hexdigest()[:16]
            if own in json.loads(text):
                store.set(f"{name}/{rank}", "")
                if store.check([f"{name}/all"]):
                    return name
        time.sleep(_PAUSE)
    raise RuntimeError(f"not all of {size} processes came within {timeout}")
