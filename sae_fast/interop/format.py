"""The base of all formats: how files of a library are recognised, read and written."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_fast.activations.origin import checked_origin
from sae_fast.atomic_files import replacing, write_text
from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.errors import DictionaryError
from sae_fast.json_files import JSONError, read_json, shown
from sae_fast.tensor_files import save_tensors

# The section of settings that only sae_fast reads, where a format leaves room for one.
OWN, ORIGIN = "sae_fast", "origin"
_LARGEST = torch.finfo(torch.float32).max


class Format(ABC):
    """The files in which one library or release keeps a dictionary.

    Attributes:
        name: as `--to` names it, and tests and tables.
        title: as its authors write it.
        can_write: whether `write` is there.
        writes_token_norm: whether what it writes may normalise each token by numbers of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    can_write: ClassVar[bool] = False
    writes_token_norm: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, place: Path) -> bool:
        """Return whether a directory or file holds a dictionary of this format.

        It goes by the names of files, and of the tensors where several formats share those.
        """

    @abstractmethod
    def read(self, place: Path) -> PlainDictionary:
        """Read a dictionary that was recognised; raise DictionaryError in one line."""

    def write(self, dictionary: PlainDictionary, directory: Path) -> Path:
        """Write a dictionary; return the directory, or the file of one that may hold several.

        Raises DictionaryError for what the format cannot express.
        """
        raise DictionaryError(f"{self.title}: dictionaries are read from this format only")


class PairOfFiles(Format):
    """A format that keeps a dictionary as settings and tensors, two files of one directory.

    Attributes:
        config: the name of the settings.
        weights: the name of the tensors.
    """

    config: ClassVar[str]
    weights: ClassVar[str]

    def recognises(self, place: Path) -> bool:
        """Return whether both files are there."""
        directory = self.directory_of(place)
        return all((directory / name).is_file() for name in (self.config, self.weights))

    def directory_of(self, place: Path) -> Path:
        """Return the directory of a dictionary, for which each of its files may stand."""
        return place.parent if place.name in (self.config, self.weights) else place

    def write_pair(
        self, directory: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> Path:
        """Write both files, each whole or not at all; return the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / self.weights) as temporary:
            save_tensors(temporary, tensors)
        write_text(directory / self.config, json.dumps(settings, indent=2) + "\n")
        return directory


class Settings:
    """The settings in a JSON file of another library, whose types are checked when they are read.

    Args:
        path: of the file.
        content: of it, or a section.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self._content = path, content

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read a file; raise DictionaryError unless it is an object."""
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise DictionaryError(f"{path}: no such file") from None
        except JSONError as error:
            raise DictionaryError(str(error)) from None
        if not isinstance(content, dict):
            raise DictionaryError(f"{path}: must be a JSON object, got {shown(content)}")
        return cls(path, content)

    def __contains__(self, name: object) -> bool:
        return name in self._content

    def names(self) -> list[str]:
        """Return the names of all settings."""
        return list(self._content)

    def section(self, name: str) -> Settings:
        """Return a section; empty where it is not there."""
        content = self._content.get(name)
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise self._wrong(name, "an object", content)
        return Settings(self.path, content)

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return a text; the default where it is not there or null."""
        value = self._content.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return default if value is None else value

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false; the default where it is not there or null."""
        value = self._content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return default if value is None else value

    def size(self, name: str) -> int | None:
        """Return a whole number of at least 1; None where it is not there or null."""
        value = self._content.get(name)
        if value is None:
            return None
        is_whole = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_whole or value != int(value) or value < 1:
            raise self._wrong(name, "a whole number of at least 1", value)
        return int(value)

    def needed_size(self, name: str) -> int:
        """Return a whole number of at least 1, which must be there."""
        size = self.size(name)
        if size is None:
            raise DictionaryError(f"{self.path}: has no {name}")
        return size

    def number(self, name: str) -> float:
        """Return a number of float32 greater than or equal to 0, which must be there."""
        value = self._content.get(name)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value <= _LARGEST
        ):
            raise self._wrong(name, f"a number from 0 to {_LARGEST:.3g}", value)
        return float(value)

    def origin(self, name: str) -> dict[str, Any]:
        """Return an origin, see `checked_origin`; empty where it is not there."""
        try:
            return checked_origin(self._content.get(name) or {}, f"{self.path}: {name}")
        except ValueError as error:
            raise DictionaryError(str(error)) from None

    def value(self, name: str) -> Any:
        """Return a value of any type; None where it is not there."""
        return self._content.get(name)

    def must_be(self, name: str, *known: object, because: str = "") -> None:
        """Raise DictionaryError unless a setting has one of some values, or is not there."""
        value = self._content.get(name)
        if name in self._content and value not in known:
            reason = f": {because}" if because else ""
            raise DictionaryError(f"{self.path}: {name} {shown(value)} is not read{reason}")

    def _wrong(self, name: str, expected: str, value: object) -> DictionaryError:
        return DictionaryError(f"{self.path}: {name} must be {expected}, got {shown(value)}")


def refuse(format_: Format, what: str, reason: str) -> DictionaryError:
    """Return the error for a dictionary that a format cannot express."""
    return DictionaryError(f"{format_.title} cannot express {what}: {reason}")
