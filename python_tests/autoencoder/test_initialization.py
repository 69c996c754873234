import pytest
import torch

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.initialization import active_subspace, geometric_median, sample_rows
from sae_fast.config import SAEConfig


def make(seed=0, sample=None, **fields):
    sae = SparseAutoencoder(SAEConfig(d_in=8, d_sae=20, k=4, **fields))
    sae.initialize_(torch.Generator().manual_seed(seed), sample)
    return sae


@pytest.fixture(name="sample")
def make_sample():
    return torch.randn(100, 8, generator=torch.Generator().manual_seed(5)) + 2.0


def test_orthogonal_rows_are_orthonormal_within_blocks_of_d_in():
    W_dec = make(decoder_init="orthogonal").W_dec.detach()
    for block in W_dec.split(8):
        torch.testing.assert_close(block @ block.t(), torch.eye(len(block)), rtol=0, atol=1e-5)


METHODS = ("random", "orthogonal", "kaiming", "active_subspace")


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides_the_start(method, sample):
    first, again, other = (make(seed, sample, decoder_init=method) for seed in (1, 1, 2))
    assert torch.equal(first.W_dec, again.W_dec)
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("method", METHODS)
def test_decoder_starts_with_unit_rows_and_the_encoder_along_them(method, sample):
    sae = make(sample=sample, decoder_init=method)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    cosines = torch.nn.functional.cosine_similarity(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(cosines, torch.ones(20))
    assert torch.equal(sae.W_enc, 0.3 * sae.W_dec) is (method != "kaiming")


def test_kaiming_encoder_is_uniform_as_torch_starts_a_linear_layer():
    sae = SparseAutoencoder(SAEConfig(d_in=64, d_sae=500, k=4, decoder_init="kaiming"))
    sae.initialize_(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    like = torch.nn.Linear(64, 500).weight
    W_enc = sae.W_enc.detach()
    assert float(W_enc.abs().max()) <= 1 / 8
    torch.testing.assert_close(W_enc.std(), like.std(), rtol=0.02, atol=0)
    torch.testing.assert_close(W_enc.abs().max(), like.abs().max(), rtol=0.01, atol=0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_active_subspace_holds_the_directions_in_which_activations_vary(offset):
    generator = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    spread = torch.tensor([3.0, 2.0, 1.0, 0.01, 0.01, 0.0, 0.0, 0.0])
    sample = (torch.randn(400, 8, generator=generator) * spread) @ axes.t() + offset
    basis = active_subspace(sample)
    assert basis.shape == (3, 8)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis.t() @ basis, axes[:, :3] @ axes[:, :3].t(), atol=1e-3, rtol=0)
    W_dec = make(sample=sample, decoder_init="active_subspace").W_dec.detach()
    torch.testing.assert_close(W_dec @ basis.t() @ basis, W_dec, rtol=0, atol=1e-5)


def test_active_subspace_is_the_smallest_with_99_percent_of_the_variance():
    """With variances 50, 48.9, 0.5, 0.6 three components have 99.5 %, two 98.9 %."""
    scale = torch.tensor([50.0, 48.9, 0.5, 0.6]).sqrt()
    sample = torch.cat([torch.diag(scale), -torch.diag(scale)])
    assert len(active_subspace(sample)) == 3


def test_active_subspace_of_activations_without_variance_is_one_direction():
    assert active_subspace(torch.full((5, 4), 2.0)).shape == (1, 4)


def test_subspace_and_centre_come_from_one_sample(sample):
    first = make(sample=sample, b_dec_init="mean", decoder_init="active_subspace")
    torch.testing.assert_close(first.b_dec.detach(), sample.mean(0))


@pytest.mark.parametrize(
    ("fields", "rows"),
    [({}, 0), ({"b_dec_init": "mean"}, 1), ({"decoder_init": "active_subspace"}, 64)],
)
def test_sample_is_asked_for_where_the_start_needs_one(fields, rows):
    assert sample_rows(SAEConfig(d_in=8, d_sae=20, **fields)) == rows


def test_b_dec_starts_at_the_mean(sample):
    torch.testing.assert_close(
        make(sample=sample, b_dec_init="mean").b_dec.detach(), sample.mean(0)
    )


def test_b_dec_starts_at_the_geometric_median(sample):
    b_dec = make(sample=sample, b_dec_init="geometric_median").b_dec.detach()
    torch.testing.assert_close(b_dec, geometric_median(sample))


def test_b_dec_starts_at_zero_whatever_the_sample(sample):
    assert not make(sample=sample).b_dec.any()


def test_centre_without_a_sample_is_refused():
    with pytest.raises(ValueError, match="b_dec_init = 'mean' needs a sample"):
        make(b_dec_init="mean")
    with pytest.raises(ValueError, match="decoder_init = 'active_subspace' needs a sample"):
        make(decoder_init="active_subspace")


def test_geometric_median_is_not_moved_by_an_outlier():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1e6, 1e6]])
    assert geometric_median(points).norm() < 2


