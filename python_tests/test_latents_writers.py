"""`--write` of `sae_fast.latents`: the files of SAEDashboard, Neuronpedia and delphi.

The fields are the ones that the programs' own classes have: SAEDashboard 0.8.0 and Neuronpedia
ebb8426f. docs/guide/latents.md says with which versions the files were loaded by these programs.
"""

import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_models import make_network
from small_pages import D_SAE, ROWS, command, make_place

from sae_fast import SparseAutoencoder
from sae_fast.activations import write_shard
from sae_fast.latents import main
from sae_fast.report.page_source import as_name, page_source

BATCH = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
SHARED = {
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_values", "logits_hist_data_bar_heights", "decoder_weights_dist"),
}
DASHBOARD_FEATURE = SHARED | {
    *("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations"),
    "vector",
}
DASHBOARD_ACTIVATION = {
    *("bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"),
}
FEATURE = SHARED | {
    *("modelId", "layer", "index", "creatorId", "createdAt", "maxActApprox", "hasVector"),
    *("vector", "vectorLabel", "vectorDefaultSteerStrength", "hookName", "topkCosSimIndices"),
    *("topkCosSimValues", "sourceSetName"),
}
ACTIVATION = {
    *("id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue"),
    *("values", "creatorId", "createdAt", "dataSource", "dataIndex", "dfaValues"),
    *("dfaTargetIndex", "dfaMaxValue", "lossValues", "logitContributions", "binMin", "binMax"),
    *("binContains", "qualifyingTokenIndex", "zIndices", "zValues"),
}
MADE = {"creatorId", "createdAt", "visibility"}
HEADS = {
    "release": {
        *("name", "description", "descriptionShort", "urls", "creatorNameShort", "creatorName"),
        *("creatorEmail", "isNewUi", "featured", "defaultSourceSetName", "defaultSourceId"),
        "defaultUmapSourceIds",
    },
    "model": {
        *("id", "instruct", "displayNameShort", "displayName", "tlensId", "dimension", "layers"),
        *("neuronsPerLayer", "defaultSourceSetName", "defaultSourceId", "inferenceEnabled"),
        *("owner", "website", "updatedAt"),
    },
    "sourceset": {
        *("modelId", "name", "description", "creatorName", "creatorEmail", "releaseName", "type"),
        *("urls", "hasDashboards", "defaultOfModelId", "defaultRange", "defaultShowBreaks"),
        *("showDfa", "showCorrelated", "showHeadAttribution", "showUmap"),
    },
    "source": {
        *("id", "modelId", "setName", "dataset", "num_prompts", "num_tokens_in_prompt", "notes"),
        *("hasDashboards", "inferenceEnabled", "inferenceHosts", "saelensConfig"),
        *("saelensRelease", "saelensSaeId", "hfRepoId", "hfFolderId", "defaultOfModelId"),
        *("hasUmap", "hasUmapLogSparsity", "hasUmapClusters"),
    },
}
WRITE = ("--write", "saedashboard", "neuronpedia", "delphi", "--sequence-tokens", "32")
NAMES = ("--set-name", "res-70", "--release", "small", "--creator", "a group")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("writers"))


@pytest.fixture(scope="module")
def made(place):
    assert main(command(place, place / "pages", *WRITE, *NAMES)) == 0
    return place / "pages"


@pytest.fixture(scope="module")
def code(place):
    """Return the dense code and the tokens of all rows, as the shards hold them."""
    import h5py

    with h5py.File(place / "shards" / "train_00.h5") as file:
        x, tokens = file["activations"][:], file["token_ids"][:]
    sae = SparseAutoencoder.from_pretrained(place / "<b>sae")
    return sae.encode(torch.from_numpy(x)).dense().detach().numpy(), tokens


def features_of(made):
    folder = made / "saedashboard"
    batches = [json.loads(path.read_text()) for path in sorted(folder.glob("batch-*.json"))]
    assert all(set(batch) == BATCH for batch in batches)
    assert {batch["layer"] for batch in batches} == {3}
    return [feature for batch in batches for feature in batch["features"]]


