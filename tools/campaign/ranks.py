"""Kill one of several processes that train together, start all again, compare with a whole run.

Every try trains one of `CONFIGURATIONS`, and kills one process at a random moment. The others must
end with one line that names the killed one, or had made all steps. All are started again with
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
from math import prod
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from campaign.frame import Campaign, Ended, Failed, Try, leftovers, refusal, run_aside, success
from sae_fast import train
from sae_fast.activations import write_shard
from sae_fast.config.mesh import parsed_mesh
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
    "both": ("--mesh", "data=2,latents=2", "--shard-dir", "{shared}/shards/layer_0"),
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
    """Train by the processes of a mesh; return how each has ended.

    Args:
        name: of the configuration.
        shared: the folder of the shards.
        folder: the current directory of all.
        more: further flags.
        kill: which process is killed, and after how many seconds.
    """
    flags = [flag.format(shared=shared) for flag in (*CONFIGURATIONS[name], *_COMMON, *more)]
    size = _size(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> int:
        Path(f"process-{rank}").write_text(str(os.getpid()))
        place: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
        }
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True}  # which outlives every process
        os.environ.update({key: str(value) for key, value in place.items()})
        return train.main(flags)

    for rank in range(size):
        (folder / f"process-{rank}").unlink(missing_ok=True)
    store = os.fork()
    if store == 0:
        _kept = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        signal.pause()
    try:
        with ThreadPoolExecutor(size) as threads:
            running = [
                threads.submit(run_aside, partial(work, rank), folder=folder)
                for rank in range(size)
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
        kill = _moment(attempt.random, name, seconds) if kills < _MOST_KILLS else None
        resumes = ("--resume-from", "latest") if kills else ()
        ended = _train(name, attempt.shared, folder, *resumes, kill=kill)
        if kill is None or ended[kill[0]].signal != signal.SIGKILL:
            break
        kills += 1
        for line in _lines(ended, kill[0]):
            # Or it was killed before they had met.
            if f"rank {kill[0]} " not in line and "cannot be connected" not in line:
                raise Failed(f"{name}, rank {kill[0]} killed: {line}")
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


def _size(name: str) -> int:
    """Return how many processes a configuration has."""
    return prod(parsed_mesh(CONFIGURATIONS[name][1]).values())


def _lines(ended: list[Ended], killed: int) -> list[str]:
    """Return what the processes say that have not made all steps, one of them or each."""
    failed = [one for number, one in enumerate(ended) if number != killed and one.code != 0]
    telling = [one for one in failed if one.err.strip()]
    if failed and not telling:
        raise Failed(f"rank {killed} was killed, and none says so: {failed}")
    return [refusal(one) for one in telling]


def _moment(generator: random.Random, name: str, seconds: float) -> tuple[int, float]:
    """Return which process is killed, and when."""
    return generator.randrange(_size(name)), generator.uniform(0, seconds)


CAMPAIGN = Campaign(_attempt, 30, 1, _prepare, seconds=60.0, block=4)
