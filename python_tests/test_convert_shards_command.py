"""`python -m sae_fast.convert_shards`: its output, its refusals, and training on its shards."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from sae_fast.activations import write_shard
from sae_fast.convert_shards import main
from sae_fast.train import main as train


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, command=main) -> str:
    """Return the single line of a refusal, with exit code 2."""
    capsys.readouterr()
    assert command([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "acts"
    folder.mkdir()
    for number in range(3):
        content = {"activations": rows(20, 6, 8, seed=number), "input_ids": torch.ones(20, 6).int()}
        torch.save(content, folder / f"shard_{number}.pt")
    return folder


# ---- output and effects -----------------------------------------------------------------------


def test_it_says_what_there_is_what_it_takes_and_what_came_of_it(source, tmp_path, capsys):
    out = tmp_path / "shards"
    options = ["--dtype", "float16", "--heldout-rows", "40", "--shard-rows", "200"]
    assert main([str(source), str(out), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"3 files, 'activations': 360 rows of 8 in 60 sequences, stored as float16 in {out}"
    )
    assert lines[1] == "  with doc_id, position, token_ids"
    assert lines[2].startswith("up to 0.000 GB to write, ")
    assert lines[3].startswith("318 rows and 42 held out in 3 shards, 0.000 GB: ")
    assert lines[4].startswith("  every row read again and equal; rounding moved rows by 2.")
    assert lines[5] == f"train on it: python -m sae_fast.train --shard-dir {out} --k 32"
    assert len(lines) == 6


@pytest.mark.slow
def test_a_run_on_files_of_tensors_equals_that_on_their_shards(source, tmp_path):
    assert main([str(source), f"{source}_shards", "--shard-rows", "120"]) == 0
    losses = []
    for place in (str(source), f"{source}_shards"):
        run = tmp_path / f"run{len(losses)}"
        arguments = ["--shard-dir", place, "--k", "2", "--d-sae", "16", "--max-steps", "3"]
        arguments += ["--batch-size", "64", "--temporal-smoothness-coeff", "0.1", "--log-every"]
        threads = torch.get_num_threads()
        try:
            assert train([*arguments, "1", "--checkpoint-dir", str(run), "--num-threads", "1"]) == 0
        finally:
            torch.set_num_threads(threads)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_padding_is_left_to_the_conversion(source, capsys):
    content = {"activations": rows(20, 6, 8), "attention_mask": torch.ones(20, 6).bool()}
    torch.save(content, source / "shard_0.pt")
    line = refusal(capsys, "--shard-dir", source, "--k", "2", command=train)
    named = f"python -m sae_fast.convert_shards {source} {source}_shards"
    assert line.startswith(f"error: {source}/shard_0.pt: holds a mask, 'attention_mask'; ")
    assert line.endswith(named)


@pytest.mark.parametrize("name", ["a.npz", "a.arrow", "a.PARQUET"])
def test_train_names_the_command_for_every_format_and_for_a_single_file(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"")
    for place in (tmp_path, tmp_path / name):
        line = refusal(capsys, "--shard-dir", place, "--k", "2", command=train)
        assert f"python -m sae_fast.convert_shards {place} " in line


def test_train_does_not_name_it_where_there_are_shards_or_nothing_to_convert(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    line = refusal(capsys, "--shard-dir", tmp_path, "--k", "2", command=train)
    assert "no shards to train on (*.h5, *.hdf5, " in line
    (tmp_path / "acts.pt").write_bytes(b"")
    write_shard(tmp_path / "heldout_00.h5", rows(4, 2))
    assert train(["--shard-dir", str(tmp_path), "--k", "2"]) == 2
    told, line = capsys.readouterr().err.splitlines()
    assert "acts.pt not read, because it holds HDF5 shards" in told
    assert "*.pth, *.npy, *.safetensors) besides 1 held-out ones" in line


def test_a_pattern_chooses_files(source, tmp_path):
    np.save(source / "token_ids.npy", np.arange(4))
    assert main([str(source / "*_[12].pt"), str(tmp_path / "out")]) == 0
    with h5py.File(tmp_path / "out" / "train_00000.h5") as file:
        assert len(file["activations"]) == 240


def test_all_keys_of_tensors_go_into_folders(tmp_path):
    content = {"mlp.0.out": rows(5, 4), "mlp.1.out": rows(5, 4, seed=1)}
    safetensors.torch.save_file(content, tmp_path / "a.safetensors")
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--all-keys"]) == 0
    for name, expected in content.items():
        with h5py.File(tmp_path / "out" / name / "train_00000.h5") as file:
            assert np.array_equal(file["activations"][:], expected.numpy())


def test_help_tells_of_source_and_target(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("SRC DST", "--heldout-rows", "--compression", ".safetensors", "--skip-nonfinite"):
        assert word in text


def test_an_interrupt_says_how_to_go_on(source, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_fast.activations.imports.convert", interrupted)
    assert main([str(source), str(tmp_path / "out")]) == 130
    assert "the same command continues with the next shard" in capsys.readouterr().err


# ---- bad input -----------------------------------------------------------------------------------


def test_missing_and_wrong_arguments_are_one_line(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert "source and out must be given: python -m sae_fast.convert_shards SRC DST" in refusal(
        capsys, source
    )
    assert "shard_rows must be at least 1, got 0" in refusal(
        capsys, source, out, "--shard-rows", "0"
    )
    assert "heldout_rows must be at least 0" in refusal(capsys, source, out, "--heldout-rows=-1")
    assert "d_in must be at least 1" in refusal(capsys, source, out, "--d-in", "0")
    assert "give --key or --all-keys" in refusal(capsys, source, out, "--key", "x", "--all-keys")
    assert "int8" in refusal(capsys, source, out, "--dtype", "int8")
    line = refusal(capsys, source, out, "--heldout-rows", "360")
    assert "heldout_rows 360 leaves nothing to train on: there are 360 rows" in line
    assert not out.exists()


def test_without_hdf5plugin_the_extra_is_named_before_the_work(
    source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "hdf5plugin", None)
    line = refusal(capsys, source, tmp_path / "out", "--compression", "zstd")
    assert line.endswith("needs hdf5plugin: pip install 'sae_fast[compression]'")


def test_no_file_to_convert_is_one_line(tmp_path, capsys):
    folder, out = tmp_path / "folder", tmp_path / "out"
    assert f"{folder}: no such file or directory, and no file matches it" in refusal(
        capsys, folder, out
    )
    folder.mkdir()
    line = refusal(capsys, folder, out)
    assert ".safetensors, .arrow, .parquet, .zarr file there, the directory is empty" in line
    (folder / "acts.csv").write_text("1,2")
    assert "no .pt, .pth" in refusal(capsys, folder, out)
    assert "acts.csv: is no .pt, .pth" in refusal(capsys, folder / "acts.csv", out)
    (folder / "layer_3").mkdir()
    torch.save(rows(2, 2), folder / "layer_3" / "a.pt")
    assert f"but in {folder / 'layer_3'}" in refusal(capsys, folder, out)
    write_shard(folder / "a.h5", rows(2, 2))
    line = refusal(capsys, folder, out)
    assert f"HDF5 files are shards already: python -m sae_fast.train --shard-dir {folder}" in line


def test_several_formats_in_a_folder_are_refused(source, tmp_path, capsys):
    np.save(source / "a.npy", np.ones((2, 2)))
    line = refusal(capsys, source, tmp_path / "out")
    assert f"{source}: holds 1 .npy and 3 .pt files; convert one kind at a time" in line


@pytest.mark.parametrize(
    "name", ["a.pt", "a.npy", "a.npz", "a.safetensors", "a.arrow", "a.parquet"]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_damaged_and_truncated_files_are_one_line_that_names_them(tmp_path, capsys, name, share):
    path = tmp_path / name
    acts = rows(50, 16)
    if name == "a.pt":
        torch.save(acts, path)
    elif name == "a.npy":
        np.save(path, acts.numpy())
    elif name == "a.npz":
        np.savez(path, acts.numpy())
    elif name == "a.safetensors":
        safetensors.torch.save_file({"x": acts}, path)
    else:
        import pyarrow as pa

        table = pa.table({"x": pa.array(acts.tolist(), pa.list_(pa.float32()))})
        with pa.ipc.new_stream(str(path), table.schema) as sink:
            sink.write_table(table)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    line = refusal(capsys, path, tmp_path / "out")
    assert f"{path}: cannot be read, damaged or cut short: " in line
    assert not list(tmp_path.glob("out/*.h5"))


def test_a_bit_flipped_in_an_archive_is_found_by_its_checksum(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=rows(500, 16).numpy())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "Bad CRC-32" in refusal(capsys, tmp_path / "a.npz", tmp_path / "out")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (rows(4, 9), "activations must be [n, 8] or [sequences, tokens, 8], got ([4, 9] float32)"),
        (rows(4, 2, 8), "rows one after the other and sequences of rows are mixed"),
        (rows(8), "activations must be real numbers, [n, d_in] or [sequences, tokens, d_in]"),
        (torch.ones(4, 8).int(), "got ([4, 8] int32)"),
        (rows(2, 2, 2, 2, 8), "got ([2, 2, 2, 2, 8] float32) (--d-in joins the last axes"),
        ({"x": rows(4, 8)}, "no array without a name; it holds x ([4, 8] float32)"),
    ],
)
def test_files_that_differ_are_refused(tmp_path, capsys, second, message):
    torch.save(rows(4, 8), tmp_path / "0.pt")
    torch.save(second, tmp_path / "1.pt")
    line = refusal(capsys, tmp_path / "*.pt", tmp_path / "out")
    assert f"{tmp_path / '1.pt'}: " in line
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ids": torch.arange(5)}, "no activations in it, real numbers of 2 or 3 dimensions; it"),
        ({}, "it holds no array at all"),
        ({"a": rows(4, 8), "b": rows(4, 8)}, "a ([4, 8] float32) and b ([4, 8] float32); name the"),
        (
            {"activations": rows(4, 3, 8), "input_ids": torch.ones(4, 2).int()},
            "input_ids must be whole numbers, one for each of 12 tokens, got ([4, 2] int32)",
        ),
        (
            {"activations": rows(4, 3, 8), "attention_mask": torch.ones(4, 3)},
            "attention_mask must be whole numbers, one for each of 12 tokens, got ([4, 3] float32)",
        ),
        (
            {"activations": [rows(4, 8), rows(4, 8)], "input_ids": torch.ones(4).int()},
            "input_ids must be whole numbers",
        ),
        (
            {"activations": rows(2, 8), "input_ids": torch.tensor([1, 2**40])},
            "token_ids does not fit into 32 bits",
        ),
    ],
)
def test_contents_that_are_no_activations_are_refused(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "a.pt")
    line = refusal(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert f"{tmp_path / 'a.pt'}: " in line
    assert message in line


def test_files_with_other_columns_than_the_first_are_refused(tmp_path, capsys):
    ids = torch.ones(4).int()
    torch.save({"activations": rows(4, 8), "input_ids": ids}, tmp_path / "0.pt")
    torch.save({"activations": rows(4, 8)}, tmp_path / "1.pt")
    line = refusal(capsys, tmp_path / "*.pt", tmp_path / "out")
    assert "columns: none" in line
    torch.save(
        {"activations": rows(4, 8), "input_ids": ids, "attention_mask": ids}, tmp_path / "1.pt"
    )
    line = refusal(capsys, tmp_path / "*.pt", tmp_path / "out")
    assert "mask: attention_mask, in " in line


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "not the state of a saved dataset"),
        ('{"_data_files": []}', "the dataset has no files"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow: no such file"),
        (
            '{"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "i"}]}',
            "save it anew after flatten_indices()",
        ),
    ],
)
def test_a_damaged_dataset_is_one_line(tmp_path, capsys, state, message):
    (tmp_path / "state.json").write_text(state)
    assert message in refusal(capsys, tmp_path, tmp_path / "out")
