"""Write a page on every latent: `python -m sae_fast.latents SAE --shard-dir DIR --out DIR`.

The command encodes the rows of shards once and writes a folder that a browser opens from the disk:
OUT/index.html. After a kill at any moment the same command continues; the codes of rows that were
encoded are in OUT/codes until the pages are written.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import functools
import inspect
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_fast.command_errors import check_out
from sae_fast.command_frame import run_resumable
from sae_fast.config.command_line import CommandLine
from sae_fast.config.latents import LatentsConfig
from sae_fast.config.output import OutputConfig
from sae_fast.log_output import CommandOutput
from sae_fast.output_streams import run_command
from sae_fast.progress_bar import progress_bar
from sae_fast.training.signals import StopOnSignal, run_program

if TYPE_CHECKING:
    from sae_fast.activations import ShardSet
    from sae_fast.autoencoder import SparseAutoencoder
    from sae_fast.evaluation.code_store import CodeStore
    from sae_fast.evaluation.latents import PageSettings
    from sae_fast.evaluation.logits import LogitEffects
    from sae_fast.evaluation.text_rows import TextRows
    from sae_fast.evaluation.token_texts import TokenTexts
    from sae_fast.report.latent_viewer import Viewer
    from sae_fast.report.page_source import PageSource

PROGRAM = "python -m sae_fast.latents"
USAGE = f"{PROGRAM} SAE --shard-dir DIR --out DIR [flags]"
CODES = "codes"
RECIPE = "recipe.json"  # in CODES: what the codes are of
RECORD = "pages.json"  # in OUT: written last
_LOCK = ".lock"
_READINGS = 3
_SAMPLE_ROWS = 1024  # that say how many entries a row has, for the disk space
_TOKEN_BYTES = 4 * 4 / 3  # in base64
_CONTEXT_BYTES = 150
_TEXT_BYTES = 20  # of a token and its value, as JSON
_NUMBER_BYTES = 10  # as JSON
_LOCATION_BYTES = 14  # of an entry in delphi's cache, at most
_FILES_OF_TOKENS = 5  # in each of which delphi has all tokens
_OF_CODES = ("sae", "shards", "max_tokens", "context_tokens", "batch_size", "rows")


class _StoppedError(Exception):
    """A signal has asked the pass to stop."""


@functools.cache
def command_line() -> CommandLine:
    """Return the command line of the command."""
    sections = {"latents": LatentsConfig, "output": OutputConfig}
    return CommandLine(USAGE, inspect.getdoc(LatentsConfig) or "", sections)


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [command_line()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 for bad input, 128 and its number after a signal."""
    words = sys.argv[1:] if arguments is None else arguments
    return run_resumable(lambda stop, output: _run(words, stop, output))


def _run(words: Sequence[str], stop: StopOnSignal, output: CommandOutput) -> None:
    config, shown = parse_arguments(words)
    output.configure(quiet=shown.quiet, log_file=shown.log_file)
    try:
        _write_pages(config, stop, output)
    except _StoppedError:
        output.say("stopped: the same command continues after the codes in OUT/codes")


def parse_arguments(arguments: Sequence[str]) -> tuple[LatentsConfig, OutputConfig]:
    """Return the pages that a command line asks for, and its output.

    Raises ValueError naming a wrong flag.
    """
    given = command_line().read(arguments)
    config, output = LatentsConfig(**given["latents"]), OutputConfig(**given["output"])
    if config.sae is None or config.shard_dir is None or config.out is None:
        raise ValueError(f"SAE, --shard-dir and --out must be given: {USAGE}")
    check_out(config.out)
    return config, output


