"""Tasks whose right answers are known: data is made, a model trained on it, and both compared."""
