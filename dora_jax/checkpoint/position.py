"""The position in the data: of one iterator, or of one in each process of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax

from dora_jax.checkpoint.storage import decode_json, encode_json
from dora_jax.disk.json_file import reason
from dora_jax.errors import CheckpointError
from dora_jax.processes import from_each


def position_to_save(data: Any) -> dict[str, Any]:
    """Returns the members of a step's metadata that hold the position in the data.

        {"data": position}                           the same in every process
        {"data": None, "data_of_each": [one, two]}   one for each process, in their order

    Args:
      data: an iterator with `get_state`, its state, or any JSON.

    Raises:
      AdapterError: the position is no JSON.
    """
    position = data.get_state() if hasattr(data, "get_state") else data
    texts = from_each(json.dumps(encode_json(position, "metadata['data']")))
    if len(set(texts)) == 1:
        return {"data": position}
    return {"data": None, "data_of_each": [decode_json(json.loads(text)) for text in texts]}


def restored_position(metadata: Mapping[str, Any], data: Any) -> Any:
    """Returns the position of this process, and sets it in an iterator, if one is given.

    Where the processes had positions of their own, and are now of another number, it returns all.

    Raises:
      CheckpointError: the position does not fit the iterator, or the number of processes.
    """
    position = metadata["data"]
    if "data_of_each" in metadata:
        position = metadata["data_of_each"]
        if isinstance(position, list) and len(position) == jax.process_count():
            position = position[jax.process_index()]
        elif data is not None:
            raise CheckpointError(
                f"step {metadata['step']}: each process of the run had its own position in the "
                f"data, and their number is now {jax.process_count()}: restore with data=None, and "
                "set the iterators by the positions of all, which the restored run has as its data"
            )
    if data is not None:
        try:
            data.set_state(position)
        except Exception as error:  # of any class: iterators are of other libraries
            raise CheckpointError(
                f"step {metadata['step']}: the position in the data does not fit the iterator: "
                f"{type(error).__name__}: {reason(error)}"
            ) from error
    return position