def _write_pages(config: LatentsConfig, stop: StopOnSignal, output: CommandOutput) -> None:
    import torch

    from sae_fast.autoencoder import SparseAutoencoder
    from sae_fast.evaluation.code_store import CodeStore
    from sae_fast.evaluation.latents import make_pages
    from sae_fast.evaluation.text_rows import TextRows
    from sae_fast.report.latent_viewer import INDEX, Viewer

    assert config.sae is not None
    assert config.out is not None
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    started = time.monotonic()
    sae = SparseAutoencoder.from_pretrained(config.sae, config.device)
    shards = _open(config, sae)
    settings = _settings(config)
    text = TextRows(shards, settings.context_tokens, config.max_tokens)
    recipe = _recipe(config, shards)
    with _directory(config.out, recipe) as is_complete:
        if is_complete:
            output.say(f"{config.out / INDEX} is complete, nothing to do")
            return
        tokens = _token_texts(config, shards, text)
        source = _page_source(config, sae, shards, text, tokens)
        logits = _logit_effects(config, sae)
        store = CodeStore(config.out / CODES, sae, text, config.batch_size)
        _check_space(config, store, sae, output)
        with progress_bar(
            total=_READINGS * text.rows, unit="row", unit_scale=True, shown=not output.is_quiet
        ) as bar:

            def report(reading: str, rows: int) -> None:
                bar.set_description(reading, refresh=False)
                bar.update(rows)
                if stop.received is not None:
                    raise _StoppedError

            pages = make_pages(store, sae.W_dec, settings, report)
        lines = _title(config), _subtitle(sae, pages.rows)
        viewer = Viewer(pages, text, *lines, config.intervals, logits, tokens)
        viewer.write(config.out)
        if source is not None:
            _write_others(config, store, sae, viewer, source, stop)
        _finish(config, recipe)
    alive = int((pages.fired > 0).sum())
    output.say(
        f"{alive:,} of {pages.d_sae:,} latents fire on {pages.rows:,} rows, L0 "
        f"{pages.fired.sum() / max(pages.rows, 1):.1f}; {time.monotonic() - started:.1f} s"
    )
    output.say(config.out / INDEX)


def _open(config: LatentsConfig, sae: SparseAutoencoder) -> ShardSet:
    """Return the shards, checked against the model; raise ValueError where they do not fit."""
    from sae_fast.activations import ShardError, find_shards, open_shards
    from sae_fast.evaluation.rows import check_belongs

    assert config.shard_dir is not None
    train, heldout = find_shards(config.shard_dir, for_training=config.rows == "train")
    paths = {"train": train, "heldout": heldout, "all": [*train, *heldout]}[config.rows]
    if not paths:
        raise ShardError(f"{config.shard_dir}: no held-out shards there")
    shards = open_shards(
        paths,
        key=config.activations_key,
        skip_nonfinite=config.skip_nonfinite,
        repeated_rows=config.repeated_rows,
    )
    check_belongs(sae, shards, force=config.force)
    return shards


def _settings(config: LatentsConfig) -> PageSettings:
    from dataclasses import fields

    from sae_fast.evaluation.latents import PageSettings

    values = asdict(config)
    return PageSettings(**{item.name: values[item.name] for item in fields(PageSettings)})


def _recipe(config: LatentsConfig, shards: ShardSet) -> dict[str, Any]:
    """Return all that decides the pages, as JSON."""
    assert config.sae is not None
    values = asdict(config)
    left_out = ("sae", "shard_dir", "out", "force", "keep_codes", "num_threads", "device")
    settings = {name: value for name, value in values.items() if name not in left_out}
    return {
        "sae": _hashes(config.sae),
        "shards": [list(identity) for identity in shards.identities()],
        **settings,
        "write": list(config.write),
    }


def _hashes(sae: Path) -> list[str]:
    """Return the SHA-256 of the files of a dictionary, whose names other libraries choose."""
    from sae_fast.autoencoder.files import CONFIG_FILE, TENSOR_FILE, is_saved_model, model_directory
    from sae_fast.autoencoder.foreign import local_place
    from sae_fast.tensor_files import sha256_of

    place = local_place(sae)
    own = model_directory(place)
    if is_saved_model(own):
        files = [own / TENSOR_FILE, own / CONFIG_FILE]
    else:
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        files = [path for path in inside if path.is_file()]
    return [sha256_of(path.resolve()) for path in files]


