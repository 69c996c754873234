"""Measurements of sae_fast against PyTorch and the peers; see README.md beside this file."""
