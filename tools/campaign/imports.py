"""Convert damaged and hostile .pt, .npy, .npz, .safetensors, .arrow and .parquet files to shards.

Every conversion must end soon, in a limited address space, with one line of error or with shards.
Half of the tries damage a good file; the others make a file whose header, directory, pickle or
state does not describe its content.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.torch
import torch

from campaign.damage import SIZES, damage
from campaign.frame import Campaign, Failed, Try, leftovers, refusal, run_aside, success
from sae_fast import convert_shards
from sae_fast.config.command_line import parse

ADDRESS_SPACE = 3 << 30  # above the address space of the loaded libraries
LEAK = 77
ROWS, WIDTH = 60, 6


def prepare(shared: Path) -> None:
    """Make a good file of every kind."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    several = {"activations": rows.view(-1, 5, WIDTH), "input_ids": torch.arange(ROWS).view(-1, 5)}
    several["attention_mask"] = (torch.arange(ROWS) % 5 < 4).view(-1, 5).long()
    torch.save(rows, shared / "rows.pt")
    torch.save(several, shared / "several.pt")
    torch.save([rows[:20], rows[20:]], shared / "list.pt")
    torch.save(several, shared / "old.pt", _use_new_zipfile_serialization=False)
    np.save(shared / "rows.npy", rows.numpy())
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in several.items()}
    np.savez(shared / "plain.npz", **arrays)
    np.savez_compressed(shared / "packed.npz", **arrays)
    safetensors.torch.save_file(several, shared / "several.safetensors")
    _save_tables(shared, rows)


def _save_tables(shared: Path, rows: torch.Tensor) -> None:
    """Write lists of numbers in both formats of Arrow, in Parquet, and as a saved dataset."""
    lists = pa.array(rows.tolist(), pa.list_(pa.float32()))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(rows.flatten().numpy()), WIDTH)
    for name, column in (("lists", lists), ("fixed", fixed)):
        table = pa.table({"acts": column, "token_ids": list(range(ROWS))})
        with pa.ipc.new_stream(str(shared / f"{name}.arrow"), table.schema) as sink:
            sink.write_table(table, max_chunksize=25)
        pyarrow.parquet.write_table(table, shared / f"{name}.parquet", row_group_size=25)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(shared / "packed.arrow"), table.schema, options=options) as sink:
        sink.write_table(table)
    (shared / "dataset").mkdir()
    shutil.copy(shared / "lists.arrow", shared / "dataset" / "data-00000-of-00001.arrow")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    (shared / "dataset" / "state.json").write_text(json.dumps(state))


def attempt(this: Try) -> str:
    """Convert one bad source; return its kind and the outcome."""
    kinds: Sequence[Callable[[Try], Path]] = (
        *[_damaged] * 10,
        *(_npy, _npz, _directory, _safetensors, _strided, _pickled, _state, _table, _nested),
    )
    kind = this.random.choice(kinds)
    more = this.random.choice(([], [], ["--all-keys"]))
    if this.random.random() < 0.2:
        more = [*more, "--dtype", this.random.choice(["float16", "bfloat16", "float32"])]
    # In a child, so that this process starts no threads, whose locks the next child would copy.
    made = run_aside(lambda: print(kind(this)), folder=this.folder)
    success(made)
    source, out = Path(made.out.splitlines()[-1]), this.folder / "out"
    arguments = [str(source), str(out), *more]
    ended = run_aside(
        lambda: _converted(arguments),
        folder=this.folder,
        limits={resource.RLIMIT_AS: _address_space() + ADDRESS_SPACE, resource.RLIMIT_CORE: 0},
    )
    leftovers(this.folder)
    label = kind.__name__.strip("_") + (f" {source.suffix or 'folder'}" if kind is _damaged else "")
    if ended.code == LEAK:
        raise Failed(f"descriptors stay open, {ended}")
    if ended.code == 0:
        success(ended)
        _check_shards(out)
        return f"{label}: converted"
    refusal(ended)
    return f"{label}: refused"


def _converted(arguments: list[str]) -> int:
    before = len(os.listdir("/proc/self/fd"))
    code = convert_shards.main(arguments)
    gc.collect()
    return LEAK if len(os.listdir("/proc/self/fd")) > before else code


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


