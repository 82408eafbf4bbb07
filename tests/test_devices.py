"""Eight devices give the answer of one on the concatenated batch: values, gradients, running statistics.

Masks are uneven per shard, and one shard counts nothing."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import oracles
from cases import BY_NAME, FAMILY, PLAIN, replace
from distributed import MODES

SHAPE = (16, 3, 2, 6)
BATCHED = ["batch_norm", "batch_norm_relu_residual", "batch_norm_counted", "batch_norm_two_features"]


def whole_batch(name, rng, shape=SHAPE, masked=True):
    case = replace(BY_NAME[name], shape=shape)
    return case, cases.inputs(case, shape=shape, mask=distributed.uneven(rng, shape) if masked else None)


def check(case, given, y, state, gradients):
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize(("name", "mode"), [(n, m) for i, n in enumerate(BATCHED) for j, m in enumerate(MODES) if i == 0 or (i + j) % 2])
def test_batch_norm(name, mode, rng):
    case, given = whole_batch(name, rng)
    check(case, given, *MODES[mode](cases.value_and_gradients(case, axis_name="d"), given))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_counted_anywhere(mode, rng):
    """The running statistics normalize, and stay."""
    case, given = whole_batch("batch_norm", rng)
    given["mask"] = np.zeros_like(given["mask"])
    y, state, gradients = MODES[mode](cases.value_and_gradients(case, axis_name="d"), given)
    check(case, given, y, state, gradients)
    jax.tree.map(np.testing.assert_array_equal, dict(state), given["state"])


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_by_element_and_non_finite_values_under_it(mode, rng):
    case, given = whole_batch("batch_norm", rng)
    mask = cases.mask_of(SHAPE, rng)
    given |= {"mask": mask, "dy": given["dy"] * mask}
    bad = given | {"x": np.where(mask, given["x"], np.float32(np.nan))}
    y, state, gradients = MODES[mode](cases.value_and_gradients(case, axis_name="d"), bad)
    cases.check_value(case, bad, y, state)
    assert np.isfinite(gradients["x"]).all()  # what stands under the mask gets some finite gradient; the rest is compared
    dx = np.where(mask, gradients["x"], cases.oracle(case, given)[0].dx.value)
    cases.check_gradients(case, given, gradients | {"x": dx.astype(np.float32)})


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_needs_no_axis(mode, rng):
    case = replace(BY_NAME["batch_norm_evaluate"], shape=SHAPE)
    given = cases.inputs(case, shape=SHAPE)
    check(case, given, *MODES[mode](cases.value_and_gradients(case, axis_name="d"), given))


BOTH = ["batch_norm_relu_residual", "batch_norm_counted", "layer_norm_samples", "group_norm", "instance_norm", "tracked_instance_norm"]
AUTO = [(c.name, "batch") for c in [*PLAIN, BY_NAME["add_layer_norm"], *FAMILY]] + [(name, "batch and height") for name in BOTH]


@pytest.mark.parametrize(("name", "sharded"), AUTO)
def test_jit_over_sharded_arrays(name, sharded, rng):
    """No axis name: GSPMD's statistics are global, with one mask row per sample."""
    shape = (16, 4, 2, 6)
    case, given = whole_batch(name, rng, shape)
    layout = {"batch": {}, "batch and height": {"spec": P("b", "h"), "shape": (4, 2), "names": ("b", "h")}}[sharded]
    y, state, gradients = distributed.by_auto_mesh(cases.value_and_gradients(case), given, **layout)
    check(case, given, y, state, gradients)
    assert len(y.sharding.device_set) == 8 and not y.sharding.is_fully_replicated


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "batch_norm", "instance_norm"])
def test_jit_over_a_sharded_feature_axis(name):
    case = replace(BY_NAME[name], shape=(4, 2, 2, 16))
    given = cases.inputs(case)
    y, state, gradients = distributed.by_auto_mesh(cases.value_and_gradients(case), given, spec=P(None, None, None, "d"))
    check(case, given, y, state, gradients)


