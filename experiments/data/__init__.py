"""Weights and data for the experiments: verified downloads, reading, tokenising and batching."""
