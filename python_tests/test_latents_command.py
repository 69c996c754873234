"""`python -m sae_fast.latents`: its files, its viewer in a browser, resuming, and bad input."""

import base64
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import warm_python
from small_models import make_tokenizer, save_model
from small_pages import D_IN, D_SAE, HOSTILE, ROWS, VOCABULARY, command, make_place
from tokenizers import Tokenizer, models

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.evaluation.token_texts import TokenTexts, load_token_texts
from sae_fast.latents import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("latents"))


def run(place, out, *flags):
    return main(command(place, out, *flags))


@pytest.fixture(scope="module")
def made(place):
    assert run(place, place / "pages") == 0
    return place / "pages"


def arguments_of(path):
    """Return the arguments of the call that a file of data makes, arrays decoded."""
    text = path.read_text("ascii")
    call = re.fullmatch(r"saeFast\.\w+\((.*)\);\n", text, flags=re.S)
    return json.loads(f"[{call[1]}]")


def arrays_of(given):
    return {
        name: np.frombuffer(base64.b64decode(text), kind) for name, (kind, text) in given.items()
    }


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_dictionary_of_another_library_has_its_pages_too(place, made, tmp_path, capsys):
    SparseAutoencoder.from_pretrained(place / "<b>sae").export(tmp_path / "theirs", to="saelens")
    call = [str(tmp_path / "theirs"), *command(place, tmp_path / "out")[1:]]
    assert main(call) == 0
    written = (tmp_path / "out" / "index.html").stat().st_mtime_ns
    assert main(call) == 0
    assert (tmp_path / "out" / "index.html").stat().st_mtime_ns == written
    expected = contents(made / "data")
    found = contents(tmp_path / "out" / "data")
    assert found.keys() == expected.keys()
    same = [name for name in found if name != "meta.js"]  # the title is the name of the folder
    assert all(found[name] == expected[name] for name in same)
    path = tmp_path / "theirs" / "cfg.json"
    path.write_text(path.read_text().replace("6.54.12", "6.54.11"))
    assert main(call) == 2
    assert "holds pages of another pass, which differs in sae" in capsys.readouterr().err


def test_the_folder_has_the_viewer_and_its_data_and_nothing_else(made):
    assert set(contents(made)) == {
        *("index.html", "viewer.js", "viewer.css", "start.js", "pages.json"),
        *(f"data/{name}.js" for name in ("meta", "vocabulary", "table")),
        *("data/latents_00000.js", "data/latents_00001.js"),
    }
    assert json.loads((made / "pages.json").read_text())["contexts"] == 4


def test_data_are_the_codes_of_the_rows(place, made):
    import h5py

    with h5py.File(place / "shards" / "train_00.h5") as file:
        x, tokens, documents = (file[name][:] for name in ("activations", "token_ids", "doc_id"))
    sae = SparseAutoencoder.from_pretrained(place / "<b>sae")
    code = sae.encode(torch.from_numpy(x)).dense().numpy()
    table = arrays_of(arguments_of(made / "data" / "table.js")[0])
    assert table["fired"].tolist() == (code > 0).sum(0).tolist()
    np.testing.assert_array_equal(table["largest"], code.max(0))
    number, given = arguments_of(made / "data" / "latents_00001.js")
    assert number == 1
    part = arrays_of(given)
    assert len(part["pieces"]) == D_SAE - 64 + 1
    checked = 0
    for latent in range(64, D_SAE):
        for piece in range(*part["pieces"][latent - 64 : latent - 64 + 2]):
            row, peak = int(part["row"][piece]), int(part["peak"][piece])
            span = slice(*part["token_offsets"][piece : piece + 2])
            first = row - peak
            shown = part["tokens"][span]
            assert shown.tolist() == tokens[first : first + len(shown)].tolist()
            assert part["document"][piece] == documents[row]
            entries = slice(*part["entry_offsets"][piece : piece + 2])
            values = np.zeros(len(shown), np.float32)
            values[part["places"][entries]] = part["values"][entries]
            np.testing.assert_array_equal(values, code[first : first + len(shown), latent])
            checked += 1
    assert checked > 10


def test_no_text_of_the_data_can_end_a_script(made):
    for path in (made / "data").iterdir():
        assert "<" not in path.read_text("ascii")
    vocabulary = arguments_of(made / "data" / "vocabulary.js")[0]
    texts = [text.strip(" ") for text in vocabulary["texts"]]
    assert set(HOSTILE) <= set(texts)
    assert arguments_of(made / "data" / "meta.js")[0]["title"] == "<b>sae"


