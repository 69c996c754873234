"""Training: the trainer, its optimiser, schedule, checkpoints and logs."""
