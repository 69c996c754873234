"""The losses of relu, jumprelu and gated in plain dense PyTorch."""

import torch
from plain_sae import error_term, goal, input_bias

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig

PATHS = ("sparse", "dense")


def make_thresholded(arch, path="sparse", *, seed=0, dtype=torch.float32, dead=(), **fields):
    """Make a small model without zero parameters, whose next step takes the given path."""
    defaults = {"arch": arch, "d_in": 12, "d_sae": 40, "dead_after_tokens": 100}
    sae = SparseAutoencoder(SAEConfig(**{**defaults, **fields}))
    generator = torch.Generator().manual_seed(seed)
    sae.initialize_(generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if sae.architecture.unit_norm:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.clamp_parameters_()
    sae.tokens_since_fired[list(dead)] = 1000
    go(sae, path)
    return sae.to(dtype)


def go(sae, path):
    """Let the next step of a model take a path."""
    sae.listed_per_token.fill_(0.0 if path == "sparse" else float(sae.config.d_sae))


def plain_code(sae, x):
    """Return the code [N, d_sae] of a batch."""
    return _CODES[sae.config.arch](sae, pre_activations(sae, x))


def pre_activations(sae, x):
    return (x - input_bias(sae)) @ sae.W_enc.t() + sae.b_enc


def plain_terms(sae, x, targets=None):
    """Return the loss terms of a model, each with its coefficient."""
    acts, target = plain_code(sae, x), goal(sae, x, targets)
    error = target - (acts @ sae.W_dec + sae.b_dec)
    y = x if targets is None else targets
    own = _TERMS[sae.config.arch](sae, x, acts, target, y)
    return {"recon_loss": sae.config.reconstruction_coeff * error_term(sae, error, y), **own}


def plain_gradients(sae, x, term=None, targets=None):
    """Return autograd's gradient of the loss, or of one term, for every parameter."""
    terms = plain_terms(sae, x, targets)
    loss = sum(terms.values()) if term is None else terms[term]
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def _row_norms(sae):
    return sae.W_dec.norm(dim=1) if sae.config.decoder_norm == "free" else 1.0


def _kernel(z):
    return ((z > -0.5) & (z < 0.5)).to(z.dtype)


class _PlainJump(torch.autograd.Function):
    """x 1[x > t] and its straight-through gradients, as arXiv:2407.14435 writes them."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth, to_input):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return x * (x > threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        window = threshold / ctx.bandwidth * _kernel((x - threshold) / ctx.bandwidth)
        grad_x = grad * (x > threshold) + (grad * window if ctx.to_input else 0)
        return grad_x, -(grad * window).sum(0), None, None


class _PlainStep(torch.autograd.Function):
    """1[x > t] and its straight-through gradients, as arXiv:2407.14435 writes them."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth, to_input):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        window = grad / ctx.bandwidth * _kernel((x - threshold) / ctx.bandwidth)
        return window if ctx.to_input else None, -window.sum(0), None, None


def _estimate(sae):
    return sae.threshold, sae.config.jumprelu_bandwidth, sae.config.jumprelu_ste_to_input


def _jumprelu_terms(sae, x, acts, target, y):
    config, pre_acts = sae.config, pre_activations(sae, x)
    l0 = _PlainStep.apply(pre_acts, *_estimate(sae)).sum(1).mean()
    penalty = {
        "l0": lambda: l0,
        "l0_target": lambda: (l0 / config.target_l0 - 1) ** 2,
        "tanh": lambda: (config.jumprelu_tanh_scale * acts * _row_norms(sae)).tanh().sum(1).mean(),
    }[config.sparsity_penalty]()
    return {
        "sparsity_loss": config.sparsity_penalty_coeff * penalty,
        "pre_act_loss": _pre_act_loss(sae, x, sae.threshold),
    }


def _pre_act_loss(sae, x, threshold):
    dead = sae.tokens_since_fired >= sae.config.dead_after_tokens
    pre_acts = (x - input_bias(sae).detach()) @ sae.W_enc.t() + sae.b_enc
    missing = (threshold - pre_acts).relu() * dead * _row_norms(sae)
    return sae.config.pre_act_loss_coeff * missing.sum(1).mean()


def _relu_terms(sae, x, acts, target, y):
    p = sae.config.sparsity_norm_p
    amounts = acts.abs() * _row_norms(sae)
    if p != 1:
        amounts = (amounts + 1e-3) ** p - 1e-3**p
    return {"l1_loss": sae.config.l1_penalty_coeff * amounts.sum(1).mean()}


def _gated_code(sae, gate):
    magnitudes = ((gate - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
    return (gate > 0) * magnitudes


def _gated_terms(sae, x, acts, target, y):
    gate = pre_activations(sae, x).relu()
    l1 = (gate * _row_norms(sae)).sum(1).mean()
    by_gate = gate @ sae.W_dec.detach() + sae.b_dec.detach()
    return {
        "l1_loss": sae.config.l1_penalty_coeff * l1,
        "aux_loss": error_term(sae, target.detach() - by_gate, y),
        "pre_act_loss": _pre_act_loss(sae, x, 0.0),
    }


_CODES = {
    "relu": lambda sae, pre_acts: pre_acts.relu() if sae.config.use_relu else pre_acts,
    "jumprelu": lambda sae, pre_acts: _PlainJump.apply(pre_acts, *_estimate(sae)),
    "gated": _gated_code,
}
_TERMS = {"relu": _relu_terms, "jumprelu": _jumprelu_terms, "gated": _gated_terms}
