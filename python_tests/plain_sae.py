"""The training loss in plain dense PyTorch, as the oracle for model and optimiser."""

import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.penalties import random_chunks
from sae_fast.config import SAEConfig

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_sae(seed=0, *, dtype=torch.float32, dead=(), **fields):
    """Make a small model without zero parameters, whose latents `dead` have long been silent."""
    defaults = {"d_in": 12, "d_sae": 40, "k": 5, "dead_after_tokens": 100}
    sae = SparseAutoencoder(SAEConfig(**{**defaults, **fields}))
    generator = torch.Generator().manual_seed(seed)
    sae.initialize_(generator)
    with torch.no_grad():
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=generator))
        sae.b_enc.copy_(0.2 * torch.randn(sae.b_enc.shape, generator=generator))
        sae.b_dec.copy_(0.2 * torch.randn(sae.b_dec.shape, generator=generator))
        if sae.config.skip_connection:
            sae.W_skip.copy_(0.2 * torch.randn(sae.W_skip.shape, generator=generator))
    sae.tokens_since_fired[list(dead)] = 1000
    return sae.to(dtype)


def make_batch(sae, n_tokens=30, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, sae.config.d_in, generator=generator).to(sae.W_enc.dtype)


def make_targets(sae, n_tokens=30, seed=2):
    """Return the targets of a transcoder for `make_batch`, or None for another model."""
    if not sae.config.transcoder:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, sae.config.d_out, generator=generator).to(sae.W_enc.dtype)


def input_bias(sae):
    """Return the vector that the encoder subtracts from x."""
    subtracts = sae.config.subtract_b_dec and not sae.config.transcoder
    return sae.b_dec if subtracts else torch.zeros_like(sae.W_enc[0])


def goal(sae, x, targets):
    """Return the vector that the code of x models."""
    if not sae.config.transcoder:
        return x
    return targets - x @ sae.W_skip.t() if sae.config.skip_connection else targets


def plain_acts(sae, x):
    """Return the dense code of a model that selects the k largest."""
    config = sae.config
    pre_acts = (x - input_bias(sae)) @ sae.W_enc.t() + sae.b_enc
    if config.arch in ("batch_topk", "matryoshka"):
        values, places = pre_acts.flatten().topk(config.k * len(x))
        acts = torch.zeros_like(pre_acts).flatten().scatter(0, places, values.relu())
        return acts.view_as(pre_acts)
    return _plain_selection(pre_acts, config.k, config.activation)


def plain_terms(sae, x, targets=None):
    """Return the loss terms, with coefficients, of a model that selects the k largest."""
    config = sae.config
    pre_acts = (x - input_bias(sae)) @ sae.W_enc.t() + sae.b_enc
    acts = plain_acts(sae, x)
    target = goal(sae, x, targets)
    error = target - (acts @ sae.W_dec + sae.b_dec)
    y = x if targets is None else targets
    recon_loss = error_term(sae, error, y)
    if config.arch == "matryoshka":
        recon_loss = _plain_prefixes(sae, target, acts, y)
    terms = {
        "recon_loss": config.reconstruction_coeff * recon_loss,
        "l1_loss": config.l1_penalty_coeff * acts.abs().sum(1).mean(),
        "decorr_loss": config.decorrelation_coeff * plain_decorrelation(sae),
        "aux_loss": config.aux_k_coeff * _plain_aux_k(sae, x, error.detach()),
    }
    if config.multi_topk:
        width = min(4 * config.k, config.d_sae)
        x_hat = _plain_selection(pre_acts, width, config.activation) @ sae.W_dec + sae.b_dec
        multi_topk_loss = error_term(sae, target - x_hat, y)
        terms["multi_topk_loss"] = config.multi_topk_coeff * multi_topk_loss
    return terms


def error_term(sae, error, y):
    """Return the reconstruction error that loss_fn names."""
    if sae.config.loss_fn == "mse":
        return error.square().sum(1).mean()
    return error.square().sum() / (y - y.mean(0)).square().sum()


