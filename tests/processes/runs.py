"""One small training run of either front end, whose arrays are cut over the devices of a mesh.

The devices may be of one process or of several: nothing here asks how many there are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from dora_jax import peft
from dora_jax.processes import spans_processes
from experiments.trainer.mesh import make_mesh, parse_mesh
from tests.support.models import LinenChain, NNXChain, chain_params, with_values

CONFIG = dora.DoRAConfig(rank=4, alpha=8.0)
WIDTHS = (32, 64, 16)
# The in axis of one kernel is cut, and the out axis of the other.
SPECS = {"layer_0": P("fsdp", "tensor"), "layer_1": P("tensor", "fsdp")}
EXAMPLE = (jax.ShapeDtypeStruct((1, WIDTHS[0]), np.float32),)
_NUMBERS = np.random.default_rng(0)
X, Y = (_NUMBERS.standard_normal((16, n)).astype(np.float32) for n in (32, 16))


def mesh_of(text: str) -> jax.sharding.Mesh:
    return make_mesh(parse_mesh(text))


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    """Returns a global array of a value that every process has."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def placed_params(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the parameters of the chain, cut over the mesh."""
    params = chain_params(WIDTHS)
    return {
        layer: {
            name: put(x, NamedSharding(mesh, SPECS[layer] if name == "kernel" else P()))
            for name, x in own.items()
        }
        for layer, own in params.items()
    }


