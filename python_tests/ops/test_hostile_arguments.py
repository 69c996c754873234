"""Arguments that are consistent in shape and dtype but not in memory, size or content: refused."""

import re

import pytest
import torch
import warm_python
from op_samples import NO_COPY, make_code, make_problem, place, samples_on, update_arguments
from op_samples import in_latent_major as lists_of
from torch import Tensor

from sae_fast import ops as public
from sae_fast.ops.registry import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE, reason="the reference is made of torch's own ops")

ops = torch.ops.sae_fast
MOST = 2**31 - 1
PROBLEM = make_problem(8, 6, 20)
CODE = make_code(8, 20, 3)


def update(**changes):
    """Return the arguments of fused_update_ with some of them replaced."""
    lists = lists_of(CODE, 20)
    arguments = list(update_arguments(*lists, PROBLEM.x, None, None, None, PROBLEM.W_dec))
    for name, value in changes.items():
        arguments[place("fused_update_", name)] = value
    return arguments


def refused(message):
    return pytest.raises(RuntimeError, match=f"^{re.escape(message)}")


@pytest.mark.parametrize("slot", [-2, 0, 1_000_000_000])
def test_slots_outside_the_cache_are_refused(slot):
    slots = torch.full((20,), -1, dtype=torch.int32)
    slots[7] = slot
    message = f"fused_update_: cache_slots must be in [-1, 0), got {slot}"
    with refused(message):
        ops.fused_update_(*update(cache_slots=slots, cached=torch.zeros(0, 6)))


@pytest.mark.parametrize("op", sorted({op for op, _ in samples_on(torch.device("cpu"))}))
def test_a_tensor_whose_storage_was_freed_is_refused(op):
    arguments = next(a for (name, _), a in samples_on(torch.device("cpu")).items() if name == op)
    names = [argument.name for argument in getattr(ops, op).default._schema.arguments]
    for number, argument in enumerate(arguments):
        if not isinstance(argument, Tensor) or argument.numel() == 0:
            continue
        freed = argument.clone()
        freed.untyped_storage().resize_(argument.element_size() * (argument.numel() - 1))
        changed = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        changed[number] = freed
        name = names[number]
        with refused(f"{op}: {name} must have a storage of at least "):
            getattr(ops, op)(*changed)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("latent_major", (*CODE, 2**62), f"d_sae must be at most {MOST - 1}, got {2**62}"),
        (
            "accumulate_rows",
            (*CODE, PROBLEM.x, 2**40),
            f"d_sae must be at most {MOST - 1}, got {2**40}",
        ),
        (
            "latent_major",
            (torch.ones(2**50, 0), torch.ones(2**50, 0, dtype=torch.int32), None, 3),
            f"at most {MOST} rows, got {2**50}",
        ),
        (
            "decode",
            (
                torch.ones(1).expand(2**40),
                torch.ones(1, dtype=torch.int32).expand(2**40),
                torch.tensor([0, 2**40]),
                PROBLEM.W_dec,
                None,
            ),
            f"at most {MOST} entries, got {2**40}",
        ),
        (
            "encode_threshold",
            (torch.ones(2**50, 0), torch.ones(8, 0), *map(torch.ones, (8, 0, 8)), "fp32", *NO_COPY),
            f"x must have at most {MOST} rows, got {2**50}",
        ),
        (
            "gather_entries",
            (torch.ones(1).expand(2**50), torch.zeros(3, dtype=torch.int32)),
            "out of memory for its results, scratch space or contiguous copies of its arguments",
        ),
    ],
)
def test_absurd_sizes_are_refused(op, arguments, message):
    with refused(f"{op}: {message}"):
        getattr(ops, op)(*arguments)


@pytest.mark.filterwarnings(
    "ignore"
)  # a warning of torch: quantised and CSR tensors may be removed
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Tensor.to_sparse, "sparse_coo"),
        (Tensor.to_sparse_csr, "sparse_csr"),
        (Tensor.to_mkldnn, "_mkldnn"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(change, kind):
    with refused(f"decode: W_dec must be a dense tensor, got {kind}"):
        ops.decode(*CODE, change(PROBLEM.W_dec), None)


def test_no_columns_cost_no_time_for_any_number_of_rows():
    assert ops.decode(
        torch.ones(2**30, 0), torch.ones(2**30, 0, dtype=torch.int32), None, torch.ones(3, 0), None
    ).shape == (2**30, 0)
    ops.normalize_rows_(torch.ones(2**50, 0))
    assert ops.decorrelation(torch.ones(2**50, 0))[0] == 0


def test_many_latents_that_are_not_finite_do_not_outgrow_the_candidates():
    W_enc = torch.randn(1400, 16)
    outliers = torch.arange(1400) % 7 < 3
    W_enc[outliers] = torch.nan
    code = public.encode_topk(torch.zeros(16, 16), W_enc, torch.zeros(1400), torch.zeros(16), 8)
    expected = outliers.nonzero().flatten()[:8]
    assert (code.indices == expected).all()
    assert code.values.isnan().all()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "dense", "extra_grad"])
def test_an_update_of_overlapping_tensors_is_refused(name):
    arguments = update()
    W = arguments[0]
    arguments[place("fused_update_", name)] = W if name != "dense" else W[:8]
    with refused(f"fused_update_: W is changed in place and must share no memory with {name}"):
        ops.fused_update_(*arguments)


def test_rows_are_not_gathered_into_their_own_source():
    table = torch.randn(6, 4)
    with refused("gather_rows_: out is changed in place and must share no memory with source"):
        public.gather_rows_(table[:3], table, torch.tensor([5, 4, 0]))
    public.gather_rows_(table[:3], table[3:], torch.tensor([2, 1, 0]))


def test_places_that_are_there_twice_are_refused():
    rows, places = torch.tensor([0, 1, 2]), torch.tensor([4, 0, 4])
    with refused("gather_rows_: places must all be different, got 4 twice"):
        public.gather_rows_(torch.zeros(5, 4), torch.randn(6, 4), rows, places=places)


def test_copies_of_the_encoder_come_together():
    packed, stats, rounded = ops.pack_encoder(PROBLEM.W_enc, "bf16")
    start = (*PROBLEM.encoder, 3, "bf16", None, 0)
    with refused("encode_topk: packed, stats and rounded must be given together"):
        ops.encode_topk(*start, packed, stats, None)
    with refused("fused_update_: packed and stats must be given with each other and rounded"):
        ops.fused_update_(*update(packed=packed, precision="bf16"))
    with refused("fused_update_: rounded must be float16, got bfloat16"):
        ops.fused_update_(*update(rounded=rounded, precision="fp16"))
    with refused("fused_update_: precision must be bf16 or fp16 where rounded is given alone"):
        ops.fused_update_(*update(rounded=torch.zeros(20, 6), precision="fp32"))


@pytest.mark.slow
def test_a_daemon_thread_that_computes_does_not_disturb_the_end():
    code = (
        "import threading, torch\n"
        "from sae_fast import ops\n"
        "x, W = torch.randn(64, 64), torch.randn(512, 64)\n"
        "started = threading.Event()\n"
        "def work():\n"
        "    while True:\n"
        "        ops.encode_topk(x, W, W[:, 0], x[0], 8)\n"
        "        started.set()\n"
        "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
        "started.wait()\n"
    )
    done = warm_python.run(["-c", code])
    assert (done.returncode, done.stderr) == (0, "")
