"""Statistics, floors and the protocol between processes."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.quality import Quality, what_is_wrong
from benchmarks.support import machine
from benchmarks.support.floors import Rates, step_floor
from benchmarks.support.groups import (
    Comparison,
    Outcome,
    record_first_loss,
    run_groups,
    split_groups,
)
from benchmarks.support.peer_process import PeerProcess
from benchmarks.support.problem import parse_size
from benchmarks.support.step_report import report, size_result
from benchmarks.support.timing import (
    Sample,
    calls_per_sample,
    interleave,
    median_ratio,
    summarize,
)

LOCAL_LOOP = "benchmarks.baselines.local_loop"


def samples(*seconds, others=0.0):
    return [Sample(value, value, others) for value in seconds]


def test_ratio_is_taken_round_by_round():
    slow, fast = samples(2.0, 20.0, 8.0), samples(1.0, 5.0, 1.0)
    assert median_ratio(slow, fast) == 4.0


def test_busy_rounds_are_left_out_when_enough_quiet_ones_remain():
    mixed = samples(1.0, 1.0, 1.0) + samples(9.0, 9.0, 9.0, others=1.0)
    summary = summarize(mixed)
    assert (summary.median, summary.maximum, summary.quiet_rounds) == (1.0, 9.0, 3)


def test_all_rounds_count_when_few_are_quiet():
    assert summarize(samples(1.0) + samples(9.0, 9.0, others=1.0)).median == 9.0


def test_every_implementation_is_sampled_in_every_round():
    order = []

    def sampler(name):
        return lambda: order.append(name) or Sample(1.0, 1.0, 0.0)

    taken = interleave({name: sampler(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(series) for name, series in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_no_round_begins_after_the_deadline_but_the_first_three():
    taken = interleave({"a": lambda: Sample(1.0, 1.0, 0.0)}, rounds=9, deadline=0.0)
    assert len(taken["a"]) == 3
    assert interleave({}, rounds=9) == {}


def test_samples_on_a_gpu_hold_as_many_calls_as_make_them_long():
    cuda = torch.device("cuda")
    seconds = (1.0, 0.01, 0.001, 1e-6)
    assert [calls_per_sample(s, cuda) for s in seconds] == [1, 2, 20, 32]
    assert calls_per_sample(1e-6, torch.device("cpu")) == 1


def test_floor_adds_product_gathers_and_optimizer(tiny):
    rates = Rates(1e9, "test", gather_latents=1e9, gather_tokens=2e9, stream=4e9)
    floor = step_floor(tiny, "screened", rates)
    rows = tiny.n_tokens * tiny.k * tiny.d_in * 4
    assert floor.product == pytest.approx(2 * 64 * 32 * 128 / 1e9)
    assert floor.gathers == pytest.approx(2 * rows / 1e9 + 2 * rows / 2e9)
    assert floor.optimizer == pytest.approx(25 * 2 * 32 * 128 / 4e9)
    assert floor.total == pytest.approx(floor.product + floor.gathers + floor.optimizer)
    assert step_floor(tiny, "bf16", rates).gathers < floor.gathers


def test_a_size_that_is_none_is_named():
    with pytest.raises(ValueError, match="got '1x2'"):
        parse_size("1x2")


def test_groups_hold_each_implementation_once_and_fit_in_memory(tiny, monkeypatch):
    local, peers = ["eager", "tuned", "gather"], {"sparsify": "python"}
    comparison = Comparison(tiny, ["sae_fast"], local, peers, rounds=1, warmup=1, threads=1)
    assert split_groups(comparison) == [["eager", "tuned", "gather", "sparsify"]]
    monkeypatch.setattr("benchmarks.support.groups.available_bytes", lambda device: 0)
    assert split_groups(comparison) == [["eager"], ["tuned"], ["gather"], ["sparsify"]]


def test_another_loss_at_step_0_is_an_error():
    outcomes = {"sae_fast": Outcome(100.0)}
    record_first_loss(outcomes, "eager", 100.001)
    record_first_loss(outcomes, "eager_bf16", 101.0)
    with pytest.raises(RuntimeError, match=r"tuned: loss at step 0 is 101\.0, expected 100\.0"):
        record_first_loss(outcomes, "tuned", 101.0)
    with pytest.raises(RuntimeError, match="gather"):
        record_first_loss(outcomes, "gather", float("nan"))


@pytest.mark.slow
def test_a_failing_implementation_is_left_out_and_the_others_are_timed(tiny):
    size = dataclasses.replace(tiny, k=1000)
    failing = Comparison(size, ["sae_fast"], ["eager"], {}, rounds=1, warmup=1, threads=1)
    outcomes = run_groups(failing)
    assert all(outcome.failure and not outcome.samples for outcome in outcomes.values())
    assert "k must be at most d_sae" in outcomes["sae_fast"].failure
    comparison = Comparison(tiny, ["sae_fast"], ["eager", "compile"], {}, 1, 1, 1, deadline=0.0)
    outcomes = run_groups(comparison)
    assert outcomes["sae_fast"].samples
    assert {outcomes[name].failure for name in ("eager", "compile")} == {"no time left"}


def measured(name, seconds, peak, sae_fast_samples):
    return Outcome(
        10.0, samples(*seconds), {n: samples(*s) for n, s in sae_fast_samples.items()}, peak
    )


def test_tables_of_a_gpu_take_times_from_graphs_and_name_what_did_not_run(tiny):
    graph = {"sae_fast_graph": [1.0, 1.0, 1.0]}
    outcomes = {
        "sae_fast": measured("sae_fast", [2.0, 2.0, 2.0], 2**30, graph),
        "sae_fast_graph": measured("sae_fast_graph", [1.0, 1.0, 1.0], 2**31, graph),
        "eager_bf16": measured("eager_bf16", [6.0, 6.0, 6.0], 2**32, graph),
        "eager": Outcome(failure="out of memory"),
    }
    rates = Rates(1e9, "test", gather_latents=1e9, gather_tokens=2e9, stream=4e9)
    by_mode = dict.fromkeys(("screened", "bf16"), rates)
    floors = {mode: step_floor(tiny, mode, rates) for mode in by_mode}
    result = size_result(tiny, outcomes, by_mode, floors)
    machine_facts = {**machine.describe_machine(), "gpu": "A GPU", "gpu_memory_gib": 1}
    clocks = {"driver_version": "1", "cuda": "13.0", "clocks_sm": "2", "clocks_max_sm": "3"}
    facts = {"machine": machine_facts | clocks, "command": "c", "missing": ["openai"]}
    text = report({"G": {**result, **facts}})
    assert "| G | sae_fast, default, CUDA graph | 1000 | 6.00× | - | - | - | 2.00 |" in text
    assert "| PyTorch eager, dense, fused Adam, fp32 | did not run: out of memory |" in text
    assert "Not installed, so not measured: openai." in text
    assert "A GPU, 1 GiB, driver 1, CUDA 13.0, SM clock 2 of 3" in text


def test_repeated_trainings_must_end_with_the_same_bits_and_others_near():
    once = Quality("sae_fast", 0, 0.200, 0.0, 4.0, 1.0, 1.0, "a")
    again = dataclasses.replace(once, trainer="sae_fast, again")
    on_cuda = dataclasses.replace(once, trainer="sae_fast --device cuda", fvu=0.201, digest="b")
    assert what_is_wrong([once, again, on_cuda], 0.01) == []
    other_bits = dataclasses.replace(again, digest="c")
    (line,) = what_is_wrong([once, other_bits], 0.01)
    assert "sae_fast ended with other parameters" in line
    (line,) = what_is_wrong([once, dataclasses.replace(on_cuda, fvu=0.21)], 0.01)
    assert "is +5.00% from that of sae_fast, more than 1.00%" in line


def test_commands_are_recorded_without_paths(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--json", "/a/b/c.json", "--peer-python", "p=/d/python"])
    monkeypatch.setenv("SAE_FAST_ISA", "avx2")
    command = machine.command_line("benchmarks.x")
    assert command == (
        "SAE_FAST_ISA=avx2 python -m benchmarks.x --json c.json --peer-python p=python"
    )


@pytest.mark.slow
def test_an_implementation_steps_in_a_process_of_its_own(tiny):
    with PeerProcess("eager", LOCAL_LOOP, sys.executable, tiny, 2, 1) as process:
        taken = [process.step(count) for count in (1, 3, 2)]
    assert all(sample.seconds > 0 for sample in taken)
    assert process.process.returncode == 0
    assert "torch" in process.versions


@pytest.mark.slow
def test_the_end_of_the_errors_of_a_failing_implementation_is_shown(tiny):
    impossible = dataclasses.replace(tiny, k=1000)
    with PeerProcess("eager", LOCAL_LOOP, sys.executable, impossible, 1, 1) as process:
        with pytest.raises(RuntimeError, match=r"eager stopped(.|\n)*out of range"):
            process.step()
        assert process.process.returncode != 0