def test_geometric_median_has_no_shorter_sum_of_distances_nearby(sample):
    median = geometric_median(sample)
    best = (sample - median).norm(dim=1).sum()
    steps = 0.01 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert all((sample - median - step).norm(dim=1).sum() > best for step in steps)


def sum_of_distances(points, place):
    return (points.double() - place.double()).norm(dim=1).sum()


def shortest_sum(points, n_rounds=60):
    """Return the smallest sum of distances by brute force, on ever finer grids."""
    points = points.double()
    best, width = points.mean(0), float((points.max(0).values - points.min(0).values).max())
    steps = torch.cartesian_prod(*(torch.linspace(-1, 1, 5),) * points.shape[1]).double()
    for _ in range(n_rounds):
        places = torch.cat([best + width * steps, points])
        sums = torch.stack([sum_of_distances(points, place) for place in places])
        best, width = places[sums.argmin()], width * 0.7
    return sum_of_distances(points, best)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_points", [4, 5, 9])
def test_geometric_median_is_that_of_brute_force(n_points, seed):
    points = torch.randn(n_points, 2, generator=torch.Generator().manual_seed(seed)).exp()
    found = sum_of_distances(points, geometric_median(points))
    torch.testing.assert_close(found, shortest_sum(points), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "points",
    [
        [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [4.0, 0.0]],  # the first three
        [[0.0, 2.0], [0.0, -1.0], [0.0, -1.0], [9.0, 0.0], [-9.0, 0.0], [0.0, 0.0]],  # none
        [[2.0, 2.0], [0.0, 0.0], [1.0, 5.0], [5.0, 1.0]],  # the first
    ],
)
def test_geometric_median_is_found_although_the_mean_is_a_point(points):
    points = torch.tensor(points)
    assert (points == points.mean(0)).all(1).any()
    found = sum_of_distances(points, geometric_median(points))
    torch.testing.assert_close(found, shortest_sum(points), rtol=1e-4, atol=0)


def test_geometric_median_is_not_the_mean(sample):
    skewed = sample.exp()
    median = geometric_median(skewed)
    assert sum_of_distances(skewed, median) < 0.99 * sum_of_distances(skewed, skewed.mean(0))


def test_geometric_median_of_equal_points_is_that_point():
    torch.testing.assert_close(geometric_median(torch.full((5, 3), 2.0)), torch.full((3,), 2.0))


@pytest.mark.parametrize("init", ["random", "orthogonal", "active_subspace"])
@pytest.mark.parametrize("arch", ["relu", "slots"])
def test_unit_rows_of_a_relu_model_add_up_to_its_input_at_the_start(arch, init):
    options = {"decoder_norm": "unit"} if arch == "relu" else {"n_relations": 3, "n_answers": 4}
    sae = SparseAutoencoder(
        SAEConfig(arch=arch, d_in=24, d_sae=24 * 40, decoder_init=init, **options)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 24, generator=generator)
    sae.initialize_(generator, x if init == "active_subspace" else None)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(24 * 40))
    error = (sae.decode(sae.encode(x)) - x).detach()
    assert float(error.square().sum() / x.square().sum()) < 0.1


def whole_draw(method, d_sae, width, generator):
    """Return a matrix whose numbers torch draws at once."""
    W = torch.empty(d_sae, width)
    if method == "kaiming":
        return W.uniform_(-(width**-0.5), width**-0.5, generator=generator)
    W.normal_(generator=generator)
    if method == "orthogonal":
        for block in W.split(width):
            block.copy_(torch.linalg.qr(block.t()).Q.t())
    return W


# More rows than are drawn at a time; widths that torch's groups of numbers do not divide.
@pytest.mark.parametrize(("d_sae", "width"), [(20, 8), (8193, 15), (4105, 2), (9000, 16)])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_latents_start_as_the_whole_model_does(method, d_sae, width):
    norm = {} if method == "active_subspace" else {"b_dec_init": "zero"}
    config = SAEConfig(d_in=width, d_sae=d_sae, k=1, decoder_init=method, **norm)
    sample = torch.randn(8 * width + 3, width, generator=torch.Generator().manual_seed(5))
    sample = sample[: sample_rows(config) + 3] if sample_rows(config) else None

    def started(latents=None):
        sae, generator = SparseAutoencoder(config, latents), torch.Generator().manual_seed(3)
        sae.initialize_(generator, sample)
        return sae.state_dict(), generator.get_state()

    whole, state = started()
    cut = d_sae // 3
    parts = [started(block) for block in (range(cut), range(cut, d_sae))]
    for name in ("W_enc", "W_dec"):
        assert torch.equal(torch.cat([part[name] for part, _ in parts]), whole[name]), name
    assert all(torch.equal(after, state) for _, after in parts)
    if method != "active_subspace":
        expected = whole_draw(method, d_sae, width, torch.Generator().manual_seed(3))
        ops.normalize_rows_(expected)
        assert torch.equal(whole["W_dec"], expected)
