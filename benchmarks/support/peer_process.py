"""The parent's side of `benchmarks/worker.py`: an implementation in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.problem import CPU, Size
from benchmarks.support.timing import Sample

ROOT = Path(__file__).resolve().parents[2]


class PeerProcess:
    """A process that trains one implementation step by step; a context manager."""

    def __init__(
        self,
        implementation: str,
        adapter: str,
        python: str,
        size: Size,
        n_batches: int,
        threads: int,
        device: torch.device = CPU,
        *,
        data: Path | None = None,
        rate: float | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.implementation = implementation
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(threads),
            "WANDB_MODE": "disabled",
        }
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.peak_bytes = 0
        job = {
            "implementation": implementation,
            "adapter": adapter,
            "size": asdict(size),
            "n_batches": n_batches,
            "threads": threads,
            "device": str(device),
            "data": None if data is None else str(data),
            "rate": rate,
            "length": length,
            "seed": seed,
        }
        answer = self.ask(json.dumps(job))
        self.first_loss: float = answer["loss"]
        self.versions: dict[str, str] = answer["versions"]

    def step(self, count: int = 1) -> Sample:
        """Let the process take `count` steps; return their mean as a sample."""
        answer = self.ask(f"go {count}")
        self.peak_bytes = answer["peak_bytes"]
        return Sample(answer["seconds"], answer["cpu_seconds"], answer["others"])

    def heldout_fvu(self) -> float:
        """Return the FVU of the held-out rows of `data`, by the implementation's own inference."""
        return float(self.ask("evaluate")["fvu"])

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and return the answer; raise RuntimeError if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{self.implementation} stopped: {self.end_of_errors()}")
        content: dict[str, Any] = json.loads(answer)
        return content

    def end_of_errors(self) -> str:
        """Return the last eight lines that the process wrote to standard error."""
        self.process.wait()
        self.errors.seek(0)
        return "\n".join(self.errors.read().strip().splitlines()[-8:]) or "no message"

    def close(self) -> None:
        """Close the pipe, wait for the process and kill it if it does not end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