# Of 16 channels two on each device: groups on several devices, on one, and one that is all of them.
@pytest.mark.parametrize("groups", [4, 8, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_jit_over_a_sharded_channel_axis_and_groups(groups, masked, rng):
    case = replace(BY_NAME["group_norm"], shape=(4, 3, 2, 16), kept={0: 1, 3: 16 // groups}, options={"num_groups": groups})
    given = cases.inputs(case, mask=cases.mask_of((4, 3, 1, 16), rng) if masked else None)
    y, state, gradients = distributed.by_auto_mesh(cases.value_and_gradients(case), given, spec=P(None, None, None, "d"))
    check(case, given, y, state, gradients)
    assert y.sharding.spec == P(None, None, None, "d")


def test_jit_over_sharded_positions_and_channels(rng):
    """The channels lie on two axes of the mesh, in the order in which the specification names them."""
    case = replace(BY_NAME["group_norm"], shape=(4, 4, 2, 8), kept={0: 1, 3: 4}, options={"num_groups": 2})
    given = cases.inputs(case, mask=cases.mask_of((4, 4, 1, 1), rng))
    for spec in (P(None, "h", None, ("a", "b")), P(None, "h", None, ("b", "a"))):
        layout = {"spec": spec, "shape": (2, 2, 2), "names": ("a", "h", "b")}
        check(case, given, *distributed.by_auto_mesh(cases.value_and_gradients(case), given, **layout))


def height(name, rng):
    """Per-sample norms reduce over positions: the height is what devices share."""
    case = replace(BY_NAME[name], shape=(2, 16, 2, 6))
    mask = cases.mask_of((2, 16, 1, 1), rng)
    mask[0, 4:6] = mask[1, 10:12] = False
    return case, cases.inputs(case, mask=mask)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "layer_norm_samples", "rms_norm_mask", "tracked_instance_norm"])
def test_positions_over_devices(name, check_vma, rng):
    case, given = height(name, rng)
    local = cases.value_and_gradients(case, axis_name="d")
    check(case, given, *distributed.by_shard_map(local, given, check_vma=check_vma, spec=P(None, "d")))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_features_over_devices(name, check_vma):
    """Each device has its slice of the row, of scale and of bias."""
    case = replace(BY_NAME[name], shape=(4, 16), kept={0: 1}, features=(1,))
    given = cases.inputs(case)
    specs = {k: P("d") if v.ndim == 1 else P(None, "d") for k, v in given.items()}
    run = jax.shard_map(
        lambda g: cases.value_and_gradients(case, axis_name="d")(g)[::2],
        mesh=distributed.mesh_of(),
        in_specs=(specs,),
        out_specs=(P(None, "d"), {k: specs[k] for k in case.differentiable}),
        check_vma=check_vma,
    )
    y, gradients = jax.jit(run)(given)
    check(case, given, y, None, gradients)


@pytest.mark.parametrize("check_vma", [True, False])
def test_several_axis_names(check_vma, rng):
    case, given = whole_batch("batch_norm", rng)
    local = cases.value_and_gradients(case, axis_name=("a", "b"))
    check(case, given, *distributed.by_shard_map(local, given, ("a", "b"), check_vma, shape=(2, 4)))


def test_a_partly_manual_mesh(rng):
    """The batch is ours by name; the height is left to GSPMD."""
    case, given = whole_batch("batch_norm_relu_residual", rng, (16, 4, 2, 6))
    mesh = distributed.mesh_of((4, 2), ("d", "h"))
    for key in ("x", "residual", "dy"):
        given[key] = jax.device_put(given[key], NamedSharding(mesh, P("d", "h")))
    local = cases.value_and_gradients(case, axis_name="d")
    options = {"spec": P("d"), "shape": (4, 2), "axis_names": {"d"}}
    y, state, gradients = distributed.by_shard_map(local, given, ("d", "h"), **options)
    check(case, given, y, state, gradients)


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_of_two_axes(check_vma, rng):
    """Statistics over `b` alone: two halves of the batch, each with its own."""
    case, given = whole_batch("batch_norm", rng)
    case = replace(case, kept={0: 8, 3: 1})
    local = stacked_state(cases.value_and_gradients(case, axis_name="b"))
    y, state, gradients = distributed.by_shard_map(local, given, ("a", "b"), check_vma, shape=(2, 4), state_spec=P("a"))
    check_halves(case, given, y, state, gradients, ([*range(8)], [*range(8, 16)]))


def stacked_state(local):
    def run(given):
        y, state, gradients = local(given)
        return y, jax.tree.map(lambda a: a[None], state), gradients

    return run


def check_halves(case, given, y, state, gradients, halves):
    """Each group of samples against its own oracle; the parameters' gradients are the sum of the groups'."""
    plain = replace(case, kept=cases.BATCH)
    per_device = len(jax.tree.leaves(state)[0]) // len(halves)
    wants = []
    for i, rows in enumerate(halves):
        part = {k: v if k in distributed.WHOLE else v[np.array(rows)] for k, v in given.items()}
        got = {k: v if k in distributed.PARAMETERS else v[np.array(rows)] for k, v in gradients.items()}
        which = i if per_device == 1 else rows[0] // 2
        cases.check_value(plain, part, y[np.array(rows)], jax.tree.map(lambda a, which=which: a[which], dict(state)))
        wants.append(cases.oracle(plain, part)[0])
        oracles.assert_close(got["x"], wants[-1].dx, 48, what="dx")
    for k in distributed.PARAMETERS:
        both = oracles.Bounded(*(sum(getattr(getattr(w, f"d{k}"), part) for w in wants) for part in ("value", "size")))
        oracles.assert_close(gradients[k], both, 96, what=k)


INTERLEAVED = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("mode", MODES)
def test_axis_index_groups(mode, rng):
    """Two groups of four devices, interleaved; the state differs between groups."""
    case, given = whole_batch("batch_norm", rng)
    local = cases.value_and_gradients(case, axis_name="d", axis_index_groups=INTERLEAVED)
    if mode.startswith("shard_map"):
        out = MODES[mode](stacked_state(local), given, state_spec=P("d"))
    else:
        out = MODES[mode](local, given, whole_state=False)
    halves = [[2 * d + i for d in group for i in (0, 1)] for group in INTERLEAVED]
    check_halves(case, given, *out, halves)


def test_groups_of_one_device_are_no_groups_at_all(rng):
    case, given = whole_batch("batch_norm", rng, masked=False)
    local = cases.value_and_gradients(case, axis_name="d", axis_index_groups=[[i] for i in range(8)])
    y, _, _ = distributed.by_vmap(local, given, whole_state=False)
    for i in range(0, 16, 2):
        part = {k: v if k in distributed.WHOLE else v[i : i + 2] for k, v in given.items()}
        cases.check_value(case, part, y[i : i + 2], cases.call(case, part)[1])


def merged_moments(given):
    stats = jnorm.moments(given["x"], (0, 1, 2), mask=given["mask"], axis_name="d")
    return {"count": stats.count, "mean": stats.mean, "var": stats.var}


@pytest.mark.parametrize("offset", [0, 1e4])
def test_more_than_64_participants(offset, rng):
    """The other merge: two dependent all-reduces."""
    case = replace(BY_NAME["batch_norm"], shape=(130, 3, 1, 6))
    given = cases.inputs(case, mask=cases.mask_of((130, 1, 1, 1), rng))
    given["mask"][10:12] = False
    given["x"] += np.float32(offset)
    check(case, given, *distributed.by_vmap(cases.value_and_gradients(case, axis_name="d"), given, lanes=65))


def by_lane(local, given, slabs):
    """vmap over (8, 1, ...), one slab a lane."""
    pieces = {k: v if k in distributed.WHOLE else slabs(v) for k, v in given.items()}
    axes = {k: None if k in distributed.WHOLE else 0 for k in given}
    y, _, gradients = jax.jit(jax.vmap(distributed.summed(local, "d"), (axes,), axis_name="d"))(pieces)
    shape = given["x"].shape
    whole = {k: v[0] if k in distributed.PARAMETERS else np.asarray(v).reshape(shape) for k, v in gradients.items()}
    return np.asarray(y).reshape(shape), None, whole


@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "layer_norm_samples", "rms_norm_mask"])
def test_axis_index_groups_of_positions(name, rng):
    """Two images of 16 rows, each over four of the eight devices."""
    case, given = height(name, rng)
    local = cases.value_and_gradients(case, axis_name="d", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])
    check(case, given, *by_lane(local, given, lambda v: v.reshape(8, 1, 4, *v.shape[2:])))


