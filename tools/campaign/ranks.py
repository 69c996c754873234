"""Kill one of two processes that train together, start both again, and compare with a whole run.

Every try trains one of `CONFIGURATIONS`, and kills one process at a random moment. The other must
end with one line that names the killed one, or had made all steps. Both are started again with
`--resume-from latest`, sometimes killed again, and must end with the models of the undisturbed run,
to the bit.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from campaign.frame import Campaign, Ended, Failed, Try, leftovers, refusal, run_aside, success
from sae_fast import train
from sae_fast.activations import write_shard
from sae_fast.training import run_directory

# Plotting takes longer than these trainings.
setattr(run_directory, "plot_run", lambda rows, path, title: path)  # noqa: B010

_COMMON = (
    *("--d-sae", "16", "--k", "2", "--batch-size", "16", "--max-steps", "40", "--lr", "1e-2"),
    *("--checkpoint-every", "5", "--keep-checkpoints", "1", "--eval-every", "0", "--quiet"),
    *("--num-threads", "1", "--checkpoint-dir", "run", "--mesh-timeout", "1"),
)
CONFIGURATIONS = {
    "data": ("--mesh", "data=2", "--shard-dir", "{shared}/shards/layer_0"),
    "latents": ("--mesh", "latents=2", "--shard-dir", "{shared}/shards/layer_0"),
    "layers": ("--mesh", "layers=2", "--shard-dir", "{shared}/shards"),
}
_MOST_KILLS = 3


def _prepare(shared: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        (shared / "shards" / f"layer_{number}").mkdir(parents=True)
        place = shared / "shards" / f"layer_{number}" / "train.h5"
        write_shard(place, torch.randn(100, 8, generator=generator))


def _train(
    name: str, shared: Path, folder: Path, *more: str, kill: tuple[int, float] | None = None
) -> list[Ended]:
    """Train by two processes; return how each has ended.

    Args:
        name: of the configuration.
        shared: the folder of the shards.
        folder: the current directory of both.
        more: further flags.
        kill: which process is killed, and after how many seconds.
    """
    flags = [flag.format(shared=shared) for flag in (*CONFIGURATIONS[name], *_COMMON, *more)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> int:
        Path(f"process-{rank}").write_text(str(os.getpid()))
        place: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
        }
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True}  # which outlives every process
        os.environ.update({key: str(value) for key, value in place.items()})
        return train.main(flags)

    for rank in range(2):
        (folder / f"process-{rank}").unlink(missing_ok=True)
    store = os.fork()
    if store == 0:
        _kept = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        signal.pause()
    try:
        with ThreadPoolExecutor(2) as threads:
            running = [
                threads.submit(run_aside, partial(work, rank), folder=folder) for rank in range(2)
            ]
            if kill is not None:
                time.sleep(kill[1])
                with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                    os.kill(int((folder / f"process-{kill[0]}").read_text()), signal.SIGKILL)
            return [future.result() for future in running]
    finally:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)


def _attempt(attempt: Try) -> str:
    names = list(CONFIGURATIONS)
    name = names[attempt.number % len(names)]
    whole, folder = attempt.folder / "whole", attempt.folder / "killed"
    whole.mkdir()
    folder.mkdir()
    begin = time.monotonic()
    for one in _train(name, attempt.shared, whole):
        success(one)
    seconds = time.monotonic() - begin
    kills = 0
    while True:
        kill = _moment(attempt.random, seconds) if kills < _MOST_KILLS else None
        resumes = ("--resume-from", "latest") if kills else ()
        ended = _train(name, attempt.shared, folder, *resumes, kill=kill)
        if kill is None or ended[kill[0]].signal != signal.SIGKILL:
            break
        kills += 1
        other = ended[1 - kill[0]]
        if other.code != 0:
            line = refusal(other)
            # Or it was killed before they had met.
            if f"rank {kill[0]} " not in line and "cannot be connected" not in line:
                raise Failed(f"{name}, rank {kill[0]} killed: {other}")
        if attempt.random.random() < 0.5:
            kills = _MOST_KILLS  # no more
    for one in ended:
        success(one)
    models = sorted(whole.glob("run/**/checkpoints/latest/sae.safetensors"))
    if len(models) != (2 if name == "layers" else 1):
        raise Failed(f"{name}: the undisturbed run left {len(models)} models")
    for model in models:
        found = folder / model.relative_to(whole)
        if found.read_bytes() != model.read_bytes():
            raise Failed(f"{name}: {model.relative_to(whole)} differs")
    leftovers(attempt.folder, (".run.lock",))
    return f"{'not killed' if kills == 0 else 'killed'}: {name}"


def _moment(generator: random.Random, seconds: float) -> tuple[int, float]:
    """Return which process is killed, and when."""
    return generator.randrange(2), generator.uniform(0, seconds)


CAMPAIGN = Campaign(_attempt, 30, 1, _prepare, seconds=60.0, block=3)