def test_a_second_run_has_nothing_to_do_and_another_one_is_refused(place, made, capsys):
    before = contents(made)
    assert run(place, made, "--batch-size", "64", "--no-quiet") == 0
    assert "is complete, nothing to do" in capsys.readouterr().out
    assert refusal(capsys, place, made, "--contexts", "5").endswith(
        "holds pages of another pass, which differs in contexts: name another --out, or remove it"
    )
    assert contents(made) == before


def test_a_stopped_pass_continues_and_ends_with_the_same_bytes(place, made, tmp_path, monkeypatch):
    class StopsWhenItBegins:
        def write(self, text):
            if "codes take about" in text:
                signal.raise_signal(signal.SIGTERM)

        def flush(self):
            pass

    out = tmp_path / "pages"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", StopsWhenItBegins())
        assert run(place, out, "--no-quiet", "--batch-size", "16") == 128 + signal.SIGTERM
    codes = sorted((out / "codes").glob("codes_*"))
    assert 0 < len(codes) < ROWS // 16 // 2  # a thread encodes a few blocks ahead
    (out / "codes" / f".{codes[0].name}.1.tmp").write_bytes(b"half")
    assert not (out / "pages.json").exists()
    assert run(place, out, "--batch-size", "16") == 0
    found, wanted = contents(out), contents(made)
    assert json.loads(found.pop("pages.json")) != json.loads(wanted.pop("pages.json"))  # batch size
    assert found == wanted


def refusal(capsys, place, out, *flags):
    """Return the single line of a refusal, with exit code 2."""
    capsys.readouterr()
    assert run(place, out, *flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_shards_of_another_place_are_refused_unless_forced(place, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    rows = torch.randn(60, D_IN)
    metadata = ShardMetadata(model="some/model", hook="residual.5", layer=5)
    write_shard(shards / "train.h5", rows, metadata=metadata, doc_id=torch.zeros(60))
    line = refusal(capsys, place, tmp_path / "pages", "--shard-dir", shards)
    assert "residual.3" in line
    assert "residual.5" in line
    assert "--force" in line
    assert run(place, tmp_path / "pages", "--shard-dir", shards, "--force") == 0
    assert "no token_ids: pages show no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--contexts", "0"), "contexts must be between 1 and 1000, got 0"),
        (("--rows", "none"), "--rows must be one of 'train', 'heldout', 'all', got 'none'"),
        (("--tokenizer", "nowhere/at-all"), "tokenizer: nowhere/at-all cannot be loaded"),
        (("--tokenizer", "/nowhere/at-all"), "cannot be loaded: no such file or folder"),
        (("--model", "nowhere/at-all"), "model: nowhere/at-all cannot be loaded"),
        (("--shard-dir", "nowhere"), "nowhere: no such directory"),
        (("--out", __file__), "is a file, and must be a directory"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in refusal(capsys, place, tmp_path / "pages", *flags)


def test_the_smallest_dictionary_has_a_page_of_the_smallest_shard(place, tmp_path):
    sae = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=1, k=1))
    sae.initialize_(torch.Generator().manual_seed(0))
    sae.save(tmp_path / "sae")
    (tmp_path / "shards").mkdir()
    row = sae.W_dec.detach()
    write_shard(tmp_path / "shards" / "train.h5", row, token_ids=torch.tensor([7]))
    words = command(place, tmp_path / "pages", "--shard-dir", str(tmp_path / "shards"))
    assert main([str(tmp_path / "sae"), *words[1:]]) == 0
    meta = arguments_of(tmp_path / "pages" / "data" / "meta.js")[0]
    assert (meta["latents"], meta["rows"], meta["neighbours"]) == (1, 1, 0)


