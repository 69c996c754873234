"""Train a sparse autoencoder on activation shards: `python -m sae_fast.train --shard-dir DIR`.

The flags are the fields of SAEConfig and TrainConfig; `--config FILE` reads them from JSON, what
stands on the command line wins. A run goes into a directory of its own: config.json, metrics.jsonl,
training_history.json, checkpoints/ and plots/. `--sweep FILE` makes several runs of one stream of
activations, each in a directory inside that one, with what became of all in its sweep.json.

`python -m sae_fast.train MODEL DATASET --layers 3 5` trains on the activations of a model while it
reads a dataset, an autoencoder for each layer; `… MODEL DATASET --help` has its flags.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_fast.activations.capture.plan import DEFAULT_CONTEXT
from sae_fast.atomic_files import write_json
from sae_fast.command_line import EXIT_BAD_INPUT, parse, refusal
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.effects import unchecked
from sae_fast.config.fields import field_names, field_types, read_settings
from sae_fast.config.presets import preset
from sae_fast.config.sae import without_other_size
from sae_fast.config.setting import rules_of
from sae_fast.flags import plain_switches
from sae_fast.json_files import read_json
from sae_fast.model_flags import ADAM_DECAYS, FromModelLine, flag_kinds, from_model_line
from sae_fast.output_streams import run_command
from sae_fast.training.checkpoint import find_checkpoint, read_newest_state
from sae_fast.training.from_model import (
    DEFAULT_K,
    SAE_DEFAULTS,
    TRAIN_DEFAULTS,
    open_from_model,
)
from sae_fast.training.resume_state import check_state
from sae_fast.training.run_directory import (
    SWEEP,
    RunDirectory,
    claimed_run_directory,
    describe,
    free_name,
    held,
    way_on_from_model,
)
from sae_fast.training.signals import EXIT_INTERRUPTED, INTERRUPTED, StopOnSignal, run_program
from sae_fast.training.sweep import Sweep, for_every_layer, read_sweep
from sae_fast.training.trainer import Trainer

EXIT_CODES = {None: 0, signal.SIGINT: 0, signal.SIGTERM: 128 + signal.SIGTERM}
PROGRAM = "python -m sae_fast.train"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Train a sparse autoencoder on activation shards, or go on with a run."""

    preset: str | None = None
    """Settings for a well-known model, see `python -m sae_fast.presets`; all else wins over it."""
    config: Path | None = None
    """JSON file with any of the settings below; the command line wins over it."""
    sweep: Path | None = None
    """JSON file with several trainings on the same activations: an object of lists, of which all
    combinations are trained, or a list of objects with the settings of each."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class _Sources:
    """The flags that decide what the others' defaults are."""

    preset: str | None = None
    config: Path | None = None
    sweep: Path | None = None
    checkpoint_dir: str | None = None
    resume_from: str | None = None
    d_sae: int | None = None
    expansion_factor: float | None = None
    arch: str | None = None
    optimizer: str | None = None
    weight_decay: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, also after SIGINT, 143 after SIGTERM.

    Bad input is 2, an interrupt that did not wait for its checkpoint 130.
    """
    _log_to_stderr()
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with StopOnSignal() as stop, ExitStack() as stack:
            _refuse_several_processes()
            work, directory = _opened(given, stop, stack)
            trainers = work.trainers if isinstance(work, Sweep) else {"": work}
            _announce(trainers)
            work.train()
            if isinstance(work, Sweep):
                _write_sweep(directory, trainers)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:  # the second: no time for a checkpoint
        print(INTERRUPTED, end="", file=sys.stderr)
        return EXIT_INTERRUPTED
    for name, trainer in trainers.items():
        _conclude(name, trainer, stop.received)
    if isinstance(work, Sweep):
        print(f"sweep      {directory / SWEEP}")
    return EXIT_CODES[stop.received]


def parse_arguments(arguments: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for.

    Defaults come from the run resumed, if any, then from the `--config` file, then from the preset.

    Raises:
        ValueError: naming the flag, field or file that is wrong.
    """
    options = _options(arguments)
    train = options.train
    if train.checkpoint_dir is None:
        train = replace(train, checkpoint_dir=str(free_name(options.sae)))
    return RunConfig(sae=options.sae, train=train)


