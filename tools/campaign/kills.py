"""Kill trainings at a call that changes a file, resume them, and compare them with whole runs.

Every try trains one of `CONFIGURATIONS` in a forked child. The library made of kills.c counts the
child's calls that change files and kills it at one of them, before the call or in the middle of a
write. The command with `--resume-from latest` must then end with the files of the undisturbed run,
to the bit, and with no others; only values that depend on the clock may differ. Some tries kill the
resumed run too. Some raise SIGINT or SIGTERM instead, after which the run must end at a step with
the documented code.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from campaign.frame import Campaign, Ended, Failed, Try, leftovers, run_aside, success

_FOLDER = "SAE_FAST_CAMPAIGN_KILLS"  # variable with the library's folder until it is loaded


def _preload() -> ctypes.CDLL:
    """Start this program again with the library preloaded; there, return the library."""
    folder = os.environ.pop(_FOLDER, None)
    if folder is None:
        folder = tempfile.mkdtemp(prefix="campaign-kills-")
        library = Path(folder, "kills.so")
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        variables = {**os.environ, "LD_PRELOAD": str(library), _FOLDER: folder}
        os.execve(sys.executable, sys.orig_argv, variables)
    del os.environ["LD_PRELOAD"]
    shutil.rmtree(folder)
    return ctypes.CDLL(None)


if "campaign" not in sys.orig_argv[1].split(os.sep):
    raise ImportError("this campaign starts its program again: use python tools/campaign kills")
LIBRARY = _preload()

import torch  # noqa: E402
import transformers.models.gpt2.modeling_gpt2  # noqa: E402, F401

from sae_fast import train  # noqa: E402
from sae_fast.activations import write_shard  # noqa: E402
from sae_fast.training import run_directory  # noqa: E402

sys.path.append(str(Path(__file__).parents[2] / "python_tests"))
from small_models import save_model  # type: ignore[import-not-found]  # noqa: E402
from small_texts import make_texts  # type: ignore[import-not-found]  # noqa: E402

# Plotting takes longer than these trainings.
setattr(run_directory, "plot_run", lambda rows, path, title: path)  # noqa: B010

_COMMON = (
    *("--d-sae", "16", "--batch-size", "32", "--max-steps", "6", "--lr", "1e-2"),
    *("--pool-rows", "96", "--log-every", "1", "--eval-every", "3", "--checkpoint-every", "2"),
    *("--keep-checkpoints", "2", "--num-threads", "1", "--checkpoint-dir", "run"),
)
_SHARDS = ("--shard-dir", "{shared}/shards", *_COMMON)
_MODEL = (
    *("{shared}/gpt2", "{shared}/texts.jsonl", "--layers", "0", "1", "--ctx_len", "16"),
    *("--batch_size", "2", "--max_tokens", "192", "--heldout_tokens", "60", "--pool-rows", "90"),
    *("--k", "2", "--expansion_factor", "1", "--save_every", "2", "--log_every", "1"),
    *("--eval_every", "3", "--keep-checkpoints", "2", "--num_threads", "1", "--lr", "1e-2"),
    *("--save_dir", ".", "--run_name", "run"),
)


@dataclass(frozen=True)
class Configuration:
    """A training: its flags, and whether the file system supports links."""

    flags: tuple[str, ...]
    has_links: bool = True


def _on_shards(*flags: str, has_links: bool = True) -> Configuration:
    return Configuration((*_SHARDS, *flags), has_links)


CONFIGURATIONS = {
    "topk": _on_shards("--k", "2"),
    "topk without links": _on_shards("--k", "2", has_links=False),
    "best at every step": _on_shards("--k", "2", "--eval-every", "1", "--keep-checkpoints", "1"),
    "no held-out rows": Configuration(
        ("--shard-dir", "{shared}/labelled", *_COMMON, "--k", "2", "--eval-every", "1")
    ),
    "batch_topk 8 bit": _on_shards(
        "--arch", "batch_topk", "--k", "2", "--optimizer-states", "8bit"
    ),
    "matryoshka average": _on_shards(
        *("--arch", "matryoshka", "--k", "2", "--matryoshka-prefixes", "4", "16"),
        *("--average-decay", "0.5", "--eval-every", "1"),
    ),
    "relu controlled": _on_shards(
        *("--arch", "relu", "--target-l0", "4", "--sparsity-warmup-steps", "2"),
        *("--eval-every", "1", "--optimizer-states", "bf16"),
    ),
    "jumprelu signum": _on_shards(
        *("--arch", "jumprelu", "--target-l0", "4", "--optimizer", "signum"),
    ),
    "gated schedule free": _on_shards(
        *("--arch", "gated", "--target-l0", "4", "--optimizer", "schedule_free_signum"),
    ),
    "accumulated bf16": _on_shards("--k", "2", "--grad-acc-steps", "2", "--amp", "bf16"),
    "annealed fp16 dense": _on_shards(
        *("--k", "2", "--k-anneal-start", "8", "--k-anneal-steps", "3", "--amp", "fp16"),
        *("--no-fused", "--optimizer", "sgd"),
    ),
    "mix": Configuration(
        ("--mix", "{shared}/shards:0.7", "{shared}/labelled:0.3", *_COMMON, "--k=2")
    ),
    "probe and temporal": Configuration(
        (
            *("--shard-dir", "{shared}/labelled", *_COMMON, "--k", "2"),
            *("--probe-loss-coeff", "0.5", "--probe-labels", "labels/rule"),
            *("--temporal-smoothness-coeff", "0.1"),
        )
    ),
    "sweep": _on_shards("--sweep", "{shared}/sweep.json"),
    "sweep of architectures": _on_shards(
        *("--sweep", "{shared}/architectures.json", "--eval-every", "1", "--keep-checkpoints", "1"),
    ),
    "from a model": Configuration(_MODEL),
}

# Values that depend on the clock, and the digest over them.
_TIMES = {
    *("tokens_per_second", "time_per_step_ms", "reader_stall_fraction", "seconds"),
    *("stalled_seconds", "scanned_at", "digest", "resume_from"),
}
_SIGNALS = {signal.SIGINT: 0, signal.SIGTERM: 128 + signal.SIGTERM}


def _prepare(shared: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("shards", "labelled"):
        (shared / name).mkdir()
        for part in ("train_00", "train_01", *(["heldout_00"] if name == "shards" else [])):
            write_shard(
                shared / name / f"{part}.h5",
                torch.randn(100, 8, generator=generator),
                labels={"rule": torch.arange(100) % 3 - 1},
                position=torch.arange(100) % 20,
            )
    (shared / "sweep.json").write_text('{"k": [1, 2], "seed": [0, 1]}')
    architectures = [
        {"name": "topk", "k": 2},
        {"name": "relu", "arch": "relu", "target_l0": 4},
        {"name": "batch", "arch": "batch_topk", "k": 2},
    ]
    (shared / "architectures.json").write_text(json.dumps(architectures))
    save_model(shared / "gpt2", "gpt2")
    lines = [json.dumps({"text": text}) for text in make_texts(60)]
    (shared / "texts.jsonl").write_text("\n".join(lines))


def _train(
    configuration: Configuration,
    shared: Path,
    folder: Path,
    *more: str,
    call: int = 0,
    number: int = signal.SIGKILL,
    half: bool = False,
) -> Ended:
    """Train in a child that gets the signal `number` at the given call.

    With call 0 it gets none, and the number of calls is written to the file `calls`. `more` are
    further flags of the command.
    """
    flags = [flag.format(shared=shared) for flag in configuration.flags]

    def work() -> int:
        if not configuration.has_links:
            os.symlink = _refuse_link
        LIBRARY.kills_arm(ctypes.c_long(call), int(number), int(half))
        code = train.main([*flags, *more])
        if call == 0:
            Path("calls").write_text(str(LIBRARY.kills_count()))
        return code

    return run_aside(work, folder=folder)


def _refuse_link(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def _undisturbed(attempt: Try, name: str) -> Path:
    """Return the folder of a configuration's whole run, with the number of its calls."""
    configuration = CONFIGURATIONS[name]
    return attempt.made(name, lambda folder: success(_train(configuration, attempt.shared, folder)))


