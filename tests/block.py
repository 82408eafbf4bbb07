"""A small transformer block, pre-norm, with a BatchNorm in its MLP, written once over how a norm is called and where arrays lie.

Axes of parameters and activations have logical names, which a `Layout` maps to those of a mesh.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jnorm
import training
from jnorm import linen as jnn
from jnorm import nnx as jnx

BATCH, LENGTH, WIDTH, HEADS, HEAD, HIDDEN = 8, 8, 16, 8, 4, 32
SIZES = {"embed": WIDTH, "heads": HEADS, "head": HEAD, "hidden": HIDDEN, "stream_norm": WIDTH, "head_norm": HEAD, "hidden_norm": HIDDEN}
KERNELS = {
    "query": ("embed", "heads", "head"),
    "key": ("embed", "heads", "head"),
    "value": ("embed", "heads", "head"),
    "out": ("heads", "head", "embed"),
    "up": ("embed", "hidden"),
    "down": ("hidden", "embed"),
}
# A bias of the second would do nothing: the batch norm takes it away again.
NORMS = {  # name -> (norm, axis of its parameters)
    "first": ("layer_norm", "stream_norm"),
    "query_norm": ("rms_norm", "head_norm"),
    "key_norm": ("rms_norm", "head_norm"),
    "second": ("add_layer_norm", "stream_norm"),
    "middle": ("batch_norm", "hidden_norm"),
    "last": ("add_rms_norm", "stream_norm"),
}
ACTIVATIONS = {
    "residual": ("batch", "length", "stream"),
    "heads": ("batch", None, "heads", None),
    "scores": ("batch", "heads", None, None),
    "hidden": ("batch", None, "hidden"),
}
BATCH_NORM = {"momentum": 0.9, "activation": "silu"}
AXES = {k: v for k, v in KERNELS.items()} | {
    name: {p: (axis,) for p in (("scale", "bias") if norm in ("layer_norm", "batch_norm") else ("scale",))}
    for name, (norm, axis) in NORMS.items()
}
STATS_AXES = {"middle": {"mean": ("hidden_norm",), "var": ("hidden_norm",)}}


def is_axes(v):
    return isinstance(v, tuple)


def numbers():
    """-> (params, stats), float32 values in float64."""
    rng = np.random.default_rng(0)

    def one(axes):
        shape = [SIZES[a] for a in axes]
        value = rng.normal(size=shape) * (0.3 if len(axes) > 1 else 0.2) + (0 if len(axes) > 1 else 0.8)
        return value.astype(np.float32).astype(np.float64)

    return jax.tree.map(one, AXES, is_leaf=is_axes), jax.tree.map(lambda a: abs(one(a)), STATS_AXES, is_leaf=is_axes)


def batches():
    rng = np.random.default_rng(1)

    def one(size, mean):
        return (rng.normal(size=(BATCH, LENGTH, WIDTH)) * size + mean).astype(np.float32).astype(np.float64)

    return [{"x": one(1.5, 1), "target": one(1, 0)} for _ in range(training.STEPS)]


# --- where arrays lie ---------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    shape: tuple[int, ...]
    names: tuple[str, ...]
    rules: tuple[tuple[str, Any], ...]

    def mesh(self, explicit):
        return jax.make_mesh(self.shape, self.names, axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * len(self.names))

    def spec(self, axes):
        return P(*(dict(self.rules).get(a) for a in axes))

    def specs(self, tree):
        return jax.tree.map(self.spec, tree, is_leaf=is_axes)

    def put(self, tree, axes, mesh):
        return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, self.specs(axes))


TENSOR = (("heads", "model"), ("hidden", "model"))
BOTH = ("model", "data")
LAYOUTS = {
    "data": Layout((8,), ("data",), (("batch", "data"),)),
    # Every parameter, its optimizer state, and the running statistics; a head of 4 is not divided by 8 devices.
    "fsdp": Layout((8,), ("data",), (("batch", "data"), ("embed", "data"), ("stream_norm", "data"), ("hidden_norm", "data"))),
    "tensor": Layout((8,), ("model",), (*TENSOR, ("stream", "model"), ("stream_norm", "model"), ("hidden_norm", "model"))),
    "sequence": Layout((2, 4), ("data", "model"), (("batch", "data"), *TENSOR, ("length", "model"), ("hidden_norm", "model"))),
    "fsdp and tensor": Layout(
        (2, 4),
        ("data", "model"),
        (
            ("batch", "data"), ("embed", "data"), *TENSOR, ("stream", "model"),
            ("stream_norm", BOTH), ("hidden_norm", BOTH), ("head_norm", "data"),
        ),
    ),
}  # fmt: skip


@contextlib.contextmanager
def on(layout, explicit):
    """The mesh, which is the current one where its axes are explicit."""
    mesh = layout.mesh(explicit)
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        yield mesh


class Place:
    """Where the results of matrix products go: here, anywhere."""

    def einsum(self, subscripts, a, b, at):
        return jnp.einsum(subscripts, a, b)

    def enter(self, h):
        """From where norms are to where kernels are."""
        return h

    def size(self, axis):
        """Of a parameter's axis, of what one sees of it here."""
        return SIZES[axis]


