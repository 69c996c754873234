"""The checks of a training on shards that need no row of them, made before any is read.

A pass over a large set takes hours; a conflict of settings is told before it. Everything is checked
again, in its place, when the shards are open.
"""

from __future__ import annotations

from pathlib import Path

from sae_fast.config import RunConfig
from sae_fast.config.effects import Run, check_run_effects
from sae_fast.ops.native import build_info
from sae_fast.training.checkpoint import Checkpoint
from sae_fast.training.data import check_one_heldout, have_names, open_stream
from sae_fast.training.device import checked_device
from sae_fast.training.fitted_batch import with_fitted_batch
from sae_fast.training.labels import label_columns
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.run_directory import RunDirectory
from sae_fast.training.schedule import make_schedules
from sae_fast.training.shard_files import describe_training_shards, has_heldout_shards
from sae_fast.training.start import saved_config, sized_config


def check_before_reading(
    config: RunConfig, checkpoint: Checkpoint | None, *, has_heldout: bool = False
) -> None:
    """Raise ValueError where settings do not fit the shards, the checkpoint or each other.

    Args:
        config: of the run.
        checkpoint: from which it is resumed; None: it starts.
        has_heldout: whether held-out rows are given beside the shards.
    """
    sae, train = config.sae, config.train
    if train.checkpoint_dir is not None:
        directory = RunDirectory(Path(train.checkpoint_dir), train.keep_checkpoints)
        directory.check_free()
        directory.check_resumes(checkpoint)
    check_one_heldout(train, is_given=has_heldout)
    shards = describe_training_shards(train, sae)
    if label_columns(sae):
        return  # the labels decide sizes of the model
    d_out = 0 if shards.targets is None else shards.targets.d_in
    sae = sized_config(sae, shards.d_in, checkpoint, d_out)
    train = with_fitted_batch(train, shards.rows)
    schedules = make_schedules(train, sae, shards.rows)
    schedules.check_made(0 if checkpoint is None else checkpoint.step, train)
    run = Run(
        *(sae, train),
        data="shards",
        has_heldout=has_heldout or has_heldout_shards(train),
        has_names=lambda: have_names(shards),
        has_target_names=lambda: have_names(shards, of_targets=True),
        total_steps=schedules.total_steps,
    )
    check_run_effects(run, None if checkpoint is None else saved_config(checkpoint))
    stream = open_stream(train, shards, checked_device(train.device))
    plan_memory(
        *(sae, train),
        native=build_info()["backend"] == "native",
        pool_bytes=stream.memory_bytes,
        cache_bytes=stream.device_bytes,
    ).check()