def _attempt(attempt: Try) -> str:
    names = list(CONFIGURATIONS)
    name = names[attempt.number % len(names)]
    count = int((_undisturbed(attempt, name) / "calls").read_text())
    call = attempt.random.randint(1, count)
    go = partial(_train, CONFIGURATIONS[name], attempt.shared, attempt.folder)
    if attempt.random.random() < 0.2:
        number = attempt.random.choice(list(_SIGNALS))
        return f"{_signalled(attempt, go, call, number)}: {name}"
    ended = go(call=call, half=attempt.random.random() < 0.5)
    kills = 0
    while ended.signal == signal.SIGKILL and not ended.hung:
        kills += 1
        again = attempt.random.randint(1, count) if attempt.random.random() < 0.3 else 0
        ended = go("--resume-from", "latest", call=again, half=attempt.random.random() < 0.5)
    try:
        success(ended)
        # Libraries write files of their own, so the number of calls differs slightly between runs.
        if kills == 0 and call < 0.9 * count:
            raise Failed(f"call {call} of {count} was not reached")
        _compare(_undisturbed(attempt, name) / "run", attempt.folder / "run")
        leftovers(attempt.folder)
    except Failed as failure:
        raise Failed(f"{name}, killed {kills} times, first at call {call}: {failure}") from None
    return f"{('not killed', 'killed once')[kills] if kills < 2 else 'killed again'}: {name}"


