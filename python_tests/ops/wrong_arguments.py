"""Right arguments of every op, and wrong values for each argument, for the tests of errors.

SHAPES, DTYPES and RANGES have for every op (argument, wrong value, message); DATA and OFFSETS have
values that are wrong only in their numbers.
"""

import pytest
import torch
from op_samples import (
    finish_arguments,
    in_latent_major,
    make_code,
    make_codes,
    make_problem,
    ops,
    scalars_arguments,
    update_arguments,
    update_scalars,
)

PROBLEM = make_problem(4, 6, 20)
CODE = make_code(4, 20, 3)
CSR = make_code(4, 20, 3, csr=True)
THRESHOLD = torch.zeros(20)
LISTS = in_latent_major(CODE, 20)
ENTRIES = ops.latent_major(*CODE, 20)[1]
H = make_codes(4, 20)
CORRELATION = ops.code_correlation(H, 12)
ARGUMENTS = {
    "pack_encoder": {"W_enc": PROBLEM.W_enc, "precision": "screened"},
    "encode_topk": {
        **dict(zip(("x", "W_enc", "b_enc", "b_dec"), PROBLEM.encoder, strict=True)),
        **{"k": 3, "precision": "screened", "dead_mask": torch.ones(20, dtype=torch.bool)},
        **{"k_aux": 2, "packed": None, "stats": None, "rounded": None},
    },
    "encode_batch_topk": {
        **dict(zip(("x", "W_enc", "b_enc", "b_dec"), PROBLEM.encoder, strict=True)),
        **{"k": 3, "precision": "screened", "dead_mask": torch.ones(20, dtype=torch.bool)},
        **{"k_aux": 2, "packed": None, "stats": None, "rounded": None},
    },
    "encode_threshold": {
        **dict(zip(("x", "W_enc", "b_enc", "b_dec"), PROBLEM.encoder, strict=True)),
        **{"threshold": THRESHOLD, "precision": "screened"},
        **{"packed": None, "stats": None, "rounded": None},
    },
    "decode": {**CODE._asdict(), "W_dec": PROBLEM.W_dec, "b_dec": PROBLEM.b_dec},
    "decode_backward": {
        "grad": PROBLEM.x,
        "indices": CODE.indices,
        "offsets": None,
        "W_dec": PROBLEM.W_dec,
    },
    "reconstruct": {
        **CODE._asdict(),
        **{"W_dec": PROBLEM.W_dec, "b_dec": PROBLEM.b_dec, "x": PROBLEM.x},
    },
    "accumulate_rows": {
        **{"coefficients": CODE.values, "indices": CODE.indices, "offsets": None},
        **{"dense": PROBLEM.x, "d_sae": 20},
    },
    "latent_major": {**CODE._asdict(), "d_sae": 20},
    "gather_entries": {"source": CODE.values, "entries": ENTRIES},
    "gather_rows_": {
        **{"out": torch.zeros(3, 6), "places": torch.tensor([2, 0]), "source": PROBLEM.x},
        **{"rows": torch.tensor([3, 1]), "mean": torch.zeros(6), "scale": 2.0},
    },
    "latent_sums": {
        **{"latent_offsets": LISTS[0], "entries": ENTRIES, "coefficients": CODE.values}
    },
    "row_gradient_norm": {
        **dict(zip(("latent_offsets", "rows", "coefficients"), LISTS, strict=True)),
        **{"dense": PROBLEM.x, "shift": PROBLEM.b_dec},
        **{"project_onto": PROBLEM.W_dec, "extra_grad": PROBLEM.W_enc},
    },
    "normalize_rows_": {"W": PROBLEM.W_enc.clone()},
    "full_batches": {"like": PROBLEM.W_enc},
    "batch_statistics": {
        **{"squared_error": torch.ones(4), "target": PROBLEM.x, "values": CODE.values},
        **{"indices": CODE.indices, "variance": torch.tensor(1.0), "d_sae": 20},
        "is_signed": False,
    },
    "code_gradients": {
        **{"residual_dot": CODE.values, "values": CODE.values, "grad_error": torch.ones(4)}
    },
    "weighted_row_sum": {"weights": PROBLEM.b_enc, "matrix": PROBLEM.W_enc, "factor": 1.0},
    "add_squares_": {
        **{"total": torch.tensor(0.0).double(), "grad": PROBLEM.x},
        **{"second": PROBLEM.W_enc, "more": torch.tensor(0.0).double()},
    },
    "decorrelation": {"W": PROBLEM.W_enc},
    "dense_product": {
        **{"left": PROBLEM.x, "right": PROBLEM.W_enc.t(), "bias": PROBLEM.b_enc},
        **{"relu": True, "precision": "fp32"},
    },
    "code_correlation": {"h": H, "split": 12},
    "code_correlation_backward": {
        **{"grad_within": torch.tensor(1.0), "grad_between": torch.tensor(1.0), "h": H},
        **{"split": 12, "means": CORRELATION[3], "inverse_norms": CORRELATION[4]},
        **{"gram": CORRELATION[5]},
    },
}
UPDATE = update_arguments(*LISTS, PROBLEM.x, PROBLEM.b_dec, None, PROBLEM.W_enc, PROBLEM.W_dec)
VECTOR = (torch.zeros(6), torch.zeros(6), torch.ones(6), torch.ones(6), update_scalars(), "adam")
SECOND = (torch.zeros(3), torch.zeros(3), torch.ones(3), torch.ones(3))
for op, values in (
    ("fused_update_", UPDATE),
    ("update_scalars", scalars_arguments(1.0)),
    ("update_vector_", (*VECTOR, *SECOND)),
    ("finish_step_", finish_arguments()),
):
    schema = getattr(ops, op).default._schema
    ARGUMENTS[op] = dict(zip((a.name for a in schema.arguments), values, strict=True))


