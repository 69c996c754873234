"""The number of nodes of a step's CUDA graph, which is counted without a GPU."""

import pytest

from benchmarks.step_nodes import Limit, chunks, count_nodes, own_and_other, read_limits
from benchmarks.support.problem import parse_size

G1 = parse_size("G1")


# At most, of this package without the encoder's chunks, and of PyTorch. A step that needs more has
# gained kernels that cost a GPU more time than their work.
@pytest.mark.parametrize(
    ("kind", "own", "other"), [("topk", 31, 5), ("topk with AuxK", 46, 55), ("jumprelu", 43, 115)]
)
def test_a_step_has_few_nodes(kind, own, other):
    found = own_and_other(count_nodes(kind, G1))
    assert found[0] <= own
    assert found[1] <= other


def test_a_step_without_dead_latents_has_forty_nodes():
    assert count_nodes("topk", G1).total() <= 40


def test_a_step_with_dead_latents_has_ninety_six_nodes():
    assert count_nodes("topk with AuxK", G1).total() <= 96


def test_every_op_of_a_step_is_counted():
    nodes = count_nodes("topk", G1)
    assert nodes["reconstruct"] == 1
    assert nodes["fused_update_"] == 2
    assert nodes["select_topk"] == nodes["product of a chunk"] == 2
    assert nodes["batch_statistics"] == nodes["finish_step_"] + 1 == 2


def test_limits_are_read_from_the_tests_of_the_emulated_kernels():
    limits = read_limits()
    assert limits["row_gradient_norm"] == Limit(kernels=3, fills=0)
    assert limits["latent_major"].nodes == 3 + 1


def test_chunks_are_the_ones_of_the_encoders_plan():
    assert [chunks(parse_size(name)) for name in ("G1", "G2", "G3")] == [2, 6, 22]
