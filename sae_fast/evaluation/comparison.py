"""The latents that dictionaries have in common: they are matched one to one, pair by pair.

Compared are the directions that latents add to the reconstruction, in the units of the activations,
so that a model and the same model with its normalisation folded in are equal. Definitions, of a
pair of dictionaries with F_A and F_B latents and n = min(F_A, F_B) matched pairs:

- PW-MCC: the mean cosine of the matched pairs (arXiv:2505.20254, with the sign of the cosine, as in
  the code of its authors);
- shared at t: the number of matched pairs with a cosine of t or more, divided by F_A and by F_B;
- nearest: the mean over the latents of A of the largest cosine with any latent of B, and the other
  way round; not below PW-MCC for the smaller dictionary, since latents may share a nearest one;
- shared by all at t: the share of a dictionary's latents whose partner in each other dictionary has
  a cosine of t or more.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast import interop
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.foreign import local_place
from sae_fast.evaluation.matching import EXACT_BELOW, NEIGHBOURS, Matching, match
from sae_fast.markdown import markdown_table
from sae_fast.tensor_files import is_finite, load_tensors

THRESHOLDS = (0.7, 0.9)
_W_DEC = "W_dec"


@dataclass(frozen=True)
class Dictionary:
    """The directions of a model's latents.

    Attributes:
        directions: what one unit of each latent adds to the reconstruction, [F, D].
        dead: latents that did not fire at the end of the training, [F] bool; None: not known.
        origin: of which activations the model is, as its file says.
    """

    directions: Tensor
    dead: Tensor | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: SparseAutoencoder | Tensor | Dictionary) -> Dictionary:
        """Return the dictionary of a model, or of a decoder [F, D] in the activations' units."""
        if isinstance(source, Dictionary):
            return source
        if isinstance(source, Tensor):
            return cls(source.detach())
        with torch.no_grad():
            directions = source.direction(slice(None)).float().cpu()
            return cls(directions, source.dead_mask().cpu(), dict(source.origin))

    @classmethod
    def read(cls, place: str | Path) -> Dictionary:
        """Read what `SparseAutoencoder.from_pretrained` does, or W_dec [F, D] of a .safetensors.

        Raises FileNotFoundError or ValueError, in one line that names the file.
        """
        path = local_place(place)
        if path.suffix != ".safetensors" or interop.recognise(path) is not None:
            return cls.of(SparseAutoencoder.from_pretrained(path))
        tensors = load_tensors(path)
        if _W_DEC not in tensors or tensors[_W_DEC].ndim != 2:
            raise ValueError(f"{path}: it must have a matrix {_W_DEC} [latents, width]")
        if tensors[_W_DEC].numel() == 0:
            raise ValueError(f"{path}: {_W_DEC} is empty, {list(tensors[_W_DEC].shape)}")
        if not is_finite(tensors[_W_DEC]):
            raise ValueError(f"{path}: {_W_DEC} holds NaN or Inf")
        return cls(tensors[_W_DEC])

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return len(self.directions)

    @property
    def d_in(self) -> int:
        """The width of the directions."""
        return self.directions.shape[1]

    @property
    def alive(self) -> Tensor:
        """The latents that are not dead, [F] bool; all where that is not known."""
        if self.dead is None:
            return torch.ones(self.d_sae, dtype=torch.bool)
        return ~self.dead


@dataclass(frozen=True)
class Pair:
    """Two dictionaries of a comparison, by their names, and the matching of their latents."""

    a: str
    b: str
    matching: Matching


