"""Releases of one file without settings: Qwen-Scope, Goodfire, and qresearch's DeepSeek R1.

None of them subtracts b_dec or normalises. What no tensor says stands in the names of their files
and repositories: the layer, and of Qwen-Scope k.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format
from sae_fast.interop.hook_names import origin
from sae_fast.interop.tensor_file import TensorFile, open_tensors

_QWEN_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_QWEN_REPOSITORY = re.compile(r"SAE-Res-(.+?)-W(\d+)K-L0_(\d+)")
_QWEN_TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_GOODFIRE = {"encoder_linear.weight", "encoder_linear.bias"} | {
    f"decoder_linear.{name}" for name in ("weight", "bias")
}
_QRESEARCH = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_GOODFIRE_LAYER = re.compile(r"(Llama-3\.\d-\d+B-Instruct)-SAE-l(\d+)")
_QRESEARCH_LAYER = re.compile(r"(?:^|[-_])l(\d+)")


class QwenScope(Format):
    """The release Qwen-Scope: TopK dictionaries of Qwen 3 and 3.5."""

    name = "qwen_scope"
    title = "Qwen-Scope"

    def recognises(self, place: Path) -> bool:
        """Return whether the file is named layerN.sae.pt and has its tensors."""
        if _QWEN_FILE.fullmatch(place.name) is None or not place.is_file():
            return False
        with open_tensors(place) as file:
            return file.names() >= _QWEN_TENSORS

    def read(self, place: Path) -> PlainDictionary:
        """Read a dictionary; its folder must have the name of the repository, which says k."""
        repository = _QWEN_REPOSITORY.search(str(place.absolute().parent))
        if repository is None:
            raise DictionaryError(
                f"{place}: k stands in the name of the repository, SAE-Res-…-L0_50 for 50: "
                "keep the files in a folder of that name"
            )
        layer = _QWEN_FILE.fullmatch(place.name)
        assert layer is not None
        with open_tensors(place) as file:
            d_sae, d_in = _matrix(file, "W_enc")
            k = int(repository[3])
            if not 1 <= k <= d_sae:
                raise DictionaryError(f"{place}: k {k} of its folder's name is not below {d_sae}")
            return PlainDictionary(
                "topk",
                W_enc=file.read("W_enc", shape=(d_sae, d_in)),
                b_enc=file.read("b_enc", shape=(d_sae,)),
                W_dec=file.read("W_dec", shape=(d_sae, d_in), transposed=True),
                b_dec=file.read("b_dec", shape=(d_in,)),
                subtract_b_dec=False,
                k=k,
                origin=origin(f"Qwen/{repository[1]}", f"residual.{int(layer[1])}"),
            )


class Goodfire(Format):
    """Goodfire's dictionaries of Llama 3.1 8B and 3.3 70B."""

    name = "goodfire"
    title = "Goodfire"

    def recognises(self, place: Path) -> bool:
        """Return whether a .pt or .pth file has its tensors."""
        return _has(place, _GOODFIRE)

    def read(self, place: Path) -> PlainDictionary:
        """Read a ReLU dictionary."""
        named = _GOODFIRE_LAYER.search(str(place.absolute()))
        told = {}
        if named is not None:
            told = origin(f"meta-llama/{named[1]}", f"residual.{int(named[2])}")
        with open_tensors(place) as file:
            return _relu(file, "encoder_linear", "decoder_linear", told)


class QResearch(Format):
    """Dictionaries of DeepSeek R1 Distill Llama 8B by qresearch, and plain pairs of layers."""

    name = "qresearch"
    title = "qresearch DeepSeek R1"

    def recognises(self, place: Path) -> bool:
        """Return whether a .pt or .pth file has its tensors, and no name of another library."""
        return place.name != "ae.pt" and _has(place, _QRESEARCH)

    def read(self, place: Path) -> PlainDictionary:
        """Read a ReLU dictionary."""
        layer = _QRESEARCH_LAYER.search(place.stem)
        told = {} if layer is None else origin(None, f"residual.{int(layer[1])}")
        with open_tensors(place) as file:
            return _relu(file, "encoder", "decoder", told)


def _has(place: Path, names: set[str]) -> bool:
    if place.suffix not in (".pt", ".pth") or not place.is_file():
        return False
    with open_tensors(place) as file:
        return file.names() == names


def _relu(
    file: TensorFile, encoder: str, decoder: str, told: dict[str, str | int]
) -> PlainDictionary:
    d_sae, d_in = _matrix(file, f"{encoder}.weight")
    return PlainDictionary(
        "relu",
        W_enc=file.read(f"{encoder}.weight", shape=(d_sae, d_in)),
        b_enc=file.read(f"{encoder}.bias", shape=(d_sae,)),
        W_dec=file.read(f"{decoder}.weight", shape=(d_sae, d_in), transposed=True),
        b_dec=file.read(f"{decoder}.bias", shape=(d_in,)),
        subtract_b_dec=False,
        origin=told,
    )


def _matrix(file: TensorFile, name: str) -> tuple[int, int]:
    shape = file.shape(name)
    if len(shape) != 2:
        raise DictionaryError(f"{file.path}: {name} must be a matrix, got {list(shape)}")
    return shape[0], shape[1]
