"""Memory is requested before it is needed by libraries that end the process without it."""

import os
import resource
from pathlib import Path

import pytest
import torch
from slow_cases import slow_after

from sae_fast.activations import write_shard
from sae_fast.activations.shard import inspect_shard
from sae_fast.memory import LIBRARY_BYTES, require_memory
from sae_fast.tensor_files import has_checksum, load_tensors, save_tensors, shapes_in

MIB = 1 << 20
STATM = Path("/proc/self/statm")
if not STATM.exists():
    pytest.skip("no /proc: the memory in use is not known", allow_module_level=True)
# Limits of resources, and the field of statm that counts each.
LIMITS = {resource.RLIMIT_AS: 0, resource.RLIMIT_DATA: 5}


def code_of_child(work, kind, more):
    """Return the exit code of a forked child with `more` free bytes: 3 MemoryError, 4 another."""
    child = os.fork()
    if child == 0:
        code = 4
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            used = int(STATM.read_text().split()[LIMITS[kind]]) * resource.getpagesize()
            resource.setrlimit(kind, (used + more, used + more))
            work()
            code = 0
        except MemoryError:
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", LIMITS)
def test_memory_that_is_not_to_be_had_is_told_and_none_is_kept(kind):
    assert code_of_child(lambda: require_memory(16 * MIB), kind, 8 * MIB) == 3
    assert code_of_child(lambda: [require_memory(5 * MIB) for _ in range(9)], kind, 8 * MIB) == 0
    assert code_of_child(lambda: require_memory(0), kind, 8 * MIB) == 0


@pytest.fixture
def files(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "a.h5", torch.randn(64, 8))
    return tmp_path


USES = {
    "save": lambda at: save_tensors(at / "b.safetensors", {"x": torch.zeros(3)}),
    "load": lambda at: load_tensors(at / "a.safetensors"),
    "shapes": lambda at: shapes_in(at / "a.safetensors"),
    "checksum": lambda at: has_checksum(at / "a.safetensors"),
    "shard": lambda at: inspect_shard(at / "shards" / "a.h5"),
    "write": lambda at: write_shard(at / "b.h5", torch.randn(64, 8)),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_tensors_are_written_without_a_copy_of_them(tmp_path, kind):
    large = {"x": torch.zeros(32 * MIB)}  # 128 MiB
    more = LIBRARY_BYTES + 24 * MIB
    assert code_of_child(lambda: save_tensors(tmp_path / "a", large, {}), kind, more) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("use", slow_after(1, USES))
def test_little_memory_is_an_error_and_no_signal(files, use, kind):
    codes = {code_of_child(lambda: USES[use](files), kind, n * MIB // 4) for n in range(12)}
    assert codes <= {3, 4}
    assert code_of_child(lambda: USES[use](files), kind, LIBRARY_BYTES + 8 * MIB) == 0
    assert not list(files.rglob(".*"))
