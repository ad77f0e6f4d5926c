"""Writing the parameters of a Flax model as a Hugging Face checkpoint folder."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dora_jax.disk import given_folder, target_folder, written_by_all, written_whole
from dora_jax.disk.json_file import read_json
from dora_jax.errors import CheckpointError
from dora_jax.huggingface.files import WEIGHTS, save_tensors, weight_files
from dora_jax.huggingface.parameters import Parameter, parameters_of
from dora_jax.names.name_map import NameMap
from dora_jax.processes import (
    failing_together,
    is_first,
    on_first_host,
    spans_processes,
)

if TYPE_CHECKING:
    from os import PathLike

    from flax import nnx
    from jax.typing import ArrayLike, DTypeLike

    from dora_jax.adapters.trees import Tree
    from dora_jax.decomposition.axes import KernelAxes


# Non-weight files to copy (config, tokenizer, licence).
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
)


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """How the files of a checkpoint folder are written.

    Attributes:
      dtype: of the tensors; None for each parameter's own.
      max_file_bytes: the largest size of a file. A larger model is written as several files and an
        index. The host holds the tensors of one file.
      overwrite: whether weights in the folder may be replaced. Its other files stay.
    """

    dtype: DTypeLike | None = None
    max_file_bytes: int = 2 * 10**9
    overwrite: bool = False


def save_checkpoint(
    folder: str | PathLike[str],
    model: nnx.Module | Tree,
    names: NameMap,
    *,
    source: str | PathLike[str] | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
    extra: Mapping[str, ArrayLike] | None = None,
    options: SaveOptions | None = None,
) -> None:
    """Writes a model, or a tree of parameters, as a Hugging Face checkpoint folder.

    The folder has all files of the old version or all of the new one at any moment. Its other
    files stay. In a run of several processes all call it; the first one gathers the tensors, one by
    one, and writes.

    Args:
      folder: where to write.
      model: an NNX model, or the parameters of a Linen one. An adapted model is merged first.
      names: which tensor each parameter is.
      source: the folder of the pretrained checkpoint, whose configuration and tokenizer are copied.
        The configuration's `dtype` is replaced by that of the weights.
      axes: as for `load_checkpoint`.
      extra: further tensors, such as a head's, by their names in the folder.
      options: the tensors' dtype, the size of files, whether to overwrite.

    Raises:
      FileExistsError: the folder holds weights, and `options.overwrite` is not set.
      CheckpointError: a value is not finite, or two tensors have one name; names the tensors. Or
        the folder is the source, or the current one, or the disk is full.
      NameMapError: the map lacks a module.
      AdapterError: the model is adapted.

    Example:
      >>> import tempfile
      >>> model = {"up": {"kernel": np.ones((4, 3), np.float32)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_checkpoint(f"{folder}/mlp", model, NameMap({"up": "mlp.up_proj"}))
      ...     [file.name for file in pathlib.Path(folder, "mlp").iterdir()]
      ['model.safetensors']
    """
    options = options or SaveOptions()
    tensors = _tensors(parameters_of(model, axes=axes), names, extra or {})
    dtypes = {name: np.dtype(options.dtype or like.dtype) for name, (like, _) in tensors.items()}
    sizes = {
        name: dtypes[name].itemsize * math.prod(like.shape) for name, (like, _) in tensors.items()
    }
    with written_by_all(functools.partial(_new_version, folder, source, options)) as partial:
        make = functools.partial(_maker, tensors, dtypes)
        save_tensors(partial, sizes, make, options.max_file_bytes)
        with failing_together():
            if source is not None and is_first():
                copy_companions(given_folder(source), partial, set(dtypes.values()))


def _new_version(
    folder: str | PathLike[str], source: str | PathLike[str] | None, options: SaveOptions
) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Returns a block that makes a folder, or the new version of one; errors as for saving."""
    target = target_folder(folder, *(() if source is None else (source,)))
    if weight_files(target) and not options.overwrite:
        raise FileExistsError(
            f"{folder} holds weights: pass SaveOptions(overwrite=True), or another folder"
        )
    return written_whole(target, own=is_weights, overwrite=options.overwrite)


def _maker(
    tensors: Mapping[str, tuple[Any, Callable[[], Any]]],
    dtypes: Mapping[str, np.dtype[Any]],
    name: str,
) -> Callable[[], Any]:
    """Gathers a tensor, and returns a function that makes it on the first host."""
    convert = tensors[name][1]()
    return lambda: _cast(name, convert(), dtypes[name])


def _cast(name: str, value: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Returns a tensor in another dtype; raises `CheckpointError` if it is not finite there."""
    with np.errstate(over="ignore"):  # infinity is refused below
        cast = np.asarray(value).astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        raise CheckpointError(
            f"{name} holds NaN or infinity as {dtype}, so nothing was written. Train it anew, or "
            "save it in a wider dtype"
        )
    return cast


def _tensors(
    parameters: list[Parameter], names: NameMap, extra: Mapping[str, ArrayLike]
) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Returns by name, for each tensor to write, its shape and dtype, and how it is made.

    That is in two steps: all processes gather the value on the first host, which then converts it.

    Raises:
      CheckpointError: a value is abstract, or two tensors have one name.
    """
    tensors: dict[str, tuple[Any, Callable[[], Any]]] = {}
    repeated = []
    for parameter in parameters:
        parameter.check_concrete()
        for one in parameter.slices(names):
            like = jax.ShapeDtypeStruct(one.tensor_shape, parameter.dtype)

            def gather(one: Any = one, parameter: Parameter = parameter) -> Callable[[], Any]:
                value = on_first_host(parameter.value[one.index])
                return lambda: one.to_tensor(names, value)

            repeated += [one.tensor] if one.tensor in tensors else []
            tensors[one.tensor] = (like, gather)
    for name, value in extra.items():
        repeated += [name] if name in tensors else []
        array = value if spans_processes(value) else np.asarray(value)
        tensors[name] = (array, functools.partial(_gathered, array))
    if repeated:
        raise CheckpointError(
            f"{', '.join(repeated)}: two values for one tensor. Correct the name map or extra"
        )
    return tensors


def _gathered(value: Any) -> Callable[[], Any]:
    found = on_first_host(value)
    return lambda: found


def is_weights(name: str) -> bool:
    """Whether a file of a folder holds weights, or their index."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in WEIGHTS)


def copy_companions(source: pathlib.Path, target: pathlib.Path, dtypes: set[np.dtype[Any]]) -> None:
    """Copies configuration, tokenizer and licence.

    Args:
      source: the folder of a checkpoint.
      target: the folder of another one.
      dtypes: of its weights. A single one replaces that of the configuration.
    """
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    config = target / "config.json"
    if not config.is_file() or len(dtypes) != 1:
        return
    fields = read_json(config)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{source / 'config.json'} must hold one JSON object")
    for name in {"dtype", "torch_dtype"} & fields.keys():
        if fields[name] != (dtype := next(iter(dtypes)).name):
            fields[name] = dtype
            config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
