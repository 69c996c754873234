"""The memory of a run, planned before its first step; a run that cannot fit is refused."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sae_fast.activations.stream import PREFETCHED_BATCHES
from sae_fast.autoencoder.architectures import ARCHITECTURES, make_architecture
from sae_fast.autoencoder.thresholded import DENSE_FROM, Thresholded
from sae_fast.autoencoder.topk import MULTI
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.mesh import parsed_mesh
from sae_fast.ops.reference.moments import moment_blocks

_FLOAT = 4
_HALF = 2
_GIB = 2**30
# An entry of a code: value, index, gradient, coefficient, dot product, latent-major view.
_BYTES_PER_ENTRY = 32
# Of an entry in the comparison with the next token's code, its gradient included.
_BYTES_PER_MATCHED_ENTRY = 48
_CHANGE_ARRAYS = 4  # dense codes' changes, their squares, the gradients of both
# Arrays of a batch's size: two batches read ahead and x; x_hat - x, and the same again for AuxK.
_INPUT_ARRAYS, _RESIDUAL_ARRAYS = 3, 3
_SKIP_ARRAYS = 3  # what the skip connection gives, what is left for the code, its gradient
# Gradient rows kept between the norm and the update, for each row of a factor: row_gradient_norm's
# bound. AuxK gives W_dec a second factor.
_KEPT_ROWS_PER_TOKEN = 3 * 2
# The encoder's product is made in parts of this size (csrc/kernels/common/encode_plan.h).
_PRODUCT_BYTES = 192 * 2**20
# Arrays [N, F], and matrices of W_enc's or W_dec's size (gradients and their parts), that are alive
# at once while a step works on all latents, by architecture, at the moments that can be its peak.
# Measured.
_DENSE_MOMENTS: dict[str, tuple[tuple[float, int], ...]] = {
    "relu": ((3, 2),),
    "jumprelu": ((5, 1), (4, 2)),
    "gated": ((7.25, 1), (3, 2)),
    "slots": ((1, 2),),
}
_PACKED = "packed encoder (16 bit)"
_KEPT = "gradient rows before the clip"
_MANY = "codes while many latents are active"
_STATS_ROWS = 2  # of float32, one number a latent: what the GPU's encoder knows of its copy
_POOL = "activations in memory"
_WHOLE = "all activations, kept in memory"
_CACHE = "all activations, kept on the GPU"
_CHUNKED_MAX_ARRAYS = 6  # of W_dec's size
# Rows of W that one product of the decorrelation's gradient takes in.
_GRAM_ROWS = 4096
# Temporaries of an optimiser of torch and of the projection before it: on a GPU, where it takes all
# parameters together, arrays of the size of all; on a CPU matrices of one size. Measured for adam
# with 65,536 latents; sgd and signum take a matrix less.
_TEMPORARIES = 2, 3
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
        """Return the bytes needed in the host's memory, or in the device's."""
        return sum(size for name, size in self.parts.items() if (name in self.host_parts) is host)

    def __str__(self) -> str:
        lines = [f"  {name:<42} {_gib(size)}" for name, size in self.parts.items()]
        for where, needed, available in self._places():
            total = f"{'total in ' + where:<42} {_gib(needed)}"
            lines.append(f"  {total} of {_gib(available).strip()} available")
        return "\n".join(["memory plan", *lines])

    def summary(self) -> str:
        """Return the totals and the largest parts, in one line."""
        totals = " and ".join(f"{_gib(needed).strip()} in {w}" for w, needed, _ in self._places())
        return f"{totals} planned (largest: {self._largest()})"

    def check(self) -> None:
        """Raise ValueError, with the numbers, when the run cannot fit."""
        for where, needed, available in self._places():
            if available is not None and needed > available:
                raise ValueError(
                    f"the run needs {_gib(needed).strip()} in {where} and "
                    f"{_gib(available).strip()} is available (largest: {self._largest()}); "
                    f"{self._remedy()}"
                )

    def _remedy(self) -> str:
        for option, part in (("keep_in_memory", _WHOLE), ("device_cache", _CACHE)):
            if part in self.parts:
                return f"leave out {option}, or lower d_sae or batch_size"
        return "lower d_sae, batch_size or pool_rows"

    def _largest(self) -> str:
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        return ", ".join(f"{name} {_gib(size).strip()}" for name, size in largest)

    def _places(self) -> Iterable[tuple[str, int, int | None]]:
        if self.device.type == "cpu":
            return [("memory", sum(self.parts.values()), self.host_available)]
        device = ("memory of " + str(self.device), self.total(host=False), self.available)
        return [device, ("memory", self.total(host=True), self.host_available)]


def plan_memory(
    sae: SAEConfig, train: TrainConfig, *, native: bool, pool_bytes: int, cache_bytes: int = 0
) -> MemoryPlan:
    """Plan the memory that a training takes at its peak.

    Args:
        sae: the model, with its sizes known.
        train: its training; of a mesh that divides the latents one process has a share of them.
        native: whether the compiled ops run, which keep a packed copy of the encoder.
        pool_bytes: bytes that the source of the activations holds in the host's memory.
        cache_bytes: bytes that it holds on the device.
    """
    width, n_latents = sae.target_width, _n_latents(sae, train)
    encoder, decoder = n_latents * sae.d_in, n_latents * width
    parameters = encoder + decoder + n_latents + width + _extra_parameters(sae, n_latents)
    device = torch.device(train.device)
    on_gpu = device.type == "cuda"
    has_chunks = sae.decorrelation == "chunked_max"
    parts = {
        "parameters": parameters * _FLOAT,
        "optimiser states": _optimizer_states(sae, train),
        "dead-latent counters, bias gradients": n_latents * (8 + 8) + width * 8,
    }
    if train.device_cache:
        parts[_CACHE] = cache_bytes
    if train.average_decay > 0:
        parts["average of the weights"] = parameters * _FLOAT
    if train.optimizer == "schedule_free_signum":
        packed = encoder * _HALF if native else 0
        parts["averaged model, while it is evaluated"] = parameters * _FLOAT + packed
    if native and on_gpu:
        parts |= _gpu_copies(sae, train)
        if sae.decorrelation_coeff > 0 and not has_chunks:
            # Its gradient, the rows' halves, products of some rows.
            parts["decorrelation"] = (2 * decoder + 2 * _GRAM_ROWS * width) * _FLOAT
            parts["decorrelation"] += 8 * width**2 * _FLOAT
    elif native:
        parts[_PACKED] = encoder * _HALF
    if has_chunks:  # unit rows, their nearest, the gradients of both and of W_dec; cosines
        cosines = min(n_latents, 2 * sae.decorrelation_chunk) ** 2
        parts["decorrelation"] = (_CHUNKED_MAX_ARRAYS * decoder + cosines) * _FLOAT
    if train.precision != "screened" and not (native and on_gpu):
        parts["rounded copies (16 bit)"] = (encoder + decoder) * _HALF
    if not train.fused:
        parts["dense gradients"] = parameters * _FLOAT
        parts["temporaries of torch's optimiser"] = _FLOAT * (
            _TEMPORARIES[0] * parameters if on_gpu else _TEMPORARIES[1] * max(encoder, decoder)
        )
    step = _step_parts(sae, train)
    parts |= step
    if _dense_moments(sae):
        _take_larger_phase(parts, sae, train)
    host = {_WHOLE if train.keep_in_memory else _POOL: pool_bytes}
    if on_gpu:
        batch = train.kept_batch_size * (sae.d_in + sae.d_out) * _FLOAT
        graph = train.cuda_graph and train.fused and native and not _dense_moments(sae)
        parts["batches copied ahead"] = (3 if graph else 2) * train.grad_acc_steps * batch
        if not train.device_cache:  # at most: half of it where rows have 16 bits
            parts["batches as stored"] = 2 * train.grad_acc_steps * batch
        if graph:  # beside what the steps before a capture took
            parts["pool of the CUDA graphs"] = sum(step.values())
        host["page-locked batches"] = _page_locked(batch, train.grad_acc_steps)
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else None
    return MemoryPlan(parts | host, frozenset(host), device, free, available_memory())


def _dense_moments(sae: SAEConfig) -> tuple[tuple[float, int], ...]:
    """Return the moments of an architecture that works on all latents; of another one none.

    A registered architecture has the moments of the one that it is derived from.
    """
    own = ARCHITECTURES[sae.arch]
    for base in own.__mro__:
        for name, moments in _DENSE_MOMENTS.items():
            if ARCHITECTURES[name] is base:
                return moments
    return _DENSE_MOMENTS["gated"] if issubclass(own, Thresholded) else ()


def _n_latents(sae: SAEConfig, train: TrainConfig) -> int:
    """Return how many latents one process has, at most."""
    return -(-sae.d_sae // parsed_mesh(train.mesh).get("latents", 1))


def _extra_parameters(sae: SAEConfig, n_latents: int) -> int:
    """Count the numbers in the probe, the skip connection and the value heads.

    Of a registered architecture also the numbers in its own parameters and buffers.
    """
    probe = sae.probe_outputs * (n_latents + 1)
    if sae.registered_by:
        architecture = make_architecture(sae)
        own = architecture.parameters() | architecture.buffers()
        probe += sum(tensor.numel() for tensor in own.values())
    if sae.skip_connection:
        probe += sae.d_in * sae.d_out
    if not sae.has_value_heads:
        return probe
    hidden, answers = sae.value_hidden or 0, sae.n_answers or 0
    return probe + (sae.n_relations or 0) * (hidden * (2 + answers) + answers)


def _optimizer_states(sae: SAEConfig, train: TrainConfig) -> int:
    """Return the bytes of the moments: of rows as `optimizer_states` says, others in fp32."""
    n_latents = _n_latents(sae, train)
    moments = 2 if train.optimizer in ("adam", "adamw") else 1
    a_number = {"fp32": 4, "bf16": 2, "8bit": 1}[train.optimizer_states]
    widths = sae.d_in, sae.target_width
    scales = sum(map(moment_blocks, widths)) if train.optimizer_states == "8bit" else 0
    rows = n_latents * (sum(widths) * a_number + scales * _FLOAT)
    others = n_latents + sae.target_width + _extra_parameters(sae, n_latents)
    return moments * (rows + others * _FLOAT)


def _step_parts(sae: SAEConfig, train: TrainConfig) -> dict[str, int]:
    """Return the parts that a step allocates and frees."""
    n_latents = _n_latents(sae, train)
    if ARCHITECTURES[sae.arch].selects_from_step:  # its batches are joined into one
        whole = train.tokens_per_step
        timeout = TrainConfig.mesh_timeout
        train = replace(train, batch_size=whole, grad_acc_steps=1, mesh=None, mesh_timeout=timeout)
    inputs = train.kept_batch_size * sae.d_in * _FLOAT
    outputs = train.kept_batch_size * sae.target_width * _FLOAT
    aux = sae.kept_aux_k
    k = max(sae.k or 0, train.k_anneal_start or 0) * (1 + MULTI if sae.multi_topk else 1)
    k *= 2 if sae.activation == "abs_topk" else 1  # candidates of either sign
    if sae.registered_by and k == 0:  # it lists any number
        k = round(DENSE_FROM * n_latents)
    entries = train.kept_batch_size * (k + aux) * _BYTES_PER_ENTRY
    accumulated = train.batches_per_step * (inputs + outputs + entries)
    parts = {}
    if train.fused:
        kept = min(_KEPT_ROWS_PER_TOKEN * train.tokens_per_step, n_latents)
        both = sae.d_in + sae.target_width
        parts[_KEPT] = kept * both * _FLOAT
    arrays = _INPUT_ARRAYS * inputs + _RESIDUAL_ARRAYS * outputs
    parts["step: batch, residual, code, AuxK"] = arrays + accumulated
    if sae.transcoder:
        n_arrays = _INPUT_ARRAYS + (_SKIP_ARRAYS if sae.skip_connection else 0)
        parts["targets"] = n_arrays * outputs
    if sae.matryoshka_prefixes is not None:  # residuals and gradients, or those and their merger
        arrays = 2 * train.batches_per_step * len(sae.matryoshka_prefixes)
        parts["errors of the nested dictionaries"] = arrays * outputs
    if sae.probe_outputs:  # its gradient; logits, their gradient, and as much in between
        rows = n_latents + 4 * train.kept_batch_size
        parts["probe"] = sae.probe_outputs * rows * _FLOAT
    if sae.independence_coeff or sae.orthogonality_coeff:  # latents by tokens, tokens by tokens
        dense = (1 if _dense_moments(sae) else 2) * n_latents
        parts["correlations of latents"] = (
            train.kept_batch_size * _FLOAT * (dense + 4 * train.kept_batch_size)
        )
    if sae.temporal_smoothness_coeff > 0:
        listed = (sae.k or round(DENSE_FROM * n_latents)) * _BYTES_PER_MATCHED_ENTRY
        dense = _CHANGE_ARRAYS * n_latents * _FLOAT if _dense_moments(sae) else 0
        parts["temporal smoothness"] = train.kept_batch_size * max(listed, dense)
    return parts


def _take_larger_phase(parts: dict[str, int], sae: SAEConfig, train: TrainConfig) -> None:
    """Keep of `parts` what is there in the phase that needs more, and add that phase's codes.

    The first steps work on all latents, with dense gradients and without a packed encoder; later
    ones on those listed.
    """
    n_latents = _n_latents(sae, train)
    all_latents = train.kept_batch_size * n_latents
    matrix = n_latents * (sae.d_in + sae.target_width) / 2
    accumulated = 2 if train.batches_per_step > 1 else 0
    matrices = {
        moment: (moment[1] + accumulated) * matrix if train.fused else 0.0
        for moment in _dense_moments(sae)
    }
    moment = max(matrices, key=lambda moment: moment[0] * all_latents + matrices[moment])
    dense = round(moment[0] * all_latents) * _FLOAT
    gradients = round(matrices[moment]) * _FLOAT
    listed = round(DENSE_FROM * all_latents) * _BYTES_PER_ENTRY * train.batches_per_step
    if dense + gradients < listed + parts.get(_PACKED, 0) + parts.get(_KEPT, 0):
        parts[_MANY] = listed
        return
    parts.pop(_PACKED, None)
    parts.pop(_KEPT, None)
    parts[_MANY] = dense
    if train.fused:
        parts["dense gradients while they are"] = gradients


def _gpu_copies(sae: SAEConfig, train: TrainConfig) -> dict[str, int]:
    """Return the 16-bit copies that ops read on a GPU, and the parts of the encoder's product.

    With --amp the evaluation, which is exact, has a copy of its own.
    """
    n_latents = _n_latents(sae, train)
    copies, numbers = 1, sae.d_in  # of the encoder
    if train.precision != "screened":
        copies, numbers = 3, 2 * sae.d_in + sae.target_width
    stats = _STATS_ROWS * n_latents * _FLOAT
    return {
        "rounded copies (16 bit)": copies * stats + n_latents * numbers * _HALF,
        "parts of the encoder's product": _PRODUCT_BYTES,
    }


def _page_locked(batch: int, per_step: int) -> int:
    """Return the bytes of batches on their way to the GPU that the pool does not count.

    torch rounds page-locked memory up to a power of two.
    """
    rounded = 1 << (batch - 1).bit_length()
    return 2 * per_step * rounded + (PREFETCHED_BATCHES + 2) * (rounded - batch)


def available_memory() -> int | None:
    """Return the bytes this process may still take, by the kernel and the control group's limit."""
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
    """Return the number after `name` in a file of such lines; raise ValueError without one."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    raise ValueError(f"{path} has no {name}")


def _gib(size: int | None) -> str:
    if size is None:
        return "an unknown amount"
    return f"{size / _GIB:9.3f} GiB" if size >= _GIB else f"{size / 2**20:9.1f} MiB"
