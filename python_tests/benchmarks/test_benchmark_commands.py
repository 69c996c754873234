"""Every benchmark runs end to end at a tiny size and writes its results."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from small_models import save_model

from benchmarks.dense_switch import crossing
from benchmarks.time_to_fvu import next_rate
from benchmarks.wall_clock import Curve
from sae_fast.activations import write_shard

ROOT = Path(__file__).resolve().parents[2]
SIZE = "64x32x128x4"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a benchmark in this process, which has imported torch; return its numbers and table.

    The processes that it starts are forked from a warm one.
    """

    def command(module, *arguments):
        json_path, table_path = tmp_path / "result.json", tmp_path / "result.md"
        files = ["--json", str(json_path), "--markdown", str(table_path), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, *files])
        code = None
        try:
            importlib.import_module(f"benchmarks.{module}").main()
        except SystemExit as end:
            code = end.code
        assert not code, code
        table = table_path.read_text()
        assert str(tmp_path) not in table + json_path.read_text()
        assert table.strip() in capsys.readouterr().out
        return json.loads(json_path.read_text()), table

    monkeypatch.setattr(subprocess, "Popen", warm_python.popen)
    threads = torch.get_num_threads()
    yield command
    torch.set_num_threads(threads)


def rows_of(table):
    return [line for line in table.splitlines() if line.startswith("| ")]


@pytest.mark.slow
def test_train_step_writes_times_ratios_memory_and_floors(run, tmp_path):
    quick = ["--warmup", "1", "--rounds"]
    peers = ["--peers", "eager,gather,tuned_bf16", "--memory-steps", "0"]
    result, table = run("train_step", "--sizes", SIZE, *peers, *quick, "3")
    found = result["sizes"][SIZE]["contestants"]
    assert list(found) == ["sae_fast", "sae_fast_bf16", "eager", "gather", "tuned_bf16"]
    for data in found.values():
        assert data["minimum"] <= data["median"] <= data["maximum"]
        assert data["ratios"].keys() == {"sae_fast", "sae_fast_bf16"}
    assert found["sae_fast"]["ratios"]["sae_fast"] == 1.0
    assert found["sae_fast"]["share_of_floor"] > 0
    assert len(rows_of(table)) == 2 + 1 + 5
    # A second run with another size: both sizes are in the files, with memory if it was measured.
    alone = ["--sizes", "32x16x64x2", "--peers", "", "--ours", "sae_fast", "--merge"]
    merged, _ = run("train_step", *alone, "--dead", "all", *quick, "1")
    assert list(merged["sizes"]) == [SIZE, "32x16x64x2"]
    found = merged["sizes"]["32x16x64x2"]["contestants"]
    assert list(found) == ["sae_fast", "sae_fast_dead"]
    assert all(data["peak_bytes_above_start"] >= 0 for data in found.values())
    assert found["sae_fast_dead"]["loss_at_step_0"] == found["sae_fast"]["loss_at_step_0"]


