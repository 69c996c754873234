import re

import pytest
import torch
from op_samples import samples, samples_on
from torch import Tensor

from sae_fast.ops.registry import OPS, op_table

pytestmark = pytest.mark.usefixtures("ops_on_device")

SAMPLES = [pytest.param(name, case, id=f"{name}-{case}") for name, case, _ in samples()]
DIFFERENTIABLE = (
    *("encode_topk", "encode_threshold", "decode", "reconstruct", "decorrelation"),
    "code_correlation",
)
ROOM_LEFT = "row_gradient_norm"  # one of its results has rows that are not written on CUDA
WITHOUT_DERIVATIVE = (
    *("pack_encoder", "decode_backward", "accumulate_rows", "code_correlation_backward"),
    *("dense_product", "code_gradients", "weighted_row_sum"),
)


def one_of_each(leave_out):
    """Return the first sample of every other op in every layout, because tracing is slow."""
    found = {(name, "csr" in case): (name, case) for name, case, _ in reversed([*samples()])}
    found = {key: sample for key, sample in found.items() if sample[0] != leave_out}
    return [pytest.param(*sample, id=f"{sample[0]}-{csr}") for (_, csr), sample in found.items()]


def overload(name):
    return getattr(torch.ops.sae_fast, name).default


def with_grad(name, arguments):
    """Return the arguments as in a training step: differentiable ones require a gradient."""
    if name not in DIFFERENTIABLE:
        return arguments
    return tuple(
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    )


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", OPS)
def test_schema_is_the_one_in_the_list(name):
    written = torch._C.parse_schema(f"sae_fast::{OPS[name].schema}")
    assert str(overload(name)._schema) == str(written)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_every_op_has_samples():
    assert {name for name, _, _ in samples()} == OPS.keys()


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_table_of_ops_has_a_line_and_a_sentence_for_each():
    lines = op_table().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == [*OPS]
    for line in lines:
        assert re.match(r"\| `\w+`: [A-Z][^|]*\w[^|]* \|", line.replace("\\|", "/")), line


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_table_of_ops_states_shapes_and_dtypes():
    (line,) = [line for line in op_table().splitlines() if "`decode`:" in line]
    assert "`indices [N, K] or [E] int32`; `offsets [N+1] int64`, optional" in line
    assert line.endswith("| `x_hat [N, D]` |")


@pytest.mark.parametrize(("name", "case"), SAMPLES)
def test_op_passes_opcheck(name, case, device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = with_grad(name, samples_on(device)[name, case])
    torch.library.opcheck(overload(name), arguments, test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), one_of_each(leave_out=ROOM_LEFT))
def test_op_passes_opcheck_when_traced_with_dynamic_shapes(name, case, device):
    check = "test_aot_dispatch_dynamic"
    arguments = with_grad(name, samples_on(device)[name, case])
    torch.library.opcheck(overload(name), arguments, test_utils=check)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for name, case, _ in samples() if name == ROOM_LEFT])
def test_rows_that_an_op_has_written_are_equal_when_it_is_traced(case, device):
    """On CUDA `cached` has room for more rows than are written; what is there is of chance."""

    def written(*arguments):
        squared_norm, sums, cached, slots = overload(ROOM_LEFT)(*arguments)
        kept = (slots >= 0).unsqueeze(1)
        rows = cached.index_select(0, slots.clamp_min(0)) if len(cached) else cached.sum()
        return squared_norm, sums, slots, torch.where(kept, rows, 0.0)

    arguments = samples_on(device)[ROOM_LEFT, case]
    traced = torch.compile(written, backend="aot_eager", dynamic=True)
    for result, wanted in zip(traced(*arguments), written(*arguments), strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize(("name", "case"), SAMPLES)
def test_result_is_no_view_of_an_argument(name, case, device):
    arguments = samples_on(device)[name, case]
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, Tensor)}
    outputs = overload(name)(*arguments)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        if output is not None and output.numel() > 0:
            assert output.untyped_storage().data_ptr() not in given


@pytest.mark.parametrize(
    ("name", "case"),
    [parameter for parameter in SAMPLES if parameter.values[0] in WITHOUT_DERIVATIVE],
)
def test_backward_through_an_op_without_derivative_is_refused(name, case, device):
    arguments = [
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in samples_on(device)[name, case]
    ]
    outputs = overload(name)(*arguments)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    if not output.is_floating_point():  # the packed encoder may be of integers
        output = outputs[1]
    with pytest.raises(RuntimeError, match=f"{name}: has no derivative"):
        output.sum().backward()
