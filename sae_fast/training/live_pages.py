"""`LivePages`: the pages of the latents of a training that is going on.

    OUT/index.html          opens the newest pages, and tells when there are newer ones
    OUT/data_000000100      the data of the pages of step 100; the ones before stay for who has
                            opened them
    OUT/live.js             the newest step

They are of the batches that are trained on. The codes of the steps say how often each latent fires,
and on which rows most strongly. When pages are due, the text round the strongest rows, and round
some of the newest rows whatever they are, is read from where the rows are and encoded.

All this takes a fixed share of the time at most: after pages that took a second the next ones wait
until the training has gone on for so long that the share holds, and so it is with the codes.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_fast.evaluation.code_store import CodeStore
from sae_fast.evaluation.contexts import tokens_before
from sae_fast.evaluation.latents import LatentPages, PageSettings, make_pages
from sae_fast.evaluation.recent_batches import RecentBatches
from sae_fast.evaluation.text_rows import TOKENS, Integers, TextRows, pieces_around, rows_of
from sae_fast.evaluation.token_texts import TokenTexts, load_token_texts
from sae_fast.report.latent_viewer import Viewer, live_folder, write_live
from sae_fast.training.batch_texts import BatchTexts, texts_of
from sae_fast.training.callbacks import Callback
from sae_fast.training.metrics import Row

if TYPE_CHECKING:
    from sae_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)

ROWS = 1 << 18
SHARE = 0.05
_SETTINGS = PageSettings(contexts=8, samples=1, cofiring_rows=1 << 12)
_BLOCK_ROWS = 4096
_SAMPLE_ROWS = 1 << 14  # of text round the newest rows, of which histograms and samples are
_STRONGEST = 1 << 12  # rows round which more text is read
_CODES_SHARE = 0.5  # of the share of the time, at most, that taking the codes of steps has
_KEPT = 2  # pages of the newest steps


class LivePages(Callback):
    """Write the pages of all latents again and again while a model is trained.

    The training is on shards; on a tensor, whose columns token_ids, doc_id and position give the
    text then; or straight from a model.

    The training itself is the same, bit for bit. Pages are written after the first step, then
    whenever their share of the time allows it, and at the end.

    Args:
        out: the folder; open the index.html in it.
        tokenizer: a tokenizer.json, a folder or a name on the hub; None: tokens are numbers.
        rows: of the newest batches that the pages are of, at least so many once there were so many,
            and at most twice as many and a step's.
        share: of the time of the training, at most, between 0 and 1.
        settings: sizes of the pages; None: fewer contexts than `sae_fast.latents` has.

    Raises ValueError for a share outside of (0, 1], and when the training begins, where it is on
    other data, or the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: str | None = None,
        *,
        rows: int = ROWS,
        share: float = SHARE,
        settings: PageSettings | None = None,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.out = Path(out)
        self._tokenizer, self._rows, self._share = tokenizer, rows, share
        self._settings = settings or _SETTINGS
        self._trainer: Trainer | None = None
        self._texts: BatchTexts | None = None
        self._recent: RecentBatches | None = None
        self._tokens: TokenTexts | None = None
        self._next = 0.0  # no pages are written before this time
        self._next_codes = 0.0  # no codes are taken before this time
        self._newest = self._taken = -1  # the steps whose pages and codes are the newest

    def on_start(self, trainer: Trainer) -> None:
        """Load the tokenizer, and ask for the codes of the steps."""
        if self._trainer not in (None, trainer):
            raise ValueError("live pages are of one training, and there are several")
        self._trainer, self._texts = trainer, texts_of(trainer.source)
        self._newest = self._taken = -1
        length = self._settings.context_tokens
        if (token := self._texts.largest_token()) is None:
            logger.warning("the rows have no %s: live pages show no text", TOKENS)
        elif self._tokenizer is not None:
            self._tokens = load_token_texts(self._tokenizer)
            self._tokens.require(token, token)
        self.out.mkdir(parents=True, exist_ok=True)
        newest = max(1, min(self._rows, _SAMPLE_ROWS) // length)
        d_sae, count = trainer.sae_config.d_sae, self._settings.contexts
        self._recent = RecentBatches(d_sae, count, self._rows, newest)
        trainer.keep_codes()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """Take the codes of the step, and write pages, where the share of the time allows it."""
        if time.monotonic() >= self._next_codes:
            self._take(trainer)
        if time.monotonic() >= self._next:
            self._write(trainer)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Write the pages of the last step, if a step was made."""
        if error is None and trainer.step > self._newest and trainer.codes:
            self._write(trainer)
            if self._newest < 0:
                logger.warning(
                    "no live pages were written: the text of the steps was not kept, because "
                    "more rows were read ahead than the pool of pool_rows holds"
                )
        self._trainer = None

    def _take(self, trainer: Trainer) -> None:
        """Take the codes of the last step, unless that was done."""
        assert self._texts is not None
        assert self._recent is not None
        if trainer.step == self._taken:
            return
        self._taken = trainer.step
        began = time.monotonic()
        size = trainer.train_config.kept_batch_size
        firsts = range(trainer.tokens - trainer.tokens_per_step, trainer.tokens, size)
        rows = np.concatenate([self._texts.batch_rows(first) for first in firsts])
        if len(rows) < trainer.tokens_per_step:
            return  # a stream from a model is too far ahead of the step
        for code in trainer.codes:
            own, rows = np.split(rows, [code.n_rows])
            self._recent.add(code, own)
        took = time.monotonic() - began
        self._next_codes = time.monotonic() + took * (1 / self._share - 1) / _CODES_SHARE
        if self._newest >= 0:
            self._next += took / self._share  # both together keep to the share

    def _write(self, trainer: Trainer) -> None:
        self._take(trainer)
        began, step = time.monotonic(), trainer.step
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".codes_") as place:
            made = self._pages(trainer, Path(place))
        if made is None:
            return
        text, pages = made
        lines = f"step {step:,}", f"{trainer.sae.extra_repr()} · the newest {pages.rows:,} rows"
        viewer = Viewer(
            pages, text, *lines, self._settings.intervals, tokens=self._tokens, step=step
        )
        viewer.write(self.out)
        write_live(self.out, step)
        self._newest = step
        self._remove_old()
        took = time.monotonic() - began
        self._next = time.monotonic() + took * (1 / self._share - 1)
        logger.info("step %d: pages in %s, %.1f s", step, self.out, took)

    def _pages(self, trainer: Trainer, place: Path) -> tuple[TextRows, LatentPages] | None:
        """Return the text round strong and newest rows, and the pages of all latents.

        None: none of the newest rows can be read again, in a stream that is ahead of the step.
        """
        assert self._texts is not None
        assert self._recent is not None
        recent, sae, offsets = self._recent, trainer.model(), self._texts.offsets
        length = self._settings.context_tokens
        around = tokens_before(length), length
        last = _inside(recent.newest, offsets)
        if not last.size:
            return None
        rows = np.concatenate([_inside(recent.strongest(_STRONGEST), offsets), last])
        pieces, newest = (pieces_around(offsets, part, *around) for part in (rows, last))
        counted = np.isin(rows_of(pieces, offsets), rows_of(newest, offsets), assume_unique=True)
        text = self._texts.text(pieces, length, place)
        store = CodeStore(place, sae, text, _BLOCK_ROWS)
        pages = make_pages(store, sae.W_dec, self._settings, counted=counted)
        # The batches are far more rows than the text that was encoded.
        return text, replace(pages, rows=recent.rows, fired=recent.fired, mean=recent.mean())

    def _remove_old(self) -> None:
        folders = sorted(self.out.glob(live_folder("*")))
        for folder in folders[:-_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)


def _inside(rows: Integers, offsets: Integers) -> Integers:
    """Return the rows that can still be read."""
    is_inside = (rows >= offsets[0]) & (rows < offsets[-1])
    return rows[np.flatnonzero(is_inside)]
