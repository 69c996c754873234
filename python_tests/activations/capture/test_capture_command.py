"""`python -m sae_fast.capture`: ranks, compression, disk space, two at once, and bad input."""

import os
import shutil
import sys
from collections import namedtuple

import h5py
import pytest
import warm_python
from captured import (
    all_rows,
    arguments,
    assert_same_shards,
    capture,
    make_inputs,
    shards,
    write_texts,
)
from full_disk import files_up_to
from small_models import make_network, save_model

from sae_fast import train
from sae_fast.activations.capture.directory import CaptureDirectory
from sae_fast.activations.writer import BESIDE_BYTES
from sae_fast.capture import main


def error_of(capsys):
    """Return the single line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def as_rank(monkeypatch, rank, world_size):
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        monkeypatch.setenv(name, str(value))


def test_ranks_together_write_the_rows_of_one_to_the_bit(inputs, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        assert not (out / "residual.0" / "manifest.json").exists()
        assert capture(inputs, out) == 0
    assert (out / "residual.0" / "manifest.json").exists()
    for hook in ("residual.0", "residual.2"):
        names = {path.name for path in (out / hook).glob("*.h5")}
        assert {"shard_00_00000.h5", "shard_01_00000.h5", "heldout_00.h5"} <= names
        for pattern in ("shard_*.h5", "heldout*.h5"):
            together, alone = all_rows(out / hook, pattern), all_rows(whole / hook, pattern)
            assert sorted(together) == sorted(alone)
            assert all((together[key] == row).all() for key, row in alone.items())


@pytest.mark.slow
def test_torchrun_starts_the_ranks(inputs, whole, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", *launcher, "-m", "sae_fast.capture", *arguments(inputs, tmp_path / "out")]
    done = warm_python.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    together, alone = all_rows(tmp_path / "out/residual.2"), all_rows(whole / "residual.2")
    assert sorted(together) == sorted(alone)
    assert (tmp_path / "out/residual.2/manifest.json").exists()


@pytest.mark.parametrize("compression", ["zstd", "blosc2", "gzip"])
def test_compressed_shards_hold_the_same(inputs, whole, tmp_path, compression):
    if compression != "gzip":
        pytest.importorskip("hdf5plugin")
    assert capture(inputs, tmp_path / "out", "--compression", compression) == 0
    assert_same_shards(tmp_path / "out", whole)
    with h5py.File(tmp_path / "out/residual.0/shard_00000.h5") as file:
        assert file["activations"].id.get_create_plist().get_nfilters()


def test_a_captured_folder_is_trained_on_with_its_part_held_out(whole, tmp_path, capsys):
    settings = ["--k", "2", "--d-sae", "32", "--batch-size", "64", "--max-steps", "3"]
    folder = ["--shard-dir", str(whole / "residual.0"), "--checkpoint-dir", str(tmp_path / "run")]
    assert train.main([*folder, *settings]) == 0
    assert "heldout_fvu" in capsys.readouterr().out


@pytest.mark.slow
def test_the_directory_of_several_hook_points_is_trained_on_hook_point_by_hook_point(
    whole, tmp_path, capsys
):
    settings = ["--k", "2", "--d-sae", "32", "--batch-size", "64", "--max-steps", "3"]
    flags = ["--shard-dir", str(whole), "--checkpoint-dir", str(tmp_path / "run"), *settings]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    for name in ("residual.0", "residual.2"):
        assert f"{name}: trained 3 steps" in out


def test_the_space_needed_is_said_first_and_refused_where_there_is_less(
    inputs, tmp_path, monkeypatch, capsys
):
    assert capture(inputs, tmp_path / "out") == 0
    # Two hook points of 16 numbers of 2 bytes, and 12 bytes of columns, for 1,600 rows.
    needed = 1600 * 2 * (16 * 2 + 12) * 1.01 + 2 * BESIDE_BYTES
    assert f"1,600 tokens need {needed / 1e9:.2f} GB of " in capsys.readouterr().out
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**6, 0, int(needed) - 1))
    assert capture(inputs, tmp_path / "full") == 2
    assert "GB free, this capture needs 0.02 GB: fewer --max-tokens" in error_of(capsys)
    assert not shards(tmp_path / "full")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000_000, BESIDE_BYTES + 12_000])  # the first file; a later one
def test_a_disk_that_fills_up_is_one_line_and_the_capture_goes_on_later(
    inputs, whole, tmp_path, capsys, limit
):
    with files_up_to(limit):
        assert capture(inputs, tmp_path / "out") == 2
    said = error_of(capsys)
    assert said.startswith(f"error: {tmp_path / 'out'}: cannot be written: File too large; whole")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert capture(inputs, tmp_path / "out") == 0
    assert_same_shards(tmp_path / "out", whole)


def test_two_captures_into_one_directory_are_refused(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    with CaptureDirectory(out, ("residual.0",)):
        assert capture(inputs, out) == 2
        expected = f"another capture is writing to {out} (process {os.getpid()} on "
        assert expected in error_of(capsys)
    assert capture(inputs, out) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layers", "1"), "its hook points are residual.0, residual.2, asked for are residual.1"),
        (("--ctx-len", "16"), "its ctx_len is 32, asked for is 16"),
        (("--shuffle-seed", "1"), "its shuffle_seed is 42, asked for is 1"),
        (("--max-tokens", "1600"), "its max_tokens is 1500, asked for is 1600"),
    ],
)
def test_another_capture_in_the_directory_is_told_from_this_one(
    inputs, whole, capsys, more, message
):
    assert capture(inputs, whole, *more) == 2
    assert error_of(capsys).endswith(f"holds another capture: {message}")


def test_another_model_or_text_is_told_too(inputs, whole, tmp_path, capsys):
    other = str(save_model(tmp_path / "other", "llama", seed=7))
    assert capture([other, inputs[1]], whole) == 2
    message = f"its model is {inputs[0]}, asked for is {other} (another weights)"
    assert message in error_of(capsys)
    texts = str(write_texts(tmp_path / "other.jsonl", ["the cat"] * 150))
    assert capture([inputs[0], texts], whole) == 2
    assert f"its dataset is {inputs[1]}, asked for is {texts}" in error_of(capsys)


def test_a_directory_with_something_else_in_it_is_left_alone(inputs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert capture(inputs, tmp_path) == 2
    assert "is not empty and holds no capture, name another" in error_of(capsys)
    assert capture(inputs, tmp_path / "notes.txt") == 2
    assert "notes.txt is a file" in error_of(capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layers", "7"), "layers: LlamaForCausalLM has blocks 0 to 2, got 7"),
        (("--hook-points", "mlp_ou.*"), "no 'mlp_ou.*' (did you mean mlp_out."),
        (("--ctx-len", "64"), "ctx_len must be at most 32, the context of "),
        (("--text-column", "txt"), "has no column 'txt' (did you mean text?); it has text"),
        (("--heldout-tokens", "100000"), "heldout_tokens must leave documents to train on, got 10"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--layers", "-1"), "layers are counted from 0, got -1"),
        (("--max-tokns", "5"), "unknown flag --max-tokns (did you mean --max-tokens?)"),
        (("--ctx-len", "long"), "--ctx-len must be a whole number, got 'long'"),
        (("--dtype", "float61"), "got 'float61' (did you mean 'float16'?)"),
        (("--device", "gpu"), "device: torch has no device 'gpu'"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, capsys, more, message):
    assert capture(inputs, tmp_path / "out", *more) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "MODEL, DATASET and --out must be given: "),
        (["MODEL", "TEXTS"], "MODEL, DATASET and --out must be given: "),
        (["MODEL", "TEXTS", "--out", "x"], "no hook: give layers, layer_stride or hook_points"),
        (["MODEL", "no.jsonl", "--out", "x", "--layers", "0"], "dataset: no.jsonl cannot be read"),
        (["MODEL_", "TEXTS", "--out", "x", "--layers", "0"], "(did you mean "),
    ],
)
def test_what_is_missing_is_said(inputs, tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": inputs[0], "TEXTS": inputs[1], "MODEL_": inputs[0][:-1]}
    assert main([places.get(word, word) for word in given]) == 2
    assert message in error_of(capsys)


def test_documents_without_text_are_skipped_and_counted(inputs, tmp_path, capsys):
    assert capture(inputs, tmp_path / "out", "--max-tokens", "None") == 0
    assert "21 documents without text skipped" in capsys.readouterr().out
    texts = str(write_texts(tmp_path / "empty.jsonl", [" ", ""]))
    assert main([inputs[0], texts, "--layers", "0", "--out", str(tmp_path / "none")]) == 2
    assert "has no tokens to capture" in error_of(capsys)


def test_a_text_longer_than_the_context_is_cut_and_its_positions_go_on(inputs, tmp_path):
    texts = str(write_texts(tmp_path / "long.jsonl", ["the cat sat " * 40]))
    more = ["--layers", "0", "--no-pack", "--exclude-special-tokens"]
    assert main([inputs[0], texts, *more, "--out", str(tmp_path / "out")]) == 0
    rows = all_rows(tmp_path / "out/residual.0")
    assert sorted(rows) == [(0, place + 1, 7 + place % 3) for place in range(120)]


def test_patterns_of_modules_make_a_folder_each(tmp_path):
    inputs = make_inputs(tmp_path, "gpt2")
    hooks = ["--hook-points", "attn_out.*", "transformer.h.*.mlp.c_fc", "--layer-stride", "2"]
    assert main([*inputs, *hooks, "--out", str(tmp_path / "out")]) == 0
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {
        *("attn_out.0", "attn_out.2"),
        *("transformer.h.0.mlp.c_fc", "transformer.h.2.mlp.c_fc"),
    }
    with h5py.File(tmp_path / "out/transformer.h.2.mlp.c_fc/shard_00000.h5") as file:
        assert file["activations"].shape[1] == 4 * make_network("gpt2").config.n_embd
        assert file.attrs["layer"] == 2


def test_without_transformers_the_remedy_is_named(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert capture(inputs, tmp_path / "out") == 2
    assert "install it (pip install 'sae_fast[capture]')" in error_of(capsys)
