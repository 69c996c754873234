"""OpenMOSS: Llamascopium's own files, the release Llama Scope, and Llama Scope R1 Distill.

All encode without subtracting b_dec, by JumpReLU, TopK or ReLU. Training sees x · s with
s = √D / norm, norm being the mean norm of the data set at the hook point; that scale is folded in
here, the thresholds too where they are of scaled pre-activations. Where `sparsity_include_decoder_
norm` is set, latents are selected by pre-activations times decoder norms.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from sae_fast.interop.dictionary import PlainDictionary, fold_scales_, rescale_codes_
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format, PairOfFiles, Settings
from sae_fast.interop.hook_names import origin
from sae_fast.interop.tensor_file import TensorFile, open_tensors
from sae_fast.json_files import shown

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_FOLDERS = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
_PICKLED, _IN_PICKLE = ".pt", "sae/"  # a .pt file has the tensors in a dictionary
_DISTRIBUTED, _INDEX = ".dcp", ".metadata"
_BY_TOKEN = "token-wise"  # scaled to a norm of sqrt(d_in)
_NORM = "dataset_average_activation_norm."
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_SCOPE_CONFIG, _SCOPE_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_SCOPE_FOLDER = re.compile(r"Llama3_1-8B-Base-L(\d+)(R|A|M|TC)-\d+x")


class Llamascopium(Format):
    """Dictionaries of OpenMOSS's Llamascopium, named Language-Model-SAEs before."""

    name = "openmoss"
    title = "OpenMOSS Llamascopium"

    def recognises(self, place: Path) -> bool:
        """Return whether settings and weights are there and the tensors have its names."""
        files = _files(place)
        if files is None:
            return False
        weights = files[1]
        if weights.suffix == _DISTRIBUTED:
            return True
        with open_tensors(weights, _below(weights)) as file:
            return "W_E" in file

    def read(self, place: Path) -> PlainDictionary:
        """Read a sparse autoencoder or transcoder; refuse a checkpoint of several processes."""
        files = _files(place)
        assert files is not None
        config, weights = files
        if weights.suffix == _DISTRIBUTED:
            raise DictionaryError(
                f"{weights}: a distributed checkpoint, whose index is a pickle that may run code: "
                "load it with llamascopium and save it again as sae_weights.safetensors"
            )
        settings = Settings.read(config)
        kind = settings.text("sae_type", "sae")
        if kind not in ("sae", "transcoder"):
            raise DictionaryError(f"{settings.path}: sae_type {kind!r} has no counterpart here")
        settings.must_be("use_glu_encoder", False, None, because="an encoder here has one matrix")
        d_in = settings.needed_size("d_model")
        d_sae = settings.size("d_sae") or _d_sae(settings, d_in)
        hooks = settings.text("hook_point_in") or "", settings.text("hook_point_out") or ""
        is_transcoder = hooks[1] not in ("", hooks[0])
        with open_tensors(weights, _below(weights)) as file:
            if "W_E_glu" in file:
                raise DictionaryError(f"{file.path}: W_E_glu: an encoder here has one matrix")
            dictionary = PlainDictionary(
                "relu",
                W_enc=file.read("W_E", shape=(d_sae, d_in), transposed=True),
                b_enc=file.read("b_E", shape=(d_sae,)),
                W_dec=file.read("W_D", shape=(d_sae, d_in)),
                b_dec=_b_dec(file, settings, d_in),
                subtract_b_dec=False,
                transcoder=is_transcoder,
            )
            dictionary = _activated(dictionary, file, settings)
            if settings.text("norm_activation") == _BY_TOKEN and not is_transcoder:
                dictionary = replace(dictionary, token_norm="constant_norm")
                scale_in = scale_out = 1.0
            else:
                scale_in = scale_out = _scale(file, settings, hooks[0], d_in)
            if is_transcoder:
                scale_out = _scale(file, settings, hooks[1], d_in)
        if settings.flag("sparsity_include_decoder_norm", True):
            dictionary = _weighted(dictionary)
        dictionary = fold_scales_(dictionary, scale_in, scale_out)
        return replace(dictionary, origin=_origin(settings, hooks, is_transcoder))


