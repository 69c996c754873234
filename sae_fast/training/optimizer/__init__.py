"""Optimisers of a sparse autoencoder, the averages of its weights, and the scale of fp16 losses."""