def test_rows_never_written_are_refused_read_or_left_out(place, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    rows = torch.randn(100, D_IN)
    rows[20:70] = 0
    write_shard(shards / "train.h5", rows, token_ids=torch.arange(100) % 9)
    line = refusal(capsys, place, tmp_path / "refused", "--shard-dir", shards)
    assert "(--repeated-rows drop leaves them out, keep takes them)" in line
    for choice, count in ("keep", 100), ("drop", 50):
        flags = ("--shard-dir", shards, "--repeated-rows", choice)
        assert run(place, tmp_path / choice, *flags) == 0
        assert arguments_of(tmp_path / choice / "data" / "meta.js")[0]["rows"] == count


def test_sae_shards_and_out_must_be_given(capsys):
    assert main([]) == 2
    assert "SAE, --shard-dir and --out must be given" in capsys.readouterr().err


def test_rows_of_another_width_are_refused_also_by_force(place, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "train.h5", torch.randn(60, 12), doc_id=torch.zeros(60))
    flags = ("--shard-dir", shards, "--force")
    line = refusal(capsys, place, tmp_path / "pages", *flags)
    assert "the dictionary has d_in 16" in line
    assert line.endswith("have 12 numbers")


def test_a_folder_with_other_files_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not empty and holds no pages" in refusal(capsys, place, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_tokenizer_with_fewer_tokens_is_refused(place, tmp_path, capsys):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "small.json"))
    line = refusal(capsys, place, tmp_path / "pages", "--tokenizer", tmp_path / "small.json")
    assert "has 2 tokens, and the shards hold token 36: they are of another tokenizer" in line


@pytest.fixture
def named_tokenizer(place, tmp_path):
    """Write shards that name a folder with a tokenizer, in which two tokens have changed places."""
    texts = [*VOCABULARY[:6], VOCABULARY[7], VOCABULARY[6], *VOCABULARY[8:]]
    ids = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    shards = tmp_path / "shards"
    shards.mkdir()
    columns = {"token_ids": torch.arange(60) % len(VOCABULARY), "position": torch.arange(60)}
    metadata = ShardMetadata(tokenizer=str(tmp_path / "model"))
    write_shard(shards / "train.h5", torch.randn(60, D_IN), metadata=metadata, **columns)
    return tmp_path


def test_a_tokenizer_of_another_vocabulary_is_refused_unless_forced(place, named_tokenizer, capsys):
    shards, model = named_tokenizer / "shards", named_tokenizer / "model"
    out = named_tokenizer / "pages"
    line = refusal(capsys, place, out, "--shard-dir", shards)
    assert f"token 6 is ' word0' in {place / 'tokenizer.json'} and ' word1' in {model}" in line
    assert line.endswith("which the shards name: --force takes it all the same")
    assert run(place, out, "--shard-dir", shards, "--force") == 0
    others = ("--shard-dir", shards, "--tokenizer", model)
    assert run(place, named_tokenizer / "right", *others) == 0


def test_a_tokenizer_that_is_not_here_is_told_with_the_flag_that_names_one(place, tmp_path, capsys):
    arguments = command(place, tmp_path / "pages")
    at = arguments.index("--tokenizer")
    assert main([*arguments[:at], *arguments[at + 2 :]]) == 0
    assert (
        "pages show tokens by their numbers: --tokenizer takes a tokenizer.json, a folder of a "
        "model or a name on the hub (the one of some/model, which the shards name, is not on this "
        "machine)"
    ) in capsys.readouterr().err


def test_shards_with_a_hash_of_their_tokenizer_mean_the_one_of_their_model(
    place, named_tokenizer, capsys
):
    shards, model = named_tokenizer / "shards", named_tokenizer / "model"
    metadata = ShardMetadata(model=str(model), tokenizer="sha256:00")
    (shards / "train.h5").unlink()
    columns = {"token_ids": torch.full((60,), 6), "position": torch.arange(60)}
    write_shard(shards / "train.h5", torch.randn(60, D_IN), metadata=metadata, **columns)
    line = refusal(capsys, place, named_tokenizer / "pages", "--shard-dir", shards)
    assert "model" in line  # the model of the autoencoder is another one
    sae = SparseAutoencoder.from_pretrained(place / "<b>sae")
    sae.origin = {}
    sae.save(named_tokenizer / "sae")
    words = command(place, named_tokenizer / "other", "--shard-dir", shards)
    assert main([str(named_tokenizer / "sae"), *words[1:]]) == 2
    assert f"in {model}, which the shards name" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path
import sae_fast.evaluation.latents, sae_fast.report.latent_viewer, sae_fast.report.neuronpedia
from sae_fast.latents import main
replace = Path.replace
for limit in (2, 6, 14, 22):
    child = os.fork()
    if child == 0:
        done = 0
        def counted(path, target):
            global done
            done += 1
            if done == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)
        Path.replace = counted
        os._exit(main(sys.argv[1:]))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (limit, status)
