"""Checks of an architecture of the user's own: of its class, and of what its methods return.

The class that makes the architecture of a model is derived from the user's. Its methods call the
user's ones and check the results by type, shape and name, never by their numbers, so that the host
waits for no device. An error names the class, the method and what is expected, in one line.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.architecture import Architecture, ArchitectureLoss, Batch, Weights
from sae_fast.autoencoder.transcoder import SKIP
from sae_fast.config import SAEConfig
from sae_fast.own_code import OwnCodeError, call

_ROWS = ("W_enc", "W_dec")
# Terms that every model has, of which an architecture may give some without listing them.
_COMMON_TERMS = {"l1_loss", "decorr_loss", "aux_loss"}
_TAKEN = {"recon_loss", "loss", "fvu", "l0", "grad_norm", "variance"}
_FLAGS = (
    *("unit_norm", "compares_latents", "needs_host_sync", "selects_from_step"),
    "needs_step_l0",
)
_NAMES = ("shared", "term_names", "metric_names")


def check_class(cls: type[Architecture]) -> None:
    """Raise ValueError, one line, for a class whose attributes or methods do not fit the base."""
    own = f"register_architecture: {cls.__name__}"
    if not isinstance(cls.Settings, type):
        raise ValueError(f"{own}.Settings must be a class, got {_kind(cls.Settings)}")
    _check_attributes(own, {name: getattr(cls, name) for name in (*_FLAGS, *_NAMES, "full_k_aux")})
    for name in _METHODS:
        _check_method(own, cls, name)
    if cls.needs_step_l0 is True and cls.count_active is Architecture.count_active:
        raise ValueError(f"{own} has needs_step_l0, which needs a method count_active")


def checked_class(
    cls: type[Architecture], remake: Callable[[SAEConfig], Architecture]
) -> type[Architecture]:
    """Return a class derived from an architecture, whose methods check what they return.

    Args:
        cls: the architecture.
        remake: makes an architecture of its configuration, for copies and pickles.
    """
    members: dict[str, Any] = {name: _checked(cls, name) for name in _RESULTS}
    members["__init__"] = _checked_init(cls)
    members["__reduce__"] = lambda self: (remake, (self.config,), vars(self))
    for name in ("__module__", "__qualname__", "__doc__"):
        members[name] = getattr(cls, name)
    return types.new_class(cls.__name__, (cls,), exec_body=lambda space: space.update(members))


# ---- the class -------------------------------------------------------------------------------


def _check_attributes(own: str, attributes: Mapping[str, Any]) -> None:
    """Check attributes of a class or an object; a property has no value before there is one."""
    known = {name: it for name, it in attributes.items() if not isinstance(it, property)}
    for name, value in known.items():
        if name in _FLAGS and not isinstance(value, bool):
            raise ValueError(f"{own}.{name} must be True or False, got {value!r}")
        if name in _NAMES and not _are_names(value):
            raise ValueError(f"{own}.{name} must be a tuple of names, got {value!r}")
    room = known.get("full_k_aux", 0)
    if isinstance(room, bool) or not isinstance(room, int) or room < 0:
        raise ValueError(f"{own}.full_k_aux must be a whole number from 0, got {room!r}")
    logged: list[str] = [*known.get("term_names", ()), *known.get("metric_names", ())]
    for name in logged:
        if name in _TAKEN or logged.count(name) > 1:
            raise ValueError(
                f"{own}: {name} is the name of another term or metric: rename it in term_names or "
                "metric_names"
            )


def _are_names(value: object) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return all(isinstance(name, str) and name.isidentifier() for name in value)


def _check_method(own: str, cls: type[Architecture], name: str) -> None:
    """Raise ValueError unless a method can be called with the arguments of the base's."""
    method = inspect.getattr_static(cls, name)
    if method is inspect.getattr_static(Architecture, name):
        return
    expected = [*inspect.signature(getattr(Architecture, name)).parameters]
    function = getattr(cls, name)
    if isinstance(method, property) or not callable(function):
        raise ValueError(f"{own}.{name} must be a method, got {_kind(method)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a method in C
        return
    given = expected[isinstance(method, staticmethod | classmethod) :]
    try:
        signature.bind(*given)
    except TypeError:
        wanted = ", ".join(expected)
        raise ValueError(f"{own}.{name} must take ({wanted}), got {_plain(signature)}") from None


def _plain(signature: inspect.Signature) -> str:
    """Return the names of parameters, without types."""
    bare = [part.replace(annotation=part.empty) for part in signature.parameters.values()]
    return str(inspect.Signature(bare))


# ---- the methods -----------------------------------------------------------------------------


def _checked_init(cls: type[Architecture]) -> Callable[..., None]:
    own = f"arch {cls.name}: {cls.__name__}"

    def init(self: Architecture, config: Any) -> None:
        call(f"{own}.__init__", cls.__init__, self, config)
        if "config" not in vars(self):
            raise OwnCodeError(f"{own}.__init__ must call super().__init__(config)")
        _check_attributes(own, {n: getattr(self, n) for n in (*_FLAGS, *_NAMES, "full_k_aux")})

    return init


def _checked(cls: type[Architecture], name: str) -> Callable[..., Any]:
    """Return a method that calls the method of a class and checks what it returns."""
    own = f"arch {cls.name}: {cls.__name__}.{name}"
    method, check = inspect.getattr_static(cls, name), _RESULTS[name]
    names = [*inspect.signature(getattr(Architecture, name)).parameters][1:]

    def checked(self: Architecture, *given: Any, **named: Any) -> Any:
        found = call(own, method.__get__(self, type(self)), *given, **named)
        return check(own, self, found, {**dict(zip(names, given, strict=False)), **named})

    return checked


def _must(own: str, expected: str, got: object) -> OwnCodeError:
    return OwnCodeError(f"{own} must return {expected}, got {got}")


def _kind(value: object) -> str:
    """Return dtype and shape of a tensor, or else the type of a value."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__


def _start_values(own: str, _: Architecture, found: Any, __: Any) -> dict[str, Tensor]:
    """Check start values of parameters or buffers; a float64 parameter becomes a float32 one."""
    _check_tensors(own, found)
    for name in found:
        if not name.isidentifier():
            raise _must(own, "names that are words", repr(name))
    return dict(found)


def _parameters(own: str, architecture: Architecture, found: Any, _: Any) -> dict[str, Tensor]:
    start = _start_values(own, architecture, found, _)
    for name, tensor in start.items():
        if not tensor.is_floating_point():
            raise _must(own, f"tensors of floats, which can be trained ({name})", _kind(tensor))
    return {name: tensor.detach().to(torch.float32) for name, tensor in start.items()}


def _check_tensors(own: str, found: Any, part: str = "") -> None:
    expected = f"{part}a dict of tensors by name"
    if not isinstance(found, Mapping):
        raise _must(own, expected, _kind(found))
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise _must(own, expected, f"{name!r}: {_kind(tensor)}")


def _parameter_names(architecture: Architecture) -> tuple[str, ...]:
    """Return the names of a model's parameters."""
    config = architecture.config
    probe = ("W_probe", "b_probe") if config.has_probe else ()
    further = (SKIP,) if config.skip_connection else ()
    return (*_ROWS, "b_enc", "b_dec", *architecture.parameters(), *probe, *further)


def _trained(own: str, architecture: Architecture, found: Any, _: Any) -> tuple[str, ...] | None:
    if found is None:
        return None
    names = _parameter_names(architecture)
    expected = f"None or a tuple of some of {', '.join(names)}"
    if isinstance(found, str) or not isinstance(found, Sequence) or not found:
        raise _must(own, expected, repr(found))
    if unknown := [name for name in found if name not in names]:
        raise _must(own, expected, repr(unknown[0]))
    if len([name for name in _ROWS if name in found]) == 1:
        raise _must(own, "both of W_enc and W_dec or neither", repr(tuple(found)))
    return tuple(found)


def _learning_rates(own: str, architecture: Architecture, found: Any, _: Any) -> dict[str, float]:
    names = [name for name in _parameter_names(architecture) if name not in _ROWS]
    expected = f"a dict of factors by name, of {', '.join(names)}"
    if not isinstance(found, Mapping):
        raise _must(own, expected, _kind(found))
    for name, factor in found.items():
        if name not in names:
            raise _must(own, expected, repr(name))
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor) or factor < 0:
            raise _must(own, f"factors that are finite and at least 0 ({name})", repr(factor))
    return {name: float(factor) for name, factor in found.items()}


