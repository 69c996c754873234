"""Train on damaged, foreign and hostile shards.

Each try makes a directory of small shards, changes it, and trains for two steps. The command must
refuse the directory in one line, or train on the original rows; if neither a checksum nor a
manifest records these, on the rows that HDF5 reads.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import matplotlib.pyplot  # noqa: F401  # imported once, for all children
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from campaign.frame import Campaign, Failed, Try, leftovers, refusal, run_aside, success
from sae_fast.activations import HeldOut, open_shards, write_manifest, write_shard
from sae_fast.activations.scanning import BESIDE_MANIFEST
from sae_fast.command_errors import EXIT_BAD_INPUT, one_line
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.train import main
from sae_fast.training import run_directory
from sae_fast.training.data import TrainingData
from sae_fast.training.trainer import Trainer

ROWS, WIDTH = 160, 8
FLAGS = ("--k", "2", "--d-sae", "16", "--batch-size", "32", "--max-steps", "2", "--pool-rows", "64")
KINDS = (
    *("own", "gzip", "bfloat16", "chunked", "contiguous", "fletcher", "lzf", "gzip_fletcher"),
    *("odd_chunks", "float64", "big_endian", "three_axes", "latest", "latest_gzip", "compact"),
    *("filled_by_bits", "own_fletcher_labels"),
)
OWN = ("own", "gzip", "bfloat16")
ROUNDED = ("bfloat16", "filled_by_bits")
TENSORS = (".pt", ".npy", ".safetensors")

Array = npt.NDArray[Any]
Change = Callable[[Try, Path], None]


def attempt(try_: Try) -> str:
    """Make shards, change one and train; return the change and the outcome."""
    draw = try_.random
    directory = try_.folder / "shards"
    directory.mkdir()
    rows = np.random.default_rng(try_.number).standard_normal((2 * ROWS, WIDTH), np.float32)
    suffix = draw.choice(TENSORS) if draw.random() < 0.15 else ".h5"
    kinds = [draw.choice(KINDS) if suffix == ".h5" else suffix for _ in range(2)]
    for number, kind in enumerate(kinds):
        write(directory / f"{number}{suffix}", kind, rows[number * ROWS : (number + 1) * ROWS])
    is_listed = suffix == ".h5" and draw.random() < 0.3
    if is_listed:
        write_manifest(directory)
    change = draw.choice(CHANGES if suffix == ".h5" else BYTES)
    change(try_, directory / f"{draw.randrange(2)}{suffix}")
    exact = change in (in_bits, in_blocks, cut) and (is_listed or set(kinds) <= set(OWN))
    known = rows if exact and not set(kinds) & set(ROUNDED) else None
    train = draw.choices((_by_stream, _by_trainer, _by_command), (6, 3, 1))[0]
    ended = run_aside(
        lambda: _train(train, directory, known, kinds), folder=try_.folder, seconds=20
    )
    leftovers(try_.folder, known=(BESIDE_MANIFEST,))  # what was checked, beside a manifest
    if ended.code == 2:
        refusal(ended)
        return f"{change.__name__}: refused"
    try:
        success(ended)
    except Failed as failure:
        raise Failed(f"{change.__name__} of {kinds}: {failure}") from None
    return f"{change.__name__}: trained"


def _train(
    train: Callable[[Path], int], directory: Path, known: Array | None, kinds: list[str]
) -> int:
    """Train and check the rows; raise AssertionError if they differ or descriptors stay open."""
    # Plotting takes longer than these trainings.
    vars(run_directory)["plot_run"] = lambda rows, path, title: path
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/fd"))
    code = train(directory)
    gc.collect()
    if (leaked := len(os.listdir("/proc/self/fd")) - before) > 0:
        raise AssertionError(f"code {code}, and {leaked} descriptors stay open")
    if code == 0:
        _compare(directory, known, kinds)
    return code


def _by_command(directory: Path) -> int:
    return main(["--shard-dir", str(directory), *FLAGS, "--checkpoint-dir", "run"])


def _by_stream(directory: Path) -> int:
    """Read the shards as a training does, without training; return the exit code."""
    config = TrainConfig(shard_dir=str(directory), batch_size=32, pool_rows=64)
    try:
        data = TrainingData(config, None, None, torch.device("cpu"), SAEConfig(k=2, d_sae=16))
        data.source.set_transform(data.normalization())
        with contextlib.closing(data.source) as source:
            for _ in range(12):
                source.next_batch()
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _by_trainer(directory: Path) -> int:
    """Train as the command does, without parsing flags, which takes longest; return the code."""
    config = TrainConfig(shard_dir=str(directory), batch_size=32, max_steps=2, pool_rows=64)
    try:
        Trainer(SAEConfig(k=2, d_sae=16), config, show_progress=False).train()
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _compare(directory: Path, expected: Array | None, kinds: list[str]) -> None:
    """Compare the rows of a training with the original rows [n, D], or with the rows HDF5 reads.

    LZF shards may differ, because HDF5 leaves memory uninitialised if a damaged chunk ends early.
    """
    shards = open_shards(directory)
    served = torch.cat(list(HeldOut(shards, batch_size=64))).numpy()
    if expected is None:
        parts = []
        for shard in shards.shards:
            part = _as_stored(shard.path, shard.key).reshape(-1, shard.d_in)
            if shard.storage.name == "bfloat16":
                part = (part.astype(np.uint32) << 16).view(np.float32)
            parts.append(part.astype(np.float32))
        expected = np.concatenate(parts)
    if not np.array_equal(served, expected) and "lzf" not in kinds:
        differing = int((served != expected).any(axis=1).sum())
        raise AssertionError(f"{differing} of {len(served)} rows differ")


def _as_stored(path: Path, key: str) -> Array:
    """Return all numbers of a file, read with the library of its format."""
    if path.suffix == ".npy":
        return np.asarray(np.load(path))
    if path.suffix == ".safetensors":
        return load_file(path)[key].float().numpy()
    if path.suffix == ".pt":
        # Mapped, because otherwise a damaged record of an unused tensor would raise an error.
        content = torch.load(path, weights_only=True, mmap=True)
        (found,) = [part for part in content.values() if part.is_floating_point()]
        return np.asarray(found.double().float().numpy())
    with h5py.File(path) as file:
        return np.asarray(file[key][()])


def write(path: Path, kind: str, rows: Array) -> None:
    """Write a shard of one of KINDS, or a file of tensors in the format of its suffix."""
    if kind in TENSORS:
        _write_tensors(path, rows)
        return
    if kind in OWN:
        dtype = "bfloat16" if kind == "bfloat16" else "float32"
        compression = "gzip" if kind == "gzip" else None
        values = torch.from_numpy(rows)
        write_shard(path, values, dtype=dtype, chunk_rows=32, compression=compression)
        return
    with h5py.File(path, "w", libver="latest" if kind.startswith("latest") else None) as file:
        file.attrs["model"] = "some"
        file["label"] = np.arange(len(rows))
        known: dict[str, dict[str, Any]] = {
            "chunked": {"chunks": (32, WIDTH), "maxshape": (None, WIDTH)},
            "fletcher": {"chunks": (32, WIDTH), "fletcher32": True},
            "lzf": {"chunks": (32, WIDTH), "compression": "lzf"},
            "gzip_fletcher": {
                **{"chunks": (32, WIDTH), "compression": "gzip", "fletcher32": True},
                "shuffle": True,
            },
            "odd_chunks": {"chunks": (30, 5)},
            "float64": {"dtype": "f8"},
            "big_endian": {"dtype": ">f4"},
            "latest": {"chunks": (32, WIDTH)},
            "latest_gzip": {
                "chunks": (32, WIDTH),
                "compression": "gzip",
                "maxshape": (None, WIDTH),
            },
            "own_fletcher_labels": {"chunks": (50, WIDTH), "fletcher32": True},
        }
        options = known.get(kind, {})
        if kind == "three_axes":
            file["activations"] = rows.reshape(20, -1, WIDTH)
        elif kind == "compact":
            _create(file, rows, compact=True)
        elif kind == "filled_by_bits":
            _create(file, rows, compact=False)
        else:
            options = {"dtype": "f4", **options}
            file.create_dataset("activations", rows.shape, **options)[:] = rows


def _write_tensors(path: Path, rows: Array) -> None:
    values = torch.from_numpy(rows)
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".pt":
        torch.save({"activations": values, "label": torch.arange(len(rows))}, path)
    else:
        save_file({"activations": values}, path)


def _create(file: h5py.File, rows: Array, *, compact: bool) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    kind = h5py.h5t.IEEE_F32LE.copy()
    if compact:
        properties.set_layout(h5py.h5d.COMPACT)
    else:
        kind.set_fields(31, 20, 11, 0, 20)
        kind.set_ebias(1023)
    space = h5py.h5s.create_simple(rows.shape)
    dataset = h5py.h5d.create(file.id, b"activations", kind, space, properties)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, rows)


def in_bits(try_: Try, path: Path) -> None:
    """Flip some bits or set some bytes, more often in the metadata."""
    draw, content = try_.random, bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        near = (draw.randrange(min(2400, len(content))), len(content) - 1 - draw.randrange(800))
        place = draw.choice((*near, draw.randrange(len(content)), _used(draw, content)))
        flipped = content[place] ^ 1 << draw.randrange(8)
        content[place] = draw.choice((flipped, flipped, 0, 255, draw.randrange(256)))
    path.write_bytes(content)


def _used(draw: random.Random, content: bytearray) -> int:
    """Draw the place of a byte that is not zero, in the first metadata."""
    places = [place for place in range(min(4000, len(content))) if content[place]]
    return draw.choice(places)


def in_numbers(try_: Try, path: Path) -> None:
    """Replace an aligned number in the metadata by a wrong size or address."""
    draw, content = try_.random, bytearray(path.read_bytes())
    size = draw.choice((2, 4, 8))
    place = _used(draw, content) // size * size
    known = int.from_bytes(content[place : place + size], "little")
    most = 1 << 8 * size
    value = draw.choice(
        (0, 1, 2, 3, most - 1, most // 2, most // 2 - 1, known + 1, known - 1, 2 * known, place)
    )
    content[place : place + size] = (value % most).to_bytes(size, "little")
    path.write_bytes(content)


def in_blocks(try_: Try, path: Path) -> None:
    """Overwrite a block of the file with zeros or with another block."""
    draw, content = try_.random, bytearray(path.read_bytes())
    size = draw.choice((8, 64, 512, 1024))
    start, source = draw.randrange(len(content) - size), draw.randrange(len(content) - size)
    block = bytes(size) if draw.random() < 0.4 else content[source : source + size]
    content[start : start + size] = block
    path.write_bytes(content)


def cut(try_: Try, path: Path) -> None:
    """Cut the file, append zeros or a copy of it, or put zeros before it."""
    draw, content = try_.random, path.read_bytes()
    shorter = content[: draw.randrange(len(content))]
    longer = draw.choice((content + bytes(4096), content + content, bytes(512) + content))
    path.write_bytes(draw.choice((shorter, longer)))


def never_written(try_: Try, path: Path) -> None:
    """Declare more rows than were written, chunked or not."""
    draw = try_.random
    rows = draw.choice((ROWS, 5000, 2**31, 2**45, 2**61))
    width = draw.choice((WIDTH, WIDTH, 2**20, 2**40)) if rows < 2**40 else WIDTH
    written = draw.choice((0, 1, 32, 100))
    with h5py.File(path, "w") as file:
        chunks = draw.choice((None, (32, WIDTH), (1000, WIDTH), (100, 3), (1, 1024)))
        if chunks is not None:
            chunks = (min(chunks[0], rows), min(chunks[1], width))
        compression = draw.choice((None, "gzip")) if chunks else None
        with contextlib.suppress(ValueError, OSError):  # HDF5 refuses some of these
            dataset = file.create_dataset(
                "activations", (rows, width), "f4", chunks=chunks, compression=compression
            )
            if width == WIDTH and chunks is not None:
                dataset[:written] = np.ones((written, WIDTH), np.float32)


def large_chunks(try_: Try, path: Path) -> None:
    """Store few rows in chunks of up to 2 GB."""
    rows = try_.random.choice((10**5, 10**7, 6 * 10**7))
    with h5py.File(path, "w") as file:
        shape = {"shape": (ROWS, WIDTH), "maxshape": (None, WIDTH), "chunks": (rows, WIDTH)}
        file.create_dataset("activations", dtype="f4", **shape)
        # No chunk is written: only the declaration is tested.


def elsewhere(try_: Try, path: Path) -> None:
    """Keep the numbers in another file: external storage, links, virtual datasets."""
    draw, directory = try_.random, path.parent
    other = draw.choice(("/etc/passwd", "../other.h5", "0.h5", "1.h5", "part", "gone", path.name))
    rows = np.random.default_rng(1).standard_normal((ROWS, WIDTH), np.float32)
    for name in ("../other.h5", "part"):
        with h5py.File(directory / name, "w") as file:
            file["activations"] = rows[: draw.choice((ROWS, ROWS, 10))]
    with h5py.File(path, "w") as file:
        kind = draw.choice(("external", "link", "soft", "virtual", "virtual", "self"))
        if kind == "external":
            raw = [(str(directory / other), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("activations", (ROWS, WIDTH), "f4", external=raw)
        elif kind == "link":
            file["activations"] = h5py.ExternalLink(other, "activations")
        elif kind == "soft":
            file["activations"] = h5py.SoftLink(draw.choice(("/activations", "/a/b", "/x")))
            file["a"] = h5py.SoftLink("/a")
        else:
            _write_virtual(draw, file, "." if kind == "self" else other)


def _write_virtual(draw: random.Random, file: h5py.File, other: str) -> None:
    layout = h5py.VirtualLayout((ROWS, WIDTH), "f4")
    count = draw.choice((ROWS, ROWS, ROWS // 2, 10))
    source = h5py.VirtualSource(other, draw.choice(("activations", "x")), (ROWS, WIDTH))
    first = draw.choice((0, 0, ROWS - count))
    if draw.random() < 0.2:
        layout[:, : WIDTH // 2] = source[:, : WIDTH // 2]
    else:
        layout[first : first + count] = source[:count]
    file.create_virtual_dataset("activations", layout)


def odd_types(try_: Try, path: Path) -> None:
    """Store values that are not real numbers, or that have other shapes."""
    draw = try_.random
    reals = np.random.default_rng(0).standard_normal((ROWS, WIDTH))
    values = draw.choice(
        (
            np.zeros((ROWS, WIDTH), [("a", "f4")]),
            np.zeros((ROWS, WIDTH), "S4"),
            np.ones((ROWS, WIDTH), "c8"),
            np.ones((ROWS, WIDTH), "i8"),
            reals.astype(">f2"),
            reals * 1e-310,
            reals * 1e300,
            reals.astype("f4") * np.float32(1e-44),
            np.zeros((ROWS, WIDTH), "f4"),
            np.ones((ROWS, WIDTH), "f4"),
            np.float32(1),
            np.ones(ROWS, "f4"),
            np.ones((0, WIDTH), "f4"),
            np.ones((ROWS, 0), "f4"),
            np.ones((2, 2, 2, WIDTH), "f4"),
        )
    )
    with h5py.File(path, "w") as file:
        if draw.random() < 0.1:
            file["activations"] = h5py.Empty("f4")
        elif draw.random() < 0.1:
            file.create_group("activations")
        else:
            file["activations"] = values
        for number in range(draw.choice((0, 0, 200))):
            file[f"{'x' * draw.choice((3, 3000))}{number}"] = 1.0
        for name in ("format", "rows", "d_in", "dtype", "checksum", "model", "layer"):
            if draw.random() < 0.3:
                value = draw.choice(("sae_fast.activations", "bfloat16", 1, np.ones(3), "ä" * 99))
                file.attrs[name] = value


def odd_files(try_: Try, path: Path) -> None:
    """Replace a shard or manifest by a pipe, a link, a directory or a file with a strange name."""
    draw = try_.random
    place = draw.choice((path, path.parent / "manifest.json", path.parent / "2.h5"))
    content = path.read_bytes()
    place.unlink(missing_ok=True)
    kind = draw.choice(("pipe", "loop", "dangling", "zero", "directory", "named", "empty", "null"))
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    elif kind == "named":
        odd = draw.choice((b"\xff\xfe", b"new\nline", "日本".encode(), b"x" * 200, b" "))
        Path(os.fsdecode(os.fsencode(path.parent) + b"/" + odd + b".h5")).write_bytes(content)
    elif kind == "empty":
        place.write_bytes(b"")
    else:
        links = {"loop": place.name, "dangling": "nowhere", "zero": "/dev/zero"}
        place.symlink_to(links.get(kind, "/dev/null"))


def in_manifest(try_: Try, path: Path) -> None:
    """Change the text of the manifest or values in it."""
    draw, place = try_.random, path.parent / "manifest.json"
    write_manifest(path.parent)
    content = json.loads(place.read_text())
    entry = draw.choice(content["shards"])
    odd: tuple[Any, ...] = (
        None,
        -1,
        0,
        2**70,
        1e999,
        [],
        {},
        "x" * 5000,
        "../0.h5",
        True,
        "0.h5",
        float("nan"),
    )
    match draw.randrange(5):
        case 0:
            entry[draw.choice(list(entry))] = draw.choice(odd)
        case 1:
            entry[draw.choice(("file", "extra", "x" * 5000))] = draw.choice(odd)
        case 2:
            content[draw.choice(list(content))] = draw.choice(odd)
        case 3:
            content["shards"] = draw.choice(([*content["shards"], entry], [entry], [[]], "abc"))
        case _:
            text = bytearray(place.read_bytes())
            for _ in range(draw.choice((1, 1, 4))):
                text[draw.randrange(len(text))] = draw.randrange(256)
            place.write_bytes(text[: draw.choice((len(text), draw.randrange(len(text))))])
            return
    place.write_text(json.dumps(content))


BYTES: tuple[Change, ...] = (in_bits, in_bits, in_numbers, in_blocks, cut, odd_files)
CHANGES: tuple[Change, ...] = (
    *(in_bits, in_bits, in_bits, in_numbers, in_numbers, in_numbers, in_blocks, in_blocks, cut),
    *(never_written, large_chunks, elsewhere, elsewhere, odd_types, odd_files, in_manifest),
)

# A try's own child has a shorter limit than the try.
CAMPAIGN = Campaign(attempt=attempt, tries=5000, short=20, seconds=60)