def _options(arguments: Sequence[str], from_model: FromModelLine | None = None) -> Options:
    """All that a command line asks for, without defaults that are still open.

    Of a training straight from a model the weakest defaults are what such trainings have in common.
    """
    arguments = _canonical(arguments)
    kinds = _flag_kinds() | ({} if from_model is None else flag_kinds())
    sources = parse(_Sources, _Sources(), arguments, PROGRAM, partial=True, kinds=kinds)
    with unchecked():  # flags may yet give what a setting needs
        given = _settings_in(sources.config)
    if sources.preset is not None:
        chosen = preset(sources.preset)
        weaker = without_other_size(chosen.sae, given["sae"])
        given = {"sae": {**weaker, **given["sae"]}, "train": {**chosen.train, **given["train"]}}
    if from_model is not None:
        given = _as_from_model(given, sources, from_model)
    directory = sources.checkpoint_dir or given["train"].get("checkpoint_dir")
    reference = sources.resume_from or given["train"].get("resume_from")
    # What one training of a sweep has on its own is not what the others begin with.
    if reference is not None and from_model is None and sources.sweep is None:
        before, found = _resumed_settings(reference, directory)
        given = {section: {**before[section], **given[section]} for section in given}
        given["train"]["checkpoint_dir"] = directory or found
    given["sae"] = without_other_size(given["sae"], vars(sources))
    # Without d_in nothing is derived from the given settings that a flag may yet change.
    d_in = given["sae"].pop("d_in", 0)
    with unchecked():
        base = RunConfig.from_dict(given)
    defaults = Options(sources.preset, sources.config, sources.sweep, base.sae, base.train)
    options = parse(Options, defaults, arguments, PROGRAM, kinds=kinds)
    sae, train = options.sae, options.train
    if sae.d_in == 0 and d_in != 0:
        sae = replace(sae, d_in=d_in)
    return replace(options, sae=sae, train=train)


def _as_from_model(
    given: dict[str, dict[str, Any]], sources: _Sources, line: FromModelLine
) -> dict[str, dict[str, Any]]:
    """The settings given, over the defaults of a training straight from a model."""
    settings = line.settings
    sae = without_other_size(SAE_DEFAULTS, given["sae"])
    arch = sources.arch or given["sae"].get("arch", SAEConfig.arch)
    if arch in rules_of(SAEConfig)["k"].arch:
        sae["k"] = DEFAULT_K
    own: dict[str, Any] = {
        "checkpoint_every": settings.save_every,
        "wandb_log_every": settings.wandb_log_frequency,
        "max_tokens": settings.max_tokens,
        "batch_size": settings.batch_size * (settings.ctx_len or DEFAULT_CONTEXT),
        "shuffle_seed": settings.shuffle_seed,
        "seed": settings.init_seeds[0],
    }
    rules = rules_of(TrainConfig)
    on_line = {name: own[name] for name in own if rules[name].decided_by in line.given}
    if given["train"].get("batch_size") not in (None, own["batch_size"]):
        logger.info("batch_size: a batch has --batch_size sequences of --ctx_len tokens here")
    train = {name: value for name, value in given["train"].items() if value is not None}
    train |= {"batch_size": own["batch_size"], **on_line}
    own |= TRAIN_DEFAULTS
    if sources.weight_decay and not (sources.optimizer or "optimizer" in train):
        logger.info("weight_decay: %s", ADAM_DECAYS)
        own["optimizer"] = "adamw"
    if settings.run_name is not None:
        if sources.checkpoint_dir is not None:
            raise ValueError("checkpoint_dir and run_name both name the run: give one of the two")
        train["checkpoint_dir"] = str(settings.save_dir / settings.run_name)
    elif sources.resume_from is not None:
        raise ValueError("resume_from needs run_name, the run in save_dir to go on with")
    if settings.log_to_wandb:
        own["wandb_project"] = "sae_fast"
    return {"sae": {**sae, **given["sae"]}, "train": {**own, **train}}


def _flag_kinds() -> dict[str, Any]:
    """The type of every flag's value, by name of the field."""
    kinds: dict[str, Any] = {"preset": str, "config": str, "sweep": str, "help": bool}
    for config in (SAEConfig, TrainConfig):
        fields = field_types(config)
        kinds |= fields | {alias: fields[name] for alias, name in config.aliases.items()}
    return kinds


