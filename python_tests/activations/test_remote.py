"""Shards at an address of fsspec, which are copied to this machine, and captures copied to one."""

import json

import fsspec
import pytest
import torch
from full_disk import files_up_to

from sae_fast.activations import ShardError, remote, write_manifest, write_shard
from sae_fast.activations.files import find_shards
from sae_fast.activations.remote import address_of, copy_to, local_place


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Give the test a cache of its own and a folder in memory; return its address."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.rm("/", recursive=True) if system.ls("/") else None
    return "memory://bucket/rows"


@pytest.fixture(autouse=True)
def _new_process():
    """Forget what was copied, as a new process has."""
    remote.forget_copies()
    yield
    remote.forget_copies()


def make_shards(folder, seed=0):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for name in ("a.h5", "b.h5", "heldout_00.h5"):
        write_shard(folder / name, torch.randn(64, 8, generator=generator))
    write_manifest(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_copied_once_and_then_what_has_changed(place, tmp_path, caplog):
    folder = make_shards(tmp_path / "local")
    assert copy_to(folder, place) == 4
    train, held = find_shards(place)
    assert [path.name for path in train] == ["a.h5", "b.h5"]
    assert [path.name for path in held] == ["heldout_00.h5"]
    assert contents(train[0].parent) == contents(folder)
    assert train[0].parent.name == "rows"
    inodes = {path.name: path.stat().st_ino for path in train[0].parent.iterdir()}
    remote.forget_copies()
    write_shard(folder / "b.h5", torch.ones(32, 8))
    write_manifest(folder)
    system = fsspec.filesystem("memory")
    system.put_file(str(folder / "b.h5"), "/bucket/rows/b.h5")
    system.put_file(str(folder / "manifest.json"), "/bucket/rows/manifest.json")
    system.rm("/bucket/rows/heldout_00.h5")
    train, held = find_shards(place)
    assert held == []
    now = {path.name: path.stat().st_ino for path in train[0].parent.iterdir()}
    assert set(now) == {"a.h5", "b.h5", "manifest.json"}
    assert {name for name in now if now[name] != inodes[name]} == {"b.h5", "manifest.json"}
    assert contents(train[0].parent)["b.h5"] == (folder / "b.h5").read_bytes()


def test_files_patterns_and_captures_have_addresses_too(place, tmp_path):
    for name in ("residual.0", "residual.1"):
        make_shards(tmp_path / "capture" / name)
    (tmp_path / "capture" / "notes.txt").write_text("no activations")
    copy_to(tmp_path / "capture", place)
    whole = local_place(place)
    assert sorted(path.name for path in whole.iterdir()) == ["residual.0", "residual.1"]
    file = local_place(f"{place}/residual.1/a.h5")
    assert file.read_bytes() == (tmp_path / "capture" / "residual.1" / "a.h5").read_bytes()
    held = find_shards(f"{place}/residual.0", f"{place}/residual.1/[ab].h5")[1]
    assert [path.name for path in held] == ["a.h5", "b.h5"]


def test_paths_are_told_from_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("shards", "/data/shards", "web:0.7", "../x", "a/b://c"):
        assert address_of(path) is None
    assert address_of("s3://bucket/x") == "s3://bucket/x"
    assert address_of(tmp_path.__class__("gs://bucket/x")) == "gs://bucket/x"
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "x").mkdir()
    assert address_of("s3:/x") is None


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/nothing", "no such folder or file of activations"),
        ("nosuch://bucket/rows", "cannot be read: Protocol not known: nosuch"),
        ("s3://bucket/rows", r"pip install 'sae_fast\[remote\]'"),
    ],
)
def test_what_is_not_there_is_one_line(place, monkeypatch, address, message):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ShardError, match=message) as error:
        find_shards(address)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(address)


def test_a_disk_that_is_too_small_is_told_before_the_copy(place, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    copy_to(make_shards(tmp_path / "local"), place)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**6, 0, 100))
    with pytest.raises(ShardError, match=r"a copy needs .* GB are free: set XDG_CACHE_HOME"):
        find_shards(place)


@pytest.mark.slow
def test_a_copy_that_is_cut_short_is_made_again(place, tmp_path):
    folder = make_shards(tmp_path / "local")
    copy_to(folder, place)
    limit = (folder / "a.h5").stat().st_size - 1
    with files_up_to(limit), pytest.raises(ShardError, match="cannot be read"):
        find_shards(place)
    train, _ = find_shards(place)
    assert contents(train[0].parent) == contents(folder)


def test_a_manifest_is_copied_behind_its_files(place, tmp_path, monkeypatch):
    folder = make_shards(tmp_path / "local")
    system = fsspec.filesystem("memory")
    order = []
    move = type(system).mv

    def mv(self, one, other, **more):
        order.append(other.rpartition("/")[2])
        if len(order) == 2:
            raise OSError("the network is gone")
        move(self, one, other, **more)

    with monkeypatch.context() as patched:
        patched.setattr(type(system), "mv", mv)
        with pytest.raises(ShardError, match="cannot be written: the network is gone"):
            copy_to(folder, place)
    assert not system.exists("/bucket/rows/manifest.json")
    assert copy_to(folder, place) == 3
    assert [name.rpartition("/")[2] for name in system.glob("/bucket/rows/*.json")] == [
        "manifest.json"
    ]
    assert copy_to(folder, place) == 0


@pytest.mark.slow
def test_a_training_on_an_address_gives_the_bits_of_one_on_a_folder(place, tmp_path):
    from sae_fast import train

    folder = make_shards(tmp_path / "local")
    copy_to(folder, place)
    sizes = ["--k", "2", "--d-sae", "16", "--batch-size", "16", "--max-steps", "4", "--quiet"]
    for name, source in (("here", str(folder)), ("there", place)):
        run = ["--checkpoint-dir", str(tmp_path / name), "--num-threads", "1"]
        assert train.main(["--shard-dir", source, *run, *sizes]) == 0
    here, there = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("here", "there")
    )
    assert [row.get("fvu") for row in here] == [row.get("fvu") for row in there]
    assert here[-1].get("heldout_fvu") == there[-1].get("heldout_fvu")


def test_a_capture_is_copied_when_it_is_finished(place, tmp_path, capsys):
    from small_models import save_model

    from sae_fast.capture import main

    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat"}\n' * 5)
    model = save_model(tmp_path / "llama", "llama")
    given = [str(model), str(tmp_path / "texts.jsonl"), "--layers", "0", "--num-threads", "1"]
    out = ["--out", str(tmp_path / "out"), "--copy-to", place]
    assert main([*given, *out]) == 0
    assert f"copied 4 files to {place}" in capsys.readouterr().out
    train, _ = find_shards(f"{place}/residual.0")
    assert contents(train[0].parent) == contents(tmp_path / "out" / "residual.0")
    assert main([*given, *out]) == 0
    assert f"copied 0 files to {place}" in capsys.readouterr().out
    assert main([*given, "--out", str(tmp_path / "x"), "--copy-to", "folder"]) == 2
    assert "folder: must be an address of fsspec" in capsys.readouterr().err
