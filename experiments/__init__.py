"""Experiments with DoRA, run from a checkout of the repository.

Every module in this folder is one experiment: `python -m experiments.quickstart`, `compare` and
`efficiency`. They are built from four packages: `tasks` (data and metrics), `models`, `trainer`
(methods and the training loop) and `benchmarks` (speed and memory). Results that are kept lie in
`results/`. The experiments use the public names of `dora_jax` and nothing else of it.
"""
