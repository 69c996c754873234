"""Checks, without a GPU, of code that only a GPU runs."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from sae_fast.ops.checks import check_half_sums
from sae_fast.ops.registry import OPS

SOURCES = sorted(Path(__file__).parents[2].glob("csrc/ops/*_cuda.cpp"))
FUNCTION = re.compile(r'constexpr const char\* kOp = "(\w+)";(.*?)\n}\n', re.DOTALL)
DEVICES = re.compile(r"check_same_device\(\s*kOp,(.*?)\}\}\);", re.DOTALL)
LISTED = re.compile(r'\{"(\w+)", \w+')
NOT_LISTED = {"packed"}  # must be empty on CUDA
# They share a function that checks, or have one tensor.
ELSEWHERE = {
    *("encode_topk", "encode_batch_topk", "encode_threshold", "pack_encoder"),
    *("decorrelation", "code_correlation", "normalize_rows_", "full_batches"),
}


def device_checks():
    """Yield each op that lists its tensors itself, and their names in the list."""
    for source in SOURCES:
        for name, body in FUNCTION.findall(source.read_text()):
            if name in OPS and (check := DEVICES.search(body)):
                yield name, LISTED.findall(check[1])


def test_every_op_checks_devices():
    assert {name for name, _ in device_checks()} == OPS.keys() - ELSEWHERE


@pytest.mark.parametrize(("name", "listed"), [*device_checks()])
def test_every_tensor_must_be_on_the_device_of_the_others(name, listed):
    schema = getattr(torch.ops.sae_fast, name).default._schema
    tensors = {item.name for item in schema.arguments if "Tensor" in str(item.type)}
    assert set(listed) == tensors - NOT_LISTED


def test_messages_that_are_not_of_cuda_alone_are_shared_with_the_cpu():
    """The tests of wrong arguments expect one text on every device."""
    texts = [re.findall(r'": (\w+ [^"]*)"', source.read_text()) for source in SOURCES]
    assert {text.strip() for found in texts for text in found} == {
        "at most",
        "dense must have at most",
        "rows must have at most",
        "packed must be empty on CUDA, got",
        "stats must come with rounded, got none",
        "rounded must be bfloat16 or float16, got",
    }


@pytest.mark.parametrize("allowed", [False, True])
def test_sums_in_float16_are_refused(allowed):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = allowed
    try:
        check_half_sums("decorrelation", torch.device("cpu"))
        if allowed:
            with pytest.raises(RuntimeError, match="allow_fp16_accumulation must be False"):
                check_half_sums("decorrelation", torch.device("cuda"))
        else:
            check_half_sums("decorrelation", torch.device("cuda"))
    finally:
        matmul.allow_fp16_accumulation = before


def test_the_mode_that_forbids_waiting_ends_with_its_block(no_waiting, monkeypatch):
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with no_waiting():
        assert modes == ["error"]
    assert modes == ["error", "default"]
