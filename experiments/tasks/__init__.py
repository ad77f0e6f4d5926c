"""Tasks to adapt a model to: the texts, their splits and batches, and the metrics of a run.

`download.py` fetches published files and verifies them. `sarcasm.py` reads one data set and splits
it. `text.py` makes batches of token ids. `task.py` joins a pretrained model and its texts.
`metrics.py` writes metrics to files, and `probe.py` is the baseline without fine-tuning. A new task
is one more reader like `sarcasm.py` and one more function like `task.load_task`.

`glue/` has the nine tasks of GLUE. `scores.py` computes metrics of predictions, and `buckets.py`
batches texts of similar length.
"""
