"""`LivePages`: pages of the latents while a model is trained."""

import base64
import json
import re
import shutil
import subprocess

import h5py
import numpy as np
import pytest
import torch
from small_pages import make_place
from tokenizers import Tokenizer, models

from sae_fast import SparseAutoencoder, Trainer
from sae_fast.activations import open_shards, write_shard
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.evaluation.latents import PageSettings
from sae_fast.evaluation.text_rows import TextRows
from sae_fast.train import main
from sae_fast.training.callbacks import Callback
from sae_fast.training.live_pages import LivePages
from sae_fast.training.trainer import TrainingError

STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("live"))


class Folders(Callback):
    """Note the folders of data after each step."""

    def __init__(self, out):
        self.out, self.found = out, []

    def on_step(self, trainer, row):
        self.found.append(sorted(path.name for path in self.out.glob("data_*")))


def train(place, callbacks=(), **settings):
    settings = {"batch_size": 64, "max_steps": STEPS, **settings}
    config = TrainConfig(shard_dir=str(place / "shards"), log_every=1, **settings)
    trainer = Trainer(SAEConfig(d_sae=40, k=4), config, callbacks=callbacks, show_progress=False)
    trainer.train()
    return trainer


def read_pages(out, step):
    """Return meta and table of the pages of a step."""
    folder = out / f"data_{step:09d}"
    texts = {name: (folder / f"{name}.js").read_text() for name in ("meta", "table")}
    parts = {name: json.loads(text.split("(", 1)[1][:-3]) for name, text in texts.items()}
    parts["table"] = {
        name: np.frombuffer(base64.b64decode(text), kind)
        for name, (kind, text) in parts["table"].items()
    }
    return parts


def test_pages_are_of_the_steps_and_do_not_change_the_training(place, tmp_path):
    out = tmp_path / "pages"
    folders = Folders(out)
    live = LivePages(out, str(place / "tokenizer.json"), rows=100, share=1.0)
    with_pages, without = train(place, [live, folders]), train(place)
    # Share 1 lets pages follow each other; the two newest stay.
    assert folders.found == [
        [f"data_{step:09d}" for step in range(max(1, last - 1), last + 1)]
        for last in range(1, STEPS + 1)
    ]
    assert (out / "live.js").read_text() == f"saeFast.live({STEPS});\n"
    index = (out / "index.html").read_text()
    assert f'data-folder="data_{STEPS:09d}"' in index
    assert index.count(f'src="data_{STEPS:09d}/') == 3
    assert {path.name for path in out.iterdir()} == {
        *("index.html", "viewer.js", "viewer.css", "start.js", "live.js"),
        *(f"data_{step:09d}" for step in (STEPS - 1, STEPS)),
    }
    meta = (out / f"data_{STEPS:09d}" / "meta.js").read_text()
    assert f'"step": {STEPS}' in meta
    assert '"rows": 256' in meta  # two spans of two batches, the first ones of 100 rows or more
    ours, theirs = with_pages.sae.state_dict(), without.sae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[row["loss"] for row in trainer.history] for trainer in (with_pages, without)]
    assert losses[0] == losses[1]


def test_pages_keep_to_their_share_of_the_time_and_end_with_the_last_step(place, tmp_path):
    out = tmp_path / "pages"
    folders = Folders(out)
    train(place, [LivePages(out, rows=100, share=1e-9), folders])
    first = ["data_000000001"]
    assert folders.found == [first] * STEPS
    assert sorted(path.name for path in out.glob("data_*")) == [*first, f"data_{STEPS:09d}"]


def test_numbers_are_of_the_batches_and_texts_of_the_rows_where_latents_are_strongest(
    place, tmp_path
):
    # Every row of the shards is in the batches, so that every latent has its strongest one.
    live = LivePages(tmp_path, rows=10**6, share=1.0)
    trainer = train(place, [live], batch_size=52, max_steps=5)  # one epoch of 260 rows
    page = read_pages(tmp_path, 5)
    assert page["meta"]["rows"] == 260
    assert trainer.sae_config.k == 4
    assert page["table"]["fired"].sum() == 260 * 4
    sae = trainer.sae
    text = TextRows(open_shards(place / "shards"), 32)
    (x,) = [x for _, x, _ in text.read(text.blocks(1000))]
    dense = sae.encode(x).dense()
    # The largest activations are of the model as it is, and nothing of the text is missing.
    assert page["table"]["largest"].tolist() == dense.amax(0).tolist()


def test_codes_are_those_of_the_steps_and_rows_those_of_the_shards(place, tmp_path):
    class Check(Callback):
        """Compare the codes of each step with the rows that it had."""

        def on_start(self, trainer):
            trainer.keep_codes()
            self.before = trainer.model().state_dict()
            self.before = {name: value.clone() for name, value in self.before.items()}

        def on_step(self, trainer, row):
            model = SparseAutoencoder(trainer.sae_config)
            model.load_state_dict(self.before)
            first = trainer.tokens - trainer.tokens_per_step
            for number, code in enumerate(trainer.codes):
                shards, rows = trainer.source.batch_rows(first + 64 * number)
                assert not shards.any()
                expected = model.encode(stored[rows]).dense()
                torch.testing.assert_close(code.dense(), expected)
            assert len(trainer.codes) == 2
            self.before = {name: value.clone() for name, value in trainer.sae.state_dict().items()}

    text = TextRows(open_shards(place / "shards"), 8)
    (stored,) = [x for _, x, _ in text.read(text.blocks(1000))]
    train(place, [Check()], grad_acc_steps=2)


