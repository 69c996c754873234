"""Damage and edit models, checkpoints, configurations and logs, and read them.

Damage is flipped, lost and repeated bytes, headers with other types and sizes, and pipes and
devices in place of files. Edits are valid JSON or newly signed checkpoints with inconsistent
values. Every try must end with one line of error, or with the result of an undamaged file: a
resumed run must end with the weights of the undisturbed run, to the bit, even if it had to fall
back to an earlier checkpoint.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  (imported once, not in every child process)
import torch
from safetensors.torch import load_file, save_file

from campaign.frame import Campaign, Ended, Failed, Try, leftovers, refusal, run_aside, success
from sae_fast import SparseAutoencoder, plot, train
from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.tensor_files import sha256_of
from sae_fast.training import run_directory
from sae_fast.training.checkpoint import _digest

ROWS, D_IN = 400, 8
ADDRESS_SPACE = 12 << 30
LAST = 6  # steps of a run; it has checkpoints of steps 2, 4 and 6
VARIANTS: dict[str, tuple[str, ...]] = {
    "topk": ("--k", "2"),
    "batch": ("--arch", "batch_topk", "--k", "2", "--optimizer-states", "8bit"),
    "jump": ("--arch", "jumprelu", "--average-decay", "0.9"),
    "gated": ("--arch", "gated", "--amp", "fp16"),
    "free": ("--k", "2", "--optimizer", "schedule_free_signum"),
    "skip": ("--k", "2", "--transcoder", "--skip-connection", "--target-key", "targets"),
}
COMMON = (
    *("--d-sae", "16", "--batch-size", "32", "--lr", "1e-2", "--checkpoint-every", "2"),
    *("--log-every", "1", "--eval-every", "2", "--num-threads", "1", "--pool-rows", "150"),
)
# Raw JSON texts, because `json.dumps` cannot write some of them.
VALUES = (
    *("null", "true", "-1", "0", "1", "3", "0.5", "1e308", "1e-320", "-0.0", "1e999", "NaN"),
    *("Infinity", "9" * 400, "18446744073709551615", "9223372036854775808", "4294967296"),
    *('""', '"x"', '"latest"', '"../../etc/passwd"', '"\\ud800"', '"\\u0000"', f'"{"y" * 3000}"'),
    *("[]", "{}", "[null]", "[1, 2]", '{"a": 1}', "[" * 10_000 + "]" * 10_000),
)
DTYPES = (
    *("I32", "U8", "BOOL", "I64", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F64", "U16", "C64", "X"),
)
# Fields whose edit may give another valid run, because nothing else in the state contradicts it.
FREE_EDITS = (
    *("config", "random", "loss_scaler", "seconds", "stalled_seconds", "best", "versions"),
    *("wandb_id", "scheduler_state", "format_version"),
)


def prepare(shared: Path) -> None:
    """Make the shards."""
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("train", ROWS), ("heldout", 64)):
        x = torch.randn(rows, D_IN, generator=generator)
        metadata = ShardMetadata(model="m", hook="residual.0", layer=0)
        (shared / "shards").mkdir(exist_ok=True)
        write_shard(shared / "shards" / f"{name}.h5", x, metadata=metadata)
        _add_targets(shared / "shards" / f"{name}.h5", x)


def finished_run(this: Try, variant: str) -> Path:
    """Return a folder with a run, and apart from it the model and the checkpoint of its end."""
    return this.made(variant, functools.partial(finish_run, variant=variant))


def finish_run(folder: Path, variant: str) -> None:
    """Train a variant's run; move its last checkpoint out of it and save its model."""
    run, flags = folder / "run", (*VARIANTS[variant], "--max-steps", LAST)
    success(run_aside(lambda: _train(folder.parent, *flags, run=run), seconds=120))
    newest = run / "checkpoints" / "latest"
    SparseAutoencoder.from_pretrained(newest).save(folder / "model")
    newest.resolve().rename(folder / "last")
    newest.unlink()
    newest.symlink_to("step-00000004")


