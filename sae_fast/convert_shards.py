"""Turn saved activations into shards: `python -m sae_fast.convert_shards SRC DST`.

SRC is a directory of .pt, .npy, .npz or .safetensors files, a folder of zarr, a dataset of Arrow or
Parquet files, such as the cached activations of SAELens, a single file or a quoted pattern. Every
row is read again.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import setting
from sae_fast.output_streams import run_command
from sae_fast.progress_bar import progress_bar

if TYPE_CHECKING:
    from sae_fast.activations import ShardMetadata
    from sae_fast.activations.imports import Conversion
    from sae_fast.activations.imports.conversion import ConversionResult
    from sae_fast.activations.imports.saved_activations import SavedActivations

PROGRAM = "python -m sae_fast.convert_shards"
USAGE = f"{PROGRAM} SRC DST [flags]"
EXIT_INTERRUPTED = 130
FOLDER_BYTES = 200  # in the name of a folder, of which file systems take 255
DESCRIBED = ("model", "revision", "hook", "layer", "tokenizer", "dataset")


@configuration()
@dataclass(frozen=True)
class ConvertOptions(ConfigFile):
    """Turn saved activations into HDF5 shards, and compare every row."""

    source: str | None = setting(None, positional=True, metavar="SRC")
    """Directory of .pt, .npy, .npz, .safetensors, .arrow or .parquet files or of zarr folders, one
    of them, or a quoted pattern; also an address of fsspec, such as s3://bucket/folder."""
    out: Path | None = setting(None, positional=True, metavar="DST")
    """Directory for the shards: new, empty, or left by the same conversion, interrupted."""
    key: str | None = setting(None)
    """Name of the activations in the files; default: activations, or the only ones there."""
    all_keys: bool = setting(False)
    """Convert all activations there are, each into a folder of its own name."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = setting(None)
    """Type in which rows are stored; default: the type in the files."""
    shard_rows: int | None = setting(None)
    """Rows of a shard at most, padding among them; default: a gigabyte. [rows]"""
    compression: Literal["none", "gzip", "zstd", "blosc2"] = setting("none")
    """Compression of the shards; zstd and blosc2 need hdf5plugin."""
    heldout_rows: int = setting(0)
    """Keep the last rows, in whole sequences, for evaluation: heldout_*.h5. [rows]"""
    d_in: int | None = setting(None, at_least=1)
    """Width of a row; joins the last axes where several make up one, such as heads. [numbers]"""
    skip_nonfinite: bool = setting(False)
    """Drop rows that hold NaN or Inf."""
    model: str | None = setting(None)
    """Noted in the shards: the model."""
    revision: str | None = setting(None)
    """Noted in the shards: its revision."""
    hook: str | None = setting(None)
    """Noted in the shards: the hook point; default: --key, where it has a dot."""
    layer: int | None = setting(None)
    """Noted in the shards: the layer; default: the number in the hook."""
    tokenizer: str | None = setting(None)
    """Noted in the shards: the tokenizer."""
    dataset: str | None = setting(None)
    """Noted in the shards: the text."""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if self.key is not None and self.all_keys:
            raise ValueError("all_keys takes every key: give --key or --all-keys")


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(ConvertOptions, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input, 130 for an interrupt."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        options = parse(ConvertOptions, arguments, USAGE)
        if options.source is None or options.out is None:
            raise ValueError(f"source and out must be given: {PROGRAM} SRC DST")
        conversions = _prepare(options, options.source, options.out)
        _announce(conversions)
        for conversion in conversions:
            _convert(conversion)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues with the next shard", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _prepare(options: ConvertOptions, place: str, out: Path) -> list[Conversion]:
    """Prepare a conversion for every key."""
    from sae_fast import ops  # noqa: F401  # a missing compiled module is refused before the work
    from sae_fast.activations import ShardMetadata
    from sae_fast.activations.imports import ConversionOptions, prepare
    from sae_fast.activations.imports.formats import find_files
    from sae_fast.activations.imports.saved_activations import candidates, choose_key, inspect

    stored = ConversionOptions(
        options.dtype,
        options.shard_rows,
        options.compression,
        options.heldout_rows,
        options.skip_nonfinite,
        ShardMetadata(**{name: getattr(options, name) for name in DESCRIBED}),
    )
    paths = find_files(place)
    if not options.all_keys:
        keys = {choose_key(paths, options.key): out}
    else:
        keys = {key: out / _folder(key) for key in candidates(paths[0])}
        usable = all(
            len(os.fsencode(directory.name)) <= FOLDER_BYTES for directory in keys.values()
        )
        if len(set(keys.values())) < len(keys) or not keys or not usable:
            choose_key(paths, None)  # tells what there is
            raise ValueError(f"all_keys: names in {paths[0]} do not make different folders")
    conversions = []
    for key, directory in keys.items():
        source = inspect(paths, key, options.d_in)
        metadata = _described(stored.metadata, key)
        conversions.append(prepare(source, directory, replace(stored, metadata=metadata)))
    return conversions


def _folder(key: str) -> str:
    return re.sub(r"[^\w.-]+", "_", key).strip(".") or "activations"


def _described(metadata: ShardMetadata, key: str) -> ShardMetadata:
    """Complete metadata by the hook and layer in the name of the activations."""
    hook = metadata.hook or (key if "." in key else None)
    number = re.search(r"\.(\d+)\.", f".{hook}.") if hook else None
    layer = metadata.layer if number is None or metadata.layer is not None else int(number[1])
    return replace(metadata, hook=hook, layer=layer)


def _announce(conversions: list[Conversion]) -> None:
    """Print the files to convert and the space that their shards take."""
    from sae_fast.activations.imports.conversion import check_space

    free = check_space(conversions)
    for conversion in conversions:
        source, storage = conversion.source, conversion.storage.name
        print(
            f"{_count(len(source.files), 'file')}{_named(source)}: {source.rows:,} rows of "
            f"{source.d_in}{_in_sequences(source)}, "
            f"stored as {storage} in {conversion.directory}"
        )
        if beside := ", ".join(source.columns):
            print(f"  with {beside}{'; padding is dropped' if source.files[0].mask else ''}")
        if conversion.finished:
            print("  finished already: every row is compared once more")
        elif conversion.done:
            print(
                f"  continuing: {len(conversion.done)} of {len(conversion.shards)} shards are there"
            )
    needed = sum(conversion.bytes_at_most for conversion in conversions)
    print(f"up to {needed / 1e9:.3f} GB to write, {free / 1e9:.1f} GB free", flush=True)


def _named(source: SavedActivations) -> str:
    return f", {source.key!r}" if source.key else ""


def _in_sequences(source: SavedActivations) -> str:
    return f" in {_count(source.sequences, 'sequence')}" if source.sequences else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _convert(conversion: Conversion) -> None:
    """Convert one source with a progress bar: every row counts twice, written and compared."""
    from sae_fast.activations.imports import convert

    rows = sum(shard.rows for shard in conversion.shards)
    existing = sum(shard.rows for shard in conversion.shards if shard.name in conversion.done)
    with progress_bar(total=2 * rows - existing, unit="row", unit_scale=True) as bar:
        result = convert(conversion, lambda count: bar.update(count) and None)
    _conclude(conversion, result)


def _conclude(conversion: Conversion, result: ConversionResult) -> None:
    from sae_fast.activations.files import shards_in

    directory = conversion.directory
    paths = shards_in(directory)
    size = sum(path.stat().st_size for path in paths)
    heldout = f" and {result.heldout_rows:,} held out" if result.heldout_rows else ""
    shards = _count(len(paths), "shard")
    print(f"{result.rows:,} rows{heldout} in {shards}, {size / 1e9:.3f} GB: {directory}")
    for count, what in ((result.padding, "padding"), (result.nonfinite, "NaN or Inf")):
        if count:
            print(f"  {count:,} rows of {what} left out")
    rounded = f"; rounding moved rows by {result.change:.1e} of their length"
    print(f"  every row read again and equal{rounded if result.change else ''}")
    print(f"train on it: python -m sae_fast.train --shard-dir {directory} --k 32", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
