"""Files of tensors: written with the permissions that other files get, verified when read.

The header of a file written here carries a checksum of names, types, shapes and content. A file
without one, of an older version or another tool, is read all the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_fast.memory import require_memory

_CHECKSUM = "crc32"
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; raise OSError where it cannot.

    Its header has `metadata`, by default a checksum that `load_tensors` compares. The library makes
    its files readable for the owner alone, so the mode that the system gives an ordinary new file
    is put back.
    """
    require_unicode(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # One entry: the library writes several in an order that changes from file to file.
    header = {_CHECKSUM: _checksum(tensors)} if metadata is None else dict(metadata)
    require_memory()
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file(tensors, path, header)
    except SafetensorError as error:  # what a full disk raises
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path}: cannot be written ({error})") from None
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    path.chmod(mode)


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; raise ValueError, naming it, where its content is damaged."""
    _require_regular(path)
    require_memory()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    except (RuntimeError, KeyError, TypeError, OverflowError) as error:  # of types torch lacks
        text = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable safetensors file ({text})") from None
    expected = metadata.get(_CHECKSUM)
    if expected is not None and expected != _checksum(tensors):
        raise ValueError(f"{path}: the content is damaged, its checksum does not match")
    return tensors


def has_checksum(path: Path) -> bool:
    """Return whether `load_tensors` can tell damaged content of a file."""
    require_memory()
    try:
        with safe_open(path, framework="pt") as file:
            return _CHECKSUM in (file.metadata() or {})
    except SafetensorError:
        return False


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a file by name, from its header; raise ValueError."""
    _require_regular(path)
    require_memory()
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def checked_tensors(
    place: object,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    because: str = "",
) -> dict[str, Tensor]:
    """Return the tensors with the types of `expected`; raise ValueError for what does not fit.

    Names and shapes must equal the ones in `expected`. A floating-point tensor may have any
    precision of `FLOATS` and must be finite; an integer one must have the expected type.

    Args:
        place: the file, for the message.
        tensors: what was read.
        expected: tensors of any content, also meta ones.
        because: what the shapes follow from, for the message.
    """
    checked = {}
    for name, like in expected.items():
        if name not in tensors:
            raise ValueError(f"{place}: has no tensor {name}")
        tensor = tensors[name]
        if tensor.shape != like.shape:
            raise ValueError(
                f"{place}: {name} must have shape {tuple(like.shape)}{because}, "
                f"got {tuple(tensor.shape)}"
            )
        wanted = FLOATS if like.is_floating_point() else (like.dtype,)
        if tensor.dtype not in wanted:
            kind = "floating-point numbers" if like.is_floating_point() else str(like.dtype)
            raise ValueError(f"{place}: {name} must be of {kind}, got {tensor.dtype}")
        checked[name] = tensor.to(like.dtype)
        if not is_finite(checked[name]):
            raise ValueError(f"{place}: {name} holds NaN or Inf")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{place}: unknown tensor {unknown[0][:60]}")
    return checked


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file's bytes, in hex; raise OSError or ValueError."""
    _require_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without memory of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and bytes, independent of the order in the file."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), value)
        if tensor.numel() > 0:
            content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            value = zlib.crc32(content.numpy().data, value)
    return f"{value:08x}"


def require_unicode(path: str | Path) -> None:
    """Raise ValueError for a path that is not UTF-8, which libraries for files and plots refuse."""
    whole = os.path.realpath(path)
    try:
        whole.encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(whole).decode("utf-8", "backslashreplace")
        raise ValueError(f"{shown}: must be a path in UTF-8, rename it") from None


def _require_regular(path: Path) -> None:
    require_unicode(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: is no regular file")
