"""Several trainings on one stream of activations: `--sweep FILE`, and `Sweep`.

A sweep file is JSON: an object of lists, of which all combinations are trained, or a list of
objects with the settings of each training.

    {"k": [16, 32, 64], "seed": [0, 1]}
    [{"name": "small", "d_sae": 4096}, {"name": "relu", "arch": "relu", "l1_penalty_coeff": 0.1}]

What a training has on its own is the model and its optimiser; the data, the batches and the number
of steps belong to all. Each gives the same losses and weights, to the bit, as by itself.

With `--mesh layers=R` each of R processes makes the trainings of one block of the list, in step
with the others, so that all have checkpoints of the same steps.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypedDict

import torch

from sae_fast.activations.files import (
    folders_of_shards,
    require_one_kind,
    shards_in,
    tensor_files_in,
    warn_of_unread,
)
from sae_fast.activations.remote import local_place
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.loss_terms import LossTerm
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.fields import field_names, reject_unknown_keys
from sae_fast.config.mesh import divides
from sae_fast.config.sae import config_of, without_other_size
from sae_fast.config.setting import rules_of
from sae_fast.distributed.ranks import RankError, Ranks, Wishes, open_ranks
from sae_fast.json_files import read_json, shown
from sae_fast.log_output import show_log
from sae_fast.training.callbacks import Callback
from sae_fast.training.checkpoint import CheckpointStore, newest_common_step
from sae_fast.training.data import share_shards
from sae_fast.training.metrics import Row
from sae_fast.training.preflight import check_before_reading
from sae_fast.training.progress import ProgressBar
from sae_fast.training.run_directory import in_mode_directory
from sae_fast.training.signals import StopOnSignal
from sae_fast.training.start import resumed_checkpoint, with_saved_batch
from sae_fast.training.trainer import Trainer
from sae_fast.training.wall_clock import WallClock

logger = logging.getLogger(__name__)

NAME = "name"
MOST_TRAININGS = 4096

MakeTrainer = Callable[[str, RunConfig], Trainer]


class OwnCode(TypedDict):
    """Loss terms and callbacks of one's own, as `Trainer` takes them by keyword."""

    loss_terms: Sequence[LossTerm]
    callbacks: Sequence[Callback]


