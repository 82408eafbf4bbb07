"""Three steps of an optimizer on a model, and how far they may differ from the same steps in float64 on one device with plain norms.

A model is `apply(params, stats, x) -> (y, stats)`, whatever it is written with.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

STEPS = 3
# A step of these models is some 60 stages, forward and backward, each a sum of at most 64 terms and a dozen operations.
ROUNDINGS = STEPS * 60 * (64 + 16)
# Adam's divisor is well above what a gradient may be wrong by: where it is not, the sign of a rounding error moves a parameter.
OPTIMIZERS = {"adamw": optax.adamw(1e-2, eps=1e-2, weight_decay=1e-2), "sgd": optax.sgd(0.05, momentum=0.9)}


class Trained(NamedTuple):
    losses: Any
    params: Any
    stats: Any
    opt_state: Any


def step_of(apply, optimizer):
    """One step: (params, stats, opt_state, batch) -> the same after it, and the loss."""

    def step(params, stats, opt_state, batch):
        def loss(params):
            y, new = apply(params, stats, batch["x"])
            return jnp.mean((y - batch["target"]) ** 2), new

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        params, opt_state = moved(optimizer, params, gradients, opt_state)
        return params, stats, opt_state, value

    return step


def moved(optimizer, params, gradients, opt_state):
    with jax.numpy_dtype_promotion("standard"):  # what optax relies on
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def placed_state(optimizer, params, mesh):
    """The optimizer's state: all of it lies as the parameters do, and a count everywhere."""
    return jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, NamedSharding(mesh, PartitionSpec())), optimizer.init(params))


def repeated(step, params, stats, opt_state, batches):
    """Of a compiled step; a batch is one entry of each array."""
    losses = []
    for i in range(STEPS):
        params, stats, opt_state, value = step(params, stats, opt_state, batches[i])
        losses.append(value)
    return Trained(np.array(losses), params, stats, opt_state)


def trained(apply, params, stats, batches, optimizer):
    optimizer = OPTIMIZERS[optimizer]
    return repeated(jax.jit(step_of(apply, optimizer)), params, stats, optimizer.init(params), batches)


def cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def check(got, want, start, dtype):
    """Losses, and how far each parameter and running statistic has moved, whose largest entry is what the others are measured by.

    A term that is missing somewhere shows at order one.
    """
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(got.losses, want.losses, rtol=ROUNDINGS * eps, err_msg="losses")
    for name, before in zip(("params", "stats"), start, strict=True):
        after, right = getattr(got, name), getattr(want, name)
        assert jax.tree.structure(after) == jax.tree.structure(right)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(right)]
        for path, a, b, was in zip(paths, *map(jax.tree.leaves, (after, right, before)), strict=True):
            assert a.dtype == dtype, (path, a.dtype)
            b, was = np.asarray(b, np.float64), np.asarray(was, np.float64)
            moved = abs(b - was).max()
            assert moved > 1e-4, f"{path} did not move"
            allowed = ROUNDINGS * eps * moved + STEPS * eps * abs(b)
            error = abs(np.asarray(a, np.float64) - b)
            assert (error <= allowed).all(), f"{path}: error {error.max():.3g}, allowed {allowed.min():.3g}, moved {moved:.3g}"
