"""The list of architectures by the names that `arch` has for them, and how others get into it."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TypeVar

from sae_fast.autoencoder.architecture import Architecture
from sae_fast.autoencoder.jumprelu import JumpReLU
from sae_fast.autoencoder.own_architecture import check_class, checked_class
from sae_fast.autoencoder.slots import Slots
from sae_fast.autoencoder.thresholded import Gated, ReLU
from sae_fast.autoencoder.topk import BatchTopK, Matryoshka, TopK
from sae_fast.config.own_settings import own_config
from sae_fast.config.sae import SAEConfig, built_in, register, registered

ARCHITECTURES: dict[str, type[Architecture]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "slots": Slots,
}
_NAME = re.compile("[a-z][a-z0-9_]*")
_checked: dict[str, type[Architecture]] = {}  # of each registered one the class that is made

Registered = TypeVar("Registered", bound=type[Architecture])


def register_architecture(cls: Registered) -> Registered:
    """Let `arch` name an architecture of one's own, in this process; return the class.

    It can stand above the class as a decorator. From then on `SAEConfig(arch=NAME, …)` takes the
    settings that the class adds, and models, trainings, checkpoints and the memory plan know the
    architecture. A class of the same place in the same module takes the place of the one before,
    as when a cell of a notebook is run again.

    Args:
        cls: a class derived from `Architecture`, with a `name`, `loss` and `infer`.

    Raises ValueError, one line, for a class that lacks one of them or has a method with other
    arguments, a name that is in use, or a setting that is none or whose name is in use. A method
    that returns something else than it must is refused in one line when it is called.
    """
    if not (isinstance(cls, type) and issubclass(cls, Architecture)):
        raise ValueError(f"register_architecture: {cls!r} is no class derived from Architecture")
    name = cls.name
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"register_architecture: {cls.__name__}.name must be a word of small letters, digits "
            f"and _, such as my_topk, got {name!r}"
        )
    known = ARCHITECTURES.get(name)
    if known is not None and (name in built_in() or _place(known) != _place(cls)):
        raise ValueError(
            f"register_architecture: the name {name!r} of {cls.__name__} is in use by "
            f"{'.'.join(_place(known))}"
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ValueError(f"register_architecture: {cls.__name__} lacks {missing}")
    check_class(cls)
    config = own_config(name, cls.__name__, cls.Settings, cls.shared, _origin(cls))
    register(name, config)
    ARCHITECTURES[name] = cls
    _checked[name] = checked_class(cls, make_architecture)
    return cls


def make_architecture(config: SAEConfig) -> Architecture:
    """Return the architecture of a configuration; a registered one checks what its methods give."""
    return _checked.get(config.arch, ARCHITECTURES[config.arch])(config)


def unregister_architecture(name: str) -> None:
    """Forget a registered architecture; raise ValueError where there is none of this name."""
    if name not in registered():
        raise ValueError(f"unregister_architecture: no architecture {name!r} is registered")
    register(name, None)
    del ARCHITECTURES[name], _checked[name]


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _origin(cls: type) -> str:
    """Return what to import so that an architecture is registered, for errors."""
    module = sys.modules.get(cls.__module__)
    file = None if module is None else vars(module).get("__file__")
    if cls.__module__ == "__main__":
        return f"class {cls.__qualname__} of {file or 'a notebook'}"
    return cls.__module__ if file is None else f"{cls.__module__} ({file})"
