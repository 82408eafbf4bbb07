"""Norm × way to spread it over devices × what the devices count: always the answer of one device on the concatenated batch.

The whole product for each norm, and all pairs for its options, run with the slow tests, the beginning of a pairwise order with the others.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import cases
import device_ways
import jnorm
import oracles
from case import batch
from cases import BY_NAME, replace
from device_ways import OVER_BATCH, WITHIN_SAMPLES, split_samples
from distributed import mesh_of
from pairwise import covering

ROWS, POSITIONS, WIDTH, CHANNELS = 16, 4, 2, 8
LAST = 13  # of the rows, in a batch that eight devices do not divide
GROUPED = ("group_norm", "group_norm_output")
CHANGES = {name: {"kept": {0: 1, 3: 2}, "options": {**BY_NAME[name].options, "num_groups": 4}} for name in GROUPED}


def sized(case):
    """The case with room for eight devices along the batch and along the channels, and without a mask of its own."""
    channels_first = case.features == (1,)
    shape = (ROWS, CHANNELS, POSITIONS, WIDTH) if channels_first else (ROWS, POSITIONS, WIDTH, CHANNELS)
    return replace(case, shape=shape, mask=None, **CHANGES.get(case.name, {}))


# --- what is counted ------------------------------------------------------------------------------------------------------------


def rows_of(counts, case):
    """`counts`: 0, 1 or 2 rows of each device's two."""
    flags = [[i < n for i in range(2)] for n in counts]
    return np.array(flags).reshape(-1, *(1,) * (len(case.shape) - 1))


def by_element(case, rng):
    """Devices count differently, and nothing along some of the positions; the same for all channels where the norm wants that."""
    shape = [1 if i in case.features and case.norm == "cross_iteration_batch_norm" else n for i, n in enumerate(case.shape)]
    return cases.mask_of(tuple(shape), rng)


MASKS = {
    "even": lambda case, rng: None,
    "uneven": lambda case, rng: rows_of([2, 1, 2, 2, 1, 1, 2, 1], case),
    "empty shard": lambda case, rng: rows_of([1, 2, 0, 2, 2, 0, 1, 2], case),
    "by element": by_element,
    "nothing": lambda case, rng: rows_of([0] * 8, case),
    "padded": lambda case, rng: None,
}
DATA = tuple(MASKS)


def inputs(case, data):
    given = cases.inputs(case, mask=MASKS[data](case, np.random.default_rng(1)))
    if data != "padded":
        return given
    given = {k: v[:LAST] if k in device_ways.OF_X else v for k, v in given.items()}
    padded = {k: jnorm.pad_batch(v, 8) for k, v in given.items() if k in device_ways.OF_X}
    return given | {k: np.asarray(v) for k, (v, _) in padded.items()} | {"mask": np.asarray(padded["x"][1])}


def check(case, data, given, y, state, gradients, steps=1):
    """The last of the steps, against the float64 oracle on the batch as it was before it was padded."""
    if data == "padded" and case.norm != "ghost_batch_norm":  # whose last group is smaller
        given = {k: v[:LAST] if k in device_ways.OF_X else v for k, v in given.items() if k != "mask"}
        gradients = {k: np.asarray(v)[:LAST] if k in device_ways.OF_X else v for k, v in gradients.items()}
        y = np.asarray(y)[:LAST]
    if data == "nothing" and case.norm == "cross_iteration_batch_norm":
        case, given, state = evaluated(case, given, state)
    elif steps == 2:
        given = given | {"state": cases.oracle_state(case, given)}
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


def evaluated(case, given, state):
    """Where an iteration counts nothing, its window does not count either: the running statistics normalize, and all of the state stays."""
    for key in state:
        np.testing.assert_array_equal(state[key], given["state"][key], err_msg=key)
    running = {k: given["state"][k] for k in ("mean", "var")}
    given = {k: v for k, v in given.items() if k not in ("inputs", "kernel")} | {"state": running}
    same = replace(
        BY_NAME["batch_norm_evaluate"],
        shape=case.shape,
        act=case.act,
        residual=case.residual,
        options={"use_running_average": True, **activation_of(case)},
    )
    return same, given, {k: state[k] for k in running}


def activation_of(case):
    return {k: v for k, v in case.options.items() if k == "activation"}


# --- the rows of the matrix -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def program(ways, case, way):
    """One for all that is counted: what has the same shapes is compiled once."""
    return WAYS[ways][way].program(ALL[case])