def _signalled(attempt: Try, go: Callable[..., Ended], call: int, number: signal.Signals) -> str:
    """Raise a signal at a call, resume and compare; return the outcome.

    The stopped run has written one more checkpoint, so only the latest checkpoints are compared.
    """
    ended = go(call=call, number=number)
    if ended.code != _SIGNALS[number] or "Traceback" in ended.err:
        raise Failed(f"{number.name} at call {call}: {ended}")
    resumed = go("--resume-from", "latest")
    name = list(CONFIGURATIONS)[attempt.number % len(CONFIGURATIONS)]
    try:
        success(resumed)
        undisturbed = _undisturbed(attempt, name) / "run"
        _compare(undisturbed, attempt.folder / "run", checkpoints=False)
        leftovers(attempt.folder)
    except Failed as failure:
        raise Failed(f"{name}, {number.name} at call {call}: {failure}") from None
    return f"stopped by {number.name}"


def _compare(expected: Path, found: Path, *, checkpoints: bool = True) -> None:
    """Raise Failed if two runs differ; without `checkpoints` only the latest is compared."""
    is_compared = _is_any if checkpoints else _is_latest
    there = {name for name in _names(expected) if is_compared(expected, name)}
    here = {name for name in _names(found) if is_compared(found, name)}
    if there != here:
        raise Failed(f"missing {sorted(there - here)}, too many {sorted(here - there)}")
    for name in sorted(there):
        one, other = expected / name, found / name
        if one.is_symlink():
            if os.readlink(one) != os.readlink(other):
                raise Failed(f"{name} names {os.readlink(other)}, not {os.readlink(one)}")
        elif one.is_file() and _content(one) != _content(other):
            raise Failed(f"{name} differs{_first_difference(_content(one), _content(other))}")


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder))


def _is_any(folder: Path, name: str) -> bool:
    return True


def _is_latest(folder: Path, name: str) -> bool:
    """Return whether a file is outside the checkpoints, or in the checkpoint of the last step."""
    parts = Path(name).parts
    if "checkpoints" not in parts or parts[-1] == "checkpoints":
        return True
    first = parts[parts.index("checkpoints") + 1]
    if first in ("latest", "best"):
        return True
    parent = folder.joinpath(*parts[: parts.index("checkpoints") + 1])
    return first == max(path.name for path in parent.glob("step-*"))


def _content(path: Path) -> Any:
    """Return the content of a file, without values that depend on the clock."""
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    if path.suffix == ".html":
        return None  # drawn from the other files, with the seconds of the run
    if path.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _first_difference(one: Any, other: Any) -> str:
    """Return the place of the first difference between two JSON values, with both values there."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(str(key), one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(one, other, strict=True))]
    else:
        return "" if isinstance(one, bytes) else f": {one!r:.200} and {other!r:.200}"
    place, one, other = next(pair for pair in pairs if pair[1] != pair[2])
    return f", {place}{_first_difference(one, other)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        names = [name for name in value if name.removeprefix("final_") not in _TIMES]
        return {name: _plain(value[name]) for name in names}
    return [_plain(item) for item in value] if isinstance(value, list) else value


CAMPAIGN = Campaign(_attempt, tries=1000, short=4, prepare=_prepare, seconds=60.0, block=50)