@pytest.mark.slow
def test_wall_clock_trains_all_from_one_start_and_draws_them(run, tmp_path):
    rows = torch.randn(700, 32, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "train_00.h5", rows[:500])
    write_shard(tmp_path / "heldout_00.h5", rows[500:])
    small = ["--steps", "6", "--batch-size", "64", "--d-sae", "64", "--k", "4"]
    plot = tmp_path / "plot.png"
    data = ["--shard-dir", str(tmp_path), "--name", "noise", "--peers", "eager,openai"]
    result, table = run("wall_clock", *data, *small, "--plot", str(plot))
    ours, eager = result["curves"]
    assert ours["steps"] == eager["steps"] == [0, 4, 6]
    assert ours["fvu"] == pytest.approx(eager["fvu"], rel=1e-4)
    assert ours["fvu"][-1] < ours["fvu"][0]
    assert ours["seconds"][0] == 0 < ours["seconds"][1] < ours["seconds"][2]
    assert "Not installed here: openai." in table
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_time_to_fvu_takes_the_best_rate_of_each_and_draws_seconds_and_tokens(run, tmp_path):
    rows = torch.randn(700, 32, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "train_00.h5", rows[:500])
    write_shard(tmp_path / "heldout_00.h5", rows[500:])
    small = ["--steps", "4", "--batch-size", "64", "--d-sae", "64", "--k", "4"]
    plot = tmp_path / "plot.png"
    data = ["--shard-dir", str(tmp_path), "--name", "noise", "--rates", "1e-5,1e-2"]
    data += ["--clock", "cpu"]
    result, table = run("time_to_fvu", *data, *small, "--peers", "", "--plot", str(plot))
    (ours,) = result["best"]
    assert ours["rate"] == 1e-2
    assert not ours["is_at_end"]  # the rate beyond it was tried
    rates, ends = zip(*ours["ends"], strict=True)
    assert rates == (1e-5, 1e-2, pytest.approx(10.0))
    (first,) = ours["curves"].values()
    assert ends[1] == first["fvu"][-1] == min(ends)
    assert "Seconds are CPU time" in table
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Another seed is another start and order, and adds its run at the best rate to the file.
    more, table = run("time_to_fvu", *data, *small, "--peers", "", "--append", "--seeds", "0", "1")
    (ours,) = more["best"]
    assert ours["curves"]["0"] == first
    assert ours["curves"]["1"]["fvu"][0] != pytest.approx(first["fvu"][0], rel=1e-6)
    low, high = sorted(curve["fvu"][-1] for curve in ours["curves"].values())
    assert f"| 2 | {(low + high) / 2:.4f} ({low:.4f} to {high:.4f}) |" in table
    assert len(more["commands"]) == 2
    other = [*data, "--steps", "5", *small[2:], "--peers", "", "--append"]
    with pytest.raises(AssertionError, match="4 steps of 64 rows"):
        run("time_to_fvu", *other)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([0.5, 0.4, 0.3], 4.0),
        ([0.3, 0.4, 0.5], 0.25),
        ([0.4, 0.3, 0.5], None),
        ([math.nan, 0.4, 0.3], 4.0),
        ([0.3], None),
        ([9, 8, 7, 6, 5, 4, 3, 2], None),
    ],
)
def test_a_grid_grows_until_its_best_rate_is_inside(ends, expected):
    curves = {
        0.5 * 2.0**n: Curve("sae_fast", [0], [0.0], [end], 1.0, {}) for n, end in enumerate(ends)
    }
    assert next_rate(curves) == expected


@pytest.mark.slow
def test_architectures_compares_all_of_them_on_rows_and_on_a_planted_dictionary(run, tmp_path):
    rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "train_00.h5", rows[:300])
    write_shard(tmp_path / "heldout_00.h5", rows[300:])
    quick = ["--steps", "2", "--seeds", "0", "--batch-size", "64", "--rounds", "1"]
    data = ["--shard-dir", str(tmp_path), "--planted", "--planted-rows", "256"]
    plot = tmp_path / "plot.png"
    result, _ = run("architectures", *data, *quick, "--plot", str(plot))
    archs = {"topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated"}
    for kind, settings in (("activations", 3), ("planted", 1)):
        assert {run["arch"] for run in result[kind]} == archs
        assert len(result[kind]) == settings * len(archs)
    assert all(run["fvu"] > 0 for run in result["activations"])
    assert all(0 < run["mcc"] <= 1 for run in result["planted"])
    # The benchmark fails if the first loss of a step differs from the dense step's.
    assert {time["arch"] for time in result["times"]} == archs
    assert plot.stat().st_size > 10_000


@pytest.mark.slow
def test_latents_compares_the_pages_with_encoding_the_tokens(run):
    result, table = run("latents", "--sizes", "600x32x128x4", "--rounds", "2")
    found = result["sizes"]["600, 32, 128, 4"]
    seconds = found["seconds"]
    assert found["ratios"] == [seconds["pages"][n] / seconds["encode"][n] for n in range(2)]
    assert len(rows_of(table)) == 2


@pytest.mark.slow
def test_kernels_writes_a_row_for_every_op_and_the_reader(run, tmp_path):
    result, table = run("kernels", "--sizes", SIZE, "--rounds", "2")
    names = " ".join(row["op"] for row in result["sizes"][SIZE]["ops"])
    for op in (
        *("encode_topk", "encode_threshold", "decode", "decode_backward", "reconstruct"),
        *("accumulate_rows", "latent_major", "row_gradient_norm + fused_update_ (W_dec)"),
        *("(W_dec, bf16 states)", "(W_dec, 8bit states)", "(W_dec, sgd)", "(W_dec, signum)"),
        "(W_dec, schedule_free_signum)",
        *("normalize_rows_", "decorrelation", "code_correlation", "gather_rows_"),
        *("dense_product float32 (encoder)", "dense_product bf16 (gradient of W_dec)"),
    ):
        assert op in names
    assert result["reader"]["rows_per_second_reader"] > 0
    assert "reader rows/s" in table


