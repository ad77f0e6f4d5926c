"""Writing the parameters of a Flax model as a Hugging Face checkpoint folder."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dora_jax.errors import CheckpointError
from dora_jax.huggingface.files import save_tensors, weight_files
from dora_jax.huggingface.parameters import Parameter, parameters_of
from dora_jax.names.name_map import NameMap

if TYPE_CHECKING:
    from os import PathLike

    from jax.typing import ArrayLike, DTypeLike

    from dora_jax.decomposition.axes import KernelAxes


# What a folder holds beside the weights that a copy with other weights needs.
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


def save_checkpoint(
    folder: str | PathLike[str],
    model: Any,
    names: NameMap,
    *,
    source: str | PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 2 * 10**9,
    axes: Mapping[str, KernelAxes] | None = None,
    extra: Mapping[str, ArrayLike] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model, or a tree of parameters, as a Hugging Face checkpoint folder.

    A new folder is written beside its place and then moved there, so that it is whole or absent.

    Args:
      folder: where to.
      model: an NNX model, or the parameters of a Linen one, merged if it was adapted.
      names: which tensor each parameter is.
      source: the folder of the pretrained checkpoint; its configuration and tokenizer are copied.
        The configuration's `dtype` is changed where other weights are written.
      dtype: of the tensors; by default each parameter's own.
      max_file_bytes: more are written as several files and an index. The host holds the tensors of
        one file.
      axes: as for `load_checkpoint`.
      extra: further tensors, by their names in the folder, such as a head's.
      overwrite: whether weights in the folder may be replaced. Other files in it stay.

    Raises:
      FileExistsError: the folder holds weights, and `overwrite` is not set.
      CheckpointError: a value is not finite, or a name is given twice; names the tensors.
      NameMapError: the map lacks a module.
      AdapterError: the model is adapted.
    """
    folder = pathlib.Path(folder)
    if source is not None and folder.resolve() == pathlib.Path(source).resolve():
        raise CheckpointError(f"{folder} is the source: write the checkpoint to another folder")
    if weight_files(folder) and not overwrite:
        raise FileExistsError(f"{folder} holds weights: pass overwrite=True, or another folder")
    tensors = _tensors(parameters_of(model, axes=axes), names, extra or {})
    dtypes = {name: np.dtype(dtype or like.dtype) for name, (like, _) in tensors.items()}
    sizes = {
        name: dtypes[name].itemsize * int(np.prod(like.shape))
        for name, (like, _) in tensors.items()
    }

    def make(name: str) -> np.ndarray[Any, Any]:
        with np.errstate(over="ignore"):  # infinity is refused below
            value = np.asarray(tensors[name][1]()).astype(dtypes[name], copy=False)
        if not np.isfinite(value).all():
            raise CheckpointError(f"{name} holds NaN or infinity as {value.dtype}: nothing written")
        return value

    with whole_folder(folder) as partial:
        save_tensors(partial, sizes, make, max_file_bytes)
        if source is not None:
            copy_companions(pathlib.Path(source), partial, set(dtypes.values()))


def _tensors(
    parameters: list[Parameter], names: NameMap, extra: Mapping[str, ArrayLike]
) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Returns shape and dtype of each tensor to be written, and what makes it, by name."""
    tensors: dict[str, tuple[Any, Callable[[], Any]]] = {}
    twice = []
    for parameter in parameters:
        parameter.check_concrete()
        for one in parameter.slices(names):
            like = jax.ShapeDtypeStruct(one.tensor_shape, parameter.dtype)

            def make(one: Any = one, parameter: Parameter = parameter) -> Any:
                return one.to_tensor(names, np.asarray(parameter.value[one.index]))

            twice += [one.tensor] if one.tensor in tensors else []
            tensors[one.tensor] = (like, make)
    for name, value in extra.items():
        twice += [name] if name in tensors else []
        array = np.asarray(value)
        tensors[name] = (array, functools.partial(np.asarray, array))
    if twice:
        raise CheckpointError(f"{', '.join(twice)}: two values for one tensor")
    return tensors


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder, whose files take their place when the block has ended well."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if not folder.exists():
            partial.replace(folder)
            return
        for file in weight_files(folder):
            file.unlink()
        for file in partial.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(source: pathlib.Path, target: pathlib.Path, dtypes: set[np.dtype[Any]]) -> None:
    """Copies what stands beside the weights: configuration, tokenizer, licence."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    config = target / "config.json"
    if not config.is_file() or len(dtypes) != 1:
        return
    fields = json.loads(config.read_text(encoding="utf-8"))
    for name in {"dtype", "torch_dtype"} & fields.keys():
        if fields[name] != (dtype := next(iter(dtypes)).name):
            fields[name] = dtype
            config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