def _check_shards(out: Path) -> None:
    """Raise Failed unless there are shards, and all their rows are finite."""
    shards = sorted(out.rglob("*.h5"))
    if not shards:
        raise Failed("exit code 0 without a shard")
    for path in shards:
        with h5py.File(path) as file:
            rows = file["activations"]
            if rows.ndim != 2 or 0 in rows.shape:
                raise Failed(f"{path.name} holds {rows.shape}")
            if rows.dtype.kind == "f" and not np.isfinite(rows[:]).all():
                raise Failed(f"{path.name} holds rows that are not finite")


# ---- damage ------------------------------------------------------------------------------------


def _damaged(this: Try) -> Path:
    """Copy a good file with some bytes changed, cut off, added or moved."""
    good = this.random.choice(sorted(this.shared.iterdir()))
    source = this.folder / good.name
    if good.is_dir():
        shutil.copytree(good, source)
        target = this.random.choice(sorted(source.iterdir()))
    else:
        target = source
        shutil.copy(good, target)
    content = bytearray(target.read_bytes())
    damage(this.random, content)
    target.write_bytes(bytes(content))
    return source


# ---- wrong headers ------------------------------------------------------------------------------


def _shape(generator: random.Random) -> list[object]:
    sizes = (*SIZES, 3, 4, 5, WIDTH, ROWS)
    strange: tuple[object, ...] = (True, 1.5, "4", None, [])
    count = generator.choice((0, 1, 2, 2, 2, 3, 3, 4, 40))
    return [generator.choice(sizes if generator.random() < 0.95 else strange) for _ in range(count)]


def _npy_bytes(generator: random.Random) -> bytes:
    kinds = ("<f4", "<f2", ">f8", "|V2", "|O", "<i8", "|b1", "<U0", "|V2147483647", "<c8", "x")
    descr: object = generator.choice(kinds)
    if generator.random() < 0.2:
        descr = [("a", descr), ("b", "<f4", tuple(generator.choice(SIZES) for _ in range(2)))]
    shape = tuple(_shape(generator))
    header = (
        f"{{'descr': {descr!r}, 'fortran_order': {generator.random() < 0.2}, 'shape': {shape}}}"
    )
    header = generator.choice((header,) * 8 + (header[:-3], "(" * 3000, "{" * 200, "1" * 5000))
    text = header.encode() + b"\n"
    version, size = generator.choice(((1, 2), (1, 2), (2, 4), (3, 4), (9, 2)))
    length = len(text) if generator.random() < 0.9 else generator.choice((0, 1, 60_000))
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + length.to_bytes(size, "little")
        + text
        + bytes(generator.choice((0, 64, 480, 100_000)))
    )


def _npy(this: Try) -> Path:
    """Write a .npy file with a wrong header."""
    path = this.folder / "a.npy"
    path.write_bytes(_npy_bytes(this.random))
    return path


def _npz(this: Try) -> Path:
    """Write an archive of .npy files with wrong headers and strange names."""
    path = this.folder / "a.npz"
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(path, "w", this.random.choice(kinds)) as archive:
        for number in range(this.random.choice((0, 1, 1, 2, 300))):
            name = this.random.choice(("x", "../x", "x/" * 300, "")) + f"{number}.npy"
            archive.writestr(name, _npy_bytes(this.random))
    return path


def _directory(this: Try) -> Path:
    """Copy an archive of good arrays with wrong sizes, places or methods in its directory."""
    good = this.random.choice(("packed.npz", "plain.npz", "several.pt", "rows.pt"))
    content = bytearray((this.shared / good).read_bytes())
    marks = [n for n in range(len(content)) if bytes(content[n : n + 4]) in (b"PK\1\2", b"PK\3\4")]
    for _ in range(this.random.choice((1, 2, 3))):
        place = this.random.choice(marks) + this.random.choice((6, 8, 10, 14, 18, 20, 22, 24, 42))
        value = this.random.choice(SIZES) & 0xFFFFFFFF
        content[place : place + 4] = value.to_bytes(4, "little")
    path = this.folder / good
    path.write_bytes(bytes(content))
    return path