def run(ways, name, way, data):
    case = ALL[name]
    for given, out in program(ways, name, way)(inputs(case, data)):
        check(case, data, given, *out, steps=getattr(WAYS[ways][way], "steps", 1))


def matrix(names, ways, fast, allowed=lambda *_: True, data=DATA, pairs=False):
    """All rows, or with `pairs` those of a pairwise order. Its first `fast` are no slow tests, nor the first of values that are in none of
    these; of ways, where all rows are wanted."""
    order = covering(names, ways, data, allowed=allowed)
    first = order[:fast]
    for i, value in [(i, row[i]) for row in order for i in ((0, 2) if pairs else (0, 1, 2))]:
        if all(row[i] != value for row in first):
            first.append(next(row for row in order if row[i] == value))
    rows = order if pairs else [row for row in itertools.product(names, ways, data) if allowed(*row)]
    return [pytest.param(*row, marks=[] if row in first else [pytest.mark.slow]) for row in rows]


UPDATES_IN_EVALUATION = {"use_running_average": True, "update_running": True, "running_var_correction": 1}
MORE = [batch("batch_norm_updates_in_evaluation", options=UPDATES_IN_EVALUATION)]
NORMS = [
    "batch_norm",
    "batch_renorm",
    "mean_only_batch_norm",
    "cross_iteration_batch_norm",
    "cross_mini_batch_norm",
    "ghost_batch_norm",
    "divisive_batch_norm",
]
OPTIONS = [
    "batch_norm_relu_residual",
    "batch_norm_counted",
    "batch_norm_cumulative",
    "batch_norm_mask",
    "batch_norm_two_features",
    "batch_norm_channels_first",
    "batch_norm_output_mask",
    "batch_norm_updates_in_evaluation",
    "batch_renorm_mask_silu_residual",
    "mean_only_batch_norm_mask_relu_residual",
    "cross_iteration_batch_norm_groups_mask",
    "cross_iteration_batch_norm_exact_silu",
    "cross_mini_batch_norm_published_mask",
    "ghost_batch_norm_strided",
    "ghost_batch_norm_each",
    "divisive_batch_norm_mask_relu_residual",
]
SAMPLES = [
    "layer_norm",
    "layer_norm_samples",
    "rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "group_norm",
    "instance_norm",
    "tracked_instance_norm",
    "filter_response_norm",
    "eval_norm",
    "divisive_norm",
    "local_response_norm",
]
OF_SAMPLES = [
    "group_norm_output",
    "rms_norm_output",
    "filter_response_norm_learned",
    "divisive_norm_samples",
    "local_response_norm_positions",
]
OF_POSITIONS = [
    "layer_norm_samples",
    "rms_norm_mask",
    "group_norm",
    "instance_norm",
    "tracked_instance_norm",
    "filter_response_norm_learned",
    "eval_norm",
]
OF_CHANNELS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]
ALL = {c.name: sized(c) for c in [*cases.CASES, *MORE]}
WAYS = {
    "batch": OVER_BATCH,
    "samples": WITHIN_SAMPLES,
    "positions": split_samples("positions"),
    "channels": split_samples("channels"),
}


MAPPED_WITH_CHECKS = (
    "batch_norm",
    "mean_only_batch_norm",
    "layer_norm",
    "layer_norm_samples",
    "rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "instance_norm",
    "local_response_norm",
)


def jax_can(name, way):
    """Of `vmap(spmd_axis_name=...)` over a `shard_map` that checks types, JAX's own rules leave what is not mapped uncast in some places:
    see the test of that. With check_vma off all norms are in the matrix."""
    return way != "spmd_axis_name, shard_map" or name in MAPPED_WITH_CHECKS


def follows(name, way, data):
    """The last group of a batch may not be alone on a device; of the groups of a layer's inputs each device has its own channels."""
    if not jax_can(name, way):
        return False
    if name == "cross_iteration_batch_norm_groups_mask" and way.startswith("explicit") and "channels" in way:
        return False  # linear_op itself does not follow: it reshapes the kernel
    if name in ("ghost_batch_norm_strided", "ghost_batch_norm_each"):
        return way.startswith(("auto", "explicit", "spmd_axis_name, auto"))
    return not (name == "cross_iteration_batch_norm_groups_mask" and way.startswith("batch and channels"))


