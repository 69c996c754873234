"""The list of architectures by the names that `arch` has for them."""

from sae_fast.autoencoder.architecture import Architecture
from sae_fast.autoencoder.batch_topk import BatchTopK
from sae_fast.autoencoder.gated import Gated
from sae_fast.autoencoder.jumprelu import JumpReLU
from sae_fast.autoencoder.matryoshka import Matryoshka
from sae_fast.autoencoder.relu import ReLU
from sae_fast.autoencoder.slots import Slots
from sae_fast.autoencoder.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "slots": Slots,
}
