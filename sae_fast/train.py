"""Train a sparse autoencoder on activation shards: `python -m sae_fast.train --shard-dir DIR`.

The flags are the fields of SAEConfig and TrainConfig; `--config FILE` reads them from JSON, what
stands on the command line wins. A run goes into a directory of its own: config.json, metrics.jsonl,
training_history.json, checkpoints/ and plots/. `--sweep FILE` makes several runs of one stream of
activations, each in a directory inside that one, with a summary of all in its sweep.json.

`python -m sae_fast.train MODEL DATASET --layers 3 5` trains on the activations of a model while it
reads a dataset, an autoencoder for each layer; `… MODEL DATASET --help` has its flags.

Modules that need torch are imported where they are used, so that help and mistakes in the flags
come at once.
"""

from __future__ import annotations

import itertools
import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sae_fast.atomic_files import write_json
from sae_fast.command_errors import EXIT_BAD_INPUT, check_out, refusal
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.command_line import CommandLine, Given
from sae_fast.config.effects import unchecked
from sae_fast.config.fields import ConfigFile, configuration, field_names, read_settings
from sae_fast.config.model_text import (
    DEFAULT_CONTEXT,
    DEFAULT_K,
    RATE_OF_OTHERS,
    SAE_DEFAULTS,
    TRAIN_DEFAULTS,
    FromModelConfig,
)
from sae_fast.config.output import OutputConfig
from sae_fast.config.plugins import load_plugin
from sae_fast.config.presets import preset
from sae_fast.config.run import sections_of
from sae_fast.config.sae import config_of, registered, without_other_size
from sae_fast.config.setting import rules_of, setting
from sae_fast.distributed.environment import launched
from sae_fast.json_files import read_json
from sae_fast.log_output import CommandOutput, command_output
from sae_fast.output_streams import run_command
from sae_fast.training.fitted_rates import SHARES
from sae_fast.training.signals import (
    EXIT_INTERRUPTED,
    INTERRUPTED,
    STOPPING,
    StopOnSignal,
    run_program,
)

if TYPE_CHECKING:
    from sae_fast.training.callbacks import Callback
    from sae_fast.training.sweep import Sweep
    from sae_fast.training.trainer import Trainer

_OWN = "sae of "  # before the name of a registered architecture, as a section
_UNTIL_ALL_HAVE_READ = timedelta(seconds=60)  # that processes wait for each other's settings
SWEEP = "sweep.json"  # the summary of a sweep
EXIT_CODES: dict[signal.Signals | None, int]
EXIT_CODES = {None: 0, **{number: 128 + number for number in STOPPING}, signal.SIGINT: 0}
EXIT_OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: there is more to do, try again
USAGE = "python -m sae_fast.train --shard-dir DIR [flags]"
USAGE_FROM_MODEL = "python -m sae_fast.train MODEL DATASET [flags]"
ADAM_DECAYS = "optimizer adam with a weight decay is adamw, decoupled from the gradient"

logger = logging.getLogger(__name__)


@configuration()
@dataclass(frozen=True, kw_only=True)
class TrainOptions(ConfigFile):
    """Files and presets with settings; flags take precedence over them."""

    title: ClassVar[str] = "Settings from elsewhere"

    preset: str | None = setting(
        None,
        metavar="NAME",
        heading="Settings from elsewhere",
        brief="settings for a well-known model: python -m sae_fast.presets",
        instead={
            "model": "--preset NAME takes the settings for a well-known model; to train on the "
            "activations of one, MODEL DATASET come first, without a flag"
        },
    )
    """Settings for a well-known model, see `python -m sae_fast.presets`; all else wins over it."""
    plugin: str | None = setting(None, metavar="FILE_OR_MODULE")
    """Python file, or module, that registers an architecture of your own, which --arch then names.
    An installed package that names it as an entry point needs no --plugin."""
    config: Path | None = setting(None, metavar="FILE", brief="JSON file of settings")
    """JSON file with any of the settings below; the command line wins over it."""
    sweep: Path | None = setting(
        None, metavar="FILE", brief="JSON file of several trainings on the same batches"
    )
    """JSON file with several trainings on the same activations: an object of lists, of which all
    combinations are trained, or a list of objects with the settings of each."""
    live: Path | None = setting(None, metavar="DIR")
    """Directory for the pages of all latents, written again and again during one training, in 5 %
    of the time; open the index.html in it."""
    live_tokenizer: str | None = setting(None, metavar="NAME")
    """A tokenizer for the texts of these pages: a folder, a tokenizer.json or a name. After MODEL
    DATASET the one of MODEL is used unless another one is given."""