@dataclass(frozen=True)
class Comparison:
    """The matchings of several dictionaries, pair by pair.

    Attributes:
        dictionaries: by name, in the order given.
        pairs: one for each two dictionaries.
        thresholds: two latents count as shared if their cosine is not below one of these.
    """

    dictionaries: Mapping[str, Dictionary]
    pairs: Sequence[Pair]
    thresholds: Sequence[float]

    @property
    def names(self) -> list[str]:
        """The names of the dictionaries."""
        return list(self.dictionaries)

    def partners(self, name: str, other: str) -> tuple[Tensor, Tensor]:
        """Return partner in `other` and cosine of every latent of `name`, [F] each; −1, NaN: none.

        Raises KeyError for a name that is not compared, or for equal names.
        """
        count = self.dictionaries[name].d_sae
        for pair in self.pairs:
            if (pair.a, pair.b) == (name, other):
                return pair.matching.partners_of_a(count)
            if (pair.b, pair.a) == (name, other):
                return pair.matching.partners_of_b(count)
        raise KeyError(f"{name} and {other} are no pair of this comparison")

    def shared(self, name: str, other: str, threshold: float) -> float:
        """Return the share of the latents of `name` that have a partner in `other` from t on."""
        cosines = self.partners(name, other)[1]
        return float((cosines >= threshold).double().mean())  # NaN is not

    def shared_by_all(self, name: str, threshold: float) -> float:
        """Return the share of the latents of `name` that every other dictionary shares from t."""
        others = [self.partners(name, other)[1] for other in self.names if other != name]
        return float((torch.stack(others) >= threshold).all(0).double().mean())

    def mean_pw_mcc(self) -> float:
        """Return the mean PW-MCC over all pairs."""
        return sum(pair.matching.mean() for pair in self.pairs) / len(self.pairs)

    def matrix(self, threshold: float | None = None) -> Tensor:
        """Return PW-MCC of all pairs, [N, N], or with a threshold the share of the row's latents.

        The diagonal is 1: a dictionary beside itself.
        """
        values = torch.eye(len(self.names), dtype=torch.float64)
        places = {name: place for place, name in enumerate(self.names)}
        for pair in self.pairs:
            a, b = places[pair.a], places[pair.b]
            if threshold is None:
                values[a, b] = values[b, a] = pair.matching.mean()
            else:
                values[a, b] = self.shared(pair.a, pair.b, threshold)
                values[b, a] = self.shared(pair.b, pair.a, threshold)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values, without the tables of latents."""
        mean: dict[str, float] = {"pw_mcc": self.mean_pw_mcc()}
        off_diagonal = ~torch.eye(len(self.names), dtype=torch.bool)
        for threshold in self.thresholds:
            mean[_shared(threshold)] = float(self.matrix(threshold)[off_diagonal].mean())
        return {
            "dictionaries": [
                {
                    "name": name,
                    "d_sae": dictionary.d_sae,
                    "d_in": dictionary.d_in,
                    "dead": None if dictionary.dead is None else int(dictionary.dead.sum()),
                    **{
                        f"shared_by_all_at_{threshold:g}": self.shared_by_all(name, threshold)
                        for threshold in self.thresholds
                    },
                }
                for name, dictionary in self.dictionaries.items()
            ],
            "mean": mean,
            "pairs": [self._figures(pair) for pair in self.pairs],
        }

    def _figures(self, pair: Pair) -> dict[str, Any]:
        matching = pair.matching
        alive_a, alive_b = self.dictionaries[pair.a].alive, self.dictionaries[pair.b].alive
        cosines = matching.cosines[alive_a[matching.rows] & alive_b[matching.columns]]
        figures: dict[str, Any] = {
            "a": pair.a,
            "b": pair.b,
            "matched": len(matching.rows),
            "is_exact": matching.is_exact,
            "pw_mcc": matching.mean(),
            "pw_mcc_alive": float(cosines.double().mean()) if len(cosines) else None,
            "nearest_of_a": float(matching.nearest_in_b.double().mean()),
            "nearest_of_b": float(matching.nearest_in_a.double().mean()),
        }
        for threshold in self.thresholds:
            figures[f"{_shared(threshold)}_of_a"] = self.shared(pair.a, pair.b, threshold)
            figures[f"{_shared(threshold)}_of_b"] = self.shared(pair.b, pair.a, threshold)
        return figures

    def table(self) -> str:
        """Return the pairs as a Markdown table, and a line with the means."""
        headings = ["A", "B", "latents", "dead", "PW-MCC", "alive"]
        headings += [f"shared at {threshold:g}" for threshold in self.thresholds]
        rows = []
        for pair in self.pairs:
            figures = self._figures(pair)
            a, b = self.dictionaries[pair.a], self.dictionaries[pair.b]
            alive = figures["pw_mcc_alive"]
            cells = [pair.a, pair.b, f"{a.d_sae:,}, {b.d_sae:,}", f"{_dead(a)}, {_dead(b)}"]
            cells += [f"{figures['pw_mcc']:.3f}", "none" if alive is None else f"{alive:.3f}"]
            for threshold in self.thresholds:
                shares = [figures[f"{_shared(threshold)}_of_{which}"] for which in "ab"]
                cells.append(", ".join(f"{share:.1%}" for share in dict.fromkeys(shares)))
            rows.append(cells)
        return markdown_table(headings, rows, texts=2)

    def latents(self) -> dict[str, dict[str, list[Any]]]:
        """Return a table of latents for each dictionary by name: columns of equal lengths.

        The columns: latent, dead (null where not known), mean_cosine and least_cosine over its
        partners in all other dictionaries (null where it lacks one), and for each other dictionary
        NAME:partner and NAME:cosine.
        """
        return {name: self._latents_of(name) for name in self.names}

    def _latents_of(self, name: str) -> dict[str, list[Any]]:
        dictionary = self.dictionaries[name]
        others = {other: self.partners(name, other) for other in self.names if other != name}
        cosines = torch.stack([found for _, found in others.values()])
        dead = dictionary.dead
        columns: dict[str, list[Any]] = {
            "latent": list(range(dictionary.d_sae)),
            "dead": [None] * dictionary.d_sae if dead is None else dead.tolist(),
            "mean_cosine": _numbers(cosines.mean(0)),
            "least_cosine": _numbers(cosines.amin(0)),
        }
        for other, (partner, found) in others.items():
            columns[f"{other}:partner"] = [None if x < 0 else x for x in partner.tolist()]
            columns[f"{other}:cosine"] = _numbers(found)
        return columns

    def latents_csv(self) -> str:
        """Return the tables of latents as one text of comma-separated values."""
        tables = self.latents()
        names = list(dict.fromkeys(itertools.chain.from_iterable(tables.values())))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["dictionary", *names])
        for name, columns in tables.items():
            rows = zip(*(columns.get(key, itertools.repeat("")) for key in names), strict=False)
            writer.writerows([name, *row] for row in rows)
        return text.getvalue()


def compare(
    sources: Mapping[str, SparseAutoencoder | Tensor | Dictionary],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    absolute: bool = False,
    exact_below: int = EXACT_BELOW,
    neighbours: int = NEIGHBOURS,
) -> Comparison:
    """Match the latents of every two dictionaries by the cosine of their decoder directions.

    Args:
        sources: two or more by name: models, or decoders [F, D] in the units of the activations.
        thresholds: two latents count as shared if their cosine is not below one of these.
        absolute: take |cosine|, for codes that have a sign.
        exact_below: with fewer latents in both dictionaries the matching is exact, see matching.py.
        neighbours: candidates of each latent, where it is not.

    Raises:
        ValueError: for fewer than two dictionaries, or where their widths differ.
    """
    dictionaries = {name: Dictionary.of(source) for name, source in sources.items()}
    if len(dictionaries) < 2:
        raise ValueError(f"two dictionaries or more must be given, got {len(dictionaries)}")
    (first, reference), *others = dictionaries.items()
    for name, dictionary in others:
        if dictionary.d_in != reference.d_in:
            raise ValueError(
                f"dictionaries must have one width: {first} has {reference.d_in}, "
                f"{name} has {dictionary.d_in}"
            )
    pairs = []
    for a, b in itertools.combinations(dictionaries, 2):
        matching = match(
            dictionaries[a].directions,
            dictionaries[b].directions,
            absolute=absolute,
            exact_below=exact_below,
            neighbours=neighbours,
        )
        pairs.append(Pair(a, b, matching))
    return Comparison(dictionaries, pairs, tuple(thresholds))


def _shared(threshold: float) -> str:
    return f"shared_at_{threshold:g}"


def _dead(dictionary: Dictionary) -> str:
    return "not known" if dictionary.dead is None else f"{int(dictionary.dead.sum()):,}"


def _numbers(values: Tensor) -> list[float | None]:
    """Return numbers for JSON, null for NaN."""
    return [None if x != x else round(x, 6) for x in values.tolist()]
