"""Dictionaries of other libraries: recognised by their files, read, and written.

There is one file for each library or release. All are read into `PlainDictionary`, which has no
convention of any of them, and written from it.
"""

from sae_fast.interop.dictionary import PlainDictionary, with_subtraction
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format
from sae_fast.interop.formats import FORMATS, dictionaries_in, find, read, recognise, write
from sae_fast.interop.hub import download, upload

__all__ = [
    "FORMATS",
    "DictionaryError",
    "Format",
    "PlainDictionary",
    "dictionaries_in",
    "download",
    "find",
    "read",
    "recognise",
    "upload",
    "with_subtraction",
    "write",
]
