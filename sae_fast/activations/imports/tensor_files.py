""".pt files of torch.save and .safetensors files, mapped into memory rather than read.

Pickles are loaded with weights_only: one that would run code is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError, one_line
from sae_fast.activations.imports.arrays import WHOLE_FILE, Arrays, LazyArrays, SourceArray, short

MOST_OBJECTS = 100_000  # in a .pt file
# Types as the header of a .safetensors file names them.
SAFETENSORS_TYPES = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


@contextmanager
def open_torch(path: Path) -> Iterator[Arrays]:
    """Open the tensors of a .pt file: one, or all in nested dictionaries and lists."""
    content, records = _load(path)
    yield _Collection(path, records).of(content)


def read_torch_values(path: Path) -> dict[str, int | float | str]:
    """Return the numbers and texts beside the tensors of a .pt file that holds a dictionary.

    The ones in a dictionary inside it have its name and "/" before theirs.
    """
    content, _ = _load(path)
    if not isinstance(content, Mapping):
        return {}
    inner = [(name, part) for name, part in content.items() if isinstance(part, Mapping)]
    return _plain_values(content) | {
        f"{name}/{key}": value for name, part in inner for key, value in _plain_values(part).items()
    }


def _plain_values(content: Mapping[Any, Any]) -> dict[str, int | float | str]:
    kinds = int | float | str
    return {str(name): value for name, value in content.items() if isinstance(value, kinds)}


def _load(path: Path) -> tuple[Any, Counter[int] | None]:
    """Return the content of a .pt file, its tensors mapped, and the sizes of its records."""
    # Files of torch before 1.6 are no zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    records = _records(path) if mapped else None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise almost any kind
        text = one_line(error)
        if isinstance(error, RuntimeError) and "weights_only" not in text:
            raise
        is_refused = isinstance(error, pickle.UnpicklingError)
        if not is_refused or ("GLOBAL" not in text and "Unsupported" not in text):
            # The text of torch proposes to load the file as code.
            raise ShardError(
                f"{path}: cannot be read, damaged or cut short: no file of torch.save, or it holds "
                "objects that are not tensors, which could run code"
            ) from error
        what = short(text.partition("GLOBAL ")[2].split(" ")[0])
        raise ShardError(
            f"{path}: holds Python objects beside tensors{f' ({what})' if what else ''}, and "
            "loading those would run their code; save the tensors alone, with torch.save"
        ) from error
    return content, records


def _records(path: Path) -> Counter[int]:
    """Count the records of each size in an archive; they hold the numbers of its tensors."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ShardError(f"{path}: {short(member.filename)} is compressed, not by torch")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ShardError(f"{path}: its records are larger than the file")
    return Counter(member.file_size for member in members)


class _Collection:
    """The tensors of a file by name; "/" stands between the names of nested dictionaries.

    Args:
        path: of the file.
        records: how many there are of each size; None: tensors were read, not mapped.
    """

    def __init__(self, path: Path, records: Counter[int] | None) -> None:
        self._path, self._records = path, records
        self._found: dict[str, list[SourceArray]] = {}
        self._left = MOST_OBJECTS
        self._storages: set[int] = set()  # where those seen begin

    def of(self, content: Any) -> Arrays:
        """Return all tensors in `content`."""
        self._collect(WHOLE_FILE, content)
        return self._found

    def _collect(self, name: str, value: Any) -> None:
        self._left -= 1  # dictionaries that hold each other twice have as many paths as they like
        if self._left < 0:
            raise ShardError(f"{self._path}: holds more than {MOST_OBJECTS:,} objects")
        if isinstance(value, Tensor):
            self._found[name] = [self._array(name, value)]
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._collect(f"{name}/{key}" if name else str(key), item)
        elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            if not all(isinstance(item, Tensor) for item in value):
                raise ShardError(
                    f"{self._path}: a list{_of(name)} holds other things beside tensors"
                )
            self._found[name] = [self._array(name, item) for item in value]

    def _array(self, name: str, tensor: Tensor) -> SourceArray:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ShardError(f"{self._path}: a tensor{_of(name)} is sparse or quantized, not dense")
        whole, storage = tensor.detach(), tensor.untyped_storage()
        stored, begin = storage.nbytes(), storage.data_ptr()
        if self._records is not None and begin not in self._storages:
            self._storages.add(begin)
            if not self._records[stored]:
                raise ShardError(
                    f"{self._path}: a tensor{_of(name)} is larger than what the file has for it"
                )
            self._records[stored] -= 1
        entries = whole if whole.ndim else whole.reshape(1)
        return SourceArray(
            tuple(whole.shape), whole.dtype, lambda start, stop: entries[start:stop].clone(), stored
        )


def _of(name: str) -> str:
    return f" at {short(repr(name))}" if name else ""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Arrays]:
    """Open the tensors of a .safetensors file."""
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        size = path.stat().st_size
        yield LazyArrays(file.keys(), lambda name: _slice_array(file, name, size))


def _slice_array(file: Any, name: str, size: int) -> SourceArray:
    piece = file.get_slice(name)
    dtype = SAFETENSORS_TYPES.get(str(piece.get_dtype()))
    shape = tuple(piece.get_shape())
    if not shape:  # of which the library gives no slice
        return SourceArray(shape, dtype, lambda _start, _stop: file.get_tensor(name)[None], size)
    return SourceArray(shape, dtype, lambda start, stop: piece[start:stop], size)
