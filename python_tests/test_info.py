"""python -m sae_fast.info: its report, with compiled kernels and with the reference."""

import os

import pytest
import torch
import warm_python

import sae_fast
from sae_fast import info


def run_info(**environment):
    done = warm_python.run(["-m", "sae_fast.info"], env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def facts(report):
    """Return the report's lines as name: value."""
    pairs = (line.split("  ", 1) for line in report.splitlines())
    return {name.strip(): value.strip() for name, value in pairs if name}


def test_the_report_names_versions_and_threads():
    report = facts(info.describe())
    assert report["torch"] == torch.__version__
    assert report["sae_fast"].startswith(sae_fast.__version__)
    assert report["threads"].startswith(f"{torch.get_num_threads()} ")
    assert {"python", "numpy", "h5py", "CPU"} <= report.keys()


@pytest.mark.skipif(sae_fast.build_info()["backend"] != "native", reason="no compiled module")
def test_the_report_names_the_instruction_set_in_use():
    built = sae_fast.build_info()
    report = facts(info.describe())
    assert report["instruction set"].split()[0] == built["instruction_set"]
    assert built["instruction_set"] in built["available_instruction_sets"]
    assert set(built["available_instruction_sets"]) <= set(built["instruction_sets"])
    assert report["kernels"] == f"compiled by {built['compiler']} against torch {built['torch']}"
    assert bool(built["cuda"]) != bool(built["why_no_cuda"])


@pytest.mark.slow
@pytest.mark.skipif(sae_fast.build_info()["backend"] != "native", reason="no compiled module")
def test_an_instruction_set_can_be_chosen():
    assert facts(run_info(SAE_FAST_ISA="portable"))["instruction set"].startswith("portable ")


@pytest.mark.slow
def test_the_reference_says_so_and_why():
    report = facts(run_info(SAE_FAST_NATIVE="0"))
    assert report["kernels"].startswith("pure-PyTorch reference")
    assert report["kernels"].endswith("SAE_FAST_NATIVE=0 is set")


def test_a_cpu_build_of_torch_is_the_reason_for_no_device(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert facts(info.describe())["CUDA devices"] == "none: the installed torch is a CPU build"


def test_cuda_devices_are_listed(monkeypatch):
    class Device:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    assert facts(info.describe())["cuda:0"] == "Some GPU, sm_90, 80.0 GiB"
