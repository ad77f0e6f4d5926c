"""Reading a Hugging Face checkpoint folder into the parameters of a Flax model.

Parameters are filled one by one, in their own dtype and sharding; a stacked one slice by slice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dora_jax.decomposition.quantized import QuantizedKernel
from dora_jax.disk import given_folder, read_in_one_piece
from dora_jax.errors import CheckpointError
from dora_jax.huggingface.files import Folder, assign, open_folder
from dora_jax.huggingface.parameters import Parameter, Slice, parameters_of, replace_parameters
from dora_jax.huggingface.quantized import fill_quantized, not_finite
from dora_jax.huggingface.safetensors import FLOATS, StoredTensor
from dora_jax.names.name_map import NameMap

if TYPE_CHECKING:
    import pathlib
    from os import PathLike

    from dora_jax.decomposition.axes import KernelAxes


M = TypeVar("M")
logger = logging.getLogger(__name__)
_LONG = 2**30  # bytes, above which a progress bar is shown


@dataclasses.dataclass(frozen=True)
class TensorRules:
    r"""How the tensors of a folder differ from those that a model's name map expects.

    Attributes:
      rename: gives a tensor of the folder the name that the name map has for it.
      unused: tensors that are not read: a regular expression for the whole name, and the reason.
      tied: tensors that equal another one, by name. Each may be missing. One that is there and no
        parameter must be equal.

    Example:
      >>> rules = TensorRules(unused={r"pooler\..*": "hidden states are pooled in another way"})
    """

    rename: Callable[[str], str] = str
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load_checkpoint(
    folder: str | PathLike[str],
    model: M,
    names: NameMap,
    *,
    rules: TensorRules | None = None,
    shardings: Any = None,
    axes: Mapping[str, KernelAxes] | None = None,
    progress: bool | None = None,
) -> M:
    """Returns a model, or a tree of parameters, filled from a Hugging Face checkpoint folder.

    Give an abstract model (`nnx.eval_shape`), so that no array is initialised in vain. Besides the
    parameters read so far, the host holds one more and one tensor. Each process reads only the
    parts for its own devices.

    Args:
      folder: holds `model.safetensors`, or several files and `model.safetensors.index.json`, of any
        float dtype.
      model: an NNX model that is not adapted (its `nnx.Param` and `nnx.BatchStat` are filled), or
        the parameters of a Linen one. Each parameter keeps its dtype, and the sharding of its array
        or `jax.ShapeDtypeStruct`. Kernels that are quantised in it (`dora.quantize` of an abstract
        model) are quantised as they are read, one tensor at a time.
      names: which tensor each parameter is.
      rules: how the folder's tensors differ from those of `names`.
      shardings: one `jax.sharding.Sharding` for all parameters, or a tree of them in the structure
        of the parameters (`nnx.get_named_sharding`). Replaces the parameters' own.
      axes: the axes of kernels with several in or out axes, without stack axes, by dotted path.
        Those of an NNX model are known.
      progress: whether to show a bar. By default it is shown on a terminal, for more than 1 GB, if
        tqdm is installed.

    Raises:
      MissingFileError: there is no such folder, or no weights in it.
      CheckpointError: tensors are missing, unknown, of another shape, not of floating point, or not
        finite in the parameter's dtype; or files are missing or truncated. Names all of them. Also
        if the weights are pickled.
      NameMapError: the map lacks a module.
      AdapterError: the model is adapted.

    Example:
      >>> import tempfile
      >>> from dora_jax.huggingface import save_checkpoint
      >>> names = NameMap({"up": "mlp.up_proj"})
      >>> params = {"up": {"kernel": np.ones((4, 3), np.float32)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_checkpoint(f"{folder}/mlp", params, names)
      ...     load_checkpoint(f"{folder}/mlp", params, names)["up"]["kernel"].shape
      (4, 3)
    """
    parameters = parameters_of(model, shardings=shardings, axes=axes)
    path = given_folder(folder)

    def read() -> list[Any]:
        return _read(path, parameters, names, rules or TensorRules(), progress)

    return replace_parameters(model, read_in_one_piece(path, read))


def _read(
    path: pathlib.Path,
    parameters: Sequence[Parameter],
    names: NameMap,
    rules: TensorRules,
    progress: bool | None,
) -> list[Any]:
    """Returns the values of parameters, in their order."""
    stored = open_folder(path)
    wanted = {name for parameter in parameters for name in parameter.tensors(names)}
    found, problems = _match(stored, wanted, rules)
    with _bar(found, progress) as advance:
        values = [_fill(parameter, names, found, problems, advance) for parameter in parameters]
    if problems:
        listing = "\n  ".join(("", *problems))
        raise CheckpointError(f"{stored.weights} does not hold this model's parameters:{listing}")
    return values


def _match(
    stored: Folder, wanted: set[str], rules: TensorRules
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Finds the stored tensor of every wanted name.

    Returns:
      The tensors by name, and a line for every name without a tensor and every unknown tensor.
    """
    found: dict[str, StoredTensor] = {}
    keys: dict[str, str] = {}
    problems = list(stored.problems)
    for key, tensor in stored.tensors.items():
        name = rules.rename(key)
        if name in keys:
            problems.append(f"{key}: holds the same parameter as {keys[name]}. Delete one of them.")
        elif name in wanted or name in rules.tied:
            keys[name], found[name] = key, tensor
        elif reason := _reason_unused(name, rules):
            logger.info("%s is not used: %s", key, reason)
        else:
            problems.append(
                f"{key}: no parameter of the model. Correct its configuration (the number of "
                "layers?), or delete the tensor."
            )
    for name, other in rules.tied.items():
        if name in wanted and other in found:
            found.setdefault(name, found[other])
        elif name in found and not (other in found and _equal(found.pop(name), found[other])):
            problems.append(
                f"{keys[name]}: differs from {other}, to which the model ties it. Do not tie them "
                "(tie_word_embeddings)."
            )
    problems += [
        f"{name}: missing. Fetch the file again, or correct the model's configuration."
        for name in sorted(wanted - found.keys() - set(map(rules.rename, stored.unreadable)))
    ]
    return found, problems


def _reason_unused(name: str, rules: TensorRules) -> str | None:
    matching = (reason for part, reason in rules.unused.items() if re.fullmatch(part, name))
    return next(matching, None)


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
) -> Any:
    """Reads a parameter. Returns None if there is a problem, which is added to `problems`."""
    slices = list(parameter.slices(names))
    wrong = [line for one in slices if (line := _difference(one, found)) is not None]
    if wrong:  # nothing is allocated for a size that the file does not have
        problems += [line for line in wrong if line]
        return None
    if isinstance(parameter.value, QuantizedKernel):
        return fill_quantized(parameter, slices, names, found, problems, advance)
    regions = parameter.regions()
    buffers = {key: aligned_empty(region.shape, parameter.dtype) for key, region in regions.items()}
    for one in slices:
        places = {key: region.slice_of(one.index) for key, region in regions.items()}
        tensor = found[one.tensor]
        if any(place is not None for place in places.values()):
            value = one.from_tensor(names, tensor.read())
            for key, place in places.items():
                if place is not None and not _assign(buffers[key], place[0], value[place[1]]):
                    wrong.append(not_finite(one, parameter))
                    break
            advance(tensor.nbytes)
    problems += wrong
    return None if problems else parameter.place(buffers)


def _difference(one: Slice, found: Mapping[str, StoredTensor]) -> str | None:
    """Returns why a tensor cannot be read into its slice; "" if it is missing, which is named."""
    tensor = found.get(one.tensor)
    if tensor is None:
        return ""
    if tensor.dtype not in FLOATS:
        return (
            f"{one.tensor}: dtype {tensor.dtype}; only floating point is read. Save the model "
            "unquantised."
        )
    if tensor.shape != one.tensor_shape:
        return (
            f"{one.tensor}: shape {tensor.shape}, but the model's configuration makes it "
            f"{one.tensor_shape}. Correct its sizes."
        )
    return None


def _assign(buffer: Any, where: tuple[Any, ...], value: Any) -> bool:
    """Casts a value into a part of a buffer. Returns whether the result is finite."""
    part = buffer[(*where, ...)]
    with np.errstate(over="ignore", invalid="ignore"):
        assign(part, value)
        return bool(np.isfinite(part).all())


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Returns an empty array that JAX on a CPU uses without a copy, for its alignment."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def _bar(
    found: Mapping[str, StoredTensor], progress: bool | None
) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a progress bar by a number of bytes."""
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
    # tqdm's None shows the bar on a terminal only, so that logs stay readable.
    shown = None if progress is None else not progress
    with tqdm(total=total, unit="B", unit_scale=True, desc="Reading", disable=shown) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
