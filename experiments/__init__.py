"""Experiment scripts, their models and data; run from a checkout of the repository."""