def test_batches_of_saedashboard_have_its_fields_and_the_numbers_of_the_rows(made, code):
    dense, _ = code
    features = features_of(made)
    fires = (dense > 0).sum(0)
    assert [feature["feature_index"] for feature in features] == np.flatnonzero(fires).tolist()
    for feature in features:
        assert set(feature) == DASHBOARD_FEATURE
        values = dense[:, feature["feature_index"]]
        assert feature["frac_nonzero"] == pytest.approx((values > 0).mean())
        assert sum(feature["freq_hist_data_bar_heights"]) == (values > 0).sum()
        kinds = {}
        for activation in feature["activations"]:
            assert set(activation) == DASHBOARD_ACTIVATION
            peak = activation["values"][activation["qualifying_token_index"]]
            assert len(activation["tokens"]) == len(activation["values"]) <= 8
            if activation["bin_min"] == -1:
                assert activation["bin_contains"] == -1
                assert activation["bin_max"] == pytest.approx(values.max(), abs=1e-5)
            else:
                low, high = activation["bin_min"], activation["bin_max"]
                assert low - 1e-5 <= peak <= high + 1e-5
                kinds[low] = activation["bin_contains"]
        first = feature["activations"][0]
        largest = first["values"][first["qualifying_token_index"]]
        assert largest == pytest.approx(values.max(), abs=1e-5)
        for low, share in kinds.items():
            edges = low / values.max(), low / values.max() + 0.2
            inside = (values / values.max() >= edges[0] - 1e-6) & (
                values / values.max() < edges[1] - 1e-6
            )
            inside |= (edges[1] > 0.999) & (values == values.max())
            assert share == pytest.approx(inside.mean(), abs=1e-5)


def test_a_model_gives_histograms_of_all_logits(place, tmp_path):
    network = make_network("gpt2")
    network.save_pretrained(tmp_path / "model")
    model = ("--model", str(tmp_path / "model"), "--bins", "10")
    assert main(command(place, tmp_path / "pages", *WRITE[:3], *NAMES, *model)) == 0
    sae = SparseAutoencoder.from_pretrained(place / "<b>sae")
    norm = network.transformer.ln_f
    rows = sae.direction(slice(None)).double()
    rows = (rows - rows.mean(1, keepdim=True)) * norm.weight.double()
    logits = (rows @ network.get_output_embeddings().weight.double().T).detach().numpy()
    for feature in features_of(tmp_path / "pages"):
        own = logits[feature["feature_index"]]
        heights = feature["logits_hist_data_bar_heights"]
        values = feature["logits_hist_data_bar_values"]
        assert sum(heights) == len(own)
        assert heights[0] > 0
        assert heights[-1] > 0
        edges = np.linspace(own.min(), own.max(), 11)
        np.testing.assert_allclose(values, (edges[1:] + edges[:-1]) / 2, atol=2e-5)
        # A logit at an edge may lie on either side of it in float32.
        assert np.abs(np.cumsum(heights) - np.searchsorted(np.sort(own), edges[1:])).max() <= 1


def test_latents_that_never_fire_are_listed_as_skipped(made, code):
    found = json.loads((made / "saedashboard" / "skipped_indexes.json").read_text())
    assert found["skipped_indexes"] == np.flatnonzero((code[0] > 0).sum(0) == 0).tolist()
    settings = json.loads((made / "saedashboard" / "run_settings.json").read_text())
    assert settings["contexts"] == 4


