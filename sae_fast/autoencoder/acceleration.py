"""Let dictionaries of SAELens, as objects in memory, encode and decode with the kernels here.

The object keeps its class, its configuration and its parameters, which share their memory with the
model here, so that edits of either are seen by both. It gets a subclass whose `encode` and `decode`
call the kernels where the result is the same: in float32, without gradients, and where no hook asks
for pre-activations. Everywhere else SAELens computes as before.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.autoencoder.model import SparseAutoencoder
from sae_fast.ops import SparseCode

_FAST, _LAST = "_sae_fast_model", "_sae_fast_last_code"
_SETTINGS = "_sae_fast_settings"
# The parameters by their names there, and the ones here that they share memory with.
_SHARED = {
    "W_enc": "W_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "b_enc": "b_enc",
    "b_gate": "b_enc",
    "threshold": "threshold",
    "r_mag": "r_mag",
    "b_mag": "b_mag",
}


def accelerate(sae: Any) -> Any:
    """Let a dictionary of SAELens encode and decode with the kernels of sae_fast; return it.

    The same object is changed and returned: it works wherever it worked before. Codes equal
    SAELens's own to float32 rounding.

    Args:
        sae: an `sae_lens.SAE` in float32, for inference, of architecture standard, topk, abstopk,
            jumprelu or gated.

    Raises ValueError where it is none, is of another dtype, or has a convention that the kernels do
    not have (selection weighted by decoder norms: call its `fold_W_dec_norm()` first).
    """
    if not all(hasattr(sae, name) for name in ("cfg", "W_enc", "W_dec", "save_model")):
        raise ValueError(f"a dictionary of SAELens is accelerated, got {type(sae).__name__}")
    if isinstance(sae, _Accelerated):
        return sae
    kind = sae.cfg.architecture()
    if kind not in ("standard", "topk", "abstopk", "jumprelu", "gated"):
        raise ValueError(f"architecture {kind} is not accelerated")
    if kind in ("topk", "abstopk") and sae.cfg.rescale_acts_by_decoder_norm:
        raise ValueError("selection is weighted by decoder norms: call fold_W_dec_norm() first")
    if sae.W_enc.dtype != torch.float32:
        raise ValueError(f"float32 is accelerated, got {sae.W_enc.dtype}")
    for parameter in sae.parameters():  # of a copy of an accelerated one they are transposed
        parameter.data = parameter.data.contiguous()
    _share(sae)
    own = type(sae)
    sae.__class__ = type(own.__name__, (_Accelerated, own), {"__module__": own.__module__})
    return sae


def _share(sae: Any) -> SparseAutoencoder:
    """Make the model of a dictionary, and let the parameters of both be the same memory."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_model(folder)
        path = Path(folder) / "cfg.json"
        # The object normalises activations itself, before what the kernels compute and after it.
        settings = json.loads(path.read_text(encoding="utf-8")) | {"normalize_activations": "none"}
        path.write_text(json.dumps(settings), encoding="utf-8")
        fast = SparseAutoencoder.from_pretrained(folder, sae.W_enc.device)
    own = dict(fast.named_parameters()) | dict(fast.named_buffers())
    for theirs, ours in _SHARED.items():
        parameter = getattr(sae, theirs, None)
        if isinstance(parameter, Tensor):
            data = own[ours].data = own[ours].data.clone()
            parameter.data = data.t() if theirs == "W_enc" else data
    sae.__dict__[_FAST] = fast
    sae.__dict__[_SETTINGS] = _settings_of(sae)
    return fast


def _model_of(sae: Any) -> SparseAutoencoder:
    """Return the model that shares its memory; a new one where parameters were put elsewhere."""
    fast: SparseAutoencoder = sae.__dict__[_FAST]
    own = dict(fast.named_parameters()) | dict(fast.named_buffers())
    for theirs, ours in _SHARED.items():
        parameter = getattr(sae, theirs, None)
        if isinstance(parameter, Tensor) and parameter.data_ptr() != own[ours].data_ptr():
            return _share(sae)
    return fast


def _as_before(sae: Any) -> Any:
    """Return a dictionary of SAELens's own class with the parameters of an accelerated one."""
    plain: Any = object.__new__(type(sae).__bases__[1])
    plain.__dict__.update(sae.__dict__)
    for name in (_FAST, _LAST, _SETTINGS):
        plain.__dict__.pop(name, None)
    return plain


class _Accelerated:
    """The methods that take the place of SAELens's own."""

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # The class is made at run time and the kernels' model is no part of the dictionary: a copy
        # is made of one of SAELens's own class, and accelerated again. Its own cannot be pickled.
        return accelerate, (_as_before(self),)

    def encode(self, x: Tensor) -> Tensor:
        sae: Any = self
        if not _is_plain(sae, x):
            code: Tensor = super().encode(x)  # type: ignore[misc]
            return code
        x = sae.hook_sae_input(sae.reshape_fn_in(x.to(sae.dtype)))
        x = sae.run_time_activation_norm_fn_in(x)
        made = _model_of(sae).encode(x)
        code = made.dense()
        sae.__dict__[_LAST] = weakref.ref(code), made
        code = sae.hook_sae_acts_post(code)
        return code

    def decode(self, feature_acts: Tensor) -> Tensor:
        sae: Any = self
        if not _is_plain(sae, feature_acts):
            x_hat: Tensor = super().decode(feature_acts)  # type: ignore[misc]
            return x_hat
        code = _known_code(sae, feature_acts)
        fast = _model_of(sae)
        x_hat = sae.hook_sae_recons(fast.decode(feature_acts if code is None else code))
        x_hat = sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(x_hat), sae.d_head)
        return x_hat

    def process_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> None:
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()


def _known_code(sae: Any, dense: Tensor) -> SparseCode | None:
    """Return the code of a dense array that `encode` gave last, if the array still has its values.

    Counting what is not 0 is faster than finding it. Equal numbers at the listed places, and no
    others, are the same array.
    """
    last, code = sae.__dict__.get(_LAST, (None, None))
    if last is None or last() is not dense:
        return None
    flat, made = dense.reshape(-1, dense.shape[-1]), code.flatten()
    places = made.indices.flatten().long()
    values = made.values.flatten()
    same = torch.equal(flat[made.entry_rows(), places], values)
    if not same or int(torch.count_nonzero(flat)) != int(torch.count_nonzero(values)):
        return None
    known: SparseCode = code
    return known


def _is_plain(sae: Any, x: Tensor) -> bool:
    """Return whether the kernels compute all that a call needs."""
    records = torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in sae.parameters())
    )
    point = sae.hook_sae_acts_pre  # SAELens puts an Identity in its place to leave hooks out
    hooked = not isinstance(point, torch.nn.Identity) and point.has_hooks()
    is_float32 = sae.dtype == torch.float32 and x.layout == torch.strided
    is_as_shared = _settings_of(sae) == sae.__dict__[_SETTINGS]
    return is_float32 and is_as_shared and not records and not hooked


def _settings_of(sae: Any) -> tuple[object, ...]:
    """Return the settings that decide what encode and decode compute."""
    cfg = sae.cfg
    k = cfg.k if cfg.architecture() in ("topk", "abstopk") else None
    used = None if k is None else sae.activation_fn.k
    return k, used, cfg.apply_b_dec_to_input, cfg.normalize_activations