def test_what_jax_cannot_do_itself():
    """Why some norms are not in the matrix for `vmap(spmd_axis_name=...)` of a `shard_map` that checks types: no jnorm is in this."""

    def clamped(x):
        return jax.lax.clamp(jnp.float32(0), x, jnp.float32(1))

    sharded = jax.shard_map(clamped, mesh=mesh_of((2, 4), ("m", "d")), in_specs=P("d"), out_specs=P("d"))
    with pytest.raises(ValueError, match="varying manual axes"):
        jax.vmap(sharded, spmd_axis_name="m")(np.ones((2, 8), np.float32))


@pytest.mark.parametrize("way", ["explicit batch", "auto batch"])
@pytest.mark.parametrize(
    "options", [{"group_size": 8}, {"group_size": 5}, {"group_size": 5, "grouping": "strided", "update": "each"}], ids=str
)
def test_groups_of_examples_that_no_device_holds_whole(options, way):
    case = ALL["ghost_batch_norm"]
    case = replace(case, options={**options, "remainder": "smaller"}, kept={0: options["group_size"], 3: 1})
    for given, out in OVER_BATCH[way].program(case)(inputs(case, "uneven")):
        check(case, "uneven", given, *out)


BY_CHANNEL = ("instance_norm", "tracked_instance_norm", "filter_response_norm", "filter_response_norm_learned", "eval_norm")


def whole_on_devices(name, way, data):
    """Where devices have some of the channels, and no name to merge over: norms of each channel."""
    return jax_can(name, way) and (not way.startswith("batch and channels") or name in (*BY_CHANNEL, "local_response_norm_positions"))


@pytest.mark.parametrize(("name", "way", "data"), matrix(NORMS, OVER_BATCH, 12, follows))
def test_norms_over_the_batch(name, way, data):
    run("batch", name, way, data)


@pytest.mark.parametrize(("name", "way", "data"), matrix(OPTIONS, OVER_BATCH, 8, follows, pairs=True))
def test_options(name, way, data):
    run("batch", name, way, data)


@pytest.mark.parametrize(("name", "way", "data"), matrix(SAMPLES, WITHIN_SAMPLES, 12, whole_on_devices))
def test_norms_within_samples(name, way, data):
    """Split batches need no axis name."""
    run("samples", name, way, data)


@pytest.mark.parametrize(("name", "way", "data"), matrix(OF_SAMPLES, WITHIN_SAMPLES, 5, whole_on_devices, pairs=True))
def test_options_within_samples(name, way, data):
    run("samples", name, way, data)


@pytest.mark.parametrize(("name", "way", "data"), matrix(OF_POSITIONS, WAYS["positions"], 8))
def test_split_positions(name, way, data):
    run("positions", name, way, data)


@pytest.mark.parametrize(("name", "way", "data"), matrix(OF_CHANNELS, WAYS["channels"], 6))
def test_split_rows(name, way, data):
    """Each device has its part of the row, of scale and of bias."""
    run("channels", name, way, data)


# --- groups of devices ------------------------------------------------------------------------------------------------------------

GROUPS = [[0, 2, 4, 6], [1, 3, 5, 7]]
MAPS = {
    "pmap": functools.partial(jax.pmap, axis_name="d"),
    "vmap": lambda f, in_axes: jax.jit(jax.vmap(f, in_axes=in_axes, axis_name="d")),
    "shard_map": functools.partial(lambda f, in_axes, check_vma: lanes_by_shard_map(f, in_axes[0], check_vma), check_vma=True),
    "shard_map unchecked": functools.partial(lambda f, in_axes, check_vma: lanes_by_shard_map(f, in_axes[0], check_vma), check_vma=False),
}


def lanes_by_shard_map(f, in_axes, check_vma):
    """As `vmap` over as many lanes as there are devices, the gradients of parameters summed by JAX where it checks types."""

    def lane(given):
        out = f({k: v if in_axes[k] is None else v[0] for k, v in given.items()}, summed=check_vma)
        return jax.tree.map(lambda a: a[None], out)

    specs = {k: P() if axis is None else P("d") for k, axis in in_axes.items()}
    return jax.jit(jax.shard_map(lane, mesh=mesh_of(), in_specs=(specs,), out_specs=P("d"), check_vma=check_vma))


@functools.lru_cache(maxsize=8)
def of_groups(name, way, keys, groups):
    local = cases.value_and_gradients(ALL[name], axis_name="d", axis_index_groups=groups)

    def lane(given, summed=False):
        y, state, gradients = local(given)
        return y, state, {k: v if summed or k in device_ways.OF_X else jax.lax.psum(v, "d") for k, v in gradients.items()}

    return MAPS[way](lane, in_axes=(device_ways.lanes_of(keys),))