def _add_targets(path: Path, x: torch.Tensor) -> None:
    import h5py

    with h5py.File(path, "a") as file:
        file["targets"] = (x[:, :4] * 2).half().numpy()


def _train(shared: Path, *flags: object, run: Path, data: bool = True) -> int:
    run_directory.plot_run = lambda rows, path, title: path  # type: ignore[attr-defined]
    where = ["--shard-dir", str(shared / "shards")] if data else []
    words = [*where, *COMMON, *map(str, flags), "--checkpoint-dir", str(run), "--no-wandb"]
    return train.main(words)


def attempt(this: Try) -> str:
    """Damage or edit one file and read it; return the kind and the outcome."""
    kinds = {
        model: 10,
        start: 3,
        damaged_checkpoint: 5,
        edited_checkpoint: 10,
        configuration: 4,
        sweep: 3,
        log_of_a_resumed_run: 3,
        plotted: 1,
    }
    kind = this.random.choices(list(kinds), list(kinds.values()))[0]
    outcome = f"{kind.__name__}: {kind(this)}"
    leftovers(this.folder, known=(".run.lock", ".lock"))
    return outcome


def model(this: Try) -> str:
    """Load a model with one damaged or edited file."""
    variant = this.random.choice(list(VARIANTS))
    place = copied(this, finished_run(this, variant) / "model")
    path = place / this.random.choice(["sae.safetensors", "sae.safetensors", "config.json"])
    kind = _damage_tensors(this, path) if path.suffix != ".json" else _damage_json(this, path)
    try:
        loaded = SparseAutoencoder.from_pretrained(place)
    except (ValueError, OSError) as error:
        text = str(error)
        if "\n" in text or len(text) > 1000 or str(place) not in text:
            raise Failed(f"{kind}: {type(error).__name__} {text[:2000]}") from None
        return "refused"
    before = SparseAutoencoder.from_pretrained(finished_run(this, variant) / "model")
    for name, tensor in before.state_dict().items():
        if not torch.equal(tensor, loaded.state_dict()[name]):
            raise Failed(f"{kind}: loaded with another {name}")
    with torch.no_grad():
        x = torch.randn(5, D_IN)
        if not bool(loaded(x).isfinite().all()):
            raise Failed(f"{kind}: loaded, output not finite")
    return "loaded"


def start(this: Try) -> str:
    """Start a training from a model with one damaged or edited file."""
    variant = this.random.choice(list(VARIANTS))
    place = copied(this, finished_run(this, variant) / "model")
    path = place / this.random.choice(["sae.safetensors", "config.json"])
    kind = _damage_tensors(this, path) if path.suffix != ".json" else _damage_json(this, path)
    flags = (*VARIANTS[variant], "--max-steps", 1, "--start-from", place)
    ended = _aside(lambda: _train(this.shared, *flags, run=this.folder / "run"))
    return _verdict(kind, ended)


def damaged_checkpoint(this: Try) -> str:
    """Resume a run with one damaged file in its newest checkpoint."""
    variant = this.random.choice(list(VARIANTS))
    run = copied(this, finished_run(this, variant) / "run")
    newest = run / "checkpoints" / "step-00000004"
    path = this.random.choice(sorted(newest.iterdir()))
    kind = _damage_json(this, path) if path.suffix == ".json" else _damage_tensors(this, path)
    return resumed(this, variant, run, f"{path.name}, {kind}", exact=True)


def edited_checkpoint(this: Try) -> str:
    """Resume a run whose newest checkpoint has edited values or tensors and a new signature."""
    variant = this.random.choice(list(VARIANTS))
    run = copied(this, finished_run(this, variant) / "run")
    path, state = newest_state(run)
    exact = True
    if this.random.random() < 0.7:
        kind, text = _edited_json(this.random, state)
        exact = not kind.startswith(FREE_EDITS)
    else:
        kind, exact = _edit_tensors(this.random, path.with_name("trainer.safetensors"))
        names = ("sae.safetensors", "config.json", "trainer.safetensors")
        state["sha256"] = {name: sha256_of(path.with_name(name)) for name in names}
        text = json.dumps(state)
    write_signed(path, text)
    return resumed(this, variant, run, kind, exact=exact)


