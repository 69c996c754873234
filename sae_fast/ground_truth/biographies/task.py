"""Biographies as a task: a language model that knows six facts about each of many people.

The residual stream at the last token of a prompt must hold the relation that is asked about and the
answer. The folder of the task has the files of `python -m sae_fast.biographies`, shards included,
so that `sae_fast.train` and `sae_fast.swap` can start from there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.ground_truth import BiographiesConfig
from sae_fast.ground_truth.biographies import files
from sae_fast.ground_truth.biographies.language_model import (
    BiographyModel,
    LanguageModelConfig,
    train_language_model,
)
from sae_fast.ground_truth.biographies.probes import probe_accuracies
from sae_fast.ground_truth.biographies.text import make_biographies
from sae_fast.ground_truth.pictures import draw_dots, finish, new_figure
from sae_fast.ground_truth.task import Progress, Score, Scored, Task
from sae_fast.ground_truth.variables import F1_SOURCE, F1_TEXT, best_f1, count

KNOWS = 0.99  # accuracy below which the command warns
FOUND = 0.9  # F1 from which a relation counts as found
_FOLDER = "biographies"

logger = logging.getLogger(__name__)


class Biographies(Task):
    """Find relations and answers in a language model that knows biographies."""

    name: ClassVar[str] = "biographies"
    title: ClassVar[str] = "Biographies: relations and answers in a language model"
    about: ClassVar[str] = (
        "A small GPT-2 was trained on invented people, until it answers six questions about each "
        "of them in every phrasing. Autoencoders train on its residual stream at the last token of "
        "the prompts about most people, and are scored on the prompts about the others, whom the "
        "language model knows too. The truth is the relation that is asked about, and the answer; "
        "on each row exactly one of each is true. Slots are told the relation in training."
    )
    labels_of: ClassVar[str | None] = "labels/relation"
    scores: ClassVar[Sequence[Score]] = (
        Score(
            "relation_f1",
            "relation F1",
            f"Of each relation, the largest F1 of a latent as its detector, {F1_TEXT}; mean over "
            "relations.",
            F1_SOURCE,
        ),
        Score("found", "found", "Share of the relations for which this F1 is at least 0.9."),
        Score(
            "relation_purity",
            "relation purity",
            "Of the rows on which a latent fires, the share with its commonest relation; mean over "
            "latents, weighted by the number of these rows.",
        ),
        Score(
            "answer_f1",
            "answer F1",
            "Of each answer, the largest F1 of a latent as its detector; mean over the answers "
            "that occur.",
            F1_SOURCE,
        ),
        Score("answer_purity", "answer purity", "The purity of latents, of answers."),
    )

    config: BiographiesConfig
    model: BiographyModel
    columns: dict[str, Tensor]  # of the held-out rows, [M] int64 each

    def prepare(self, folder: Path, progress: Progress) -> None:
        """Train the language model, or read it from the folder, and take its activations.

        A training that was killed starts again from its first step.
        """
        directory = folder / _FOLDER
        if not (directory / files.BIOGRAPHIES).exists():
            shutil.rmtree(directory, ignore_errors=True)  # what a killed call has left
            self._make(directory, progress)
        self.model = files.load(directory)
        self.accuracy = self.model.accuracy(self.model.prompts(self.model.biographies.sentences()))
        if self.accuracy < KNOWS:
            logger.warning(
                "the language model answers %.1f %% right: more --model-steps or fewer --entities "
                "would help",
                100 * self.accuracy,
            )
        self.rows, self._train_columns = self._side(heldout=False)
        self.heldout_rows, self.columns = self._side(heldout=True)

    def _make(self, directory: Path, progress: Progress) -> None:
        config = self.config
        biographies = make_biographies(
            config.entities,
            config.templates,
            config.heldout_fraction,
            config.data_seed,
            config.answers,
        )
        files.prepare(directory)
        size = LanguageModelConfig(
            config.blocks,
            config.d_model,
            config.heads,
            config.model_steps,
            config.model_batch,
            config.model_learning_rate,
            config.data_seed,
        )
        with torch.enable_grad():
            model = train_language_model(
                biographies, size, lambda step, loss: progress(step, config.model_steps)
            )
        files.write_shards(directory, model, [self.layer])
        probes = probe_accuracies(model, [self.layer])
        files.save(directory, model, {"probes": {str(self.layer): probes[self.layer]}})

    @property
    def layer(self) -> int:
        """The block after which the residual stream is taken, from 0."""
        return self.config.blocks - 1 if self.config.layer is None else self.config.layer

    def _side(self, *, heldout: bool) -> tuple[Tensor, dict[str, Tensor]]:
        sentences = self.model.biographies.sentences(heldout=heldout)
        prompts = self.model.prompts(sentences)
        parts = [by_layer for _, by_layer in self.model.activations(prompts, [self.layer])]
        rows = torch.cat([part[self.layer] for part in parts])
        return rows, files.label_columns(self.model.biographies, sentences)

    def labels(self) -> tuple[Tensor, Tensor]:
        """Return the relations of rows and of held-out rows, [N] and [M] int64."""
        return self._train_columns["relation"], self.columns["relation"]

    def facts(self) -> Mapping[str, Any]:
        """Return the sizes, what the language model knows, and the accuracy of linear probes."""
        probes = probe_accuracies(self.model, [self.layer])[self.layer]
        return {
            "people": len(self.model.biographies.entities),
            "relations": len(self.model.biographies.relations),
            "answers": self.model.biographies.answer_count,
            "rows": len(self.rows),
            "held-out rows": len(self.heldout_rows),
            "layer": self.layer,
            "answers of the language model that are right": self.accuracy,
            "linear probe for the relation, held-out accuracy": probes["relation"],
            "linear probe for the answer, held-out accuracy": probes["answer"],
        }

    @torch.no_grad()
    def score(self, sae: SparseAutoencoder) -> Scored:
        """Return the scores of a dictionary, and the F1 of each relation and answer."""
        values = sae.encode(self.heldout_rows).dense().float().cpu()
        relations = functional.one_hot(self.columns["relation"]).bool()
        answers = functional.one_hot(self.columns["answer"]).bool()
        answers = answers[:, answers.any(0)]
        by_relation, by_answer = count(values, relations), count(values, answers)
        relation_f1, _ = best_f1(values, relations)
        answer_f1, _ = best_f1(values, answers)
        return Scored(
            {
                "relation_f1": float(relation_f1.mean()),
                "found": float((relation_f1 >= FOUND).double().mean()),
                "relation_purity": by_relation.purity(),
                "answer_f1": float(answer_f1.mean()),
                "answer_purity": by_answer.purity(),
            },
            {
                "relation": [round(float(x), 4) for x in relation_f1],
                "answer": [round(float(x), 4) for x in answer_f1],
            },
        )

    def draw(self, entries: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
        """Draw the F1 of each relation and of each answer, of all seeds."""
        names = list(dict.fromkeys(str(entry["arch"]) for entry in entries))
        figure, cells = new_figure(1, 2, (4.4, 3.4))
        for axes, key in zip(cells, ("relation", "answer"), strict=True):
            by_arch: dict[str, list[float]] = {name: [] for name in names}
            for entry in entries:
                by_arch[str(entry["arch"])] += entry["details"][key]
            draw_dots(axes, names, by_arch.__getitem__)
            axes.set_ylim(-0.03, 1.03)
            axes.set_title(f"F1 of the best latent of each {key}", fontsize=11)
        return [finish(figure, "Biographies: a dot for each seed and truth", out / "truths.png")]