def _safetensors(this: Try) -> Path:
    """Write a .safetensors file with a wrong header."""
    generator = this.random
    header: dict[str, object] = {}
    for number in range(generator.choice((1, 1, 2, 200))):
        offsets = [generator.choice((0, 0, *SIZES)), generator.choice((0, 1440, *SIZES))]
        header[f"x{number}"] = {
            "dtype": generator.choice(("F32", "F16", "BF16", "F64", "F8_E4M3", "BOOL", "?")),
            "shape": _shape(generator),
            "data_offsets": offsets,
        }
    text = json.dumps(header)
    text = generator.choice((text,) * 8 + (text[:-2], "[" * 5000, '{"a":' * 5000))
    length = len(text) if generator.random() < 0.9 else generator.choice(SIZES) & ((1 << 64) - 1)
    path = this.folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text.encode() + bytes(1440))
    return path


def _strided(this: Try) -> Path:
    """Save tensors with strides that repeat a small storage, or tensors of other kinds."""
    generator, base = this.random, torch.randn(ROWS * WIDTH)
    strides = [generator.choice((0, 0, 1, 2, WIDTH)) for _ in range(generator.choice((2, 2, 3)))]
    shape = []
    for stride in strides:
        most = ROWS * WIDTH // (stride * len(strides)) if stride else 1 << 62 // len(strides)
        shape.append(max(0, min(most, generator.choice((0, 1, 4, WIDTH, ROWS, 1 << 20, 1 << 40)))))
    content: object = torch.as_strided(base, shape, strides)
    if generator.random() < 0.3:
        content = {"activations": content, "input_ids": torch.zeros(1).long().expand(shape[:-1])}
    elif generator.random() < 0.2:
        kinds = (torch.complex64, torch.float64, torch.int8, torch.float8_e4m3fn, torch.bfloat16)
        content = [content, base.to(generator.choice(kinds)).view(-1, WIDTH)]
    elif generator.random() < 0.2:
        content = generator.choice(
            (
                torch.empty(1 << 40, 4, device="meta"),
                base.view(-1, WIDTH).to_sparse(),
                torch.quantize_per_tensor(base.view(-1, WIDTH), 0.1, 0, torch.qint8),
                torch.view_as_complex(base.view(-1, 2)).conj().imag.view(-1, WIDTH // 2),
            )
        )
    path = this.folder / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=generator.random() < 0.7)
    return path


class _Call:
    """Pickles as a function call, which a loader must not or may make."""

    def __init__(self, function: object, arguments: tuple[object, ...]) -> None:
        self.made_of = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.made_of


def _pickled(this: Try) -> Path:
    """Write an archive of torch, or a bare pickle, with values that are not tensors of rows."""
    generator = this.random
    size = generator.choice(SIZES)
    loop: list[object] = []
    loop.append(loop)
    circle: dict[str, object] = {"rows": torch.zeros(3, 2)}
    circle["again"] = circle
    twice: object = {"x": 1}
    for _ in range(60):
        twice = {"a": twice, "b": twice}
    content = generator.choice(
        (
            *(loop, circle, twice, {}, [], None, size, "x" * 100_000, {size: torch.zeros(2, 2)}),
            _Call(bytearray, (size,)),
            _Call(os.mkdir, (str(this.folder / "made"),)),
            _Call(torch.Size, ([size],)),
            {"x" * 50_000: torch.zeros(4, 2), "y": "\n" * 90},
            {f"x{n}": torch.zeros(2, 2) for n in range(40)},
            *([torch.zeros(0, 4)], [torch.zeros(4, 0)], [torch.zeros(2, 3), 7]),
        )
    )
    path = this.folder / "a.pt"
    if generator.random() < 0.7:
        torch.save(content, path, _use_new_zipfile_serialization=generator.random() < 0.7)
    else:
        path.write_bytes(pickle.dumps(content, generator.choice((0, 2, 4))))
    return path


