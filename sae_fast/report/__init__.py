"""Plots of what a run has logged."""
