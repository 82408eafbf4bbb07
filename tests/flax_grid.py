"""Flax's options as a grid: covers and samples of it, the modules of both libraries for a choice, and the rounding of Flax's arithmetic."""

import contextlib
import functools
import itertools
import warnings

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import jnorm.linen
import jnorm.nnx
import oracles

SHARDS, SHAPE = 4, (2, 3, 4, 6)
MODULES = {"linen": (flax.linen, jnorm.linen), "nnx": (nnx, jnorm.nnx)}
NORMS = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
DEFAULT_EPSILON = {"BatchNorm": 1e-5}
FLOATS = ["float32", "bfloat16", "float16"]


# Nearly all of the time is compilation, and hundreds of programs run once.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


@contextlib.contextmanager
def lenient():
    """Flax relies on implicit promotion, and its NNX classes on implicit casts to what they overwrite."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "scatter inputs have incompatible types", FutureWarning)
        yield


def identity(args, dtype=None):
    return args


# --- the grid ---------------------------------------------------------------------------------------------------------------

# Each option's values. The first list is that of the cover; the slow sample also draws from the second.
SHARED = {
    "x": (["float32", "bfloat16", "int32"], ["float16"]),
    "dtype": ([None, "float32", "bfloat16"], ["float16"]),
    "param_dtype": (["float32", "bfloat16"], ["float16"]),
    "use_scale": ([True, False], []),
    "use_bias": ([True, False], []),
    "use_fast_variance": ([True, False], []),
    "epsilon": ([None, 1e-2], []),
    "mask": ([False, True], []),
    "axis_name": ([None, "shards"], []),
}
AVERAGE = [(where, value) for where in ("constructor", "call") for value in (False, True)]
CHANNELS = ([-1, [1, -1], (3, -1)], [1, (1,), (-1, -3)])
ROW_AXES = {"reduction_axes": ([-1, (3, -1, 1), [1, -2]], [1, (-2, -1)]), "feature_axes": ([-1, [1, -1], (3, -1)], [1, (-1, -2)])}
OWN = {
    "BatchNorm": {"average": (AVERAGE, []), "axis": CHANNELS, "momentum": ([None, 0.9], [0.0])},
    "LayerNorm": ROW_AXES,
    "RMSNorm": ROW_AXES,
    "GroupNorm": {
        "groups": ([{"num_groups": 3}, {"num_groups": None, "group_size": 3}], [{"num_groups": 6}, {"num_groups": 1}]),
        "reduction_axes": ([None, [-1, 1, 2, 1, 3], (-1,)], [(1, 3), (1, 2, 3), (-2, -1)]),
    },
    "InstanceNorm": {"feature_axes": CHANNELS},
}
# What Flax's NNX classes take, and get right (test_where_flax_errs.py).
NNX = {"BatchNorm": {"axis": ([-1, (1,), (3, -1)], [1])}, "GroupNorm": {"reduction_axes": ([None, (-1, 1, 2, 1, 3)], [(1, 2, 3)])}}


def options_of(api, name, full=False):
    options = SHARED | OWN[name]
    if name == "RMSNorm":
        options = {k: v for k, v in options.items() if k != "use_bias"}
    if api == "linen":
        options = options | {"force_float32_reductions": ([True, False], [])}
    else:
        options = options | NNX.get(name, {}) | {"promote_dtype": ([None, identity], [])}
    return {k: first + second * full for k, (first, second) in options.items()}


def pairwise(options, seed=0, candidates=12):
    """Choices such that each two values of each two options meet: greedily the best of some random ones, each made to hold a pair yet
    missing."""
    rng, names = np.random.default_rng(seed), list(options)

    def pairs(choice):
        return set(itertools.combinations(enumerate(choice), 2))

    missing = {p for a, b in itertools.combinations(range(len(names)), 2) for p in _pairs_of(options, names, a, b)}
    while missing:
        fixed = min(missing)
        tried = [_drawn(options, rng, dict(fixed)) for _ in range(candidates)]
        best = max(tried, key=lambda choice: len(pairs(choice) & missing))
        missing -= pairs(best)
        yield {name: options[name][i] for name, i in zip(names, best, strict=True)}


def _pairs_of(options, names, a, b):
    return (((a, i), (b, j)) for i in range(len(options[names[a]])) for j in range(len(options[names[b]])))


def _drawn(options, rng, fixed=()):
    return tuple(fixed[i] if i in fixed else int(rng.integers(len(values))) for i, values in enumerate(options.values()))


def sample(options, number, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        yield {name: options[name][i] for name, i in zip(options, _drawn(options, rng), strict=True)}


# --- inputs -----------------------------------------------------------------------------------------------------------------


def axes_of(axes):
    return tuple(sorted({a % len(SHAPE) for a in (axes if isinstance(axes, list | tuple) else (axes,))}))


def sets_of(name, row):
    """The sets of (shards, *shape): those of an x, merged over the shards of a group where there is an axis name."""
    ndim, channels = len(SHAPE), SHAPE[-1]
    if name == "BatchNorm":
        kept = {a: 1 for a in axes_of(row["axis"])}
    elif name == "InstanceNorm":
        kept = {a: 1 for a in {0, *axes_of(row["feature_axes"])}}
    elif name == "GroupNorm":
        size = row["groups"].get("group_size") or channels // row["groups"]["num_groups"]
        reduced = axes_of((1, 2, 3) if row["reduction_axes"] is None else row["reduction_axes"])
        kept = {a: 1 for a in range(ndim) if a not in reduced} | {ndim - 1: size}
    else:
        kept = {a: 1 for a in range(ndim) if a not in axes_of(row["reduction_axes"])}
    ids = oracles.sets(SHAPE, dict(sorted(kept.items())))
    shards = SHARDS if row["axis_name"] else 1
    of_shard = np.zeros(shards, int)
    for number, members in enumerate(row.get("axis_index_groups", [])):
        of_shard[list(members)] = number
    return ids + (ids.max() + 1) * of_shard.reshape(shards, 1, 1, 1, 1)


def features_of(name, row):
    return axes_of({"BatchNorm": row.get("axis"), "GroupNorm": -1}.get(name, row.get("feature_axes")))


def inputs(name, row, ids, seed=0):
    """-> x (shards, *SHAPE), mask, and the variables {"scale", "bias", "mean", "var"} of the features' shape."""
    rng, kind = np.random.default_rng(seed), np.dtype(row["x"])
    if row["x"] == "int32":  # all of a shard different, so that no variance is 0
        size = ids[0].size
        x = np.stack([rng.permutation(size) - size // 3 for _ in ids]).reshape(ids.shape).astype(kind)
    else:
        x = (rng.normal(size=ids.shape) * 1.5 + 2).astype(kind)
    mask = None
    if row["mask"]:
        mask = rng.uniform(size=SHAPE) < 0.67
        mask |= (oracles.total(mask, ids[0]) < 2)[ids[0]]  # Flax's statistics of nothing are not a number
        mask = np.broadcast_to(mask, ids.shape).copy()  # and those of shards that count differently are wrong
    shape, kept = tuple(SHAPE[i] for i in features_of(name, row)), np.dtype(row["param_dtype"])
    variables = {k: (rng.normal(size=shape) + 0.7).astype(kept) for k in ("scale", "bias") if row.get(f"use_{k}", False)}
    if name == "BatchNorm":
        state = np.dtype(np.float32 if row.get("force_float32_reductions", True) else kept)
        variables |= {"mean": rng.normal(size=shape).astype(state), "var": rng.uniform(0.5, 2, shape).astype(state)}
    return x, mask, variables


# --- the modules on them ----------------------------------------------------------------------------------------------------


def arguments(api, name, row):
    """-> what the constructor takes, and what the call takes."""
    inside = ("dtype", "param_dtype", "use_scale", "use_bias", "use_fast_variance", "force_float32_reductions")
    axes = ("axis", "reduction_axes", "feature_axes", "axis_name", "axis_index_groups")
    given = {k: row[k] for k in (*inside, *axes) if k in row}
    given |= {k: row[k] for k in ("epsilon", "momentum", "promote_dtype") if row.get(k) is not None}
    given |= row.get("groups", {})
    if "average" not in row:
        return given, {}
    where, value = row["average"]
    if where == "constructor":
        return given | {"use_running_average": value}, {}
    # The call takes precedence in NNX; Linen takes one of the two.
    return given | ({"use_running_average": not value} if api == "nnx" else {}), {"use_running_average": value}


STATS = ("mean", "var")


def function(api, module, name, row):
    """-> f(variables, x, mask) -> (y, updated statistics): the module, with its variables set."""
    given, call = arguments(api, name, row)
    if api == "linen":
        layer = getattr(module, name)(**given)

        def run(variables, x, mask):
            collections = {"params": {k: v for k, v in variables.items() if k not in STATS}}
            collections |= {"batch_stats": {k: variables[k] for k in STATS}} if name == "BatchNorm" else {}
            y, updates = layer.apply(collections, x, **call, mask=mask, mutable=["batch_stats"])
            return y, dict(updates.get("batch_stats", {}))

        return run

    features = int(np.prod([SHAPE[i] for i in features_of(name, row)]))

    def run(variables, x, mask):
        layer = getattr(module, name)(features, rngs=nnx.Rngs(0), **given)
        for key, value in variables.items():
            getattr(layer, key)[...] = value.ravel()
        y = layer(x, **call, mask=mask)
        return y, {k: getattr(layer, k)[...].reshape(variables[k].shape) for k in STATS if k in variables}

    return run


def outputs(f, row, x, mask, variables):
    """-> y (shards, *SHAPE), and the statistics, which are the same on all shards."""
    if not row["axis_name"]:
        y, state = jit(f)(variables, x[0], None if mask is None else mask[0])
        return y[None], state
    over_shards = jax.vmap(f, (None, 0, None if mask is None else 0), axis_name=row["axis_name"])
    y, state = jit(over_shards)(variables, x, mask)
    return y, {k: v[0] for k, v in state.items()}


def on_devices(f, row, x, mask, variables):
    """`outputs`, with a device for each shard: Flax takes axis_index_groups there only."""

    def local(x):
        y, state = f(variables, x[0], mask)
        return jax.tree.map(lambda a: a[None], (y, state))

    mesh, spec = jax.make_mesh((SHARDS,), ("shards",), axis_types=(AxisType.Auto,)), PartitionSpec("shards")
    y, state = jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(x)
    return y, {k: v[0] for k, v in state.items()}


# --- what float arithmetic may do -------------------------------------------------------------------------------------------


def epsilon_of(name, row):
    return DEFAULT_EPSILON.get(name, 1e-6) if row["epsilon"] is None else row["epsilon"]


def finfo(dtype):
    return jnp.finfo(jnp.float32 if np.dtype(dtype) == np.int32 else dtype)


def coarsest(api, row):
    """The coarsest type that Flax computes in, before it casts y."""
    if api == "linen":
        used = [] if row["force_float32_reductions"] else [row["x"], row["dtype"], row["param_dtype"]]
    else:  # everything is cast to dtype first
        used = [] if row["promote_dtype"] is identity else [row["dtype"]]
        # Without one, to what integers and parameters promote to, which is the parameters' type.
        used += [row["param_dtype"]] if row["x"] == "int32" else []
    return max((finfo(t) for t in used if t is not None), key=lambda f: f.eps, default=finfo("float32"))


def flax_y_error(x, ids, answer, affine, epsilon, low, *, mask, running, evaluate, about_zero):
    """How far y may be from the truth: n additions in float32 and a dozen operations in the coarsest type, on E[x²] − E[x]². The error of
    the variance is one of E[x²]; what it does to 1/s is taken as it is, not to first order."""
    x, count = oracles.wide(x), np.maximum(answer.moments.count, 1)
    e = float(count.max()) * float(finfo("float32").eps) + 16 * float(low.eps)
    weight = oracles.full_mask(mask, x.shape) / count[ids]
    mean_abs, mean_square = (oracles.total(a * weight, ids) for a in (abs(x), x**2))
    mean, var = running if evaluate else (answer.moments.mean, answer.moments.var)
    mean_error = e * (abs(mean) if evaluate else mean_abs * (not about_zero))
    var_error = e * (var if evaluate else 4 * mean_square) + float(low.smallest_subnormal)
    rstd, most = 1 / np.sqrt(var + epsilon), 1 / np.sqrt(np.maximum(var - var_error, 0) + epsilon * (1 - e) + 1e-300)
    rstd_error = np.maximum(most - rstd, rstd - 1 / np.sqrt(var + var_error + epsilon * (1 + e)))
    scale = np.ones([1] * x.ndim) if affine.scale is None else abs(oracles.spread_features(affine.scale, affine.features, x.ndim))
    bias = np.zeros([1] * x.ndim) if affine.bias is None else abs(oracles.spread_features(affine.bias, affine.features, x.ndim))
    centered = abs(x - mean[ids])
    difference = (e * abs(x) + mean_error[ids]) * most[ids] + centered * (rstd_error[ids] + e * most[ids])
    return scale * difference + e * bias


def flax_state_error(x, ids, answer, low, *, mask, old):
    """Of the statistics that Flax stores, {"mean", "var"}, each by feature."""
    x, count = oracles.wide(x), np.maximum(answer.moments.count, 1)
    e = float(count.max()) * float(finfo("float32").eps) + 16 * float(low.eps)
    weight = oracles.full_mask(mask, x.shape) / count[ids]
    shape, size = old["mean"].shape, old["mean"].size  # the first shard's
    mean_abs, mean_square = (oracles.total(a * weight, ids)[:size].reshape(shape) for a in (abs(x), x**2))
    return {"mean": e * (mean_abs + abs(oracles.wide(old["mean"]))), "var": e * (4 * mean_square + oracles.wide(old["var"]))}
