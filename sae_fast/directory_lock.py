"""Locks that keep a directory to one process, for as long as that process lives.

The system releases a lock when its process ends in any way, so a kill leaves none behind. A process
that is forked off gives up its part of every lock at once: only the one that took it holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)

# Errors of file systems without locks; network file systems report EBADF for a directory.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


class HeldError(ValueError):
    """Another process holds the lock.

    Attributes:
        holder: the process, as `process 12 on host`.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is locked by {holder}")
        self.holder = holder


class FileLock:
    """A lock on a file that exists while the lock is held.

    Args:
        path: the file; its directory must exist when the lock is taken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        _locks.add(self)

    def __del__(self) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """True while this object holds the lock."""
        return self._descriptor is not None

    def take(self) -> None:
        """Take the lock unless it is held by this object already.

        Raises:
            HeldError: when another process, or another object of this one, holds it.
            OSError: when the file cannot be made.
        """
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                if not try_lock(descriptor, self.path.parent):
                    raise HeldError(self.path, _holder(descriptor))
                # Its holder before may have removed it after this process opened it.
                if _is_file_at(descriptor, self.path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                    self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def release(self) -> None:
        """Remove the file and give the lock up, if it is held."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.forget()

    def forget(self) -> None:
        """Close the file; the lock stays with the process that this one was forked from."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def try_lock(descriptor: int, directory: Path) -> bool:
    """Lock an open file without waiting; return False where another process has locked it.

    A file system without locks is told of in the log, and the file counts as locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: this file system has no locks (%s): nothing keeps a second process from writing "
            "to this directory",
            directory,
            error.strerror,
        )
    return True


def _is_file_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _holder(descriptor: int) -> str:
    words = os.pread(descriptor, 300, 0).decode(errors="replace").split()
    match words:
        case [process]:
            return f"process {process}"
        case [process, host]:
            return f"process {process} on {host}"
    return "another process"


_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in _locks:
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
