"""Shards whose numbers were never written, lie elsewhere or are too many are refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sae_fast.activations import (
    HeldOut,
    ShardError,
    find_targets,
    open_shards,
    write_manifest,
    write_shard,
)
from sae_fast.activations import shard as shard_module

ROWS = np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32)


def message_of(place: Path, **options: object) -> str:
    with pytest.raises(ShardError) as caught:
        open_shards(place, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


def half_chunked(file: h5py.File) -> None:
    dataset = file.create_dataset("activations", (4000, 8), "f4", chunks=(100, 8))
    dataset[:2000] = ROWS[:2000]


def never_contiguous(file: h5py.File) -> None:
    file.create_dataset("activations", (4000, 8), "f4")


def resized(file: h5py.File) -> None:
    dataset = file.create_dataset(
        "activations", (100, 8), "f4", chunks=(100, 8), maxshape=(None, 8)
    )
    dataset[:] = ROWS[:100]
    dataset.resize(4000, axis=0)


def endless(file: h5py.File) -> None:
    file.create_dataset("activations", (35184372088832, 32), "f4", chunks=(1000, 32))


def wide(file: h5py.File) -> None:
    file.create_dataset("activations", (64, 1099511627776), "f4", chunks=(1, 1024))


def external(file: h5py.File) -> None:
    size = 4000 * 8 * 4
    file.create_dataset("activations", (4000, 8), "f4", external=[("/etc/passwd", 0, size)])


def linked_outside(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).parents[1] / "other.h5", "w") as other:
        other["activations"] = ROWS
    file["activations"] = h5py.ExternalLink("../other.h5", "activations")


def circle(file: h5py.File) -> None:
    file["activations"] = h5py.SoftLink("/other")
    file["other"] = h5py.SoftLink("/activations")


def virtual(file: h5py.File, *sources: tuple[str, str], rows: int = 2000) -> None:
    layout = h5py.VirtualLayout((4000, 8), "f4")
    for number, (name, key) in enumerate(sources):
        source = h5py.VirtualSource(name, key, (rows, 8))
        layout[number * 2000 : number * 2000 + rows] = source
    file.create_virtual_dataset("activations", layout)


def half_virtual(file: h5py.File) -> None:
    file["one"] = ROWS[:2000]
    virtual(file, (".", "one"))


def self_virtual(file: h5py.File) -> None:
    virtual(file, (".", "activations"), rows=4000)


def virtual_outside(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).parents[1] / "other.h5", "w") as other:
        other["activations"] = ROWS
    virtual(file, ("../other.h5", "activations"), rows=4000)


def virtual_of_nothing(file: h5py.File) -> None:
    virtual(file, ("gone.h5", "activations"), rows=4000)


def virtual_of_holes(file: h5py.File) -> None:
    file.create_dataset("one", (4000, 8), "f4", chunks=(100, 8))[:100] = ROWS[:100]
    virtual(file, (".", "one"), rows=4000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (half_chunked, "'activations' was not written whole: 20 of its 40 chunks of 100 rows"),
        (never_contiguous, "'activations' was never written"),
        (resized, "39 of its 40 chunks"),
        (endless, "was not written whole"),
        (wide, "was not written whole"),
        (external, "keeps its numbers in another file, '/etc/passwd'"),
        (linked_outside, r"'activations' is a link to '../other.h5', which is not directly in"),
        (circle, "is a link that leads back to itself"),
        (half_virtual, "is a virtual dataset without a source for row 2000"),
        (self_virtual, "is a virtual dataset of a virtual dataset"),
        (virtual_outside, "parts in '../other.h5', which is not directly in"),
        (virtual_of_nothing, "gone.h5: no such file"),
        (virtual_of_holes, "'one' was not written whole"),
    ],
)
@pytest.mark.parametrize("verify", [False, True])
def test_numbers_that_are_not_in_the_shard_are_refused(
    tmp_path: Path, make: Callable[[h5py.File], None], message: str, verify: bool
) -> None:
    (tmp_path / "shards").mkdir()
    with h5py.File(tmp_path / "shards" / "a.h5", "w") as file:
        make(file)
    assert message in message_of(tmp_path / "shards", verify=verify)


def test_labels_and_targets_that_were_never_written_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = ROWS
        file.create_dataset("label", (4000,), "i4", chunks=(100,))
        file.create_dataset("out", (4000, 3), "f4")
    assert "'label' was not written whole" in message_of(tmp_path, columns=["label"])
    targets = find_targets([tmp_path / "a.h5"], None, "out")
    assert "'out' was never written" in message_of(tmp_path, targets=targets)


@pytest.mark.parametrize("linked", [False, True])
def test_parts_in_the_directory_of_the_shard_are_read(tmp_path, linked):
    for number in range(2):
        with h5py.File(tmp_path / f"part{number}", "w") as part:
            part["activations"] = ROWS[2000 * number : 2000 * (number + 1)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if linked:
            file["activations"] = h5py.ExternalLink("part0", "activations")
        else:
            virtual(file, ("part0", "activations"), ("part1", "activations"))
    rows = torch.cat(list(HeldOut(open_shards(tmp_path), batch_size=1000))).numpy()
    assert np.array_equal(rows, ROWS[:2000] if linked else ROWS)


def test_a_type_of_other_bits_is_converted_and_not_taken_for_float32(tmp_path):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 20, 11, 0, 20)  # the exponent of float64 in the size of float32
    kind.set_ebias(1023)
    rows = ROWS.round(2)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple(rows.shape)
        dataset = h5py.h5d.create(file.id, b"activations", kind, space)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, rows)
    read = torch.cat(list(HeldOut(open_shards(tmp_path), batch_size=4000))).numpy()
    np.testing.assert_allclose(read, rows, rtol=1e-5)


def test_a_chunk_shorter_than_its_fletcher_checksum_is_damage(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("activations", data=ROWS, chunks=(4000, 8), fletcher32=True)
        size = rows.id.get_chunk_info(0).size
    content = path.read_bytes()
    place = content.index(size.to_bytes(4, "little") + bytes(4))  # in the index of chunks
    path.write_bytes(content[:place] + (2).to_bytes(4, "little") + content[place + 4 :])
    assert "a chunk of 'activations' is stored as 2 bytes" in message_of(tmp_path)


# The keys of the first row, column and byte, before each chunk and after the last one.
@pytest.mark.parametrize("key", [(3900, 0, 0), (3900, 8, 4), (2000, 0, 0)])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"fletcher32": True}])
def test_a_chunk_that_its_index_lists_and_does_not_lead_to_is_damage(tmp_path, options, key):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("activations", data=ROWS, chunks=(100, 8), **options)
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, content.index(struct.pack("<QQQ", *key)), key[0] - 100)
    path.write_bytes(content)
    with h5py.File(path) as file:
        assert (file["activations"][:] == 0).all(axis=1).any()  # HDF5 reads these numbers
    assert "the index of 'activations' does not lead to the chunk" in message_of(tmp_path)


def test_a_heap_of_texts_that_never_ends_is_damage(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["activations"] = ROWS
        file.attrs["model"] = "some"
    content = path.read_bytes()
    heap = content.index(b"GCOL")
    free = heap + 16 + 16 + 8  # after the text
    assert content[free : free + 2] == b"\0\0"
    path.write_bytes(content[: free + 8] + bytes(8) + content[free + 16 :])
    assert f"a heap of texts, at byte {heap}" in message_of(tmp_path)


@pytest.mark.parametrize("values", ["some", ["some", "text"], ""])
def test_texts_of_any_length_are_read(tmp_path, values):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = ROWS
        file.attrs["hook"] = values
        parts = np.empty(1, object)
        parts[0] = np.arange(3, dtype="i4")
        file.attrs.create("parts", parts, dtype=h5py.vlen_dtype("i4"))
    assert open_shards(tmp_path).shards[0].metadata["hook"] == values


@pytest.mark.parametrize(("place", "value"), [(3, b"\xd9"), (4, b"\xff"), (-31, b"\x03")])
def test_a_text_of_another_length_place_or_type_is_damage(tmp_path, place, value):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["activations"] = ROWS
        file.attrs["model"] = "some"
    content = path.read_bytes()
    heap = content.index(b"GCOL")
    text = content.index((4).to_bytes(4, "little") + heap.to_bytes(8, "little")) + place
    path.write_bytes(content[:text] + value + content[text + 1 :])
    assert "damaged" in message_of(tmp_path)


def test_an_attribute_of_absurd_size_is_damage(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["activations"] = ROWS
        file.attrs["many"] = np.arange(12345, dtype="i1")
    content = path.read_bytes()
    place = content.index((12345).to_bytes(8, "little"))
    path.write_bytes(content[: place + 5] + b"\x04" + content[place + 6 :])
    assert "damaged" in message_of(tmp_path)


@pytest.mark.parametrize("kind", [b"\x11\x20\x1f\x00", b"\x10\x08\x00\x00\x08"])
def test_a_type_that_hdf5_cannot_read_is_one_line(tmp_path, kind):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["activations"] = ROWS
        file["label"] = np.arange(4000)
    content = path.read_bytes()
    place = content.index(kind)  # the rows' or the label's; its first byte has the version
    path.write_bytes(content[:place] + b"\x71" + content[place + 1 :])
    assert "bad version number for datatype message" in message_of(tmp_path, columns=["label"])


def test_a_pipe_or_a_link_in_a_circle_is_named_and_not_waited_for(tmp_path):
    write_shard(tmp_path / "a.h5", torch.from_numpy(ROWS))
    os.mkfifo(tmp_path / "b.h5")
    assert "b.h5: cannot be opened: it is a pipe, device or socket" in message_of(tmp_path)
    (tmp_path / "b.h5").unlink()
    (tmp_path / "b.h5").symlink_to("b.h5")
    assert "b.h5: cannot be opened" in message_of(tmp_path)
    (tmp_path / "b.h5").unlink()
    (tmp_path / "b.h5").symlink_to("nowhere")
    assert "b.h5: a link to nothing" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("target", "message"), [("nowhere", "cannot be read"), ("/dev/zero", "is no regular file")]
)
def test_a_manifest_that_is_no_file_is_refused(tmp_path, target, message):
    write_shard(tmp_path / "a.h5", torch.from_numpy(ROWS))
    (tmp_path / "manifest.json").symlink_to(target)
    assert message in message_of(tmp_path)


def test_a_manifest_that_is_a_pipe_is_refused(tmp_path):
    write_shard(tmp_path / "a.h5", torch.from_numpy(ROWS))
    os.mkfifo(tmp_path / "manifest.json")
    assert "is no regular file" in message_of(tmp_path)


def test_a_long_name_in_a_manifest_stays_one_short_line(tmp_path):
    write_shard(tmp_path / "a.h5", torch.from_numpy(ROWS))
    write_manifest(tmp_path)
    content = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(content.replace("a.h5", "x" * 5000))
    assert "in manifest.json, but missing" in message_of(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    write_shard(tmp_path / "a.h5", torch.from_numpy(ROWS))
    (tmp_path / "a.h5").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.h5"))
    assert "the path is not UTF-8" in message_of(tmp_path)


def test_a_wrong_key_among_thousands_stays_one_short_line(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number in range(300):
            file[f"{'a' * 300}{number}"] = np.float32(number)
    assert "…" in message_of(tmp_path)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_shards_with_a_manifest_are_read_once(tmp_path, compression):
    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    rows = torch.from_numpy(np.tile(ROWS, (1, 40)) + np.arange(320, dtype=np.float32))
    write_shard(tmp_path / "a.h5", rows, chunk_rows=300, compression=compression)
    write_manifest(tmp_path)
    before, size = read_bytes(), (tmp_path / "a.h5").stat().st_size
    shards = open_shards(tmp_path)
    assert size <= read_bytes() - before < 1.1 * size
    assert torch.equal(torch.cat(list(HeldOut(shards, batch_size=4000))), rows)


@pytest.mark.parametrize("opens", [1, 2])
def test_memory_that_runs_out_is_no_damage(tmp_path, monkeypatch, opens):
    write_shard(tmp_path / "a.h5", torch.from_numpy(ROWS))
    find, found = shard_module.find_item, []

    def out_of_memory(*given: object) -> object:
        found.append(1)
        if len(found) == opens:  # when it is inspected, or when its rows are read
            raise MemoryError
        return find(*given)

    monkeypatch.setattr(shard_module, "find_item", out_of_memory)
    assert message_of(tmp_path).endswith(
        "a.h5: reading it takes more memory than this process may have"
    )


def test_a_shuffle_of_another_size_than_the_numbers_is_damage(tmp_path):
    path = tmp_path / "0.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("activations", data=ROWS, chunks=(100, 8), compression=1, shuffle=True)
    content = bytearray(path.read_bytes())
    place = content.index(b"shuffle\0") + 8
    assert content[place] == 4
    content[place] = 5
    path.write_bytes(content)
    message = message_of(tmp_path)
    assert "'activations' has numbers of 4 bytes, and a shuffle of 5 bytes" in message
