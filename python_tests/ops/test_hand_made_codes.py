"""Codes made by a caller: inconsistent ones are refused, in eager mode and compiled."""

import re

import pytest
import torch

from sae_fast.ops import SparseCode, reconstruct_prefixes

OUT_OF_RANGE = "SparseCode: indices must be in [0, 4), got "
OFFSETS = "SparseCode: offsets must ascend from 0 to the number of entries, 8, got "


def flat(offsets, index=0):
    indices = torch.zeros(8, dtype=torch.int32)
    indices[3] = index
    return SparseCode(torch.ones(8), indices, 4, torch.tensor(offsets))


USES = {
    "dense": lambda code: code.dense(),
    "fired": lambda code: code.fired(),
    "spread": lambda code: code.spread(torch.ones(4)),
}


@pytest.mark.parametrize("index", [-1, 4, 7_000_000])
@pytest.mark.parametrize("use", USES)
def test_an_index_outside_the_dictionary_is_refused(use, index):
    with pytest.raises(RuntimeError, match=re.escape(f"{OUT_OF_RANGE}{index}")):
        USES[use](flat([0, 5, 8], index))


@pytest.mark.parametrize("offsets", [[0, 50_000, 8], [1, 8], [0, 9], [0, -1, 8]])
def test_offsets_that_do_not_partition_the_entries_are_refused(offsets):
    for use in (USES["dense"], SparseCode.entry_rows, SparseCode.l0):
        with pytest.raises(RuntimeError, match=re.escape(OFFSETS)):
            use(flat(offsets))


def test_offsets_of_absurd_size_are_refused():
    code = SparseCode(
        torch.ones(8), torch.zeros(8, dtype=torch.int32), 4, torch.zeros(1).long().expand(2**50)
    )
    with pytest.raises(
        RuntimeError, match=f"SparseCode: at most {2**31 - 1} rows, got {2**50 - 1}"
    ):
        code.l0()


def test_prefixes_of_no_columns_have_gradients():
    values = torch.ones(8, requires_grad=True)
    code = SparseCode(values, torch.zeros(8, dtype=torch.int32), 4, torch.tensor([0, 3, 8]))
    W_dec = torch.ones(4, 0, requires_grad=True)
    result = reconstruct_prefixes(code, W_dec, torch.ones(0), torch.ones(2, 0), [2, 4])
    result.squared_errors.sum().backward()
    assert not values.grad.any()


def test_spread_wants_a_number_for_every_latent():
    with pytest.raises(RuntimeError, match=re.escape("numbers must have shape [4], got [5]")):
        flat([0, 8]).spread(torch.ones(5))


@pytest.mark.parametrize("use", ["dense", "fired"])
def test_a_compiled_program_refuses_as_an_eager_one(use):
    def program(values, indices):
        return USES[use](SparseCode(values, indices, 4)) * 2

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    values, indices = torch.ones(6, 2), torch.ones(6, 2, dtype=torch.int32)
    assert torch.equal(compiled(values, indices), program(values, indices))
    with pytest.raises(RuntimeError, match=re.escape(f"{OUT_OF_RANGE}9")):
        compiled(values, 9 * indices)


def test_a_compiled_program_refuses_offsets():
    def program(values, indices, offsets):
        return SparseCode(values, indices, 4, offsets).dense()

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    values, indices = torch.ones(8), torch.zeros(8, dtype=torch.int32)
    right = torch.tensor([0, 3, 8])
    assert torch.equal(compiled(values, indices, right), program(values, indices, right))
    with pytest.raises(RuntimeError, match=re.escape(OFFSETS)):
        compiled(values, indices, torch.tensor([0, 50_000, 8]))