def test_an_axis_over_which_x_is_the_same(rng):
    """x varies over a alone, statistics are merged over both: every element is counted four times, which changes nothing."""
    case, given = whole_batch("batch_norm", rng)
    local = cases.value_and_gradients(case, axis_name=("a", "b"))
    check(case, given, *distributed.by_shard_map(local, given, ("a", "b"), spec=P("a"), shape=(2, 4)))


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "add_layer_norm", "group_norm"])
def test_explicit_mesh(name, rng):
    """Sharding in types: y has x's."""
    case, given = whole_batch(name, rng)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = {k: v if k in distributed.WHOLE else jax.device_put(v, P("d")) for k, v in given.items()}
        y, state, gradients = jax.jit(cases.value_and_gradients(case))(placed)
    check(case, given, y, state, gradients)
    assert y.sharding.spec[0] == gradients["x"].sharding.spec[0] == "d"


@pytest.mark.parametrize("mode", ["vmap", "shard_map", pytest.param("shard_map unchecked", marks=pytest.mark.slow)])
def test_moments(mode, rng):
    """Merged over devices by count, the same everywhere."""
    case, given = whole_batch("batch_norm", rng)
    parts = {k: given[k].reshape(8, 2, *given[k].shape[1:]) for k in ("x", "mask")}
    if mode == "vmap":
        stats = distributed.first(jax.vmap(merged_moments, axis_name="d")(parts))
    else:
        inner = lambda g: merged_moments(jax.tree.map(lambda a: a[0], g))  # noqa: E731
        stats = jax.shard_map(inner, mesh=distributed.mesh_of(), in_specs=P("d"), out_specs=P(), check_vma=mode == "shard_map")(parts)
    want = oracles.moments(given["x"], oracles.sets(SHAPE, cases.BATCH), given["mask"])
    for key in ("count", "mean", "var"):
        value = getattr(want, key)
        oracles.assert_close(stats[key], oracles.Bounded(value, abs(value) + (key == "mean") * 10), 96, what=key)


def test_an_axis_that_the_devices_do_not_divide(rng):
    """Seven rows of an array over four devices: what pads the last part is not counted."""
    x = rng.normal(size=(8, 6)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    placed = jax.device_put(x, NamedSharding(mesh, P("d")))
    _, state = jax.jit(lambda x: jnorm.batch_norm(x[:7], jnorm.batch_norm_state(6), momentum=0.0))(placed)
    # Sums of 7 terms of size 1.
    np.testing.assert_allclose(state["mean"], x[:7].astype(np.float64).mean(0), atol=(7 + 16) * 2.0**-24)
    np.testing.assert_allclose(state["var"], x[:7].astype(np.float64).var(0), rtol=(7 + 16) * 2.0**-23)
