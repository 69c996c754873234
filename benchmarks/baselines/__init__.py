"""The step that sae_fast runs, in plain PyTorch and through the peers' own trainers."""
