"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`): JumpReLU.

b_dec is not subtracted and nothing is normalised. Gemma Scope 2 also has transcoders, with
`affine_skip_connection` [D, d_out], the transpose of W_skip.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format, Settings
from sae_fast.interop.hook_names import origin
from sae_fast.interop.tensor_file import TensorFile, open_tensors

_FIRST, _SECOND, _CONFIG = "params.npz", "params.safetensors", "config.json"
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(\d+)")
_HOOKS = {"res": "residual", "mlp": "mlp_out", "att": "z", "transcoders": "mlp_in"}
_SKIP = "affine_skip_connection"
# Names in lower case, all of which SAELens takes in files of Gemma Scope.
_SPELLINGS = {
    "w_enc": ("w_enc", "wenc", "w_e"),
    "w_dec": ("w_dec", "wdec", "w_d"),
    "b_enc": ("b_enc", "benc", "b_e"),
    "b_dec": ("b_dec", "bdec", "b_d"),
    "threshold": ("threshold",),
}


class GemmaScope(Format):
    """The release Gemma Scope: dictionaries of Gemma 2."""

    name = "gemma_scope"
    title = "Gemma Scope"

    def recognises(self, place: Path) -> bool:
        """Return whether params.npz is there, or the file is a .npz with its tensors."""
        path = place / _FIRST if place.is_dir() else place
        if path.suffix != ".npz" or not path.is_file():
            return False
        with open_tensors(path) as file:
            return all(_spelt(file, name) in file for name in _SPELLINGS)

    def read(self, place: Path) -> PlainDictionary:
        """Read a sparse autoencoder or, of a repository of transcoders, a transcoder."""
        path = place / _FIRST if place.is_dir() else place
        folder = str(path.absolute())  # a link of the hub cache stays where it is
        told, kind = {}, None
        if (repository := _REPOSITORY.search(folder)) is not None:
            kind = repository[3]
            layer = _LAYER.search(folder)
            hook = None if layer is None else f"{_HOOKS[kind]}.{int(layer[1])}"
            suffix = "-it" if repository[2] == "it" else ""
            told = origin(f"google/gemma-2-{repository[1]}{suffix}", hook)
        with open_tensors(path) as file:
            return _read(file, is_transcoder=kind == "transcoders", told=told)


class GemmaScope2(Format):
    """The release Gemma Scope 2: dictionaries of Gemma 3."""

    name = "gemma_scope_2"
    title = "Gemma Scope 2"

    def recognises(self, place: Path) -> bool:
        """Return whether params.safetensors is there, or the file is one with its tensors."""
        path = place / _SECOND if place.is_dir() else place
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        with open_tensors(path) as file:
            return _SPELLINGS.keys() <= file.names()

    def read(self, place: Path) -> PlainDictionary:
        """Read a sparse autoencoder or a transcoder; a cross-layer transcoder is refused."""
        path = place / _SECOND if place.is_dir() else place
        settings = Settings(path.parent / _CONFIG, {})
        if settings.path.is_file():
            settings = Settings.read(settings.path)
        settings.must_be("architecture", "jump_relu", None)
        hooks = settings.text("hf_hook_point_in"), settings.text("hf_hook_point_out")
        told = origin(settings.text("model_name"), hooks[0])
        is_transcoder = _is_transcoder(settings, path)
        if is_transcoder and hooks[1]:
            told["targets"] = origin(settings.text("model_name"), hooks[1])
        with open_tensors(path) as file:
            if len(file.shape("w_dec")) != 2:
                raise DictionaryError(
                    f"{path}: w_dec has {len(file.shape('w_dec'))} dimensions: a cross-layer "
                    "transcoder has no counterpart here"
                )
            return _read(file, is_transcoder=is_transcoder or _SKIP in file, told=told)


def _is_transcoder(settings: Settings, path: Path) -> bool:
    """Return whether a dictionary of Gemma Scope 2 puts out another activation than it reads."""
    hooks = settings.text("hf_hook_point_in"), settings.text("hf_hook_point_out")
    kind = settings.text("type")
    if kind is not None:
        return "transcoder" in kind
    if hooks[1]:
        return hooks[1] != hooks[0]
    # Without settings the folders say so: transcoder/layer_3_width_16k/params.safetensors.
    return any(folder.name.startswith("transcoder") for folder in list(path.absolute().parents)[:2])


def _read(file: TensorFile, is_transcoder: bool, told: dict[str, str | int]) -> PlainDictionary:
    names = {name: _spelt(file, name) for name in _SPELLINGS}
    d_in, d_sae = _matrix(file, names["w_enc"])
    d_out = _matrix(file, names["w_dec"])[1] if is_transcoder else d_in
    if "scaling_factor" in file:
        factor = file.read("scaling_factor")
        if bool((factor != 1).any()):
            raise DictionaryError(f"{file.path}: scaling_factor other than 1 is not read")
    return PlainDictionary(
        "jumprelu",
        W_enc=file.read(names["w_enc"], shape=(d_sae, d_in), transposed=True),
        b_enc=file.read(names["b_enc"], shape=(d_sae,)),
        W_dec=file.read(names["w_dec"], shape=(d_sae, d_out)),
        b_dec=file.read(names["b_dec"], shape=(d_out,)),
        threshold=file.read(names["threshold"], shape=(d_sae,)).clamp_min(0),
        W_skip=file.read(_SKIP, shape=(d_out, d_in), transposed=True) if _SKIP in file else None,
        subtract_b_dec=False,
        transcoder=is_transcoder,
        origin=told,
    )


def _spelt(file: TensorFile, name: str) -> str:
    """Return the name that a tensor has in a file; where it is not there its usual one."""
    return next((own for own in file.names() if own.lower() in _SPELLINGS[name]), name)


def _matrix(file: TensorFile, name: str) -> tuple[int, int]:
    shape = file.shape(name)
    if len(shape) != 2:
        raise DictionaryError(f"{file.path}: {name} must be a matrix, got {list(shape)}")
    return shape[0], shape[1]
