"""OpenAI's sparse_autoencoder: one .pt file, a state dict with the name of the activation.

b_dec (`pre_bias`) is subtracted; TopK selects before ReLU. The TopK models normalise each token by
its own mean and deviation. Their state dict does not say so, it follows from the activation, as in
the code that loads them there. k stands in the state of the activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_fast.activations.imports.tensor_files import read_torch_values
from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format
from sae_fast.interop.tensor_file import open_tensors
from sae_fast.json_files import shown

_TENSORS = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}
_OF_ACTIVATION = "activation_state_dict"


class OpenAI(Format):
    """Dictionaries of OpenAI's sparse_autoencoder."""

    name = "openai"
    title = "OpenAI sparse_autoencoder"

    def recognises(self, place: Path) -> bool:
        """Return whether a .pt file has its tensors."""
        if place.suffix != ".pt" or not place.is_file():
            return False
        with open_tensors(place) as file:
            return file.names() >= _TENSORS

    def read(self, place: Path) -> PlainDictionary:
        """Read a ReLU or TopK autoencoder."""
        selection = _selection(place, read_torch_values(place))
        with open_tensors(place) as file:
            shape = file.shape("encoder.weight")
            if len(shape) != 2:
                raise DictionaryError(f"{place}: encoder.weight must be a matrix")
            d_sae, d_in = shape
            return PlainDictionary(
                **selection,
                W_enc=file.read("encoder.weight", shape=shape),
                b_enc=file.read("latent_bias", shape=(d_sae,)),
                W_dec=file.read("decoder.weight", shape=shape, transposed=True),
                b_dec=file.read("pre_bias", shape=(d_in,)),
                subtract_b_dec=True,
            )


def _selection(place: Path, values: Mapping[str, int | float | str]) -> dict[str, Any]:
    """Return the selection of latents, and the normalisation that goes with it."""
    activation = values.get("activation", "ReLU")
    if activation == "ReLU":
        return {"arch": "relu"}
    if activation != "TopK":
        raise DictionaryError(
            f"{place}: activation {shown(activation)} has no counterpart here; there are "
            "counterparts of ReLU and TopK"
        )
    k, then = (values.get(f"{_OF_ACTIVATION}/{name}") for name in ("k", "postact_fn"))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise DictionaryError(f"{place}: k must be a whole number of at least 1, got {shown(k)}")
    if then not in ("ReLU", None):
        raise DictionaryError(
            f"{place}: postact_fn {shown(then)} is not read: after TopK it is ReLU here"
        )
    return {"arch": "topk", "k": k, "token_norm": "layer_norm"}