def _loss(own: str, architecture: Architecture, found: Any, given: Any) -> ArchitectureLoss:
    if not isinstance(found, ArchitectureLoss):
        raise _must(own, "an ArchitectureLoss", _kind(found))
    batch: Batch = given["batch"]
    _check_code(own, architecture, found.code, batch.x.size(0), "code")
    _check_shape(own, "residual", found.residual, tuple(batch.target.shape))
    _check_shape(own, "squared_error", found.squared_error, (batch.x.size(0),))
    _check_shape(own, "recon_loss", found.recon_loss, ())
    _check_tensors(own, found.terms, "terms as ")
    _check_tensors(own, found.metrics, "metrics as ")
    arch = f"arch {architecture.config.arch}"
    listed = {*architecture.term_names}
    if unknown := found.terms.keys() - listed - _COMMON_TERMS:
        raise OwnCodeError(
            f"{arch}: loss returns the term {min(unknown)}, which is not in its term_names"
        )
    if unknown := found.metrics.keys() - {*architecture.metric_names}:
        raise OwnCodeError(
            f"{arch}: loss returns the metric {min(unknown)}, which is not in its metric_names"
        )
    missing = (listed - found.terms.keys() - _COMMON_TERMS) | (
        {*architecture.metric_names} - found.metrics.keys()
    )
    if missing:
        raise OwnCodeError(
            f"{arch}: loss must return {min(missing)}, which is in its term_names or metric_names, "
            "in every step"
        )
    for name, tensor in {**found.terms, **found.metrics}.items():
        _check_shape(own, name, tensor, ())
    terms = {name: term.to(found.recon_loss.dtype) for name, term in found.terms.items()}
    if not any(term.requires_grad for term in (found.recon_loss, *terms.values())) and (
        torch.is_grad_enabled() and _is_trained(given["weights"])
    ):
        raise OwnCodeError(f"{own} must return terms with gradients, and none of them has one")
    metrics = {
        name: metric.detach().to(found.recon_loss.dtype) for name, metric in found.metrics.items()
    }
    fields = found.code, found.residual, found.squared_error, found.recon_loss
    return ArchitectureLoss(*fields, terms, metrics)