def _canonical(arguments: Sequence[str]) -> list[str]:
    """The same command line with every alias of a field replaced by the field's own flag."""
    aliases = {**SAEConfig.aliases, **TrainConfig.aliases}
    arguments = plain_switches(arguments, _flag_kinds())
    result: list[str] = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in aliases:
            result.append(argument)
            continue
        result.append(f"--{aliases[name].replace('_', '-')}{equals}{value}")
        if name == "use_amp" and not equals and following.startswith("--"):
            result.append("bf16")  # a bare switch, as other trainers have it
    return result


def _settings_in(path: Path | None) -> dict[str, dict[str, Any]]:
    """The settings that a file gives, and no defaults, by section; checked by reading it whole."""
    sections: dict[str, type[SAEConfig] | type[TrainConfig]]
    sections = {"sae": SAEConfig, "train": TrainConfig}
    if path is None:
        return {section: {} for section in sections}
    RunConfig.load(path)
    content = read_settings(path)
    nested = any(section in content for section in sections)
    given: dict[str, dict[str, Any]] = {}
    for section, config in sections.items():
        names = {**{name: name for name in field_names(config)}, **config.aliases}
        values = content.get(section, {}) if nested else content
        given[section] = {names[key]: value for key, value in values.items() if key in names}
    return given


