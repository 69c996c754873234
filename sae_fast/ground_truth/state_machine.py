"""State machine: an LSTM that has learned the strings of a finite automaton.

Its hidden state must hold the state of the automaton. An autoencoder has understood it if latents
fire in one state and in no other.
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
from sae_fast.config.ground_truth import StateMachineConfig
from sae_fast.ground_truth.automata import (
    AUTOMATA,
    Automaton,
    Strings,
    SymbolLSTM,
    prediction,
    train_lstm,
)
from sae_fast.ground_truth.pictures import finish, new_figure
from sae_fast.ground_truth.task import Progress, Score, Scored, Task
from sae_fast.ground_truth.variables import F1_SOURCE, F1_TEXT, best_f1, count
from sae_fast.tensor_files import load_tensors, save_tensors

KNOWN = 0.05  # nats above the smallest loss, beyond which the command warns
FOUND = 0.9  # F1 from which a state counts as found
_MODEL, _CURVE = "lstm.safetensors", "curve"
_STRINGS = 1024  # at a time

logger = logging.getLogger(__name__)


class StateMachine(Task):
    """Find the states of an automaton in an LSTM."""

    name: ClassVar[str] = "state_machine"
    title: ClassVar[str] = "State machine: the states of an LSTM"
    about: ClassVar[str] = (
        "An LSTM was trained to predict the next symbol of strings of a finite automaton, whose "
        "edges out of a state are equally likely. Autoencoders train on its hidden state after "
        "each symbol. The truth is the state that the automaton is in after that symbol; on each "
        "row exactly one is true. Slots are told it in training."
    )
    labels_of: ClassVar[str | None] = "labels/state"
    scores: ClassVar[Sequence[Score]] = (
        Score(
            "purity",
            "purity",
            "Of the rows on which a latent fires, the share in its commonest state; mean over "
            "latents, weighted by the number of these rows.",
        ),
        Score(
            "latent_purity",
            "purity, unweighted",
            "The same share, averaged over the latents that fire, each with weight 1.",
        ),
        Score(
            "state_f1",
            "state F1",
            f"Of each state, the largest F1 of a latent as its detector, {F1_TEXT}; mean over "
            "states.",
            F1_SOURCE,
        ),
        Score("found", "found", "Share of the states for which this F1 is at least 0.9."),
    )

    config: StateMachineConfig
    model: SymbolLSTM
    curve: Tensor  # [n, 2], of `train_lstm`
    states: Tensor  # [M] int64, of the held-out rows

    def prepare(self, folder: Path, progress: Progress) -> None:
        """Train the LSTM, or read it from the folder, and take its hidden states.

        A training that was killed starts again from its first step.
        """
        config = self.config
        self.automaton = Automaton(AUTOMATA[config.automaton])
        generator = torch.Generator().manual_seed(config.data_seed)
        self.model = SymbolLSTM(config.hidden, generator)
        path = folder / _MODEL
        if path.exists():
            tensors = load_tensors(path)
            self.curve = tensors.pop(_CURVE)
            self.model.load_state_dict(tensors)
        else:
            sizes = (config.model_steps, config.model_batch, config.model_learning_rate)
            with torch.enable_grad():
                self.curve = train_lstm(self.model, self.automaton, *sizes, generator, progress)
            with replacing(path) as temporary:
                save_tensors(temporary, {**self.model.state_dict(), _CURVE: self.curve})
        drawn = torch.Generator().manual_seed(config.data_seed + 1)
        strings = self.automaton.sample(_STRINGS, drawn)
        self.predicted = prediction(self.model, self.automaton, strings)
        if self.predicted["loss"] - self.predicted["entropy"] > KNOWN:
            logger.warning(
                "the LSTM has not learned the automaton, its loss is %.3f and could be %.3f: more "
                "--model-steps would help",
                *(self.predicted[name] for name in ("loss", "entropy")),
            )
        self.heldout_rows, self.states = self._rows(config.heldout_rows, drawn)
        self.rows, self._train_states = self._rows(config.rows, drawn)

    @torch.no_grad()
    def _rows(self, n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return hidden states [n_rows, D] and states of the automaton [n_rows], of new strings."""
        rows, states, n_found = [], [], 0
        while n_found < n_rows:
            strings: Strings = self.automaton.sample(_STRINGS, generator)
            is_symbol = strings.is_symbol
            rows.append(self.model.hidden(strings.symbols)[is_symbol])
            states.append(strings.states[is_symbol])
            n_found += len(states[-1])
        return torch.cat(rows)[:n_rows].clone(), torch.cat(states)[:n_rows].clone()

    def labels(self) -> tuple[Tensor, Tensor]:
        """Return the states of rows and of held-out rows, without the start, [N] and [M] int64."""
        return self._train_states - 1, self.states - 1

    def facts(self) -> Mapping[str, Any]:
        """Return the size of the automaton, what the LSTM reaches, and how common states are."""
        counts = torch.bincount(self.states, minlength=len(self.automaton.states))[1:]
        return {
            "states after a symbol": len(counts),
            "LSTM steps": int(self.curve[-1, 0]),
            **{
                f"LSTM, {name}": round(self.predicted[key], 4)
                for name, key in (
                    ("loss in nats", "loss"),
                    ("smallest loss possible", "entropy"),
                    ("probability of forbidden symbols", "forbidden"),
                )
            },
            "rows": len(self.rows),
            "held-out rows": len(self.heldout_rows),
            "share of the commonest state": float(counts.max() / counts.sum()),
        }

    @torch.no_grad()
    def score(self, sae: SparseAutoencoder) -> Scored:
        """Return the scores of a dictionary, and the F1 of each state."""
        names = self.automaton.states[1:]  # no symbol leads to the start
        truth = torch.nn.functional.one_hot(self.states - 1, len(names)).bool()
        values = sae.encode(self.heldout_rows).dense().float().cpu()
        found = count(values, truth)
        f1, latents = best_f1(values, truth)
        seen = found.true > 0
        shares = found.both[latents] / found.fires[latents].clamp_min(1)[:, None]
        return Scored(
            {
                "purity": found.purity(),
                "latent_purity": found.latent_purity(),
                "state_f1": float(f1[seen].mean()),
                "found": float((f1[seen] >= FOUND).double().mean()),
            },
            {
                "states": names,
                "f1": [round(float(x), 4) for x in f1],
                "latents": latents.tolist(),
                "shares": [[round(float(x), 3) for x in row] for row in shares],
            },
        )

    def draw(self, entries: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
        """Draw, of the first seed of each architecture, the best latent of each state."""
        first: dict[str, Mapping[str, Any]] = {}
        for entry in entries:
            first.setdefault(str(entry["arch"]), entry)
        n_columns = min(4, len(first))
        n_rows = -(-len(first) // n_columns)
        figure, cells = new_figure(n_rows, n_columns, (3.6, 3.5))
        for axes, (name, entry) in zip(cells, first.items(), strict=False):
            details = entry["details"]
            image = axes.imshow(details["shares"], vmin=0, vmax=1, cmap="viridis", aspect="auto")
            states, f1 = details["states"], details["f1"]
            labels = [f"{state}, {x:.2f}" for state, x in zip(states, f1, strict=True)]
            axes.set_yticks(range(len(states)), labels)
            axes.set_xticks(range(len(states)), states, rotation=90)
            axes.tick_params(labelsize=6)
            axes.set_title(name, fontsize=11)
        figure.colorbar(image, ax=cells, shrink=0.6, label="share of the latent's firings")
        for axes in cells[len(first) :]:
            axes.set_axis_off()
        title = "The best latent of each state (row, with its F1) and the states it fires in"
        return [finish(figure, f"{title}; first seed", out / "states.png")]