def test_default_rates_trains_every_length_with_every_factor(run, tmp_path):
    rows = torch.randn(700, 32, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "train_00.h5", rows[:500])
    write_shard(tmp_path / "heldout_00.h5", rows[500:])
    small = ["--batch-sizes", "64", "0", "--d-sae", "64", "--k", "4", "--seeds", "0", "1"]
    lengths = ["--epochs", "1", "3", "--factors", "1", "0.5"]
    result, table = run("default_rates", "--shard-dir", str(tmp_path), *small, *lengths)
    (part,) = result["parts"]
    assert [run["steps"] for run in part["runs"]] == [7] * 4 + [1] * 4 + [23] * 4 + [5] * 4
    assert all(run["heldout_fvu"] > 0 for run in part["runs"])
    assert len(rows_of(table)) == 1 + 2 * 2 * 2
    limited = ["--arch", "gated", "--target-l0", "4", "--tokens", "256", "--factors", "1", "2"]
    small = ["--d-sae", "64", "--seeds", "0"]
    result, table = run("default_rates", "--shard-dir", str(tmp_path), *small, *limited, "--append")
    assert result["parts"][0] == part
    assert len(rows_of(table)) == 1 + 2 * 2 * 2 + 1 + 2
    once, twice = result["parts"][1]["runs"]
    assert (once["tokens"], once["steps"], once["batch_size"]) == (256, 1, 256)
    assert twice["rate"] == 2 * once["rate"]


@pytest.mark.slow
def test_dense_switch_times_both_ways_of_every_architecture(run, tmp_path):
    result, table = run("dense_switch", "--sizes", SIZE, "--rounds", "3")
    (found,) = result["sizes"].values()
    assert list(found) == ["relu", "jumprelu", "gated"]
    for data in found.values():
        assert [row["share"] for row in data["rows"]] == sorted(
            row["share"] for row in data["rows"]
        )
        assert all(row["sparse"] > 0 and row["dense"] > 0 for row in data["rows"])
    assert len(rows_of(table)) == 1 + 3 * (7 + 1)


def test_encode_calls_times_every_way_for_every_number_of_tokens(run):
    result, table = run("encode_calls", "--sizes", SIZE, "--tokens", "1,8", "--rounds", "2")
    (found,) = result["sizes"].values()
    assert list(found) == ["1 token", "8 tokens", "W_enc"]
    assert list(found["1 token"]) == ["as it is", "kept_copies", "bfloat16"]
    assert all(row["seconds"] > 0 for rows in found.values() for row in rows.values())
    assert len(rows_of(table)) == 1 + 3 + 3 + 2


@pytest.mark.slow
def test_ranks_times_every_mesh(run):
    result, table = run("ranks", "--sizes", SIZE, "--mesh", "data=1", "--steps", "2")
    (found,) = result["sizes"].values()
    assert list(found) == ["data=1"]
    assert found["data=1"]["seconds"] > 0 == found["data=1"]["bytes"]
    assert len(rows_of(table)) == 1 + 1


def test_attached_times_every_mode(run):
    result, table = run("attached", "--sizes", SIZE, "--shapes", "2x4,1x1", "--rounds", "2")
    (found,) = result["sizes"].values()
    assert list(found) == ["2x4", "1x1"]
    assert all(len(rows) == 6 for rows in found.values())
    assert all(row["seconds"] > 0 for rows in found.values() for row in rows.values())
    assert len(rows_of(table)) == 1 + 2 * 6


@pytest.mark.slow
def test_dense_step_times_every_implementation_from_one_loss(run, tmp_path):
    result, table = run("dense_step", "--sizes", SIZE, "--rounds", "3")
    (rows,) = result["sizes"].values()
    assert [row["name"] for row in rows] == ["sae_fast", "sae_fast_bf16", "eager", "eager_bf16"]
    assert all(row["seconds"] > 0 and row["over_sae_fast"] > 0 for row in rows)
    assert len(rows_of(table)) == 1 + len(rows)


