"""Reading a Hugging Face checkpoint folder into the parameters of a Flax model.

Parameters are filled one by one, a stacked one slice by slice, each in its own dtype and sharding.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from dora_jax.errors import CheckpointError
from dora_jax.huggingface.files import Folder, assign, open_folder
from dora_jax.huggingface.parameters import Parameter, parameters_of, replace_parameters
from dora_jax.huggingface.safetensors import FLOATS, StoredTensor
from dora_jax.names.name_map import NameMap

if TYPE_CHECKING:
    from os import PathLike

    from dora_jax.decomposition.axes import KernelAxes


M = TypeVar("M")
logger = logging.getLogger(__name__)
_LONG = 2**30  # bytes; what takes longer to read shows its progress


def load_checkpoint(
    folder: str | PathLike[str],
    model: M,
    names: NameMap,
    *,
    shardings: Any = None,
    axes: Mapping[str, KernelAxes] | None = None,
    rename: Callable[[str], str] | None = None,
    unused: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    progress: bool | None = None,
) -> M:
    """Returns a model, or a tree of parameters, filled from a Hugging Face checkpoint folder.

    Give a model of shapes (`nnx.eval_shape`, `jax.eval_shape`), so that nothing is initialised to
    be thrown away. Beside the parameters themselves, the host holds one of them at a time, and one
    tensor; each process reads what its own devices need.

    Args:
      folder: holds `model.safetensors`, or several files and `model.safetensors.index.json`, of any
        float dtype.
      model: an NNX model that is not adapted (its `nnx.Param` and `nnx.BatchStat` are filled), or
        the parameters of a Linen one. Each parameter keeps its dtype, and the sharding that its
        array or `jax.ShapeDtypeStruct` has.
      names: which tensor is which parameter.
      shardings: one `jax.sharding.Sharding` for all parameters, or a tree of them as that of the
        parameters (`nnx.get_named_sharding`), in place of the parameters' own.
      axes: of kernels by dotted path, as one layer has them, where in or out axes are several. An
        NNX model's are known.
      rename: gives a tensor of the folder the name that `names` has for it.
      unused: tensors that are not read: a regular expression for the whole name, and why.
      tied: names of tensors that are the same as another one: each may be missing, and must be
        equal if it is there and no parameter.
      progress: whether to show a bar; by default on a terminal, for more than 1 GB, if tqdm is
        installed.

    Raises:
      FileNotFoundError: there is no such folder, or no weights in it.
      CheckpointError: tensors are missing, unknown, of another shape, not of floating point, or not
        finite in the parameter's dtype; files are missing or truncated: names all of them. Or
        the weights are pickled.
      NameMapError: the map lacks a module.
      AdapterError: the model is adapted.

    Example:
      >>> import tempfile
      >>> from dora_jax.huggingface import save_checkpoint
      >>> from flax import nnx
      >>> names = NameMap({"up": "mlp.up_proj"})
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.up = nnx.Linear(4, 3, rngs=rngs)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_checkpoint(f"{folder}/mlp", Model(nnx.Rngs(0)), names)
      ...     abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
      ...     load_checkpoint(f"{folder}/mlp", abstract, names).up.kernel.shape
      (4, 3)
    """
    folder = pathlib.Path(folder)
    parameters = parameters_of(model, shardings=shardings, axes=axes)
    stored = open_folder(folder)
    wanted = {name for parameter in parameters for name in parameter.tensors(names)}
    found, problems = _match(stored, wanted, rename, unused or {}, tied or {})
    with _bar(found, progress) as advance:
        values = []
        for parameter in parameters:
            values.append(_fill(parameter, names, found, problems, advance))
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(
            f"{stored.weights} does not hold the parameters of this model:\n  {listing}"
        )
    return replace_parameters(model, values)


def _match(
    stored: Folder,
    wanted: set[str],
    rename: Callable[[str], str] | None,
    unused: Mapping[str, str],
    tied: Mapping[str, str],
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Finds the stored tensor of every wanted name.

    Returns:
      The tensors by name, and a line for every name without a tensor and tensor without a use.
    """
    rename = rename or (lambda key: key)
    found: dict[str, StoredTensor] = {}
    keys: dict[str, str] = {}
    problems = list(stored.problems)
    for key, tensor in stored.tensors.items():
        name = rename(key)
        if name in keys:
            problems.append(f"{key}: holds the same parameter as {keys[name]}. Delete one of them.")
        elif name in wanted or name in tied:
            keys[name], found[name] = key, tensor
        elif why := next((why for part, why in unused.items() if re.fullmatch(part, name)), None):
            logger.info("%s is not used: %s", key, why)
        else:
            problems.append(
                f"{key}: no parameter of the model. Correct its configuration (the number of "
                "layers?), or delete the tensor."
            )
    for name, other in tied.items():
        if name in wanted and other in found:
            found.setdefault(name, found[other])
        elif name in found and not (other in found and _equal(found.pop(name), found[other])):
            problems.append(
                f"{keys[name]}: differs from {other}, to which the model ties it. Do not tie them "
                "(tie_word_embeddings)."
            )
    problems += [
        f"{name}: missing. Fetch the file again, or correct the model's configuration."
        for name in sorted(wanted - found.keys() - set(map(rename, stored.lost)))
    ]
    return found, problems


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or not {one.dtype, other.dtype} <= FLOATS.keys():
        return False
    return np.array_equal(one.read(), other.read())


