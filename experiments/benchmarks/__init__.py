"""Measurements of speed and memory: the parts of `python -m experiments.efficiency`.

`cases.py` has the models, `steps.py` the training steps that are compared, `timing.py` the clock.
`device_runs.py` measures on this machine, `ahead_of_time.py` counts in programs compiled for a TPU,
and `peft_peer.py` does the same work in PEFT. `targets.py` lists the bounds that the library has to
meet, and `report.py` writes the report. `designs.py` is a benchmark of its own.
"""
