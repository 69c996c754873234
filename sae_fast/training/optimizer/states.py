"""The names and types of an optimiser's state, and whether a saved state fits."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = ("W_enc", "W_dec")
# The name of exp_avg in a saved state, which is torch's: no rule takes over another one's state.
FIRST_MOMENTS = {
    "adam": "exp_avg",
    "sgd": "momentum_buffer",
    "signum": "exp_avg",
    "schedule_free_signum": "z_minus_y",
}
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
STEP = "step"
LR_SQUARES = "lr_squares"


def check_states(
    state: dict[str, Tensor], rule: str, states: str, exp_avg: dict[str, Tensor]
) -> None:
    """Raise ValueError where the moments are another rule's, or the rows' kept otherwise.

    Args:
        state: a `state_dict` of an optimiser.
        rule: the own rule.
        states: what the own moments of the rows are kept as.
        exp_avg: the own first moments.
    """
    theirs = _rule_of(state)
    if theirs not in (None, rule):
        raise ValueError(
            f"optimiser state: is of a run with optimizer = {theirs}, this one has {rule}"
        )
    kept_as = {dtype: name for name, dtype in STATE_DTYPES.items()}
    first = FIRST_MOMENTS[rule]
    for name in ROWS:
        expected = exp_avg.get(name)
        moment = state.get(f"{name}.{first}")
        if expected is not None and moment is not None and moment.dtype != expected.dtype:
            raise ValueError(
                f"optimiser state: {name}.{first} is of a run with optimizer_states = "
                f"{kept_as.get(moment.dtype, moment.dtype)}, this one has {states}"
            )


def _rule_of(state: dict[str, Tensor]) -> str | None:
    """Return the rule whose `state_dict` this is; None: no optimiser's."""
    for rule in ("sgd", "schedule_free_signum"):
        if f"{ROWS[0]}.{FIRST_MOMENTS[rule]}" in state:
            return rule
    if f"{ROWS[0]}.exp_avg_sq" in state:
        return "adam"
    return "signum" if f"{ROWS[0]}.exp_avg" in state else None
