"""Models of each kind with random parameters, thresholds and normalisations."""

import torch

from sae_fast import SAEConfig, SparseAutoencoder

D_IN, D_SAE = 16, 40
ORIGIN = {
    **{"model": "gpt2", "hook": "mlp_in.3", "layer": 3, "dataset": 'te"xts # 1'},
    **{"revision": "a1", "tokenizer": "sha256:ab", "special_tokens": "excluded"},
    "settings": {"weights": "sha256:cd", "ctx_len": 128, "pack": True},
}
TRANSCODER = {"transcoder": True, "d_out": D_IN}
SKIP = {**TRANSCODER, "skip_connection": True}
KINDS = {
    "topk": {"arch": "topk", "k": 4},
    "topk without subtraction": {"arch": "topk", "k": 4, "subtract_b_dec": False},
    "abs_topk": {"arch": "topk", "k": 4, "activation": "abs_topk"},
    "groupmax": {"arch": "topk", "k": 4, "activation": "groupmax"},
    "batch_topk": {"arch": "batch_topk", "k": 4},
    "matryoshka": {"arch": "matryoshka", "k": 4},
    "relu": {"arch": "relu"},
    "relu without subtraction": {"arch": "relu", "subtract_b_dec": False},
    "jumprelu": {"arch": "jumprelu"},
    "jumprelu without subtraction": {"arch": "jumprelu", "subtract_b_dec": False},
    "gated": {"arch": "gated"},
    "gated without subtraction": {"arch": "gated", "subtract_b_dec": False},
    "relu transcoder": {"arch": "relu", **TRANSCODER},
    "jumprelu skip transcoder": {"arch": "jumprelu", **SKIP},
    "topk skip transcoder": {"arch": "topk", "k": 4, **SKIP},
    "batch_topk transcoder of two widths": {
        "arch": "batch_topk",
        "k": 4,
        **TRANSCODER,
        "d_out": 12,
    },
    "topk with layer_norm": {"arch": "topk", "k": 4, "normalize_activations": "layer_norm"},
    "jumprelu with constant_norm": {"arch": "jumprelu", "normalize_activations": "constant_norm"},
}


def make(kind, normalize="mean_scale"):
    """Return a model of a kind in evaluation mode."""
    given = {"normalize_activations": normalize, **KINDS[kind]}
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, **given)
    sae = SparseAutoencoder(config)
    generator = torch.Generator().manual_seed(0)

    def random(tensor, scale=1.0):
        return torch.randn(tensor.shape, generator=generator) * scale

    sae.initialize_(generator)
    with torch.no_grad():
        state = dict(sae.named_parameters()) | dict(sae.named_buffers())
        for name in ("b_enc", "b_dec", "W_skip", "r_mag", "b_mag"):
            if name in state:
                state[name].copy_(random(state[name], 0.2))
        if "threshold" in state:
            state["threshold"].copy_(random(state["threshold"]).abs())
        if "threshold_updates" in state:
            state["threshold_updates"].fill_(3)
    if config.has_scale:
        sae.set_normalization_(random(sae.activation_mean), 0.3)
        if config.transcoder:
            sae.set_target_normalization_(random(sae.target_mean), 0.7)
    sae.origin = dict(ORIGIN)
    if config.transcoder:
        sae.origin["targets"] = {"model": "gpt2", "hook": "mlp_out.3", "layer": 3}
    return sae.eval()


def units_of(sae):
    """Return the units of the codes of other libraries, in which formulas and files agree."""
    return "normalized" if sae.config.normalizes_tokens else "raw"


def rows(n_rows=50):
    """Return raw activations."""
    return torch.randn(n_rows, D_IN, generator=torch.Generator().manual_seed(1)) * 3 + 0.5
