"""Files with false headers, or made to break a reader, are refused at once, in one line each."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from converting import command, random_rows, refusal, stored

HUGE = 1 << 40


def npy(header: str, data: bytes = b"") -> bytes:
    """Write a .npy file with this text as its header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def described(shape: str) -> str:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize("stride", [(0, 1), (0, 0), (1, 1)])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_claim_more_by_their_strides_are_refused(tmp_path, capsys, stride, zipped):
    base = torch.zeros(1 << 16)
    shape = (HUGE, 64) if stride[0] == 0 else ((1 << 16) - 63, 64)
    many = torch.as_strided(base, shape, stride)
    if stride[0]:  # overlapping rows: 16 MB from a storage of 4 MB are harmless
        assert many.numel() * 4 < 64 << 20
    torch.save(many, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    if stride[0]:
        assert command(tmp_path / "a.pt", tmp_path / "out") == 0
        return
    line = refusal(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert f"a.pt: activations ([{HUGE}, 64] float32) are {HUGE * 256:,} bytes" in line
    assert "the file has at most 262,144 for them" in line
    assert not (tmp_path / "out").exists()


def test_a_small_view_that_repeats_rows_is_read_as_it_is_seen(tmp_path):
    row = random_rows(1, 8)
    torch.save(row.expand(40, 8), tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "out") == 0
    assert np.array_equal(stored(tmp_path / "out").rows, row.expand(40, 8).numpy())


def test_dictionaries_that_hold_each_other_many_times_are_refused(tmp_path, capsys):
    content: dict[str, object] = {"x": random_rows(3, 2)}
    for _ in range(40):
        content = {"a": content, "b": content}
    torch.save(content, tmp_path / "a.pt")
    line = refusal(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert "holds more than 100,000 objects" in line


def test_a_record_that_is_smaller_than_its_tensor_is_refused(tmp_path, capsys):
    torch.save({"x": torch.ones(300, 4), "y": torch.zeros(300, 4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    short = next(name for name in members if name.endswith("data/0"))
    members[short] = members[short][:100]
    for kind, reason in (
        (zipfile.ZIP_STORED, "is larger than what the file has for it"),
        (zipfile.ZIP_DEFLATED, "is compressed"),
    ):
        with zipfile.ZipFile(tmp_path / "b.pt", "w", kind) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        assert reason in refusal(capsys, tmp_path / "b.pt", tmp_path / "out")


def test_an_archive_of_zeros_that_unpacks_to_gigabytes_is_refused(tmp_path, capsys):
    rows = (3 << 30) // 256
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy(described(f"({rows}, 64)")))
        file.write(bytes(8 << 20))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # the size in the archive's directory
    content[place : place + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(bytes(content))
    line = refusal(capsys, tmp_path / "a.npz", tmp_path / "out")
    assert "beyond what activations are" in line


def test_an_archive_of_zeros_of_a_moderate_size_is_converted(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((40_000, 8), np.float32))
    assert (tmp_path / "a.npz").stat().st_size < 40_000 * 32 // 500
    assert command(tmp_path / "a.npz", tmp_path / "out") == 0
    assert stored(tmp_path / "out").rows.shape == (40_000, 8)


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        (f"({1 << 64}, 4)", "cannot be read"),
        (f"({1 << 62}, 4)", "cannot be read"),
        (f"({HUGE}, 4)", "cannot be read"),
        ("(-5, 4)", "cannot be read"),
        ("(16, 0)", "must have a width of at least 1, got ([16, 0] float32)"),
        ("(" * 100 + ")" * 100, "no activations in it"),
        ("(" * 4000 + ")" * 4000, "cannot be read"),
        (f"({'9' * 4000}, 4)", "cannot be read"),
        (f"(0, {HUGE}, 4)", "no rows in it"),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_shapes_that_no_file_has_are_refused(tmp_path, capsys, shape, line, archive):
    content = npy(described(shape), bytes(64))
    path = tmp_path / ("a.npz" if archive else "a.npy")
    if archive:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", content)
        line = line if "cannot" not in line else ""
    else:
        path.write_bytes(content)
    said = refusal(capsys, path, tmp_path / "out")
    assert line in said
    assert len(said) < 1000
    assert not (tmp_path / "out").exists()


def test_a_header_of_gigabytes_is_not_read(tmp_path, capsys):
    start = b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little")
    (tmp_path / "a.npy").write_bytes(start)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", start)
    for name in ("a.npy", "b.npz"):
        line = refusal(capsys, tmp_path / name, tmp_path / "out")
        assert "has a header of 2,147,483,648 bytes" in line


def safetensors_file(header: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "shape", [[HUGE, 0], [HUGE, 0, 4], [0, HUGE, 4], [1 << 62, 16], [HUGE, 4], [-1, 4]]
)
def test_safetensors_without_the_numbers_they_claim_are_refused(tmp_path, capsys, shape):
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_file(header))
    refusal(capsys, tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_offsets_beyond_the_end_of_an_arrow_file_are_refused(tmp_path, capsys):
    import pyarrow as pa

    table = pa.table({"x": pa.array([[1.0] * 3] * 2, pa.list_(pa.float32()))})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = bytearray(sink.getvalue())
    place = content.index(np.array([0, 3, 6], np.int32).tobytes()) + 8
    content[place : place + 4] = (1 << 30).to_bytes(4, "little")
    (tmp_path / "a.arrow").write_bytes(bytes(content))
    assert "a.arrow: cannot be read" in refusal(capsys, tmp_path / "a.arrow", tmp_path / "out")


def test_lists_of_no_numbers_are_refused(tmp_path, capsys):
    import pyarrow as pa
    from pyarrow import parquet

    for name, kind in (("fixed", pa.list_(pa.float32(), 0)), ("list", pa.list_(pa.float32()))):
        table = pa.table({"x": pa.array([[]] * 5, kind)})
        with pa.ipc.new_stream(str(tmp_path / f"{name}.arrow"), table.schema) as sink:
            sink.write_table(table)
        line = refusal(capsys, tmp_path / f"{name}.arrow", tmp_path / "out")
        assert "must have a width of at least 1" in line
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "width of at least 1" in refusal(capsys, tmp_path / "a.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    "state",
    [
        "[" * 100_000,
        '{"_data_files": ' + "[" * 100_000,
        '{"_data_files": [{"filename": "../../etc/passwd"}]}',
        '{"_data_files": [{"filename": "/etc/passwd"}]}',
        '{"_data_files": [{"filename": "state.json"}]}',
        '{"_data_files": [{"filename": "folder.arrow"}]}',
        '{"_data_files": [{"filename": "a\\u0000.arrow"}]}',
        '{"_data_files": [{"filename": 7}]}',
        '{"_data_files": 7}',
        '{"_data_files": [{"filename": "' + "x" * 100_000 + '.arrow"}]}',
        "[]",
        "1" * 10_000,
    ],
)
def test_a_hostile_state_of_a_dataset_is_one_short_line(tmp_path: Path, capsys, state: str):
    source = tmp_path / "set"
    (source / "folder.arrow").mkdir(parents=True)
    (source / "state.json").write_text(state)
    line = refusal(capsys, source, tmp_path / "out")
    assert "state.json: not the state of a saved dataset" in line
    assert len(line) < 500


def test_a_conversion_record_of_deep_nesting_is_one_line(tmp_path, capsys):
    torch.save(random_rows(4, 2), tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion.json").write_text("[" * 100_000)
    assert "conversion.json: cannot be read" in refusal(capsys, tmp_path / "a.pt", tmp_path / "out")


def test_long_names_and_many_arrays_are_told_in_a_short_line(tmp_path, capsys):
    content = {f"{number}" + "x" * 5000: torch.ones(2) for number in range(300)}
    torch.save(content, tmp_path / "a.pt")
    line = refusal(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert "and 288 more" in line
    assert len(line) < 2500


# ---- numbers that the stored type cannot hold ---------------------------------------------------


def test_rows_that_float16_makes_zero_are_refused(tmp_path, capsys):
    rows = random_rows(50, 4)
    torch.save(rows * 1e-9, tmp_path / "a.pt")
    line = refusal(capsys, tmp_path / "a.pt", tmp_path / "out", "--dtype", "float16")
    assert "a.pt: row 0 holds " in line
    assert "too small for float16; choose another type with --dtype" in line
    assert not list((tmp_path / "out").glob("*.h5"))
    assert command(tmp_path / "a.pt", tmp_path / "kept", "--dtype", "bfloat16") == 0
    assert (stored(tmp_path / "kept").rows != 0).all()


def test_small_numbers_beside_large_ones_and_rows_of_zeros_are_converted(tmp_path):
    rows = random_rows(50, 4)
    rows[3], rows[7, 0] = 0, 1e-9
    torch.save(rows, tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "out", "--dtype", "float16") == 0
    torch.save(torch.full((9, 4), 1e-200, dtype=torch.float64), tmp_path / "b.pt")
    assert command(tmp_path / "b.pt", tmp_path / "b") == 2
