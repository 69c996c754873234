"""Train small dictionaries with two revisions and report every result that is not bit-equal.

    python tools/compare_losses.py BASE HEAD          two revisions of git
    python tools/compare_losses.py BASE               BASE and the working tree
    python tools/compare_losses.py BASE --only topk   one of the trainings; --list names them

It shows that a refactor changes no result: it takes 20 steps of every architecture, of transcoders,
a sweep, a resumed run, 8-bit states, 16-bit arithmetic and the optional losses, on fixed rows.
Losses, metrics, weights and the state of the optimizer must be bit-equal; the exit code is 1 if
any of them differs.

Both revisions use the packages of the Python that runs this. Each revision is checked out below
`--folder` and its kernels are compiled there; revisions with equal kernel sources share one build,
which is kept for the next comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS, ROWS, WIDTH, TARGET_WIDTH = 20, 2048, 24, 12
# The sources of a build. Its name is a hash of them and of the version of torch.
NATIVE = ("csrc", "cmake", "CMakeLists.txt", "setup.py", "tools/build_backend.py")
CLOCK = {"tokens_per_second", "time_per_step_ms", "reader_stall_fraction"}
SHOWN = 10  # most differences printed for one training

COMMON = (
    *("--shard-dir", "shards", "--d-sae", "96", "--batch-size", "64", "--max-steps", str(STEPS)),
    *("--lr", "1e-2", "--decay-fraction", "0.4", "--log-every", "1", "--eval-every", "10"),
    *("--checkpoint-every", "10"),
    *("--num-threads", "1", "--pool-rows", "512", "--dead-after-tokens", "256", "--no-wandb"),
)
OTHER_FALL = ("--decay-fraction", "0.2")  # of optimisers other than Adam
TRAININGS: dict[str, tuple[str, ...]] = {
    "topk": ("--k", "4"),
    "topk, all terms": (
        *("--k", "4", "--multi-topk", "--multi-topk-coeff", "0.125", "--l1-penalty-coeff", "0.01"),
        *("--decorrelation-coeff", "0.1", "--temporal-smoothness-coeff", "0.1"),
    ),
    "groupmax": ("--k", "4", "--activation", "groupmax"),
    "batch_topk": ("--arch", "batch_topk", "--k", "4"),
    "matryoshka": ("--arch", "matryoshka", "--k", "4", "--matryoshka-prefixes", "24", "48", "96"),
    "relu": ("--arch", "relu"),
    "relu, controlled": ("--arch", "relu", "--target-l0", "6", "--sparsity-warmup-steps", "5"),
    "jumprelu": ("--arch", "jumprelu"),
    "jumprelu, controlled": ("--arch", "jumprelu", "--target-l0", "6"),
    "gated": ("--arch", "gated"),
    "transcoder": ("--k", "4", "--transcoder", "--target-key", "targets"),
    "transcoder, skip": (
        *("--k", "4", "--transcoder", "--target-key", "targets", "--skip-connection"),
    ),
    "normalized": ("--k", "4", "--normalize-activations", "mean_scale"),
    "annealed": ("--k", "4", "--k-anneal-start", "16", "--k-anneal-steps", "10"),
    "averaged": ("--k", "4", "--average-decay", "0.9"),
    "accumulated": ("--k", "4", "--grad-acc-steps", "2", "--grad-clip", "0.5"),
    "8-bit states": ("--k", "4", "--optimizer-states", "8bit"),
    "bf16 states": ("--arch", "jumprelu", "--optimizer-states", "bf16"),
    "amp bf16": ("--k", "4", "--amp", "bf16"),
    "amp bf16, relu": ("--arch", "relu", "--amp", "bf16"),
    "amp fp16": ("--arch", "gated", "--amp", "fp16"),
    "adamw": ("--k", "4", "--optimizer", "adamw", "--weight-decay", "0.1"),
    "sgd": ("--k", "4", "--optimizer", "sgd", *OTHER_FALL),
    "signum": ("--k", "4", "--optimizer", "signum", *OTHER_FALL),
    "schedule free": ("--k", "4", "--optimizer", "schedule_free_signum", "--decay-fraction", "0"),
    "probe": ("--k", "4", "--probe-loss-coeff", "0.5", "--probe-labels", "labels"),
    "sweep": ("--sweep", "sweep.json"),
    "resumed": ("--k", "4"),
    "resumed, gated": ("--arch", "gated"),
}
RESUMED = ("resumed", "resumed, gated")


def main() -> int:
    """Train with both revisions and compare; return 1 if a training differs."""
    parser = argparse.ArgumentParser(prog="python tools/compare_losses.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("base", nargs="?", help="a revision of git")
    parser.add_argument("head", nargs="?", help="another revision; default: the working tree")
    parser.add_argument("--only", nargs="+", choices=[*TRAININGS], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names of the trainings")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compare")
    given = parser.parse_args()
    if given.list:
        print("\n".join(TRAININGS))
        return 0
    if given.base is None:
        parser.error("a revision to compare with is needed")
    names = given.only or [*TRAININGS]
    folder = given.folder.resolve()
    sides = {"base": given.base, "head": given.head}
    for side, revision in sides.items():
        _train_all(revision, folder, folder / side, names)
    differing = [name for name in names if _differs(name, folder)]
    told = " and ".join(_name(revision) for revision in sides.values())
    if differing:
        print(f"{told}: {len(differing)} of {len(names)} trainings differ: {', '.join(differing)}")
        return 1
    print(f"{told}: losses, metrics, weights and states of {len(names)} trainings are bit-equal")
    return 0


def _name(revision: str | None) -> str:
    if revision is None:
        return "the working tree"
    return _git("rev-parse", "--short", f"{revision}^{{commit}}").strip()


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", ROOT, *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _train_all(revision: str | None, folder: Path, results: Path, names: list[str]) -> None:
    """Train with one revision, in a process that imports only this revision."""
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    source = ROOT if revision is None else _checked_out(revision, folder)
    write_data(results)
    own = {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = (
        "import sys; del sys.path[0]; "  # the current folder, with the results
        f"sys.path.append({str(ROOT / 'tools')!r}); import compare_losses; "
        f"compare_losses.train_here({names!r}, {str(source)!r})"
    )
    print(f"training with {_name(revision)}", flush=True)
    log = results / "log"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=results, env={**os.environ, **own}, stdout=output, stderr=output, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"the training with {_name(revision)} failed: see {log}")


def _checked_out(revision: str, folder: Path) -> Path:
    """Write the files of a revision, with its compiled module; return their folder."""
    source = folder / "source" / _name(revision)
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    archive = subprocess.Popen(["git", "-C", ROOT, "archive", revision], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", source], stdin=archive.stdout, check=True)
    if archive.wait() != 0:
        sys.exit(f"git archive {revision} failed")
    build = folder / "native" / _digest_of_native(source)
    kept = build / "kept"
    if not kept.exists():
        print(f"compiling the kernels of {_name(revision)}", flush=True)
        environment = {**os.environ, "SAE_FAST_BUILD_DIR": str(build / "cmake")}
        log = build / "log"
        build.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                cwd=source, env=environment, stdout=output, stderr=output, check=False,
            )  # fmt: skip
        if done.returncode != 0:
            sys.exit(f"the build of {_name(revision)} failed: see {log}")
        aside = build / "aside"
        aside.mkdir(exist_ok=True)
        for module in (source / "sae_fast").glob("_C*.so"):
            shutil.copy2(module, aside)
        shutil.rmtree(build / "cmake")
        aside.rename(kept)
    for module in kept.iterdir():
        shutil.copy2(module, source / "sae_fast")
    return source


def _digest_of_native(source: Path) -> str:
    from importlib.metadata import version

    digest = hashlib.sha256(f"{version('torch')} {sys.version}".encode())
    for name in NATIVE:
        path = source / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and "tests" not in file.relative_to(source).parts:
                digest.update(f"{file.relative_to(source)}".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def write_data(folder: Path) -> None:
    """Write shards [ROWS, WIDTH] of planted directions with noise, their targets and labels."""
    import h5py

    generator = np.random.default_rng(0)
    directions = generator.standard_normal((64, WIDTH))
    to_target = generator.standard_normal((WIDTH, TARGET_WIDTH)) / WIDTH**0.5
    for name, rows in (("train_00", ROWS), ("train_01", ROWS // 2), ("heldout_00", 256)):
        active = generator.random((rows, 64)) < 0.06
        amounts = active * generator.random((rows, 64))
        x = amounts @ directions + 0.05 * generator.standard_normal((rows, WIDTH)) + 0.3
        path = folder / "shards" / f"{name}.h5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            file["activations"] = x.astype(np.float32)
            file["targets"] = np.tanh(x @ to_target).astype(np.float32)
            file["doc_id"] = np.arange(rows) // 16
            file["labels"] = active[:, 0].astype(np.int64)
    (folder / "sweep.json").write_text(json.dumps({"k": [2, 4], "seed": [0, 1]}))


def train_here(names: list[str], source: str) -> None:
    """Train in the current folder with the sae_fast of `source`; called in a process of its own."""
    import sae_fast

    if not Path(sae_fast.__file__).is_relative_to(source):
        sys.exit(f"{sae_fast.__file__} was imported instead of the one in {source}")
    from sae_fast import train

    for name in names:
        flags = [*COMMON, *TRAININGS[name], "--checkpoint-dir"]
        codes = [train.main([*flags, f"runs/{name}"])]
        if name in RESUMED:
            middle = f"runs/{name}/checkpoints/step-{STEPS // 2:08d}"
            codes += [train.main([*flags, f"runs/{name}/again", "--resume-from", middle])]
        if any(codes):
            sys.exit(f"the training {name!r} ended with exit codes {codes}")


def results_of(folder: Path) -> dict[str, Any]:
    """Return the results in a training's folder by name: metrics of each step, and tensors."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        place = path.parent.relative_to(folder)
        for number, line in enumerate(path.read_text().splitlines()):
            row = {key: value for key, value in json.loads(line).items() if key not in CLOCK}
            found |= {f"{place}: line {number + 1}: {key}": row[key] for key in row}
    for path in sorted(folder.rglob(f"step-{STEPS:08d}/*.safetensors")):
        place = path.relative_to(folder)
        found |= {f"{place}: {name}": tensor for name, tensor in load_file(path).items()}
    return found


def _differs(name: str, folder: Path) -> bool:
    base, head = (results_of(folder / side / "runs" / name) for side in ("base", "head"))
    if not any("safetensors" in key for key in base):
        sys.exit(f"the training {name!r} of the base has left no checkpoint of step {STEPS}")
    differences = [key for key in {**base, **head} if not _is_equal(key, base, head)]
    for key in differences[:SHOWN]:
        print(f"{name}: {key}: {_shown(base.get(key))} became {_shown(head.get(key))}")
    return bool(differences)


def _is_equal(key: str, base: Mapping[str, Any], head: Mapping[str, Any]) -> bool:
    if key not in base or key not in head:
        return False
    one, other = base[key], head[key]
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    if not isinstance(other, torch.Tensor) or one.dtype != other.dtype:
        return False
    return one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


if __name__ == "__main__":
    sys.exit(main())
