"""Call every op on small inputs and train for some steps, under a memory checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python python_tests/ops/run_every_op.py

It compares no results, which the tests do. Sizes are odd, rows long and short, and one latent is
in every row.
"""

import argparse

import torch
from device_ops import ops, public
from op_samples import (
    PRECISIONS,
    Code,
    Problem,
    in_latent_major,
    make_code,
    make_codes,
    make_problem,
    samples,
)
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.training.optimizer.row_optimizer import RowOptimizer

SHAPES = [  # N, D, F, k
    (0, 8, 64, 4),
    (1, 1, 1, 1),
    (33, 37, 257, 12),
    (5, 1030, 300, 200),
    (70, 64, 3000, 32),
    (3, 8, 100_006, 5),
]


def call_samples() -> None:
    """Call every op; where one ends the process, the last line names it."""
    for name, case, arguments in samples():
        print(f"{name}, {case}", flush=True)
        getattr(ops, name)(*arguments)
        if ops.device.type == "cuda":
            torch.cuda.synchronize()


def call_shape(n: int, d_in: int, d_sae: int, k: int) -> None:
    problem = make_problem(n, d_in, d_sae)
    for precision in PRECISIONS:
        dead = torch.arange(d_sae) % 3 == 0
        k_aux = min(4, d_sae)
        public.encode_topk(*problem.encoder, k, precision=precision, dead_mask=dead, k_aux=k_aux)
        public.encode_threshold(*problem.encoder, torch.full((d_sae,), 1.0), precision=precision)
    for dtype in (torch.float32, torch.bfloat16):
        for csr in (False, True):
            call_decoder(problem, make_code(n, d_sae, k, csr=csr), dtype)
    ops.normalize_rows_(problem.W_enc.clone())
    call_gather(problem)
    ops.decorrelation(problem.W_dec)
    for precision in PRECISIONS:
        ops.dense_product(problem.x, problem.W_enc.t(), problem.b_enc, True, precision)
        ops.dense_product(problem.x.t(), problem.x, None, False, precision)
    call_correlation(make_codes(n, d_sae, active=0.3), d_sae // 2)


def call_gather(problem: Problem) -> None:
    rows = torch.arange(problem.x.shape[0]).flip(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for places, mean in ((None, None), (rows, problem.b_dec)):
            out = torch.zeros_like(problem.x)
            ops.gather_rows_(out, places, problem.x.to(dtype), rows, mean, 0.5)


def call_correlation(h: Tensor, split: int) -> None:
    for groups in (split, h.shape[1]):
        outputs = ops.code_correlation(h, groups)
        for grads in ((None, torch.tensor(1.0)), (torch.tensor(1.0), None)):
            ops.code_correlation_backward(*grads, h, groups, *outputs[3:])


def call_decoder(problem: Problem, code: Code, dtype: torch.dtype) -> None:
    W_dec, x = problem.W_dec.to(dtype), problem.x
    ops.decode(*code, W_dec, problem.b_dec)
    ops.reconstruct(*code, W_dec, None, x)
    ops.decode_backward(x, *code[1:], W_dec)
    ops.accumulate_rows(*code, x.to(dtype), len(W_dec))


def call_heavy_latent(n: int = 700, d_in: int = 40, d_sae: int = 9) -> None:
    """Call the ops with one latent in every row, whose sum is cut into pieces."""
    problem = make_problem(n, d_in, d_sae)
    indices = torch.stack([torch.zeros(n), torch.arange(n) % d_sae], 1).int()
    code = Code(torch.ones(n, 2), indices, None)
    ops.accumulate_rows(*code, problem.x, d_sae)
    lists = in_latent_major(code, d_sae)
    ops.row_gradient_norm(*lists, problem.x, problem.b_dec, problem.W_dec, None)


def train(device: torch.device, precision: str, steps: int = 3) -> Tensor:
    torch.manual_seed(0)
    config = SAEConfig(d_in=48, d_sae=700, k=9, normalize_activations="none")
    sae = SparseAutoencoder(config).to(device)
    optimizer = RowOptimizer(sae, precision=precision)
    x = torch.randn(steps, 65, 48).to(device)
    for batch in x:
        loss = sae.training_loss(batch, precision=precision, dense_grad=False)
        loss.total.backward()
        optimizer.step(1e-3)
        optimizer.zero_grad()
        sae.update_fired_(loss.code, len(batch))
    return loss.total.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    ops.device = public.device = device
    call_samples()
    for shape in SHAPES:
        call_shape(*shape)
    call_heavy_latent()
    for precision in PRECISIONS:
        loss = train(device, precision)
        print(f"trained in {precision}: loss {float(loss):.3f}")


if __name__ == "__main__":
    main()
