"""A small convolutional network with BatchNorm and GroupNorm, whose images are split by batch and by height, trains as on one device.

Compared with plain norms in float64 on one device.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jnorm
import training
from jnorm import linen as jnn
from jnorm import nnx as jnx
from test_collectives import collectives

NAMES = ("data", "height")
IMAGES, KERNEL = P("data", "height"), ("NHWC", "HWIO", "NHWC")
BATCH_NORM = {"momentum": 0.9, "activation": "silu"}
GROUPS = 4
SLOW = [pytest.mark.slow]


def numbers():
    """-> (params, stats, batches), float32 values in float64."""
    rng = np.random.default_rng(0)

    def one(*shape, size=0.3, mean=0.0):
        return (rng.normal(size=shape) * size + mean).astype(np.float32).astype(np.float64)

    affine = lambda: {"scale": one(8, mean=0.8), "bias": one(8)}  # noqa: E731
    params = {"first": one(3, 3, 3, 8), "batch": affine(), "second": one(3, 3, 8, 8), "group": affine(), "head": one(8, 4)}
    stats = {"batch": {"mean": one(8), "var": abs(one(8, mean=1))}}
    batches = [{"x": one(8, 8, 8, 3, size=1.5, mean=1), "target": one(8, 4, size=1)} for _ in range(training.STEPS)]
    return params, stats, batches


def convolve(x, kernel, padding="SAME"):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=KERNEL)


def convolve_explicitly(x, kernel):
    """Convolutions of images that are split along their height have no types: they are left to the compiler."""
    return jax.sharding.auto_axes(convolve, out_sharding=IMAGES)(x, kernel)


def convolve_by_hand(x, kernel):
    """One device's rows, with the rows beside them from its neighbors, and zeros beside the first and the last."""
    n = lax.axis_size("height")
    above = lax.ppermute(x[:, -1:], "height", [(i, i + 1) for i in range(n - 1)])
    below = lax.ppermute(x[:, :1], "height", [(i + 1, i) for i in range(n - 1)])
    return convolve(jnp.concatenate([above, x, below], 1), kernel, ((0, 0), (1, 1)))


def mean_by_hand(h):
    return lax.pmean(h.mean((1, 2)), "height")


def network(w, norm, x, convolve, mean):
    h = norm("batch", convolve(x, w["first"]))
    h = h + norm("group", convolve(h, w["second"]))
    return mean(h * jax.nn.sigmoid(h)) @ w["head"]


def plain_norm(x, p, axes, epsilon):
    """-> (y, mean, var); x has the axes of groups beside its own where those are."""
    mean = x.mean(axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    z = ((x - mean) / jnp.sqrt(var + epsilon)).reshape(*x.shape[:3], 8)
    return z * p["scale"].reshape(1, 1, 1, 8) + p["bias"].reshape(1, 1, 1, 8), mean, var


def by_plain(params, stats, x):
    new = {}

    def norm(name, x):
        if name == "group":
            return plain_norm(x.reshape(*x.shape[:3], GROUPS, -1), params[name], (1, 2, 4), 1e-6)[0]
        y, mean, var = plain_norm(x, params[name], (0, 1, 2), 1e-5)
        new[name] = {k: 0.9 * stats[name][k] + 0.1 * lax.stop_gradient(v.ravel()) for k, v in (("mean", mean), ("var", var))}
        return y / (1 + jnp.exp(-y))

    return network(params, norm, x, convolve, lambda h: h.mean((1, 2))), new


def by_function(params, stats, x, names, **parts):
    new = {}

    def norm(name, x):
        if name == "group":
            return jnorm.group_norm(x, **params[name], num_groups=GROUPS, axis_name=names.get("group"))
        y, new[name] = jnorm.batch_norm(x, stats[name], **params[name], **BATCH_NORM, axis_name=names.get("batch"))
        return y

    return network(params, norm, x, **parts), new


class LinenNetwork(nn.Module):
    names: dict
    parts: dict

    @nn.compact
    def __call__(self, x):
        batch = jnn.BatchNorm(False, **BATCH_NORM, axis_name=self.names.get("batch"), name="batch")
        group = jnn.GroupNorm(GROUPS, axis_name=self.names.get("group"), name="group")
        shapes = {"first": (3, 3, 3, 8), "second": (3, 3, 8, 8), "head": (8, 4)}
        w = {name: self.param(name, nn.initializers.zeros, shape) for name, shape in shapes.items()}
        return network(w, lambda name, x: {"batch": batch, "group": group}[name](x), x, **self.parts)


def by_linen(params, stats, x, names, **parts):
    y, updates = LinenNetwork(names, parts).apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def by_nnx(params, stats, x, names, **parts):
    batch = jnx.BatchNorm(8, **BATCH_NORM, axis_name=names.get("batch"), rngs=nnx.Rngs(0))
    group = jnx.GroupNorm(8, GROUPS, axis_name=names.get("group"), rngs=nnx.Rngs(0))
    for name, layer in (("batch", batch), ("group", group)):
        for key, value in params[name].items():
            setattr(layer, key, nnx.Param(value))
    for key, value in stats["batch"].items():
        setattr(batch, key, nnx.BatchStat(value))
    y = network(params, lambda name, x: {"batch": batch, "group": group}[name](x), x, **parts)
    return y, {"batch": {key: getattr(batch, key)[...] for key in stats["batch"]}}


APIS = {"function": by_function, "linen": by_linen, "nnx": by_nnx}


@functools.cache
def reference():
    params, stats, batches = numbers()
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, training.trained(by_plain, params, stats, batches, "sgd"))