class NNXRun:
    """An adapted NNX model and its optimiser."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        base = nnx.eval_shape(lambda: NNXChain(WIDTHS, rngs=nnx.Rngs(0)))
        nnx.update(base, with_values(base, placed_params(mesh)))
        self.base, self.mesh = base, mesh
        self.model = dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1), inputs=EXAMPLE)
        self.optimizer = nnx.Optimizer(self.model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)
        for node, kind in ((self.model, dora.DoRAParam), (self.optimizer, ...)):
            nnx.update(node, cut(nnx.state(node, kind), mesh))

    @property
    def adapters(self) -> Any:
        return dora.get_adapters(self.model)

    @adapters.setter
    def adapters(self, tree: Any) -> None:
        dora.set_adapters(self.model, tree)

    def double_the_base(self) -> None:
        for model in (self.base, self.model):
            nnx.update(model, jax.tree.map(lambda x: 2 * x, nnx.state(model, nnx.Param)))

    def step(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return _nnx_step(self.model, self.optimizer, x, y)

    def checkpoints(self, folder: str) -> dora.Checkpoints:
        return dora.Checkpoints(folder, CONFIG)

    def save_step(self, checkpoints: dora.Checkpoints, step: int) -> None:
        checkpoints.save(step, self.model, self.optimizer)

    def restore(self, checkpoints: dora.Checkpoints) -> int:
        restored = checkpoints.restore(self.model, self.optimizer)
        return restored.step if restored else 0

    def save(self, folder: str, **options: Any) -> None:
        dora.save(folder, self.model, CONFIG, **options)

    def load(self, folder: str) -> Any:
        return dora.get_adapters(dora.load(folder, self.base))

    def to_peft(self, folder: str, modules: Any) -> None:
        peft.save_pretrained(self.model, folder, modules)

    def from_peft(self, folder: str, modules: Any) -> Any:
        return dora.get_adapters(peft.load_pretrained(self.base, folder, modules))

    def check_base(self) -> None:
        dora.check_base(self.model)

    def merged(self) -> Any:
        return nnx.to_pure_dict(nnx.state(dora.merge(self.model), nnx.Param))

    def scales(self) -> Any:
        return dora.get_adapters(dora.precompute_scales(self.model))

    def disabled(self) -> Any:
        return dora.disabled_adapters(self.model)

    def summary(self) -> str:
        return str(dora.summary(self.model))


class LinenRun:
    """An adapted Linen model, its adapters and the state of their optimiser."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.base, self.params, self.mesh = LinenChain(WIDTHS), placed_params(mesh), mesh
        self.model, adapters = dora.apply_dora(
            self.base, CONFIG, params=self.params, rng=jax.random.key(1), inputs=EXAMPLE
        )
        self.tx = dora.dora_optimizer(1e-2)
        self.adapters = cut(adapters, mesh)
        self.state = cut(self.tx.init(self.adapters), mesh)
        self._step = jax.jit(self._loss_step)

    def _loss_step(self, params: Any, kept: Any, adapters: Any, state: Any, x: Any, y: Any) -> Any:
        def loss_fn(adapters: Any) -> jax.Array:
            variables = {"params": params, "dora": adapters, "dora_base": kept}
            return jnp.mean((self.model.apply(variables, x) - y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(adapters)
        updates, state = self.tx.update(grads, state, adapters)
        return loss, optax.apply_updates(adapters, updates), state

    def double_the_base(self) -> None:
        self.params = jax.tree.map(lambda x: 2 * x, self.params)

    def step(self, x: jax.Array, y: jax.Array) -> jax.Array:
        kept = self.model.base_collection
        loss, self.adapters, self.state = self._step(
            self.params, kept, self.adapters, self.state, x, y
        )
        return loss

    def checkpoints(self, folder: str) -> dora.Checkpoints:
        return dora.Checkpoints(folder, self.model)

    def save_step(self, checkpoints: dora.Checkpoints, step: int) -> None:
        checkpoints.save(step, self.adapters, self.state)

    def restore(self, checkpoints: dora.Checkpoints) -> int:
        restored = checkpoints.restore(self.adapters, self.state)
        if restored is None:
            return 0
        self.adapters, self.state, self.model = restored.adapters, restored.state, restored.model
        return restored.step

    def save(self, folder: str, **options: Any) -> None:
        dora.save(folder, self.model, self.adapters, **options)

    def load(self, folder: str) -> Any:
        return dora.load(folder, self.base, params=self.params, inputs=EXAMPLE)[1]

    def to_peft(self, folder: str, modules: Any) -> None:
        peft.save_pretrained(self.model, folder, modules, adapters=self.adapters)

    def from_peft(self, folder: str, modules: Any) -> Any:
        return peft.load_pretrained(self.base, folder, modules, params=self.params, inputs=EXAMPLE)[
            1
        ]

    def check_base(self) -> None:
        dora.check_base(self.model, self.params)

    def merged(self) -> Any:
        return dora.merge(self.model, self.params, self.adapters)

    def scales(self) -> Any:
        return dora.precompute_scales(self.model, self.params, self.adapters)

    def disabled(self) -> Any:
        return dora.disabled_adapters(self.model, self.adapters)

    def summary(self) -> str:
        return str(dora.summary(self.model, params=self.params))


RUNS = {"nnx": NNXRun, "linen": LinenRun}


def cut(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns a tree whose arrays are cut as the kernel of their layer is, moments included.

    What is not of a layer is on all devices. So a step changes no placement.
    """

    def place(path: Any, x: Any) -> jax.Array:
        keys = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
        layer = next((key for key in keys if key in SPECS), "")
        inner, outer = SPECS[layer] if layer else (None, None)
        specs = {"lora_a": P(inner), "lora_b": P(None, outer), "magnitude": P(outer)}
        spec = next((specs[key] for key in keys if key in specs), P())
        return put(whole(x), NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def whole(x: jax.Array) -> np.ndarray:
    """Returns an array that starts a run: each process computes it alike."""
    return multihost_utils.process_allgather(x, tiled=True) if spans_processes(x) else np.asarray(x)


def batch(mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    return put(X, rows), put(Y, rows)


@nnx.jit
def _nnx_step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    def loss_fn(model: Any) -> jax.Array:
        return jnp.mean((model(x) - y) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, dora.DoRAParam))(model)
    optimizer.update(model, grads)
    return loss
