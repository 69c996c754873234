"""Checks of the arguments of ops, and the words of every message.

A message is "op: argument must be ..., got ..."; the shape is checked first, then dtype, device,
range and layout, and last, where that need not wait for a device, the numbers inside. The compiled
ops (csrc/ops/check.h and its neighbours) check the same things in the same words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT32 = (torch.float32,)
GATHERED = (torch.float32, torch.bfloat16, torch.float16)
MOST_ENTRIES = 2**31 - 1  # entries and rows of a code: they are numbered in int32


class Call:
    """The checks of one call: the op's name, and the tensor whose device the others share."""

    def __init__(self, name: str, like: str, tensor: Tensor | None) -> None:
        self.name = name
        self.like = like
        self.device = None if tensor is None else tensor.device

    def require(self, condition: bool, must: str, got: str = "") -> None:
        """Raise RuntimeError unless `condition`; `must` says what must hold, `got` what was met."""
        if condition is True and not torch.compiler.is_compiling():
            return  # torch._check imports sympy at its first call, 0.4 s of a command's time
        message = f"{self.name}: {must}, got {got}" if got else f"{self.name}: {must}"
        torch._check(condition, lambda: message)  # type: ignore[no-untyped-call]

    def tensor(
        self,
        name: str,
        tensor: Tensor,
        sizes: Sequence[int | None],  # None: any
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        """Check a tensor's shape and dtype, and that it is on the device of the call's tensor."""
        self.shape(name, tensor, sizes)
        self.dtype(name, tensor, dtypes)
        self.same_device(name, tensor)

    def shape(self, name: str, tensor: Tensor, sizes: Sequence[int | None]) -> None:
        """Check a tensor's sizes, of which None allows any."""
        shape = tuple(tensor.shape)
        wanted = ", ".join("*" if size is None else str(size) for size in sizes)
        must = f"{name} must have shape [{wanted}]"
        self.require(len(shape) == len(sizes), must, str(list(shape)))
        for got, size in zip(shape, sizes, strict=True):
            if size is not None:
                self.require(got == size, must, str(list(shape)))

    def dtype(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        """Check a tensor's dtype; float64 passes where float32 does, for the reference."""
        # The compiled ops refuse float64 themselves.
        known = tensor.dtype in dtypes or (
            tensor.dtype == torch.float64 and torch.float32 in dtypes
        )
        names = [dtype_name(dtype) for dtype in dtypes]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
        self.require(known, f"{name} must be {wanted}", dtype_name(tensor.dtype))

    def same_shape(self, name: str, tensor: Tensor, like: str, other: Tensor) -> None:
        """Check that a tensor has the shape of `other`, the argument named `like`."""
        must = f"{name} must have the shape of {like}, {list(other.shape)}"
        self.require(tensor.dim() == other.dim(), must, str(list(tensor.shape)))
        for got, size in zip(tensor.shape, other.shape, strict=True):
            self.require(got == size, must, str(list(tensor.shape)))

    def same_device(self, name: str, tensor: Tensor) -> None:
        """Check that a tensor is on the device of the call's tensor."""
        must = f"{name} must be on {self.device} like {self.like}"
        self.require(tensor.device == self.device, must, str(tensor.device))

    def in_place(self, name: str, tensor: Tensor) -> None:
        """Check that a tensor which the op writes is contiguous: a copy would not do."""
        self.require(tensor.is_contiguous(), f"{name} is changed in place and must be contiguous")

    def usable(self, name: str, tensor: object) -> None:
        """Check that torch can compute with a tensor: dense, backed by its storage, not meta."""
        given = type(tensor).__name__
        self.require(isinstance(tensor, Tensor), f"{name} must be a tensor", given)
        assert isinstance(tensor, Tensor)
        is_dense = tensor.layout == torch.strided and not tensor.is_quantized
        kind = str(tensor.dtype if tensor.is_quantized else tensor.layout).removeprefix("torch.")
        self.require(is_dense, f"{name} must be a dense tensor", kind)
        self.require(not tensor.is_meta, f"{name} must be on a device", "meta")
        if tensor.numel() == 0:
            return
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
        needed, size = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
        must = f"{name} must have a storage of at least {needed} bytes"
        self.require(needed <= size, must, str(size))

    def partition(self, name: str, offsets: Tensor, entries: int) -> None:
        """Check that offsets ascend from 0 to the number of entries."""
        self.require(offsets.numel() > 0, f"{name} must have at least one element", "none")
        first, last = int(offsets[0]), int(offsets[-1])
        ascending = first == 0 and last == entries and bool((offsets.diff() >= 0).all())
        must = f"{name} must ascend from 0 to the number of entries, {entries}"
        self.require(ascending, must, f"{first} to {last}")

    def below(self, name: str, numbers: Tensor, bound: int) -> None:
        """Check that all integers of a tensor are in [0, bound)."""
        if numbers.numel() > 0:
            low, high = (int(end) for end in torch.aminmax(numbers))
            wrong = low if low < 0 else high
            self.require(low >= 0 and high < bound, f"{name} must be in [0, {bound})", str(wrong))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_half_sums(op_name: str, device: torch.device) -> None:
    """Raise RuntimeError where sums of float16 products would be rounded to float16 on the device.

    torch asks cuBLAS for such sums where its flag says so, also where the result is float32; no
    bound of a rounding error here would hold.
    """
    if device.type == "cuda" and torch.backends.cuda.matmul.allow_fp16_accumulation:
        raise RuntimeError(
            f"{op_name}: torch.backends.cuda.matmul.allow_fp16_accumulation must be False, got True"
        )


def check_usable(op_name: str, **tensors: object) -> None:
    """Check tensors which torch's own ops read before one of our ops sees them."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        Call(op_name, name, tensor if isinstance(tensor, Tensor) else None).usable(name, tensor)


def check_code(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32, the shape of values
    offsets: Tensor | None,  # [N + 1] int64
    d_sae: int,
) -> None:
    """Check a code that a caller made, on the CPU its indices and offsets too."""
    rest = {} if offsets is None else {"offsets": offsets}
    check_usable("SparseCode", values=values, indices=indices, **rest)
    call = Call("SparseCode", "values", values)
    call.require(isinstance(d_sae, int) and d_sae >= 1, "d_sae must be at least 1", str(d_sae))
    call.tensor("indices", indices, (None, None) if offsets is None else (None,), (torch.int32,))
    call.dtype("values", values, FLOAT32)
    call.same_shape("values", values, "indices", indices)
    if offsets is not None:
        call.tensor("offsets", offsets, (None,), (torch.int64,))
        call.require(offsets.size(0) >= 1, "offsets must have N + 1 elements", "none")
    n_rows = indices.size(0) if offsets is None else offsets.size(0) - 1
    call.require(n_rows <= MOST_ENTRIES, f"at most {MOST_ENTRIES} rows", str(n_rows))
    call.require(
        indices.numel() <= MOST_ENTRIES, f"at most {MOST_ENTRIES} entries", str(indices.numel())
    )
    if not indices.is_cuda:
        check_entries(indices, offsets, d_sae)


def check_entries(
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    d_sae: int,
) -> None:
    """Check the numbers of a code: offsets that partition the entries, indices below d_sae."""
    call = Call("SparseCode", "indices", indices)
    if offsets is not None:
        call.partition("offsets", offsets, indices.numel())
    call.below("indices", indices, d_sae)
