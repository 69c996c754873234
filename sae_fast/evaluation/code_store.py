"""`CodeStore`: the codes of the rows of shards, kept on disk block by block during a pass.

A pass over latents looks at each code several times, but encoding is what takes long. A file
appears when it is whole, so a pass that was killed encodes only the blocks that are missing. An
entry takes 8 bytes: 256 bytes a row at an L0 of 32.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sae_fast.activations.background import prefetch
from sae_fast.atomic_files import replacing
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.evaluation.text_rows import AHEAD, Integers, RowBlock, TextRows
from sae_fast.ops import Code, DenseCode
from sae_fast.tensor_files import load_tensors, save_tensors

Floats = npt.NDArray[np.float32]

ENTRY_BYTES = 8
_OFFSETS, _ROWS, _VALUES = "latent_offsets", "rows", "values"


@dataclass(frozen=True)
class BlockCodes:
    """The entries of a block of rows that fire, latent after latent, rows ascending within each.

    Attributes:
        first: the number of the first row of the block.
        n_rows: rows of the block, with rows that are left out.
        offsets: [F + 1]: latent j has the entries from offsets[j] up to offsets[j + 1].
        rows: [nnz] int32, within the block.
        values: [nnz].
    """

    first: int
    n_rows: int
    offsets: Integers
    rows: npt.NDArray[np.int32]
    values: Floats

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.offsets) - 1

    @cached_property
    def latents(self) -> Integers:
        """The latent of each entry, [nnz]."""
        return np.repeat(np.arange(self.d_sae), np.diff(self.offsets))

    @cached_property
    def strengths(self) -> Floats:
        """The magnitude of each entry, [nnz]: codes of some architectures have signs."""
        return np.abs(self.values)

    def of_rows(
        self,
        chosen: npt.NDArray[np.bool_],  # [n_rows]
    ) -> BlockCodes:
        """Return the entries of some rows alone."""
        kept = chosen[self.rows]
        before = np.concatenate([[0], np.cumsum(kept)])
        return replace(
            self, offsets=before[self.offsets], rows=self.rows[kept], values=self.values[kept]
        )


def block_codes(
    code: Code,  # of n rows
    first: int,
    n_rows: int,
    places: Integers,  # [n] ascending, of these rows in the block
) -> BlockCodes:
    """Return the entries of a code as the ones of a block of `n_rows` rows."""
    listed = code.listed() if isinstance(code, DenseCode) else code
    offsets, entries, rows = (part.cpu() for part in listed.latent_major())
    return BlockCodes(
        first,
        n_rows,
        offsets.numpy().astype(np.int64),
        places.astype(np.int32)[rows.numpy()] if len(places) < n_rows else rows.numpy(),
        listed.values.detach().float().cpu().flatten()[entries.long()].numpy(),
    )


class CodeStore:
    """The codes of all rows, encoded when they are first asked for.

    Args:
        directory: of the files; it exists.
        sae: the model.
        text: the rows.
        block_rows: about how many rows are encoded together.
    """

    def __init__(
        self, directory: Path, sae: SparseAutoencoder, text: TextRows, block_rows: int
    ) -> None:
        self.directory = directory
        self.text = text
        self.blocks = text.blocks(block_rows)
        self._sae = sae

    def __iter__(self) -> Generator[BlockCodes, None, None]:
        """Yield the codes of each block in order; the missing ones are encoded and written.

        A thread encodes or reads them ahead of the caller.
        """
        return prefetch(self._all(), AHEAD, name="codes", does="encodes")

    def _all(self) -> Generator[BlockCodes, None, None]:
        missing = [item for item in self.blocks if not self._path(item).exists()]
        fresh = self._encode(missing)
        awaited = iter(missing)
        following = next(awaited, None)
        for item in self.blocks:
            if item is following:
                following = next(awaited, None)
                yield next(fresh)
            else:
                yield self._load(item)

    def _encode(self, blocks: list[RowBlock]) -> Iterator[BlockCodes]:
        with self._sae.kept_copies(), torch.no_grad():
            for item, x, places in self.text.read(blocks):
                codes = self.codes_of(item, x, places)
                with replacing(self._path(item), flush=False) as temporary:
                    tensors = {
                        _OFFSETS: codes.offsets,
                        _ROWS: codes.rows,
                        _VALUES: codes.values,
                    }
                    save_tensors(temporary, {k: torch.from_numpy(v) for k, v in tensors.items()})
                yield codes

    def codes_of(
        self,
        item: RowBlock,
        x: torch.Tensor,  # [n, D], of the rows that are served
        places: Integers,  # [n], of these rows in the block
    ) -> BlockCodes:
        """Return the codes of a block."""
        if not len(x):
            empty = np.zeros(self._sae.d_sae + 1, np.int64)
            return BlockCodes(
                item.first, item.rows, empty, np.zeros(0, np.int32), np.zeros(0, np.float32)
            )
        return block_codes(self._sae.encode(x), item.first, item.rows, places)

    def _load(self, item: RowBlock) -> BlockCodes:
        """Read the codes of a block, or encode them again where the file is damaged."""
        path = self._path(item)
        try:
            tensors = {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
            return BlockCodes(
                item.first, item.rows, tensors[_OFFSETS], tensors[_ROWS], tensors[_VALUES]
            )
        except (ValueError, KeyError):
            path.unlink()
            return next(self._encode([item]))

    def _path(self, item: RowBlock) -> Path:
        return self.directory / f"codes_{item.first:012d}.safetensors"
