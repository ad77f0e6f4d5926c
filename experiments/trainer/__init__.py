"""Training: the methods that are compared, the training loop, its runs on disk and its plots.

`methods.py` says how each method adapts a model. `training.py` trains one model. `runs.py` keeps
the results of many training runs in folders. `plots.py` draws them. `memory.py` and
`command_line.py` set up the process that an experiment runs in. A new method is one more entry in
`methods.METHODS`.
"""
