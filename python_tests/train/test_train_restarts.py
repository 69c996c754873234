"""`torchrun --max-restarts` continues a run of several processes after one was killed."""

import os
from pathlib import Path

import pytest
import warm_python

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "examples" / "activations"
if not SHARDS.exists():
    pytest.skip("no checkout: the examples are not installed", allow_module_level=True)
SMALL = (
    *("--shard-dir", SHARDS, "--d-sae", 64, "--k", 4, "--batch-size", 64, "--num-threads", 1),
    *("--eval-every", 0, "--log-every", 1000, "--max-steps", 12),
)
# Process 1 of the first start ends itself after step 6.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from sae_fast import Trainer
from sae_fast.train import main

advance = Trainer.advance

def die(trainer, **options):
    row = advance(trainer, **options)
    if trainer.step == 6:
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return row

if os.environ["RANK"] == "1" and not Path("died").exists():
    Trainer.advance = die
sys.exit(main())
"""


@pytest.mark.slow
def test_a_killed_process_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program, python = tmp_path / "program.py", tmp_path / "python"
    program.write_text(PROGRAM)
    python.write_text(f'#!/bin/bash\nexec {warm_python.shell_command()} "$@"\n')
    python.chmod(0o755)
    launcher = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 2, "--no-python")
    again = ("--mesh", "data=2", "--resume-from", "latest", "--checkpoint-every", 4)
    command = ("-m", "torch.distributed.run", *launcher, python, program, *SMALL, *again)
    done = warm_python.run((*command, "--checkpoint-dir", "r"), env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert Path("died").exists()
    one = ("-m", "sae_fast.train", *SMALL, "--grad-acc-steps", 2, "--checkpoint-dir", "one")
    assert warm_python.run(one).returncode == 0
    model = "checkpoints/latest/sae.safetensors"
    assert Path("r", model).read_bytes() == Path("one", model).read_bytes()
