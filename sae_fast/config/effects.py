"""Settings without an effect are refused, in a line that names what they need.

A setting states what it needs where it is declared (`needs` and `run_needs` in setting.py). It is
refused if it was given, differs from its default, and what it needs is not there. What the program
fills in is never refused, and 0, false and null need nothing: they switch something off.

`needs` is about the other settings of a configuration, which checks it as it is made; `run_needs`
is about the data and the run, and the trainer checks it once these are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sae_fast.config.setting import Rules, rules_of
from sae_fast.json_files import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_fast.config.fields import ConfigFile
    from sae_fast.config.run import RunConfig
    from sae_fast.config.sae import SAEConfig
    from sae_fast.config.train import TrainConfig

_ROOM = 1 << 20  # a width at which every default fits
# Set while configurations are made that other settings are still laid over.
_is_trial = ContextVar("is_trial", default=False)


class IdleSettingError(ValueError):
    """The setting called `name` has no effect."""

    def __init__(self, name: str, value: object, needs: str) -> None:
        super().__init__(f"{name} = {shown(value)} needs {needs}")
        self.name = name


@dataclass(frozen=True)
class Run:
    """The data and the run that the settings of a training act on.

    Attributes:
        sae: the complete configuration of the model.
        train: the configuration of its training.
        data: "shards", "tensor", "source" (a caller's own), "iterator" (one tensor after the other)
            or "model" (rows of a forward pass).
        has_heldout: whether there are held-out rows.
        has_names: returns whether the files name their activations; it opens them.
        has_target_names: returns whether the files of targets name these; it opens them.
        total_steps: the number of optimizer steps.
    """

    sae: SAEConfig
    train: TrainConfig
    data: Literal["shards", "tensor", "source", "iterator", "model"]
    has_heldout: bool
    has_names: Callable[[], bool]
    has_target_names: Callable[[], bool]
    total_steps: int


@contextmanager
def unchecked() -> Iterator[None]:
    """Let configurations inside this context be made with settings that have no effect.

    Outside of it, the configuration of a training is made from them and checked.
    """
    token = _is_trial.set(True)
    try:
        yield
    finally:
        _is_trial.reset(token)


def check_effects(config: ConfigFile) -> None:
    """Raise IdleSettingError for the first given setting without effect beside the others."""
    if _is_trial.get():
        return
    for name, value, rules in _asked_for(config):
        needs = rules.needs
        if needs is not None and not needs.holds(config) and not _is_filled_in(config, name, value):
            raise IdleSettingError(name, value, needs.needs)


def check_run_effects(run: Run, before: RunConfig | None = None) -> None:
    """Raise IdleSettingError for a given setting that has no effect in a training.

    With `before`, the configuration of the resumed run, settings that it had are left alone.
    """
    for config in (run.sae, run.train):
        for name, value, rules in _asked_for(config):
            needs = rules.run_needs
            is_known = before is not None and getattr(before, name) == value
            if needs is None or is_known or needs.holds(run) or _is_filled_in(config, name, value):
                continue
            raise IdleSettingError(name, value, needs.needs)
    limits = ("max_steps", "max_tokens", "max_epochs")
    for name, rules in rules_of(run.train).items():
        steps = (rules.within_run and getattr(run.train, name)) or 0
        is_known = before is not None and all(
            getattr(before, each) == getattr(run.train, each) for each in (name, *limits)
        )
        if steps > run.total_steps and not is_known:
            raise IdleSettingError(name, steps, f"a run that is as long, not {run.total_steps:,}")


def _asked_for(config: ConfigFile) -> Iterator[tuple[str, Any, Rules]]:
    """Yield name, value and rules of each given setting that asks for more than its default."""
    defaults = type(config).defaults()
    for name, rules in rules_of(config).items():
        value = getattr(config, name)
        if name in config.given and value and value != defaults[name]:
            yield name, value, rules


def _is_filled_in(config: ConfigFile, name: str, value: object) -> bool:
    """Return whether a configuration that leaves the setting open has this value all the same.

    A saved configuration gives every setting, those too that the program had filled in.
    """
    left = {key: given for key, given in config.given.items() if key != name}
    # With open sizes, the defaults that follow from them are tried at sizes with room for any.
    is_open = not config.is_complete
    if is_open:
        left |= config.with_room(_ROOM)
    with unchecked():
        try:
            return bool(getattr(type(config)(**left), name) == value)
        except ValueError:  # other settings need it, or other sizes
            return is_open
