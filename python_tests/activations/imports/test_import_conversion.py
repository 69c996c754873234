"""Conversions: rows that are dropped, checks, resuming and refusals in every format."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import warm_python
from converting import command, convert_all, random_rows, refusal, stored

from sae_fast.activations import open_shards
from sae_fast.activations.imports import conversion as conversion_module
from sae_fast.activations.shard_job import ShardJob

ROOT = Path(__file__).parents[3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write four files with ten sequences of five tokens each."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(4):
        torch.save(random_rows(10, 5, 6, seed=number), folder / f"{number}.pt")
    return folder


def all_rows(source: Path) -> np.ndarray:
    files = sorted(source.glob("*.pt"))
    return torch.cat([torch.load(path).reshape(-1, 6) for path in files]).numpy()


# ---- stored rows ----------------------------------------------------------------------------


def test_held_out_rows_are_the_last_whole_sequences(source, tmp_path):
    assert command(source, tmp_path / "out", "--heldout-rows", "12", "--shard-rows", "64") == 0
    rows = all_rows(source)
    assert np.array_equal(stored(tmp_path / "out").rows, rows[:-15])
    held = stored(tmp_path / "out", "heldout")
    assert np.array_equal(held.rows, rows[-15:])
    assert held.columns["doc_id"] == [37] * 5 + [38] * 5 + [39] * 5
    shards = open_shards(tmp_path / "out", whole_sequences=True)
    assert [len(shards.starts(number)) for number in range(4)] == [12, 12, 12, 1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_are_rounded_to_the_type_asked_for_and_the_change_is_told(source, tmp_path, dtype):
    result = convert_all(source, tmp_path / "out", dtype=dtype)
    rows = torch.from_numpy(all_rows(source))
    rounded = rows.to(getattr(torch, dtype))
    there = torch.from_numpy(stored(tmp_path / "out").rows.view(np.int16))
    assert torch.equal(there, rounded.view(torch.int16))
    change = (rounded.double() - rows.double()).norm() / rows.double().norm()
    assert result.change == pytest.approx(change.item(), rel=1e-6)
    assert convert_all(source, tmp_path / "exact").change == 0


@pytest.mark.parametrize("compression", ["gzip", "zstd", "blosc2"])
def test_shards_are_compressed_where_asked(source, tmp_path, compression):
    assert command(source, tmp_path / "out", "--compression", compression) == 0
    assert np.array_equal(stored(tmp_path / "out").rows, all_rows(source))
    with h5py.File(tmp_path / "out" / "train_00000.h5") as file:
        assert file["activations"].id.get_create_plist().get_nfilters() > 0


def test_files_of_different_types_are_stored_in_one_that_holds_both(tmp_path):
    torch.save(random_rows(3, 4).half(), tmp_path / "0.pt")
    torch.save(random_rows(3, 4).bfloat16(), tmp_path / "1.pt")
    assert command(tmp_path / "*.pt", tmp_path / "out") == 0
    assert stored(tmp_path / "out").rows.dtype == np.float32


def test_heads_are_joined_to_the_width_that_is_given(tmp_path, capsys):
    acts = random_rows(6, 5, 2, 3)
    torch.save(acts, tmp_path / "z.pt")
    line = refusal(capsys, tmp_path / "z.pt", tmp_path / "out")
    assert "got ([6, 5, 2, 3] float32) (--d-in joins the last axes" in line
    assert command(tmp_path / "z.pt", tmp_path / "out", "--d-in", "6") == 0
    found = stored(tmp_path / "out")
    assert np.array_equal(found.rows, acts.reshape(30, 6).numpy())
    assert found.columns["position"] == [0, 1, 2, 3, 4] * 6


def test_a_width_of_one_and_empty_files_among_others_are_fine(tmp_path):
    for number, rows in enumerate((0, 3, 0, 2)):
        torch.save(torch.full((rows, 1), float(number)), tmp_path / f"{number}.pt")
    assert command(tmp_path / "*.pt", tmp_path / "out") == 0
    assert stored(tmp_path / "out").rows.tolist() == [[1.0]] * 3 + [[3.0]] * 2


@pytest.mark.slow
def test_memory_is_bounded_by_a_block_not_by_the_file(tmp_path):
    np.savez(tmp_path / "a.npz", activations=np.ones((1_000_000, 64), np.float32))  # 256 MB
    code = (
        "import resource, sys\n"
        "from sae_fast.convert_shards import main\n"
        "import h5py\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main([*sys.argv[1:], '--dtype', 'float16']) == 0\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print('grown by', (after - before) // 1024)"
    )
    # In an archive, because mapped pages would be counted too, though the system can free them.
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.npz"), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 128  # MiB


# ---- rows left out or refused -----------------------------------------------------------------


def test_rows_that_are_not_finite_are_named_or_dropped(source, tmp_path, capsys):
    acts = torch.load(source / "2.pt")
    acts[3, 1, 4] = float("nan")
    acts[7, 0, 0] = float("-inf")
    torch.save(acts, source / "2.pt")
    line = refusal(capsys, source, tmp_path / "out")
    assert f"{source / '2.pt'}: sequence 3, token 1 holds NaN or Inf (--skip-nonfinite" in line
    assert command(source, tmp_path / "dropped", "--skip-nonfinite") == 0
    assert "2 rows of NaN or Inf left out" in capsys.readouterr().out
    rows = all_rows(source)
    good = np.isfinite(rows).all(axis=1)
    found = stored(tmp_path / "dropped")
    assert np.array_equal(found.rows, rows[good])
    assert found.columns["position"][115:121] == [0, 2, 3, 4, 0, 1]


def test_what_float16_cannot_hold_is_refused_even_when_nan_is_dropped(source, tmp_path, capsys):
    acts = torch.load(source / "1.pt")
    acts[0, 0, 0] = float("nan")
    acts[2, 3, 5] = -70000.0
    torch.save(acts, source / "1.pt")
    line = refusal(capsys, source, tmp_path / "a", "--dtype", "float16", "--skip-nonfinite")
    assert (
        f"{source / '1.pt'}: sequence 2, token 3 holds 70000, beyond the range of float16" in line
    )
    assert "--dtype" in line
    assert command(source, tmp_path / "b", "--dtype", "bfloat16", "--skip-nonfinite") == 0


def test_a_float64_beyond_float32_is_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.array([[1.0, 1.0], [1e300, 0.0]]))
    line = refusal(capsys, tmp_path / "a.npy", tmp_path / "out")
    assert "a.npy: row 1 holds 1e+300, beyond the range of float32" in line


def test_padding_that_is_not_finite_does_not_matter(tmp_path):
    acts, mask = random_rows(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    acts[mask == 0] = float("nan")
    torch.save({"activations": acts, "attention_mask": mask}, tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "out") == 0
    assert len(stored(tmp_path / "out").rows) == 3


def test_a_source_of_padding_alone_is_refused(tmp_path, capsys):
    content = {"activations": random_rows(2, 3, 4), "attention_mask": torch.zeros(2, 3).int()}
    torch.save(content, tmp_path / "a.pt")
    line = refusal(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert "no row is left to train on: 6 were padding, 0 not finite" in line


# ---- interrupted, damaged, in use ----------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupted_after(shards: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    """Convert until the shard after the given number of shards is half written."""
    write = conversion_module.ShardWriter.append
    begun: set[Path] = set()

    def append(self, rows, **columns):
        begun.add(self.path)
        write(self, rows, **columns)
        if len(begun) > shards:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(conversion_module.ShardWriter, "append", append)
        with pytest.raises(Interrupted):
            convert_all(source, out, shard_rows=50)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_an_interrupted_conversion_goes_on_at_the_next_shard(
    source, tmp_path, monkeypatch, capsys, shards
):
    out = tmp_path / "out"
    interrupted_after(shards, source, out, monkeypatch)
    assert not (out / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert len(before) == shards
    assert command(source, out, "--shard-rows", "50") == 0
    if shards:
        assert f"continuing: {shards} of 4 shards are there" in capsys.readouterr().out
    assert np.array_equal(stored(out).rows, all_rows(source))
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert len(after) == 4
    assert before.items() <= after.items()
    open_shards(out)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_shards(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(8):
        np.save(source / f"{number}.npy", random_rows(20_000, 64, seed=number).numpy())
    arguments = [str(source), str(out), "--shard-rows", "9000"]
    kills = 0
    for _ in range(40):
        process = warm_python.Process(
            ["-m", "sae_fast.convert_shards", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        shards = len(list(out.glob("*.h5"))) if out.exists() else 0
        while process.poll() is None and kills < 3:
            if out.exists() and len(list(out.glob("*.h5"))) > shards:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
    assert kills == 3
    assert process.returncode == 0
    expected = np.concatenate([np.load(source / f"{number}.npy") for number in range(8)])
    assert np.array_equal(stored(out).rows, expected)
    assert not list(out.glob(".*"))
    open_shards(out)


def test_a_finished_conversion_is_compared_once_more(source, tmp_path, capsys):
    assert command(source, tmp_path / "out") == 0
    before = (tmp_path / "out" / "train_00000.h5").stat().st_mtime_ns
    assert command(source, tmp_path / "out") == 0
    assert "finished already: every row is compared once more" in capsys.readouterr().out
    assert (tmp_path / "out" / "train_00000.h5").stat().st_mtime_ns == before


def test_a_source_that_changed_and_a_damaged_shard_are_found(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupted_after(2, source, out, monkeypatch)
    acts = torch.load(source / "1.pt")
    acts[4, 2, 3] += 1
    torch.save(acts, source / "1.pt")
    line = refusal(capsys, source, out, "--shard-rows", "50")
    assert f"{out / 'train_00001.h5'}: row 22 of activations is not what the source holds" in line
    acts[4, 2, 3] -= 1
    torch.save(acts, source / "1.pt")
    with h5py.File(out / "train_00001.h5", "r+") as file:
        file["doc_id"][7] = 5
    line = refusal(capsys, source, out, "--shard-rows", "50")
    assert "train_00001.h5: row 7 of doc_id is not what the source holds; delete" in line
    (out / "train_00001.h5").unlink()
    assert command(source, out, "--shard-rows", "50") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float16"], 'dtype: "float32", now "float16"'),
        (["--heldout-rows", "5"], "heldout_rows: 0, now 5"),
        (["--compression", "gzip"], 'compression: "none", now "gzip"'),
        (["--model", "gpt2"], 'metadata: {}, now {"model": "gpt2"}'),
        (["--layer", "0"], 'metadata: {}, now {"layer": 0}'),
    ],
)
def test_the_directory_of_another_conversion_is_refused(
    source, tmp_path, monkeypatch, capsys, options, message
):
    out = tmp_path / "out"
    interrupted_after(1, source, out, monkeypatch)
    line = refusal(capsys, source, out, "--shard-rows", "50", *options)
    assert f"{out}: holds another conversion, its {message}; give another directory" in line


def test_other_source_files_are_another_conversion(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupted_after(1, source, out, monkeypatch)
    torch.save(random_rows(1, 5, 6), source / "4.pt")
    assert "its files: [" in refusal(capsys, source, out, "--shard-rows", "50")


@pytest.mark.parametrize("content", ["", "[1]", '"x"', "{"])
def test_a_damaged_record_is_one_line(source, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion.json").write_text(content)
    line = refusal(capsys, source, tmp_path / "out")
    assert str(tmp_path / "out") in line


def test_a_foreign_shard_in_the_directory_is_refused(source, tmp_path, capsys):
    assert command(source, tmp_path / "out") == 0
    (tmp_path / "out" / "other.h5").write_bytes(b"")
    line = refusal(capsys, source, tmp_path / "out")
    assert "other.h5: is not of this conversion" in line


def test_a_directory_in_use_or_not_empty_is_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    with ShardJob(out, "conversion.json", ".conversion.lock"):
        line = refusal(capsys, source, out)
    assert f"{out}: another conversion is writing there (process {os.getpid()} on " in line
    (out / "notes.txt").write_text("mine")
    assert f"{out}: must be empty or not there yet, it holds notes.txt" in refusal(
        capsys, source, out
    )
    assert "notes.txt: is no directory" in refusal(capsys, source, out / "notes.txt")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    source, tmp_path, capsys, monkeypatch
):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refusal(capsys, source, tmp_path / "a" / "b")
    assert "GB are needed, 0.00 GB are free on the disk" in line
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_no_half_shard_and_one_line(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        np.save(source / f"{number}.npy", random_rows(2000 * 3**number, 64).numpy())
    code = (
        "import resource, sys\n"
        "from sae_fast.convert_shards import main\n"
        "limit = int(sys.argv.pop(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        arguments = [str(limit), str(source), str(out), "--shard-rows", "8000"]
        return warm_python.run(["-c", code, *arguments], cwd=ROOT)

    done = run(1_000_000)  # largest file in bytes: less than a shard
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "train_00000.h5" in line
    assert [path.name for path in out.iterdir()] == ["conversion.json"]
    assert run(1 << 30).returncode == 0
    assert len(stored(out).rows) == 2000 * 13


def test_the_space_stated_is_enough(source, tmp_path, capsys):
    assert command(source, tmp_path / "out", "--shard-rows", "33") == 0
    out = capsys.readouterr().out
    stated = float(out.split("up to ")[1].split(" GB")[0])
    used = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert used <= stated * 1e9 + 5e5  # printed with three digits


def test_what_was_converted_and_how_is_noted(source, tmp_path):
    described = ("--model", "gpt2", "--hook", "transformer.h.7", "--dataset", "pile")
    assert command(source, tmp_path / "out", *described) == 0
    attributes = stored(tmp_path / "out").attributes
    expected = {"model": "gpt2", "hook": "transformer.h.7", "layer": 7, "dataset": "pile"}
    assert expected.items() <= attributes.items()
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["metadata"] == {**expected}
    assert record["files"][0] == {"file": "0.pt", "bytes": (source / "0.pt").stat().st_size}
