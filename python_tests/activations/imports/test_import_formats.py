"""Every format that can be converted, from files written as by the format's own tools."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import warm_python
from converting import command, random_rows, refusal, stored

from sae_fast.activations.imports import (
    arrow_files,
    numpy_files,
    tensor_files,
)
from sae_fast.activations.imports.blocks import read_blocks
from sae_fast.activations.imports.plan import plan_shards
from sae_fast.activations.imports.saved_activations import inspect

ROOT = Path(__file__).parents[3]
BATCHES = [random_rows(6, 5, 8, seed=number) for number in range(12)]
ALL_ROWS = torch.cat(BATCHES).reshape(-1, 8)


def save(path: Path, tensor: torch.Tensor) -> None:
    """Write a file with activations, in the format of its suffix."""
    if path.suffix == ".pt":
        torch.save(tensor, path)
    elif path.suffix == ".npy":
        np.save(path, tensor.numpy())
    elif path.suffix == ".npz":
        np.savez_compressed(path, activations=tensor.numpy())
    else:
        safetensors.torch.save_file({"activations": tensor}, path)


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("flat", [True, False])
def test_files_become_shards_in_the_order_of_their_numbers(tmp_path, suffix, flat):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("of no format")
    for number, batch in enumerate(BATCHES):  # 10 and 11 sort before 2 as text
        save(source / f"acts_{number}{suffix}", batch.reshape(-1, 8) if flat else batch)
    assert command(source, tmp_path / "out", "--shard-rows", "100") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, ALL_ROWS.numpy())
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5")) == [
        f"train_{number:05d}.h5" for number in range(4)
    ]
    if flat:
        assert found.columns == {}
    else:
        assert found.columns["doc_id"] == [row // 5 for row in range(360)]
        assert found.columns["position"] == [0, 1, 2, 3, 4] * 72


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_every_float_type_keeps_its_bits(tmp_path, suffix, dtype):
    rows = random_rows(50, 4, dtype=dtype)
    if suffix == ".npy" and dtype == torch.bfloat16:  # saved like JAX does
        np.save(tmp_path / "a.npy", rows.view(torch.int16).numpy().view("V2"))
    else:
        save(tmp_path / f"a{suffix}", rows)
    assert command(tmp_path / f"a{suffix}", tmp_path / "out") == 0
    found = stored(tmp_path / "out")
    if dtype == torch.bfloat16:
        assert found.attributes["dtype"] == "bfloat16"
        assert np.array_equal(found.rows.view(np.int16), rows.view(torch.int16).numpy())
    else:
        kept = torch.float32 if dtype == torch.float64 else dtype
        assert np.array_equal(found.rows, rows.to(kept).numpy())


# ---- .pt ---------------------------------------------------------------------------------------


def test_a_dictionary_is_read_with_ids_and_without_padding(tmp_path):
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    ids = torch.arange(12).reshape(3, 4)
    acts = random_rows(3, 4, 2)
    content = {"activations": acts, "attention_mask": mask, "input_ids": ids, "note": "text"}
    torch.save(content, tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "out") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, acts[mask.bool()].numpy())
    assert found.columns == {
        "token_ids": [0, 1, 2, 6, 7],
        "doc_id": [0, 0, 0, 1, 1],
        "position": [0, 1, 2, 0, 1],  # padding on the left does not count
    }


def test_own_doc_ids_one_a_sequence_and_positions_win(tmp_path):
    content = {
        "layer3": {"activations": random_rows(2, 3, 4), "doc_ids": torch.tensor([7, 9])},
        "layer4": {"activations": random_rows(2, 3, 4, seed=1)},
    }
    content["layer3"]["positions"] = torch.tensor([[4, 5, 6], [0, 1, 2]])
    torch.save(content, tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "out", "--key", "layer3/activations") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, content["layer3"]["activations"].reshape(6, 4).numpy())
    assert found.columns == {"doc_id": [7, 7, 7, 9, 9, 9], "position": [4, 5, 6, 0, 1, 2]}


def test_lists_of_batches_of_different_lengths_are_joined(tmp_path):
    batches = [random_rows(2, 3, 4), random_rows(1, 7, 4, seed=1)]
    masks = [torch.ones(2, 3), torch.ones(1, 7)]
    masks = [mask.long() for mask in masks]
    masks[1][0, 5:] = 0
    torch.save({"activations": batches, "attention_mask": masks}, tmp_path / "a.pt")
    torch.save(batches, tmp_path / "b.pt")
    assert command(tmp_path / "a.pt", tmp_path / "out") == 0
    found = stored(tmp_path / "out")
    kept = [batches[0].reshape(-1, 4), batches[1][0, :5]]
    assert np.array_equal(found.rows, torch.cat(kept).numpy())
    assert found.columns["doc_id"] == [0] * 3 + [1] * 3 + [2] * 5
    assert command(tmp_path / "b.pt", tmp_path / "out_b") == 0
    assert len(stored(tmp_path / "out_b").rows) == 13


def test_views_transposed_tensors_and_parameters_are_read_as_they_are_seen(tmp_path):
    base = random_rows(8, 20)
    torch.save({"activations": torch.nn.Parameter(base.t()[3:17:2])}, tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "out") == 0
    assert np.array_equal(stored(tmp_path / "out").rows, base.t()[3:17:2].numpy())


def test_files_of_torch_before_1_6_are_read(tmp_path):
    rows = random_rows(9, 4)
    torch.save(rows, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert command(tmp_path / "a.pt", tmp_path / "out") == 0
    assert np.array_equal(stored(tmp_path / "out").rows, rows.numpy())


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys, zipped):
    content = {"activations": random_rows(3, 2), "extra": Planted(tmp_path / "was_run")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    line = refusal(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert f"{tmp_path / 'a.pt'}: holds Python objects beside tensors" in line
    assert "mkdir" in line
    assert not (tmp_path / "was_run").exists()
    assert not (tmp_path / "out").exists()


def test_sparse_tensors_and_mixed_lists_are_refused(tmp_path, capsys):
    torch.save(torch.eye(4).to_sparse(), tmp_path / "a.pt")
    assert "is sparse or quantized" in refusal(capsys, tmp_path / "a.pt", tmp_path / "out")
    torch.save({"x": [torch.ones(2, 2), "text"]}, tmp_path / "b.pt")
    line = refusal(capsys, tmp_path / "b.pt", tmp_path / "out")
    assert "a list at 'x' holds other things beside tensors" in line


# ---- NumPy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_any_byte_order_and_layout_of_npy_is_read(tmp_path, order, dtype):
    rows = np.asarray(random_rows(30, 4).numpy(), dtype, order=order)
    np.save(tmp_path / "a.npy", rows)
    assert command(tmp_path / "a.npy", tmp_path / "out", "--dtype", "float32") == 0
    assert np.array_equal(stored(tmp_path / "out").rows, rows.astype(np.float32))


@pytest.mark.parametrize("saved", [np.savez, np.savez_compressed])
def test_npz_is_read_with_its_ids_in_pieces(tmp_path, monkeypatch, saved):
    monkeypatch.setattr("sae_fast.activations.imports.blocks.BLOCK_BYTES", 700)
    acts = random_rows(40, 3, 4).numpy()
    ids = np.arange(120).reshape(40, 3)
    saved(tmp_path / "a.npz", token_ids=ids, hidden=acts, names=np.array(["x", "y"]))
    assert command(tmp_path / "a.npz", tmp_path / "out", "--shard-rows", "50") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, acts.reshape(-1, 4))
    assert found.columns["token_ids"] == list(range(120))


def test_arrays_of_objects_and_columns_first_in_an_archive_are_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], object), allow_pickle=True)
    assert "a.npy: cannot be read" in refusal(capsys, tmp_path / "a.npy", tmp_path / "out")
    np.savez(tmp_path / "b.npz", x=np.asfortranarray(random_rows(4, 3).numpy()))
    line = refusal(capsys, tmp_path / "b.npz", tmp_path / "out")
    assert "x.npy is stored column by column" in line
    np.savez(tmp_path / "c.npz", x=np.array([[{}]], object), y=np.ones(3, np.uint64))
    line = refusal(capsys, tmp_path / "c.npz", tmp_path / "out")
    assert "it holds x ([1, 1] no numbers) and y ([3] uint64)" in line


# Otherwise the time of --all-keys would grow with the square or the cube of their number.
@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("a.npz", (numpy_files, "_stream_array")),
        ("a.safetensors", (tensor_files, "_slice_array")),
        ("a.arrow", (arrow_files, "_array_of")),
        ("a.parquet", (arrow_files, "column_array")),
    ],
)
def test_of_many_arrays_only_those_that_are_asked_for_are_looked_at(
    tmp_path, monkeypatch, name, looks
):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    arrays = {f"x{number}": random_rows(5, 3, seed=number).numpy() for number in range(20)}
    arrays["token_ids"] = np.arange(5)
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        table = pa.table({name: pa.array(array.tolist()) for name, array in arrays.items()})
        if path.suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as sink:
                sink.write_table(table)
    module, function = looks
    look, looked = getattr(module, function), []
    monkeypatch.setattr(module, function, lambda *given: looked.append(1) or look(*given))
    source = inspect([path], "x7")
    assert (source.rows, source.d_in, source.columns) == (5, 3, ("token_ids",))
    assert len(looked) == 2
    (block,) = read_blocks(source, plan_shards(source, 5, 0)[0].spans, source.storage, False)
    assert np.array_equal(block.source.numpy(), arrays["x7"])
    assert len(looked) == 4


# ---- SAELens -----------------------------------------------------------------------------------


def dataset_of(columns: dict[str, torch.Tensor]) -> Any:
    """Return a dataset with the features that SAELens gives to activations and token_ids."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    activations = {name: x for name, x in columns.items() if name != "token_ids"}
    kind = str(next(iter(activations.values())).dtype).removeprefix("torch.")
    features = {name: Array2D(shape=x.shape[1:], dtype=kind) for name, x in activations.items()}
    features["token_ids"] = Sequence(Value("int32"), length=columns["token_ids"].shape[1])
    return Dataset.from_dict(columns, features=Features(features))


