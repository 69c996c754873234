"""The messages on the guide's page of troubleshooting equal the command's output."""

from pathlib import Path

import pytest
import torch
from train_runs import Run

from sae_fast.activations import write_shard

PAGE = Path(__file__).parents[2] / "docs/guide/troubleshooting.md"
if not PAGE.exists():
    pytest.skip("no checkout: the documents are not installed", allow_module_level=True)
FLAGS = (
    *("--shard-dir", "shards", "--d-sae", "32", "--batch-size", "32", "--max-steps", "16"),
    *("--log-every", "1", "--num-threads", "1", "--checkpoint-dir", "run"),
)
# Per mistake the flags, and pieces of the output, in order.
NOT_DEAD = ("--dead-after-tokens", "10000000")
QUOTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "too large": (
        ("--d-sae", "3000000000"),
        ("error: the run needs ", " in memory and ", " is available (largest: "),
    ),
    "rate too low": (
        ("--k", "2", "--lr", "1e-12", "--batch-size", "200", "--max-steps", "60"),
        ("the loss has not fallen: ", " at first, ", " at the end"),
    ),
    "rate too high": (
        ("--k", "2", "--lr", "1e30"),
        ("the loss is ", "; a lower learning rate may help"),
    ),
    "penalty too high": (
        ("--arch", "relu", "--l1-penalty-coeff", "3000", "--lr", "3e-2", "--max-steps", "60"),
        ("L0 is ", ": fewer than one latent is active for a token"),
    ),
    "nothing explained": (
        ("--arch", "relu", "--l1-penalty-coeff", "3000", "--lr", "3e-2", "--max-steps", "60"),
        ("FVU is ", ": the reconstruction explains no more than the mean of the rows does"),
    ),
    "latents silent": (
        # AuxK would revive latents that count as dead.
        ("--k", "1", "--d-sae", "64", "--lr", "0.3", "--max-steps", "500", *NOT_DEAD),
        (" latents have fired for none of the last ", " tokens"),
    ),
}
AGAIN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "same directory": ((), ("already holds a run (step-",)),
    "another k": (
        ("--k", "3", "--resume-from", "latest"),
        ("is of a model with k = ", ", this run's has "),
    ),
    "other rows": (
        ("--shard-dir", "other", "--resume-from", "latest"),
        (
            "the shards differ from the ones that the checkpoint was made with: "
            "train_00.h5 has other content",
        ),
    ),
}


def assert_quoted(text: str, pieces: tuple[str, ...]) -> None:
    """Assert that all pieces are in one line of the text, and in one row of the page."""
    for lines in (text.splitlines(), PAGE.read_text(encoding="utf-8").splitlines()):
        assert any(all(piece in line for piece in pieces) for line in lines), pieces


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("mistake", QUOTED)
def test_a_mistake_is_told_as_the_page_quotes_it(run: Run, mistake: str) -> None:
    flags, pieces = QUOTED[mistake]
    _, out, err = run(*_over(FLAGS, flags))
    assert_quoted(out + err, pieces)


@pytest.mark.usefixtures("shards")
def test_a_second_run_in_a_directory_is_told_as_the_page_quotes_it(run: Run) -> None:
    other = Path("other")
    other.mkdir()
    for path in Path("shards").iterdir():
        write_shard(other / path.name, torch.randn(300, 8))
    flags = _over(FLAGS, ("--k", "2"))
    assert run(*flags)[0] == 0
    for more, pieces in AGAIN.values():
        code, _, err = run(*_over(flags, more))
        assert code == 2
        assert_quoted(err, pieces)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.usefixtures("shards")
def test_a_missing_gpu_is_told_as_the_page_quotes_it(run: Run) -> None:
    code, _, err = run(*FLAGS, "--device", "cuda")
    assert code == 2
    assert_quoted(err, ("device = 'cuda': torch ", " finds no CUDA device here; use --device cpu"))


def _over(flags: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    """Return the flags with some replaced, each with one value."""
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    pairs |= dict(zip(others[::2], others[1::2], strict=True))
    return tuple(word for pair in pairs.items() for word in pair)