def newest_state(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return path and values, without the digest, of the newest checkpoint's trainer.json."""
    path = run / "checkpoints" / "step-00000004" / "trainer.json"
    state: dict[str, Any] = json.loads(path.read_text())
    del state["digest"]
    return path, state


def write_signed(path: Path, text: str) -> None:
    """Write a trainer.json, with the digest of its content if that is a JSON object."""
    is_object = True
    try:
        state = json.loads(text)
        is_object = isinstance(state, dict) and bool(state)
        digest = _digest(state) if is_object else ""
    except (ValueError, RecursionError):
        digest = "0" * 64
    signed = text.rstrip()[:-1] + f', "digest": "{digest}"' + "}" if is_object else text
    path.write_text(signed, encoding="utf-8", errors="surrogatepass")


def configuration(this: Try) -> str:
    """Train with a configuration file that is damaged or edited."""
    path = this.folder / "config.json"
    shutil.copy(finished_run(this, "topk") / "run" / "config.json", path)
    kind = _damage_json(this, path)
    flags = ("--config", path, "--max-steps", 1)
    ended = _aside(lambda: _train(this.shared, *flags, run=this.folder / "run"))
    return _verdict(kind, ended)


def sweep(this: Try) -> str:
    """Train with a sweep file that is damaged or edited."""
    path = this.folder / "sweep.json"
    forms: Sequence[Any] = (
        {"k": [2, 3], "seed": [0, 1]},
        [{"name": "one", "k": 2}, {"name": "two", "d_sae": 24, "lr": 0.1}],
    )
    path.write_text(json.dumps(this.random.choice(forms)))
    kind = _damage_json(this, path)
    flags = ("--k", 2, "--sweep", path, "--max-steps", 1)
    ended = _aside(lambda: _train(this.shared, *flags, run=this.folder / "run"))
    return _verdict(kind, ended)


def log_of_a_resumed_run(this: Try) -> str:
    """Resume a run whose metrics.jsonl or config.json is damaged or edited."""
    variant = this.random.choice(list(VARIANTS))
    run = copied(this, finished_run(this, variant) / "run")
    path = run / this.random.choice(["metrics.jsonl", "metrics.jsonl", "config.json"])
    kind = _damage_lines(this, path) if path.suffix == ".jsonl" else _damage_json(this, path)
    return resumed(this, variant, run, f"{path.name}, {kind}", exact=True)


def plotted(this: Try) -> str:
    """Plot the metrics of a run whose files are damaged or edited."""
    run = copied(this, finished_run(this, this.random.choice(list(VARIANTS))) / "run")
    path = run / this.random.choice(["metrics.jsonl", "training_history.json", "config.json"])
    if path.name == "training_history.json":
        (run / "metrics.jsonl").unlink()
    kind = _damage_lines(this, path) if path.suffix == ".jsonl" else _damage_json(this, path)
    ended = _aside(lambda: plot.main([str(run)]))
    return _verdict(f"{path.name}, {kind}", ended)


def copied(this: Try, folder: Path) -> Path:
    """Copy a folder of the shared files into the try's folder; return the copy."""
    place = this.folder / folder.name
    shutil.copytree(folder, place, symlinks=True)
    return place


def _aside(work: Callable[[], int]) -> Ended:
    return run_aside(work, limits={resource.RLIMIT_AS: ADDRESS_SPACE})


def _verdict(kind: str, ended: Ended) -> str:
    """Return whether a command "refused" a file or "worked"; raise Failed for any other end."""
    try:
        if ended.code == 0:
            success(ended)
            return "worked"
        refusal(ended)
    except Failed as failure:
        raise Failed(f"{kind}: {failure}") from None
    return "refused"


def resumed(this: Try, variant: str, run: Path, kind: str, *, exact: bool) -> str:
    """Resume a run to its last step; return the outcome.

    With `exact` the weights must equal the weights of the undisturbed run.
    """
    flags = ("--resume-from", "latest", "--max-steps", LAST)
    ended = _aside(lambda: _train(this.shared, *VARIANTS[variant], *flags, run=run))
    if _verdict(kind, ended) == "refused":
        return "refused"
    last = run / "checkpoints" / f"step-{LAST:08d}" / "sae.safetensors"
    if not last.exists():
        if exact:
            raise Failed(f"{kind}: succeeded without the last step, {ended}")
        return "worked, edited"
    expected = load_file(finished_run(this, variant) / "last" / last.name)
    found = load_file(last)
    same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if exact and not same:
        raise Failed(f"{kind}: trained on to other weights, {ended}")
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise Failed(f"{kind}: trained on to weights that are not finite")
    fell_back = "trying the checkpoint before it" in ended.err
    return "fell back" if fell_back else "as undisturbed" if same else "worked, edited"


def _damage_json(this: Try, path: Path) -> str:
    if this.random.random() < 0.3:
        return _damage_bytes(this, path)
    kind, text = _edited_json(this.random, json.loads(path.read_text()))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return kind


def _damage_lines(this: Try, path: Path) -> str:
    if this.random.random() < 0.4:
        return _damage_bytes(this, path)
    lines = path.read_text().splitlines()
    number = this.random.randrange(len(lines))
    kind, lines[number] = _edited_json(this.random, json.loads(lines[number]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"line {number}, {kind}"


def _edited_json(generator: random.Random, content: Any) -> tuple[str, str]:
    """Change one value, or remove, add or repeat one key; return the change and the JSON text."""
    mark = "@@value@@"
    holder, key, name = generator.choice(places(content))
    before, value = holder[key], generator.choice(VALUES)
    action = generator.choice(["value"] * 6 + ["number", "remove", "add", "twice"])
    if action == "number" and type(before) in (int, float):
        value = json.dumps(generator.choice([before + 1, before - 1, -before, before * 2, 0]))
    if action == "remove":
        del holder[key]
        return f"{name} removed", json.dumps(content, indent=1)
    if action in ("add", "twice") and isinstance(holder, dict):
        other = "nothing" if action == "add" else "@@twice@@"
        holder[other] = mark
        text = json.dumps(content, indent=1).replace(f'"{mark}"', value)
        return f"{name}, {action}", text.replace('"@@twice@@"', json.dumps(key))
    holder[key] = mark
    text = json.dumps(content, indent=1).replace(f'"{mark}"', value)
    return f"{name} = {value[:60]} (was {str(before)[:60]})", text


def places(content: Any, name: str = "") -> list[tuple[Any, Any, str]]:
    """Return container, key and name of every value, at all depths; in lists only the first 4."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content[:4])
    for key, value in items:
        path = f"{name}.{key}".lstrip(".")
        found.append((content, key, path))
        if isinstance(value, dict | list):
            found += places(value, path)
    return found


def _damage_bytes(this: Try, path: Path) -> str:
    generator = this.random
    content = bytearray(path.read_bytes())
    action = generator.choice(["flip", "flip", "cut", "zero", "repeat", "insert", "special"])
    at = generator.randrange(len(content))
    if action == "flip":
        for _ in range(generator.choice([1, 1, 4, 40])):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif action == "cut":
        del content[at:]
    elif action == "zero":
        content[at:] = bytes(len(content) - at)
    elif action == "repeat":
        content[at:at] = content[at : at + 64]
    elif action == "insert":
        content[at:at] = generator.choice(
            [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"\n", b"9" * 400]
        )
    else:
        return _replace_file(generator, path)
    path.write_bytes(bytes(content))
    return f"{action} at {at}"


def _replace_file(generator: random.Random, path: Path) -> str:
    kind = generator.choice(["empty", "missing", "pipe", "folder", "device", "loop"])
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    return kind


def _damage_tensors(this: Try, path: Path) -> str:
    """Damage a safetensors file at any place, or in its header; return the damage."""
    generator = this.random
    if generator.random() < 0.5:
        return _damage_bytes(this, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    if generator.random() < 0.3:
        header.pop("__metadata__", None)  # a file of an older version has no checksum
        place = generator.randrange(max(1, len(data) - 4)) & ~3
        data[place : place + 4] = struct.pack("<I", generator.choice([0x7FC00000, 0xFF800000]))
        kind = f"NaN or Inf at {place}"
        if _is_integer_data(header, place):
            kind = "no checksum"
            data[:] = content[8 + length :]
    else:
        kind = _edit_header(generator, header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return kind


def _is_integer_data(header: Mapping[str, Any], place: int) -> bool:
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if begin <= place < end:
                return str(entry["dtype"]) not in ("F32", "F64")
    return False


def _edit_header(generator: random.Random, header: dict[str, Any]) -> str:
    names = [name for name in header if name != "__metadata__"]
    name = generator.choice(names)
    entry = header[name]
    action = generator.choice(
        ["dtype", "dtype", "shape", "offsets", "rename", "remove", "metadata"]
    )
    if action == "dtype":
        kinds = [
            "I32",
            "U8",
            "BOOL",
            "I64",
            "F8_E4M3",
            "F8_E5M2",
            "F16",
            "BF16",
            "F64",
            "U16",
            "C64",
            "X",
        ]
        entry["dtype"] = generator.choice(kinds)
    elif action == "shape":
        entry["shape"] = generator.choice(
            [[], [1], [0], [2**40], [2**63], [-1], [16, 16], entry["shape"][::-1]]
        )
    elif action == "offsets":
        entry["data_offsets"][generator.randrange(2)] = generator.choice([0, 4, 2**40, 2**63, -1])
    elif action == "rename":
        header[generator.choice(["nothing", "W_enc ", "W_dec", "é" * 50])] = header.pop(name)
    elif action == "remove":
        del header[name]
    else:
        header["__metadata__"] = generator.choice(
            [{}, {"crc32": "0"}, {"crc32": "x" * 5000}, {"a": "b"}]
        )
    return f"header of {name}: {action} {str(entry)[:100]}"


def _edit_tensors(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Edit a file of tensors; return the edit, and whether a reader can detect it."""
    tensors = load_file(path)
    name = generator.choice(sorted(tensors))
    tensor = tensors[name]
    action = generator.choice(["remove", "add", "dtype", "shape", "nan", "negative", "value"])
    exact = True
    if action == "remove":
        del tensors[name]
    elif action == "add":
        tensors["optimizer.nothing"] = torch.zeros(3)
    elif action == "dtype":
        kinds = [torch.float16, torch.int32, torch.float64, torch.bool, torch.uint8, torch.int64]
        tensors[name] = tensor.to(
            generator.choice([kind for kind in kinds if kind != tensor.dtype])
        )
    elif action == "shape":
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()])
    elif action == "nan" and tensor.is_floating_point():
        tensors[name] = torch.full_like(
            tensor, generator.choice([torch.nan, torch.inf, -torch.inf])
        )
    elif action == "negative" and tensor.dtype != torch.uint8:
        tensors[name] = -1 - tensor.abs() if tensor.dtype != torch.bool else tensor
        exact = name == "optimizer.step" or name.endswith(("exp_avg_sq", "_scale", "lr_squares"))
    else:
        tensors[name] = tensor + 1
        exact = name == "optimizer.step"
    # Without any averages a resumed run starts them anew.
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return f"{name}: {action}", exact


# The parser of flags caches parts of the sources: read once here, not in every child process.
train.parse_arguments(["--k", "2"])
CAMPAIGN = Campaign(attempt, tries=2000, short=10, prepare=prepare, seconds=60)