class LlamaScope(Format):
    """The release Llama Scope: dictionaries of Llama 3.1 8B."""

    name = "llama_scope"
    title = "Llama Scope"

    def recognises(self, place: Path) -> bool:
        """Return whether hyperparams.json and checkpoints/final.safetensors are there."""
        return all((place / name).is_file() for name in (_SCOPE_CONFIG, _SCOPE_WEIGHTS))

    def read(self, place: Path) -> PlainDictionary:
        """Read a sparse autoencoder or transcoder of the release."""
        settings = Settings.read(place / _SCOPE_CONFIG)
        settings.must_be("act_fn", "jumprelu", "relu")
        settings.must_be("apply_decoder_bias_to_pre_encoder", False, None)
        settings.must_be("use_glu_encoder", False, None)
        settings.must_be("norm_activation", "dataset-wise", None)
        d_in, d_sae = settings.needed_size("d_model"), settings.needed_size("d_sae")
        norms = settings.section("dataset_average_activation_norm")
        scales = [math.sqrt(d_in) / _positive(norms, name) for name in ("in", "out")]
        hooks = settings.text("hook_point_in") or "", settings.text("hook_point_out") or ""
        is_transcoder = hooks[1] not in ("", hooks[0])
        with open_tensors(place / _SCOPE_WEIGHTS) as file:
            dictionary = _linear(file, d_in, d_sae, is_transcoder)
        dictionary = fold_scales_(dictionary, *scales)
        if settings.text("act_fn") == "jumprelu":
            # The file has the threshold in raw units already.
            threshold = torch.full((d_sae,), settings.number("jump_relu_threshold"))
            dictionary = replace(dictionary, arch="jumprelu", threshold=threshold)
        told = _origin(settings, hooks, is_transcoder)
        folder = _SCOPE_FOLDER.search(str(place.absolute()))
        if folder is not None:
            told.setdefault("model", "meta-llama/Llama-3.1-8B")
        return replace(dictionary, origin=told)


class LlamaScopeR1(PairOfFiles):
    """The release Llama Scope R1 Distill."""

    name = "llama_scope_r1"
    title = "Llama Scope R1 Distill"
    config, weights = CONFIG, WEIGHTS

    def recognises(self, place: Path) -> bool:
        """Return whether both files are there and the tensors have its names."""
        names = {"encoder.weight", "log_jumprelu_threshold"}
        return super().recognises(place) and names <= _names(self.directory_of(place))

    def read(self, place: Path) -> PlainDictionary:
        """Read a sparse autoencoder of the release."""
        directory = self.directory_of(place)
        settings = Settings.read(directory / CONFIG)
        d_in = settings.needed_size("d_model")
        d_sae = settings.size("d_sae") or _d_sae(settings, d_in)
        hooks = settings.text("hook_point_in") or "", settings.text("hook_point_out") or ""
        norms = settings.section("dataset_average_activation_norm")
        with open_tensors(directory / WEIGHTS) as file:
            dictionary = _linear(file, d_in, d_sae, is_transcoder=False)
            threshold = file.read("log_jumprelu_threshold", shape=(d_sae,)).exp()
        dictionary = replace(dictionary, arch="jumprelu", threshold=threshold)
        if norms.names():
            scale = math.sqrt(d_in) / _positive(norms, "in" if "in" in norms else hooks[0])
            dictionary = fold_scales_(dictionary, scale, scale)
        else:
            dictionary = replace(
                dictionary,
                remarks=(
                    f"{settings.path} has no dataset_average_activation_norm: activations must be "
                    "scaled to a mean norm of sqrt(d_in) first",
                ),
            )
        return replace(dictionary, origin=_origin(settings, hooks, is_transcoder=False))


def _files(place: Path) -> tuple[Path, Path] | None:
    """Return settings and weights of a dictionary; None where they are not there.

    Of several weights in a directory they are the first that the library itself would read.
    """
    endings = (Path(WEIGHTS).suffix, _PICKLED, _DISTRIBUTED)
    names = [f"{folder}{ending}" for folder in _FOLDERS for ending in endings]
    for directory in (place, place.parent, place.parent.parent):
        found = [
            directory / name for name in names if directory == place or directory / name == place
        ]
        found = [path for path in found if path.is_file() or (path / _INDEX).is_file()]
        if found and (directory / CONFIG).is_file():
            return directory / CONFIG, found[0]
    return None


