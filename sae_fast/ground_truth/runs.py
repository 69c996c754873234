"""Train every architecture on a task with every seed, and keep what is finished.

results.json is written after each training, whole or not at all, and lists only models that lie
beside it. A call that was killed is made again with the same flags: what results.json lists is
kept, the training that was under way starts again from its first step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from sae_fast.atomic_files import write_text
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architectures import ARCHITECTURES
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.ground_truth import GroundTruthConfig
from sae_fast.config.sae import config_of
from sae_fast.directory_lock import FileLock
from sae_fast.evaluation.dictionary import sampled_cosines
from sae_fast.evaluation.matching import best_matching
from sae_fast.evaluation.metrics import evaluate
from sae_fast.ground_truth.overlap import seed_overlap
from sae_fast.ground_truth.page import results_page
from sae_fast.ground_truth.pictures import draw_scores
from sae_fast.ground_truth.results import Results, read_results
from sae_fast.ground_truth.task import Say, Task
from sae_fast.progress_bar import progress_bar
from sae_fast.report.page import REPORT
from sae_fast.report.training_page import LatentFigures
from sae_fast.training.history import METRICS, read_history
from sae_fast.training.metrics import Row
from sae_fast.training.signals import StopOnSignal
from sae_fast.training.trainer import Trainer

UNTRAINED = "untrained"  # an entry of the table: a topk before its first step
_SLOTS = "slots"
_RESULTS, _MARKDOWN, _MODELS, _LOCK = "results.json", "results.md", "models", ".lock"
_PART = 4096  # rows at a time
# With the defaults, which suit long trainings, L0 is far from its target after some hundred steps.
_QUICK_TARGET: dict[str, dict[str, Any]] = {
    "relu": {"l1_penalty_coeff": 1.5, "target_l0_rate": 0.02},
    "gated": {"target_l0_rate": 0.02},
    "jumprelu": {"sparsity_penalty_coeff": 30.0, "jumprelu_threshold_lr": 10.0},
}


class Stopped(Exception):
    """A signal has stopped a training, which is not among the results then.

    Attributes:
        signal: the signal.
    """

    def __init__(self, number: Signals) -> None:
        super().__init__(
            f"stopped by {number.name}; what is finished is kept, and a call with equal flags goes "
            "on from there"
        )
        self.signal = number


def run(
    task: Task, out: Path, command: str, say: Say = print, *, show_progress: bool = False
) -> Results:
    """Train and score all that is not finished in `out`, write the results and return them.

    Args:
        task: before `prepare`.
        out: the folder, which is made where it is missing.
        command: how the results can be made again, for results.md.
        say: shows a line.
        show_progress: whether to show progress bars.

    Raises:
        ValueError: in one line, for an unknown architecture, settings that do not fit, or a folder
            with results of other settings, or without scipy.
        Stopped: when a signal stops a training.
    """
    best_matching(torch.ones(1, 1))  # scipy is needed at the end: refused now where it is missing
    config = task.config
    wanted = _wanted(task)
    for arch, _ in wanted:
        sae_config(config, arch, task)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK)
    lock.take()
    try:
        results = read_results(out / _RESULTS, task, command)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        results.write(out / _RESULTS)  # from now on the folder is of these settings
        _prepare(task, out, show_progress=show_progress)
        results.facts = dict(task.facts())
        for arch, seed in wanted:
            model = out / _MODELS / f"{arch}_{seed}"
            if results.has(arch, seed) and model.is_dir():
                say(f"{arch}, seed {seed}: kept")
                continue
            entry = _entry(task, arch, seed, model, show_progress=show_progress)
            results.add(entry)
            results.write(out / _RESULTS)
            say(f"{arch}, seed {seed}: {results.line(entry)}")
        _conclude(task, results, wanted, out)
        return results
    finally:
        lock.release()


def architectures(task: Task) -> tuple[str, ...]:
    """Return the architectures that a task trains: the asked ones, or all that it can."""
    if task.config.arch:
        for arch in task.config.arch:
            if arch != UNTRAINED:
                _config_of(arch)(arch=arch)  # refuses an unknown one, and imports an installed one
        if _SLOTS in task.config.arch and task.labels_of is None:
            raise ValueError(f"arch slots needs labels, and {task.name} has none")
        return tuple(dict.fromkeys(task.config.arch))
    known = (name for name in ARCHITECTURES if name != _SLOTS or task.labels_of is not None)
    return (*known, UNTRAINED)


def sae_config(config: GroundTruthConfig, arch: str, task: Task) -> SAEConfig:
    """Return the model of an architecture: all have about k latents active in a row.

    Raises ValueError, in one line, where a setting does not fit the architecture.
    """
    name = "topk" if arch == UNTRAINED else arch
    kind = _config_of(name)
    bare = kind(arch=name)
    values: dict[str, Any] = {"d_sae": config.d_sae}
    if bare.takes("k"):
        values["k"] = config.k
    elif bare.takes("target_l0") and name != _SLOTS:  # its L0 counts the relation slots too
        values |= {"target_l0": float(config.k), **_QUICK_TARGET.get(name, {})}
    if name == _SLOTS:
        values |= {"slots_mode": "separate_activation", "relation_labels": task.labels_of}
    return kind(arch=name, **values)


def _config_of(arch: str) -> Callable[..., SAEConfig]:
    """Return what makes a configuration, of an architecture of any name."""
    return config_of(arch)


def train_config(config: GroundTruthConfig, seed: int) -> TrainConfig:
    """Return the training of one model, which writes no files."""
    return TrainConfig(
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
        log_every=max(1, config.max_steps // 10),
        eval_every=0,
        checkpoint_every=0,
    )


def _wanted(task: Task) -> list[tuple[str, int]]:
    seeds = tuple(dict.fromkeys(task.config.seeds))
    if not seeds:
        raise ValueError("seeds must be given: --seeds 42 123")
    return [(arch, seed) for arch in architectures(task) for seed in seeds]


def _prepare(task: Task, out: Path, *, show_progress: bool) -> None:
    folder = out / "task"
    folder.mkdir(exist_ok=True)
    bar: Any = None

    def report(step: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = progress_bar(total=total, unit="step", shown=show_progress)
        bar.update(step - bar.n)

    try:
        task.prepare(folder, report)
    finally:
        if bar is not None:
            bar.close()


def _entry(task: Task, arch: str, seed: int, model: Path, *, show_progress: bool) -> dict[str, Any]:
    """Train one model, save it and return its entry of results.json."""
    sae, history = _trained(task, arch, seed, show_progress=show_progress)
    measured = evaluate(sae, _parts(task.heldout_rows))
    scored = task.score(sae)
    sae.save(model)
    if history:
        write_text(model / METRICS, "".join(f"{json.dumps(row)}\n" for row in history))
    scores = {
        "fvu": measured["heldout_fvu"],
        "l0": measured["heldout_l0"],
        "dead": measured["heldout_dead_fraction"],
        **scored.scores,
    }
    finite = {name: _finite(value) for name, value in scores.items()}
    return {"arch": arch, "seed": seed, "scores": finite, "details": scored.details}


def _trained(
    task: Task, arch: str, seed: int, *, show_progress: bool
) -> tuple[SparseAutoencoder, list[Row]]:
    """Return a trained model, and what its training logged."""
    columns, heldout_columns = None, None
    if arch == _SLOTS and task.labels_of is not None:
        columns, heldout_columns = ({task.labels_of: labels} for labels in task.labels())
    stop = StopOnSignal()
    trainer = Trainer(
        sae_config(task.config, arch, task),
        train_config(task.config, seed),
        task.rows,
        heldout=task.heldout_rows if columns else None,
        columns=columns,
        heldout_columns=heldout_columns,
        stop=stop,
        show_progress=show_progress,
    )
    if arch == UNTRAINED:
        trainer.close()
        return trainer.model(), []
    sae = trainer.train()
    if trainer.step < trainer.total_steps:
        assert stop.received is not None
        raise Stopped(stop.received)
    return sae, trainer.history


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Yield rows part by part."""
    for start in range(0, len(rows), _PART):
        yield rows[start : start + _PART]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _conclude(task: Task, results: Results, wanted: Sequence[tuple[str, int]], out: Path) -> None:
    """Compare the seeds of each architecture, and write results and pictures."""
    for arch in dict.fromkeys(arch for arch, _ in wanted):
        if arch != UNTRAINED:
            seeds = results.seeds_of(arch)
            models = {str(seed): out / _MODELS / f"{arch}_{seed}" for seed in seeds}
            results.overlap[arch] = seed_overlap(models)
    results.write(out / _RESULTS)
    drawn = _pictures(task, results, out)
    write_text(out / _MARKDOWN, results.markdown({path.name: path.stem for path in drawn}))
    first_seeds = {arch: results.seeds_of(arch)[0] for arch in results.architectures}
    firsts = {arch: out / _MODELS / f"{arch}_{seed}" for arch, seed in first_seeds.items()}
    histories = {}
    for arch, model in firsts.items():
        with suppress(OSError, ValueError):  # without a training there is none
            histories[arch] = read_history(model).rows
    latents = {arch: _latent_figures(task, model) for arch, model in firsts.items()}
    pictures = {path.stem: path.read_bytes() for path in drawn}
    results_page(results, pictures, latents, histories).write(out / REPORT)


def _latent_figures(task: Task, model: Path) -> LatentFigures:
    """Return how often the latents of a saved model fire, and their largest cosines."""
    sae = SparseAutoencoder.from_pretrained(model)
    rates: list[Tensor] = []
    evaluate(sae, _parts(task.heldout_rows), note_rates=rates.append)
    return LatentFigures(rates[0], sampled_cosines(sae.W_dec))


def _pictures(task: Task, results: Results, out: Path) -> list[Path]:
    first = draw_scores(results, out / "scores.png")
    return [first, *task.draw(results.entries, out)]
