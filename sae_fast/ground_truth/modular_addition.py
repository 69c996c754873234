"""Modular addition: a transformer that adds modulo p by waves of a few frequencies.

Its embedding shows which frequencies it uses. An autoencoder on its activations has understood it
if latents are waves in a, b or a + b of these frequencies.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_fast.atomic_files import replacing
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.ground_truth import ModularAdditionConfig
from sae_fast.ground_truth.adding_transformer import AddingTransformer, all_pairs, train_adding
from sae_fast.ground_truth.fourier import (
    key_frequencies,
    marginals,
    match_frequencies,
    power,
    strengths,
)
from sae_fast.ground_truth.pictures import finish, new_figure
from sae_fast.ground_truth.task import Progress, Score, Scored, Task
from sae_fast.tensor_files import load_tensors, save_tensors

GENERALISES = 0.99  # accuracy on the pairs left out, below which the command warns
PURE = 0.9  # strength from which a latent counts as a wave
VARIABLES = ("a", "b", "a + b")
_MODEL = "transformer.safetensors"
_CURVE = "curve"
_PART = 4096  # rows at a time
_SOURCE = "arXiv:2301.05217 for the waves; the plane of a frequency makes the phase free"

logger = logging.getLogger(__name__)


class ModularAddition(Task):
    """Find the frequencies of a transformer that adds modulo p."""

    name: ClassVar[str] = "modular_addition"
    title: ClassVar[str] = "Modular addition: the frequencies of a transformer"
    about: ClassVar[str] = (
        "A one-layer transformer was trained on a share of all pairs until it adds the others "
        "modulo p as well. It does so by waves of a few key frequencies, which have at least 5 % "
        "of the power of its embedding each. Autoencoders train on its activations at the last "
        "token of all p² pairs, and are scored on all of them: there are no other inputs. The mean "
        "activation of a latent by a, by b and by a + b is compared with the plane of cosine and "
        "sine of each frequency; its strength there is the length of the projection divided by the "
        "length about the mean, from 0 to 1, whatever the phase."
    )
    scores: ClassVar[Sequence[Score]] = (
        Score(
            "fourier_recovery_mcc",
            "Fourier MCC",
            "Mean strength of key frequencies and latents, matched one to one so that the sum is "
            "largest; the strength of a latent is the largest of a, b and a + b.",
            _SOURCE,
        ),
        Score(
            "fourier_sum_mcc",
            "Fourier MCC, a + b",
            "The same with the mean activation by a + b alone.",
            _SOURCE,
        ),
        Score(
            "pure_share",
            "pure",
            "Share of the latents that fire whose largest strength in the plane of a key frequency "
            "is at least 0.9.",
        ),
        Score(
            "mean_strength",
            "strength",
            "Largest strength in the plane of any frequency, averaged over the latents that fire.",
        ),
        Score(
            "by_sum",
            "by a + b",
            "Sum over latents of the variance of the mean activation by a + b, divided by the sum "
            "of the variances of their activations: 1 where a latent's value depends on a + b "
            "alone.",
        ),
    )

    config: ModularAdditionConfig
    model: AddingTransformer
    curve: Tensor  # [n, 4], of `train_adding`

    def prepare(self, folder: Path, progress: Progress) -> None:
        """Train the transformer, or read it from the folder, and take its activations.

        A training that was killed starts again from its first step.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.data_seed)
        sizes = (config.p, config.d_model, config.heads, config.d_mlp)
        self.model = AddingTransformer(*sizes, generator)
        path = folder / _MODEL
        if path.exists():
            tensors = load_tensors(path)
            self.curve = tensors.pop(_CURVE)
            self.model.load_state_dict(tensors)
        else:
            with torch.enable_grad():
                self.curve = train_adding(
                    self.model,
                    config.train_fraction,
                    config.model_steps,
                    config.model_learning_rate,
                    config.model_weight_decay,
                    generator,
                    progress,
                )
            with replacing(path) as temporary:
                save_tensors(temporary, {**self.model.state_dict(), _CURVE: self.curve})
        if float(self.curve[-1, 3]) < GENERALISES:
            logger.warning(
                "the transformer adds %.1f %% of the pairs left out right: more --model-steps or "
                "a larger --train-fraction would help",
                100 * float(self.curve[-1, 3]),
            )
        with torch.no_grad():
            self.rows = self.model.activations(*all_pairs(config.p), config.site)
        self.heldout_rows = self.rows
        self.embedding = self.model.embedding.detach()[: config.p]
        self.frequencies = key_frequencies(self.embedding)

    def facts(self) -> Mapping[str, Any]:
        """Return what the transformer reaches, its key frequencies and their power."""
        steps, loss, other_loss, accuracy = self.curve[-1].tolist()
        shares = power(self.embedding)
        return {
            "pairs": len(self.rows),
            "transformer steps": int(steps),
            "loss on the pairs trained on": loss,
            "loss on the others": other_loss,
            "accuracy on the others": accuracy,
            "key frequencies": self.frequencies,
            "their share of the embedding's power": [
                round(float(shares[frequency - 1]), 4) for frequency in self.frequencies
            ],
        }

    @torch.no_grad()
    def score(self, sae: SparseAutoencoder) -> Scored:
        """Return the scores of a dictionary, and the waves of the matched latents."""
        p = self.config.p
        parts = [
            sae.encode(self.rows[start : start + _PART]).dense().float().cpu()
            for start in range(0, len(self.rows), _PART)
        ]
        values = torch.cat(parts)
        means = marginals(values.view(p, p, -1))
        alive = (values != 0).any(0)
        found = strengths(means)  # [3, F, W]
        best = found.amax(0)
        latents, matched = match_frequencies(best, self.frequencies)
        _, by_sum = match_frequencies(found[2], self.frequencies)
        at_keys = best[:, torch.tensor(self.frequencies) - 1].amax(1)
        variance = values.double().var(0, correction=0).sum()
        of_means = means[2].var(1, correction=0).sum()
        n_alive = int(alive.sum())
        return Scored(
            {
                "fourier_recovery_mcc": sum(matched) / len(matched),
                "fourier_sum_mcc": sum(by_sum) / len(by_sum),
                "pure_share": float((at_keys[alive] >= PURE).double().mean()) if n_alive else None,
                "mean_strength": float(best.amax(1)[alive].mean()) if n_alive else None,
                "by_sum": float(of_means / variance) if float(variance) > 0 else None,
            },
            {
                "waves": [
                    self._wave(*pair, found, means)
                    for pair in zip(self.frequencies, latents, strict=True)
                ],
                "strengths": [round(float(x), 3) for x in best.amax(1)[alive].sort().values],
            },
        )

    def _wave(
        self,
        frequency: int,
        latent: int,
        found: Tensor,  # [3, F, W]
        means: Tensor,  # [3, F, p]
    ) -> dict[str, Any]:
        """Return the latent matched with a frequency: variable, strength and mean activations."""
        variable = int(found[:, latent, frequency - 1].argmax())
        return {
            "frequency": frequency,
            "latent": latent,
            "variable": VARIABLES[variable],
            "strength": round(float(found[variable, latent, frequency - 1]), 4),
            "means": [round(float(x), 4) for x in means[variable, latent]],
        }

    def draw(self, entries: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
        """Draw how the transformer learned, its frequencies, and the waves of each architecture."""
        return [self._draw_model(entries, out / "transformer.png"), self._draw_waves(entries, out)]

    def _draw_model(self, entries: Sequence[Mapping[str, Any]], path: Path) -> Path:
        figure, (learning, spectrum, latents) = new_figure(1, 3, (4.4, 3.4))
        steps, loss, other_loss, accuracy = self.curve.unbind(1)
        learning.plot(steps.numpy(), loss.numpy(), label="loss, trained on", color="C0")
        learning.plot(steps.numpy(), other_loss.numpy(), "--", label="loss, others", color="C1")
        learning.plot(steps.numpy(), accuracy.numpy(), ":", label="accuracy, others", color="C2")
        learning.set_yscale("log")
        learning.set_xlabel("step", fontsize=10)
        learning.set_title("The transformer learns", fontsize=11)
        learning.legend(fontsize=8, frameon=False)
        shares = power(self.embedding)
        colours = ["C3" if w + 1 in self.frequencies else "C7" for w in range(len(shares))]
        spectrum.bar(range(1, len(shares) + 1), shares.numpy(), color=colours)
        spectrum.set_xlabel("frequency; red: key frequencies", fontsize=10)
        spectrum.set_title("Power of its embedding", fontsize=11)
        for place, name in enumerate(dict.fromkeys(str(entry["arch"]) for entry in entries)):
            own = [entry for entry in entries if entry["arch"] == name]
            values = sorted(x for entry in own for x in entry["details"]["strengths"])
            shares_above = [1 - place_of / len(values) for place_of in range(len(values))]
            latents.plot(values, shares_above, label=name, color=f"C{place}", linewidth=1.3)
        latents.set_xlabel("strength of a latent in its best plane", fontsize=10)
        latents.set_ylabel("share of the latents above", fontsize=10)
        latents.set_title("Latents that fire, all seeds", fontsize=11)
        latents.legend(fontsize=8, frameon=False)
        for axes in (learning, spectrum, latents):
            axes.tick_params(labelsize=9)
            axes.grid(alpha=0.3)
        return finish(figure, self.title, path)

    def _draw_waves(self, entries: Sequence[Mapping[str, Any]], out: Path) -> Path:
        """Draw the latents matched with the key frequencies, of the first seed of each arch."""
        first: dict[str, Mapping[str, Any]] = {}
        for entry in entries:
            first.setdefault(str(entry["arch"]), entry)
        n_columns = len(self.frequencies)
        figure, cells = new_figure(len(first), n_columns, (2.5, 1.7))
        for row, (name, entry) in enumerate(first.items()):
            for column, wave in enumerate(entry["details"]["waves"]):
                axes = cells[row * n_columns + column]
                phases = int(wave["frequency"]) * torch.arange(self.config.p) % self.config.p
                order = phases.argsort(stable=True).tolist()
                shown = [wave["means"][t] for t in order]  # a wave of this frequency is one period
                axes.plot(shown, color=f"C{row}", linewidth=1.2)
                title = f"frequency {wave['frequency']}, by {wave['variable']}"
                axes.set_title(f"{title}: {wave['strength']:.2f}", fontsize=8)
                axes.tick_params(labelsize=7)
                axes.grid(alpha=0.3)
                if column == 0:
                    axes.set_ylabel(name, fontsize=9)
        title = "Mean activation by w · t mod p of the latent of each key frequency w; first seed"
        return finish(figure, title, out / "waves.png")
