"""The nine tasks of GLUE (arXiv 1804.07461): readers, splits, metrics and batches.

`tables.py` says what each published file holds. `reading.py` reads them, as TSV or as parquet.
`splits.py` makes the splits of an experiment: the published test labels are hidden, so that the
published validation rows are cut in two, one half for choices and one half as the test.
`sweep_task.py` joins them with a pretrained encoder, for `experiments.sweeps`. `presets.py` says
what `experiments.glue` trains.
"""
