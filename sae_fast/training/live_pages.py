"""`LivePages`: the pages of the latents of a training that is going on.

    OUT/index.html          opens the newest pages, and tells when there are newer ones
    OUT/data_000000100      the data of the pages of step 100; the ones before stay for who has
                            opened them
    OUT/live.js             the newest step

The pages are of a fixed sample: the first rows of the shards that are trained on, so that texts are
whole. They take a fixed share of the time at most: after pages that took a second the next ones
wait until the training has gone on for so long that the share holds.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sae_fast.activations import ShardError, ShardSet, find_shards, open_shards
from sae_fast.evaluation.code_store import CodeStore
from sae_fast.evaluation.latents import PageSettings, make_pages
from sae_fast.evaluation.text_rows import TOKENS, TextRows
from sae_fast.evaluation.token_texts import TokenTexts, load_token_texts
from sae_fast.report.latent_viewer import Viewer, live_folder, write_live
from sae_fast.training.callbacks import Callback
from sae_fast.training.metrics import Row

if TYPE_CHECKING:
    from sae_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)

ROWS = 1 << 14
SHARE = 0.05
_SETTINGS = PageSettings(contexts=8, samples=1, cofiring_rows=1 << 12)
_BLOCK_ROWS = 4096
_KEPT = 2  # pages of the newest steps


class LivePages(Callback):
    """Write the pages of all latents again and again while a model is trained on shards.

    The training itself is the same, bit for bit. Pages are written after the first step, then
    whenever their share of the time allows it, and at the end.

    Args:
        out: the folder; open the index.html in it.
        tokenizer: a tokenizer.json, a folder or a name on the hub; None: tokens are numbers.
        rows: how many rows the pages are of, the first ones of the training shards.
        share: of the time of the training, at most, between 0 and 1.
        settings: sizes of the pages; None: fewer contexts than `sae_fast.latents` has.

    Raises ValueError for a share outside of (0, 1], and when the training begins, where it is not
    on shards, or the tokenizer cannot be loaded.
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
        self._text: TextRows | None = None
        self._tokens: TokenTexts | None = None
        self._next = 0.0  # no pages are written before this time
        self._newest = -1

    def on_start(self, trainer: Trainer) -> None:
        """Open the rows and load the tokenizer."""
        config = trainer.train_config
        if config.shard_dir is None:
            raise ValueError("live pages need shards: the training is on other data")
        shards = first_shards(find_shards(config.shard_dir)[0], config.activations_key, self._rows)
        self._text = TextRows(shards, self._settings.context_tokens, self._rows)
        if self._tokenizer is not None and TOKENS in self._text.columns:
            self._tokens = load_token_texts(self._tokenizer)
            self._tokens.require(int(self._text.columns[TOKENS].max()))
        self.out.mkdir(parents=True, exist_ok=True)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """Write pages where their share of the time allows it."""
        if time.monotonic() >= self._next:
            self._write(trainer)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Write the pages of the last step."""
        if error is None and trainer.step > self._newest:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        assert self._text is not None
        began, sae, step = time.monotonic(), trainer.model(), trainer.step
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".codes_") as place:
            store = CodeStore(Path(place), sae, self._text, _BLOCK_ROWS)
            pages = make_pages(store, sae.W_dec, self._settings)
        lines = f"step {step:,}", f"{sae.extra_repr()} · {pages.rows:,} rows"
        viewer = Viewer(
            pages, self._text, *lines, self._settings.intervals, tokens=self._tokens, step=step
        )
        viewer.write(self.out)
        write_live(self.out, step)
        self._newest = step
        self._remove_old()
        took = time.monotonic() - began
        self._next = time.monotonic() + took * (1 / self._share - 1)
        logger.info("step %d: pages in %s, %.1f s", step, self.out, took)

    def _remove_old(self) -> None:
        folders = sorted(self.out.glob(live_folder("*")))
        for folder in folders[:-_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)


def first_shards(paths: list[Path], key: str, rows: int) -> ShardSet:
    """Open the first shards that hold `rows` rows together, or all, without looking at each row.

    Raises ShardError where there are none, or a file cannot be read.
    """
    if not paths:
        raise ShardError("there are no shards to train on")
    count = 1
    while True:
        shards = open_shards(paths[:count], key=key, verify=False)
        if shards.rows >= rows or count >= len(paths):
            return shards
        count *= 2