@pytest.mark.parametrize(("name", "way", "data"), matrix([*NORMS, "batch_norm_counted"], tuple(MAPS), 9, data=DATA[:-1]))
def test_groups_of_devices(name, way, data):
    """Two, interleaved: each is a batch of its own, and has its own state. The gradients of the parameters are the sum of both."""
    case, groups = ALL[name], tuple(map(tuple, GROUPS))
    given = inputs(case, data)
    pieces = {k: v.reshape(8, 2, *v.shape[1:]) if k in device_ways.OF_X else v for k, v in given.items()}
    y, state, gradients = of_groups(name, way, tuple(given), groups)(pieces)
    wants = []
    for group in map(list, groups):
        part = {k: v[group].reshape(8, *v.shape[2:]) if k in device_ways.OF_X else v for k, v in pieces.items()}
        of_group = jax.tree.map(lambda a, group=group: device_ways.alike(np.asarray(a)[group]), dict(state))
        got = case, part, of_group
        if data == "nothing" and case.norm == "cross_iteration_batch_norm":
            got = evaluated(*got)
        cases.check_value(got[0], got[1], np.asarray(y)[group].reshape(8, *case.shape[1:]), got[2])
        wants.append(cases.oracle(*got[:2])[0])
        length, _ = cases.lengths(case, part)
        for k in {"x", "residual"} & set(gradients):
            oracles.assert_close(np.asarray(gradients[k])[group].reshape(8, *case.shape[1:]), wants[-1].d(k), 3 * length + 32, what=f"d{k}")
    length, parameter_length = (3 * n + 32 for n in cases.lengths(case, given))
    for k in set(gradients) - {"x", "residual"}:
        both = oracles.Bounded(*(np.sum([getattr(w.d(k), part) for w in wants], axis=0) for part in ("value", "size")))
        oracles.assert_close(device_ways.alike(gradients[k]), both, length + parameter_length, what=f"d{k}")


def slabs(v):
    """(N, positions, ...) -> (8, N / 2, 1, ...): of each half of the samples one position on each of four devices."""
    positions = v.shape[1] if v.ndim == 4 else 1
    v = np.broadcast_to(v, (v.shape[0], POSITIONS, *v.shape[2:])) if positions == 1 else v
    return v.reshape(2, ROWS // 2, POSITIONS, 1, *v.shape[2:]).swapaxes(1, 2).reshape(8, ROWS // 2, 1, *v.shape[2:])


def whole(v):
    return np.asarray(v).reshape(2, POSITIONS, ROWS // 2, 1, *v.shape[3:]).swapaxes(1, 2).reshape(ROWS, POSITIONS, *v.shape[3:])


UNTRACKED = [name for name in OF_POSITIONS if name != "tracked_instance_norm"]


@pytest.mark.parametrize(("name", "way", "data"), matrix(UNTRACKED, tuple(MAPS), 7, data=("even", "empty shard", "by element", "nothing")))
def test_groups_of_positions(name, way, data):
    """Four devices share the positions of one half of the samples, four those of the other."""
    case = ALL[name]
    given = inputs(case, data)
    pieces = {k: slabs(v) if k in device_ways.OF_X else v for k, v in given.items()}
    y, state, gradients = of_groups(name, way, tuple(given), ((0, 1, 2, 3), (4, 5, 6, 7)))(pieces)
    gradients = {k: whole(v) if k in device_ways.OF_X else device_ways.alike(v) for k, v in gradients.items()}
    check(case, data, given, whole(y), jax.tree.map(device_ways.alike, state), gradients)


# --- modules ------------------------------------------------------------------------------------------------------------------------

APIS = {"linen": cases.call_linen, "nnx": cases.call_nnx}
WITH_CLASS = [n for n in [*NORMS, *SAMPLES, *OF_SAMPLES] if ALL[n].norm in cases.CLASSES]
ON_TYPES = ("explicit batch", "explicit channels", "explicit batch and channels", "explicit batch and positions", "partly manual, explicit")


@pytest.mark.parametrize(("name", "api", "way"), matrix(WITH_CLASS, tuple(APIS), 5, data=ON_TYPES, pairs=True))
def test_modules_on_explicit_axes(name, api, way):
    case = ALL[name]
    ways = OVER_BATCH if name in NORMS else WITHIN_SAMPLES
    for given, out in ways[way].program(case, through=APIS[api])(inputs(case, "empty shard")):
        check(case, "empty shard", given, *out)