def mean_of_images(h):
    return h.mean((1, 2))


def automatic(api, mesh):
    return functools.partial(APIS[api], names={}, convolve=convolve, mean=mean_of_images)


def explicit(api, mesh):
    return functools.partial(APIS[api], names={}, convolve=convolve_explicitly, mean=mean_of_images)


def by_hand(api, mesh, check_vma=True):
    names = {"batch": NAMES, "group": "height"}
    local = functools.partial(APIS[api], names=names, convolve=convolve_by_hand, mean=mean_by_hand)
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), IMAGES), out_specs=(P("data"), P()), check_vma=check_vma)


MODES = {"auto": automatic, "explicit": explicit, "shard_map": by_hand, "unchecked": functools.partial(by_hand, check_vma=False)}
ROWS = [("auto", "linen"), ("explicit", "function"), ("shard_map", "nnx"), ("unchecked", "function")]
REST = [(mode, api) for mode in MODES for api in APIS if (mode, api) not in ROWS]


@contextlib.contextmanager
def placed(mode, dtype):
    """-> (mesh, params, stats, batches)."""
    mesh = jax.make_mesh((4, 2), NAMES, axis_types=(AxisType.Explicit if mode == "explicit" else AxisType.Auto,) * 2)
    with jax.set_mesh(mesh) if mode == "explicit" else contextlib.nullcontext():
        params, stats, batches = (training.cast(v, dtype) for v in numbers())
        where = {"x": IMAGES, "target": P("data")}
        batches = [{k: jax.device_put(v, NamedSharding(mesh, where[k])) for k, v in batch.items()} for batch in batches]
        yield mesh, *jax.device_put((params, stats), NamedSharding(mesh, P())), batches


@pytest.mark.parametrize(("mode", "api"), ROWS + [pytest.param(*row, marks=SLOW) for row in REST])
def test_training(mode, api, x64):
    """What travels: rows of neighbors, statistics, gradients; no image, which would be two shares of an activation at least."""
    with placed(mode, "float64") as (mesh, params, stats, batches):
        optimizer = training.OPTIMIZERS["sgd"]
        state = params, stats, training.placed_state(optimizer, params, mesh)
        there = jax.tree.map(lambda a: a.sharding, state)
        step = jax.jit(training.step_of(MODES[mode](api, mesh), optimizer), out_shardings=(*there, None))
        step = step.lower(*state, batches[0]).compile()
        got = training.repeated(step, *state, batches)
        training.check(got, reference(), numbers()[:2], "float64")
    sent, largest_kernel, two_shares = collectives(step), 3 * 3 * 8 * 8, 8 * 8 * 8 * 8 // 4
    assert largest_kernel < two_shares and all(size <= largest_kernel for _, size in sent), sent
