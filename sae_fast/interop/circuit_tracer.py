"""circuit-tracer: a transcoder for each layer in `layer_N.safetensors`, and `config.yaml`.

b_dec is not subtracted and nothing is normalised. Latents are those above
`activation_function.threshold` where that is there, else the ones above 0; W_skip is used as
x W_skipᵀ. Writing one more layer into a directory adds its file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sae_fast.activations.capture.hooks import transformer_lens_name
from sae_fast.atomic_files import replacing, write_text
from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import OWN, Format, Settings, refuse
from sae_fast.interop.hook_names import hook_named_by, origin
from sae_fast.interop.tensor_file import open_tensors
from sae_fast.json_files import JSONError, parse_json, read_regular
from sae_fast.tensor_files import save_tensors

CONFIG = "config.yaml"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_LINE = re.compile(r"([A-Za-z_]\w*):[ \t]*(.*)")
_MOST_BYTES = 1 << 20
_INPUT, _OUTPUT = "feature_input_hook", "feature_output_hook"


class CircuitTracer(Format):
    """Transcoders of circuit-tracer."""

    name = "circuit_tracer"
    title = "circuit-tracer"
    can_write = True

    def recognises(self, place: Path) -> bool:
        """Return whether the file is layer_N.safetensors with its tensors, or a lone one's folder.

        A folder of several layers holds several dictionaries.
        """
        path = _file(place)
        if path is None or _LAYER.fullmatch(path.name) is None or not path.is_file():
            return False
        with open_tensors(path) as file:
            return {"W_enc", "W_dec", "b_enc", "b_dec"} <= file.names()

    def read(self, place: Path) -> PlainDictionary:
        """Read the transcoder of one layer."""
        path = _file(place)
        assert path is not None
        layer = _LAYER.fullmatch(path.name)
        assert layer is not None
        settings = _settings(path.parent / CONFIG)
        with open_tensors(path) as file:
            if "log_thresholds" in file:
                raise DictionaryError(f"{path}: log_thresholds are of an old form that is not read")
            shape = file.shape("W_enc")
            if len(shape) != 2:
                raise DictionaryError(f"{path}: W_enc must be a matrix, got {list(shape)}")
            d_sae, d_in = shape
            threshold = None
            if _THRESHOLD in file:
                n_thresholds = file.shape(_THRESHOLD)
                expected = () if n_thresholds == () else (d_sae,)
                threshold = file.read(_THRESHOLD, shape=expected).expand(d_sae)
                if bool((threshold < 0).any()):
                    raise DictionaryError(
                        f"{path}: thresholds below 0 let negative values through there, and no "
                        "code of arch jumprelu here has them"
                    )
            told = _origin(path.parent / CONFIG, settings, int(layer[1]))
            return PlainDictionary(
                "relu" if threshold is None else "jumprelu",
                W_enc=file.read("W_enc", shape=shape),
                b_enc=file.read("b_enc", shape=(d_sae,)),
                W_dec=file.read("W_dec", shape=shape),
                b_dec=file.read("b_dec", shape=(d_in,)),
                W_skip=file.read("W_skip", shape=(d_in, d_in)) if "W_skip" in file else None,
                threshold=None if threshold is None else threshold.clone(),
                subtract_b_dec=False,
                transcoder=True,
                origin=told,
            )

    def write(self, dictionary: PlainDictionary, directory: Path) -> Path:
        """Write the file of a transcoder's layer, and config.yaml."""
        if not dictionary.transcoder:
            raise refuse(
                self, "an autoencoder", "it replaces MLPs by transcoders; saelens has both"
            )
        if dictionary.d_out != dictionary.d_in:
            sizes = f"{dictionary.d_in} inputs and {dictionary.d_out} outputs"
            raise refuse(self, sizes, "both widths must be equal")
        if not dictionary.use_relu:
            raise refuse(self, "codes without ReLU", "its activations are never negative")
        threshold = dictionary.threshold
        if dictionary.arch not in ("relu", "jumprelu") and threshold is None:
            raise refuse(
                self, f"arch {dictionary.arch}", "its files have thresholds, and no number k"
            )
        if dictionary.arch == "gated":
            raise refuse(self, "arch gated", "its latents have one value, not gate and magnitude")
        layer = dictionary.origin.get("layer")
        if layer is None or not str(layer).isdigit():
            raise refuse(
                self, "a transcoder of an unknown layer", "its files are named by the layer"
            )
        for told in (dictionary.origin, dictionary.origin.get("targets")):
            if isinstance(told, dict) and told.get("hook") and hook_named_by(told) is None:
                raise refuse(
                    self, f"a hook point without a name, {told['hook']!r}", "it places it by name"
                )
        tensors = {name: getattr(dictionary, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        if threshold is not None:
            tensors[_THRESHOLD] = threshold.expand(dictionary.d_sae)
        if dictionary.W_skip is not None:
            tensors["W_skip"] = dictionary.W_skip
        directory.mkdir(parents=True, exist_ok=True)
        settings = self._merged(directory / CONFIG, _written_settings(dictionary))
        settings[_own_key(int(layer))] = json.dumps(dictionary.origin)
        path = directory / f"layer_{int(layer)}.safetensors"
        with replacing(path) as temporary:
            save_tensors(temporary, tensors)
        lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
        write_text(directory / CONFIG, "\n".join(lines) + "\n")
        return path

    def _merged(self, path: Path, settings: dict[str, str]) -> dict[str, str]:
        """Return the settings of a directory; raise DictionaryError if it has others already."""
        if not path.is_file():
            return settings
        before = _settings(path)
        for name, value in settings.items():
            if name in before and before[name] != value:
                raise DictionaryError(
                    f"{path}: {name} is {before[name]!r}, and this transcoder has {value!r}: "
                    "write it into another directory"
                )
        return {**before, **settings}


def _file(place: Path) -> Path | None:
    """Return the file of a layer, of a directory the only one."""
    if not place.is_dir():
        return place
    files = [path for path in place.iterdir() if _LAYER.fullmatch(path.name)]
    return files[0] if len(files) == 1 and (place / CONFIG).is_file() else None


def _settings(path: Path) -> dict[str, str]:
    """Return the texts at the top of a YAML file; other values, which nothing needs, are left."""
    if not path.is_file():
        return {}
    try:
        text = read_regular(path, _MOST_BYTES).decode("utf-8")
    except (ValueError, OSError) as error:
        raise DictionaryError(f"{path}: cannot be read: {error}") from None
    found = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.rstrip())
        if match is not None and match[2] and match[2][0] not in "[{&*|>!#":
            found[match[1]] = _text(match[2])
    return found


def _text(written: str) -> str:
    """Return the text that a value is written as: bare, quoted, or as `write` quotes it."""
    if written.startswith('"'):
        try:
            return str(parse_json(written))
        except JSONError:
            pass  # it has a comment behind it, or escapes that only YAML has
    return re.sub(r"\s+#.*$", "", written).strip("\"'")


def _own_key(layer: int) -> str:
    """Return the name under which config.yaml has the whole origin of a layer."""
    return f"{OWN}_layer_{layer}"


def _origin(path: Path, settings: dict[str, str], layer: int) -> dict[str, Any]:
    model = settings.get("model_name")
    told = origin(model, _of_layer(settings.get(_INPUT), layer))
    told["layer"] = layer
    if output := _of_layer(settings.get(_OUTPUT), layer):
        told["targets"] = origin(model, output)
    own = settings.get(_own_key(layer))
    return told if own is None else told | _whole_origin(path, own, _own_key(layer))


def _whole_origin(path: Path, written: str, name: str) -> dict[str, Any]:
    try:
        return Settings(path, {name: parse_json(written)}).origin(name)
    except JSONError as error:
        raise DictionaryError(f"{path}: {name}: {error}") from None


def _of_layer(hook: str | None, layer: int) -> str | None:
    return None if not hook else f"blocks.{layer}.{hook}"


def _written_settings(dictionary: PlainDictionary) -> dict[str, str]:
    told = dictionary.origin
    targets = told.get("targets")
    output = hook_named_by(targets) if isinstance(targets, dict) else None
    settings = {
        "model_kind": "transcoder_set",
        "model_name": str(told.get("model", "")),
        _INPUT: _without_layer(hook_named_by(told) or "mlp_in.0"),
        _OUTPUT: _without_layer(output or "mlp_out.0"),
    }
    return settings | {"scan": settings["model_name"]}


def _without_layer(hook: str) -> str:
    """Return the name that TransformerLens has for a hook point, inside its block."""
    return re.sub(r"^blocks\.\d+\.", "", transformer_lens_name(hook))
