"""One small model of every architecture and form, with parameters and buffers that all matter."""

import torch
from plain_sae import make_sae

FORMS = {
    "topk": {},
    "abs_topk": {"activation": "abs_topk"},
    "groupmax": {"activation": "groupmax"},
    "multi_topk": {"multi_topk": True},
    "batch_topk": {"arch": "batch_topk"},
    "matryoshka": {"arch": "matryoshka"},
    "relu": {"arch": "relu", "k": None},
    "relu, unit rows": {"arch": "relu", "k": None, "decoder_norm": "unit"},
    "relu, signed": {"arch": "relu", "k": None, "use_relu": False},
    "jumprelu": {"arch": "jumprelu", "k": None},
    "gated": {"arch": "gated", "k": None},
    "slots": {"arch": "slots", "k": None, "n_relations": 4, "n_answers": 3},
    "no subtraction": {"subtract_b_dec": False},
    "probe": {"probe_loss_coeff": 1.0, "probe_labels": "labels/rule", "probe_classes": 3},
    "no normalization": {"normalize_activations": "none"},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "jumprelu, constant_norm": {
        "arch": "jumprelu",
        "k": None,
        "normalize_activations": "constant_norm",
    },
    "transcoder": {"transcoder": True, "d_out": 7},
    "skip transcoder": {"transcoder": True, "d_out": 7, "skip_connection": True},
    "jumprelu transcoder": {"arch": "jumprelu", "k": None, "transcoder": True, "d_out": 7},
}
# Without the ones whose units differ from token to token, see test_token_norm.py.
ONE_UNIT = [form for form in FORMS if "_norm" not in form]
MEAN, SCALE = torch.linspace(-2, 3, 12), 1 / 42


def make_form(form, dtype=torch.float32, **fields):
    """Make the model of a form, normalised by a mean and a scale of 1/42, without gradients."""
    sae = make_sae(**{**FORMS[form], **fields})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            if name not in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
        if sae.architecture.selects_from_step:
            sae.threshold.fill_(0.7)
            sae.threshold_updates.fill_(3)
        if sae.config.has_scale:
            sae.set_normalization_(MEAN, SCALE)
            if sae.config.transcoder:
                sae.set_target_normalization_(torch.linspace(-1, 1, 7), 0.2)
    return sae.requires_grad_(False).to(dtype)


def make_raw(sae, *shape, seed=3):
    """Return activations [*shape, d_in] as a model would give them, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, sae.config.d_in, generator=generator)
    return (x / sae.activation_scale.float() + sae.activation_mean.float()).to(sae.dtype)