@pytest.mark.slow
def test_compression_measures_sizes_and_speeds_of_every_kind(run, tmp_path):
    rows = torch.tensor([1, 2], dtype=torch.float16).repeat(2048)  # no row is that before it
    write_shard(tmp_path / "train_00.h5", rows[:, None].repeat(1, 64))
    result, table = run("compression", "--shard-dir", str(tmp_path), "--rounds", "2")
    for found in result["dtypes"].values():
        assert list(found) == ["none", "gzip", "zstd", "blosc2"]
        assert (
            found["none"].pop("size") > 1 > 0.2 > max(one.pop("size", 0) for one in found.values())
        )
        assert all(one["read_bytes_per_second"] > 0 for one in found.values())
    assert len(rows_of(table)) == 2 * (1 + 4)


@pytest.mark.slow
def test_stream_measures_reading_and_shuffling(run, tmp_path):
    sizes = ["--rows", "16384", "--made-rows", "65536", "--pool-rows", "4096", "--rounds", "2"]
    result, table = run("stream", *sizes, "--compressions", "none", "gzip")
    assert list(result["reading"]) == [
        *("none, disk", "none, page cache", "gzip, disk", "gzip, page cache"),
    ]
    assert all(0 < found["share_of_plain"] < 10 for found in result["reading"].values())
    (pools,) = result["shuffling"].values()
    assert [found["pool_rows"] for found in pools] == [1024, 4096, 16384, 65536]
    assert pools[0]["document_ratio"] > 3 * pools[2]["document_ratio"] > 3
    assert 0.9 < pools[-1]["document_ratio"] < 1.1
    assert len(rows_of(table)) == (1 + 4) + (1 + 4)


@pytest.mark.slow
def test_slots_step_times_the_literal_form_too(run, tmp_path):
    result, table = run("slots_step", "--slots", "50", "--rounds", "2")
    for found in result["sizes"].values():
        implementations = found["contestants"]
        assert list(implementations) == ["sae_fast", "PyTorch, N x N", "PyTorch, F x F"]
        assert all(
            one["seconds"] > 0 and one["peak_bytes"] >= 0 for one in implementations.values()
        )
        losses = [one["first_loss"] for one in implementations.values()]
        assert losses == pytest.approx([losses[0]] * 3, rel=2e-3)
    assert len(rows_of(table)) == 1 + 3


@pytest.mark.slow
def test_presets_tells_memory_and_time_of_each(run, tmp_path):
    names = ["modular_addition", "minilm"]
    result, table = run("presets", "--presets", ",".join(names), "--steps", "1")
    assert list(result["presets"]) == names
    for found in result["presets"].values():
        assert found["tokens_per_second"] > 0
        assert 0 < found["peak_bytes"] < 2 * found["planned_bytes"]
        assert len(found["losses"]) == 2
        assert found["others"] >= 0
    assert len(rows_of(table)) == 1 + 2
    earlier = shutil.copy(tmp_path / "result.json", tmp_path / "earlier.json")
    again, table = run("presets", "--presets", "minilm", "--steps", "2", "--keep", str(earlier))
    assert list(again["presets"]) == names
    assert again["presets"]["modular_addition"]["command"] == result["command"]
    assert len(again["presets"]["minilm"]["losses"]) == 3
    assert len(rows_of(table)) == 1 + 2
    assert "\n\nmodular_addition: " in table


@pytest.mark.slow
def test_presets_refuses_a_name_that_is_none(tmp_path):
    done = warm_python.run(["-m", "benchmarks.presets", "--presets", "gpt5"], cwd=ROOT)
    assert done.returncode == 2
    assert "'gpt5' is none of minilm, gpt2" in done.stderr


@pytest.mark.parametrize(
    ("ratios", "share"), [((0.5, 2.0), 0.2), ((0.5, 0.9), None), ((2.0, 4.0), None)]
)
def test_crossing_is_where_both_ways_take_equally_long(ratios, share):
    rows = [
        {"share": at, "sparse_over_dense": ratio}
        for at, ratio in zip((0.1, 0.4), ratios, strict=True)
    ]
    assert crossing(rows) == (None if share is None else pytest.approx(share))