def lines_of(path):
    text = gzip.decompress(path.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def test_an_import_of_neuronpedia_has_its_fields_and_the_pages(made):
    folder = made / "neuronpedia" / "model" / "3-res-70"
    heads = {name: json.loads((folder / f"{name}.jsonl").read_text()) for name in HEADS}
    assert {name: set(head) for name, head in heads.items()} == {
        name: fields | MADE for name, fields in HEADS.items()
    }
    assert heads["release"]["name"] == heads["sourceset"]["releaseName"] == "small"
    assert heads["source"]["id"] == "3-res-70"
    assert heads["source"]["setName"] == heads["sourceset"]["name"] == "res-70"
    features, pages = lines_of(folder / "features" / "batch-0.jsonl.gz"), features_of(made)
    for feature, page in zip(features, pages, strict=True):
        assert set(feature) == FEATURE
        assert feature["hookName"] == "blocks.3.hook_resid_post"
        assert feature["modelId"] == "model"
        assert {name: feature[name] for name in SHARED} == {name: page[name] for name in SHARED}
    activations = lines_of(folder / "activations" / "batch-0.jsonl.gz")
    assert len(activations) == sum(len(page["activations"]) for page in pages)
    assert len({activation["id"] for activation in activations}) == len(activations)
    for activation in activations:
        assert set(activation) == ACTIVATION
        assert len(activation["id"]) == 25
        assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"]
        assert activation["maxValue"] == max(activation["values"])


def test_a_cache_of_delphi_holds_every_activation_of_whole_sequences(made, code):
    dense, tokens = code
    folder = made / "delphi" / "latents" / "residual.3"
    sequences = ROWS // 32
    found = np.zeros((sequences * 32, D_SAE), np.float32)
    names = []
    for path in folder.glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        names.append((first, last))
        content = load_file(path)
        assert content["tokens"].tolist() == tokens[: sequences * 32].reshape(-1, 32).tolist()
        assert content["locations"].dtype == np.uint16
        assert content["activations"].dtype == np.float16
        sequence, place, latent = content["locations"].astype(int).T
        assert latent.max() <= last - first
        rows = sequence * 32 + place
        assert (np.diff(rows) >= 0).all()
        found[rows, latent + first] = content["activations"]
    assert sorted(names) == [(14 * number, 14 * number + 13) for number in range(5)]
    np.testing.assert_allclose(found, dense[: sequences * 32], rtol=1e-3, atol=2e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_name"] == "some/model"
    assert config["cache_ctx_len"] == 32
    assert config["n_tokens"] == sequences * 32


def test_files_for_other_programs_are_equal_when_they_are_made_again(place, made, tmp_path):
    assert main(command(place, tmp_path / "pages", *WRITE, *NAMES)) == 0
    for path in made.rglob("*"):
        if path.is_file():
            again = tmp_path / "pages" / path.relative_to(made)
            assert again.read_bytes() == path.read_bytes(), path


def refusal(capsys, arguments):
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_shards_that_do_not_say_their_layer_are_refused_before_the_pass(place, tmp_path, capsys):
    sae = SparseAutoencoder.from_pretrained(place / "<b>sae")
    sae.origin = {"model": "some/model"}
    sae.save(tmp_path / "sae")
    shards = tmp_path / "shards"
    shards.mkdir()
    rows = torch.randn(60, 16)
    write_shard(shards / "train.h5", rows, token_ids=torch.zeros(60), position=torch.arange(60))
    arguments = command(place, tmp_path / "pages", "--write", "delphi", "--shard-dir", str(shards))
    line = refusal(capsys, [str(tmp_path / "sae"), *arguments[1:]])
    assert line.endswith("neither the autoencoder nor the shards say their hook")
    assert not list((tmp_path / "pages" / "codes").glob("codes_*"))


def test_rows_without_tokens_or_texts_are_refused(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = command(place, tmp_path / "pages", "--write", "neuronpedia")
    without = arguments.index("--tokenizer")
    line = refusal(capsys, arguments[:without] + arguments[without + 2 :])
    assert line.endswith("--write needs the texts of tokens: name a tokenizer with --tokenizer")
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "train.h5", torch.randn(60, 16), doc_id=torch.zeros(60))
    other = ("--shard-dir", str(shards), "--out", str(tmp_path / "other"))
    line = refusal(capsys, [*arguments, *other])
    assert line.endswith("--write needs the tokens of the rows: " + f"{shards}: no token_ids")


@pytest.mark.parametrize(
    ("hook", "name", "folder"),
    [
        ("residual.3", "blocks.3.hook_resid_post", "residual.3"),
        ("mlp_out.3", "blocks.3.hook_mlp_out", "mlp_out.3"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.hook_z", "blocks.3.attn.hook_z"),
        ("hidden_states[3] (after a norm)", None, "layer_3"),
    ],
)
def test_hook_points_have_the_names_of_other_programs(hook, name, folder):
    source = page_source(({"model": "a/b", "hook": hook, "layer": "3"},), "set", "all", "", "now")
    assert (source.hook_name, source.folder) == (name, folder)


def test_names_that_are_no_folders_are_refused(place, tmp_path, capsys):
    arguments = command(place, tmp_path / "pages", "--write", "delphi", "--set-name", "../up")
    assert "set_name must be of letters, digits" in refusal(capsys, arguments)
    assert as_name("a/model <b>") == "a-model-b"


def test_other_writers_than_the_known_ones_are_refused(place, tmp_path, capsys):
    line = refusal(capsys, command(place, tmp_path, "--write", "saedash"))
    assert "must be one of 'saedashboard', 'neuronpedia', 'delphi', got 'saedash'" in line
