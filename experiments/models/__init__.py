"""Models that the experiments adapt, and the readers of their pretrained checkpoints.

Each architecture has a configuration (`bert_config.py`), a model (`bert.py`) and a reader and a
writer of Hugging Face folders (`huggingface.py`). `layers.py`, `inputs.py` and `config_file.py`
hold the parts that the architectures share. `partitioning.py` says where arrays lie on a mesh,
`attention.py` which implementation attends, `remat.py` what a backward pass keeps. `generation.py`
continues texts, with the keys and values of earlier tokens kept (`kv_cache.py`). `smollm.py`
provides a small pretrained language model.
"""