@contextmanager
def _directory(out: Path, recipe: dict[str, Any]) -> Iterator[bool]:
    """Make and lock the directory; yield whether its pages are complete.

    Raises ValueError where it holds the pages of another pass, or other files.
    """
    from sae_fast.atomic_files import write_json
    from sae_fast.directory_lock import FileLock
    from sae_fast.json_files import read_json

    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names - {_LOCK} and not names & {RECORD, CODES}:
        raise ValueError(f"{out} is not empty and holds no pages: name another --out")
    (out / CODES).mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK)
    lock.take()
    try:
        if (out / RECORD).exists():
            _require_equal(out, read_json(out / RECORD), recipe, _of_pages(recipe))
            yield True
            return
        record = out / CODES / RECIPE
        if record.exists():
            _require_equal(out, read_json(record), recipe, _OF_CODES)
        write_json(record, recipe)
        for abandoned in out.rglob(".*.tmp"):  # of a pass that was killed
            abandoned.unlink()
        yield False
    finally:
        lock.release()


def _of_pages(recipe: dict[str, Any]) -> list[str]:
    return [name for name in recipe if name != "batch_size"]


def _require_equal(out: Path, before: Any, recipe: dict[str, Any], names: Sequence[str]) -> None:
    if not isinstance(before, dict):
        before = {}
    other = [name for name in names if before.get(name) != recipe[name]]
    if other:
        raise ValueError(
            f"{out} holds pages of another pass, which differs in {', '.join(other)}: name another "
            "--out, or remove it"
        )


def _token_texts(config: LatentsConfig, shards: ShardSet, text: TextRows) -> TokenTexts | None:
    """Return the texts of tokens; None, with a warning, where no tokenizer is known."""
    from sae_fast.evaluation.text_rows import TOKENS
    from sae_fast.evaluation.token_texts import COMPARED_ROWS, check_named, token_texts_of

    if TOKENS not in text.columns:
        logging.getLogger("sae_fast").warning(
            "%s: no token_ids: pages show no text", config.shard_dir
        )
        return None
    name = config.tokenizer or config.model
    texts = token_texts_of(shards, name, "pages")
    if texts is None:
        return None
    numbers = text.columns[TOKENS]
    texts.require(int(numbers.min()), int(numbers.max()))
    if name is not None and not config.force:
        check_named(texts, shards, numbers[:COMPARED_ROWS].tolist())
    return texts


def _logit_effects(config: LatentsConfig, sae: SparseAutoencoder) -> LogitEffects | None:
    if config.model is None:
        return None
    from sae_fast.activations.capture.language_model import load_language_model
    from sae_fast.evaluation.logits import logit_effects
    from sae_fast.evaluation.model_text import check_same_model

    model = load_language_model(
        config.model, device=config.device, trust_remote_code=config.trust_remote_code
    )
    if not config.force:
        check_same_model(sae.origin, config.model, model)
    directions = sae.direction(slice(None)).detach()
    return logit_effects(
        directions, model.network, config.logits, causal=model.causal, bins=config.bins
    )


def _page_source(
    config: LatentsConfig,
    sae: SparseAutoencoder,
    shards: ShardSet,
    text: TextRows,
    tokens: TokenTexts | None,
) -> PageSource | None:
    """Return the place that files for other programs name; None where none are asked for.

    Raises ValueError where something that these need is not known.
    """
    if not config.write:
        return None
    from datetime import datetime, timezone

    from sae_fast.activations import full_origin
    from sae_fast.activations.mixing import single
    from sae_fast.autoencoder.files import TENSOR_FILE, model_directory
    from sae_fast.autoencoder.foreign import local_place
    from sae_fast.evaluation.text_rows import TOKENS
    from sae_fast.report.page_source import as_name, page_source

    assert config.sae is not None
    if TOKENS not in text.columns:
        raise ValueError(f"--write needs the tokens of the rows: {config.shard_dir}: no token_ids")
    if tokens is None and set(config.write) != {"delphi"}:
        raise ValueError("--write needs the texts of tokens: name a tokenizer with --tokenizer")
    set_name = config.set_name or as_name(config.sae.resolve().name)
    # Equal pages are equal files, so the time is the one of the model.
    place = model_directory(local_place(config.sae))
    tensors = place / TENSOR_FILE  # which dictionaries of other libraries do not have
    changed = (tensors if tensors.is_file() else place).stat().st_mtime
    created = datetime.fromtimestamp(int(changed), timezone.utc).isoformat()
    origins = (sae.origin, full_origin(single(shards)))
    names = (set_name, config.release or set_name, config.creator, created)
    return page_source(origins, *names)


