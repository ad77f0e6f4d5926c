"""How a traced call uses stored kernels: which layers run on them, and what else reads them.

An adapter belongs to the stored kernel, and is merged into it. Some models compute a layer's kernel
anew in each call (`nn.WeightNorm`, `nn.map_variables`), or compute with it outside of the layer (a
head tied to an embedding). There the adapted model and the merged one would not be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Var

T = TypeVar("T")
_PREFIX = "dora_kernel:"

# Primitives that select, lay out or cast, but compute nothing.
_TRANSPARENT = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "device_put",
    "dynamic_slice",
    "gather",
    "name",
    "optimization_barrier",
    "reshape",
    "sharding_constraint",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
}


class Uses(NamedTuple):
    """How a traced call uses stored kernels, by label.

    Attributes:
      computed: labels of layers that run on something else than (a slice of) their stored kernel.
      read: labels of kernels that something else than a tagged layer computes with, or that the
        call returns.
    """

    computed: set[str]
    read: set[str]


def tag_kernel(kernel: T, label: str) -> T:
    """Returns a kernel, tagged in the traced program as the one that a layer sees."""
    return checkpoint_name(kernel, _PREFIX + label)


def trace_call(function: Callable[..., Any], arrays: Any, arguments: Any) -> Jaxpr:
    """Returns the program of `function(arrays, arguments)`, traced and not run.

    Its inputs are the leaves of `arrays`, then the arrays among the leaves of `arguments`. Whatever
    else is there (True, a number, a name) is static, as it is where it is written into the call.
    """
    leaves, structure = jax.tree.flatten(arguments)
    traced = [
        hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic)
        for leaf in leaves
    ]

    def run(arrays: Any, given: list[Any]) -> Any:
        rest = iter(given)
        filled = [next(rest) if is_array else x for is_array, x in zip(traced, leaves, strict=True)]
        return function(arrays, jax.tree.unflatten(structure, filled))

    given = [leaf for is_array, leaf in zip(traced, leaves, strict=True) if is_array]
    return jax.make_jaxpr(run)(arrays, given).jaxpr


def kernel_uses(jaxpr: Jaxpr, labels: Mapping[Var, str]) -> Uses:
    """Returns how a traced call with tags uses those of its inputs that are stored kernels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def call(w, x):
      ...     w_of_layer = tag_kernel(w, "stored")
      ...     w_of_other = tag_kernel(2 * w, "computed")
      ...     return x @ w_of_layer
      >>> jaxpr = jax.make_jaxpr(call)(jnp.ones((3, 2)), jnp.ones(3)).jaxpr
      >>> kernel_uses(jaxpr, {jaxpr.invars[0]: "stored"})
      Uses(computed={'computed'}, read={'stored'})
    """
    uses = Uses(set(), set())
    uses.read.update(label for label in _collect(jaxpr, labels, uses) if label)
    return uses


def _collect(jaxpr: Jaxpr, labels: Mapping[Var, str], uses: Uses) -> list[str | None]:
    """Adds the uses of labelled variables, and returns the labels of what the jaxpr returns."""
    labels = dict(labels)
    for eqn in jaxpr.eqns:
        known = _labels_of(eqn.invars, labels)
        name, inner_jaxprs = eqn.primitive.name, list(_inner_jaxprs(eqn.params))
        for inner in inner_jaxprs:
            # In scan and cond the inner jaxpr's inputs are the trailing operands.
            if name == "while":
                inputs = _while_inputs(eqn.params, inner, known)
            else:
                inputs = list(zip(reversed(inner.invars), reversed(known), strict=False))
            returned = _collect(inner, {v: label for v, label in inputs if label}, uses)
            if len(returned) == len(eqn.outvars):
                labels |= _labelled(eqn.outvars, returned)
        if name == "name" and eqn.params["name"].startswith(_PREFIX):
            tag = eqn.params["name"].removeprefix(_PREFIX)
            uses.computed.update({tag} - {known[0]})
        elif name in _TRANSPARENT:
            labels |= _labelled(eqn.outvars, known)
        elif not inner_jaxprs:
            uses.read.update(label for label in known if label)
    return _labels_of(jaxpr.outvars, labels)


def _labels_of(atoms: Iterable[Any], labels: Mapping[Var, str]) -> list[str | None]:
    return [labels.get(atom) if isinstance(atom, Var) else None for atom in atoms]


def _labelled(variables: Iterable[Var], found: Iterable[str | None]) -> dict[Var, str]:
    """Returns the labels that variables take over; an index of a slice, say, has no variable."""
    return {v: label for v, label in zip(variables, found, strict=False) if label}


def _while_inputs(
    params: Mapping[str, Any], inner: Jaxpr, known: list[str | None]
) -> list[tuple[Var, str | None]]:
    """The equation's inputs are the constants of condition and body, then the carry."""
    first, second = params["cond_nconsts"], params["body_nconsts"]
    is_body = inner is params["body_jaxpr"].jaxpr
    own = known[first : first + second] if is_body else known[:first]
    return list(zip(inner.invars, own + known[first + second :], strict=False))


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if isinstance(item, Jaxpr):
                yield item
