"""`python -m sae_fast.evaluate`: its files, its rows, and what it refuses in one line."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from small_models import WORDS, make_tokenizer, save_model
from tokenizers import Tokenizer, models

from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.activations.capture.tokens import vocabulary_of
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluate import main
from sae_fast.evaluation.core import core_metrics
from sae_fast.report.evaluation import NOT_MEASURED

D_IN, D_SAE, ROWS = 16, 30, 200
ORIGIN = {"model": "some/model", "hook": "residual.1", "layer": "1"}


def _save(path: Path, seed: int = 0, **fields: object) -> SparseAutoencoder:
    origin = fields.pop("origin", ORIGIN)
    sae = SparseAutoencoder(SAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "k": 4, **fields}))
    sae.initialize_(torch.Generator().manual_seed(seed))
    sae.origin = dict(origin)  # type: ignore[call-overload]
    sae.save(path)
    return sae.eval()


def _rows(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shards = tmp_path / "shards"
    shards.mkdir()
    metadata = ShardMetadata(model="some/model", hook="residual.1", layer=1)
    for number, name in enumerate(("train_00", "heldout_00")):
        documents = {"doc_id": torch.arange(ROWS) // 9}
        write_shard(shards / f"{name}.h5", _rows(number), metadata=metadata, **documents)
    return tmp_path


def _run(*words: object) -> int:
    return main([*map(str, words), "--quiet"])


def test_held_out_rows_are_measured_and_all_files_written(place: Path) -> None:
    sae = _save(place / "sae")
    out = place / "out"
    assert _run(place / "sae", "--shard-dir", place / "shards", "--out", out) == 0
    names = {"metrics.json", "metrics.md", "latents.csv", "saebench_core.json", "report.html"}
    assert {path.name for path in out.iterdir()} == names
    content = json.loads((out / "metrics.json").read_text())
    expected = core_metrics(sae, [_rows(1)])
    quality = content["metrics"]["reconstruction_quality"]
    assert quality["fvu"] == pytest.approx(expected.sections["reconstruction_quality"]["fvu"])
    assert content["measured_on"]["rows"] == ROWS
    told = f"measured on {ROWS} rows of {place / 'shards'}, one a token"
    assert told in (out / "metrics.md").read_text()
    assert content["sae"]["origin"] == ORIGIN
    assert sum(content["density_histogram"]["latents"]) == int(
        (expected.latents["feature_density"] > 0).sum()
    )
    table = list(csv.DictReader((out / "latents.csv").read_text().splitlines()))
    assert [int(row["latent"]) for row in table] == list(range(D_SAE))
    assert float(table[3]["feature_density"]) == pytest.approx(
        float(expected.latents["feature_density"][3])
    )
    assert "consistent_activation_heuristic" in table[0]  # the shards have documents
    saebench = json.loads((out / "saebench_core.json").read_text())
    assert saebench["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(4)
    losses = saebench["eval_result_metrics"]["model_performance_preservation"]
    assert losses["ce_loss_score"] == NOT_MEASURED
    assert len(saebench["eval_result_details"]) == D_SAE
    assert saebench["sae_cfg_dict"]["hook_name"] == "blocks.1.hook_resid_post"


def test_the_rows_are_those_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = _save(place / "sae")

    def fvu(*flags: object) -> float:
        words = (place / "sae", "--shard-dir", place / "shards", "--out", place / "out", *flags)
        assert _run(*words) == 0
        content = json.loads((place / "out" / "metrics.json").read_text())
        return float(content["metrics"]["reconstruction_quality"]["fvu"])

    def expected(*parts: torch.Tensor) -> float:
        found = core_metrics(sae, [torch.cat(parts)]).sections["reconstruction_quality"]
        return pytest.approx(found["fvu"], rel=1e-5)  # type: ignore[no-any-return]

    assert fvu("--rows", "all") == expected(_rows(0), _rows(1))
    assert fvu("--max-rows", 30, "--batch-size", 7) == expected(_rows(1)[:30])
    (place / "shards" / "heldout_00.h5").rename(place / "other.h5")
    assert fvu("--heldout", place / "other.h5") == expected(_rows(1))
    assert fvu("--heldout-fraction", 0.25) == expected(_rows(0)[150:])
    capsys.readouterr()
    assert fvu() == expected(_rows(0))
    assert "has no held-out shards: measuring on all rows" in capsys.readouterr().err


def test_several_dictionaries_are_beside_each_other(place: Path) -> None:
    for seed in (0, 1):
        _save(place / f"seed_{seed}", seed)
    saes = [place / "seed_0", place / "seed_1"]
    assert _run(*saes, "--shard-dir", place / "shards", "--out", place / "out") == 0
    text = (place / "out" / "metrics.md").read_text()
    assert "| metric | seed_0 | seed_1 | definition |" in text
    assert (place / "out" / "seed_1" / "metrics.json").is_file()


def test_a_transcoder_is_measured_on_its_targets(place: Path) -> None:
    sae = _save(place / "sae", transcoder=True, d_out=5)
    for number, name in enumerate(("train_00", "heldout_00")):
        (place / "shards" / f"{name}.h5").unlink()
        columns = {"outputs": _rows(number + 5)[:, :5]}
        write_shard(place / "shards" / f"{name}.h5", _rows(number))
        _add_dataset(place / "shards" / f"{name}.h5", columns["outputs"])
    flags = ("--target-key", "outputs", "--out", place / "out")
    assert _run(place / "sae", "--shard-dir", place / "shards", *flags) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    plain = sae.get_reconstruction_error(_rows(6)[:, :5], sae(_rows(1)))
    quality = content["metrics"]["reconstruction_quality"]
    assert quality["fvu"] == pytest.approx(plain["fvu"], rel=1e-4)


def _add_dataset(path: Path, rows: torch.Tensor) -> None:
    with h5py.File(path, "a") as file:
        file["outputs"] = rows.numpy()


def test_losses_inside_the_model_are_measured_without_shards(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(place / "llama", "llama")
    words = [" ".join(WORDS[n % len(WORDS)] for n in range(k, k + 9)) for k in range(30)]
    (place / "texts.txt").write_text("\n".join(words))
    origin = {"model": str(place / "llama"), "hook": "residual.1"}
    _save(place / "sae", origin=origin)
    flags = ("--dataset", place / "texts.txt", "--max-tokens", 100, "--batch-sequences", 2)
    ablated = ("--ablate-top", 2, "--ablate-latents", 5, 3)
    assert _run(place / "sae", *flags, *ablated, "--ctx-len", 16, "--out", place / "out") == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    losses = content["metrics"]["model_performance_preservation"]
    assert losses["ce_loss_increase"] == pytest.approx(
        losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"]
    )
    assert 100 <= content["measured_on"]["rows"] < 140
    assert content["metrics"]["misc_metrics"]["frac_alive"] > 0
    causal = list(csv.DictReader((place / "out" / "causal.csv").read_text().splitlines()))
    numbers = [int(row["latent"]) for row in causal]
    assert {3, 5} <= set(numbers)
    assert 2 <= len(numbers) <= 4
    assert numbers == [row["latent"] for row in content["causal_impact"]]
    assert "## causal_impact" in (place / "out" / "metrics.md").read_text()
    words = [place / "sae", *flags, "--ablate-latents", 30, "--out", place / "out"]
    capsys.readouterr()
    assert _run(*words) == 2
    assert "ablate_latents must be from 0 to 29" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({"model": "gpt2"}, "of model 'gpt2', and the model given is 'llama'"),
        ({"hook": "residual.0"}, "of hook 'residual.0', and the hook given is 'residual.1'"),
        (
            {"settings": {"vocabulary": "9 tokens, sha256:00"}},
            "of a vocabulary of 9 tokens, sha256:00, and the tokenizer given has 18 tokens, sha256",
        ),
    ],
)
def test_another_model_is_refused_unless_forced(
    place: Path, capsys: pytest.CaptureFixture[str], origin: dict[str, object], message: str
) -> None:
    save_model(place / "llama", "llama")
    (place / "texts.txt").write_text("the cat sat\nthe dog ran")
    _save(place / "sae", origin={"model": "llama", "hook": "residual.1", **origin})
    text = ("--dataset", place / "texts.txt", "--model", place / "llama", "--ablate-top", 0)
    flags = (*text, "--hook", "residual.1", "--out", place / "out")
    assert _run(place / "sae", *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the dictionary is ")
    assert message in line
    assert line.endswith("--force continues all the same")
    assert _run(place / "sae", *flags, "--force") == 0


def _add_labels(place: Path, labels: torch.Tensor) -> None:
    for name in ("train_00", "heldout_00"):
        with h5py.File(place / "shards" / f"{name}.h5", "a") as file:
            file["labels/kind"] = labels.numpy()
            file["token_ids"] = (torch.arange(ROWS) % 7).numpy()


def test_tokens_and_labels_of_latents_are_told(place: Path) -> None:
    pytest.importorskip("sklearn")
    _save(place / "sae")
    _add_labels(place, (_rows(1)[:, 0] > 1).long())
    flags = ("--labels", "labels/kind", "--top-rows", 4, "--probe-rows", 150)
    words = (place / "sae", "--shard-dir", place / "shards", "--out", place / "out", *flags)
    assert _run(*words) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    probing, purity = (content["metrics"][name] for name in ("sparse_probing", "purity"))
    assert probing["probe_rows_accuracy"] > 0.9
    assert 0.5 < probing["probe_1_latents_accuracy"] <= 1
    assert 100 <= probing["probe_train_rows"] + probing["probe_test_rows"] <= 150
    assert purity["token_commonest_share"] == pytest.approx(29 / ROWS)
    tables = {
        name: list(csv.DictReader((place / "out" / f"{name}.csv").read_text().splitlines()))
        for name in ("tokens", "probes", "latents")
    }
    latents = tables["latents"]
    strongest = [row for row in tables["tokens"] if row["latent"] == "0"]
    assert strongest[0]["token"] == latents[0]["top_token"]
    assert float(strongest[0]["share"]) == float(latents[0]["token_purity"])
    assert sum(float(row["share"]) for row in strongest) == pytest.approx(1)
    assert [row["latents"].count(" ") for row in tables["probes"][1:4]] == [0, 1, 4]
    assert tables["probes"][0]["latents"] == "rows"


def test_files_of_an_earlier_measurement_do_not_stay(place: Path) -> None:
    _save(place / "sae")
    _save(place / "b", seed=1)
    _add_labels(place, torch.arange(ROWS) % 2)
    rows = ("--shard-dir", place / "shards", "--out", place / "out")
    assert _run(place / "sae", *rows, "--labels", "labels/kind") == 0
    (place / "out" / "notes.txt").write_text("kept")
    told = {"tokens.csv", "probes.csv"}
    assert told <= {path.name for path in (place / "out").iterdir()}
    assert _run(place / "sae", *rows, "--top-rows", 0) == 0
    left = {path.name for path in (place / "out").iterdir()}
    assert "metrics.json" in left
    assert not told & left
    assert _run(place / "sae", place / "b", *rows) == 0
    left = {path.name for path in (place / "out").iterdir()}
    assert left == {"metrics.md", "report.html", "notes.txt", "sae", "b"}


def test_more_strongest_rows_than_there_are_take_no_more_memory(place: Path) -> None:
    _save(place / "sae")
    _add_labels(place, torch.arange(ROWS) % 2)
    rows = ("--shard-dir", place / "shards", "--out", place / "out")
    assert _run(place / "sae", *rows, "--top-rows", 10**9) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    assert content["metrics"]["purity"]["token_latents"] == 0


REFUSED = {
    "a device that is not here": (
        ("{sae}", "{rows}", "--device", "cuda:99"),
        "device = 'cuda:99'",
    ),
    "no dictionary": ((), "SAE and --out must be given"),
    "no directory": (("{sae}", "--shard-dir", "{shards}"), "error: --out must be given"),
    "a saved model in the place of the directory": (
        ("{sae}", "--shard-dir", "{shards}", "--out", "{sae}"),
        "it holds a trained model",
    ),
    "no rows": (("{sae}", "--out", "{out}"), "--shard-dir or --dataset must be given"),
    "another width": (("{wide}", "{rows}"), "the dictionary has d_in 8, the rows of"),
    "another place": (
        ("{other}", "{rows}"),
        "the dictionary is of hook 'residual.7', not 'residual.1' as",
    ),
    "the same twice": (("{sae}", "{sae}", "{rows}"), "dictionaries must be different ones"),
    "no such dictionary": (("{nothing}", "{rows}"), "nothing"),
    "no such shards": (
        ("{sae}", "--shard-dir", "{nothing}", "--out", "{out}"),
        "no such directory",
    ),
    "targets of no transcoder": (
        ("{sae}", "{rows}", "--target-key", "x"),
        "target_shard_dir and target_key belong to a transcoder",
    ),
    "a hook without a text": (
        ("{sae}", "{rows}", "--hook", "residual.0"),
        "hook = 'residual.0' needs",
    ),
    "a file in the place of the directory": (
        ("{sae}", "--shard-dir", "{shards}", "--out", "{shards}/train_00.h5"),
        "train_00.h5 is a file, and must be a directory",
    ),
    "labels that are not there": (
        ("{sae}", "{rows}", "--labels", "labels/kind"),
        "labels/kind",
    ),
    "probes without labels": (
        ("{sae}", "{rows}", "--probe-rows", "9"),
        "probe_rows = 9 needs labels to probe for, --labels",
    ),
    "a tokenizer without tokens": (
        ("{sae}", "{rows}", "--tokenizer", "x"),
        "tokenizer = 'x' needs shards with tokens",
    ),
    "two kinds of rows": (
        ("{sae}", "{rows}", "--heldout", "x", "--heldout-fraction", "0.1"),
        "give one of the two",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(place / "sae")
    _save(place / "wide", d_in=8)
    _save(place / "other", origin={**ORIGIN, "hook": "residual.7"})
    words, message = REFUSED[case]
    given: list[object] = []
    for word in words:
        if word == "{rows}":
            given += ["--shard-dir", place / "shards", "--out", place / "out"]
        else:
            given.append(word.replace("{", f"{place}/").replace("}", ""))
    assert _run(*given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("flags", "count"), [(("--max-rows", 1), 1), ((), 200)])
def test_rows_without_variance_are_measured_as_far_as_that_goes(
    place: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], count: int
) -> None:
    _save(place / "sae")
    (place / "shards" / "heldout_00.h5").unlink()
    with h5py.File(place / "shards" / "heldout_00.h5", "w") as file:
        file["activations"] = np.arange(16, dtype=np.float32)[None].repeat(ROWS, 0)
    words = (place / "sae", "--shard-dir", place / "shards", "--out", place / "out", *flags)
    assert main(list(map(str, words))) == 0
    told = capsys.readouterr()
    assert told.out.startswith("sae: FVU has no value, L0 4.0")
    error = told.err
    assert f"have no value: no variance in the rows measured, {count}" in error
    content = json.loads((place / "out" / "metrics.json").read_text())
    quality = content["metrics"]["reconstruction_quality"]
    assert quality["fvu"] is None
    assert quality["mse"] >= 0


@pytest.mark.parametrize("fields", [{}, {"d_sae": 1, "k": 1}, {"arch": "relu", "k": None}])
def test_latents_of_zeros_and_the_smallest_dictionary_and_shard_are_measured(
    place: Path, fields: dict[str, object]
) -> None:
    sae = _save(place / "sae", **fields)
    with torch.no_grad():
        sae.W_dec.zero_()
    sae.save(place / "sae")
    (place / "one").mkdir()
    write_shard(place / "one" / "heldout_00.h5", _rows(1)[:1], token_ids=torch.zeros(1).long())
    for shards, rows in ("shards", ROWS), ("one", 1):
        flags = ("--shard-dir", place / shards, "--out", place / f"out_{shards}")
        assert _run(place / "sae", *flags) == 0
        content = json.loads((place / f"out_{shards}" / "metrics.json").read_text())
        assert content["measured_on"]["rows"] == rows
        assert content["metrics"]["shrinkage"]["l2_norm_out"] == 0
        assert content["metrics"]["shrinkage"]["relative_reconstruction_bias"] is None
        assert content["metrics"]["misc_metrics"]["average_max_decoder_cosine_sim"] == 0


def test_rows_never_written_are_measured_on_or_left_out(place: Path) -> None:
    _save(place / "sae")
    path = place / "shards" / "heldout_00.h5"
    path.unlink()
    rows = _rows(1)
    rows[50:150] = 0
    write_shard(path, rows)
    flags = ("--shard-dir", place / "shards", "--skip-nonfinite", "--out", place / "out")
    for choice, count in ((), ROWS), (("--repeated-rows", "drop"), 100):
        assert _run(place / "sae", *flags, *choice) == 0
        content = json.loads((place / "out" / "metrics.json").read_text())
        assert content["measured_on"]["rows"] == count
        assert content["metrics"]["token_stats"]["rows_of_norm_0"] == count - 100


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (500, "has 18 tokens, and the shards hold token 699"),
        (-7, "the shards hold token -7, which no tokenizer has"),
    ],
)
def test_tokens_that_a_tokenizer_does_not_have_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], first: int, message: str
) -> None:
    _save(place / "sae")
    save_model(place / "llama", "llama")
    for name in ("train_00", "heldout_00"):
        with h5py.File(place / "shards" / f"{name}.h5", "a") as file:
            file["token_ids"] = (torch.arange(ROWS) + first).numpy()
    flags = ("--shard-dir", place / "shards", "--tokenizer", place / "llama")
    assert _run(place / "sae", *flags, "--out", place / "out") == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_reads_the_tokens_otherwise_is_refused_unless_forced(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(place / "sae")
    names = [f"word{number}" for number in range(7)]
    for folder, words in (("theirs", names), ("mine", names[::-1])):
        (place / folder).mkdir()
        tokenizer = Tokenizer(
            models.WordLevel({w: n for n, w in enumerate([*words, "?"])}, unk_token="?")
        )
        tokenizer.save(str(place / folder / "tokenizer.json"))
    metadata = ShardMetadata(tokenizer=str(place / "theirs"), hook="residual.1", layer=1)
    path = place / "shards" / "heldout_00.h5"
    path.unlink()
    write_shard(path, _rows(1), metadata=metadata, token_ids=torch.arange(ROWS) % 7)
    flags = ("--shard-dir", place / "shards", "--tokenizer", place / "mine", "--out", place / "out")
    assert _run(place / "sae", *flags) == 2
    error = capsys.readouterr().err
    assert f"token 0 is ' word6' in {place / 'mine'} and ' word0' in {place / 'theirs'}" in error
    assert _run(place / "sae", *flags, "--force") == 0


def test_a_tokenizer_is_compared_with_the_vocabulary_that_a_capture_has_recorded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(place / "sae")
    tokenizer = make_tokenizer(True)
    tokenizer.save_pretrained(place / "mine")
    path = place / "shards" / "heldout_00.h5"
    flags = ("--shard-dir", place / "shards", "--tokenizer", place / "mine", "--out", place / "out")
    own = vocabulary_of(tokenizer)
    for vocabulary, code in ((own, 0), ("30 tokens, sha256:00", 2)):
        recipe = json.dumps({"model": {"vocabulary": vocabulary}})
        metadata = ShardMetadata(tokenizer="sha256:ab", extra={"capture": recipe})
        path.unlink()
        write_shard(path, _rows(1), metadata=metadata, token_ids=torch.arange(ROWS) % 7)
        assert _run(place / "sae", *flags) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert f"a vocabulary of 30 tokens, sha256:00, and the tokenizer given has {own}" in line
    assert _run(place / "sae", *flags, "--force") == 0


WRONG_TOKENS = {
    "too few": (np.arange(7), "'token_ids' must have one number a row, shape (200,), got shape (7"),
    "real numbers": (np.full(ROWS, 1.5), "token_ids holds float64; whole numbers are needed"),
    "texts": (np.full(ROWS, b"the"), "token_ids holds |S3; whole numbers are needed"),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_tokens_that_cannot_be_used_are_left_out_with_the_reason(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(place / "sae")
    numbers, reason = WRONG_TOKENS[case]
    path = place / "shards" / "heldout_00.h5"
    with h5py.File(path, "a") as file:
        file["token_ids"] = numbers
    words = (place / "sae", "--shard-dir", place / "shards", "--out", place / "out")
    assert _run(*words, "--tokenizer", place) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert refused.startswith(f"error: tokenizer = '{place}' needs shards with tokens: {path}: ")
    assert reason in refused
    assert _run(*words) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "token_ids" in line] == told
    assert len(told) == 1
    assert reason in told[0]
    assert told[0].endswith(": token_ids is left out")
    assert "purity" not in json.loads((place / "out" / "metrics.json").read_text())["metrics"]


def test_tokens_of_some_shards_only_are_left_out_with_the_reason(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(place / "sae")
    with h5py.File(place / "shards" / "heldout_00.h5", "a") as file:
        file["token_ids"] = np.arange(ROWS)
    words = (place / "sae", "--shard-dir", place / "shards", "--out", place / "out")
    assert _run(*words, "--rows", "all") == 0
    told = capsys.readouterr().err
    assert f"{place / 'shards' / 'train_00.h5'}: no dataset 'token_ids'; it holds" in told
    assert told.endswith(": token_ids is left out\n")


def test_held_out_shards_need_no_others_beside_them(place: Path) -> None:
    sae = _save(place / "sae")
    (place / "shards" / "train_00.h5").unlink()
    assert _run(place / "sae", "--shard-dir", place / "shards", "--out", place / "out") == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    expected = core_metrics(sae, [_rows(1)]).sections["reconstruction_quality"]["fvu"]
    assert content["metrics"]["reconstruction_quality"]["fvu"] == pytest.approx(expected)


def test_force_measures_on_another_place(place: Path) -> None:
    _save(place / "other", origin={**ORIGIN, "hook": "residual.7"})
    flags = ("--shard-dir", place / "shards", "--out", place / "out", "--force")
    assert _run(place / "other", *flags) == 0


def test_rows_that_are_not_finite_are_refused_or_left_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae, path = _save(place / "sae"), place / "shards" / "heldout_00.h5"
    damaged = _rows(1)
    damaged[7, 3] = torch.nan
    path.unlink()
    with h5py.File(path, "w") as file:
        file["activations"] = damaged.numpy()
    words = (place / "sae", "--shard-dir", place / "shards", "--out", place / "out")
    assert _run(*words) == 2
    assert "row 7 holds NaN or Inf (--skip-nonfinite drops such rows)" in capsys.readouterr().err
    assert _run(*words, "--skip-nonfinite") == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    others = core_metrics(sae, [torch.cat([_rows(1)[:7], _rows(1)[8:]])])
    assert content["measured_on"]["rows"] == ROWS - 1
    assert content["metrics"]["reconstruction_quality"]["fvu"] == pytest.approx(
        others.sections["reconstruction_quality"]["fvu"], rel=1e-5
    )
    assert content["metrics"]["misc_metrics"]["frac_alive"] == pytest.approx(
        others.sections["misc_metrics"]["frac_alive"]
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_directory_that_cannot_be_written_is_refused_before_the_pass(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("--shard-dir", place / "shards", "--out", "/proc/nothing")
    assert _run(place / "not-looked-for", *rows) == 2
    assert "--out /proc/nothing: /proc cannot be written to: " in capsys.readouterr().err


def test_all_dictionaries_are_looked_for_before_one_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(place / "sae")
    rows = ("--shard-dir", place / "shards", "--out", place / "out")
    assert _run(place / "sae", place / "nothing", *rows) == 2
    assert "nothing: no such directory" in capsys.readouterr().err
    assert not (place / "out").exists()
