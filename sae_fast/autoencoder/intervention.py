"""An autoencoder in the place of activations: replaced, edited or only watched.

`SparseAutoencoder.attached` puts an Intervention into a transformers model, and
`SparseAutoencoder.hook` gives one to call as a hook of torch or TransformerLens. Codes and edits
are in the units of the activations: one unit of latent j adds the decoder row W_dec[j].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.activations.capture.passes import TokensOfPass
from sae_fast.activations.capture.splicing import first_of, with_first
from sae_fast.autoencoder.decoding import decode_rows
from sae_fast.autoencoder.edits import (
    Edit,
    EditedCode,
    Latents,
    Positions,
    divided,
    edited,
    make_edit,
)
from sae_fast.autoencoder.patching import patched
from sae_fast.autoencoder.shapes import require_tensor
from sae_fast.ops.code import RAW

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder

Mode = Literal["replace", "error", "observe"]


class _Read(NamedTuple):
    """Activations and code that were read at a hook point.

    Attributes:
        x: the activations [..., D] as the model has them, padding set to 0.
        code: their code, with its gradients if they were asked for; None: it is not needed.
        plain: the code without what was added for its gradients.
        tokens: of the pass, if they are known.
        mask: [...] bool, False for padding; None: there is none.
    """

    x: Tensor
    code: ops.SparseCode | None
    plain: ops.SparseCode | None
    tokens: TokensOfPass | None
    mask: Tensor | None


class _Probe(NamedTuple):
    """Hold the code of a pass, for its gradients.

    Attributes:
        code: of the pass, detached, with the entries of the patch if there is one.
        ablated: what each entry loses where it is ablated, or patched.
        added: zeros that were added to the values, for their gradients.
    """

    code: ops.SparseCode
    ablated: Tensor
    added: Tensor


class Intervention:
    """The edits of codes, and the codes that were read; callable as a hook.

    Edits act in the order in which they were made, at every later call, until `reset`. Latents are
    a number, several without repetition, or a mask [d_sae] bool; the other numbers are one for
    all of them, or one for each. Positions are numbers, a slice or a mask [T] or [B, T] bool; they
    are counted from the first token of a sequence, padding counted, also where a model with a cache
    reads only the newest token.

    Attributes:
        mode: "replace": the reconstruction takes the place of the activations. "error": what the
            edits change in the reconstruction is added to the activations, which keep their
            error term x − x_hat, so that nothing changes without an edit. "observe": nothing
            changes, and there are no edits.
        calls: how often it was run since `clear`.
        has_run: whether it was run at all.
        codes: the code of each call, before the edits, detached; padding has no active latents.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        mode: Mode = "replace",
        *,
        record: bool = True,
        gradients: bool = False,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if gradients and mode == "observe":
            raise ValueError("gradients of codes need mode error or replace, got observe")
        self.mode = mode
        self.calls = 0
        self.has_run = False
        self.codes: list[ops.SparseCode] = []
        self._sae = sae
        self._record = record
        self._gradients = gradients
        self._edits: list[Edit] = []
        self._probes: list[_Probe] = []
        self._patch: tuple[ops.SparseCode, float] | None = None

    def __repr__(self) -> str:
        edits = f"{len(self._edits)} edit{'s' * (len(self._edits) != 1)}"
        calls = f"{self.calls} call{'s' * (self.calls != 1)}"
        return f"Intervention(mode={self.mode!r}, {edits}, {calls})"

    @property
    def target_width(self) -> int:
        """The number of columns of the activations that it replaces."""
        return self._sae.config.target_width

    # ---- edits -------------------------------------------------------------------------------

    def add(
        self, latents: Latents, value: float | Tensor, *, positions: Positions = None
    ) -> Intervention:
        """Add to the values of latents, active or not; return the intervention.

        It adds `value` times their decoder rows to the activations.
        """
        return self._edit(latents, positions, offset=value)

    def set(
        self, latents: Latents, value: float | Tensor, *, positions: Positions = None
    ) -> Intervention:
        """Give latents a value, active or not; return the intervention."""
        return self._edit(latents, positions, factor=0.0, offset=value)

    def scale(
        self, latents: Latents, factor: float | Tensor, *, positions: Positions = None
    ) -> Intervention:
        """Multiply the values of latents; return the intervention."""
        return self._edit(latents, positions, factor=factor)

    def clamp(
        self,
        latents: Latents,
        minimum: float | Tensor = -torch.inf,
        maximum: float | Tensor = torch.inf,
        *,
        positions: Positions = None,
    ) -> Intervention:
        """Keep the values of latents from `minimum` to `maximum`; return the intervention.

        A latent that is not active has the value 0, which a minimum above 0 raises too.
        """
        return self._edit(latents, positions, lower=minimum, upper=maximum)

    def ablate(self, latents: Latents, *, positions: Positions = None) -> Intervention:
        """Set the values of latents to 0; return the intervention."""
        return self._edit(latents, positions, factor=0.0)

    def patch(self, code: ops.SparseCode, share: float = 1.0) -> Intervention:
        """Give all latents the values of another code, before the edits; return the intervention.

        With a `share` below 1 they go only so far from their own values, 0, to the other ones, 1.

        Args:
            code: in raw units, of the tokens of a later pass, as `codes` has it of another input.
            share: from 0 to 1.
        """
        if self.mode == "observe":
            raise ValueError("a patch needs mode error or replace, got observe")
        if not isinstance(code, ops.SparseCode):
            raise TypeError(f"patch: code must be a code, as in codes, got {type(code).__name__}")
        if not 0 <= share <= 1:
            raise ValueError(f"patch: share must be from 0 to 1, got {share}")
        self._patch = code.detach(), share
        return self

    def reset(self) -> Intervention:
        """Remove all edits, and the patch; return the intervention."""
        self._edits.clear()
        self._patch = None
        return self

    def clear(self) -> None:
        """Forget the codes and gradients of the calls, and count calls from 0."""
        self.codes.clear()
        self._probes.clear()
        self.calls = 0

    def _edit(self, latents: Latents, positions: Positions, **numbers: Any) -> Intervention:
        if self.mode == "observe":
            raise ValueError("edits need mode error or replace, got observe")
        self._edits.append(make_edit(latents, self._sae.config.d_sae, positions, **numbers))
        return self

    # ---- gradients ---------------------------------------------------------------------------

    def attribution(self, metric: Tensor) -> ops.SparseCode:
        """Return gradient times value for every active latent: its effect on a metric.

        It is the first-order estimate of what the metric loses when the latent alone is ablated at
        that token (attribution patching). The result is a code in the shape of `codes[0]`; a
        latent's effect over all tokens is a sum of `dense()` over the dimensions of the tokens.
        With a `patch` its values take the place of 0: the effect is gradient times the difference
        of the value and the other one, also of latents that only the patch has.

        Args:
            metric: 0-d, computed from the output of the one forward pass since `clear`; it may
                be asked for several metrics of that pass.

        Raises:
            ValueError: without `gradients=True`, for more than one pass, or where the metric
                does not depend on the code.
        """
        (code, ablated, _), gradient = self._gradient(metric)
        return replace(code, values=ablated * gradient, signed=True, base=None)

    def gradient(self, metric: Tensor) -> ops.SparseCode:
        """Return a metric's gradient to the value of every active latent, see `attribution`."""
        (code, _, _), gradient = self._gradient(metric)
        return replace(code, values=gradient, signed=True, base=None)

    def _gradient(self, metric: Tensor) -> tuple[_Probe, Tensor]:
        if not self._gradients:
            raise ValueError("gradients of codes are recorded with gradients=True only")
        if len(self._probes) != 1:
            raise ValueError(
                f"attribution is of one forward pass with gradients enabled, and there were "
                f"{len(self._probes)}: call clear() before the pass, and leave out torch.no_grad()"
            )
        (probe,) = self._probes
        if not isinstance(metric, Tensor):
            raise TypeError(f"metric must be a tensor, got {type(metric).__name__}")
        if metric.ndim != 0 or not metric.requires_grad:
            raise ValueError(
                f"metric must be 0-d and depend on the model's output, got shape "
                f"{tuple(metric.shape)}{'' if metric.requires_grad else ' without a gradient'}"
            )
        (found,) = torch.autograd.grad(metric, probe.added, retain_graph=True, allow_unused=True)
        if found is None:
            raise ValueError("metric does not depend on the code: the hook point comes after it")
        return probe, found

    # ---- calls -------------------------------------------------------------------------------

    def __call__(self, *given: Any, **_: Any) -> Any:
        """Run as a hook.

        As a forward hook of torch it takes (module, arguments, output) and returns the output that
        takes its place, as a pre-hook (module, arguments). As a hook of TransformerLens it takes
        (activations, hook=…); activations alone give what takes their place.
        """
        if not isinstance(given[0], nn.Module):
            return self._flat(given[0])
        if len(given) == 2:  # before the module
            arguments = given[1]
            return (self._flat(arguments[0]), *arguments[1:])
        output = given[-1]
        own = first_of(output)
        new = self._flat(own)
        return None if new is own else with_first(output, new)

    def _flat(self, x: Tensor) -> Tensor:
        """Return activations after `write`; the last dimensions may be heads of d_in columns."""
        if self._sae.config.transcoder:
            raise ValueError(
                "a transcoder reads at one place and writes at another: use attached, not hook"
            )
        width = self._sae.config.d_in
        require_tensor(x, "activations")
        if x.ndim > 2 and x.shape[-1] != width and x.shape[-1] * x.shape[-2] == width:
            new = self.write(x.flatten(-2), self.read(x.flatten(-2), None))
            return x if new is None else new.reshape(x.shape)
        new = self.write(x, self.read(x, None))
        return x if new is None else new

    def read(self, x: Tensor, tokens: TokensOfPass | None) -> _Read:
        """Encode activations [..., D] and record their code; called once a pass."""
        sae, width = self._sae, self._sae.config.d_in
        require_tensor(x, "activations")
        if x.ndim == 0 or x.shape[-1] != width:
            columns = x.shape[-1] if x.ndim else 0
            raise ValueError(
                f"the autoencoder has d_in {width}, the activations here have {columns} columns: "
                "it is of another hook point or model"
            )
        self.calls, self.has_run = self.calls + 1, True
        if tokens is not None and x.shape[:-1] != tokens.shape:
            is_flat = x.shape[:-1] == (tokens.shape[0] * tokens.shape[1],)
            tokens = tokens if is_flat else None
        mask = None
        if tokens is not None and tokens.mask is not None:
            mask = tokens.mask.to(x.device).reshape(x.shape[:-1])
            x = torch.where(mask[..., None], x, 0)  # padding may be NaN
        is_edited = bool(self._edits) or self._patch is not None
        changes = self.mode == "replace" or is_edited or self._gradients
        if not (changes and self.mode != "observe") and not self._record:
            return _Read(x, None, None, tokens, mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and changes):
            code = sae.encode(x, units=RAW)
            if mask is not None:
                code = code.mask(tokens=mask)
        if self._record:
            self.codes.append(_of_tokens(code.detach(), tokens))
        plain, ablated = code, code.values
        if self._patch is not None and self.mode != "observe":
            both = patched(code, self._patch[0])
            plain, ablated = both.before, both.before.values - both.other
            code = both.between(self._patch[1])
        if self._gradients and torch.is_grad_enabled():
            added = torch.zeros_like(code.values, requires_grad=True)
            code = code.with_values(code.values + added)
            known = _of_tokens(plain.detach(), tokens)
            self._probes.append(_Probe(known, ablated.detach(), added))
        return _Read(x, code, plain, tokens, mask)

    def write(self, y: Tensor, read: _Read) -> Tensor | None:
        """Return what takes the place of activations; None: they stay.

        Of a transcoder `y` [..., d_out] are other activations than those that were read.
        """
        code = read.code
        if self.mode == "observe" or code is None:
            return None
        is_changed = bool(self._edits) or code is not read.plain
        if self.mode == "error" and not is_changed:
            return None
        dtype = torch.promote_types(y.dtype, code.dtype)
        tokens = read.tokens
        leading = tuple(read.x.shape[:-1]) if tokens is None else tokens.shape
        first = 0 if tokens is None else tokens.first
        before, after = edited(code.flatten(), self._edits, leading, first, dtype)
        if self.mode == "replace":
            part = code.with_values(after.values).flatten()
            new = self._sae.decode(part, read.x).to(dtype)
            if after.columns is not None:
                new = new + self._combined(after.columns, after.latents)
        else:
            difference = self._difference(read, before, after, dtype)
            if difference is None:
                return None
            new = y.reshape(-1, y.shape[-1]).to(code.device, dtype) + difference
        new = new.reshape(y.shape).to(device=y.device, dtype=y.dtype)
        if read.mask is None:
            return new
        return torch.where(read.mask.reshape(*y.shape[:-1], 1), new, y)

    def _difference(
        self, read: _Read, before: EditedCode, after: EditedCode, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what edits change in a reconstruction, [N, D]; None: nothing at any token.

        It is exactly 0 for a token whose code they leave as it was.
        """
        code, plain = read.code, read.plain
        assert code is not None
        assert plain is not None
        flat, own = code.flatten(), before
        if code is not plain:  # the gradient is of the edited code alone
            own = divided(plain.flatten(), after.latents, dtype)
        parts: list[Tensor] = []
        if after.columns is not None and own.columns is not None:
            parts.append(self._combined(after.columns - own.columns, after.latents))
        if after.is_changed or code is not plain:
            edited_part, own_part = (
                decode_rows(flat.with_values(part.values), self._sae.W_dec, None)
                for part in (after, own)
            )
            parts.append(edited_part - own_part)
        return sum(parts[1:], parts[0]) if parts else None

    def _combined(self, columns: Tensor, latents: Tensor) -> Tensor:
        """Return Σ_j columns[:, j] · W_dec[latents[j]], [N, D], in the dtype of the columns."""
        return columns @ self._sae.W_dec[latents].to(columns.dtype)


def _of_tokens(code: ops.SparseCode, tokens: TokensOfPass | None) -> ops.SparseCode:
    """Return a code in the shape [B, T] of the tokens, where that is known."""
    return code if tokens is None else code.shaped(tokens.shape)
