"""Circuit: a transformer of two attention layers that continues repeated spans by induction.

The variables of the circuit are known at every place. An autoencoder on its residual stream has
understood it if latents are detectors of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sae_fast.atomic_files import replacing
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.ground_truth import CircuitConfig
from sae_fast.ground_truth.induction import (
    AttentionTransformer,
    copying,
    draw_sequences,
    train_induction,
    variables_of,
)
from sae_fast.ground_truth.pictures import draw_dots, finish, new_figure
from sae_fast.ground_truth.task import Progress, Score, Scored, Task
from sae_fast.ground_truth.variables import F1_SOURCE, F1_TEXT, auc, best_f1
from sae_fast.tensor_files import load_tensors, save_tensors

COPIES = 0.6  # accuracy inside copied spans, below which the command warns; 0.3 without induction
FLAGS = {
    "repeated": "token repeated",
    "previous_repeated": "previous repeated",
    "inside": "inside a copy",
}
TOKENS = {"token": "token", "previous": "previous token", "target": "induction target"}
_MODEL, _CURVE = "transformer.safetensors", "curve"
_SEQUENCES = 512  # at a time

logger = logging.getLogger(__name__)


def _scores() -> tuple[Score, ...]:
    """Return F1 and AUC of the variables that are true or false, and F1 of those with a value."""
    told = {
        "repeated": "the present token has occurred before in the sequence",
        "previous_repeated": "the token before had occurred before",
        "inside": "the present token and the one before have occurred side by side before",
    }
    found = []
    for key, heading in FLAGS.items():
        best = f"of a latent as a detector of: {told[key]}."
        text = f"The largest F1, {F1_TEXT}, {best}"
        found.append(Score(f"{key}_f1", f"{heading}, F1", text, F1_SOURCE))
        found.append(
            Score(
                f"{key}_auc",
                f"{heading}, AUC",
                f"The largest area under the ROC curve {best} 0.5: chance.",
            )
        )
    values = {
        "token": "the present token is t",
        "previous": "the token before is t",
        "target": "t followed the latest earlier occurrence of the present token",
    }
    for key, heading in TOKENS.items():
        text = f"The largest F1 of a latent as a detector of: {values[key]}; mean over tokens t."
        found.append(Score(f"{key}_f1", f"{heading}, F1", text, F1_SOURCE))
    return tuple(found)


class Circuit(Task):
    """Find the variables of induction."""

    name: ClassVar[str] = "circuit"
    title: ClassVar[str] = "Circuit: the variables of induction"
    about: ClassVar[str] = (
        "A transformer of two attention layers, without MLPs, was trained to predict random tokens "
        "of which spans are repeated. It learns induction (arXiv:2209.11895): it looks for an "
        "earlier occurrence of the present token and expects the token that followed it. "
        "Autoencoders train on its residual stream; latents are compared with the variables of "
        "this circuit at each position."
    )
    scores: ClassVar[Sequence[Score]] = _scores()

    config: CircuitConfig
    model: AttentionTransformer
    curve: Tensor  # [n, 3], of `train_induction`
    truth: dict[str, Tensor]  # of the held-out rows: flags [M] bool, values [M] int64

    def prepare(self, folder: Path, progress: Progress) -> None:
        """Train the transformer, or read it from the folder, and take its residual stream.

        A training that was killed starts again from its first step.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.data_seed)
        sizes = (config.vocabulary, config.length, config.d_model, config.heads)
        self.model = AttentionTransformer(*sizes, generator)
        path = folder / _MODEL
        if path.exists():
            tensors = load_tensors(path)
            self.curve = tensors.pop(_CURVE)
            self.model.load_state_dict(tensors)
        else:
            shape = (config.model_batch, config.length, config.vocabulary)
            with torch.enable_grad():
                self.curve = train_induction(
                    self.model,
                    lambda: draw_sequences(*shape, generator),
                    config.model_steps,
                    config.model_learning_rate,
                    progress,
                )
            with replacing(path) as temporary:
                save_tensors(temporary, {**self.model.state_dict(), _CURVE: self.curve})
        drawn = torch.Generator().manual_seed(config.data_seed + 1)
        self.copying, self.rule = self._copying(drawn)
        if self.copying < COPIES:
            logger.warning(
                "the transformer continues %.1f %% of the copied tokens right: more --model-steps "
                "would help",
                100 * self.copying,
            )
        self.heldout_rows, tokens = self._rows(config.heldout_rows, drawn)
        self.truth = self._truth(tokens, config.heldout_rows)
        self.rows, _ = self._rows(config.rows, drawn)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw_sequences(count, self.config.length, self.config.vocabulary, generator)

    @torch.no_grad()
    def _copying(self, generator: torch.Generator) -> tuple[float, float]:
        """Return the accuracy in copied spans of the transformer, and of the induction target."""
        tokens, copied = self._draw(_SEQUENCES, generator)
        target = variables_of(tokens).target[:, :-1].clamp_min(0)
        rule = functional.one_hot(target, self.config.vocabulary)
        logits = self.model(tokens[:, :-1])
        return copying(logits, tokens, copied), copying(rule, tokens, copied)

    @torch.no_grad()
    def _rows(self, n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return rows of the residual stream [n_rows, D], and the tokens [N, T] they are of."""
        rows, sequences = [], []
        for _ in range(-(-n_rows // (_SEQUENCES * self.config.length))):
            tokens, _ = self._draw(_SEQUENCES, generator)
            rows.append(self.model.stream(tokens, self.config.layer).flatten(0, 1))
            sequences.append(tokens)
        return torch.cat(rows)[:n_rows].clone(), torch.cat(sequences)

    @staticmethod
    def _truth(tokens: Tensor, n_rows: int) -> dict[str, Tensor]:
        found = variables_of(tokens)
        columns = {
            "repeated": found.is_repeated,
            "previous_repeated": found.previous_is_repeated,
            "inside": found.is_inside,
            "token": tokens,
            "previous": found.previous,
            "target": found.target,
        }
        return {name: column.flatten()[:n_rows] for name, column in columns.items()}

    def facts(self) -> Mapping[str, Any]:
        """Return what the transformer reaches, and how often the variables are true."""
        return {
            "transformer steps": int(self.curve[-1, 0]),
            "loss in the last step": float(self.curve[-1, 1]),
            "accuracy inside copied spans": self.copying,
            "accuracy of the induction target there": self.rule,
            "rows": len(self.rows),
            "held-out rows": len(self.heldout_rows),
            "share of the held-out rows": {
                heading: float(self.truth[name].double().mean()) for name, heading in FLAGS.items()
            },
            "F1 of a latent that always fires": {
                heading: _always(float(self.truth[name].double().mean()))
                for name, heading in FLAGS.items()
            },
        }

    @torch.no_grad()
    def score(self, sae: SparseAutoencoder) -> Scored:
        """Return the scores of a dictionary, and the F1 of each token."""
        values = sae.encode(self.heldout_rows).dense().float().cpu()
        flags = torch.stack([self.truth[name] for name in FLAGS], 1)
        f1, _ = best_f1(values, flags)
        scores: dict[str, float | None] = {}
        for place, name in enumerate(FLAGS):
            scores[f"{name}_f1"] = float(f1[place])
            areas = auc(values, flags[:, place])
            scores[f"{name}_auc"] = float(areas.max())
        details = {}
        for name in TOKENS:
            column = self.truth[name]
            truth = functional.one_hot(column + 1, self.config.vocabulary + 1)[:, 1:].bool()
            by_token, _ = best_f1(values, truth)
            scores[f"{name}_f1"] = float(by_token[truth.any(0)].mean())
            details[name] = [round(float(x), 4) for x in by_token]
        return Scored(scores, details)

    def draw(self, entries: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
        """Draw how the transformer learned, and the F1 of each token, of all seeds."""
        figure, (learning, *cells) = new_figure(1, 1 + len(TOKENS), (3.8, 3.3))
        steps, loss, accuracy = self.curve.unbind(1)
        learning.plot(steps.numpy(), loss.numpy(), color="C0", label="loss")
        learning.plot(steps.numpy(), accuracy.numpy(), "--", color="C1", label="accuracy in copies")
        learning.set_title("The transformer learns", fontsize=11)
        learning.set_xlabel("step", fontsize=10)
        learning.legend(fontsize=8, frameon=False)
        learning.tick_params(labelsize=9)
        learning.grid(alpha=0.3)
        names = list(dict.fromkeys(str(entry["arch"]) for entry in entries))
        for axes, (key, heading) in zip(cells, TOKENS.items(), strict=True):
            by_arch = {
                name: [
                    value
                    for entry in entries
                    if entry["arch"] == name
                    for value in entry["details"][key]
                ]
                for name in names
            }
            draw_dots(axes, names, by_arch.__getitem__)
            axes.set_ylim(-0.03, 1.03)
            axes.set_title(f"F1, {heading}", fontsize=11)
        title = f"{self.title}; a dot for each token and seed"
        return [finish(figure, title, out / "tokens.png")]


def _always(share: float) -> float:
    """Return the F1 of a detector that always says yes, of a variable with a share of the rows."""
    return 2 * share / (1 + share)
