"""Small trainings by the command, their files, and refusals."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.training.checkpoint import CheckpointStore
from sae_fast.training.trainer import Trainer

D_IN = 8
SMALL = (
    *("--d-sae", "32", "--k", "2", "--batch-size", "32", "--max-steps", "6", "--lr", "1e-2"),
    *("--log-every", "2", "--eval-every", "3", "--checkpoint-every", "2", "--num-threads", "1"),
)
SMALL_FROM_MODEL = (
    *("--ctx_len", "16", "--batch_size", "4", "--max_tokens", "640", "--k", "4"),
    *("--expansion_factor", "2", "--heldout_tokens", "100"),
    *("--save_every", "4", "--log_every", "2", "--eval_every", "5", "--num_threads", "1"),
)
TIMES = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")
PATIENCE = 240  # seconds; only a blocked machine takes longer

Printed = tuple[int, str, str]
Run = Callable[..., Printed]


def refused(result: Printed, *parts: object) -> str:
    """Return the single line of a refusal, with exit code 2, that names all `parts`."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert lines[0] == err.splitlines()[-1]
    for part in parts:
        assert str(part) in lines[0]
    return lines[0]


def metrics(directory: str) -> list[dict[str, Any]]:
    """Return a run's metrics without values that depend on the clock."""
    lines = Path(directory, "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in lines
    ]


def assert_same(one: str, other: str) -> None:
    """Assert that the newest checkpoints of two runs have equal bits."""
    expected, found = _weights(one), _weights(other)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def _weights(directory: str) -> dict[str, torch.Tensor]:
    newest = CheckpointStore(Path(directory) / "checkpoints", keep=1).newest()
    assert newest is not None
    return SparseAutoencoder.from_pretrained(newest).state_dict()


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Interrupt trainings in this process before they pass a step."""
    advance = Trainer.advance

    def killed(self: Trainer, **options: bool) -> dict[str, Any]:
        if self.step == step:
            raise KeyboardInterrupt
        return advance(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", killed)
        yield
