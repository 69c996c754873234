"""Puts this folder on the path, so that every test can import the helpers that lie beside it."""
