"""OpenAI's sparse_autoencoder: one .pt file, a state dict with the name of the activation.

b_dec (`pre_bias`) is subtracted; TopK selects before ReLU. The TopK models normalise each token by
its own mean and deviation, which a dictionary here cannot express: they are refused. Their state
dict does not say so, it follows from the activation, as in the code that loads them there.
"""

from __future__ import annotations

from pathlib import Path

from sae_fast.activations.imports.tensor_files import read_torch_values
from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format
from sae_fast.interop.tensor_file import open_tensors

_TENSORS = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}


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
        """Read a ReLU autoencoder; refuse TopK, whose normalisation is by the token."""
        activation = read_torch_values(place).get("activation", "ReLU")
        if activation != "ReLU":
            raise DictionaryError(
                f"{place}: activation {activation!r}: these models normalise each token by its own "
                "mean and deviation, and a dictionary here has one mean and scale"
            )
        with open_tensors(place) as file:
            shape = file.shape("encoder.weight")
            if len(shape) != 2:
                raise DictionaryError(f"{place}: encoder.weight must be a matrix")
            d_sae, d_in = shape
            return PlainDictionary(
                "relu",
                W_enc=file.read("encoder.weight", shape=shape),
                b_enc=file.read("latent_bias", shape=(d_sae,)),
                W_dec=file.read("decoder.weight", shape=shape, transposed=True),
                b_dec=file.read("pre_bias", shape=(d_in,)),
                subtract_b_dec=True,
            )