def _write_others(
    config: LatentsConfig,
    store: CodeStore,
    sae: SparseAutoencoder,
    viewer: Viewer,
    source: PageSource,
    stop: StopOnSignal,
) -> None:
    """Write the files for other programs that are asked for."""
    from sae_fast.report.delphi_cache import write_delphi
    from sae_fast.report.neuronpedia import write_neuronpedia
    from sae_fast.report.saedashboard import Dashboard, write_saedashboard

    assert config.out is not None
    pages, text = viewer.pages, viewer.text

    def check(*_: object) -> None:
        if stop.received is not None:
            raise _StoppedError

    if "delphi" in config.write:
        entries, length = int(pages.fired.sum()), config.sequence_tokens
        out = config.out / "delphi"
        write_delphi(store, pages.d_sae, entries, source, length, out, check)
    if viewer.tokens is None:
        return
    directions = sae.direction(slice(None)).detach().float().cpu().numpy()
    dashboard = Dashboard(
        pages, text, viewer.tokens, directions, source, config.context_tokens, viewer.logits
    )
    if "saedashboard" in config.write:
        settings = asdict(_settings(config))
        write_saedashboard(dashboard, config.out / "saedashboard", settings, check)
    if "neuronpedia" in config.write:
        write_neuronpedia(dashboard, config.out / "neuronpedia", check)


def _check_space(
    config: LatentsConfig, store: CodeStore, sae: SparseAutoencoder, output: CommandOutput
) -> None:
    """Say how much disk space the pass needs; raise ValueError where there is less."""
    from sae_fast.evaluation.code_store import ENTRY_BYTES

    assert config.out is not None
    _, x, _ = next(store.text.read(store.text.blocks(_SAMPLE_ROWS)[:1]))
    entries = float(sae.encode(x).l0().sum()) / max(len(x), 1)
    block = (sae.d_sae + 1) * 8
    codes = store.text.rows * entries * ENTRY_BYTES + len(store.blocks) * block
    pieces = sae.d_sae * (config.contexts + config.intervals * config.samples)
    pages = pieces * (config.context_tokens * _TOKEN_BYTES + _CONTEXT_BYTES)
    if {"saedashboard", "neuronpedia"} & set(config.write):
        pages += pieces * config.context_tokens * _TEXT_BYTES + sae.W_dec.numel() * _NUMBER_BYTES
    if "delphi" in config.write:
        pages += store.text.rows * (entries * _LOCATION_BYTES + _FILES_OF_TOKENS * 8)
    there = sum(path.stat().st_size for path in store.directory.iterdir())
    free = shutil.disk_usage(config.out).free
    output.say(
        f"{sae.d_sae:,} latents on {store.text.rows:,} rows: codes take about "
        f"{_megabytes(codes)} during the pass, pages at most {_megabytes(pages)}, of "
        f"{_megabytes(free)} free"
    )
    if codes - there + pages > free:
        raise ValueError(
            f"{config.out} has {_megabytes(free)} free, and the pass needs "
            f"{_megabytes(codes - there + pages)}: fewer --max-tokens or --contexts need less"
        )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _finish(config: LatentsConfig, recipe: dict[str, Any]) -> None:
    """Write the record, and remove the codes unless they are to be kept."""
    from sae_fast.atomic_files import write_json

    assert config.out is not None
    write_json(config.out / RECORD, recipe)
    if not config.keep_codes:
        shutil.rmtree(config.out / CODES)


def _title(config: LatentsConfig) -> str:
    assert config.sae is not None
    return config.sae.resolve().name


def _subtitle(sae: SparseAutoencoder, rows: int) -> str:
    origin = ", ".join(str(sae.origin[name]) for name in ("model", "hook") if name in sae.origin)
    return f"{sae.extra_repr()} · {rows:,} rows" + (f" · {origin}" if origin else "")


def program() -> None:
    """Run the command as this process."""
    run_program(lambda: run_command(main))


if __name__ == "__main__":
    program()