@dataclass(frozen=True)
class FromModel:
    """The part of a command line that is about a model and its text.

    Attributes:
        model: a folder or a name on the hub.
        dataset: a folder, files, or a name on the hub.
        settings: what the model reads, and how.
        given: the names of the settings that the line gives.
    """

    model: str
    dataset: str
    settings: FromModelConfig
    given: frozenset[str]


def on_shards() -> CommandLine:
    """Return the command line of a training on shards."""
    about = "Train a sparse autoencoder on activation shards, or continue a run."
    sections: dict[str, type[ConfigFile]]
    sections = {
        "options": TrainOptions,
        "sae": SAEConfig,
        **_own_sections(),
        "train": TrainConfig,
        "output": OutputConfig,
    }
    own = {"k": DEFAULT_K, **SAE_DEFAULTS, **TRAIN_DEFAULTS}
    other = ", ".join(f"{name} {value}" for name, value in own.items())
    note = f"MODEL DATASET has other defaults, which its --help shows: {other}, and more."
    return CommandLine(f"{USAGE}\n{USAGE_FROM_MODEL}", about, sections, note=note)


def from_model() -> CommandLine:
    """Return the command line of a training straight from a model, after MODEL and DATASET."""
    refused = {
        name: f"is for training on shards: {rules.shards_only}"
        if rules.shards_only
        else f"is for training on shards, here give --{rules.decided_by}"
        for name, rules in rules_of(TrainConfig).items()
        if (rules.shards_only or rules.decided_by) and name not in field_names(FromModelConfig)
    }
    about = "Train on the activations of a model while it reads a dataset: a folder or a name each."
    sections: dict[str, type[ConfigFile]]
    sections = {
        "options": TrainOptions,
        "text": FromModelConfig,
        "sae": SAEConfig,
        **_own_sections(),
        "train": TrainConfig,
        "output": OutputConfig,
    }
    defaults = {"k": DEFAULT_K, **SAE_DEFAULTS, **TRAIN_DEFAULTS}
    hidden = [name for name, rules in rules_of(SAEConfig).items() if rules.shards_only]
    return CommandLine(USAGE_FROM_MODEL, about, sections, defaults, refused, hidden)


def _own_sections() -> dict[str, type[ConfigFile]]:
    """Return the configurations of registered architectures, whose further settings are flags."""
    return {f"{_OWN}{name}": config for name, config in registered().items()}


def _read_line(line: CommandLine, arguments: Sequence[str]) -> Given:
    """Return the settings on a command line, with own settings of architectures under "sae"."""
    given = line.read(arguments)
    for section in [section for section in given if section.startswith(_OWN)]:
        given["sae"] |= given.pop(section)
    return given


def _load_architectures(arguments: Sequence[str]) -> None:
    """Import the module of --plugin, and the installed package that has the named architecture.

    The line is read afterwards: their settings are flags of it. Without these flags nothing is
    imported, so that help and mistakes come as fast as ever.
    """
    for flag, value in _values_of(("plugin", "arch"), arguments):
        if flag == "arch":
            config_of(value)
            continue
        before = registered()
        load_plugin(value)
        if not (registered().keys() - before.keys() or _registers(value)):
            raise ValueError(
                f"plugin {value}: it registers no architecture "
                "(sae_fast.register_architecture does)"
            )