def test_shards_without_tokens_give_pages_without_text(tmp_path, caplog):
    write_shard(tmp_path / "train.h5", torch.randn(100, 8), doc_id=torch.arange(100) // 10)
    config = TrainConfig(shard_dir=str(tmp_path), batch_size=20, max_steps=2)
    live = LivePages(tmp_path / "pages")
    Trainer(SAEConfig(d_sae=16, k=2), config, callbacks=[live], show_progress=False).train()
    assert "the rows have no token_ids: live pages show no text" in caplog.messages
    assert read_pages(tmp_path / "pages", 2)["meta"]["rows"] > 0


def test_a_tokenizer_of_another_vocabulary_is_refused_before_the_first_step(place, tmp_path):
    small = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    small.save(str(tmp_path / "small.json"))
    message = r"small.json has 2 tokens, and the shards hold token \d+: they are of another"
    with pytest.raises(TrainingError, match=message):
        train(place, [LivePages(tmp_path / "pages", str(tmp_path / "small.json"))])


def test_pages_of_a_tensor_are_those_of_shards_with_its_rows(place, tmp_path):
    with h5py.File(place / "shards" / "train_00.h5") as file:
        x = torch.from_numpy(file["activations"][:])
        columns = {name: file[name][:] for name in ("token_ids", "doc_id", "position")}
    tokenizer = str(place / "tokenizer.json")
    shown = {"share": 1.0, "rows": 10**6, "settings": PageSettings(context_tokens=8)}
    of_shards, of_tensor = (LivePages(tmp_path / name, tokenizer, **shown) for name in "ab")
    train(place, [of_shards], batch_size=52, max_steps=5)
    config = TrainConfig(batch_size=52, max_steps=5)
    Trainer(
        SAEConfig(d_sae=40, k=4),
        config,
        data=x,
        columns=columns,
        callbacks=[of_tensor],
        show_progress=False,
    ).train()
    # Both were trained on every row once, in other orders.
    pages = [read_pages(tmp_path / name, 5) for name in "ab"]
    assert pages[0]["meta"]["rows"] == pages[1]["meta"]["rows"] == len(x)
    assert [page["table"]["fired"].sum() for page in pages] == [len(x) * 4] * 2
    texts = [(tmp_path / name / "data_000000005" / "vocabulary.js").read_text() for name in "ab"]
    assert texts[0].count("word") == texts[1].count("word") > 0


def test_a_tensor_without_columns_gives_pages_of_its_rows(tmp_path):
    config = TrainConfig(batch_size=32, max_steps=1)
    live = LivePages(tmp_path)
    Trainer(
        SAEConfig(d_sae=40, k=4),
        config,
        data=torch.randn(64, 16),
        callbacks=[live],
        show_progress=False,
    ).train()
    assert read_pages(tmp_path, 1)["meta"]["rows"] == 32


def test_rows_that_cannot_be_read_again_have_no_live_pages(tmp_path):
    config = TrainConfig(batch_size=32, max_steps=1)
    parts = iter([torch.randn(64, 16)])
    with pytest.raises(TrainingError, match="live pages need shards, a tensor, or a model"):
        Trainer(
            SAEConfig(d_sae=40, k=4),
            config,
            data=parts,
            callbacks=[LivePages(tmp_path)],
            show_progress=False,
        ).train()


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 1.5}, {"rows": 0}])
def test_settings_out_of_range_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LivePages(tmp_path, **settings)


def test_the_flag_writes_pages_and_is_for_one_training(place, tmp_path, capsys):
    small = ["--d-sae", "40", "--k", "4", "--batch-size", "64", "--max-steps", "2", "--quiet"]
    small += ["--shard-dir", str(place / "shards"), "--checkpoint-dir", str(tmp_path / "run")]
    live = ["--live", str(tmp_path / "pages"), "--live-tokenizer", str(place / "tokenizer.json")]
    assert main([*small, *live]) == 0
    assert (tmp_path / "pages" / "index.html").exists()
    vocabulary = (tmp_path / "pages" / "data_000000002" / "vocabulary.js").read_text()
    assert "word1" in vocabulary
    (tmp_path / "sweep.json").write_text('{"k": [2, 4]}')
    capsys.readouterr()
    assert main([*small, *live, "--sweep", str(tmp_path / "sweep.json")]) == 2
    assert "--live is for one training" in capsys.readouterr().err


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_an_open_page_tells_of_newer_pages(place, tmp_path):
    out = tmp_path / "pages"
    train(place, [LivePages(out, rows=100)])
    (out / "live.js").write_text("saeFast.live(1200);\n")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    flags += ("--virtual-time-budget=12000", f"--user-data-dir={tmp_path / 'profile'}")
    shown = subprocess.run(
        [BROWSER, *flags, f"file://{out}/index.html"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert re.search(r'<button [^>]*id="newer">Step 1,200 is there: reload</button>', shown.stdout)
