"""The CUDA encoder without a GPU: kernels registered, shapes of the outputs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sae_fast
from sae_fast.ops.registry import NATIVE, OPS

PRECISIONS = {
    "screened": torch.bfloat16,
    "fp32": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
needs_cuda_build = pytest.mark.skipif(
    not sae_fast.build_info().get("cuda_architectures"), reason="built without CUDA"
)


@pytest.mark.skipif(not NATIVE, reason="the reference packs nothing")
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS.items())
def test_packed_encoder_has_the_shapes_of_its_device(precision, dtype):
    with FakeTensorMode():
        W_enc = torch.empty(130, 12, device="cuda")
        packed, stats, rounded = torch.ops.sae_fast.pack_encoder(W_enc, precision)
    assert (packed.shape, packed.dtype) == ((0,), torch.int16)
    assert (stats.shape, stats.dtype) == ((2, 130), torch.float32)
    assert (rounded.shape, rounded.dtype) == ((130, 12), dtype)
    assert packed.device == stats.device == rounded.device == W_enc.device


def test_topk_code_has_its_shapes_on_the_device_of_x():
    with FakeTensorMode():
        x, W_enc = torch.empty(7, 12, device="cuda"), torch.empty(130, 12, device="cuda")
        b_enc, b_dec = torch.empty(130, device="cuda"), torch.empty(12, device="cuda")
        dead = torch.empty(130, dtype=torch.bool, device="cuda")
        operands = (x, W_enc, b_enc, b_dec)
        op = torch.ops.sae_fast.encode_topk
        outputs = op(*operands, 5, "screened", dead, 3, None, None, None)
    assert [tuple(output.shape) for output in outputs] == [(7, 5), (7, 5), (7, 3), (7, 3)]
    assert [output.dtype for output in outputs] == [torch.float32, torch.int32] * 2
    assert {output.device for output in outputs} == {x.device}


def test_batch_topk_code_has_its_shapes_on_the_device_of_x():
    with FakeTensorMode():
        x, W_enc = torch.empty(7, 12, device="cuda"), torch.empty(130, 12, device="cuda")
        b_enc, b_dec = torch.empty(130, device="cuda"), torch.empty(12, device="cuda")
        dead = torch.empty(130, dtype=torch.bool, device="cuda")
        operands = (x, W_enc, b_enc, b_dec)
        op = torch.ops.sae_fast.encode_batch_topk
        outputs = op(*operands, 5, "screened", dead, 3, None, None, None)
    assert [tuple(output.shape) for output in outputs] == [(35,), (35,), (8,), (7, 3), (7, 3)]
    dtypes = [torch.float32, torch.int32, torch.int64, torch.float32, torch.int32]
    assert [output.dtype for output in outputs] == dtypes
    assert {output.device for output in outputs} == {x.device}


@needs_cuda_build
@pytest.mark.parametrize("name", OPS)
def test_op_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sae_fast::{name}", "CUDA")