def of_width(width):
    return torch.zeros(4, width)


SHAPES = {
    "pack_encoder": [("W_enc", torch.zeros(6), "W_enc must have shape [*, *], got [6]")],
    "encode_topk": [
        ("x", torch.zeros(6), "x must have shape [*, *], got [6]"),
        ("W_enc", torch.zeros(20, 5), "W_enc must have shape [*, 6], got [20, 5]"),
        ("b_enc", torch.zeros(19), "b_enc must have shape [20], got [19]"),
        ("b_dec", torch.zeros(1, 6), "b_dec must have shape [6], got [1, 6]"),
        ("dead_mask", torch.ones(19, dtype=torch.bool), "dead_mask must have shape [20], got [19]"),
    ],
    "encode_batch_topk": [
        ("W_enc", torch.zeros(20, 5), "W_enc must have shape [*, 6], got [20, 5]"),
        ("dead_mask", torch.ones(19, dtype=torch.bool), "dead_mask must have shape [20], got [19]"),
    ],
    "encode_threshold": [
        ("x", of_width(5), "W_enc must have shape [*, 5], got [20, 6]"),
        ("threshold", torch.zeros(()), "threshold must have shape [20], got []"),
    ],
    "decode": [
        ("W_dec", torch.zeros(20), "W_dec must have shape [*, *], got [20]"),
        ("b_dec", torch.zeros(5), "b_dec must have shape [6], got [5]"),
        ("indices", CODE.indices[0], "indices must have shape [*, *], got [3]"),
        ("values", torch.zeros(4, 2), "values must have the shape of indices, [4, 3], got [4, 2]"),
    ],
    "decode_backward": [("grad", of_width(5), "grad must have shape [4, 6], got [4, 5]")],
    "reconstruct": [
        ("x", torch.zeros(3, 6), "x must have shape [4, 6], got [3, 6]"),
        ("b_dec", torch.zeros(5), "b_dec must have shape [6], got [5]"),
        ("values", torch.zeros(12), "values must have the shape of indices, [4, 3], got [12]"),
    ],
    "accumulate_rows": [("dense", torch.zeros(3, 6), "dense must have shape [4, *], got [3, 6]")],
    "gather_entries": [("entries", ENTRIES[None], "entries must have shape [*], got [1, ")],
    "gather_rows_": [
        ("out", torch.zeros(6), "out must have shape [*, *], got [6]"),
        ("source", torch.zeros(4, 5), "source must have shape [*, 6], got [4, 5]"),
        ("rows", torch.zeros(2, 1).long(), "rows must have shape [*], got [2, 1]"),
        ("places", None, "rows must have shape [3], got [2]"),
        ("places", torch.zeros(3).long(), "places must have shape [2], got [3]"),
        ("mean", torch.zeros(5), "mean must have shape [6], got [5]"),
    ],
    "latent_sums": [
        ("entries", ENTRIES[None], "entries must have shape [*], got [1, "),
        ("latent_offsets", LISTS[0][:1], "latent_offsets must have d_sae + 1 >= 2 elements, got 1"),
    ],
    "row_gradient_norm": [
        ("dense", torch.zeros(6), "dense must have shape [*, *], got [6]"),
        ("latent_offsets", LISTS[0][None], "latent_offsets must have shape [*], got [1, 21]"),
        ("latent_offsets", LISTS[0][:1], "latent_offsets must have d_sae + 1 >= 2 elements, got 1"),
        ("shift", torch.zeros(5), "shift must have shape [6], got [5]"),
        ("project_onto", torch.zeros(19, 6), "project_onto must have shape [20, 6], got [19, 6]"),
        ("extra_grad", torch.zeros(20, 5), "extra_grad must have shape [20, 6], got [20, 5]"),
    ],
    "fused_update_": [
        ("W", torch.zeros(20, 5), "W must have shape [20, 6], got [20, 5]"),
        ("exp_avg", torch.zeros(19, 6), "exp_avg must have shape [20, 6], got [19, 6]"),
        ("exp_avg_sq", torch.zeros(20), "exp_avg_sq must have shape [20, 6], got [20]"),
        ("sums", torch.zeros(2), "sums must have shape [20], got [2]"),
        ("cached", torch.zeros(0, 5), "cached must have shape [*, 6], got [0, 5]"),
        ("cache_slots", torch.zeros(2).int(), "cache_slots must have shape [20], got [2]"),
        ("scalars", torch.ones(8), "scalars must have shape [11], got [8]"),
    ],
    "update_scalars": [
        ("squared_norm", torch.ones(1).double(), "squared_norm must have shape [], got [1]"),
        ("lr", torch.ones(1).double(), "lr must have shape [], got [1]"),
        ("loss_scale", torch.ones(2), "loss_scale must have shape [], got [2]"),
        ("step_count", torch.ones(1).long(), "step_count must have shape [], got [1]"),
        ("halted", torch.ones(1).long(), "halted must have shape [], got [1]"),
        ("fault", torch.ones(1), "fault must have shape [], got [1]"),
        ("losses", torch.ones(()), "losses must have shape [*], got []"),
    ],
    "update_vector_": [
        ("exp_avg", torch.zeros(5), "exp_avg must have the shape of w, [6], got [5]"),
        ("exp_avg_sq", torch.zeros(6, 1), "exp_avg_sq must have the shape of w, [6], got [6, 1]"),
        ("grad", torch.zeros(7), "grad must have the shape of w, [6], got [7]"),
        ("scalars", torch.ones(()), "scalars must have shape [11], got []"),
        (
            "second_grad",
            torch.zeros(4),
            "second_grad must have the shape of second_w, [3], got [4]",
        ),
        (
            "second_exp_avg",
            torch.zeros(2),
            "second_exp_avg must have the shape of second_w, [3], got [2]",
        ),
    ],
    "batch_statistics": [
        ("squared_error", torch.ones(3), "target must have shape [3, *], got [4, 6]"),
        ("target", torch.zeros(4), "target must have shape [4, *], got [4]"),
        ("values", torch.zeros(12), "values must have the shape of indices, [4, 3], got [12]"),
        ("variance", torch.ones(1), "variance must have shape [], got [1]"),
    ],
    "code_gradients": [
        ("values", torch.zeros(12), "values must have shape [*, *], got [12]"),
        ("residual_dot", torch.zeros(4, 2), "residual_dot must have shape [4, 3], got [4, 2]"),
        ("grad_error", torch.ones(3), "grad_error must have shape [4], got [3]"),
    ],
    "weighted_row_sum": [
        ("weights", torch.zeros(20, 1), "weights must have shape [*], got [20, 1]"),
        ("matrix", torch.zeros(19, 6), "matrix must have shape [20, *], got [19, 6]"),
    ],
    "add_squares_": [
        ("total", torch.zeros(1).double(), "total must have shape [], got [1]"),
        ("more", torch.zeros(1).double(), "more must have shape [], got [1]"),
    ],
    "finish_step_": [
        ("poison", torch.zeros(1), "poison must have shape [], got [1]"),
        ("steps", torch.zeros(1).long(), "steps must have shape [], got [1]"),
        ("metrics", torch.zeros(4), "metrics must have shape [5], got [4]"),
        ("fault", torch.zeros(1), "fault must have shape [], got [1]"),
        ("norm", torch.zeros(1), "norm must have shape [], got [1]"),
        ("variance", torch.zeros(1), "variance must have shape [], got [1]"),
        ("fired", torch.zeros(3).bool(), "fired must have shape [4], got [3]"),
    ],
    "normalize_rows_": [("W", torch.zeros(6), "W must have shape [*, *], got [6]")],
    "decorrelation": [("W", torch.zeros(6), "W must have shape [*, *], got [6]")],
    "dense_product": [
        ("left", torch.zeros(6), "left must have shape [*, *], got [6]"),
        ("right", torch.zeros(5, 20), "right must have shape [6, *], got [5, 20]"),
        ("bias", torch.zeros(6), "bias must have shape [20], got [6]"),
    ],
    "code_correlation": [("h", torch.zeros(6), "h must have shape [*, *], got [6]")],
    "code_correlation_backward": [
        ("h", torch.zeros(4, 19), "means must have shape [19], got [20]"),
        ("inverse_norms", torch.zeros(20, 1), "inverse_norms must have shape [20], got [20, 1]"),
        ("gram", torch.zeros(1, 4, 4), "gram must have shape [2, 4, 4], got [1, 4, 4]"),
        ("split", 20, "gram must have shape [1, 4, 4], got [2, 4, 4]"),
        ("grad_within", torch.zeros(1), "grad_within must have shape [], got [1]"),
        ("grad_between", torch.zeros(2), "grad_between must have shape [], got [2]"),
    ],
}
HALF = PROBLEM.x.half()
HALF_ROWS = PROBLEM.W_dec.half()
CODES = torch.zeros(20, 6, dtype=torch.uint8)
DTYPES = {
    "pack_encoder": [("W_enc", HALF, "W_enc must be float32, got float16")],
    "encode_topk": [
        ("x", HALF, "x must be float32, got float16"),
        ("W_enc", PROBLEM.W_enc.bfloat16(), "W_enc must be float32, got bfloat16"),
        ("dead_mask", torch.ones(20).int(), "dead_mask must be bool, got int32"),
    ],
    "encode_batch_topk": [("x", HALF, "x must be float32, got float16")],
    "encode_threshold": [
        ("threshold", THRESHOLD.long(), "threshold must be float32, got int64"),
    ],
    "decode": [
        ("values", CODE.values.half(), "values must be float32, got float16"),
        ("indices", CODE.indices.long(), "indices must be int32, got int64"),
        ("W_dec", PROBLEM.W_dec.int(), "W_dec must be float32, bfloat16 or float16, got int32"),
        ("b_dec", PROBLEM.b_dec.half(), "b_dec must be float32, got float16"),
    ],
    "reconstruct": [("x", HALF, "x must be float32, got float16")],
    "decode_backward": [("grad", HALF, "grad must be float32, got float16")],
    "accumulate_rows": [
        ("dense", CODE.indices.bool(), "dense must be float32, bfloat16 or float16, got bool")
    ],
    "gather_entries": [
        ("source", HALF, "source must be float32, got float16"),
        ("entries", ENTRIES.long(), "entries must be int32, got int64"),
    ],
    "gather_rows_": [
        ("out", torch.zeros(3, 6).half(), "out must be float32, got float16"),
        ("source", CODES[:4], "source must be float32, bfloat16 or float16, got uint8"),
        ("rows", torch.zeros(2).int(), "rows must be int64, got int32"),
        ("places", torch.zeros(2).int(), "places must be int64, got int32"),
        ("mean", torch.zeros(6).half(), "mean must be float32, got float16"),
    ],
    "latent_sums": [
        ("coefficients", HALF, "coefficients must be float32, got float16"),
        ("latent_offsets", LISTS[0].int(), "latent_offsets must be int64, got int32"),
    ],
    "row_gradient_norm": [
        ("latent_offsets", LISTS[0].int(), "latent_offsets must be int64, got int32"),
        ("rows", LISTS[1].long(), "rows must be int32, got int64"),
        ("coefficients", LISTS[2].half(), "coefficients must be float32, got float16"),
    ],
    "fused_update_": [
        ("W", HALF_ROWS, "W must be float32, got float16"),
        ("exp_avg", HALF_ROWS, "exp_avg must be float32, bfloat16 or uint8, got float16"),
        ("exp_avg_sq", HALF_ROWS, "exp_avg_sq must be float32, got float16"),
        ("exp_avg", CODES, "exp_avg_sq must be uint8, got float32"),
        ("step_count", torch.tensor(1).int(), "step_count must be int64, got int32"),
        ("scalars", torch.ones(11).long(), "scalars must be float32, got int64"),
    ],
    "update_scalars": [
        ("squared_norm", torch.tensor(1.0), "squared_norm must be float64, got float32"),
        ("lr", torch.tensor(1.0), "lr must be float64, got float32"),
        ("loss_scale", torch.tensor(1), "loss_scale must be float32, got int64"),
        ("step_count", torch.tensor(1).int(), "step_count must be int64, got int32"),
        ("halted", torch.tensor(1.0), "halted must be int64, got float32"),
    ],
    "update_vector_": [
        ("w", torch.zeros(6).half(), "w must be float32, got float16"),
        ("exp_avg", torch.zeros(6).half(), "exp_avg must be float32, got float16"),
        ("grad", torch.zeros(6).long(), "grad must be float32, got int64"),
        ("scalars", torch.ones(11).half(), "scalars must be float32, got float16"),
    ],
    "batch_statistics": [
        ("squared_error", torch.ones(4).half(), "squared_error must be float32, got float16"),
        ("target", HALF, "target must be float32, got float16"),
        ("values", CODE.values.half(), "values must be float32, got float16"),
        ("indices", CODE.indices.long(), "indices must be int32, got int64"),
        ("variance", torch.tensor(1), "variance must be float32, got int64"),
    ],
    "code_gradients": [
        ("values", CODE.values.half(), "values must be float32, got float16"),
        ("residual_dot", CODE.values.half(), "residual_dot must be float32, got float16"),
        ("grad_error", torch.ones(4).half(), "grad_error must be float32, got float16"),
    ],
    "weighted_row_sum": [
        ("weights", PROBLEM.b_enc.half(), "weights must be float32, got float16"),
        ("matrix", PROBLEM.W_enc.int(), "matrix must be float32, bfloat16 or float16, got int32"),
    ],
    "add_squares_": [
        ("total", torch.tensor(1.0), "total must be float64, got float32"),
        ("grad", HALF, "grad must be float32, got float16"),
        ("second", HALF, "second must be float32, got float16"),
    ],
    "finish_step_": [
        ("steps", torch.tensor(1.0), "steps must be int64, got float32"),
        ("tokens_since_fired", torch.zeros(4), "tokens_since_fired must be int64, got float32"),
        ("losses", torch.zeros(3).half(), "losses must be float32, got float16"),
        ("fired", torch.zeros(4), "fired must be bool, got float32"),
    ],
    "normalize_rows_": [("W", HALF, "W must be float32, got float16")],
    "full_batches": [("like", HALF, "like must be float32, got float16")],
    "decorrelation": [("W", HALF, "W must be float32, got float16")],
    "dense_product": [
        ("left", HALF, "left must be float32, got float16"),
        ("right", PROBLEM.W_enc.t().half(), "right must be float32, got float16"),
        ("bias", PROBLEM.b_enc.half(), "bias must be float32, got float16"),
    ],
    "code_correlation": [("h", H.half(), "h must be float32, got float16")],
    "code_correlation_backward": [
        ("means", CORRELATION[3].float(), "means must be float64, got float32"),
        ("gram", CORRELATION[5].half(), "gram must be float32, got float16"),
        ("grad_within", torch.tensor(1), "grad_within must be float32, got int64"),
    ],
}
PRECISION = "precision must be screened, fp32, bf16 or fp16, got int8"
NOT_CONTIGUOUS = PROBLEM.W_enc.t().contiguous().t()
RANGES = {
    "pack_encoder": [("precision", "int8", PRECISION)],
    "encode_topk": [
        ("k", 0, "k must be in [1, d_sae], got k=0 with d_sae=20"),
        ("k", 21, "k must be in [1, d_sae], got k=21 with d_sae=20"),
        ("k_aux", -1, "k_aux must be in [0, d_sae], got k_aux=-1 with d_sae=20"),
        ("k_aux", 21, "k_aux must be in [0, d_sae], got k_aux=21 with d_sae=20"),
        ("dead_mask", None, "k_aux must be 0 without a dead_mask, got k_aux=2"),
        ("precision", "int8", PRECISION),
    ],
    "encode_batch_topk": [
        ("k", 0, "k must be in [1, d_sae], got k=0 with d_sae=20"),
        ("k_aux", 21, "k_aux must be in [0, d_sae], got k_aux=21 with d_sae=20"),
        ("dead_mask", None, "k_aux must be 0 without a dead_mask, got k_aux=2"),
        ("precision", "int8", PRECISION),
    ],
    "encode_threshold": [("precision", "int8", PRECISION)],
    "accumulate_rows": [("d_sae", 0, "d_sae must be at least 1, got 0")],
    "dense_product": [("precision", "int8", PRECISION)],
    "batch_statistics": [("d_sae", 0, "d_sae must be at least 1, got 0")],
    "finish_step_": [
        ("metrics", torch.zeros(10)[::2], "metrics is changed in place and must be contiguous"),
    ],
    "latent_major": [("d_sae", 0, "d_sae must be at least 1, got 0")],
    "gather_rows_": [
        ("out", torch.zeros(6, 3).t(), "out is changed in place and must be contiguous"),
    ],
    "fused_update_": [
        ("precision", "int8", PRECISION),
        ("W", NOT_CONTIGUOUS, "W is changed in place and must be contiguous"),
        ("exp_avg", NOT_CONTIGUOUS, "exp_avg is changed in place and must be contiguous"),
    ],
    "update_vector_": [
        ("w", torch.zeros(12)[::2], "w is changed in place and must be contiguous"),
        (
            "exp_avg_sq",
            torch.ones(12)[::2],
            "exp_avg_sq is changed in place and must be contiguous",
        ),
        ("second_w", None, "second_exp_avg must be none where second_w is none, got a tensor"),
        ("second_exp_avg", None, "second_exp_avg must be given where second_w is given, got none"),
        (
            "second_exp_avg_sq",
            None,
            "second_exp_avg_sq must be given where rule is adam, got none",
        ),
    ],
    "update_scalars": [
        ("losses", torch.zeros(0), "losses must have at least one, got none"),
    ],
    "normalize_rows_": [("W", NOT_CONTIGUOUS, "W is changed in place and must be contiguous")],
    "code_correlation": [
        ("split", -1, "split must be in [0, d_sae], got split=-1 with d_sae=20"),
        ("split", 21, "split must be in [0, d_sae], got split=21 with d_sae=20"),
    ],
    "code_correlation_backward": [
        ("split", 21, "split must be in [0, d_sae], got split=21 with d_sae=20"),
    ],
}


def wrong_index(value):
    indices = CODE.indices.clone()
    indices[2, 1] = value
    return indices


DATA = [
    pytest.param(op, {"indices": wrong_index(value)}, f"indices must be in [0, 20), got {value}")
    for op in ("decode", "decode_backward", "reconstruct", "accumulate_rows", "latent_major")
    for value in (20, -1)
]
DATA += [
    pytest.param(
        *("batch_statistics", {"indices": wrong_index(20)}),
        "indices must be in [0, 20), got 20",
    )
]
OFFSETS = [
    (torch.tensor([0, 3, 2, 12, 12]), "0 to 12"),
    (torch.tensor([1, 3, 6, 9, 12]), "1 to 12"),
    (torch.tensor([0, 3, 6, 9, 11]), "0 to 11"),
]