def _resumed_settings(
    reference: str, directory: str | None
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The settings and directory of the run that is resumed; none where `latest` finds none."""
    if directory is not None:
        RunDirectory(Path(directory), keep_checkpoints=1).check_free()
    path = find_checkpoint(reference, None if directory is None else Path(directory))
    if path is None:
        return {"sae": {}, "train": {}}, None
    run = path.parent.parent if path.parent.name == "checkpoints" else None
    if (way := way_on_from_model(path)) is not None:
        name = run if reference in ("latest", "best") else reference
        raise ValueError(f"{name} is a run from a model: go on with it by {way}")
    saved = RunConfig.from_saved(read_newest_state(path, check_state)["config"])
    settings = saved.to_dict()
    del settings["train"]["resume_from"]
    return settings, None if run is None else str(run)


def _refuse_several_processes() -> None:
    """Raise ValueError where a launcher has started several processes of one training."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and processes.isdigit() and int(processes) > 1:
        raise ValueError(
            f"training is done by one process, but WORLD_SIZE = {processes}: start it without "
            "torchrun; --sweep trains several dictionaries, and sae_fast.capture takes torchrun"
        )


def _opened(
    arguments: Sequence[str], stop: StopOnSignal, stack: ExitStack
) -> tuple[Trainer | Sweep, Path]:
    """Make the training that a command line asks for, or several; return where runs are written.

    What is put on the stack keeps other trainings out of that directory.
    """
    line = from_model_line(arguments, PROGRAM, Options)
    if line is not None:
        line = _with_preset(line)
    options = _options(arguments if line is None else line.rest, line)
    if options.train.checkpoint_dir is None:
        parent = Path("runs") if line is None else line.settings.save_dir
        path = stack.enter_context(claimed_run_directory(options.sae, parent))
        options = replace(options, train=replace(options.train, checkpoint_dir=str(path)))
    directory = Path(str(options.train.checkpoint_dir))
    if line is not None:
        with _named_by(line):
            stack.enter_context(held(directory))
            return _opened_from_model(line, options, directory, stop), directory
    base = RunConfig(sae=options.sae, train=options.train)
    configs = {"": base} if options.sweep is None else read_sweep(options.sweep, base)
    layers = for_every_layer(configs, directory)
    if layers is None and options.sweep is None:
        return Trainer(base, stop=stop), directory
    stack.enter_context(held(directory))
    return Sweep(layers or configs, stop=stop), directory


@contextmanager
def _named_by(line: FromModelLine) -> Iterator[None]:
    """Let refusals of a directory speak of the flag by which the command line has named it."""
    try:
        yield
    except ValueError as error:
        flag = "--checkpoint-dir"
        if line.settings.run_name is None or flag not in str(error):
            raise
        raise ValueError(str(error).replace(flag, "--run_name")) from error


def _opened_from_model(
    line: FromModelLine, options: Options, directory: Path, stop: StopOnSignal
) -> Sweep:
    train = options.train
    base = RunConfig(sae=options.sae, train=replace(train, checkpoint_dir=None))
    configs = {"": base} if options.sweep is None else read_sweep(options.sweep, base)
    # A file may have given what the line left open.
    settings = replace(
        line.settings,
        max_tokens=train.max_tokens or line.settings.max_tokens,
        shuffle_seed=train.order_seed,
        init_seeds=line.settings.init_seeds if "init_seeds" in line.given else (train.seed,),
    )
    return open_from_model(line.model, line.dataset, settings, configs, directory, stop=stop)


def _with_preset(line: FromModelLine) -> FromModelLine:
    """The line with the sequences of its preset, if it names one, where it gives none."""
    name = parse(_Sources, _Sources(), _canonical(line.rest), PROGRAM, partial=True).preset
    if name is None:
        return line
    text = {key: value for key, value in preset(name).text.items() if key not in line.given}
    settings = replace(line.settings, **text)
    return replace(line, settings=settings, given=line.given | text.keys())


def _announce(trainers: Mapping[str, Trainer]) -> None:
    for name, trainer in trainers.items():
        if trainer.was_complete:
            continue
        sae, train = trainer.sae_config, trainer.train_config
        print(trainer.memory_plan)
        print(
            f"{_prefix(name)}training {describe(sae)}; "
            f"{trainer.source.rows_per_epoch:,} rows, {trainer.total_steps:,} steps of "
            f"{trainer.tokens_per_step:,} tokens into {train.checkpoint_dir}",
            flush=True,
        )


def _prefix(name: str) -> str:
    return f"{name}: " if name else ""


def _write_sweep(directory: Path, trainers: Mapping[str, Trainer]) -> None:
    """What became of each training of a sweep."""
    runs = {name: trainer.summary for name, trainer in trainers.items()}
    if all(trainer.was_complete for trainer in trainers.values()) and _has_sweep(directory, runs):
        return
    write_json(directory / SWEEP, {"runs": runs})


def _has_sweep(directory: Path, runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether what became of these trainings has been written, after as many steps."""
    try:
        written = read_json(directory / SWEEP)["runs"]
        steps = {name: summary["steps"] for name, summary in written.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return steps == {name: summary["steps"] for name, summary in runs.items()}


def _conclude(run: str, trainer: Trainer, stopped_by: signal.Signals | None) -> None:
    summary = trainer.summary
    if trainer.was_complete:
        flag = f"--{trainer.schedules.limit.replace('_', '-')}"
        print(
            f"{_prefix(run)}nothing to do: all {trainer.step:,} steps are made; "
            f"raise {flag} to go on"
        )
        return
    verb = "trained" if stopped_by is None else f"stopped by {stopped_by.name} after"
    rate = summary["tokens"] / max(summary["seconds"], 1e-9)
    print(
        f"{_prefix(run)}{verb} {summary['steps']:,} steps, {summary['tokens']:,} tokens "
        f"in {summary['seconds']:.1f} s ({rate:,.0f} tokens/s, "
        f"{summary['reader_stall_fraction']:.1%} of it waiting for the reader)"
    )
    weighted = [name for name, value in trainer.sae_config.term_coefficients.items() if value > 0]
    names = (
        *("loss", *weighted, "fvu", "l0", "gram_mean"),
        *("probe_accuracy", "probe_r2", "slot_accuracy", "value_accuracy"),
        *("heldout_fvu", "heldout_l0", "heldout_dead_fraction"),
        *("heldout_ce", "heldout_ce_model", "heldout_kl"),
        *("heldout_slot_accuracy", "heldout_value_accuracy"),
    )
    figures = [(name, summary.get(f"final_{name}")) for name in names]
    print(", ".join(f"{name} {value:.5g}" for name, value in figures if value is not None))
    for name in ("plot", "checkpoint"):
        if name in summary:
            print(f"{name:<10} {summary[name]}")
    if summary.get("skipped_steps"):
        print(f"skipped    {summary['skipped_steps']:,} steps whose gradients overflowed in fp16")
    for text in summary["warnings"]:
        print(f"warning    {text}")


class _TqdmHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    package = logging.getLogger("sae_fast")
    if not package.handlers:
        package.addHandler(_TqdmHandler())
    package.setLevel(logging.INFO)


if __name__ == "__main__":
    run_program(lambda: run_command(main))