def _is_trained(weights: Weights) -> bool:
    """Return whether a gradient is recorded for any parameter or buffer of a model."""
    tensors = (weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec, *weights.own.values())
    return any(tensor.requires_grad for tensor in tensors)


def _infer(own: str, architecture: Architecture, found: Any, given: Any) -> ops.SparseCode:
    if isinstance(found, ops.DenseCode):
        raise _must(own, "an ops.SparseCode", "an ops.DenseCode: return code.listed()")
    _check_code(own, architecture, found, given["x"].size(0), "")
    return cast(ops.SparseCode, found)


def _check_code(own: str, architecture: Architecture, code: Any, n_rows: int, part: str) -> None:
    what = f"{part} as an ops.SparseCode or ops.DenseCode" if part else "an ops.SparseCode"
    if not isinstance(code, ops.Code):
        raise _must(own, what, _kind(code))
    shape, wanted = (code.n_rows, code.d_sae), (n_rows, architecture.config.d_sae)
    if shape != wanted:
        raise _must(own, f"{what} of {wanted[0]} tokens and {wanted[1]} latents", shape)


def _check_shape(own: str, name: str, found: Any, shape: tuple[int, ...]) -> None:
    """Raise unless a value is a tensor of floats of a shape."""
    if isinstance(found, Tensor) and found.is_floating_point() and tuple(found.shape) == shape:
        return
    form = f"of shape {shape}" if shape else "with no dimension (0-d)"
    raise _must(own, f"{name} as a tensor of floats {form}", _kind(found))


def _thresholds(own: str, architecture: Architecture, found: Any, _: Any) -> Tensor | None:
    shape = (architecture.config.d_sae,)
    if found is not None and not (isinstance(found, Tensor) and tuple(found.shape) == shape):
        raise _must(own, f"None or a tensor of shape {shape}", _kind(found))
    return found


def _number(own: str, _: Architecture, found: Any, __: Any) -> Tensor:
    if not isinstance(found, Tensor) or found.ndim != 0:
        raise _must(own, "a tensor with no dimension (0-d)", _kind(found))
    return found


def _sums(own: str, _: Architecture, found: Any, __: Any) -> dict[str, Tensor]:
    _check_tensors(own, found)
    return dict(found)


def _text(own: str, _: Architecture, found: Any, __: Any) -> str | None:
    if not isinstance(found, str | None):
        raise _must(own, "a text or None", _kind(found))
    return found


def _nothing(*_: Any) -> None:
    """Ignore what a method returns that has nothing to return."""


_RESULTS: dict[str, Callable[[str, Architecture, Any, Any], Any]] = {
    "parameters": _parameters,
    "trained": _trained,
    "learning_rates": _learning_rates,
    "buffers": _start_values,
    "loss": _loss,
    "infer": _infer,
    "thresholds": _thresholds,
    "penalty": _number,
    "observe": _sums,
    "observe_excess": _sums,
    "after_step_": _nothing,
    "count_active": _number,
    "clamp_parameters_": _nothing,
    "warning": _text,
    "rescale_": _nothing,
    "rebase_": _nothing,
}
_METHODS = (*_RESULTS, "reconstruct", "__init__")
