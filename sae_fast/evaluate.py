"""Measure trained dictionaries: `python -m sae_fast.evaluate SAE --shard-dir DIR --out DIR`.

With `--dataset FILE` the language model reads a text, and its losses with the dictionary's
reconstructions in place of its activations are measured too, also without shards.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_fast.command_errors import EXIT_BAD_INPUT, check_out, refusal
from sae_fast.config.command_line import CommandLine
from sae_fast.config.evaluate import EvaluateConfig
from sae_fast.config.output import OutputConfig
from sae_fast.log_output import CommandOutput, command_output
from sae_fast.output_streams import run_command
from sae_fast.progress_bar import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from sae_fast.activations import ShardSet
    from sae_fast.activations.capture import LanguageModel
    from sae_fast.autoencoder import SparseAutoencoder
    from sae_fast.evaluation.core import CorePass
    from sae_fast.evaluation.language_model import ModelText
    from sae_fast.evaluation.results import Evaluation

PROGRAM = "python -m sae_fast.evaluate"
USAGE = f"{PROGRAM} SAE … --shard-dir DIR [--dataset FILE] --out DIR [flags]"


@functools.cache
def command_line() -> CommandLine:
    """Return the command line of the command."""
    sections = {"evaluate": EvaluateConfig, "output": OutputConfig}
    return CommandLine(USAGE, inspect.getdoc(EvaluateConfig) or "", sections)


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [command_line()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    with command_output(logging.WARNING) as output:
        try:
            given = command_line().read(sys.argv[1:] if arguments is None else arguments)
            config, shown = EvaluateConfig(**given["evaluate"]), OutputConfig(**given["output"])
            output.configure(quiet=shown.quiet, log_file=shown.log_file)
            _check(config)
            _evaluate(config, output)
        except Exception as error:
            line = refusal(error)
            print(line, file=sys.stderr)
            output.note(line, logging.ERROR)
            return EXIT_BAD_INPUT
    return 0


def _check(config: EvaluateConfig) -> None:
    if not config.saes or config.out is None:
        raise ValueError(f"SAE and --out must be given: {USAGE}")
    if config.shard_dir is None and config.dataset is None:
        raise ValueError("--shard-dir or --dataset must be given: rows to measure on")
    check_out(config.out)


def _evaluate(config: EvaluateConfig, output: CommandOutput) -> None:
    import torch

    from sae_fast.autoencoder import SparseAutoencoder
    from sae_fast.evaluation.results import Evaluation, write_evaluation, write_overview
    from sae_fast.report.names import distinct_names

    assert config.out is not None
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    model = _Model(config)
    done: list[Evaluation] = []
    names = [name.replace("/", "-") for name in distinct_names(config.saes, "dictionaries")]
    for name, place in zip(names, config.saes, strict=True):
        sae = SparseAutoencoder.from_pretrained(place, config.device)
        evaluation = Evaluation(name, sae, str(place))
        _measure(config, evaluation, model, output)
        directory = config.out if len(names) == 1 else config.out / name
        write_evaluation(evaluation, directory)
        done.append(evaluation)
        output.say(_summary(evaluation))
        output.say(f"wrote {directory}")
        _write_report([evaluation], directory)
    if len(done) > 1:
        _write_report(done, config.out)
        write_overview(done, config.out)
        output.say(f"wrote {config.out / 'metrics.md'}")


def _write_report(evaluations: Sequence[Evaluation], directory: Path) -> None:
    """Write report.html, with the metrics of the trainings of dictionaries that are runs."""
    from sae_fast.report.evaluation_page import evaluation_page
    from sae_fast.report.page import REPORT
    from sae_fast.training.history import read_history

    runs = {}
    for evaluation in evaluations:
        with suppress(OSError, ValueError):  # a checkpoint or a saved model is no run
            runs[evaluation.name] = read_history(Path(evaluation.place)).rows
    evaluation_page(evaluations, runs).write(directory / REPORT)


def _measure(
    config: EvaluateConfig, evaluation: Evaluation, model: _Model, output: CommandOutput
) -> None:
    """Measure one dictionary, on shards, by its weights, and in the model."""
    from sae_fast.evaluation.core import EXTREME_SHARE, CorePass
    from sae_fast.evaluation.dictionary import dictionary_metrics

    sae = evaluation.sae
    text = None if config.dataset is None else model.text_for(sae)
    core: CorePass | None = None
    if config.shard_dir is not None:
        _measure_rows(config, evaluation, output)
    else:  # the activations of the model are the rows
        rows = math.ceil(EXTREME_SHARE * config.max_tokens)
        rate = config.dead_percentage_threshold
        core = CorePass(sae, dead_rate=rate, extreme_rows=rows)
    if text is not None:
        _measure_in_model(config, evaluation, text, core, output)
    section, latents = dictionary_metrics(sae)
    evaluation.add({"misc_metrics": section})
    evaluation.latents |= latents


def _measure_rows(config: EvaluateConfig, evaluation: Evaluation, output: CommandOutput) -> None:
    from sae_fast.evaluation.concepts import ConceptPass
    from sae_fast.evaluation.core import EXTREME_SHARE, core_metrics
    from sae_fast.evaluation.rows import open_rows

    rows = open_rows(config, evaluation.sae)
    if rows.were_trained_on and config.rows != "all":
        logging.getLogger("sae_fast").warning(
            "%s has no held-out shards: measuring on all rows, which a training may have seen",
            config.shard_dir,
        )
    evaluation.measured_on |= {"shards": str(config.shard_dir), "rows": rows.count}
    columns = rows.columns()
    concepts = ConceptPass(
        *(evaluation.sae.d_sae, columns, config.labels),
        top=config.top_rows,
        probe_rows=config.probe_rows,
    )
    texts = _token_texts(config, rows.shards, columns)
    with _Progress(rows.count, "rows", output) as progress:
        found = core_metrics(
            evaluation.sae,
            progress.over(rows.batches()),
            rows.targets(),
            documents=rows.documents(),
            dead_rate=config.dead_percentage_threshold,
            extreme_rows=math.ceil(EXTREME_SHARE * rows.count),
            watch=concepts,
        )
    evaluation.add_core(found)
    evaluation.add_concepts(concepts.result(), texts)


def _token_texts(
    config: EvaluateConfig, shards: ShardSet, columns: Mapping[str, Tensor]
) -> dict[int, str]:
    """Return the texts of the tokens in the shards; none where no tokenizer is known."""
    from sae_fast.evaluation.text_rows import TOKENS
    from sae_fast.evaluation.token_texts import token_texts_of

    if TOKENS not in columns:
        if config.tokenizer is not None:
            raise ValueError(
                f"tokenizer = {config.tokenizer!r} needs shards with tokens, and "
                f"{config.shard_dir} holds no {TOKENS}"
            )
        return {}
    texts = token_texts_of(shards, config.tokenizer)
    if texts is None or not config.top_rows:
        return {}
    tokens = sorted(set(columns[TOKENS].tolist()))
    texts.require(max(tokens))
    return dict(zip(tokens, texts.of(tokens), strict=True))


def _measure_in_model(
    config: EvaluateConfig,
    evaluation: Evaluation,
    text: ModelText,
    core: CorePass | None,
    output: CommandOutput,
) -> None:
    from sae_fast.evaluation.causal import causal_impact, check_latents
    from sae_fast.evaluation.language_model import language_model_metrics

    sae, latents = evaluation.sae, config.ablate_latents
    check_latents(latents, sae.d_sae)
    with _Progress(2 * config.max_tokens, "tok", output) as progress:
        evaluation.add(language_model_metrics(sae, text, core, progress.report))
    if config.ablate_top or latents:
        top, by = config.ablate_top, config.ablate_by
        with _Progress(2 * config.max_tokens, "tok", output) as progress:
            evaluation.add_causal(
                causal_impact(sae, text, top=top, by=by, latents=latents, report=progress.report)
            )
    if core is not None:
        found = core.result()
        evaluation.add_core(found)
        evaluation.measured_on["rows"] = found.rows
    evaluation.measured_on |= {
        "dataset": str(config.dataset),
        "model": text.name,
        "model_dtype": str(text.network.dtype).removeprefix("torch."),
        "hook": text.source.name,
        "ctx_len": text.ctx_len,
    }


class _Model:
    """The language model of a command, loaded when a dictionary first needs it.

    Args:
        config: names the model, or leaves it to the origin of the dictionary.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._loaded: LanguageModel | None = None
        self._name = ""

    def text_for(self, sae: SparseAutoencoder) -> ModelText:
        """Return the model and its text, for a dictionary at its hook points.

        Raises ValueError where the dictionary is of another model, hook point or width.
        """
        from sae_fast.activations.capture.plan import open_capture
        from sae_fast.activations.origin import short_name
        from sae_fast.evaluation.model_text import check_predicts, model_text
        from sae_fast.evaluation.rows import check_same_place

        config = self._config
        name, hooks = self._places(sae)
        if self._loaded is not None and name != self._name:
            raise ValueError(f"all dictionaries must be of one model, got {self._name} and {name}")
        capture = open_capture(config.capture_config(name, hooks), model=self._loaded)
        self._loaded, self._name = check_predicts(capture.model), name
        found = {hook.name: hook for hook in capture.hooked.hooks}
        if len(found) != len(set(hooks)):
            raise ValueError(f"hook must name one hook point, got {' '.join(found)}")
        source, *targets = capture.hooked.hooks
        if not config.force:
            model = str(sae.origin.get("model", ""))
            known = {"model": short_name(model), "hook": sae.origin.get("hook")}
            ours = {key: value for key, value in known.items() if value}
            check_same_place(ours, {"model": short_name(name), "hook": source.name}, "the model's")
        return model_text(
            *(capture, capture.batches, (source, *targets)),
            (sae.d_in, *(sae.config.target_width for _ in targets)),
            seed=config.shuffle_seed or 0,
            max_tokens=config.max_tokens,
        )._replace(name=name)

    def _places(self, sae: SparseAutoencoder) -> tuple[str, tuple[str, ...]]:
        """Return the name of the model, and the hook points that a dictionary reads and writes."""
        from sae_fast.activations import TARGETS

        config, origin = self._config, sae.origin
        name, hook = config.model or origin.get("model"), config.hook or origin.get("hook")
        for flag, value in (("model", name), ("hook", hook)):
            if not value:
                raise ValueError(
                    f"--{flag} must be given: the dictionary does not say of which {flag} it is"
                )
        if not sae.config.transcoder:
            if config.target_hook is not None:
                raise ValueError("target_hook belongs to a transcoder, and the dictionary is none")
            return str(name), (str(hook),)
        target = config.target_hook or (origin.get(TARGETS) or {}).get("hook")
        if not target:
            raise ValueError("--target-hook must be given: the transcoder does not say its own")
        return str(name), (str(hook), str(target))


def _summary(evaluation: Evaluation) -> str:
    """Return the most important metrics on one line."""
    groups = evaluation.sections
    shown = [
        ("FVU", groups["reconstruction_quality"], "fvu", ".4f"),
        ("L0", groups["sparsity"], "l0", ".1f"),
        ("alive", groups["misc_metrics"], "frac_alive", ".1%"),
        ("cosine", groups["reconstruction_quality"], "cossim", ".4f"),
    ]
    if (losses := groups.get("model_performance_preservation")) is not None:
        shown += [
            ("CE increase", losses, "ce_loss_increase", "+.4f"),
            ("CE score", losses, "ce_loss_score", ".4f"),
        ]
    told = [f"{label} {found[name]:{form}}" for label, found, name, form in shown]
    return f"{evaluation.name}: {', '.join(told)}"


class _Progress:
    """A progress bar, for what is counted in rows or tokens."""

    def __init__(self, total: int, unit: str, output: CommandOutput) -> None:
        self._bar = progress_bar(
            total=total, initial=0, unit=unit, unit_scale=True, shown=not output.is_quiet
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, count: int) -> None:
        self._bar.update(count)

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self.report(len(batch))


if __name__ == "__main__":
    sys.exit(run_command(main))