def _below(weights: Path) -> str:
    return _IN_PICKLE if weights.suffix == _PICKLED else ""


def _names(directory: Path) -> set[str]:
    with open_tensors(directory / WEIGHTS) as file:
        return file.names()


def _d_sae(settings: Settings, d_in: int) -> int:
    factor = settings.number("expansion_factor")
    d_sae = int(d_in * factor) if factor * d_in < 1 << 40 else 0
    if d_sae < 1:
        raise DictionaryError(f"{settings.path}: expansion_factor {factor:g} leaves no latents")
    return d_sae


def _b_dec(file: TensorFile, settings: Settings, d_in: int) -> torch.Tensor:
    if not settings.flag("use_decoder_bias", True) and "b_D" not in file:
        return torch.zeros(d_in)
    return file.read("b_D", shape=(d_in,))


def _activated(
    dictionary: PlainDictionary, file: TensorFile, settings: Settings
) -> PlainDictionary:
    kind = (settings.text("act_fn", "relu") or "").lower()
    if kind == "relu":
        return dictionary
    if kind == "jumprelu":
        threshold = file.read(_LOG_THRESHOLD, shape=(dictionary.d_sae,)).exp()
        return replace(dictionary, arch="jumprelu", threshold=threshold)
    if kind == "topk":
        return replace(dictionary, arch="topk", k=settings.needed_size("top_k"))
    raise DictionaryError(
        f"{settings.path}: act_fn {kind!r} has no counterpart here; "
        "there are counterparts of relu, jumprelu and topk"
    )


def _weighted(dictionary: PlainDictionary) -> PlainDictionary:
    """Return a dictionary whose latents are selected by pre-activations times decoder norms.

    By thresholds that is the same as thresholds divided by the norms, and codes stay.
    """
    norms = torch.linalg.vector_norm(dictionary.W_dec, dim=1).clamp_min(1e-8)
    if dictionary.threshold is not None:
        return replace(dictionary, threshold=dictionary.threshold / norms)
    return dictionary if dictionary.arch == "relu" else rescale_codes_(dictionary, norms)


def _scale(file: TensorFile, settings: Settings, hook: str, d_in: int) -> float:
    """Return the scale by which training multiplied activations; 1: it is folded in."""
    mode = settings.text("norm_activation", "dataset-wise")
    if mode == "inference":
        return 1.0
    if mode != "dataset-wise":
        raise DictionaryError(
            f"{settings.path}: norm_activation {mode!r} has no counterpart here; there are "
            "counterparts of dataset-wise, inference, and of token-wise but for transcoders"
        )
    if not hook:
        raise DictionaryError(
            f"{settings.path}: hook_point_in is not there, and the scale of norm_activation "
            "'dataset-wise' stands in the weights under its name"
        )
    norm = float(file.read(_NORM + hook, shape=()))
    if not norm > 0:
        name = shown(_NORM + hook)
        raise DictionaryError(f"{file.path}: {name} must be greater than 0, got {norm:g}")
    return math.sqrt(d_in) / norm


def _positive(settings: Settings, name: str) -> float:
    value = settings.number(name)
    if value == 0:
        raise DictionaryError(f"{settings.path}: the norm {name!r} must be greater than 0")
    return value


def _linear(file: TensorFile, d_in: int, d_sae: int, is_transcoder: bool) -> PlainDictionary:
    return PlainDictionary(
        "relu",
        W_enc=file.read("encoder.weight", shape=(d_sae, d_in)),
        b_enc=file.read("encoder.bias", shape=(d_sae,)),
        W_dec=file.read("decoder.weight", shape=(d_sae, d_in), transposed=True),
        b_dec=(
            file.read("decoder.bias", shape=(d_in,))
            if "decoder.bias" in file
            else torch.zeros(d_in)
        ),
        subtract_b_dec=False,
        transcoder=is_transcoder,
    )


def _origin(
    settings: Settings, hooks: tuple[str, str], is_transcoder: bool
) -> dict[str, str | int]:
    model = settings.text("model_name")
    told = origin(model, hooks[0])
    if is_transcoder:
        told["targets"] = origin(model, hooks[1])
    return told
