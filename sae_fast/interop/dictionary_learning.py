"""dictionary_learning: `ae.pt`, a state dict, with `config.json` beside it.

The class of a dictionary stands in config.json as `dict_class`. Without that file it follows from
the names of the tensors, but for AutoEncoderTopK and BatchTopKSAE, which have the same.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations.imports.tensor_files import read_torch_values
from sae_fast.atomic_files import replacing, write_text
from sae_fast.interop.dictionary import PlainDictionary, with_subtraction
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import ORIGIN, OWN, Format, Settings, refuse
from sae_fast.interop.hook_names import hook_named_by, origin
from sae_fast.interop.tensor_file import TensorFile, open_tensors

CONFIG, WEIGHTS = "config.json", "ae.pt"
_BACKUP = "ae/"  # before the names of a checkpoint that also has the optimiser
_MOST_GROUPS = 1000
_LINEAR = {"encoder.weight", "decoder.weight"}
_DIRECT = {"W_enc", "W_dec", "b_enc", "b_dec"}
_WITH_K = _LINEAR | {"encoder.bias", "b_dec", "k"}
# The names of the tensors by class, the ones first that have most.
_TENSORS = {
    "MatryoshkaBatchTopKSAE": _DIRECT | {"k", "threshold", "group_sizes"},
    "JumpReluAutoEncoder": _DIRECT | {"threshold"},
    "GatedAutoEncoder": _LINEAR | {"decoder_bias", "r_mag", "gate_bias", "mag_bias"},
    "AutoEncoderTopK": _WITH_K,
    "BatchTopKSAE": _WITH_K,
    "AutoEncoder": _LINEAR | {"encoder.bias", "bias"},
    "AutoEncoderNew": _LINEAR | {"encoder.bias", "decoder.bias"},
}
_FURTHER = {"threshold"}  # which newer versions add
_K = "k"  # which older ones lack
# InterPLM adds these to an AutoEncoder. It divides codes by the factor, and undoes the scale of
# tokens in reconstructions, only where it is asked to.
_BY_TOKEN = "normalize_to_sqrt_d"
_INTERPLM = {_BY_TOKEN, "activation_rescale_factor"}
_SUBMODULES = {"resid_post": "residual", "mlp_out": "mlp_out", "attn_out": "attn_out"}
_SUBMODULE = re.compile(r"(resid_post|mlp_out|attn_out)(?:_layer_?(\d+))?")
_UNDONE = "reconstructions are in the units of the activations, as unnormalize=True gives them"
_UNSET = "its threshold is not set: the latents of a batch compete, as in training"


class DictionaryLearning(Format):
    """Dictionaries of saprmarks/dictionary_learning."""

    name = "dictionary_learning"
    title = "dictionary_learning"
    can_write = True

    def recognises(self, place: Path) -> bool:
        """Return whether ae.pt is there, or a .pt file has the tensors of a class."""
        if place.is_dir():
            return (place / WEIGHTS).is_file()
        if place.suffix != ".pt" or not place.is_file():
            return False
        with open_tensors(place) as file:
            return bool(_classes(file.names()))

    def read(self, place: Path) -> PlainDictionary:
        """Read a dictionary of any class."""
        path = place / WEIGHTS if place.is_dir() else place
        settings = _config_of(path)
        trainer = settings.section("trainer")
        with open_tensors(path) as file:
            dictionary = _read(file, _class_of(file, trainer, settings), trainer)
            if _scales_tokens(file):
                remark = f"{file.path}: {_BY_TOKEN}: {_UNDONE}"
                remarks = (*dictionary.remarks, remark)
                dictionary = replace(dictionary, token_norm="constant_norm", remarks=remarks)
        sizes = {"activation_dim": dictionary.d_in, "dict_size": dictionary.d_sae}
        for name, size in sizes.items():
            if trainer.size(name) not in (None, size):
                raise DictionaryError(
                    f"{settings.path}: {name} is {trainer.size(name)}, and {path.name} has {size}"
                )
        layer = _number(trainer.value("layer"))
        hook = _hook(trainer.text("submodule_name"), layer)
        context = settings.section("buffer").size("ctx_len")
        told = origin(
            trainer.text("lm_name"),
            hook,
            settings=None if context is None else {"ctx_len": context},
        )
        if layer is not None:
            told["layer"] = layer
        return replace(dictionary, origin=told | settings.section(OWN).origin(ORIGIN))

    def write(self, dictionary: PlainDictionary, directory: Path) -> Path:
        """Write both files, for the class that expresses the dictionary."""
        kind = self._class(dictionary)
        dictionary = with_subtraction(dictionary, kind not in _WITHOUT_SUBTRACTION)
        told = dictionary.origin
        trainer: dict[str, Any] = {
            "dict_class": kind,
            "trainer_class": "sae_fast",
            "activation_dim": dictionary.d_in,
            "dict_size": dictionary.d_sae,
            "layer": _number(told.get("layer")),
            "lm_name": told.get("model"),
            "submodule_name": hook_named_by(told),
        }
        if dictionary.k is not None:
            trainer["k"] = dictionary.k
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS) as temporary:
            torch.save(_state(dictionary, kind), temporary)
        settings = {"trainer": trainer, "buffer": {}, OWN: {ORIGIN: told}}
        write_text(directory / CONFIG, json.dumps(settings, indent=2) + "\n")
        return directory

    def _class(self, dictionary: PlainDictionary) -> str:
        if dictionary.transcoder:
            raise refuse(self, "a transcoder", "its classes reconstruct their input")
        if not dictionary.use_relu:
            raise refuse(self, "codes without ReLU", "its activations are never negative")
        if dictionary.arch == "relu":
            return "AutoEncoder" if dictionary.subtract_b_dec else "AutoEncoderNew"
        if dictionary.arch == "topk" and dictionary.activation != "topk":
            raise refuse(
                self, f"activation {dictionary.activation}", "it selects the k largest values"
            )
        return {
            "topk": "AutoEncoderTopK",
            "batch_topk": "BatchTopKSAE",
            "matryoshka": "MatryoshkaBatchTopKSAE",
            "jumprelu": "JumpReluAutoEncoder",
            "gated": "GatedAutoEncoder",
        }[dictionary.arch]


_WITHOUT_SUBTRACTION = ("AutoEncoderNew", "JumpReluAutoEncoder")


def _config_of(path: Path) -> Settings:
    """Return the settings beside a file, or of a checkpoint the ones in the folder above it."""
    for directory in (path.parent, path.parent.parent):
        if (directory / CONFIG).is_file():
            return Settings.read(directory / CONFIG)
    return Settings(path.parent / CONFIG, {})


def _classes(names: set[str]) -> list[str]:
    """Return the classes whose tensors these are."""
    plain = {name.removeprefix(_BACKUP) for name in names if "/" not in name.removeprefix(_BACKUP)}
    plain -= _INTERPLM
    return [kind for kind, own in _TENSORS.items() if own - {_K} <= plain <= own | _FURTHER]


def _class_of(file: TensorFile, trainer: Settings, settings: Settings) -> str:
    given = trainer.text("dict_class")
    possible = _classes(_own_names(file))
    if given is not None:
        if given not in _TENSORS:
            raise DictionaryError(
                f"{settings.path}: dict_class {given!r} is not read; known are "
                f"{', '.join(_TENSORS)}"
            )
        if given not in possible:
            raise DictionaryError(f"{file.path}: has not the tensors of {given}")
        return given
    if not possible:
        raise DictionaryError(f"{file.path}: has not the tensors of a class of dictionary_learning")
    if len(possible) > 1:
        raise DictionaryError(
            f"{file.path}: may be of {' or '.join(possible)}, which have the same tensors: "
            f"dict_class in {CONFIG} says which, and {settings.path} is not there"
        )
    return possible[0]


def _own_names(file: TensorFile) -> set[str]:
    """Return the names of the dictionary's tensors, without the optimiser's in a checkpoint."""
    names = file.names()
    inside = {name for name in names if name.startswith(_BACKUP)}
    return inside or names


def _read(file: TensorFile, kind: str, trainer: Settings) -> PlainDictionary:
    start = _BACKUP if any(name.startswith(_BACKUP) for name in file.names()) else ""

    def get(name: str, *shape: int, transposed: bool = False) -> Tensor:
        return file.read(start + name, shape=shape or None, transposed=transposed)

    is_linear = _TENSORS[kind] >= _LINEAR
    W_enc = get("encoder.weight") if is_linear else get("W_enc", transposed=True)
    if W_enc.ndim != 2:
        raise DictionaryError(f"{file.path}: the encoder must be a matrix")
    d_sae, d_in = W_enc.shape
    shape = (d_sae, d_in)
    W_dec = get("decoder.weight", *shape, transposed=True) if is_linear else get("W_dec", *shape)
    bias = {"GatedAutoEncoder": "gate_bias"}.get(kind, "encoder.bias" if is_linear else "b_enc")
    centre = {
        "GatedAutoEncoder": "decoder_bias",
        "AutoEncoder": "bias",
        "AutoEncoderNew": "decoder.bias",
    }.get(kind, "b_dec")
    dictionary = PlainDictionary(
        _ARCHITECTURES[kind],
        W_enc=W_enc,
        b_enc=get(bias, d_sae),
        W_dec=W_dec,
        b_dec=get(centre, d_in),
        subtract_b_dec=kind not in _WITHOUT_SUBTRACTION,
    )
    if kind == "GatedAutoEncoder":
        return replace(dictionary, r_mag=get("r_mag", d_sae), b_mag=get("mag_bias", d_sae))
    if kind == "JumpReluAutoEncoder":
        return replace(dictionary, threshold=get("threshold", d_sae).clamp_min(0))
    if _K not in _TENSORS[kind]:
        return dictionary
    dictionary = replace(dictionary, k=_k_of(file, start + _K, trainer, d_sae))
    if kind == "AutoEncoderTopK":
        return dictionary
    has_threshold = start + "threshold" in file
    threshold = file.read(f"{start}threshold", shape=()) if has_threshold else None
    if threshold is None or threshold < 0:
        dictionary = replace(dictionary, remarks=(f"{file.path}: {_UNSET}",))
    else:
        dictionary = replace(dictionary, threshold=threshold)
    if kind == "MatryoshkaBatchTopKSAE":
        dictionary = replace(dictionary, prefixes=_prefixes(file, start, d_sae))
    return dictionary


def _scales_tokens(file: TensorFile) -> bool:
    """Return whether each token is scaled to a norm of sqrt(d_in), as in InterPLM."""
    if _BY_TOKEN in file:
        return bool(file.integer(_BY_TOKEN))
    return bool(read_torch_values(file.path).get(_BY_TOKEN))


def _k_of(file: TensorFile, name: str, trainer: Settings, d_sae: int) -> int:
    """Return the k of a file, or where it has none, of the settings beside it."""
    k = file.integer(name) if name in file else trainer.size(_K)
    if k is None:
        raise DictionaryError(f"{file.path}: has no tensor k, and no k is in {trainer.path}")
    if trainer.value(_K) not in (None, k):
        raise DictionaryError(f"{trainer.path}: k is {trainer.value(_K)!r}, {file.path} has {k}")
    if not 1 <= k <= d_sae:
        raise DictionaryError(f"{file.path}: k must be from 1 to {d_sae}, got {k}")
    return k


def _prefixes(file: TensorFile, start: str, d_sae: int) -> tuple[int, ...]:
    groups = file.integers(f"{start}group_sizes", _MOST_GROUPS)
    if min(groups, default=0) < 1 or sum(groups) != d_sae:
        raise DictionaryError(f"{file.path}: group_sizes must add up to {d_sae}, got {groups[:8]}")
    return tuple(sum(groups[: end + 1]) for end in range(len(groups)))


def _state(dictionary: PlainDictionary, kind: str) -> dict[str, Tensor]:
    """Return the state dict of a class."""
    W_enc, W_dec = dictionary.W_enc, dictionary.W_dec
    if _TENSORS[kind] >= _LINEAR:
        state = {"encoder.weight": W_enc, "decoder.weight": W_dec.t().contiguous()}
    else:
        state = {"W_enc": W_enc.t().contiguous(), "W_dec": W_dec}
    if kind == "GatedAutoEncoder":
        assert dictionary.r_mag is not None
        assert dictionary.b_mag is not None
        return state | {
            "decoder_bias": dictionary.b_dec,
            "gate_bias": dictionary.b_enc,
            "r_mag": dictionary.r_mag,
            "mag_bias": dictionary.b_mag,
        }
    bias = "encoder.bias" if _TENSORS[kind] >= _LINEAR else "b_enc"
    centre = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
    state |= {bias: dictionary.b_enc, centre: dictionary.b_dec}
    if kind == "JumpReluAutoEncoder":
        assert dictionary.threshold is not None
        state["threshold"] = dictionary.threshold
    if dictionary.k is not None:
        state["k"] = torch.tensor(dictionary.k, dtype=torch.int32)
        unset = torch.tensor(-1.0)
        state["threshold"] = unset if dictionary.threshold is None else dictionary.threshold
    if dictionary.prefixes is not None:
        ends = (0, *dictionary.prefixes)
        sizes = [end - begin for begin, end in itertools.pairwise(ends)]
        state["group_sizes"] = torch.tensor(sizes)
    return state


def _hook(name: str | None, layer: int | None) -> str | None:
    """Return the hook point that a submodule is, by its usual names, else the name as it is."""
    if name is None:
        return None if layer is None else f"residual.{layer}"
    match = _SUBMODULE.fullmatch(name)
    if match is None:
        return name
    number = layer if match[2] is None else int(match[2])
    return name if number is None else f"{_SUBMODULES[match[1]]}.{number}"


def _number(layer: object) -> int | None:
    return int(layer) if isinstance(layer, int | str) and str(layer).isdigit() else None


_ARCHITECTURES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}
