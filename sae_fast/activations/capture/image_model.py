"""A transformers model that reads images (CLIP, SigLIP, DINOv2, ViT), and its image processor.

Of a model that reads texts too, such as CLIP, it is the part that reads images.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.activations.capture.hooks import find_blocks
from sae_fast.activations.capture.loading import (
    AUTO,
    Placement,
    device_of,
    explained,
    load_network,
    model_dtype,
    quiet,
    weights_digest,
)
from sae_fast.activations.capture.packages import capture_package, extra_package
from sae_fast.activations.capture.probe import as_evaluated

PATCH, CLASS, REGISTER = 0, 1, 2  # in the column token_ids
# Parts behind the blocks, which a checkpoint of another head does not have.
_BEHIND = re.compile(r"(^|\.)(pooler|head|classifier)\.")


@dataclass(frozen=True)
class ImageModel:
    """A model that reads images.

    Attributes:
        network: the PreTrainedModel, in evaluation mode on its device.
        processor: the image processor of transformers.
        name: a folder or the name on the hub.
        revision: the commit on the hub, or None for a folder.
    """

    network: Any
    processor: Any
    name: str
    revision: str | None

    causal = False

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return device_of(self.network)

    def weights_digest(self) -> str:
        """Return a hash of the first numbers of each parameter, by which models are told apart."""
        return weights_digest(self.network)

    def tokenizer_digest(self) -> str:
        """Return a hash of all that decides how an image becomes numbers."""
        content = (type(self.processor).__name__, sorted(self.processor.to_dict().items()))
        return f"sha256:{hashlib.sha256(repr(content).encode()).hexdigest()}"


@dataclass(frozen=True)
class ImageShape:
    """The pixels and rows of an image, as the model has them.

    Attributes:
        pixels: [3, H, W] of an image as the model reads it.
        kinds: [T] of the rows of an image: PATCH, CLASS or REGISTER.
    """

    pixels: tuple[int, int, int]
    kinds: tuple[int, ...]


def load_image_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = AUTO,
    placement: Placement | None = None,
    trust_remote_code: bool = False,
) -> ImageModel:
    """Load a model that reads images from a folder or the hub, with its image processor.

    Args:
        name: a folder with a config.json, or a name on the hub.
        revision: a branch, tag or commit on the hub.
        dtype: auto, float32, bfloat16 or float16; auto: the type of the checkpoint.
        placement: where it runs; None: on the CPU.
        trust_remote_code: whether code that comes with the model is run.

    Raises:
        ValueError: in one line, where there is no such model or it reads no images.
    """
    kind, placement = model_dtype(dtype), placement or Placement()
    transformers = capture_package("transformers")
    extra_package("PIL", "reading images")
    with quiet(transformers), explained(name):
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(name, **where)
        part = getattr(config, "vision_config", None) or config
        loader = _class_of(transformers, part, has_own_code=bool(getattr(config, "auto_map", None)))
        network, report = load_network(
            loader, name, kind, placement, output_loading_info=True, **where
        )
        _check_whole(network, report.get("missing_keys", ()))
        processor = transformers.AutoImageProcessor.from_pretrained(name, **where)
    return ImageModel(network, processor, name, getattr(config, "_commit_hash", None))


def _class_of(transformers: Any, config: Any, *, has_own_code: bool) -> Any:
    """Return the class of the part that reads images."""
    if has_own_code:
        return transformers.AutoModel
    names = capture_package("transformers.models.auto.modeling_auto").MODEL_MAPPING_NAMES
    name = names.get(config.model_type)
    loader = getattr(transformers, name if isinstance(name, str) else "AutoModel")
    if getattr(loader, "main_input_name", "pixel_values") != "pixel_values":
        raise ValueError("it reads no images, and the documents are images")
    return loader


def _check_whole(network: nn.Module, missing: Any) -> None:
    """Raise ValueError where the checkpoint lacks weights of the blocks or before them."""
    lacking = sorted(name for name in missing if not _BEHIND.search(name))
    if lacking:
        raise ValueError(
            f"its checkpoint has no weights for {len(lacking)} parameters of "
            f"{type(network).__name__}, such as {lacking[0]}"
        )


def image_shape(model: ImageModel, pixels: Tensor) -> ImageShape:
    """Find out which rows of an image are its patches, by trying.

    Args:
        model: the model.
        pixels: [1, 3, H, W], an image as its processor makes it.

    Raises:
        ValueError: where the rows are not some other tokens and then the patches.
    """
    kinds = row_kinds(model.network, pixels)
    if kinds is None:
        raise ValueError(
            f"model: it cannot be told which rows of {type(model.network).__name__} are patches of "
            "an image: models whose blocks read a class token, registers and then the patches are "
            "captured (CLIP, SigLIP, DINOv2, ViT)"
        )
    _, channels, height, width = pixels.shape
    return ImageShape((channels, height, width), kinds)


def row_kinds(network: nn.Module, pixels: Tensor) -> tuple[int, ...] | None:
    """Return the kind of each row [T] that the first block reads: PATCH, CLASS or REGISTER.

    The patches are the rows that change with the pixels, row by row of the image. None: there are
    no such rows, or they are not the last ones.
    """
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(pixels.shape, generator=generator)
    corner = other.clone()
    corner[..., 0, 0] += 1
    rows = _first_input(network, torch.cat([torch.zeros_like(other), other, corner]))
    if rows is None:
        return None
    (first, *rest) = (rows[0] != rows[1]).any(dim=1).nonzero().flatten().tolist() or [-1]
    in_corner = (rows[1] != rows[2]).any(dim=1).nonzero().flatten().tolist()
    if [first, *rest] != [*range(max(first, 0), rows.shape[1])] or in_corner != [first]:
        return None
    before = [CLASS, *[REGISTER] * (first - 1)][:first]
    return (*before, *[PATCH] * (rows.shape[1] - first))


def probe_pixels(network: Any) -> Tensor | None:
    """Return an image [1, 3, H, W] of noise that a model reads; None: it reads none."""
    if getattr(network, "main_input_name", None) != "pixel_values":
        return None
    config = getattr(network, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1))


def run_on_pixels(network: nn.Module, pixels: Tensor) -> None:
    """Run a network on images [B, 3, H, W], in its own type and on its device."""
    parameter = next(p for p in network.parameters() if p.is_floating_point())
    network(pixel_values=pixels.to(parameter.device, parameter.dtype))


def _first_input(network: nn.Module, pixels: Tensor) -> Tensor | None:
    """Return what the first block reads, [B, T, D]; None: it reads something else."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if given and given[0].ndim == 3 and len(given[0]) == len(pixels):
            found.append(given[0].clone())
        raise _Seen

    block = find_blocks(network).modules[0]
    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with as_evaluated(network):
            run_on_pixels(network, pixels)
    except _Seen:
        pass
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError):
        return None
    finally:
        handle.remove()
    return found[0] if found else None


def processed(processor: Any, images: list[Any], numbers: list[int], name: str) -> Tensor:
    """Return images as the model reads them, [B, 3, H, W].

    Args:
        processor: the image processor.
        images: of Pillow.
        numbers: of the images in their dataset, for errors.
        name: of the dataset, for errors.

    Raises:
        ValueError: in one line, where the processor makes no images of one size.
    """
    try:
        made: Any = processor(images=images, return_tensors="pt")
        pixels = made["pixel_values"]
    except Exception as error:  # it wraps whatever is wrong with an image
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"dataset: the processor of the model refuses an image of {name} among the numbers "
            f"{numbers[0]} to {numbers[-1]}: {first}"
        ) from error
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != len(images):
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(
            f"model: its processor makes no images of one size, [B, 3, H, W], but {shape}"
        )
    return pixels


class _Seen(Exception):
    """Ends a forward pass when the first block is reached."""
