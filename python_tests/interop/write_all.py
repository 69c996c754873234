"""Write a dictionary of every kind in every format, for `tools/foreign_dictionaries.py check`.

PYTHONPATH=. python python_tests/interop/write_all.py DIRECTORY
"""

import sys
from pathlib import Path

from plain_models import KINDS, make, rows
from safetensors.torch import save_file

from sae_fast import interop
from sae_fast.autoencoder.interchange import to_plain


def main(directory):
    """Write all, with the rows and codes that each library must find."""
    for kind in KINDS:
        plain, x = to_plain(make(kind)), rows()
        for known in interop.FORMATS:
            out = Path(directory) / known.name / kind.replace(" ", "_")
            if not known.can_write:
                continue
            try:
                interop.write(plain, out, known.name)
            except interop.DictionaryError as error:
                print(error)
                continue
            code = plain.encode(x)
            parts = {"x": x, "code": code.float(), "x_hat": plain.decode(code, x).float()}
            save_file(parts, out / "expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