"""


@pytest.mark.slow
def test_a_pass_killed_at_any_file_continues_and_ends_with_the_same_bytes(place, tmp_path):
    others = ("--write", "saedashboard", "neuronpedia", "delphi", "--sequence-tokens", "32")
    assert run(place, tmp_path / "whole", *others, "--batch-size", "16") == 0
    arguments = command(place, tmp_path / "killed", *others, "--batch-size", "16")
    done = warm_python.run(["-c", KILLED, *arguments])
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "killed" / "pages.json").exists()
    assert main(arguments) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_full_disk_is_noticed_before_the_pass(place, tmp_path, capsys, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    line = refusal(capsys, place, tmp_path / "pages")
    assert "has 0.0 MB free, and the pass needs" in line
    assert not list((tmp_path / "pages" / "codes").glob("codes_*"))


def test_a_model_adds_the_logits_and_its_own_texts(place, tmp_path):
    save_model(tmp_path / "model", "gpt2")
    tokens = torch.randint(0, 10, (60,))
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "train.h5", torch.randn(60, D_IN), token_ids=tokens, position=tokens * 0)
    out = tmp_path / "pages"
    words = (place / "<b>sae", "--shard-dir", shards, "--out", out, "--model", tmp_path / "model")
    assert main([*map(str, words), "--logits", "3", "--quiet"]) == 0
    assert arguments_of(out / "data" / "meta.js")[0]["logits"] == 3
    part = arrays_of(arguments_of(out / "data" / "latents_00000.js")[1])
    assert part["promoted"].shape == (64 * 3,)
    assert (part["promoted_logits"] > part["suppressed_logits"]).all()
    vocabulary = arguments_of(out / "data" / "vocabulary.js")[0]
    assert set(part["promoted"]) <= set(vocabulary["ids"])
    assert " cat" in vocabulary["texts"]


def test_a_model_of_another_name_or_vocabulary_is_refused_unless_forced(place, tmp_path, capsys):
    save_model(tmp_path / "other", "gpt2")
    line = refusal(capsys, place, tmp_path / "pages", "--model", tmp_path / "other")
    assert "of model 'model', and the model given is 'other'; --force" in line
    assert run(place, tmp_path / "pages", "--model", str(tmp_path / "other"), "--force") == 0
    (tmp_path / "other").rename(tmp_path / "model")
    sae = SparseAutoencoder.from_pretrained(place / "<b>sae")
    sae.origin |= {"settings": {"vocabulary": "9 tokens, sha256:00"}}
    sae.save(tmp_path / "sae")
    words = command(place, tmp_path / "again", "--model", str(tmp_path / "model"))
    assert main([str(tmp_path / "sae"), *words[1:]]) == 2
    assert "of 9 tokens, sha256:00, and the tokenizer given has 18" in capsys.readouterr().err


def test_numbers_beyond_a_vocabulary_are_shown_as_numbers(place):
    plain = load_token_texts(str(place / "tokenizer.json"))
    assert plain.of([plain.size - 1, plain.size]) == [f" {VOCABULARY[-1]}", str(plain.size)]
    whole = TokenTexts(make_tokenizer(True), "words")
    assert whole.of([8, 18]) == [" cat", "18"]


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("part", ["", "#latent=65"])
def test_a_browser_shows_the_pages_from_the_disk_without_errors(made, tmp_path, part):
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    flags += ("--virtual-time-budget=3000", f"--user-data-dir={tmp_path}")
    shown = subprocess.run(
        [BROWSER, *flags, "--enable-logging=stderr", "--v=0", f"file://{made}/index.html{part}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in shown.stderr, shown.stderr
    page = shown.stdout
    assert "&lt;b&gt;sae</a>" in page
    assert page.count("<script") == 5  # the one of the chunk has been removed
    assert "<img" not in page
    if not part:
        assert " of 70 latents" in page
        assert page.count('class="row"') > 5
        return
    assert "Latent 65" in page
    assert "Largest activations" in page
    vocabulary = set(re.findall(r">([^<>]*)</span>", page))
    assert any("word" in text for text in vocabulary)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_tokens_that_look_like_markup_as_text(made, tmp_path):
    """All pages of a folder hold such a token somewhere; the first one that does is opened."""
    ids = arguments_of(made / "data" / "vocabulary.js")[0]
    hostile = {i for i, text in zip(ids["ids"], ids["texts"], strict=True) if "<img" in text}
    part = arrays_of(arguments_of(made / "data" / "latents_00000.js")[1])
    place = int(np.flatnonzero(np.isin(part["tokens"], list(hostile)))[0])
    piece = int(np.searchsorted(part["token_offsets"], place, side="right")) - 1
    latent = int(np.searchsorted(part["pieces"], piece, side="right")) - 1
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    flags += ("--virtual-time-budget=3000", f"--user-data-dir={tmp_path}")
    shown = subprocess.run(
        [BROWSER, *flags, f"file://{made}/index.html#latent={latent}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown.stdout
    assert "<img" not in shown.stdout


def test_held_out_shards_need_no_others_beside_them(place, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(place / "shards" / "heldout_00.h5", shards)
    flags = ("--shard-dir", shards, "--rows", "heldout")
    assert run(place, tmp_path / "pages", *flags) == 0
    assert (tmp_path / "pages" / "index.html").is_file()