def _registers(reference: str) -> bool:
    """Return whether a module that was loaded before is one that registers an architecture."""
    name = Path(reference).stem if reference.endswith(".py") else reference
    return any(config.__module__ == name for config in registered().values())


def _values_of(names: Sequence[str], arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the values of these flags on a command line that is not read yet, by their names."""
    for name in names:
        flag = f"--{name}"
        for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
            if word == flag and following and not following.startswith("--"):
                yield name, following
            elif word.startswith(f"{flag}="):
                yield name, word.partition("=")[2]


def command_lines() -> list[CommandLine]:
    """Return the command lines of both kinds of training, for completion."""
    return [on_shards(), from_model()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code.

    0: all is done, or SIGINT has stopped it. 129, 140, 143: SIGHUP, SIGUSR2 or SIGTERM has stopped
    it. 75: max_hours are over. 2: bad input. 130: an interrupt did not wait for its checkpoint.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with command_output() as output:
        return _run(arguments, output)


def _run(arguments: Sequence[str], output: CommandOutput) -> int:
    try:
        with StopOnSignal() as stop, ExitStack() as stack:
            work, directory = _opened(arguments, stop, stack, output)
            trainers = _trainers_of(work)
            is_sweep = trainers.keys() != {""}
            _say_of_all(work, list(_announcement(trainers)), output)
            work.train()
            if is_sweep:
                _write_sweep(directory / SWEEP, work)
            stopped_by = None if stop.received is None else stop.received.name
            if stop.received is None and work.is_out_of_time:
                stopped_by = "--max-hours"
            told = [line for one in trainers.items() for line in _conclusion(*one, stopped_by)]
            _say_of_all(work, told, output)
            if is_sweep:
                output.say(f"sweep      {directory / SWEEP}")
    except Exception as error:
        _show_error(error, output)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:  # the second: no time for a checkpoint
        print(INTERRUPTED, end="", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OUT_OF_TIME if stopped_by == "--max-hours" else EXIT_CODES[stop.received]


def parse_arguments(arguments: Sequence[str]) -> RunConfig:
    """Return the configuration that the command line of a training on shards asks for.

    What it leaves open is taken from the `--config` file, then from the preset, then from the run
    that is resumed.

    Raises:
        ValueError: naming the flag, field or file that is wrong.
    """
    from sae_fast.training.run_directory import free_name

    _load_architectures(arguments)
    config = _config(_read_line(on_shards(), arguments))
    if config.train.checkpoint_dir is not None:
        return config
    return _in_directory(config, free_name(config.sae))


def _config(given: Given, line: FromModel | None = None) -> RunConfig:
    """Return the configuration that a command line gives, with its files, preset and run.

    Files, presets, runs and defaults are laid over each other as settings by name, the weakest
    first; from all of them together one configuration is made.
    """
    options, flags = TrainOptions(**given["options"]), {key: given[key] for key in ("sae", "train")}
    layers = _settings_in(options.config)
    if options.preset is not None:
        chosen = preset(options.preset)
        layers = {
            "sae": {**without_other_size(chosen.sae, layers["sae"]), **layers["sae"]},
            "train": {**chosen.train, **layers["train"]},
        }
    if line is not None:
        layers = _as_from_model(layers, flags, line)
    both = {**layers["train"], **flags["train"]}
    directory, reference = both.get("checkpoint_dir"), both.get("resume_from")
    # The settings of one training of a sweep are not those that the others begin with.
    if reference is not None and line is None and options.sweep is None:
        before, found = _resumed_settings(reference, directory)
        layers = {section: {**before[section], **layers[section]} for section in layers}
        layers["train"]["checkpoint_dir"] = directory or found
    layers["sae"] = without_other_size(layers["sae"], flags["sae"])
    return RunConfig.from_dict({key: {**layers[key], **flags[key]} for key in layers})


def _as_from_model(layers: Given, flags: Given, line: FromModel) -> Given:
    """Return settings over the defaults of a training straight from a model."""
    settings = line.settings
    sae = without_other_size(SAE_DEFAULTS, layers["sae"])
    arch = flags["sae"].get("arch") or layers["sae"].get("arch", SAEConfig.arch)
    has_k = arch in rules_of(SAEConfig)["k"].arch or "k" in config_of(arch).shared
    if has_k:
        sae["k"] = DEFAULT_K
    rules = rules_of(TrainConfig)
    defaults: dict[str, Any] = {
        name: getattr(settings, rule.decided_by) for name, rule in rules.items() if rule.decided_by
    }
    defaults["batch_size"] *= settings.ctx_len or DEFAULT_CONTEXT
    defaults["seed"] = settings.init_seeds[0]
    on_line = {name: defaults[name] for name in defaults if rules[name].decided_by in line.given}
    if layers["train"].get("batch_size") not in (None, defaults["batch_size"]):
        logger.info("batch_size: a batch has --batch_size sequences of --ctx_len tokens here")
    train = {name: value for name, value in layers["train"].items() if value is not None}
    train |= {"batch_size": defaults["batch_size"], **on_line}
    defaults |= TRAIN_DEFAULTS
    if not has_k and arch not in SHARES:
        defaults["learning_rate"] = RATE_OF_OTHERS
    _decay_with_adam(flags["train"], defaults, is_open="optimizer" not in train)
    if flags["sae"].get("d_sae"):  # which overrides the factor in trainers of this kind
        flags["sae"].pop("expansion_factor", None)
    directory = flags["train"].get("checkpoint_dir")
    if settings.run_name is not None:
        if directory is not None:
            raise ValueError("checkpoint_dir and run_name both name the run: give one of the two")
        train["checkpoint_dir"] = str(settings.save_dir / settings.run_name)
    elif flags["train"].get("resume_from") and not (directory or train.get("checkpoint_dir")):
        raise ValueError(
            "resume_from needs checkpoint_dir, or run_name, the run in save_dir to continue"
        )
    if settings.log_to_wandb:
        defaults["wandb_project"] = "sae_fast"
    return {"sae": {**sae, **layers["sae"]}, "train": {**defaults, **train}}


def _decay_with_adam(flags: dict[str, Any], defaults: dict[str, Any], *, is_open: bool) -> None:
    """Make adam with a weight decay adamw, as in other trainers of this kind.

    Args:
        flags: the flags of the training, changed where they name adam.
        defaults: the weakest defaults, changed where no optimizer is named.
        is_open: whether files name no optimizer.
    """
    if not flags.get("weight_decay"):
        return
    if flags.get("optimizer") == "adam":
        flags["optimizer"] = "adamw"
    elif "optimizer" not in flags and is_open:
        defaults["optimizer"] = "adamw"
    else:
        return
    logger.info("weight_decay: %s", ADAM_DECAYS)


def _settings_in(path: Path | None) -> Given:
    """Return the settings in a file, by section, without defaults; it is checked as a whole."""
    if path is None:
        return {"sae": {}, "train": {}}
    with unchecked():  # flags may yet give what a setting needs
        RunConfig.load(path)
    content = read_settings(path)
    sections = sections_of(content)
    nested = any(section in content for section in sections)
    given: Given = {}
    for section, config in sections.items():
        names = {**{name: name for name in field_names(config)}, **config.aliases}
        values = content.get(section, {}) if nested else content
        given[section] = {names[key]: value for key, value in values.items() if key in names}
    return given


def _resumed_settings(reference: str, directory: str | None) -> tuple[Given, str | None]:
    """Return settings and directory of the run to resume; none where `latest` finds none."""
    from sae_fast.training.checkpoint import find_checkpoint, read_newest_state
    from sae_fast.training.resume_state import check_state
    from sae_fast.training.run_directory import RunDirectory, way_on_from_model

    if directory is not None and launched().rank == 0:
        RunDirectory(Path(directory), keep_checkpoints=1).check_free()
    path = find_checkpoint(reference, None if directory is None else Path(directory))
    if path is None:
        return {"sae": {}, "train": {}}, None
    run = path.parent.parent if path.parent.name == "checkpoints" else None
    if (way := way_on_from_model(path)) is not None:
        name = run if reference in ("latest", "best") else reference
        raise ValueError(f"{name} is a run from a model: continue it with {way}")
    saved = RunConfig.from_saved(read_newest_state(path, check_state)["config"])
    settings = saved.to_dict()
    del settings["train"]["resume_from"]
    del settings["train"]["mesh"], settings["train"]["mesh_timeout"]  # of the processes then
    return settings, None if run is None else str(run)


def _read_by_all(
    arguments: Sequence[str], output: CommandOutput
) -> tuple[Given, FromModel | None, RunConfig]:
    """Return the settings of a command line, which all processes of a launcher can read.

    Raises ValueError where any of them cannot, or where nothing says how several divide the work.
    """
    place = launched()
    try:
        given, line = _read(arguments)
        shown = OutputConfig(**given["output"])
        is_first = place.rank == 0
        log_file = shown.log_file if is_first else None
        output.configure(quiet=shown.quiet, log_file=log_file, is_shown=is_first)
        config = _config(given, line)
        if place.size > 1 and config.train.mesh is None:
            raise ValueError(
                f"{place.size} processes were started (WORLD_SIZE = {place.size}), and each would "
                f"train the whole model: give --mesh data={place.size}, by which they divide the "
                f"batches, or layers={place.size}, the trainings of a sweep or of several layers, "
                "or start one process without torchrun"
            )
    except Exception as error:
        if place.size > 1:
            _agree_on(error)
        raise
    return given, line, config


def _agree_on(error: Exception) -> None:
    """Raise the error, or what another process says of it; return where none can be asked."""
    from sae_fast.distributed.ranks import connect

    try:
        ranks = connect(_UNTIL_ALL_HAVE_READ)
    except ValueError:
        return
    with ranks.agreement():
        raise error


def _show_error(error: Exception, output: CommandOutput) -> None:
    """Print the line of an error, in one of several processes only."""
    line, place = refusal(error), launched()
    if place.size > 1:
        from sae_fast.distributed.ranks import RankError, note_failure

        note_failure(error)
        is_told = error.is_told if isinstance(error, RankError) else place.rank > 0
        if is_told:
            return
    print(line, file=sys.stderr)
    output.note(line, logging.ERROR)


def _opened(
    arguments: Sequence[str], stop: StopOnSignal, stack: ExitStack, output: CommandOutput
) -> tuple[Trainer | Sweep, Path]:
    """Make the training that a command line asks for, or several; return where runs are written.

    The locks put on the stack keep other trainings out of that directory.
    """
    given, line, config = _read_by_all(arguments, output)
    shown = OutputConfig(**given["output"])
    from sae_fast.distributed.ranks import open_ranks
    from sae_fast.training.run_directory import claimed_run_directory, held
    from sae_fast.training.sweep import Sweep, for_every_layer, read_sweep
    from sae_fast.training.trainer import Trainer

    options = TrainOptions(**given["options"])
    sweep = options.sweep
    ranks = open_ranks(config.train)
    if ranks.size > 1:
        _refuse_live(options)
    if options.live is not None:
        check_out(options.live, "--live")
    if config.train.checkpoint_dir is None:
        parent = Path("runs") if line is None else line.settings.save_dir
        place: Path | None = None
        with ranks.agreement():
            if ranks.is_first:
                place = stack.enter_context(claimed_run_directory(config.sae, parent))
        config = _in_directory(config, Path(ranks.values(str(place))[0]))
    directory = Path(str(config.train.checkpoint_dir))
    if line is not None:
        if sweep is not None:
            _refuse_live(options)
        callbacks = _live_pages(options, line.model)
        with _named_by(line):
            with ranks.agreement():
                if ranks.is_first:
                    stack.enter_context(held(directory))
            work = _opened_from_model(line, config, sweep, directory, callbacks, stop, shown)
            return work, directory
    configs = {"": config} if sweep is None else read_sweep(sweep, config)
    layers = for_every_layer(configs, directory)
    if layers is None and sweep is None:
        callbacks = _live_pages(options)
        trainer = Trainer(config, callbacks=callbacks, stop=stop, show_progress=not shown.quiet)
        return trainer, directory
    _refuse_live(options)
    with ranks.agreement():
        if ranks.is_first:
            stack.enter_context(held(directory))
    return Sweep(layers or configs, stop=stop, show_progress=not shown.quiet), directory


def _live_pages(options: TrainOptions, model: str | None = None) -> list[Callback]:
    """Return the callback for live pages, if any; without a tokenizer with the one of a model."""
    if options.live is None:
        return []
    from sae_fast.training.live_pages import LivePages

    return [LivePages(options.live, options.live_tokenizer or model)]


def _refuse_live(options: TrainOptions) -> None:
    if options.live is not None:
        raise ValueError("--live is for one training, by one process")


def _read(arguments: Sequence[str]) -> tuple[Given, FromModel | None]:
    """Return the settings on a command line, and the part about the model if it names one."""
    _load_architectures(arguments)
    if not arguments or arguments[0].startswith("-"):
        return _read_line(on_shards(), arguments), None
    if len(arguments) < 2 or arguments[1].startswith("-"):
        raise ValueError(
            f"a model and a dataset are needed, MODEL DATASET, got {arguments[0]!r} alone "
            "(shards are named with --shard-dir)"
        )
    model, dataset, *flags = arguments
    if flags and not flags[0].startswith("-"):
        raise ValueError(f"unexpected {flags[0]!r}: MODEL and DATASET, then flags")
    given = _read_line(from_model(), flags)
    text = given["text"]
    if (name := given["options"].get("preset")) is not None:
        text = {**preset(name).text, **text}
    return given, FromModel(model, dataset, FromModelConfig(**text), frozenset(text))


def _in_directory(config: RunConfig, directory: Path | None) -> RunConfig:
    """Return a configuration with another directory of its run."""
    place = None if directory is None else str(directory)
    return RunConfig(sae=config.sae, train=replace(config.train, checkpoint_dir=place))


@contextmanager
def _named_by(line: FromModel) -> Iterator[None]:
    """Let refusals of a directory speak of the flag by which the command line has named it."""
    try:
        yield
    except ValueError as error:
        flag = "--checkpoint-dir"
        if line.settings.run_name is None or flag not in str(error):
            raise
        raise ValueError(str(error).replace(flag, "--run_name")) from error


def _opened_from_model(
    line: FromModel,
    config: RunConfig,
    sweep: Path | None,
    directory: Path,
    callbacks: Sequence[Callback],
    stop: StopOnSignal,
    shown: OutputConfig,
) -> Sweep:
    from sae_fast.training.from_model import open_from_model
    from sae_fast.training.sweep import read_sweep

    base = _in_directory(config, None)
    configs = {"": base} if sweep is None else read_sweep(sweep, base)
    # A file may have given what the line left open.
    settings = replace(
        line.settings,
        max_tokens=base.train.max_tokens or line.settings.max_tokens,
        shuffle_seed=base.train.order_seed,
        init_seeds=line.settings.init_seeds if "init_seeds" in line.given else (base.train.seed,),
    )
    return open_from_model(
        *(line.model, line.dataset, settings, configs, directory),
        callbacks=callbacks,
        stop=stop,
        show_progress=not shown.quiet,
    )


def _trainers_of(work: Trainer | Sweep) -> Mapping[str, Trainer]:
    """Return the trainers of a sweep by name, or the one of a single training by ""."""
    from sae_fast.training.sweep import Sweep

    return work.trainers if isinstance(work, Sweep) else {"": work}


def _say_of_all(work: Trainer | Sweep, lines: Sequence[str], output: CommandOutput) -> None:
    """Print lines of this process, and of the others where they make other trainings."""
    from sae_fast.training.sweep import Sweep

    if isinstance(work, Sweep):
        lines = [line for others in work.values(list(lines)) for line in others]
    for line in lines:
        output.say(line)


def _announcement(trainers: Mapping[str, Trainer]) -> Iterator[str]:
    """Yield what is said of trainings before their first step."""
    from sae_fast.training.run_directory import describe

    for name, trainer in trainers.items():
        if trainer.was_complete:
            continue
        sae, train = trainer.sae_config, trainer.train_config
        yield str(trainer.memory_plan)
        yield (
            f"{_prefix(name)}training {describe(sae)}; "
            f"{trainer.source.rows_per_epoch:,} rows, {trainer.total_steps:,} steps of "
            f"{trainer.tokens_per_step:,} tokens into {train.checkpoint_dir}"
        )


def _prefix(name: str) -> str:
    return f"{name}: " if name else ""


def _write_sweep(path: Path, work: Trainer | Sweep) -> None:
    """Write the summary of each training of a sweep, by one process."""
    from sae_fast.training.sweep import Sweep

    trainers = _trainers_of(work)
    runs = {name: trainer.summary for name, trainer in trainers.items()}
    were_complete = all(trainer.was_complete for trainer in trainers.values())
    every: list[Any] = [runs, were_complete]
    found = work.values(every) if isinstance(work, Sweep) else [every]
    runs = {name: summary for others, _ in found for name, summary in others.items()}
    if not work.ranks.is_first or (all(one for _, one in found) and _has_sweep(path, runs)):
        return
    write_json(path, {"runs": runs})


def _has_sweep(path: Path, runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the summaries of these trainings are written, after as many steps."""
    try:
        written = read_json(path)["runs"]
        steps = {name: summary["steps"] for name, summary in written.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return steps == {name: summary["steps"] for name, summary in runs.items()}


def _conclusion(run: str, trainer: Trainer, stopped_by: str | None) -> Iterator[str]:
    """Yield what is said of a training at its end."""
    summary = trainer.summary
    if trainer.was_complete:
        flag = f"--{trainer.schedules.limit.replace('_', '-')}"
        yield (
            f"{_prefix(run)}nothing to do: all {trainer.step:,} steps are made; "
            f"raise {flag} to continue"
        )
        return
    verb = "trained" if stopped_by is None else f"stopped by {stopped_by} after"
    rate = summary["tokens"] / max(summary["seconds"], 1e-9)
    yield (
        f"{_prefix(run)}{verb} {summary['steps']:,} steps, {summary['tokens']:,} tokens "
        f"in {summary['seconds']:.1f} s ({rate:,.0f} tokens/s, "
        f"{summary['reader_stall_fraction']:.1%} of it waiting for the reader)"
    )
    weighted = [name for name, value in trainer.sae_config.term_coefficients.items() if value > 0]
    names = (
        *("loss", *weighted, "fvu", "l0", "gram_mean"),
        *("probe_accuracy", "probe_r2", "slot_accuracy", "value_accuracy"),
        *("heldout_fvu", "heldout_l0", "heldout_dead_fraction"),
        *(
            "heldout_ce",
            "heldout_ce_model",
            "heldout_kl",
            "heldout_ce_increase",
            "heldout_ce_score",
        ),
        *("heldout_slot_accuracy", "heldout_value_accuracy"),
    )
    figures = [(name, summary.get(f"final_{name}")) for name in names]
    yield ", ".join(f"{name} {value:.5g}" for name, value in figures if value is not None)
    for name in ("plot", "report", "checkpoint"):
        if name in summary:
            yield f"{name:<10} {summary[name]}"
    if summary.get("skipped_steps"):
        steps = summary["skipped_steps"]
        yield f"skipped    {steps:,} steps whose gradients overflowed in fp16"
    for text in summary["warnings"]:
        yield f"warning    {text}"


if __name__ == "__main__":
    run_program(lambda: run_command(main))