class OnMesh(Place):
    """Of a program that the compiler partitions: out_sharding on an explicit mesh, a constraint on an automatic one."""

    def __init__(self, layout, mesh, explicit):
        self.layout, self.mesh, self.explicit = layout, mesh, explicit

    def einsum(self, subscripts, a, b, at):
        spec = self.layout.spec(ACTIVATIONS[at])
        if self.explicit:
            return jnp.einsum(subscripts, a, b, out_sharding=spec)
        return lax.with_sharding_constraint(jnp.einsum(subscripts, a, b), NamedSharding(self.mesh, spec))


class Manual(Place):
    """Megatron's tensor parallelism by hand, inside shard_map: the residual stream is the same on all devices of "model" ("whole"), or
    split along the sequence or the features ("sequence", "features")."""

    def __init__(self, stream, layout):
        self.axis = {"sequence": 1, "features": 2}.get(stream)
        self.layout = layout

    def size(self, axis):
        return SIZES[axis] // lax.axis_size("model") if dict(self.layout.rules).get(axis) == "model" else SIZES[axis]

    def enter(self, h):
        return h if self.axis is None else lax.all_gather(h, "model", axis=self.axis, tiled=True)

    def einsum(self, subscripts, a, b, at):
        y = jnp.einsum(subscripts, a, b)
        if at != "residual":
            return y
        if self.axis is None:
            return lax.psum(y, "model")
        return lax.psum_scatter(y, "model", scatter_dimension=self.axis, tiled=True)


# --- the block ----------------------------------------------------------------------------------------------------------------


class Names(NamedTuple):
    """Axis names of the norms of the residual stream, and of the BatchNorm."""

    rows: Any = None
    batch: Any = None

    def of(self, name):
        axis = {"stream_norm": self.rows, "hidden_norm": self.batch, "head_norm": None}[NORMS[name][1]]
        return {} if axis is None else {"axis_name": axis}


def block(w, norm, x, place):
    """`w`: kernels by name; `norm(name, x[, residual])`."""
    h = place.enter(norm("first", x))
    q, k, v = (place.einsum("bsd,dhk->bshk", h, w[name], "heads") for name in ("query", "key", "value"))
    scores = place.einsum("bshk,bthk->bhst", norm("query_norm", q), norm("key_norm", k), "scores")
    mixed = place.einsum("bhst,bthk->bshk", jax.nn.softmax(scores / 2), v, "heads")
    h, x = norm("second", place.einsum("bshk,hkd->bsd", mixed, w["out"], "residual"), x)
    h = norm("middle", place.einsum("bsd,df->bsf", place.enter(h), w["up"], "hidden"))
    y, x = norm("last", place.einsum("bsf,fd->bsd", h, w["down"], "residual"), x)
    return y + x / 2


