"""Loss terms of one's own: functions that a training adds to its loss, with a name and a weight.

Their gradients reach the parameters through their arguments: the values of a code leave row factors
on W_enc, a reconstruction leaves row factors on W_dec. A term that reads a weight matrix itself
leaves an ordinary gradient on it, which the optimizer adds to the factors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sae_fast import ops
from sae_fast.activations import Rows
from sae_fast.autoencoder.architecture import Architecture
from sae_fast.own_code import call

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder

    TermFunction = Callable[[SparseAutoencoder, Rows, ops.Code, Tensor], Tensor]

# Beginnings of names that rows of metrics and summaries make of other names.
_PREFIXES = ("heldout_", "averaged_", "final_", "best_")
_COEFFICIENT = "sparsity_coeff"  # which relu and gated have, and what is derived from them


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss: `coefficient` times what `function` returns.

    Attributes:
        name: of the metric with the term's value, which has the coefficient in it.
        function: takes the model, the batch (`x` [N, D], normalised, and `columns` by name), the
            code of the batch and its reconstruction [N, D], normalised (of a transcoder
            [N, d_out]). It returns a tensor, 0-d, with a gradient. A code is an `ops.SparseCode`,
            or with relu, jumprelu, gated and slots an `ops.DenseCode` while many latents are
            active; both have `values`, `n_rows` and `dense()`.
        coefficient: the weight of the term.

    Raises ValueError for a name that is no word, a coefficient that is not finite, or a function
    that does not take four arguments.
    """

    name: str
    function: TermFunction
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isidentifier()):
            raise ValueError(f"loss term: name must be a word such as my_loss, got {self.name!r}")
        self._check_function()
        is_number = isinstance(self.coefficient, int | float)
        if not is_number or not math.isfinite(self.coefficient):
            raise ValueError(
                f"loss term {self.name}: coefficient must be a finite number, "
                f"got {self.coefficient!r}"
            )

    def of(self, sae: SparseAutoencoder, batch: Rows, code: ops.Code, x_hat: Tensor) -> Tensor:
        """Return the term of a batch, 0-d.

        Raises ValueError, one line, where the function fails or returns something else.
        """
        value: object = call(f"loss term {self.name}", self.function, sae, batch, code, x_hat)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"loss term {self.name}: the function must return a tensor, "
                f"got {type(value).__name__}"
            )
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"loss term {self.name}: the function must return a 0-d tensor of floats, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device != x_hat.device:
            raise ValueError(
                f"loss term {self.name}: the function must return a tensor on {x_hat.device}, "
                f"where the batch is, got {value.device}"
            )
        if not value.requires_grad:
            raise ValueError(
                f"loss term {self.name}: the function must return a tensor with a gradient; where "
                "a batch has nothing to minimise, return 0 * code.values.sum()"
            )
        return self.coefficient * value.to(x_hat.dtype)

    def _check_function(self) -> None:
        """Raise ValueError for a function that cannot be called as `of` calls it."""
        expected = f"loss term {self.name}: function must take (sae, batch, code, x_hat)"
        if not callable(self.function):
            raise ValueError(f"{expected}, got {type(self.function).__name__}")
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # of a function in C
            return
        try:
            signature.bind(*range(4))
        except TypeError:
            names = ", ".join(signature.parameters)
            raise ValueError(f"{expected}, got one that takes ({names})") from None


def checked_terms(
    terms: object, architecture: Architecture, taken: Collection[str]
) -> tuple[LossTerm, ...]:
    """Return the loss terms given to a training of an architecture.

    Raises ValueError for one whose name is in use, by another term or one of the metrics `taken`,
    where a registered architecture has such a name, and where no term can act because neither
    encoder nor decoder is trained.
    """
    config = architecture.config
    if isinstance(terms, str) or not isinstance(terms, Iterable):
        kind = type(terms).__name__
        raise ValueError(f"loss_terms must be a list of sae_fast.LossTerm, got {kind}")
    terms = list(terms)
    own = {*architecture.term_names, *architecture.metric_names} if config.registered_by else set()
    for name in sorted(own):
        if name in {*taken} - {_COEFFICIENT} or name.startswith(_PREFIXES):
            raise ValueError(f"arch {config.arch}: {name} is the name of another metric, rename it")
    if terms and architecture.trained() is not None:
        raise ValueError(
            f"loss_terms must be left out with slots_mode {config.slots_mode}, which trains "
            "neither encoder nor decoder"
        )
    known = {*taken, *config.term_coefficients}
    known |= {*architecture.term_names, *architecture.metric_names}
    checked = []
    for term in terms:
        if not isinstance(term, LossTerm):
            kind = type(term).__name__
            raise ValueError(f"loss_terms must be a list of sae_fast.LossTerm, got {kind} in it")
        if term.name in known or term.name.startswith(_PREFIXES):
            raise ValueError(f"loss term {term.name}: another metric has this name")
        known.add(term.name)
        checked.append(term)
    return tuple(checked)
