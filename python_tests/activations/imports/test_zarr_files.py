"""Zarr folders are converted, as arrays and as groups with columns beside them."""

import sys

import numpy as np
import pytest
from converting import command, random_rows, refusal, stored

zarr = pytest.importorskip("zarr")
ROWS = random_rows(6, 5, 8).numpy()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_array_becomes_shards(tmp_path, version, dtype):
    source = tmp_path / "rows.zarr"
    array = zarr.create_array(
        store=str(source), shape=ROWS.shape, chunks=(2, 5, 3), dtype=dtype, zarr_format=version
    )
    array[:] = ROWS
    assert command(source, tmp_path / "out") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, ROWS.reshape(-1, 8).astype(dtype))


def test_a_group_has_columns_and_several_are_read_in_their_order(tmp_path):
    (tmp_path / "source").mkdir()
    for number, part in enumerate(np.split(ROWS, 2)):
        group = zarr.open_group(str(tmp_path / "source" / f"part_{number}.zarr"), mode="w")
        group.create_array("activations", data=part)
        group.create_array("input_ids", data=np.full((3, 5), number, np.int64))
    assert command(tmp_path / "source", tmp_path / "out") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, ROWS.reshape(-1, 8))
    assert list(found.columns["token_ids"]) == [0] * 15 + [1] * 15


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.zarr").mkdir()
    (tmp_path / "bad.zarr" / "zarr.json").write_text("{")
    assert "bad.zarr: cannot be read" in refusal(capsys, tmp_path / "bad.zarr", tmp_path / "out")
    huge = zarr.create_array(store=str(tmp_path / "huge.zarr"), shape=(1 << 40, 8), dtype="f4")
    huge[0] = 1
    assert "the file has at most" in refusal(capsys, tmp_path / "huge.zarr", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "zarr", None)
    message = refusal(capsys, tmp_path / "huge.zarr", tmp_path / "out")
    assert "needs zarr: install it (pip install 'sae_fast[remote]')" in message