def by_plain(params, stats, x):
    """The reference: norms in plain jnp, nothing of what is tested."""
    new = {}

    def norm(name, x, residual=None):
        kind, p = NORMS[name][0], params[name]
        total = x if residual is None else x + residual
        axes = (0, 1) if kind == "batch_norm" else (x.ndim - 1,)
        mean = jnp.zeros((1,) * x.ndim, x.dtype) if "rms" in kind else total.mean(axes, keepdims=True)
        var = ((total - mean) ** 2).mean(axes, keepdims=True)
        full = (1,) * (x.ndim - 1) + (-1,)
        y = (total - mean) / jnp.sqrt(var + (1e-5 if kind == "batch_norm" else 1e-6)) * p["scale"].reshape(full)
        y = y + p["bias"].reshape(full) if "bias" in p else y
        if kind == "batch_norm":
            y = y / (1 + jnp.exp(-y))
            new[name] = {k: 0.9 * stats[name][k] + 0.1 * v.ravel() for k, v in (("mean", mean), ("var", var))}
        return y if residual is None else (y, total)

    y = block(params, norm, x, Place())
    return y, jax.tree.map(lax.stop_gradient, new)


def by_function(params, stats, x, place, names):
    new = {}

    def norm(name, *arrays):
        f, options = getattr(jnorm, NORMS[name][0]), names.of(name)
        if name not in stats:
            return f(*arrays, **params[name], **options)
        y, new[name] = f(*arrays, stats[name], **params[name], **BATCH_NORM, **options)
        return y

    return block(params, norm, x, place), new


CLASSES = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "add_layer_norm": "AddLayerNorm",
    "add_rms_norm": "AddRMSNorm",
    "batch_norm": "BatchNorm",
}


def unannotated(init, axes):
    return init


def initializers(api, annotate, name):
    """Of the parameters of a norm."""
    inits = {"scale": api.initializers.ones, "bias": api.initializers.zeros}
    return {f"{p}_init": annotate(inits[p], axes) for p, axes in AXES[name].items()}


class LinenBlock(nn.Module):
    place: Any = Place()
    names: Names = Names()
    annotate: Any = staticmethod(unannotated)

    @nn.compact
    def __call__(self, x):
        def norm(name, *arrays):
            kind = NORMS[name][0]
            options = {"name": name, **self.names.of(name), **initializers(nn, self.annotate, name)}
            options |= {"use_running_average": False, **BATCH_NORM} if kind == "batch_norm" else {}
            options |= {"use_bias": False} if kind == "add_layer_norm" else {}
            return getattr(jnn, CLASSES[kind])(param_dtype=x.dtype, **options)(*arrays)

        w = {
            name: self.param(name, self.annotate(nn.initializers.zeros, axes), [self.place.size(a) for a in axes], x.dtype)
            for name, axes in KERNELS.items()
        }
        return block(w, norm, x, self.place)


def by_linen(params, stats, x, place, names):
    y, updates = LinenBlock(place, names).apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
    return y, updates["batch_stats"]


class NnxBlock(nnx.Module):
    def __init__(self, place, names, annotate=unannotated, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.place = place
        for name, axes in KERNELS.items():
            init = annotate(nnx.initializers.zeros, axes)
            setattr(self, name, nnx.Param(init(rngs.params(), [place.size(a) for a in axes], dtype)))
        for name, (kind, axis) in NORMS.items():
            options = {**names.of(name), **initializers(nnx, annotate, name), **(BATCH_NORM if kind == "batch_norm" else {})}
            options |= {"use_bias": False} if kind == "add_layer_norm" else {}
            setattr(self, name, getattr(jnx, CLASSES[kind])(place.size(axis), param_dtype=dtype, rngs=rngs, **options))

    def __call__(self, x):
        w = {name: getattr(self, name)[...] for name in KERNELS}
        return block(w, lambda name, *arrays: getattr(self, name)(*arrays), x, self.place)


def by_nnx(params, stats, x, place, names):
    graphdef, *states = nnx.split(nnx.eval_shape(lambda: NnxBlock(place, names)), nnx.Param, nnx.BatchStat)
    # Both kinds of tree have their entries in the order of the names.
    filled = [jax.tree.unflatten(jax.tree.structure(s), jax.tree.leaves(v)) for s, v in zip(states, (params, stats), strict=True)]
    model = nnx.merge(graphdef, *filled)
    return model(x), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


APIS = {"function": by_function, "linen": by_linen, "nnx": by_nnx}


def in_api(api, place, names=Names()):  # noqa: B008
    return functools.partial(APIS[api], place=place, names=names)


@functools.cache
def reference(optimizer):
    """On one device in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, training.trained(by_plain, *numbers(), batches(), optimizer))
