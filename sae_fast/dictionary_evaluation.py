"""`evaluate_dictionary`: all metrics of a dictionary in one call, which the command makes too.

The command `python -m sae_fast.evaluate` has a `DictionaryEvaluator` measure one dictionary after
the other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations import ShardSet
from sae_fast.activations.heldout import read_column
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.evaluate import EvaluateConfig
from sae_fast.config.fields import reject_unknown_keys
from sae_fast.evaluation.causal import causal_impact, check_latents
from sae_fast.evaluation.concepts import ConceptPass
from sae_fast.evaluation.core import EXTREME_SHARE, CorePass, core_metrics
from sae_fast.evaluation.dictionary import dictionary_metrics
from sae_fast.evaluation.language_model import ModelText, language_model_metrics
from sae_fast.evaluation.model_text import EvaluatedModel
from sae_fast.evaluation.rows import open_rows
from sae_fast.evaluation.text_rows import TOKENS
from sae_fast.evaluation.token_texts import COMPARED_ROWS, check_named, token_texts_of
from sae_fast.progress_bar import progress_bar
from sae_fast.report.evaluation import Evaluation
from sae_fast.training.device import checked_device
from sae_fast.training.history import read_history

logger = logging.getLogger(__name__)

_OF_THE_COMMAND = ("saes", "out", "shard_dir")


def evaluate_dictionary(
    sae: SparseAutoencoder | str | Path,
    shards: str | Path | None = None,
    *,
    name: str | None = None,
    show_progress: bool = False,
    **settings: Any,
) -> Evaluation:
    """Measure a dictionary on shards and, with `dataset`, inside the language model.

    `evaluate_dictionary(sae, "examples/activations").metrics["sparsity"]["l0"]` is a metric, and
    `save(directory)` of the result writes the files that `python -m sae_fast.evaluate` writes.

    Args:
        sae: a model, which is left as it is, or the directory of a run, a checkpoint or a saved
            model.
        shards: the directory of the shards, of which the held-out ones are measured on; None: the
            rows are the activations of the text.
        name: of the dictionary in the files; None: the last part of its path, or "dictionary".
        show_progress: whether to show progress bars.
        settings: fields of EvaluateConfig, such as max_rows, labels, dataset, model, hook,
            ablate_latents and force.

    Raises:
        ValueError: in one line, for a dictionary and shards or a model that do not belong together,
            rows that are not finite, and settings that do not fit.
        OSError: where there is no such dictionary.
    """
    known = EvaluateConfig.defaults().keys() - set(_OF_THE_COMMAND)
    reject_unknown_keys(settings, sorted(known))
    _check_arguments(sae, shards)
    if shards is None and settings.get("dataset") is None:
        raise ValueError("shards or dataset must be given: rows to measure on")
    if isinstance(sae, SparseAutoencoder):
        settings.setdefault("device", str(sae.device))
        name = name or "dictionary"
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    config = EvaluateConfig(shard_dir=None if shards is None else Path(shards), **values)
    return DictionaryEvaluator(config, show_progress=show_progress).evaluate(
        sae, name or Path(str(sae)).name
    )


def _check_arguments(sae: object, shards: object) -> None:
    """Raise ValueError for a dictionary or shards of another type, or without a name."""
    if not isinstance(sae, SparseAutoencoder | str | Path) or sae == "":
        raise ValueError(
            "sae must be a SparseAutoencoder or the path of a run, a checkpoint or a saved model, "
            f"got {_told(sae)}"
        )
    if shards is not None and (not isinstance(shards, str | Path) or shards == ""):
        raise ValueError(f"shards must be the path of a directory of shards, got {_told(shards)}")


def _told(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"a value of type {type(value).__name__}"


class DictionaryEvaluator:
    """Measures dictionaries on rows and in a language model, which is loaded once.

    Args:
        config: says on what, and what is measured.
        show_progress: whether to show progress bars.

    Raises ValueError where it names neither shards nor a text.
    """

    def __init__(self, config: EvaluateConfig, *, show_progress: bool = False) -> None:
        if config.shard_dir is None and config.dataset is None:
            raise ValueError("--shard-dir or --dataset must be given: rows to measure on")
        checked_device(config.device)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._model = EvaluatedModel(config)
        self._show_progress = show_progress

    def evaluate(self, sae: SparseAutoencoder | str | Path, name: str) -> Evaluation:
        """Return the metrics of a dictionary, see `evaluate_dictionary`."""
        if isinstance(sae, SparseAutoencoder):
            found = Evaluation(name, sae, "")
        else:
            model = SparseAutoencoder.from_pretrained(sae, self._config.device)
            found = Evaluation(name, model, str(sae))
            with suppress(OSError, ValueError):  # a checkpoint or a saved model is no run
                found.training = read_history(Path(sae)).rows
        self._measure(found)
        return found

    def _measure(self, found: Evaluation) -> None:
        """Measure a dictionary on shards, by its weights, and in the model."""
        config, sae = self._config, found.sae
        text = None if config.dataset is None else self._model.text_for(sae)
        core: CorePass | None = None
        if config.shard_dir is not None:
            self._measure_rows(found)
        else:  # the activations of the model are the rows
            rows = math.ceil(EXTREME_SHARE * config.max_tokens)
            rate = config.dead_percentage_threshold
            core = CorePass(sae, dead_rate=rate, extreme_rows=rows)
        if text is not None:
            self._measure_in_model(found, text, core)
        section, latents = dictionary_metrics(sae)
        found.add({"misc_metrics": section})
        found.latents |= latents

    def _measure_rows(self, found: Evaluation) -> None:
        config, sae = self._config, found.sae
        rows = open_rows(config, sae)
        if rows.were_trained_on and config.rows != "all":
            logger.warning(
                "%s has no held-out shards: measuring on all rows, which a training may have seen",
                config.shard_dir,
            )
        found.measured_on |= {"shards": str(config.shard_dir), "rows": rows.count}
        columns = rows.columns
        concepts = ConceptPass(
            *(sae.d_sae, columns, config.labels),
            top=config.top_rows,
            probe_rows=config.probe_rows,
        )
        texts = _token_texts(config, rows.shards, columns)
        with self._progress(rows.count, "rows") as progress:
            core = core_metrics(
                sae,
                progress.over(rows.batches()),
                rows.targets(),
                documents=rows.documents(),
                dead_rate=config.dead_percentage_threshold,
                extreme_rows=math.ceil(EXTREME_SHARE * rows.count),
                watch=concepts,
            )
        found.add_core(core)
        found.add_concepts(concepts.result(), texts)

    def _measure_in_model(self, found: Evaluation, text: ModelText, core: CorePass | None) -> None:
        config, sae = self._config, found.sae
        latents = config.ablate_latents
        check_latents(latents, sae.d_sae)
        with self._progress(2 * config.max_tokens, "tok") as progress:
            found.add(language_model_metrics(sae, text, core, progress.report))
        if config.ablate_top or latents:
            top, by = config.ablate_top, config.ablate_by
            with self._progress(2 * config.max_tokens, "tok") as progress:
                impact = causal_impact(
                    sae, text, top=top, by=by, latents=latents, report=progress.report
                )
            found.add_causal(impact)
        if core is not None:
            measured = core.result()
            found.add_core(measured)
            found.measured_on["rows"] = measured.rows
        found.measured_on |= {
            "dataset": str(config.dataset),
            "model": text.name,
            "model_dtype": str(text.network.dtype).removeprefix("torch."),
            "hook": text.source.name,
            "ctx_len": text.ctx_len,
        }

    def _progress(self, total: int, unit: str) -> _Progress:
        return _Progress(total, unit, self._show_progress)


def _token_texts(
    config: EvaluateConfig, shards: ShardSet, columns: Mapping[str, Tensor]
) -> dict[int, str]:
    """Return the texts of the tokens in the shards; none where no tokenizer is known."""
    if TOKENS not in columns:
        if config.tokenizer is not None:
            need = f"tokenizer = {config.tokenizer!r} needs shards with tokens"
            try:
                read_column(shards, TOKENS, whole=True)
            except ValueError as error:
                raise ValueError(f"{need}: {error}") from None
        return {}
    if not config.top_rows:
        return {}
    texts = token_texts_of(shards, config.tokenizer, "tokens.csv and the report")
    if texts is None:
        return {}
    found = texts.by_token(columns[TOKENS])
    if config.tokenizer is not None and not config.force:
        check_named(texts, shards, columns[TOKENS][:COMPARED_ROWS].tolist())
    return found


class _Progress:
    """A progress bar, for what is counted in rows or tokens."""

    def __init__(self, total: int, unit: str, shown: bool) -> None:
        self._bar = progress_bar(total=total, initial=0, unit=unit, unit_scale=True, shown=shown)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, count: int) -> None:
        self._bar.update(count)

    def over(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield batch
            self.report(len(batch))
