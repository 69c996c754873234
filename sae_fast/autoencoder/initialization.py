"""Starting values: unit rows in the decoder, the encoder tied to them, and a centre for b_dec.

A transcoder's encoder and decoder live in two spaces, and there is nothing to tie: both are drawn,
with unit rows. From a decoder of zeros, as other trainers start one, no row would have a direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.config import SAEConfig

MEDIAN_ITERATIONS = 100
MEDIAN_TOLERANCE = 1e-6
ACTIVE_VARIANCE = 0.99  # share of the variance that the active subspace holds
_SAMPLE_PER_DIMENSION = 8  # activations that the active subspace is found from, per dimension
_BLOCK_ROWS = 4096
_DRAWN_TOGETHER = 16  # normal numbers: torch draws them in groups of 16
# One epoch of MiniLM's layer 3 (97 steps, d_sae 3072, k 32) ends at an FVU of 0.140 from here or
# from 0.1, and at 0.150 from 1.
_ENCODER_OF_THE_LARGEST = 0.3


def sample_rows(config: SAEConfig) -> int:
    """Return how many activations the start needs at least; 0: none."""
    if config.decoder_init == "active_subspace":
        return _SAMPLE_PER_DIMENSION * max(config.d_in, config.target_width)
    return int(config.b_dec_init != "zero")


@torch.no_grad()
def initialize_weights_(
    W_enc: Tensor,  # [F, D]
    W_dec: Tensor,  # [F, D], of a transcoder [F, d_out]
    config: SAEConfig,
    generator: torch.Generator | None,
    sample: Tensor | None = None,  # [N, D], normalised
    modelled: Tensor | None = None,  # [N, D], of a transcoder its targets [N, d_out]
    first: int = 0,
) -> None:
    """Fill both matrices as `decoder_init` and `decoder_init_norm` say.

    Matrices of fewer rows than the configuration has latents are a block of the whole ones, from
    row `first` on, and get the numbers that these rows have there.
    """
    place = first, config.d_sae
    if config.transcoder:
        initialize_apart_(W_enc, W_dec, config.decoder_init, generator, sample, modelled, place)
    else:
        initialize_matrices_(W_enc, W_dec, config.decoder_init, generator, sample, place)
        W_enc.mul_(_encoder_share(config))
    if (norm := config.decoder_init_norm) is not None and norm != 1:
        W_dec.mul_(norm)
        W_enc.mul_(norm)


def _encoder_share(config: SAEConfig) -> float:
    """Return the length of W_enc's rows at the start, as a share of the rows tied to W_dec.

    Half of a ReLU model's latents are active then, and unit rows would add up to
    d_sae / (2 d_in) times x, without ReLU to twice that: the first loss of 100,000 slots would
    be thousands of variances. Of the k largest latents many add up to more than x, too; and short
    rows turn faster, because Adam's steps have the same length for all of them.
    """
    if config.takes("k") and config.decoder_init != "kaiming":
        return _ENCODER_OF_THE_LARGEST
    is_long = config.arch in ("relu", "slots") and config.decoder_norm == "unit"
    if not is_long or config.decoder_init == "kaiming":
        return 1.0
    return min(1.0, (2 if config.use_relu else 1) * config.d_in / config.d_sae)


def initialize_matrices_(
    W_enc: Tensor,  # [F, D]
    W_dec: Tensor,  # [F, D]
    method: str,
    generator: torch.Generator | None,
    sample: Tensor | None,  # [N, D]
    place: tuple[int, int] | None = None,
) -> None:
    """Fill both, W_dec with unit rows and W_enc with the same, except for "kaiming".

    Drawn on the generator's device, so that a seed gives the same rows wherever the model is.

    Args:
        W_enc: the encoder.
        W_dec: the decoder.
        method: "random" directions; "orthogonal" blocks of D rows; "kaiming": W_enc as torch
            starts a linear layer, uniform within ±1/√D, and W_dec its rows at unit length;
            "active_subspace": random directions within the active subspace of `sample`; without
            a sample as "random".
        generator: of the numbers; None: torch's own.
        sample: activations.
        place: the first row, and the number of all rows, where these are a block of them.
    """
    _draw_(W_dec, method, generator, sample, place)
    W_enc.copy_(W_dec)
    ops.normalize_rows_(W_dec)
    if method != "kaiming":
        W_enc.copy_(W_dec)


def initialize_apart_(
    W_enc: Tensor,  # [F, D]
    W_dec: Tensor,  # [F, d_out]
    method: str,
    generator: torch.Generator | None,
    sample: Tensor | None,  # [N, D]
    targets: Tensor | None,  # [N, d_out]
    place: tuple[int, int] | None = None,
) -> None:
    """Fill both matrices of a transcoder, each drawn without regard to the other, with unit rows.

    With "active_subspace" each lies within the subspace of what it reads or writes.
    """
    for W, rows in ((W_enc, sample), (W_dec, targets)):
        _draw_(W, method, generator, rows, place)
    ops.normalize_rows_(W_dec)
    if method != "kaiming":
        ops.normalize_rows_(W_enc)


def _draw_(
    W: Tensor,  # [F, D]
    method: str,
    generator: torch.Generator | None,
    sample: Tensor | None,  # [N, D]
    place: tuple[int, int] | None,
) -> None:
    """Fill a matrix with rows of the directions that `method` names.

    The numbers of all rows are drawn, some rows at a time, of which the matrix gets its own.
    """
    source = torch.device("cpu") if generator is None else generator.device
    width = W.shape[1]
    first, n_rows = (0, len(W)) if place is None else place
    basis = None
    if method == "active_subspace" and sample is not None:
        basis = active_subspace(sample).to(W.device)
    for start, end in _row_blocks(n_rows, width, width if method == "orthogonal" else 1):
        drawn = torch.empty(end - start, width, dtype=W.dtype, device=source)
        if method == "kaiming":
            bound = 1 / math.sqrt(width)
            drawn.uniform_(-bound, bound, generator=generator)
        else:
            drawn.normal_(generator=generator)
        low, high = max(start, first), min(end, first + len(W))
        if low >= high:
            continue
        if method == "orthogonal":
            for block in torch.split(drawn, width):
                block.copy_(torch.linalg.qr(block.t()).Q.t())
        drawn = drawn.to(W.device)
        if basis is not None:
            drawn = (drawn @ basis.t()) @ basis
        W[low - first : high - first] = drawn[low - start : high - start]


def _row_blocks(n_rows: int, width: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Yield first and last rows of blocks, drawn one by one as all rows would be at once.

    All but the last have a multiple of `multiple` rows, and of the numbers that are drawn together.
    The last is no smaller than such a group, because torch draws its last numbers once more.
    """
    multiple *= _DRAWN_TOGETHER // math.gcd(multiple * width, _DRAWN_TOGETHER)
    rows = multiple * max(1, _BLOCK_ROWS // multiple)
    start = 0
    while start < n_rows:
        end = min(start + rows, n_rows)
        if (n_rows - end) * width < _DRAWN_TOGETHER:
            end = n_rows
        yield start, end
        start = end


def active_subspace(
    sample: Tensor,  # [N, D]
) -> Tensor:
    """Return an orthonormal basis [r, D] of the directions in which activations vary.

    See arXiv:2508.16929.

    These are the fewest leading principal components that hold 99 % of the variance about the
    mean: about 60 % of all for the outputs of attention. A latent outside of them would never fire.
    """
    centred = sample.double() - sample.double().mean(0)
    variances, directions = torch.linalg.eigh(centred.t() @ centred)
    descending = variances.clamp_min(0).flip(0).cumsum(0)
    n_active = int((descending < ACTIVE_VARIANCE * descending[-1]).sum()) + 1
    basis: Tensor = directions.flip(1)[:, :n_active].t().to(sample.dtype)
    return basis


def centre(
    sample: Tensor,  # [N, D]
    config: SAEConfig,
) -> Tensor:
    """Return where b_dec starts, [D], as `config.b_dec_init` says."""
    if config.b_dec_init == "zero":
        return torch.zeros_like(sample[0])
    if config.b_dec_init == "mean":
        return sample.mean(0)
    return geometric_median(sample)


def geometric_median(
    points: Tensor,  # [N, D]
) -> Tensor:
    """Return the point [D] with the smallest sum of distances to `points`.

    It is found by Weiszfeld's iteration.

    That ends when a step is below 1e-6 of the mean distance, or after 100 steps. Where it meets one
    of the points, that one's own pull has no direction: it holds the median there if the others
    pull no harder than its weight, and shortens the step if they do (Vardi and Zhang 2000).
    Weiszfeld's formula alone would stay at any point it meets, and already the mean may be one.
    """
    median = points.mean(0)
    smallest = torch.finfo(points.dtype).tiny
    for _ in range(MEDIAN_ITERATIONS):
        offsets = points - median
        distances = torch.linalg.vector_norm(offsets, dim=1)
        spread = distances.mean()
        is_met = distances <= MEDIAN_TOLERANCE * spread
        weights = torch.where(is_met, 0.0, 1 / distances.clamp_min(smallest))
        pull = weights @ offsets
        strength, held = torch.linalg.vector_norm(pull), is_met.sum()
        share = torch.where(strength > held, 1 - held / strength, 0.0)
        step = share * pull / weights.sum().clamp_min(smallest)
        median = median + step
        if bool(torch.linalg.vector_norm(step) <= MEDIAN_TOLERANCE * spread):
            break
    return median
