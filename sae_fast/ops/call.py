"""What the checks of an op's arguments are made of: shape, then dtype, device, range, layout."""

import torch
from torch import Tensor

PRECISIONS = ("screened", "fp32", "bf16", "fp16")
MASTER = (torch.float32,)
GATHERED = (torch.float32, torch.bfloat16, torch.float16)
Sizes = tuple[int | None, ...]


class Call:
    """The checks of one call: the op's name, and the tensor whose device the others share."""

    def __init__(self, name: str, like: str, tensor: Tensor | None) -> None:
        self.name = name
        self.like = like
        self.device = None if tensor is None else tensor.device

    def require(self, condition: bool, must: str, got: str = "") -> None:
        """`must` says what must hold, `got` what was there."""
        message = f"{self.name}: {must}, got {got}" if got else f"{self.name}: {must}"
        torch._check(condition, lambda: message)  # type: ignore[no-untyped-call]

    def tensor(
        self, name: str, tensor: Tensor, sizes: Sizes, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        """A tensor of these sizes (None is any) and dtypes, on the device of the first."""
        shape = tuple(tensor.shape)
        wanted = ", ".join("*" if size is None else str(size) for size in sizes)
        must = f"{name} must have shape [{wanted}]"
        self.require(len(shape) == len(sizes), must, str(list(shape)))
        for got, size in zip(shape, sizes, strict=True):
            if size is not None:
                self.require(got == size, must, str(list(shape)))
        self.dtype(name, tensor, dtypes)
        self.same_device(name, tensor)

    def dtype(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        """One of these dtypes; a master or a gathered tensor may be float64 too."""
        # float64 is the reference's own: the compiled ops refuse it themselves.
        known = tensor.dtype in dtypes or (
            tensor.dtype == torch.float64 and dtypes in (MASTER, GATHERED)
        )
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
        self.require(known, f"{name} must be {wanted}", str(tensor.dtype).removeprefix("torch."))

    def usable(self, name: str, tensor: object) -> None:
        """A tensor that torch can compute with: dense, its elements in its storage, not meta."""
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

    def same_shape(self, name: str, tensor: Tensor, like: str, other: Tensor) -> None:
        """The shape of `other`, which is named `like`."""
        must = f"{name} must have the shape of {like}, {list(other.shape)}"
        self.require(tensor.dim() == other.dim(), must, str(list(tensor.shape)))
        for got, size in zip(tensor.shape, other.shape, strict=True):
            self.require(got == size, must, str(list(tensor.shape)))

    def same_device(self, name: str, tensor: Tensor) -> None:
        """The device of the first tensor."""
        must = f"{name} must be on {self.device} like {self.like}"
        self.require(tensor.device == self.device, must, str(tensor.device))

    def code(self, values: Tensor | None, indices: Tensor, offsets: Tensor | None) -> int:
        """Indices, and values of their shape, with or without offsets; returns the rows."""
        sizes = (None, None) if offsets is None else (None,)
        self.tensor("indices", indices, sizes, (torch.int32,))
        if values is not None:
            self.dtype("values", values, MASTER)
            self.same_shape("values", values, "indices", indices)
        if offsets is None:
            return indices.size(0)
        self.tensor("offsets", offsets, (None,), (torch.int64,))
        self.require(offsets.size(0) >= 1, "offsets must have N + 1 elements", "none")
        return offsets.size(0) - 1

    def latents(self, latent_offsets: Tensor) -> int:
        """Offsets of a latent-major list; returns d_sae."""
        self.tensor("latent_offsets", latent_offsets, (None,), (torch.int64,))
        count = latent_offsets.size(0)
        must = "latent_offsets must have d_sae + 1 >= 2 elements"
        self.require(count >= 2, must, str(count))
        return count - 1

    def precision(self, precision: str) -> None:
        """A mode of the encoder's product."""
        must = "precision must be screened, fp32, bf16 or fp16"
        self.require(precision in PRECISIONS, must, precision)

    def in_place(self, name: str, tensor: Tensor) -> None:
        """Written to, and so contiguous."""
        self.require(tensor.is_contiguous(), f"{name} is changed in place and must be contiguous")
