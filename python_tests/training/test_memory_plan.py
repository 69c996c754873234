"""The memory plan is the sum of its parts, and refusals give numbers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.autoencoder.thresholded import DENSE_FROM
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.presets import preset
from sae_fast.training.memory_plan import MemoryPlan, available_memory, plan_memory

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_plan_counts_parameters_and_optimiser_states() -> None:
    plan = plan_memory(SAEConfig(d_in=100, d_sae=1000), TrainConfig(), native=True, pool_bytes=7)
    parameters = 4 * (2 * 100 * 1000 + 1000 + 100)
    assert plan.parts["parameters"] == parameters
    assert plan.parts["optimiser states"] == 2 * parameters
    assert plan.parts["packed encoder (16 bit)"] == 2 * 100 * 1000
    assert plan.parts["activations in memory"] == 7
    assert "memory plan" in str(plan)


@pytest.mark.parametrize(
    ("arch", "arrays", "matrices"),
    [("relu", 3, 2), ("jumprelu", 4, 2), ("gated", 3, 2), ("slots", 1, 2)],
)
def test_architectures_that_begin_with_many_latents_count_them(
    arch: Any, arrays: int, matrices: int
) -> None:
    sae = SAEConfig(arch=arch, d_in=400, d_sae=1000, **_slots(arch))
    train = TrainConfig(batch_size=64)
    plan = plan_memory(sae, train, native=True, pool_bytes=0)
    assert plan.parts["codes while many latents are active"] == arrays * 64 * 1000 * 4
    assert plan.parts["dense gradients while they are"] == matrices * 400 * 1000 * 4
    assert "packed encoder (16 bit)" not in plan.parts  # allocated when few are active
    unfused = plan_memory(sae, replace(train, fused=False), native=True, pool_bytes=0)
    assert "dense gradients while they are" not in unfused.parts
    topk = plan_memory(SAEConfig(d_in=100, d_sae=1000), train, native=True, pool_bytes=0)
    assert not any("many latents" in part for part in topk.parts)


def _slots(arch: str) -> dict[str, int]:
    return {"n_relations": 4, "n_answers": 9} if arch == "slots" else {}


@pytest.mark.parametrize(("arch", "arrays"), [("jumprelu", 5), ("gated", 7.25)])
def test_large_batches_have_their_peak_where_most_codes_are(arch: Any, arrays: float) -> None:
    sae = SAEConfig(arch=arch, d_in=10, d_sae=1000)
    plan = plan_memory(sae, TrainConfig(batch_size=640), native=True, pool_bytes=0)
    assert plan.parts["codes while many latents are active"] == arrays * 640 * 1000 * 4
    assert plan.parts["dense gradients while they are"] == 10 * 1000 * 4


def test_accumulated_gradients_are_there_while_more_are_made() -> None:
    sae = SAEConfig(arch="relu", d_in=400, d_sae=1000)
    train = TrainConfig(batch_size=64, grad_acc_steps=2)
    plan = plan_memory(sae, train, native=True, pool_bytes=0)
    assert plan.parts["dense gradients while they are"] == 4 * 400 * 1000 * 4


def test_listed_entries_count_where_accumulated_batches_have_more_of_them() -> None:
    sae = SAEConfig(arch="relu", d_in=100, d_sae=1000)
    train = TrainConfig(batch_size=64, grad_acc_steps=100)
    plan = plan_memory(sae, train, native=True, pool_bytes=0)
    entries = round(DENSE_FROM * 64 * 1000)
    assert plan.parts["codes while many latents are active"] == entries * 32 * 100
    assert "packed encoder (16 bit)" in plan.parts
    assert "dense gradients while they are" not in plan.parts


def test_the_paper_preset_is_planned_as_its_first_steps_were_measured() -> None:
    sae, train = preset("deepseek_r1_llama_8b_paper").configs()
    plan = plan_memory(sae, train, native=True, pool_bytes=4096 * 4096 * 4)
    table = json.loads((RESULTS / "presets.json").read_text())
    peak = table["presets"]["deepseek_r1_llama_8b_paper"]["peak_bytes"]
    assert sum(plan.parts.values()) == pytest.approx(peak, rel=0.05)


def test_reference_needs_no_packed_encoder() -> None:
    sae = SAEConfig(d_in=8, d_sae=64)
    plan = plan_memory(sae, TrainConfig(), native=False, pool_bytes=0)
    assert not any("packed" in part for part in plan.parts)


def test_a_plan_that_cannot_fit_is_refused_with_numbers() -> None:
    plan = plan_memory(SAEConfig(d_in=4096, d_sae=2**20), TrainConfig(), native=True, pool_bytes=0)
    numbers = r"needs 10\d\.\d+ GiB in memory and 8\.000 GiB is available"
    with pytest.raises(ValueError, match=numbers):
        replace(plan, host_available=8 * 2**30).check()


def test_a_plan_of_unknown_memory_passes() -> None:
    plan = plan_memory(SAEConfig(d_in=4096, d_sae=2**20), TrainConfig(), native=True, pool_bytes=0)
    unknown = replace(plan, host_available=None)
    unknown.check()
    assert "unknown amount" in str(unknown)


def test_nested_dictionaries_have_a_residual_and_a_gradient_each() -> None:
    train = TrainConfig(batch_size=10, grad_acc_steps=3)
    sae = SAEConfig(arch="matryoshka", d_in=16, d_sae=64, matryoshka_prefixes=(4, 64))
    plan = plan_memory(sae, train, native=True, pool_bytes=0)
    assert plan.parts["errors of the nested dictionaries"] == 2 * 3 * 2 * 10 * 16 * 4


@pytest.mark.parametrize(
    ("fields", "changes", "entries"),
    [
        ({}, {"k_anneal_start": 48}, 48),
        ({"multi_topk": True}, {}, 5 * 16),
        ({"multi_topk": True}, {"k_anneal_start": 48}, 5 * 48),
        ({"activation": "abs_topk"}, {}, 2 * 16),
    ],
)
def test_entries_are_those_of_the_widest_code(
    fields: dict[str, Any], changes: dict[str, Any], entries: int
) -> None:
    def needed(sae: SAEConfig, train: TrainConfig) -> int:
        plan = plan_memory(sae, train, native=True, pool_bytes=0)
        return plan.parts["step: batch, residual, code, AuxK"]

    plain = SAEConfig(d_in=16, d_sae=512, k=16)
    train = TrainConfig(batch_size=10)
    more = needed(replace(plain, **fields), replace(train, **changes)) - needed(plain, train)
    assert more == 10 * (entries - 16) * 32


def test_chunked_max_holds_copies_of_the_decoder_and_the_cosines_of_a_chunk() -> None:
    sae = SAEConfig(
        d_in=16,
        d_sae=512,
        decorrelation="chunked_max",
        decorrelation_coeff=1.0,
        decorrelation_chunk=64,
    )
    plan = plan_memory(sae, TrainConfig(), native=True, pool_bytes=0)
    assert plan.parts["decorrelation"] == 4 * (6 * 512 * 16 + 128**2)


def test_available_memory_is_read_from_the_kernel() -> None:
    available = available_memory()
    assert available is None or available > 2**20


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Plan a training on a GPU with 10 GiB free, also without a GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    return TrainConfig(device="cuda", batch_size=4096)


def _plan(train: TrainConfig, **changes: Any) -> MemoryPlan:
    sae = SAEConfig(d_in=4096, d_sae=65536, k=64, aux_k=64)
    return plan_memory(sae, replace(train, **changes), native=True, pool_bytes=2**30)


def test_a_gpu_holds_the_graph_and_the_host_the_batches(on_gpu: TrainConfig) -> None:
    plan = _plan(on_gpu)
    step = plan.parts["gradient rows before the clip"]
    step += plan.parts["step: batch, residual, code, AuxK"]
    assert plan.parts["pool of the CUDA graphs"] == step
    assert plan.parts["batches copied ahead"] == 3 * 4096 * 4096 * 4
    assert plan.parts["batches as stored"] == 2 * 4096 * 4096 * 4
    assert "batches as stored" not in _plan(on_gpu, device_cache=True).parts
    assert plan.parts["parts of the encoder's product"] == 192 * 2**20
    assert plan.parts["rounded copies (16 bit)"] == 65536 * (4096 * 2 + 8)
    assert plan.host_parts == {"activations in memory", "page-locked batches"}
    assert plan.total(host=True) == 2**30 + 2 * 4096 * 4096 * 4
    assert plan.available == 10 * 2**30


@pytest.mark.parametrize("changes", [{"cuda_graph": False}, {"fused": False}])
def test_eager_steps_need_no_pool(on_gpu: TrainConfig, changes: dict[str, Any]) -> None:
    plan = _plan(on_gpu, **changes)
    assert "pool of the CUDA graphs" not in plan.parts
    assert plan.parts["batches copied ahead"] == 2 * 4096 * 4096 * 4


def test_steps_that_wait_for_the_device_need_no_pool(on_gpu: TrainConfig) -> None:
    sae = SAEConfig(arch="gated", d_in=64, d_sae=512)
    plan = plan_memory(sae, on_gpu, native=True, pool_bytes=0)
    assert "pool of the CUDA graphs" not in plan.parts


def test_a_gpu_too_small_is_told_apart_from_the_host(on_gpu: TrainConfig) -> None:
    plan = _plan(on_gpu, batch_size=16384)
    with pytest.raises(ValueError, match=r"needs \d+\.\d+ GiB in memory of cuda and 10\.000 GiB"):
        plan.check()
    assert " in memory of cuda and " in plan.summary()
    assert " planned (largest: " in plan.summary()


_MEASURED = """
import torch
from sae_fast import SAEConfig, TrainConfig, Trainer

def status(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def make(d_sae):
    train = TrainConfig(learning_rate=1e-3, batch_size=512, max_steps=2, fused=False)
    return Trainer(SAEConfig(k=8, d_sae=d_sae), train, torch.randn(2048, 256), show_progress=False)

make(512).train()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
trainer = make(32_768)
trainer.train()
print(sum(trainer.memory_plan.parts.values()), status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_dense_gradients_with_an_optimiser_of_torch_stay_within_the_plan() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURED], capture_output=True, text=True, check=True, timeout=240
    )
    planned, peak = map(int, ran.stdout.split())
    assert 0.6 * planned < peak <= planned


def test_the_plan_of_divided_latents_is_the_one_of_a_part() -> None:
    sae = SAEConfig(d_in=100, d_sae=1001, k=8)
    whole, part = (
        plan_memory(sae, TrainConfig(mesh=mesh), native=True, pool_bytes=7).parts
        for mesh in (None, "latents=2")
    )
    assert part["parameters"] == 4 * (2 * 100 * 501 + 501 + 100)
    assert part["optimiser states"] == 2 * part["parameters"]
    assert part["activations in memory"] == 7
    assert part["step: batch, residual, code, AuxK"] == whole["step: batch, residual, code, AuxK"]