def save_as_saelens(folder: Path, columns: dict[str, torch.Tensor], shards: int) -> None:
    """Save like CacheActivationsRunner of sae-lens 6: datasets saved one by one, their files moved
    together under a state.json written by hand."""
    sequences = len(columns["token_ids"])
    files = []
    for number, rows in enumerate(torch.arange(sequences).chunk(shards)):
        part = {name: x[rows] for name, x in columns.items()}
        place = folder / ".tmp_shards" / f"shard_{number:05d}"
        dataset_of(part).save_to_disk(place, num_shards=1)
        (file,) = place.glob("*.arrow")
        name = f"data-{number:05d}-of-{shards:05d}.arrow"
        file.rename(folder / name)
        (place / "dataset_info.json").replace(folder / "dataset_info.json")
        files.append({"filename": name})
    state = {"_data_files": files, "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


HOOK = "blocks.3.hook_resid_post"


def assert_stored_cache(out: Path, acts: torch.Tensor) -> None:
    """Assert that activations [23, 5, 4] of HOOK are stored, with ascending tokens."""
    found = stored(out)
    assert np.array_equal(found.rows, acts.reshape(-1, 4).numpy())
    assert found.rows.dtype == acts.numpy().dtype
    assert found.columns["token_ids"] == list(range(115))
    assert found.columns["doc_id"] == [row // 5 for row in range(115)]
    assert (found.attributes["hook"], found.attributes["layer"]) == (HOOK, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cached_activations_of_saelens_are_read_in_pieces(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("sae_fast.activations.imports.blocks.BLOCK_BYTES", 700)
    source, acts = tmp_path / "cache", random_rows(23, 5, 4, dtype=dtype)
    source.mkdir()
    ids = torch.arange(23 * 5).reshape(23, 5).int()
    save_as_saelens(source, {HOOK: acts, "token_ids": ids}, shards=3)
    (source / "cache-0123.arrow").write_bytes(b"of a map() that was run on it")
    assert command(source, tmp_path / "out", "--shard-rows", "31") == 0
    assert_stored_cache(tmp_path / "out", acts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cache_from_a_hub_is_read_from_parquet_in_pieces(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("sae_fast.activations.imports.blocks.BLOCK_BYTES", 700)
    acts, ids = random_rows(23, 5, 4, dtype=dtype), torch.arange(23 * 5).reshape(23, 5).int()
    folder = tmp_path / "cache" / "data"
    folder.mkdir(parents=True)
    for number, rows in enumerate(torch.arange(23).chunk(2)):
        part = dataset_of({HOOK: acts[rows], "token_ids": ids[rows]})
        part.to_parquet(folder / f"train-{number:05d}-of-00002.parquet", batch_size=5)
    assert command(folder, tmp_path / "out", "--shard-rows", "31") == 0
    assert_stored_cache(tmp_path / "out", acts)


def test_parquet_is_decoded_one_row_group_after_the_other(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    rows = random_rows(40, 3).numpy()
    table = pa.table({"x": pa.array(rows.tolist(), pa.list_(pa.float32()))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    decoded, read = [], parquet.ParquetFile.read_row_group

    def noted(self, number, **options):
        decoded.append(number)
        return read(self, number, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", noted)
    monkeypatch.setattr("sae_fast.activations.imports.blocks.BLOCK_BYTES", 60)  # five rows
    assert command(tmp_path / "a.parquet", tmp_path / "out") == 0
    assert np.array_equal(stored(tmp_path / "out").rows, rows)
    assert decoded == [*range(5), *range(5)]  # once to write them, once to compare


@pytest.mark.slow
def test_without_datasets_pyarrow_alone_reads_them(tmp_path):
    source, acts = tmp_path / "cache", random_rows(4, 5, 3)
    source.mkdir()
    save_as_saelens(source, {HOOK: acts, "token_ids": torch.zeros(4, 5).int()}, shards=1)
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from sae_fast.convert_shards import main; sys.exit(main(sys.argv[1:]))"
    )
    done = warm_python.run(["-c", code, str(source), str(tmp_path / "out")], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(stored(tmp_path / "out").rows, acts.reshape(-1, 3).numpy())


def test_without_pyarrow_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.arrow", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
        line = refusal(capsys, tmp_path / name, tmp_path / "out")
        assert line.endswith(f"{name}: needs pyarrow: pip install 'sae_fast[capture]'")


def test_several_hooks_need_a_key_or_become_folders(tmp_path, capsys):
    source = tmp_path / "cache"
    source.mkdir()
    hooks = {f"blocks.{layer}.hook_mlp_out": random_rows(4, 5, 3, seed=layer) for layer in (1, 12)}
    save_as_saelens(source, {**hooks, "token_ids": torch.zeros(4, 5).int()}, shards=2)
    line = refusal(capsys, source, tmp_path / "out")
    assert "blocks.1.hook_mlp_out ([2, 5, 3] float32), blocks.12.hook_mlp_out" in line
    assert "name the activations with --key, or take all with --all-keys" in line
    assert command(source, tmp_path / "out", "--all-keys") == 0
    for (hook, acts), layer in zip(hooks.items(), (1, 12), strict=True):
        found = stored(tmp_path / "out" / hook)
        assert np.array_equal(found.rows, acts.reshape(-1, 3).numpy())
        assert (found.attributes["hook"], found.attributes["layer"]) == (hook, layer)
    assert command(source, tmp_path / "one", "--key", "blocks.12.hook_mlp_out") == 0
    assert stored(tmp_path / "one").attributes["layer"] == 12


@pytest.mark.parametrize("writer", ["new_stream", "new_file"])
def test_plain_arrow_files_of_rows_are_read_in_both_formats(tmp_path, writer):
    import pyarrow as pa

    rows = random_rows(20, 3).numpy()
    table = pa.table({"acts": rows.tolist(), "token_ids": list(range(20))})
    table = table.set_column(0, "acts", table["acts"].cast(pa.list_(pa.float32())))
    with getattr(pa.ipc, writer)(str(tmp_path / "a.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=7)
    assert command(tmp_path / "a.arrow", tmp_path / "out") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, rows)
    assert found.columns == {"token_ids": list(range(20))}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0], [1.0]], "entries of 'x' differ in length, or some are missing"),
        ([[1.0, 2.0], None], "entries of 'x' differ in length, or some are missing"),
        ([[1.0, 2.0], [1.0, None]], "1 numbers of 'x' are missing"),
        (["a", "b"], "it holds x ([2] no numbers)"),
        ([], "no rows in it"),
    ],
)
def test_ragged_and_missing_entries_of_arrow_are_refused(tmp_path, capsys, values, message):
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.list_(pa.float64()) if values != ["a", "b"] else pa.string()
    table = pa.table({"x": pa.array(values, kind)})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as sink:
        sink.write_table(table)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    for name in ("a.arrow", "a.parquet"):
        assert message in refusal(capsys, tmp_path / name, tmp_path / f"from_{name}")


def test_a_shuffled_dataset_that_was_saved_is_read_in_its_own_order(tmp_path):
    from datasets import Dataset

    acts = random_rows(20, 2, 3)
    dataset = Dataset.from_dict({"activations": acts.tolist()}).shuffle(seed=1)
    expected = np.asarray(dataset["activations"][:], np.float64).reshape(-1, 3)
    dataset.save_to_disk(tmp_path / "saved")
    assert command(tmp_path / "saved", tmp_path / "out") == 0
    assert np.array_equal(stored(tmp_path / "out").rows, expected.astype(np.float32))