def _plain_selection(pre_acts, k, activation):
    """Return the dense code [N, F] of the k latents that an activation selects."""
    if activation == "groupmax":
        values, places = pre_acts.unflatten(1, (k, -1)).max(dim=2)
        indices = places + torch.arange(k) * (pre_acts.shape[1] // k)
    else:
        scores = pre_acts.abs() if activation == "abs_topk" else pre_acts
        indices = scores.topk(k, dim=1).indices
        values = pre_acts.gather(1, indices)
    if activation != "abs_topk":
        values = values.relu()
    return torch.zeros_like(pre_acts).scatter(1, indices, values)


def plain_decorrelation(sae):
    config = sae.config
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    cosines = unit @ unit.t()
    if config.decorrelation == "chunked_max":
        own_chunk = torch.zeros(config.d_sae, config.d_sae, dtype=torch.bool)
        for members in random_chunks(
            config.d_sae, sae.decorrelation_draw, config.decorrelation_chunk
        ):
            own_chunk[members[:, None], members] = True
        others = own_chunk.fill_diagonal_(False)
        return cosines.masked_fill(~others, -torch.inf).amax(1).square().mean()
    total = cosines.fill_diagonal_(0).square().sum()
    n_pairs = config.d_sae * (config.d_sae - 1)
    if config.decorrelation == "gram_scaled":
        width = config.target_width if config.loss_fn == "mse" else 1
        return total / config.d_sae * width / 16
    return total if config.decorrelation == "gram_sum" else total / n_pairs


def _plain_prefixes(sae, target, acts, y):
    """Return the squared errors of all prefixes, from separate reconstructions."""
    total = 0.0
    weights = sae.config.matryoshka_weights
    for size, weight in zip(sae.config.matryoshka_prefixes, weights, strict=True):
        x_hat = acts[:, :size] @ sae.W_dec[:size] + sae.b_dec
        total = total + weight * error_term(sae, target - x_hat, y)
    return total


def _plain_aux_k(sae, x, error):
    dead = sae.tokens_since_fired >= sae.config.dead_after_tokens
    n_dead = int(dead.sum())
    full_k_aux = sae.config.aux_k or min(2 * sae.config.k, max(sae.config.target_width // 2, 1))
    if n_dead == 0:
        return x.new_zeros(())
    pre_acts = (x - input_bias(sae).detach()) @ sae.W_enc.t() + sae.b_enc
    signed = sae.config.activation == "abs_topk"
    scores = pre_acts.abs() if signed else pre_acts
    indices = scores.masked_fill(~dead, -torch.inf).topk(min(full_k_aux, n_dead), dim=1).indices
    values = pre_acts.gather(1, indices)
    if not signed:  # ReLU, whose gradient goes straight through
        values = values + (values.relu() - values).detach()
    acts = torch.zeros_like(pre_acts).scatter(1, indices, values)
    missed = (acts @ sae.W_dec - error).square().sum()
    share = missed / (error - error.mean(0)).square().sum() * min(n_dead / full_k_aux, 1.0)
    return sae.config.error_of_the_mean * share


def plain_gradients(sae, x, term=None, targets=None):
    """Return autograd's gradient of the loss, or of one term, for every parameter."""
    terms = plain_terms(sae, x, targets)
    loss = sum(terms.values()) if term is None else terms[term]
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def left_gradients(sae):
    """Return the dense gradients after a backward, from `.grad` and row factors together."""
    gradients = {}
    for name, parameter in sae.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for factor in getattr(parameter, "row_factors", []):
            gradient += dense_from_factor(factor, parameter.shape[0]).to(gradient.dtype)
        gradients[name] = gradient
    return gradients


def dense_from_factor(factor, d_sae):
    """Return rows: for latent j the sum of coefficient * (dense[n] - shift) over its entries."""
    coefficients = torch.where(factor.values != 0, factor.coefficients, 0)
    dense = factor.dense.to(factor.coefficients.dtype)
    side = dense if factor.shift is None else dense - factor.shift
    n_rows = side.shape[0]
    if factor.offsets is None:
        rows = torch.arange(n_rows, device=side.device).repeat_interleave(factor.indices.shape[1])
    else:
        rows = torch.arange(n_rows, device=side.device).repeat_interleave(factor.offsets.diff())
    gradient = side.new_zeros(d_sae, side.shape[1])
    return gradient.index_add(
        0, factor.indices.flatten().long(), coefficients.flatten()[:, None] * side[rows]
    )
