"""Rows with the codes that a dictionary gives for them, kept beside its files to prove it by.

The codes are computed by the plain formula in float64. `check` computes them anew from the files,
by the formula, which must give the same numbers, and by the model, in float32. There an entry may
be missing or added where its value is within rounding of the limit at which latents are selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_fast.atomic_files import replacing
from sae_fast.interop import DictionaryError, PlainDictionary
from sae_fast.tensor_files import FLOATS, load_tensors, save_tensors

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder

_NAME, _ENDING = "expected_codes", ".safetensors"
N_ROWS = 32
_ACTIVE = 4  # latents that a row is made of
_TOLERANCE = 1e-5  # of float32, times the largest value
_TENSORS = {"rows", "token", "latent", "value", "reconstruction"}


@dataclass(frozen=True)
class Agreement:
    """The differences of results from the expected ones.

    Attributes:
        n_rows: rows that were compared.
        formula: the largest difference of a code value by the plain formula in float64.
        code: the largest difference of a code value of the model, away from the limits.
        reconstruction: the largest difference of a number in its reconstructions.
        scale: the largest code value and the largest number of a reconstruction.
        at_limits: entries that are within rounding of being selected, and are not on both sides.
    """

    n_rows: int
    formula: float
    code: float
    reconstruction: float
    scale: tuple[float, float]
    at_limits: int

    @property
    def holds(self) -> bool:
        """Whether all differences are within rounding."""
        values, numbers = (max(size, 1.0) for size in self.scale)
        exact = self.formula <= 1e-6 * values
        near = self.code <= _TOLERANCE * values
        return exact and near and self.reconstruction <= 10 * _TOLERANCE * numbers

    def __str__(self) -> str:
        return (
            f"{self.n_rows} rows: codes off by at most {self.code:.1e} of {self.scale[0]:.3g}, "
            f"reconstructions by {self.reconstruction:.1e} of {self.scale[1]:.3g}"
        )


@torch.no_grad()
def sample_rows(dictionary: PlainDictionary, n_rows: int = N_ROWS) -> Tensor:
    """Return rows [n_rows, D] that some latents are active on, the same for the same dictionary.

    Each is a sum of a few encoder directions, as long as their latents need to be active, and noise
    of a tenth of its norm; around b_dec where that is subtracted.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (n_rows, min(_ACTIVE, dictionary.d_sae))
    latents = torch.randint(dictionary.d_sae, shape, generator=generator)
    chosen = dictionary.W_enc[latents]  # [n, 4, D]
    norms = torch.linalg.vector_norm(chosen, dim=2).clamp_min(1e-8)
    level = 1 + dictionary.b_enc[latents].abs()
    if dictionary.threshold is not None:
        level = level + 2 * dictionary.threshold.expand(dictionary.d_sae)[latents]
    rows: Tensor = (chosen * (level / norms.square())[..., None]).sum(dim=1)
    noise = torch.randn(rows.shape, generator=generator)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows + 0.1 * lengths * noise / dictionary.d_in**0.5
    return rows + dictionary.b_dec if dictionary.subtract_b_dec else rows


def file_of(place: Path) -> Path:
    """Return where the rows of a dictionary are, which is a directory or a file of one."""
    if place.is_dir():
        return place / f"{_NAME}{_ENDING}"
    return place.parent / f"{_NAME}_{place.stem}{_ENDING}"


def places_in(directory: Path) -> list[Path]:
    """Return the dictionaries in a directory that have such rows; none: [the directory]."""
    found = []
    for path in sorted(directory.glob(f"{_NAME}*{_ENDING}")):
        name = path.stem.removeprefix(_NAME).removeprefix("_")
        found.append(directory / f"{name}{_ENDING}" if name else directory)
    return found or [directory]


def write(dictionary: PlainDictionary, place: Path) -> None:
    """Write rows and what the dictionary gives for them, by the plain formula in float64."""
    rows = sample_rows(dictionary)
    code = dictionary.encode(rows)
    token, latent = code.nonzero(as_tuple=True)
    tensors = {
        "rows": rows,
        "token": token.int(),
        "latent": latent.int(),
        "value": code[token, latent],
        "reconstruction": dictionary.decode(code, rows),
    }
    with replacing(file_of(place)) as temporary:
        save_tensors(temporary, tensors)


def check(dictionary: PlainDictionary, sae: SparseAutoencoder, place: Path) -> Agreement:
    """Compare a dictionary, and the model that it is read as, with the rows beside its files.

    Raises DictionaryError where there are no such rows, or they do not fit.
    """
    expected = _read(file_of(place), dictionary)
    rows = expected["rows"].float()
    code = torch.zeros(len(rows), dictionary.d_sae, dtype=torch.float64)
    code[expected["token"].long(), expected["latent"].long()] = expected["value"].double()
    by_formula = dictionary.encode(rows)
    encoded = sae.encode(rows, units="raw" if dictionary.token_norm is None else "normalized")
    by_model = encoded.dense().double()
    x_hat = sae.decode(encoded, rows).double()
    values, numbers = float(code.abs().max()), float(expected["reconstruction"].abs().max())
    # Where an entry is on one side only, its value is compared with the least active one of its
    # row: a threshold or a k-th value lies just below that.
    on_one_side = (code != 0) != (by_model != 0)
    least = torch.where(code != 0, code.abs(), torch.inf).amin(dim=1, keepdim=True)
    larger = torch.maximum(code.abs(), by_model.abs())
    at_limit = on_one_side & ((larger - least).abs() <= 10 * _TOLERANCE * max(values, 1.0))
    off = torch.where(at_limit, 0.0, (code - by_model).abs())
    same = ~at_limit.any(dim=1)
    return Agreement(
        n_rows=len(rows),
        formula=float((code - by_formula).abs().max()),
        code=float(off.max()),
        reconstruction=float((x_hat - expected["reconstruction"])[same].abs().max())
        if bool(same.any())
        else 0.0,
        scale=(values, numbers),
        at_limits=int(at_limit.sum()),
    )


def _read(path: Path, dictionary: PlainDictionary) -> dict[str, Tensor]:
    if not path.is_file():
        raise DictionaryError(
            f"{path}: not there: only dictionaries that sae_fast has converted or exported carry "
            "rows to check; of a run or a saved model, python -m sae_fast.convert SRC DST makes one"
        )
    tensors = load_tensors(path)
    if tensors.keys() != _TENSORS:
        raise DictionaryError(f"{path}: must hold {', '.join(sorted(_TENSORS))}")
    if tensors["rows"].ndim != 2 or tensors["value"].ndim != 1 or len(tensors["rows"]) == 0:
        raise DictionaryError(f"{path}: rows must be a matrix that is not empty, and value a list")
    n_rows, n_entries = len(tensors["rows"]), len(tensors["value"])
    shapes = {
        "rows": (n_rows, dictionary.d_in),
        "token": (n_entries,),
        "latent": (n_entries,),
        "value": (n_entries,),
        "reconstruction": (n_rows, dictionary.d_out),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise DictionaryError(
                f"{path}: {name} must have shape {list(shape)}, got {list(tensors[name].shape)}"
            )
    for name in ("rows", "value", "reconstruction"):
        if tensors[name].dtype not in FLOATS:
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise DictionaryError(f"{path}: {name} must be of floating-point numbers, got {kind}")
    for name, end in (("token", n_rows), ("latent", dictionary.d_sae)):
        inside = (tensors[name] >= 0) & (tensors[name] < end)
        if tensors[name].is_floating_point() or not bool(inside.all()):
            raise DictionaryError(f"{path}: {name} must be numbers from 0 to {end - 1}")
    return tensors