@pytest.mark.slow
def test_quality_compares_both_trainers_on_heldout_rows(run, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    rows = torch.randn(768, 16, generator=torch.Generator().manual_seed(0))
    write_shard(shards / "train.h5", rows[:512])
    write_shard(shards / "heldout.h5", rows[512:])
    arguments = ["--shard-dir", str(shards), "--seeds", "0,1", "--epochs", "2", "--k", "4"]
    result, table = run("quality", *arguments, "--batch-size", "128")
    runs = result["runs"]
    assert [run["trainer"] for run in runs] == ["PyTorch reference", "sae_fast"] * 2
    for reference, ours in zip(runs[::2], runs[1::2], strict=True):
        assert ours["fvu"] == pytest.approx(reference["fvu"], rel=1e-2)
    assert len(rows_of(table)) == 1 + 2 * 3


@pytest.mark.slow
def test_biographies_writes_accuracies_by_mode_and_swaps_by_layer(run, tmp_path):
    data = ["--entities", "12", "--answers", "4", "2", "--language-model-steps", "40"]
    slots = ["--free-slots", "26", "--reconstruction-epochs", "1", "--epochs", "2"]
    sizes = ["--blocks", "2", "--d-model", "32", "--batch-size", "60", "--strengths", "1", "3"]
    result, table = run("biographies", *data, *slots, *sizes)
    first, second = result["data"]["4"], result["data"]["2"]
    assert list(first["layers"]) == ["0", "1"]
    assert len(second["layers"]) == 1
    trained = [found["slots"] for found in (*first["layers"].values(), *second["layers"].values())]
    assert sorted(map(len, trained)) == [1, 3, 3]
    for modes in trained:
        assert "value_accuracy" in modes["joint"]
        assert "value_accuracy" not in modes.get("separate_activation", {})
    for found in first["layers"].values():
        assert found["spread"] > 0
        assert [row["strength"] for row in found["swaps"]["strengths"]] == [1.0, 3.0]
    assert len(rows_of(table)) == 1 + 7 + 1 + 3


@pytest.mark.slow
def test_slots_weights_swaps_by_row_with_the_weights_that_it_had(run):
    data = ["--entities", "12", "--answers", "4", "--language-model-steps", "40", "--layer", "0"]
    slots = ["--free-slots", "26", "--reconstruction-epochs", "1", "--epochs", "2"]
    sizes = ["--blocks", "2", "--d-model", "16", "--batch-size", "60", "--strengths", "1", "3"]
    result, table = run("slots_weights", *data, *slots, *sizes, "--l1-shares", "0.5")
    rows = result["rows"]
    assert list(rows)[-3:] == ["L1 0.5", "target 0.25", "default"]
    assert rows["L1 0.5"]["l1_share"] == pytest.approx(0.5)
    written = rows["as written"]
    assert written["l1_share"] == pytest.approx(1e-3 * 16 / 26 / 4)
    assert (written["alignment_share"], written["target_share"]) == (1.0, 0.25)
    assert [row["strength"] for row in written["swaps"]["strengths"]] == [1.0, 3.0]
    assert len(rows_of(table)) == 1 + len(rows)


@pytest.mark.slow
def test_from_model_compares_both_ways_layer_by_layer_and_seed_by_seed(run, tmp_path):
    model = save_model(tmp_path / "model", "gpt2")
    sizes = ["--ctx-len", "32", "--batch-size", "4", "--tokens", "6400", "--pool-rows", "1024"]
    training = ["--layers", "0", "2", "--seeds", "0", "1", "--k", "4", "--heldout-tokens", "512"]
    result, table = run("from_model", "--model", str(model), *sizes, *training)
    one, other = (result[way]["fvu"] for way in ("from shards", "straight from the model"))
    names = [f"residual.{layer}/seed_{seed}" for layer in (0, 2) for seed in (0, 1)]
    assert list(one) == list(other) == names
    # As many steps on as many rows of the same documents, in another order. The mean predictor
    # has 1.
    for name in names:
        assert 0 < one[name] < 0.5
        assert other[name] == pytest.approx(one[name], rel=0.2)
        assert other[name] != one[name]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows_of(table)[1:]]
    assert [row[0] for row in rows] == [*names, "residual.0, mean", "residual.2, mean"]
    for number, row in enumerate(rows):
        parts = [names[number]] if number < 4 else names[2 * number - 8 :][:2]
        ways = [sum(found[name] for name in parts) / len(parts) for found in (one, other)]
        assert row[1:] == [*(f"{fvu:.4f}" for fvu in ways), f"{ways[1] / ways[0] - 1:+.2%}"]
