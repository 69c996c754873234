"""What a run will hold in memory, told before the first step, and refused when it cannot fit."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_fast.config import SAEConfig, TrainConfig

_FLOAT = 4
_HALF = 2
_GIB = 2**30
# An entry of a code: value, index, gradient, coefficient, dot product, latent-major view.
_BYTES_PER_ENTRY = 32
# Arrays of a batch's size: two batches read ahead, x, x_hat - x, and the same again for AuxK.
_BATCH_ARRAYS = 6
# Gradient rows kept between the norm and the update, for each row of a factor: row_gradient_norm's
# bound. AuxK gives W_dec a second factor.
_KEPT_ROWS_PER_TOKEN = 3 * 2
_CGROUPS = (  # directory, limit, in use, reclaimable: of version 2 and of version 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of a run's memory, in bytes, and what is available for each place."""

    parts: dict[str, int]
    host_parts: frozenset[str]
    device: torch.device
    available: int | None
    host_available: int | None

    def total(self, host: bool) -> int:
        """Bytes needed in the host's memory, or in the device's."""
        return sum(size for name, size in self.parts.items() if (name in self.host_parts) is host)

    def __str__(self) -> str:
        lines = [f"  {name:<42} {_gib(size)}" for name, size in self.parts.items()]
        for where, needed, available in self._places():
            total = f"{'total in ' + where:<42} {_gib(needed)}"
            lines.append(f"  {total} of {_gib(available).strip()} available")
        return "\n".join(["memory plan", *lines])

    def check(self) -> None:
        """Raises ValueError, with the numbers, when the run cannot fit."""
        for where, needed, available in self._places():
            if available is not None and needed > available:
                largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
                named = ", ".join(f"{name} {_gib(size).strip()}" for name, size in largest)
                raise ValueError(
                    f"the run needs {_gib(needed).strip()} in {where} and "
                    f"{_gib(available).strip()} is available (largest: {named}); "
                    "lower d_sae, batch_size or pool_rows"
                )

    def _places(self) -> Iterable[tuple[str, int, int | None]]:
        if self.device.type == "cpu":
            return [("memory", sum(self.parts.values()), self.host_available)]
        device = ("memory of " + str(self.device), self.total(host=False), self.available)
        return [device, ("memory", self.total(host=True), self.host_available)]


def plan_memory(sae: SAEConfig, train: TrainConfig, *, native: bool, pool_bytes: int) -> MemoryPlan:
    """The memory that training takes at its peak.

    Args:
        sae: the model, with its sizes known.
        train: its training.
        native: whether the compiled ops run, which keep a packed copy of the encoder.
        pool_bytes: what the source of the activations holds.
    """
    matrix = sae.d_sae * sae.d_in
    parameters = 2 * matrix + sae.d_sae + sae.d_in
    low_precision = train.precision != "screened"
    batch = train.batch_size * sae.d_in * _FLOAT
    aux = (sae.aux_k or sae.d_in // 2) if sae.aux_k_coeff > 0 else 0
    entries = train.batch_size * (sae.k + aux) * _BYTES_PER_ENTRY
    parts = {
        "parameters": parameters * _FLOAT,
        "optimiser states": 2 * parameters * _FLOAT,
        "dead-latent counters, bias gradients": sae.d_sae * (8 + 8) + sae.d_in * 8,
    }
    if native:
        parts["packed encoder (16 bit)"] = matrix * _HALF
    if low_precision:
        parts["rounded copies (16 bit)"] = 2 * matrix * _HALF
    if train.fused:
        kept = min(_KEPT_ROWS_PER_TOKEN * train.batch_size * train.grad_acc_steps, sae.d_sae)
        parts["gradient rows before the clip"] = 2 * kept * sae.d_in * _FLOAT
    else:
        parts["dense gradients"] = parameters * _FLOAT
    accumulated = train.grad_acc_steps * (2 * batch + entries)
    parts["step: batch, residual, code, AuxK"] = _BATCH_ARRAYS * batch + accumulated
    pool = "activations in memory"
    parts[pool] = pool_bytes
    device = torch.device(train.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return MemoryPlan(parts, frozenset({pool}), device, free, available_memory())


def available_memory() -> int | None:
    """Bytes this process may still take, by the kernel's count and the control group's limit."""
    try:
        whole_machine = _lookup(Path("/proc/meminfo"), "MemAvailable:") * 1024
    except (OSError, ValueError):
        return None  # not Linux: nothing to hold the plan against
    candidates = [whole_machine]
    for directory, limit, used, reclaimable in _CGROUPS:
        group = Path(directory)
        try:
            cached = _lookup(group / "memory.stat", reclaimable)
            room = int((group / limit).read_text()) - int((group / used).read_text()) + cached
        except (OSError, ValueError):  # no such group, or a limit that reads "max"
            continue
        candidates.append(max(room, 0))
    return min(candidates)


def _lookup(path: Path, name: str) -> int:
    """The number after `name` in a file of such lines; ValueError when it is not there."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    raise ValueError(f"{path} has no {name}")


def _gib(size: int | None) -> str:
    if size is None:
        return "an unknown amount"
    return f"{size / _GIB:9.3f} GiB" if size >= _GIB else f"{size / 2**20:9.1f} MiB"