def _state(this: Try) -> Path:
    """Copy a saved dataset with a state that names other files or is not valid."""
    generator = this.random
    source = this.folder / "set"
    shutil.copytree(this.shared / "dataset", source)
    names: tuple[object, ...] = (
        *("../../etc/passwd", "/dev/zero", "/proc/self/mem", "..", ".", "", "a\0b.arrow"),
        *("state.json", "pipe.arrow", "loop.arrow", "zero.arrow", "x" * 5000 + ".arrow", 7, None),
        *([], {}, "data-00000-of-00001.arrow", "\ud800.arrow"),
    )
    os.mkfifo(source / "pipe.arrow")
    (source / "loop.arrow").symlink_to("loop.arrow")
    (source / "zero.arrow").symlink_to("/dev/zero")
    files: object = [{"filename": generator.choice(names)} for _ in range(generator.choice((1, 3)))]
    files = generator.choice((files,) * 6 + ([], {}, 7, None, "x", [7], [{"filename": []}]))
    state: object = {"_data_files": files, "_indices_files": generator.choice((None, [], [7]))}
    text = json.dumps(generator.choice((state,) * 8 + ([state], "x", None, 7)))
    text = generator.choice((text,) * 8 + ("[" * 100_000, '{"a":' * 50_000, "1" * 9000, "", "{"))
    (source / "state.json").write_text(text)
    return source


def _table(this: Try) -> Path:
    """Write columns of strange types, in Arrow or Parquet."""
    generator = this.random
    floats = pa.array([[1.0] * 4] * 5)
    empty: list[list[float]] = [[]] * 5
    columns = (
        *(pa.array(empty, pa.list_(pa.float32(), 0)), pa.array(empty, pa.list_(pa.float32()))),
        *(pa.nulls(5), pa.nulls(5, pa.list_(pa.float32())), pa.array([[None] * 4] * 5)),
        *(pa.array([[[1.0] * 4] * 2] * 5), pa.array([[1.0] * 4] * 4 + [[1.0]])),
        *(pa.array(["x"] * 5), pa.array([b"x"] * 5), pa.array([[True, False]] * 5)),
        *(pa.array([{"a": [1.0]}] * 5), pa.array([[("a", 1.0)]] * 5, pa.map_("string", "double"))),
        pa.array([[1.0] * 4] * 5, pa.list_(pa.float16(), 4)),
        pa.array(["x"] * 5).dictionary_encode(),
        pa.array([[float("nan")] * 4] * 5),
    )
    chosen = {"acts": generator.choice(columns), "y" * generator.choice((1, 4000)): floats}
    if generator.random() < 0.5:
        chosen = {"acts": chosen["acts"]}
    table = pa.table(chosen)
    if generator.random() < 0.1:
        table = table.slice(0, 0)
    path = this.folder / generator.choice(("a.arrow", "a.parquet"))
    if path.suffix == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as sink:
            sink.write_table(table)
    else:
        try:
            pyarrow.parquet.write_table(table, path)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            pyarrow.parquet.write_table(pa.table({"acts": floats}), path)
    return path


def _nested(this: Try) -> Path:
    """Make a folder with pipes, links, and files of another format beside a good file."""
    generator = this.random
    source = this.folder / "set"
    source.mkdir()
    suffix = generator.choice((".pt", ".npy", ".npz", ".safetensors", ".arrow", ".parquet"))
    good = next(path for path in sorted(this.shared.iterdir()) if path.suffix == suffix)
    shutil.copy(good, source / f"{'9' * generator.choice((1, 200))}{suffix}")
    makers: Sequence[Callable[[Path], object]] = (
        os.mkfifo,
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(generator.choice(list(_others(this.shared))).read_bytes()),
    )
    for number in range(generator.choice((1, 2))):
        generator.choice(makers)(source / f"acts_{number}{suffix}")
    return source


def _others(shared: Path) -> Sequence[Path]:
    return [path for path in sorted(shared.iterdir()) if path.is_file()]


# The parser of flags caches parts of the sources: read once here, not in every child process.
parse(convert_shards.ConvertOptions, ["a", "b"], convert_shards.PROGRAM)
CAMPAIGN = Campaign(attempt, tries=3000, short=15, prepare=prepare)
