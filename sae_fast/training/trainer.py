"""`Trainer`: one training run and its loop, for notebooks and for the command line.

step.py computes a step; launcher.py launches it, on a GPU as a CUDA graph, without waiting for it.
Metrics are read in one transfer every `log_every` steps, and with them whether a step has failed.
A run that is killed at any moment and resumed gives the losses and parameters of an undisturbed
run, to the bit.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sae_fast
from sae_fast import ops
from sae_fast.activations import ActivationSource
from sae_fast.activations.given_arrays import Given
from sae_fast.activations.scanning import RECORD_NAME
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architectures import ARCHITECTURES, make_architecture
from sae_fast.autoencoder.files import TENSOR_FILE, write_config
from sae_fast.autoencoder.loss_terms import LossTerm, checked_terms
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.effects import Run, check_run_effects
from sae_fast.config.mesh import divides
from sae_fast.config.sae import built_in
from sae_fast.distributed.ranks import Wishes, open_ranks
from sae_fast.distributed.replicas import digests
from sae_fast.evaluation.dictionary import sampled_cosines
from sae_fast.json_files import require
from sae_fast.log_output import show_log
from sae_fast.ops.native import build_info, describe_kernels
from sae_fast.report.panels import with_target
from sae_fast.report.picture import Picture, picture_of
from sae_fast.report.plot import plot_run
from sae_fast.report.training_page import LatentFigures
from sae_fast.training.absorption import mean_largest_cosine
from sae_fast.training.batches import StepBatches
from sae_fast.training.best import Best, BestRule
from sae_fast.training.calibration import Calibration
from sae_fast.training.callbacks import Callback, Callbacks
from sae_fast.training.checkpoint import (
    TENSORS,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    tensors_of,
)
from sae_fast.training.cuda_graph import GraphRecorder
from sae_fast.training.data import SharedShards, TrainingData
from sae_fast.training.device import checked_device
from sae_fast.training.downstream import Downstream, checked_downstream
from sae_fast.training.eval_metrics import with_eval_metrics
from sae_fast.training.failure import TrainingError, is_out_of_memory, out_of_memory
from sae_fast.training.health import RunHealth, silent_window
from sae_fast.training.heldout import HeldoutEvaluation
from sae_fast.training.labels import check_heldout_labels, with_label_counts
from sae_fast.training.latent_rows import LatentRows, check_divisible
from sae_fast.training.launcher import Launcher, explain_no_graph, wants_graph
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.metrics import ROW_NAMES, Row
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import make_optimizer
from sae_fast.training.optimizer.schedule_free import ScheduleFreeWeights
from sae_fast.training.optimizer.weight_average import WeightAverage
from sae_fast.training.preflight import check_before_reading
from sae_fast.training.progress import ProgressBar, StepClock
from sae_fast.training.random_state import (
    random_tensors,
    random_values,
    restore_random,
    seed_everything,
)
from sae_fast.training.resume_state import FORMAT_VERSION, check_tensors
from sae_fast.training.run_directory import (
    AVERAGED,
    FINAL,
    RunDirectory,
    check_holds_no_runs,
    describe,
    in_mode_directory,
    run_name,
    run_title,
)
from sae_fast.training.run_log import RunLog
from sae_fast.training.schedule import make_schedules
from sae_fast.training.signals import StopOnSignal
from sae_fast.training.start import (
    check_start,
    initialize_,
    model_to_start_from,
    normalize_,
    resumed_checkpoint,
    saved_config,
    serve_in_units_of,
    sized_config,
    start_from_,
    taken_from,
    warn_of_changes,
    with_saved_batch,
)
from sae_fast.training.step import TrainingStep
from sae_fast.training.wall_clock import WallClock

__all__ = ["Trainer", "TrainingError"]

logger = logging.getLogger(__name__)

_LOSS_TERMS = "loss_terms"  # in a state, where there are any
_CHECKED_EVERY = 500  # steps, after which ranks compare their models
_OPTIMIZER = "optimizer."  # before the names of the optimiser's tensors in a state


class Trainer:
    """Train one sparse autoencoder.

    `train` makes all steps. To make them one by one, open the trainer:

        with Trainer(sae_config, train_config, data) as trainer:
            while not trainer.is_done:
                row = trainer.advance()

    Args:
        sae_config: the model; its sizes may be left to the data. A RunConfig holds both.
        train_config: its training. Without `checkpoint_dir` nothing is written.
        data: activations [n, D] in a tensor, a NumPy array or a memory map, which are not copied;
            an iterator, a DataLoader or an iterable of such tensors, read in its order; a source of
            batches; or shards shared with other trainers (see sweep.py). None: the shards in
            `train_config.shard_dir`.
        heldout: activations [n, D] for evaluation; None: the held-out shards, if there are any.
        columns: beside a tensor `data`, labels [n] by the name that `probe_labels` has, and where
            sequences matter doc_id or position; of a transcoder "targets", [n, d_out].
        heldout_columns: beside a tensor `heldout` the labels of arch slots, for its accuracies,
            and targets.
        downstream: for loss_fn ce and kl, the model that continues from the reconstruction.
        loss_terms: terms of one's own, which are added to the loss and logged, see `LossTerm`. A
            resumed run must be given them again.
        callbacks: called at the start, after steps, evaluations and checkpoints, and at the end,
            see `Callback`.
        stop: what tells to stop; None: signals do, during `train`.
        show_progress: whether to show a progress bar, and the log lines of the package where
            `logging` is not set up.

    Attributes:
        is_out_of_time: True where `max_hours` have ended `train` before its last step.
        is_stopped: True where `stop` was called since the trainer was opened.
        was_complete: True where all steps had been made when the run was resumed: then `train`
            only writes those results that are missing.

    Raises:
        ValueError: when data, configuration, memory or directories do not allow the run; nothing
            has been written then.
    """

    @torch.inference_mode(False)  # whatever the caller has set: what is made is trained
    def __init__(
        self,
        sae_config: SAEConfig | RunConfig,
        train_config: TrainConfig | None = None,
        data: Given | ActivationSource | Iterable[Any] | SharedShards | None = None,
        *,
        heldout: Given | None = None,
        columns: Mapping[str, Given] | None = None,
        heldout_columns: Mapping[str, Given] | None = None,
        downstream: Downstream | None = None,
        loss_terms: Sequence[LossTerm] = (),
        callbacks: Sequence[Callback] = (),
        stop: StopOnSignal | None = None,
        show_progress: bool = True,
    ) -> None:
        self._callbacks = Callbacks(self, callbacks)
        sae_config, train_config = _both_configs(sae_config, train_config)
        self._wall_clock = WallClock(train_config)
        self.ranks = open_ranks(train_config)
        self._axes = self.ranks.axes(train_config.mesh)
        self._stop, self._show_progress = stop, show_progress and self.ranks.is_first
        self._run: RunDirectory | None = None
        inputs = _Inputs(data, heldout, columns, heldout_columns, downstream, loss_terms)
        with self._refusing_start(), self.ranks.agreement(self._facts):
            self._prepare(sae_config, train_config, inputs)

    def _prepare(self, sae_config: SAEConfig, train_config: TrainConfig, inputs: _Inputs) -> None:
        """Open and check all that the run needs, and make its model."""
        data, heldout, columns, heldout_columns, downstream, loss_terms = inputs
        if self._show_progress:
            show_log()
        if self.ranks.size > 1:
            _check_mesh(sae_config, train_config, data, loss_terms)
        _check_variance(sae_config, train_config)
        self._downstream = checked_downstream(downstream, sae_config)
        check_holds_no_runs(sae_config, train_config)
        train_config = in_mode_directory(sae_config, train_config)
        asked = RunConfig(sae=sae_config, train=train_config)
        # Before anything is read, which may take hours.
        with self.ranks.agreement(lambda: self._first_facts(asked)):
            self.device = checked_device(self.ranks.device_of(train_config.device))
        if train_config.num_threads is not None:
            torch.set_num_threads(train_config.num_threads)
        checkpoint = resumed_checkpoint(train_config, writes=self.ranks.is_first)
        train_config = with_saved_batch(train_config, checkpoint)
        if data is None:
            config = RunConfig(sae=sae_config, train=train_config)
            check_before_reading(config, checkpoint, has_heldout=heldout is not None)
        given = (data, heldout, self.device, sae_config, columns, heldout_columns)
        self.data = TrainingData(train_config, *given)
        self.source = self.data.source
        self.train_config = train_config = self.data.config
        sae_config = with_label_counts(sae_config, self.source.columns)
        check_heldout_labels(sae_config, self.data.heldout_labels)
        known = None if checkpoint is not None else model_to_start_from(train_config)
        sae_config = taken_from(known, sae_config)
        self.sae_config = sized_config(sae_config, self.source.d_in, checkpoint, self.data.d_out)
        architecture = make_architecture(self.sae_config)
        self.loss_terms = checked_terms(loss_terms, architecture, ROW_NAMES)
        rows = self.source.rows_per_epoch
        for name, count, ranks in (
            ("rows", rows, self._axes.data),
            ("latents", self.sae_config.d_sae, self._axes.latents),
        ):
            if count < ranks.size:
                mesh = f"mesh = {train_config.mesh!r}"
                raise ValueError(f"{mesh} has more processes than there are {name}, {count:,}")
        self.schedules = make_schedules(train_config, self.sae_config, rows)
        self.total_steps = self.schedules.total_steps
        self.tokens_per_step = train_config.tokens_per_step
        self.sae_config = self.sae_config.for_run(self.total_tokens)
        self.config = RunConfig(sae=self.sae_config, train=train_config)
        self.schedules.check_made(0 if checkpoint is None else checkpoint.step, train_config)
        before = None if checkpoint is None else saved_config(checkpoint)
        check_run_effects(self._run_effects(), before)
        if train_config.eval_metrics and self._downstream.losses is None:
            self._downstream = with_eval_metrics(
                self._downstream,
                self.config,
                self.source.origin,
                self.device,
                is_named=data is None,
            )
        self._heldout = HeldoutEvaluation(
            self.data, train_config.dead_percentage_threshold, self._downstream
        )
        self._rows = LatentRows(self._axes.latents, self.sae_config)
        self.memory_plan = plan_memory(
            self.sae_config,
            train_config,
            native=build_info()["backend"] == "native",
            pool_bytes=self.source.memory_bytes,
            cache_bytes=self.source.device_bytes,
        )
        self.memory_plan.check()
        self.scaler = LossScaler(enabled=train_config.amp == "fp16", device=self.device)
        self.step = self.tokens = 0
        self.clock = StepClock(self.device)
        self.best: Best | None = None
        self._best_rule = BestRule(
            *(self.sae_config, train_config, self.schedules),
            has_heldout=self.data.heldout is not None,
            wanted_l0=architecture.wanted_l0,
            own_terms=(*architecture.term_names, *(term.name for term in self.loss_terms)),
        )
        self.is_out_of_time = False
        self.saved_step = -1
        self._warning: str | None = None
        self._is_open = self.is_stopped = False
        with self._explained_memory():
            self._open_run_directory(checkpoint)
            self._make_model(checkpoint, known)

    def _run_effects(self) -> Run:
        """Return what decides which settings have an effect in this run."""
        return Run(
            *(self.sae_config, self.train_config),
            data=self.data.kind,
            has_heldout=self.data.heldout is not None,
            has_names=self.data.has_names,
            has_target_names=lambda: self.data.has_names(of_targets=True),
            total_steps=self.total_steps,
        )

    def train(self) -> SparseAutoencoder:
        """Make all steps, or those up to a signal, and return the model, see `model`.

        Raises:
            TrainingError: when the loss is not finite, naming step and shards, or memory runs out.
            ShardError: when a shard cannot be read any more.
            ValueError: when an iterator ends before the run.
            CheckpointError: when a checkpoint cannot be written.
        """
        with self._stop or StopOnSignal() as stop, self, self._progress() as progress:
            wishes = self._wishes(stop)
            while not (self.is_done or wishes.signal):
                row = self.advance(save=wishes.save)
                progress.advance(self.tokens_per_step)
                progress.show([row], last=self.step == self.total_steps)
                wishes = self._wishes(stop)
                self.is_out_of_time = self.step < self.total_steps and wishes.is_over
                if self.is_out_of_time:
                    break
            if wishes.signal:
                stop.received = signal.Signals(wishes.signal)
        return self.model()

    def _wishes(self, stop: StopOnSignal) -> Wishes:
        """Return what signals and the time ask for, of any rank."""
        save = stop.take_save() or self._wall_clock.is_save_due
        own = Wishes(stop.received or 0, save, self._wall_clock.is_over)
        with self.ranks.counted():
            return self.ranks.agreed(own)

    def stop(self) -> None:
        """End the training after the current step, with a checkpoint, as after a signal.

        `train` returns then, and `advance` makes no further step until the trainer is opened again.
        """
        self.is_stopped = True

    @property
    def is_done(self) -> bool:
        """Whether no step is left to make: all are made, or `stop` was called."""
        return self.step >= self.total_steps or self.is_stopped

    def _progress(self) -> ProgressBar:
        return ProgressBar(self.total_tokens, self.tokens, shown=self._show_progress)

    @torch.inference_mode(False)
    def __enter__(self) -> Trainer:
        """Start the reader and the logs, and write the first checkpoint."""
        if self._callbacks.is_running:
            raise RuntimeError("this trainer cannot be opened: one of its callbacks is running")
        self.is_stopped = False
        try:
            self._open()
        except BaseException as error:
            self._callbacks.end(error)
            self._abort()
            raise
        return self

    @torch.inference_mode(False)
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Call `finish` if that was not done; after an error only close."""
        try:
            if error is not None:
                self.ranks.note_failure(error)
                self._callbacks.end(error)
            elif self._is_open:
                self.finish()
        finally:
            self._abort()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def advance(self, *, prune: bool = True, save: bool = False) -> Row:
        """Make one optimiser step, then log, evaluate and save what is due after it.

        On a GPU the step may only have been launched when this returns. Call it inside
        `with trainer:`.

        Args:
            prune: whether a checkpoint that is written replaces the oldest; see `keep_checkpoints`.
            save: whether to write a checkpoint also where `checkpoint_every` does not ask for one.

        Returns the row of metrics that was logged, empty where none was due. Raises what `train`
        does, and RuntimeError where the trainer is not open, all its steps are made, or `stop` was
        called: see `is_done`.
        """
        if not self._is_open or self.is_done or self._callbacks.is_running:
            reason = "use it inside `with trainer:`"
            if self._callbacks.is_running:
                reason = "one of its callbacks is running"
            elif self._is_open:
                reason = f"it was stopped at step {self.step}; is_done tells when a loop has to end"
                reason = reason if self.is_stopped else "all its steps are made"
            raise RuntimeError(f"this trainer cannot advance: {reason}")
        with self._explained_memory():
            with self.ranks.counted():
                self._launcher.launch(self.schedules.at(self.step))
            self.step += 1
            self.tokens += self.tokens_per_step
            self.clock.count_step()
            if self.ranks.size > 1 and self.step % _CHECKED_EVERY == 0:
                self._check_replicas()
            row = self._report(prune, save=save)
            self._callbacks.step(row)
            if self._callbacks:
                self.is_stopped = self.ranks.any(self.is_stopped)
            if self.is_stopped and self.saved_step < self.step:
                self.save_checkpoint(prune=prune)
            return row

    @torch.inference_mode(False)
    def finish(self, *, prune: bool = True) -> None:
        """Save what is not saved yet, and write the results of a run that is complete."""
        try:
            self._finish(prune)
        except BaseException as error:
            self._callbacks.end(error)
            raise
        self._callbacks.end(None)

    def _finish(self, prune: bool) -> None:
        with self._explained_memory():
            self.clock.pause(self.batches.take_stalled_seconds)
        if self.saved_step < self.step:
            self.save_checkpoint(prune=prune)
        for parameter in self.sae.parameters():
            ops.drop_copies(parameter)  # only further steps would read them
        with self.ranks.agreement():
            self._conclude()
        self._is_open = False

    def close(self) -> None:
        """Stop reading, and let other runs use the directory.

        A directory in which no checkpoint was written is left as it was before.
        """
        self.source.close()
        self._release()

    @property
    def checkpoints(self) -> CheckpointStore | None:
        """The checkpoints of the run; None where it writes nothing."""
        return None if self._run is None else self._run.checkpoints

    def model(self) -> SparseAutoencoder:
        """Return the model to evaluate and save: `sae`, or the average of a schedule-free run."""
        return self.sae if self.schedule_free is None else self.schedule_free.model()

    @property
    def is_ahead(self) -> bool:
        """Whether the host launches steps ahead of the device: on a GPU."""
        return self.device.type == "cuda"

    def graph_recorder(self, step: TrainingStep) -> GraphRecorder | None:
        """Return what captures the steps in CUDA graphs; None where they are not captured."""
        if self.device.type != "cuda" or not wants_graph(self.train_config):
            return None
        if (reason := explain_no_graph(step)) is not None:
            logger.info("no CUDA graph with %s", reason)
            return None
        return GraphRecorder(self.device)

    def evaluate(self) -> dict[str, float]:
        """Return what is measured on the held-out rows, and gram_mean where there are none.

        With an average of the weights the figures of the averaged model are added, with averaged_
        before their names. Where eval_metrics is due after the last step, the losses of the
        language model are added.
        """
        averaged = None if self.average is None else self.average.model
        config = self.train_config
        in_model = config.eval_metrics > 0 and self._is_due(config.eval_metrics * config.eval_every)
        return self._heldout.evaluate(self.model(), averaged, in_model=in_model)

    def kept_copies(self) -> AbstractContextManager[None]:
        """Keep the working copies that the steps made of the weights, for calls of `sae`."""
        return self._launcher.kept_copies()

    def keep_codes(self) -> None:
        """Keep the codes of the batches of each step, from the next one on, in `codes`.

        It is for callbacks, in `on_start`. The steps themselves are the same.
        """
        self._launcher.keep_codes()

    @property
    def codes(self) -> list[ops.Code]:
        """The codes of the batches of the last step, as the model was before its update.

        In normalised units. Empty without `keep_codes`, and before the first step.
        """
        return self._launcher.codes

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.total_steps * self.tokens_per_step

    @property
    def summary(self) -> dict[str, Any]:
        """Numbers of the whole run by name, complete when the trainer has finished."""
        return self._log.summary

    @property
    def history(self) -> list[Row]:
        """The rows of metrics so far, those before a resume included."""
        return self._log.rows

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw the metrics so far, one panel a quantity; a notebook shows the picture.

        It is shown where it is the value of a cell; elsewhere call IPython's `display` on it.

        Args:
            path: also write the panels into this file, a .png, .pdf or .svg.

        Raises ValueError where nothing has been logged yet.
        """
        if not (rows := self.history):
            raise ValueError(
                f"nothing has been logged yet: log_every is {self.train_config.log_every}"
            )
        rows = with_target(rows, self.sae_config.target_l0)
        title = describe(self.sae_config)
        if self._run is not None:
            title = run_title(run_name(self._run.path), self.sae_config)
        if path is not None:
            plot_run(rows, Path(path), title)
        return picture_of(rows, title)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the model that is saved: tensors and JSON values.

        Tensors: the optimiser's, torch's generators, weights beside the saved model's. Values:
        configuration, counters, loss scale, position in the data, the other generators, the id of
        the Weights & Biases run. The tensors are no copies.
        """
        return {
            "step": self.step,
            "format_version": FORMAT_VERSION,
            "versions": {"sae_fast": sae_fast.__version__, "torch": torch.__version__},
            "config": self.config.to_dict(),
            "tokens": self.tokens,
            "seconds": self.clock.seconds,
            "stalled_seconds": self.clock.stalled,
            "scheduler_state": self.schedules.rate.state(self.step),
            "best": self.best,
            "loss_scaler": self.scaler.state(),
            "source": self.batches.state_dict(),
            "heldout": self.data.heldout_identity,
            "random": random_values(),
            "wandb_id": self._log.wandb_id,
            **self._own_terms(),
            **self._own_tensors(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the model is loaded apart from it.

        Raises ValueError where the data or the settings do not let the run continue, or the state
        does not fit the model; nothing of it has been taken over then.
        """
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        optimizer = {
            name.removeprefix(_OPTIMIZER): value
            for name, value in tensors.items()
            if name.startswith(_OPTIMIZER)
        }
        self.optimizer.check_rule(optimizer)
        skipped = state["loss_scaler"]["skipped_steps"]
        expected = self._own_tensors() | self._calibration.expected(tensors)
        check_tensors(state["step"], skipped, tensors, expected)
        self.batches.load_state_dict(state["source"])
        self.data.check_heldout(state.get("heldout"))
        served = self.batches.rows_served()
        require(served in (None, state["tokens"]), "source", f"{state['tokens']} tokens on", served)
        self.optimizer.load_state_dict(optimizer)
        if self.average is not None:
            self.average.load_state_dict(tensors)
        if self.schedule_free is not None:
            self.schedule_free.load_state_dict(tensors)
        self.scaler.load(state["loss_scaler"])
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        if self.step < self.total_steps:
            self._calibration.undo_(tensors)
        self.clock.set(float(state["seconds"]), float(state["stalled_seconds"]))
        self.best = state.get("best")
        self._log.continue_wandb(state.get("wandb_id"))
        restore_random(tensors, state["random"])

    def _own_terms(self) -> dict[str, dict[str, float]]:
        """Return the coefficients of `loss_terms` by name, as `state_dict` has them, if any."""
        weights = {term.name: float(term.coefficient) for term in self.loss_terms}
        return {_LOSS_TERMS: weights} if weights else {}

    def _own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of `state_dict`."""
        optimizer = self.optimizer.state_dict()
        tensors = {_OPTIMIZER + name: value for name, value in optimizer.items()}
        if self.average is not None:
            tensors |= self.average.state_dict()
        if self.schedule_free is not None:
            tensors |= self.schedule_free.state_dict()
        return {**tensors, **self._calibration.state_dict(), **random_tensors()}

    def save_checkpoint(self, *, best: bool = False, prune: bool = True) -> Path | None:
        """Write a checkpoint of the run as it stands; return its path, None without a directory.

        Args:
            best: whether `best` is to name it.
            prune: whether to remove the oldest checkpoint beyond `keep_checkpoints`.

        Raises:
            CheckpointError: when it cannot be written.
            TrainingError: when a step since the last reading went wrong.
        """
        self.saved_step = self.step
        self._wall_clock.note_save()
        self._check_replicas()
        if not self._rows.has_all and self.train_config.checkpoint_dir is not None:
            self._launcher.read()
            path = self._save_divided(best=best, prune=prune)
        elif self._run is not None:
            self._launcher.read()
            self._log.flush()
            state, store = self.state_dict(), self._run.checkpoints
            path = store.save(state, self.model().save, best=best, prune=prune)
        if self._run is None:
            return None
        self._log.note_checkpoint(path)
        if self.data.scans.is_changed:
            self._save_scans()
        self._callbacks.checkpoint(path)
        return path

    def _save_divided(self, *, best: bool, prune: bool) -> Path:
        """Write a checkpoint of which each process writes its latents; return its path.

        It has the files that one process writes. It gets its name when all are written.
        """
        state, model = self.state_dict(), self.sae
        with ExitStack() as stack:
            with self.ranks.agreement():
                aside = None
                if self._run is not None:
                    self._log.flush()
                    aside = stack.enter_context(self._run.checkpoints.being_written(self.step))
            place = Path(self.ranks.values(str(aside))[0])
            try:
                with self.ranks.agreement():
                    if self._axes.data.is_first:  # others have the same
                        self._rows.save(place / TENSOR_FILE, model.state_dict())
                        self._rows.save(place / TENSORS, tensors_of(state))
            except OSError as error:
                raise CheckpointError(f"cannot write the checkpoint {place}: {error}") from error
            with self.ranks.agreement():
                if self._run is not None:
                    write_config(place, model.config, model.origin)
                    place = self._run.checkpoints.complete(place, state, best=best, prune=prune)
        return place

    def _check_replicas(self) -> None:
        """Raise RankError, naming it, where a rank has another model or optimiser than rank 0."""
        with self.ranks.agreement(self._state_facts):
            pass

    def _first_facts(self, config: RunConfig) -> dict[str, Any]:
        """Return what all ranks must have in common before they read anything, by name."""
        return {"its settings": _common_settings(config), "its device": self.device.type}

    def _facts(self) -> dict[str, Any]:
        """Return what all ranks must have in common before the first step, by name."""
        given = _common_settings(self.config)
        # Of dense codes, and a skip connection, torch's products follow the threads.
        follows = self.sae.architecture.needs_host_sync or self.sae_config.skip_connection
        return {
            "its threads": torch.get_num_threads() if follows else None,
            "its shards": self.batches.state_dict(),
            "its held-out rows": self.data.heldout_identity,
            "its settings": given,  # some follow from the shards
            **self._state_facts(),
        }

    def _state_facts(self) -> dict[str, Any]:
        """Return digests of the state that all ranks have in common after each step."""
        model, optimizer = self.sae.state_dict(), self.optimizer.state_dict()
        facts: dict[str, Any] = {"the step": self.step}
        rows = self._rows
        if not rows.has_all and self._axes.data.size > 1:  # other processes have the same latents
            of_block = digests(rows.divided({**model, **optimizer}))
            facts[f"the latents {rows.first} to {rows.end - 1}"] = of_block
        model, optimizer = rows.shared(model), rows.shared(optimizer)
        return {**facts, "the model": digests(model), "the optimiser": digests(optimizer)}

    def _save_scans(self) -> None:
        """Remember what was found in the shards, for this run and for others on them."""
        assert self._run is not None
        self.data.scans.save(self._run.path / RECORD_NAME)
        self.data.scans.save_beside_manifests()

    def _open(self) -> None:
        if self._run is not None:
            self._run.hold()
        if not self.was_complete:
            self.batches.start()  # reads beside what comes first
            logger.info("%s", describe_kernels())
            logger.info("%s", self.train_config.describe_precision())
            logger.info("%s", self.schedules.rate.describe())
            if self.ranks.is_first:
                self._log.open_loggers(quiet=not self._show_progress)
        self._callbacks.start()
        if self.saved_step < 0:
            self.save_checkpoint()  # before any work: that it can be done is known now
        self.ranks.drop_traffic()
        self.clock.resume()
        self._is_open = True

    def _abort(self) -> None:
        """Close everything; a run of Weights & Biases that is open is marked as failed."""
        self._is_open = False
        self._log.close(failed=True)
        self.close()

    def _release(self) -> None:
        if self._run is not None:
            self._run.release()

    @contextmanager
    def _explained_memory(self) -> Iterator[None]:
        """Replace the error of a full memory by one that says what was planned."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, self.device):
                raise
            newest = self._newest_checkpoint()
            raise out_of_memory(self.step + 1, error, self.memory_plan, newest) from error

    @contextmanager
    def _refusing_start(self) -> Iterator[None]:
        """Release the directory when the trainer cannot be made."""
        try:
            yield
        except BaseException:
            self._release()
            raise

    def _newest_checkpoint(self) -> Path | None:
        return None if self._run is None else self._run.checkpoints.newest()

    def _report(self, prune: bool, *, save: bool) -> Row:
        """Log, evaluate and save what is due after a step; return the row that was logged."""
        config = self.train_config
        look, save = self._is_due(config.eval_every), save or self._is_due(config.checkpoint_every)
        tell = self._log.has_loggers and self._is_due(config.wandb_log_every or config.log_every)
        log = tell or self._is_due(config.log_every)
        if not (log or look or save or self._launcher.is_reading_due()):
            return {}
        self.clock.pause(self.batches.take_stalled_seconds)
        window = silent_window(self.tokens, self.total_tokens)
        metrics = self._launcher.read(window)
        row: Row = self._training_row(metrics) if log else {}
        if (warning := self.sae.architecture.warning(metrics)) != self._warning:
            self._warning = warning
            if warning is not None:
                logger.warning("step %d: %s", self.step, warning)
        improved = False
        if look:
            if self.step == self.total_steps and self.data.heldout is not None:
                self._calibration.calibrate_(self.model, self.data.heldout)
            with self.kept_copies():
                evaluation = self.evaluate()
            measured = {**metrics, "explained_variance": 1 - metrics["fvu"], **evaluation}
            evaluation |= self._best_rule.objective(self.step, measured)
            row |= evaluation
            best = self._best_rule.improved(self.best, self.step, measured | evaluation)
            improved, self.best = best is not None, best or self.best
        if row:
            epoch = self.batches.passes(self.tokens)
            row = {"step": self.step, "tokens": self.tokens, "epoch": epoch, **row}
            rates = self._heldout.rates if look else None
            self._log.write(row, to_loggers=tell or look, rates=rates)
        if look:
            self._callbacks.evaluation(evaluation)
        if save or improved:
            self.save_checkpoint(best=improved, prune=prune)
        self.clock.resume()
        return row

    def _is_due(self, interval: int) -> bool:
        """Return True every `interval` steps and at the last step; 0 means only at the last."""
        return self.step == self.total_steps or (interval > 0 and self.step % interval == 0)

    def _training_row(self, metrics: dict[str, float]) -> Row:
        window, settings = self.clock.take_window(), self.schedules.at(self.step - 1)
        seconds = max(window.seconds, 1e-9)
        row: Row = {
            **metrics,
            "explained_variance": 1 - metrics["fvu"],
            "activation_fraction": metrics["l0"] / self.sae_config.d_sae,
            "learning_rate": settings.rate,
            "tokens_per_second": window.steps * self.tokens_per_step / seconds,
            "time_per_step_ms": 1000 * window.seconds / window.steps,
            **self.ranks.take_traffic(window.steps, seconds),
            "reader_stall_fraction": window.stalled / seconds,
        }
        if not metrics["dead_fraction"] and self.tokens < self.sae_config.kept_dead_after_tokens:
            row["dead_fraction"] = None  # it says nothing yet: no latent can be dead
        if settings.k is not None:
            row["k"] = settings.k
        if self.scaler.enabled:
            row["loss_scale"] = float(self.scaler.scale)
            row["skipped_steps"] = int(self.scaler.skipped_steps)
        if self.source.nonfinite_rows:
            row["skipped_rows"] = self.source.nonfinite_rows
        interval = self.train_config.wandb_log_every
        if interval is not None and self._is_due(interval) and self._rows.has_all:
            row["max_decoder_cosine"] = float(mean_largest_cosine(self.sae.W_dec))
        return row

    def _open_run_directory(self, checkpoint: Checkpoint | None) -> None:
        """Refuse what cannot be written to before anything is computed."""
        config = self.train_config
        health = RunHealth(self.sae_config, config, self.schedules)
        self.was_complete = self._continues = False
        self._recorded = self.config
        if config.checkpoint_dir is not None:
            run = RunDirectory(Path(config.checkpoint_dir), config.keep_checkpoints)
            if self.ranks.is_first:
                self._run = run
                run.prepare(checkpoint)
            if checkpoint is not None and run.owns(checkpoint):
                self._continues = True
                self.was_complete = checkpoint.step == self.total_steps
                if self.was_complete:  # its files tell how it was trained
                    self._recorded = saved_config(checkpoint)
        if self._run is not None:
            self._run.write_config(self._recorded)
            self._save_scans()
        step = -1 if checkpoint is None else checkpoint.step
        self._log = RunLog(self._run, self.config, health, step)
        if self._run is not None and self.data.heldout is None:
            figure = self._best_rule.figure
            logger.info("no held-out rows: best is chosen by the training's %s", figure)

    def _make_model(self, checkpoint: Checkpoint | None, known: SparseAutoencoder | None) -> None:
        """Make the model, new, from a checkpoint or from another, and optimiser and source."""
        config = self.train_config
        seed_everything(config.seed)
        if checkpoint is None:
            check_start(known, self.sae_config, config, self.source.origin)
            self.sae = self._rows.new_model()
            if known is not None:
                start_from_(self.sae, known, self.data, self._rows)
            else:
                normalize_(self.sae, self.data)
        else:
            self.sae = SparseAutoencoder.from_pretrained(checkpoint.path, trainable=True)
            self._rows.keep_(self.sae)  # out of the mapped file, aligned
        if self.source.origin:
            self.sae.origin = dict(self.source.origin)
        serve_in_units_of(self.sae, self.source)
        per_step, ahead = config.grad_acc_steps, self.is_ahead
        readers = self._axes.data
        self.batches = StepBatches(self.source, self.device, per_step, ahead=ahead, ranks=readers)
        if checkpoint is None and known is None:
            initialize_(self.sae, self.source, self.source.rows_per_epoch, config)
        self.sae.to(self.device)
        self._calibration = Calibration(self.sae)
        self.optimizer = make_optimizer(self.sae, config, self.total_steps, self._rows)
        self.average: WeightAverage | None = None
        if config.average_decay > 0:
            step_count = self.optimizer.step_count
            self.average = WeightAverage(self.sae, config.average_decay, step_count)
        averages = self.optimizer.rule == "schedule_free_signum"
        self.schedule_free = ScheduleFreeWeights(self.optimizer) if averages else None
        if checkpoint is not None:
            self._resume(checkpoint)
        settings = (self.scaler, config.precision, self.average, self._downstream.model)
        step = TrainingStep(self.sae, self.optimizer, *settings, self.loss_terms, readers)
        self._launcher = Launcher(
            *(step, self.batches, config, self.step, self._newest_checkpoint),
            ahead=ahead,
            recorder=self.graph_recorder(step),
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint, and say which settings are others now."""
        try:
            tensors = self._rows.of(checkpoint.tensors)
            self.load_state_dict({**checkpoint.state, **tensors})
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
        warn_of_changes(checkpoint, self.config, self.schedules.rate, self.sae)
        terms = [values.get(_LOSS_TERMS, {}) for values in (checkpoint.state, self._own_terms())]
        if terms[0] != terms[1]:
            logger.warning("resumed with other loss_terms than before: %s -> %s", *terms)
        if self._continues:
            self.saved_step = self.step
            if self._run is not None:
                self._log.note_checkpoint(self._run.checkpoints.path_of(self.step))
        else:
            self._log.continue_wandb(None)  # another run, with a line of its own in the charts
        logger.info("resumed from %s", checkpoint.path)

    def _conclude(self) -> None:
        """Complete the summary, and write the results of a run that is complete."""
        seconds, stalled = self.clock.seconds, self.clock.stalled
        totals = {"steps": self.step, "tokens": self.tokens, "seconds": seconds}
        totals["reader_stall_fraction"] = stalled / max(seconds, 1e-9)
        skipped = {}
        if self.scaler.enabled:
            skipped["skipped_steps"] = int(self.scaler.skipped_steps)
            trained = self.step - skipped["skipped_steps"]
            skipped["trained_tokens"] = trained * self.tokens_per_step
        is_complete = self.step == self.total_steps
        self._log.conclude(totals, skipped, self.best, is_complete=is_complete)
        if self._run is not None and is_complete:
            models = self._models_to_leave()
            if not (self.was_complete and self._run.has_results(self.step, models)):
                self._log.write_results(self._recorded, models, self._latent_figures())
        self._log.close()

    def _latent_figures(self) -> LatentFigures:
        """Return numbers of the latents for the report, of samples of the latents and the rows."""
        model = self.model()
        rates = self._heldout.rates
        sample = self._heldout.sample(model) if self._rows.has_all else None
        return LatentFigures(rates, sampled_cosines(model.W_dec), sample)

    def _models_to_leave(self) -> dict[str, Callable[[], SparseAutoencoder]]:
        """Return what makes the models that a complete run saves beside its checkpoints."""
        models: dict[str, Callable[[], SparseAutoencoder]] = {}
        if self.average is not None:
            models[AVERAGED] = self.average.model
        if self.sae_config.arch == "slots":
            models[FINAL] = self.model
        return models


class _Inputs(NamedTuple):
    """The arguments of `Trainer` beside the configurations and settings of its output."""

    data: Given | ActivationSource | Iterable[Any] | SharedShards | None
    heldout: Given | None
    columns: Mapping[str, Given] | None
    heldout_columns: Mapping[str, Given] | None
    downstream: Downstream | None
    loss_terms: Sequence[LossTerm]


def _check_mesh(
    sae: SAEConfig, train: TrainConfig, data: object, loss_terms: Sequence[LossTerm]
) -> None:
    """Raise ValueError where a training cannot be divided among several processes."""
    if divides(train.mesh, "layers"):
        raise ValueError(
            f"mesh = {train.mesh!r} divides several trainings, and this is one: data=R divides its "
            "batches"
        )
    if sae.arch == "slots":
        raise ValueError("mesh must be left out with arch slots, which one process trains")
    if sae.is_end_to_end:
        raise ValueError(
            f"mesh must be left out with loss_fn {sae.loss_fn}, for which one process runs a model"
        )
    if isinstance(data, SharedShards):
        raise ValueError("mesh data must be left out of a sweep: layers divides its trainings")
    if divides(train.mesh, "latents"):
        return check_divisible(sae, train, loss_terms)
    own = ARCHITECTURES[sae.arch]
    known = [ARCHITECTURES[name].after_step_ for name in built_in()]
    if not own.selects_from_step and own.after_step_ not in known:
        raise ValueError(
            f"mesh must be left out with arch {sae.arch}: its after_step_ is given the code of one "
            "process alone"
        )


def _common_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that all ranks of a training must have in common."""
    given = config.to_dict()
    del given["train"]["device"], given["train"]["num_threads"]
    return {**given["sae"], **given["train"]}


def _both_configs(
    model: SAEConfig | RunConfig, training: TrainConfig | None
) -> tuple[SAEConfig, TrainConfig]:
    """Return the configurations of a run, given apart or together."""
    if isinstance(model, RunConfig):
        if training is not None:
            raise ValueError("train_config must be left out beside a RunConfig, which has its own")
        return model.sae, model.train
    if training is None:
        raise ValueError("train_config is missing: give SAEConfig and TrainConfig, or a RunConfig")
    return model, training


def _check_variance(sae: SAEConfig, train: TrainConfig) -> None:
    """Raise ValueError where the loss is divided by the variance of a single row."""
    if sae.loss_fn == "fvu" and train.tokens_per_step == 1:
        raise ValueError(
            "loss_fn fvu needs a batch_size (times grad_acc_steps) of at least 2, got 1: "
            "one row has no variance"
        )
