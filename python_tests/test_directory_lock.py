"""A directory has one writer at a time, and a killed writer leaves no lock."""

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from sae_fast.directory_lock import FileLock, HeldError, try_lock


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.take()
    first.take()
    with pytest.raises(HeldError, match="locked by process") as caught:
        second.take()
    assert caught.value.holder.startswith(f"process {os.getpid()} on ")
    first.release()
    assert list(tmp_path.iterdir()) == []
    second.take()
    assert second.is_held
    assert not first.is_held


def test_a_killed_process_leaves_a_file_and_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        lock = FileLock(tmp_path / "lock")
        lock.take()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").exists()
    FileLock(tmp_path / "lock").take()


def test_a_lock_is_not_shared_with_forked_processes(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    lock.take()
    ready, end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.close(end[1])
        os.read(end[0], 1)  # lives until the end of the test
        os._exit(0)
    os.read(ready[0], 1)
    lock.forget()  # like the end of the process
    other.take()
    for descriptor in (*ready, *end):
        os.close(descriptor)
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_told_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = FileLock(tmp_path / "lock")
    lock.take()
    assert lock.is_held
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " this file system has no locks (No locks available)"
    ]


def test_other_errors_of_a_lock_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        try_lock(0, tmp_path)