def _fill(
    parameter: Parameter,
    names: NameMap,
    found: Mapping[str, StoredTensor],
    problems: list[str],
    advance: Callable[[int], None],
) -> jax.Array | None:
    """Reads a parameter; None if something is wrong, which is added to `problems`."""
    regions = parameter.regions()
    buffers = {key: aligned_empty(region.shape, parameter.dtype) for key, region in regions.items()}
    wrong = []
    for one in parameter.slices(names):
        places = {key: region.slice_of(one.index) for key, region in regions.items()}
        tensor = found.get(one.tensor)
        if tensor is None:
            wrong.append("")  # named by _match
        elif tensor.dtype not in FLOATS:
            wrong.append(
                f"{one.tensor}: dtype {tensor.dtype}; only floating point is read. Save the model "
                "unquantised."
            )
        elif tensor.shape != one.tensor_shape:
            wrong.append(
                f"{one.tensor}: shape {tensor.shape}, but the model's configuration makes it "
                f"{one.tensor_shape}. Correct its sizes."
            )
        elif any(place is not None for place in places.values()):
            value = one.from_tensor(names, tensor.read())
            for key, place in places.items():
                if place is not None and not _assign(buffers[key], place[0], value[place[1]]):
                    wrong.append(
                        f"{one.tensor}: NaN or infinity as {np.dtype(parameter.dtype)}. Fetch the "
                        "file again, or take a wider param_dtype."
                    )
                    break
            advance(tensor.nbytes)
    problems += [line for line in wrong if line]
    return None if wrong or problems else parameter.place(buffers)


def _assign(buffer: Any, where: tuple[Any, ...], value: Any) -> bool:
    """Casts a value into a part of a buffer; returns whether it is finite there."""
    part = buffer[(*where, ...)]
    with np.errstate(over="ignore", invalid="ignore"):
        assign(part, value)
        return bool(np.isfinite(part).all())


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Returns an empty array that JAX on a CPU takes over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def _bar(
    found: Mapping[str, StoredTensor], progress: bool | None
) -> Iterator[Callable[[int], None]]:
    """Gives a function that moves a progress bar on by some bytes."""
    total = sum(tensor.nbytes for tensor in found.values())
    if not (total > _LONG if progress is None else progress):
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise CheckpointError(
                "a progress bar is drawn by tqdm: pip install 'dora-jax[huggingface]'"
            ) from error
        yield lambda count: None
        return
    # Of itself the bar is shown on a terminal only, so that logs stay readable.
    shown = None if progress is None else not progress
    with tqdm(total=total, unit="B", unit_scale=True, desc="Reading", disable=shown) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
