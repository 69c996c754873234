"""The list of architectures by the names that `arch` has for them."""

from sae_fast.autoencoder.architecture import Architecture
from sae_fast.autoencoder.jumprelu import JumpReLU
from sae_fast.autoencoder.slots import Slots
from sae_fast.autoencoder.thresholded import Gated, ReLU
from sae_fast.autoencoder.topk import BatchTopK, Matryoshka, TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "slots": Slots,
}