class Sweep:
    """Train several autoencoders on the same batches, one step each in turn.

    `train` makes all steps. To make them one by one, open the sweep:

        with sweep:
            while not sweep.is_done:
                rows = sweep.advance()

    Args:
        configs: of each training, by its name; see `read_sweep`.
        make: makes the trainer of one, all of them readers of one shared source; None: the shards
            in `shard_dir` are shared.
        loss_terms: of every training, see `Trainer`.
        callbacks: called by every training with its trainer, see `Trainer`. `trainer.stop()` ends
            all trainings after the current step, because they run together.
        stop: tells when to stop; None: signals do, during `train`.
        show_progress: as of a `Trainer`.

    Attributes:
        trainers: by name; with a mesh the ones that this process makes.
        ranks: the processes that divide the trainings.
        is_out_of_time: True where `max_hours` have ended `train` before its last step.

    Raises:
        ValueError: naming the training whose data, configuration, memory or directory is wrong.
    """

    @torch.inference_mode(False)  # as in Trainer
    def __init__(
        self,
        configs: Mapping[str, RunConfig],
        make: MakeTrainer | None = None,
        *,
        loss_terms: Sequence[LossTerm] = (),
        callbacks: Sequence[Callback] = (),
        stop: StopOnSignal | None = None,
        show_progress: bool = True,
    ) -> None:
        if not configs:
            raise ValueError("a sweep needs at least one training")
        if make is not None and (loss_terms or callbacks):
            raise ValueError(
                "loss_terms and callbacks must be left out beside make, which has them"
            )
        first = next(iter(configs.values())).train
        self._stop = stop
        self._wall_clock = WallClock(first)
        self.ranks = ranks_of_sweep(configs)
        self._divides_trainings = not divides(first.mesh, "data", "latents")
        self._show_progress = show_progress and self.ranks.is_first
        if self._show_progress:
            show_log()
        self.is_out_of_time = False
        self._opened = ExitStack()
        self.trainers: dict[str, Trainer] = {}
        with self.ranks.agreement(lambda: {"its settings": _settings_of(configs)}):
            configs = at_one_step(configs)
        own: OwnCode = {"loss_terms": loss_terms, "callbacks": callbacks}
        with self.ranks.agreement(self._facts):
            mine = own_trainings(configs, self.ranks)
            self._elsewhere = [
                _store(config) for name, config in configs.items() if name not in mine
            ]
            self._make(mine, make or _on_shards(mine, own))
        self._note_all(self._of_this_process([]))

    def _make(self, configs: Mapping[str, RunConfig], make: MakeTrainer) -> None:
        """Make the trainers of this process."""
        for name, config in configs.items():
            try:
                self.trainers[name] = make(name, told_apart(name, config))
            except BaseException as error:
                self._close()
                if isinstance(error, ValueError) and not isinstance(error, RankError):
                    raise ValueError(f"{name}: {error}") from error
                raise
        try:
            _require_one_step(self.trainers)
        except ValueError:
            self._close()
            raise

    def _facts(self) -> dict[str, Any]:
        """Return what all processes must have in common before the first step, by name."""
        trainers = list(self.trainers.values())
        return {
            "its device": trainers[0].device.type,
            "the step": trainers[0].step,
        }

    def values(self, value: Any) -> list[Any]:
        """Return a JSON value of every process that makes trainings of its own, in their order.

        Processes that make one training together have the value in common.
        """
        return self.ranks.values(value) if self._divides_trainings else [value]

    def train(self) -> dict[str, SparseAutoencoder]:
        """Make all steps of all trainings, or those up to a signal; return the models by name.

        Raises what `Trainer.train` does; the first error ends all trainings.
        """
        with self._stop or StopOnSignal() as stop, self, self._progress() as progress:
            wishes = self._wishes(stop)
            while not (self.is_done or wishes.signal or self.is_out_of_time):
                rows = self.advance(save=wishes.save)
                progress.advance(self._all.tokens)
                progress.show(rows, last=not self._unfinished())
                wishes = self._wishes(stop)
                self.is_out_of_time = self._all.is_unfinished and wishes.is_over
            if wishes.signal:
                stop.received = signal.Signals(wishes.signal)
        return {name: trainer.model() for name, trainer in self.trainers.items()}

    def __enter__(self) -> Sweep:
        """Open all trainers, see `Trainer`."""
        with ExitStack() as stack:
            for trainer in self.trainers.values():
                stack.callback(trainer.close)  # also of those that are not opened, after an error
            with self.ranks.agreement():
                for trainer in self.trainers.values():
                    stack.enter_context(trainer)
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Save what is not saved yet and close all trainers; after an error only close them."""
        if error is not None:
            self.ranks.note_failure(error)
            self._opened.__exit__(kind, error, traceback)
            return
        with self._opened:
            with self.ranks.agreement():
                for trainer in self.trainers.values():
                    trainer.finish(prune=False)
            self._prune()

    def advance(self, *, save: bool = False) -> list[Row]:
        """Make one step of each training that is not complete; return the rows they logged.

        A row is empty where none was due; see `Trainer.advance`.

        Args:
            save: whether each writes a checkpoint also where `checkpoint_every` asks for none.

        Raises:
            RuntimeError: after one of the trainers was told to stop, see `is_done`.
        """
        stopped = [name for name, trainer in self.trainers.items() if trainer.is_stopped]
        if stopped:
            raise RuntimeError(
                f"this sweep cannot advance: {stopped[0]} was stopped, and its trainings advance "
                "only together"
            )
        left = self._unfinished()
        saved = [trainer.saved_step for trainer in left]
        rows = [trainer.advance(prune=False, save=save) for trainer in left]
        has_saved = saved != [trainer.saved_step for trainer in left]
        self._note_all(self._of_this_process(left, has_saved=has_saved))
        if self._all.has_saved:
            self._wall_clock.note_save()
            self._prune()
        return rows

    @property
    def is_done(self) -> bool:
        """Whether no step is left to make: all are made, or one of the trainers was stopped."""
        own, everywhere = self._of_this_process([]), self._all
        if own.is_stopped or everywhere.is_stopped:
            return True
        return not (own.is_unfinished or (self.ranks.size > 1 and everywhere.is_unfinished))

    def _of_this_process(self, made: Sequence[Trainer], *, has_saved: bool = False) -> _Advance:
        """Return where the trainings of this process are after a step that `made` have made."""
        tokens = sum(trainer.tokens_per_step for trainer in made)
        is_stopped = any(trainer.is_stopped for trainer in self.trainers.values())
        return _Advance(tokens, has_saved, bool(self._unfinished()), is_stopped)

    def _note_all(self, own: _Advance) -> None:
        """Exchange with the other processes where the trainings are."""
        found = [_Advance(*each) for each in self.values(list(own))]
        tokens, *flags = zip(*found, strict=True)
        self._all = _Advance(sum(tokens), *map(any, flags))

    def _wishes(self, stop: StopOnSignal) -> Wishes:
        """Return what signals and the time ask for, of any process."""
        save = stop.take_save() or self._wall_clock.is_save_due
        return self.ranks.agreed(Wishes(stop.received or 0, save, self._wall_clock.is_over))

    def _unfinished(self) -> list[Trainer]:
        trainers = self.trainers.values()
        return [trainer for trainer in trainers if trainer.step < trainer.total_steps]

    def _progress(self) -> ProgressBar:
        trainers = self.trainers.values()
        total = sum(trainer.total_tokens for trainer in trainers)
        done = sum(trainer.tokens for trainer in trainers)
        found = self.values([total, done])
        total, done = map(sum, zip(*found, strict=True))
        return ProgressBar(total, done, shown=self._show_progress)

    def _prune(self) -> None:
        """Remove old checkpoints, once all trainings have made the step.

        The newest step with a checkpoint in all of them is kept: they continue there after a kill.
        """
        trainers = list(self.trainers.values())
        stores = [trainer.checkpoints for trainer in trainers]
        kept = [store for store in stores if store is not None]
        if len(kept) < len(trainers):
            return
        step = trainers[0].step
        common = newest_common_step([*kept, *filter(None, self._elsewhere)], step)
        for store in kept:
            store.prune(step, common)

    def _close(self) -> None:
        for trainer in self.trainers.values():
            trainer.close()


class _Advance(NamedTuple):
    """Where the trainings of a process, or of all, are after a step.

    Attributes:
        tokens: that were trained on in it.
        has_saved: whether a checkpoint was written.
        is_unfinished: whether one of them has steps left.
        is_stopped: whether one of them was told to stop.
    """

    tokens: int
    has_saved: bool
    is_unfinished: bool
    is_stopped: bool


def ranks_of_sweep(configs: Mapping[str, RunConfig]) -> Ranks:
    """Return the processes that divide the trainings of a sweep, connected.

    Raises ValueError where the mesh divides something else, or is larger than their number.
    """
    train = next(iter(configs.values())).train
    if divides(train.mesh, "data", "latents") and len(configs) > 1:
        raise ValueError(
            f"mesh = {train.mesh!r} divides one training, and these are several: layers=R has each "
            "process make some of them"
        )
    ranks = open_ranks(train)
    if ranks.size > len(configs) and not divides(train.mesh, "data", "latents"):
        raise ValueError(
            f"mesh = {train.mesh!r} has more processes than there are trainings, {len(configs)}"
        )
    return ranks


def own_trainings(configs: Mapping[str, RunConfig], ranks: Ranks) -> dict[str, RunConfig]:
    """Return the trainings of this process: of 12 and 3 processes the first has the first 4.

    One that divides its batches or latents is made by all processes together.
    """
    if ranks.size == 1 or divides(next(iter(configs.values())).train.mesh, "data", "latents"):
        return dict(configs)
    found = {}
    for name in block_of(configs, ranks.rank, ranks.size):
        train = configs[name].train
        device = ranks.device_of(train.device)
        train = replace(train, mesh=None, mesh_timeout=TrainConfig.mesh_timeout, device=device)
        found[name] = replace(configs[name], train=train)
    return found


def block_of(configs: Mapping[str, RunConfig], number: int, size: int) -> list[str]:
    """Return the names of the trainings of one process among `size`."""
    names = list(configs)
    return names[len(names) * number // size : len(names) * (number + 1) // size]


def _settings_of(configs: Mapping[str, RunConfig]) -> dict[str, Any]:
    """Return the settings of each training that all processes must have in common."""
    given = {name: config.to_dict() for name, config in configs.items()}
    for settings in given.values():
        del settings["train"]["device"], settings["train"]["num_threads"]
    return given


def _store(config: RunConfig) -> CheckpointStore | None:
    """Return the checkpoints of a training; None where it writes nothing."""
    directory = in_mode_directory(config.sae, config.train).checkpoint_dir
    return None if directory is None else CheckpointStore(Path(directory) / "checkpoints", keep=1)


def read_sweep(path: Path, base: RunConfig) -> dict[str, RunConfig]:
    """Read the configurations of a sweep file, by name; what it leaves open is as in `base`.

    Each has a directory of its name in the `checkpoint_dir` of `base`, and the order of data that
    `base` has.

    Raises:
        ValueError: naming the file, and the setting in it that is wrong.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error.strerror}") from None
    configs: dict[str, RunConfig] = {}
    for number, given in enumerate(_listed(path, content), 1):
        name, settings = _named(path, number, given)
        if name in configs:
            raise ValueError(f"{path}: two trainings have the name {name!r}")
        try:
            configs[name] = with_settings(base, name, settings)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return configs


