"""Every wrong argument is a RuntimeError with one text in compiled ops and reference."""

import re

import pytest
import torch
from op_samples import ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from wrong_arguments import (
    ARGUMENTS,
    CODE,
    DATA,
    DTYPES,
    ENTRIES,
    LISTS,
    OFFSETS,
    PROBLEM,
    RANGES,
    SHAPES,
)

import sae_fast.ops as public
from sae_fast.ops.registry import OPS

pytestmark = pytest.mark.usefixtures("ops_on_device")


def table(rows):
    return [
        pytest.param(op, {name: value}, message, id=f"{op}-{name}-{number}")
        for op, cases in rows.items()
        for number, (name, value, message) in enumerate(cases)
    ]


def call(op, changes):
    return getattr(ops, op)(*(ARGUMENTS[op] | changes).values())


@pytest.mark.parametrize("op", ARGUMENTS)
def test_arguments_of_the_table_are_right(op):
    call(op, {})


@pytest.mark.parametrize(
    ("op", "changes", "message"), table(SHAPES) + table(DTYPES) + table(RANGES)
)
def test_wrong_argument_is_named(op, changes, message):
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
        call(op, changes)


def declared_tensors():
    """Yield every op's tensors with a declared shape, for which one more axis is wrong."""
    for op, given in ARGUMENTS.items():
        for name, form in OPS[op].forms.items():
            any_shape = form.is_opaque or form.sizes == ("any",)
            if not any_shape and given[name] is not None:
                yield op, name


@pytest.mark.parametrize(("op", "name"), list(declared_tensors()))
def test_every_tensor_of_one_axis_too_many_is_named(op, name):
    wrong = ARGUMENTS[op][name][None]
    with pytest.raises(RuntimeError, match=f"^{op}: {name} must have "):
        call(op, {name: wrong})


def needed_tensors():
    for op, given in ARGUMENTS.items():
        if sum(isinstance(value, Tensor) for value in given.values()) == 1:
            continue  # without it the ops cannot know that only shapes are computed
        for argument in getattr(torch.ops.sae_fast, op).default._schema.arguments:
            if str(argument.type) == "Tensor":
                yield op, argument.name


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # torch lets None pass for a tensor
@pytest.mark.parametrize(("op", "name"), list(needed_tensors()))
def test_none_for_a_tensor_is_an_error_where_only_shapes_are_computed(op, name):
    arguments = {
        key: value.to("meta") if isinstance(value, Tensor) else value
        for key, value in (ARGUMENTS[op] | {name: None}).items()
    }
    with pytest.raises(RuntimeError, match=f"{op}: {name} must be a tensor, got None"):
        getattr(ops, op)(*arguments.values())


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # fake tensors
@pytest.mark.parametrize(
    ("op", "changes", "message"), table(SHAPES) + table(DTYPES) + table(RANGES)
)
def test_wrong_argument_is_named_while_tracing(op, changes, message):
    with FakeTensorMode() as mode:
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in (ARGUMENTS[op] | changes).items()
        }
        with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
            getattr(ops, op)(*arguments.values())


# On CUDA values are not checked, because that would synchronise.
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize(("op", "changes", "message"), DATA)
def test_index_outside_the_dictionary_is_named(op, changes, message):
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
        call(op, changes)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize(("name", "bound"), [("rows", 4), ("places", 3)])
@pytest.mark.parametrize("outside", [-1, 4])
def test_row_outside_the_table_is_named(name, bound, outside):
    message = f"gather_rows_: {name} must be in [0, {bound}), got {outside}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call("gather_rows_", {name: torch.tensor([1, outside])})


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("op", ["gather_entries", "latent_sums"])
@pytest.mark.parametrize("entry", [-1, 12])
def test_entry_outside_the_code_is_named(op, entry):
    entries = ENTRIES.clone()
    entries[1] = entry
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: entries must be in [0, 12), got")):
        call(op, {"entries": entries})


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_latent_offsets_that_do_not_partition_the_entries_are_refused():
    message = "latent_sums: latent_offsets must ascend from 0 to the number of entries"
    with pytest.raises(RuntimeError, match=message):
        call("latent_sums", {"latent_offsets": LISTS[0] + 1})


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize(("offsets", "got"), OFFSETS)
def test_offsets_that_do_not_partition_the_entries_are_refused(offsets, got):
    flat = {"values": CODE.values.flatten(), "indices": CODE.indices.flatten(), "offsets": offsets}
    message = f"decode: offsets must ascend from 0 to the number of entries, 12, got {got}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call("decode", flat)


def test_factored_gradient_of_a_computed_matrix_is_refused(device):
    problem = PROBLEM.to(device)
    W_dec = (2 * problem.W_dec).requires_grad_() * 1.0
    code = public.encode_topk(*problem.encoder, 3)
    with pytest.raises(RuntimeError, match="decode: W_dec must be a leaf tensor"):
        public.decode(code, W_dec, dense_grad=False)


def test_wrapper_passes_the_message_on(device):
    with pytest.raises(RuntimeError, match=r"encode_topk: k must be in \[1, d_sae\]"):
        public.encode_topk(*PROBLEM.to(device).encoder, 0)


def test_copy_of_another_encoder_is_refused():
    copies = ops.pack_encoder(torch.zeros(200, 6), "screened")
    if not any(copy.numel() for copy in copies):
        pytest.skip("the reference has no packed encoder")
    message = r"encode_topk: (packed|stats|rounded) must have shape"
    with pytest.raises(RuntimeError, match=message):
        call("encode_topk", dict(zip(("packed", "stats", "rounded"), copies, strict=True)))
