"""Run the capture command on small models, and read the files it writes."""

import json

import h5py
import numpy as np
from small_models import save_model
from small_texts import make_texts

from sae_fast.capture import main


def write_texts(path, texts=None):
    """Write documents as a JSONL file."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts or make_texts(150)]
    path.write_text("".join(lines))
    return path


def make_inputs(folder, name="llama"):
    """Make a folder with a model and a file of texts; return them as arguments."""
    return [str(save_model(folder / name, name)), str(write_texts(folder / "texts.jsonl"))]


def arguments(inputs, out, *more, max_tokens=1500):
    """Return a command line for two layers that writes a shard for every 400 tokens."""
    chosen = ["--layers", "0", "2", "--max-tokens", str(max_tokens), "--shard-tokens", "400"]
    return [
        *inputs,
        *chosen,
        "--heldout-tokens",
        "100",
        "--batch-size",
        "4",
        "--num-threads",
        "1",
        "--out",
        str(out),
        *more,
    ]


def capture(inputs, out, *more, **sizes):
    """Run the command; return its exit code."""
    return main(arguments(inputs, out, *more, **sizes))


def shards(directory):
    """Return the datasets and the attribute checksum of all shards below a directory, by path."""
    found = {}
    for path in sorted(directory.rglob("*.h5")):
        if not path.name.startswith("."):
            with h5py.File(path) as file:
                content = {name: file[name][:] for name in file}
                found[str(path.relative_to(directory))] = content, file.attrs["checksum"]
    return found


def assert_same_shards(one, other):
    """Assert that two captures hold equal files."""
    first, second = shards(one), shards(other)
    assert list(first) == list(second)
    for path, (content, checksum) in first.items():
        assert checksum == second[path][1], path
        for name, numbers in content.items():
            np.testing.assert_array_equal(numbers, second[path][0][name], err_msg=f"{path} {name}")


def all_rows(directory, pattern="shard_*.h5"):
    """Return every row of a folder of shards: (doc_id, position, token) -> activations."""
    found = {}
    for path in sorted(directory.glob(pattern)):
        with h5py.File(path) as file:
            keys = zip(file["doc_id"][:], file["position"][:], file["token_ids"][:], strict=True)
            for key, row in zip(keys, file["activations"][:], strict=True):
                assert key not in found, f"{key} is there twice"
                found[tuple(map(int, key))] = row
    return found