def with_settings(base: RunConfig, name: str, settings: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of one training of a sweep.

    Raises ValueError for settings that all trainings must share."""
    aliases = {**SAEConfig.aliases, **TrainConfig.aliases}
    by_field = {aliases.get(key, key): value for key, value in settings.items()}
    model = config_of(by_field.get("arch", base.sae.arch))
    known = [*field_names(model), *field_names(TrainConfig), *aliases]
    reject_unknown_keys(settings, known)
    rules = rules_of(TrainConfig)
    for key in by_field:
        if key in rules and not rules[key].sweep:
            raise ValueError(f"{key} is the same for all trainings of a sweep: give it beside it")
    # Of the model what was asked for, so that its defaults follow from the settings of each.
    sae = without_other_size(dict(base.sae.given), by_field)
    sae |= {key: value for key, value in by_field.items() if key not in rules}
    train = base.train.to_dict() | {key: value for key, value in by_field.items() if key in rules}
    train["shuffle_seed"] = base.train.order_seed
    if base.train.checkpoint_dir is not None:
        train["checkpoint_dir"] = str(Path(base.train.checkpoint_dir) / name)
    return RunConfig(sae=SAEConfig.from_dict(sae), train=TrainConfig.from_dict(train))


def told_apart(name: str, config: RunConfig) -> RunConfig:
    """Return the configuration of one training, with its name and group for Weights & Biases.

    Args:
        name: of the training in its sweep; the name of the run is put before it.
        config: of the training; without W&B it is returned as it is.
    """
    train = config.train
    if "wandb" not in train.loggers:
        return config
    group = train.wandb_group
    if group is None and train.checkpoint_dir is not None:
        place = Path(train.checkpoint_dir).resolve()
        group = place.parents[len(Path(name).parts) - 1].name
    full = name if train.wandb_name is None else f"{train.wandb_name}/{name}"
    named = replace(train, wandb_name=full, wandb_group=group)
    return RunConfig(sae=config.sae, train=named)


def for_every_layer(
    configs: Mapping[str, RunConfig], directory: Path | None
) -> dict[str, RunConfig] | None:
    """Return the trainings of `configs`, by name, on each folder of shards in their shard_dir.

    A capture writes such a folder for each hook point. Names begin with the folder's, and each run
    has a directory of its name in `directory`. None: shard_dir is itself a folder of shards.

    Raises ValueError naming a setting that holds one place for all layers, or folders with files of
    another kind.
    """
    given = next(iter(configs.values())).train.shard_dir
    place = None if given is None else local_place(given)
    if place is None or not Path(place).is_dir() or shards_in(Path(place)):
        return None
    layers = folders_of_shards(Path(place))
    # Files of tensors in it make it one itself, unless the folders in it hold HDF5 shards.
    if not any(map(shards_in, layers)) and tensor_files_in(Path(place)):
        return None
    require_one_kind(Path(place))
    warn_of_unread(Path(place), "the folders in it hold shards")
    trainings = {}
    for layer, (training, config) in itertools.product(layers, configs.items()):
        name = f"{layer.name}/{training}" if training else layer.name
        places = _places_of_layer(config.train, layer)
        run = None if directory is None else str(directory / name)
        train = replace(config.train, **places, checkpoint_dir=run)
        trainings[name] = RunConfig(sae=config.sae, train=train)
    return trainings or None


def _places_of_layer(config: TrainConfig, layer: Path) -> dict[str, Any]:
    """Return where a layer's rows, held-out rows and start model are, by setting."""
    for name in ("target_shard_dir", "target_heldout"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"{name} goes with one folder of shards, and {config.shard_dir} holds several: "
                f"name one of them with shard_dir, got {value!r}"
            )
    places: dict[str, Any] = {"shard_dir": str(layer)}
    for name in ("heldout", "start_from"):
        if (value := getattr(config, name)) is None:
            continue
        folder = local_place(value) / layer.name
        if not folder.is_dir():
            raise ValueError(f"{name} must have a folder {layer.name} too, got {value!r}")
        places[name] = str(folder)
    return places


def at_one_step(configs: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """Return the configurations, resumed from the newest step with a checkpoint in all runs."""
    if all(config.train.resume_from is None for config in configs.values()):
        return dict(configs)
    stores: dict[str, CheckpointStore] = {}
    for name, config in configs.items():
        if config.train.resume_from != "latest" or config.train.checkpoint_dir is None:
            raise ValueError(
                "the trainings of a sweep are resumed together: resume_from must be 'latest', of "
                f"checkpoint_dir, got {config.train.resume_from!r}"
            )
        store = _store(config)
        assert store is not None
        stores[name] = store
    common = newest_common_step(stores.values())
    if common is None:
        if any(step > 0 for store in stores.values() for step in store.steps()):
            counts = ", ".join(f"{name} {store.steps()}" for name, store in stores.items())
            raise ValueError(f"no step has a checkpoint in all of the runs: {counts}")
        # A kill came while the first checkpoints were written, which is before any step.
        logger.warning("there is no checkpoint of all runs yet: starting from the beginning")
        common = 0
    start = {
        name: str(store.path_of(common))
        for name, store in stores.items()
        if common in store.steps()
    }
    return {
        name: replace(config, train=replace(config.train, resume_from=start.get(name)))
        for name, config in configs.items()
    }


def _on_shards(configs: Mapping[str, RunConfig], own: OwnCode) -> MakeTrainer:
    """Return what makes trainers on shards; trainers with the same directory share them."""
    sharing: dict[str | None, list[RunConfig]] = {}
    for name, config in configs.items():
        train = in_mode_directory(config.sae, config.train)
        try:
            checkpoint = resumed_checkpoint(train)
            train = with_saved_batch(train, checkpoint)
            check_before_reading(RunConfig(sae=config.sae, train=train), checkpoint)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        config = replace(config, train=with_saved_batch(config.train, checkpoint))
        sharing.setdefault(config.train.shard_dir, []).append(config)
    shared = {
        place: share_shards(group[0].train, [config.sae for config in group])
        for place, group in sharing.items()
    }

    def make(name: str, config: RunConfig) -> Trainer:
        shards = shared[config.train.shard_dir]
        return Trainer(config.sae, config.train, shards, **own, show_progress=False)

    return make


def _require_one_step(trainers: Mapping[str, Trainer]) -> None:
    """Raise ValueError for runs at different steps, as after a damaged checkpoint."""
    steps = {name: trainer.step for name, trainer in trainers.items()}
    if len(set(steps.values())) > 1:
        places = ", ".join(f"{name} at step {step}" for name, step in steps.items())
        raise ValueError(f"the trainings of a sweep must be at the same step, got {places}")


def _listed(path: Path, content: Any) -> list[Any]:
    """Return the settings of each training."""
    if isinstance(content, list) and 0 < len(content) <= MOST_TRAININGS:
        return content
    if isinstance(content, dict) and content:
        for key, values in content.items():
            if not isinstance(values, list) or not values:
                name = key if len(key) < 60 else shown(key)
                raise ValueError(f"{path}: {name} must be a list of values, got {shown(values)}")
        names, lists = content.keys(), content.values()
        count = math.prod(map(len, lists))
        if count > MOST_TRAININGS:
            raise ValueError(f"{path}: must be at most {MOST_TRAININGS:,} trainings, got {count:,}")
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*lists)]
    raise ValueError(
        f"{path}: must hold an object of lists, or a list of objects, at most {MOST_TRAININGS:,}"
    )


def _named(path: Path, number: int, given: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of one training."""
    if not isinstance(given, dict):
        raise ValueError(f"{path}: training {number} must be an object, got {shown(given)}")
    settings = {key: value for key, value in given.items() if key != NAME}
    name = given.get(NAME, "-".join(f"{key}_{_text(value)}" for key, value in settings.items()))
    if not isinstance(name, str) or not re.fullmatch(r"[\w.,=+-]+", name) or name[0] == ".":
        raise ValueError(
            f"{path}: training {number} needs a {NAME} of letters, digits, _ and -, "
            f"got {shown(name)}"
        )
    return name, settings


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
