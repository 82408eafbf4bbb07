"""Modules over eight devices give the answer of one on the concatenated batch; masks are uneven, and one shard counts nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import distributed
from cases import BY_NAME, CLASSES, replace
from distributed import MODES, mesh_of
from jnorm import linen as jnn
from jnorm import nnx as jnx
from test_collectives import auto_program, collectives, kinds, sharded_program
from weights import every_other

SHAPE = (16, 3, 2, 6)


def arguments(case, given, options):
    """-> (of the constructor, of the call)."""
    absent = {f"use_{k}": False for k in ("scale", "bias") if k not in case.affine and not (k == "bias" and case.norm == "rms_norm")}
    made = {"use_running_average": False, "track_count": case.state == "count"} if case.state else {}
    return made | case.options | absent | options, {k: given[k] for k in ("mask", "residual") if k in given}


def by_linen(case, given, **options):
    constructor, call = arguments(case, given, options)
    module = getattr(jnn, CLASSES[case.norm])(**constructor)
    variables = {"params": {k: given[k] for k in case.affine}} | ({"batch_stats": given["state"]} if case.state else {})
    y, updates = module.apply(variables, given["x"], **call, mutable=["batch_stats"])
    return y, updates.get("batch_stats")


def nnx_module(case, given, **options):
    module = getattr(jnx, CLASSES[case.norm])(6, **arguments(case, given, options)[0], rngs=nnx.Rngs(0))
    for key, value in {k: given[k] for k in case.affine}.items():
        setattr(module, key, nnx.Param(jnp.asarray(value)))
    for key, value in (given["state"] if case.state else {}).items():
        setattr(module, key, nnx.BatchStat(jnp.asarray(value)))
    return module


def by_nnx(case, given, **options):
    module = nnx_module(case, given, **options)
    y = module(given["x"], **arguments(case, given, options)[1])
    return y, {k: getattr(module, k)[...] for k in given["state"]} if case.state else None


APIS = {"linen": by_linen, "nnx": by_nnx}
each_api = pytest.mark.parametrize("api", APIS)


def value_and_gradients(api, case, **options):
    """As the table's."""

    def run(given):
        inner, rest = cases.split(case, given)
        y, vjp, state = jax.vjp(lambda inner: APIS[api](case, inner | rest, **options), inner, has_aux=True)
        return y, state, vjp(given["dy"])[0]

    return run


def check(case, given, y, state, gradients):
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


def whole_batch(name, rng, shape=SHAPE):
    case = replace(BY_NAME[name], shape=shape)
    return case, cases.inputs(case, shape=shape, mask=distributed.uneven(rng, shape))


@each_api
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm(api, mode, rng):
    case, given = whole_batch("batch_norm", rng)
    check(case, given, *MODES[mode](value_and_gradients(api, case, axis_name="d"), given))


@pytest.mark.parametrize(("name", "api", "mode"), every_other(["batch_norm_relu_residual", "batch_norm_counted"], APIS, MODES)[::3])
def test_batch_norm_with_more(name, api, mode, rng):
    case, given = whole_batch(name, rng)
    check(case, given, *MODES[mode](value_and_gradients(api, case, axis_name="d"), given))


@each_api
@pytest.mark.parametrize("name", ["batch_norm_evaluate", "tracked_instance_norm_evaluate"])
@pytest.mark.parametrize(
    "options", [{}, {"axis_index_groups": [[0, 1], [2, 3]]}, {"update_running": False}], ids=["plain", "groups", "frozen"]
)
def test_evaluation_needs_no_axis(name, api, options):
    """It may exist nowhere: a model that was trained on many devices is evaluated on one."""
    case = replace(BY_NAME[name], shape=SHAPE)
    given = cases.inputs(case)
    y, state = APIS[api](case, given, axis_name="nowhere", **options)
    cases.check_value(case, given, y, state)


@each_api
@pytest.mark.parametrize("flags", [{}, {"use_running_average": True, "update_running": True}])
def test_what_takes_statistics_needs_the_axis(api, flags):
    case = BY_NAME["batch_norm"]
    with pytest.raises(ValueError, match="'nowhere' is not bound"):
        APIS[api](case, cases.inputs(case), axis_name="nowhere", **flags)


def by_turns(names, apis):
    """Each name with one API in the default run; check_vma on and off in turns."""
    rows = [(name, api, i % 4 < 2, (i + j) % 2) for i, name in enumerate(names) for j, api in enumerate(apis)]
    return [pytest.param(*row, marks=[pytest.mark.slow] if slow else []) for *row, slow in rows]


SPLIT = ["group_norm", "instance_norm", "layer_norm_samples", "rms_norm_mask", "tracked_instance_norm"]


@pytest.mark.parametrize(("name", "api", "check_vma"), by_turns(SPLIT, APIS))
def test_positions_over_devices(name, api, check_vma, rng):
    """Norms of a sample, with the sample spread over the devices."""
    case = replace(BY_NAME[name], shape=(2, 16, 2, 6))
    mask = cases.mask_of((2, 16, 1, 1), rng)
    mask[0, 4:6] = mask[1, 10:12] = False
    given = cases.inputs(case, mask=mask)
    local = value_and_gradients(api, case, axis_name="d")
    check(case, given, *distributed.by_shard_map(local, given, check_vma=check_vma, spec=P(None, "d")))


@pytest.mark.parametrize(("name", "api"), every_other(["batch_norm", "layer_norm", "group_norm", "tracked_instance_norm"], APIS))
def test_jit_over_sharded_arrays(name, api, rng):
    """No axis name: the statistics are global, with one mask row per sample."""
    case, given = whole_batch(name, rng)
    y, state, gradients = distributed.by_auto_mesh(value_and_gradients(api, case), given)
    check(case, given, y, state, gradients)
    assert len(y.sharding.device_set) == 8 and not y.sharding.is_fully_replicated


# --- NNX's own maps -----------------------------------------------------------------------------------------------------------


def masked(module, x, mask):
    return module(x, mask=mask)


def state_of(module):
    return {"mean": module.mean[...], "var": module.var[...]}


@pytest.mark.parametrize("check_vma", [True, False])
def test_nnx_shard_map(check_vma, rng):
    """The module goes in whole, and its statistics come out moved, the same on every device."""
    case, given = whole_batch("batch_norm", rng)
    module = nnx_module(case, given, axis_name="d")
    specs = {"in_specs": (P(), P("d"), P("d")), "out_specs": P("d"), "check_vma": check_vma}
    y = nnx.jit(nnx.shard_map(masked, mesh=mesh_of(), **specs))(module, given["x"], given["mask"])
    cases.check_value(case, given, y, state_of(module))


def test_nnx_pmap(rng):
    case, given = whole_batch("batch_norm", rng)
    module = nnx_module(case, given, axis_name="d")
    pieces = [given[k].reshape(8, 2, *given[k].shape[1:]) for k in ("x", "mask")]
    y = nnx.pmap(masked, in_axes=(None, 0, 0), axis_name="d")(module, *pieces)
    cases.check_value(case, given, np.asarray(y).reshape(SHAPE), state_of(module))


def test_nnx_jit_over_sharded_arrays(rng):
    case, given = whole_batch("batch_norm", rng)
    module = nnx_module(case, given)
    x, mask = (jax.device_put(given[k], NamedSharding(mesh_of(), P("d"))) for k in ("x", "mask"))
    y = nnx.jit(masked)(module, x, mask)
    cases.check_value(case, given, y, state_of(module))
    assert len(y.sharding.device_set) == 8


# --- collectives --------------------------------------------------------------------------------------------------------------

CASE = replace(BY_NAME["batch_norm"], shape=(16, 8, 4, 6))
SUMMED = {"x": P("d"), "scale": P(), "bias": P()}


@each_api
def test_one_collective_forward(api):
    program = sharded_program(lambda g: APIS[api](CASE, g, axis_name="d"), cases.inputs(CASE), True, (P("d"), P()))
    assert len(kinds(program)) == 1, kinds(program)


@each_api
@pytest.mark.parametrize("check_vma", [True, False])
def test_one_collective_each_way(api, check_vma, rng):
    """Unchecked, the gradients of scale and bias are left for the caller to sum."""
    given = cases.inputs(CASE, mask=distributed.uneven(rng, CASE.shape))
    out = (P("d"), P(), SUMMED if check_vma else dict.fromkeys(SUMMED, P("d")))
    program = sharded_program(value_and_gradients(api, CASE, axis_name="d"), given, check_vma, out)
    assert kinds(program) == ["all-gather", "all-reduce"]


@each_api
def test_sharded_arrays_one_collective_each_way(api):
    program = auto_program(value_and_gradients(api, CASE), cases.inputs(CASE))
    assert len(kinds(program)) == 2, kinds(program)
    assert all(size < int(np.prod(CASE.shape)) // 8 for _, size in collectives(program))  # x does not travel


@each_api
def test_no_collective_in_evaluation(api):
    case = replace(BY_NAME["batch_norm_evaluate"], shape=SHAPE)
    program = sharded_program(lambda g: APIS[api](case, g, axis_name="d"), cases.inputs(case), True, (P("d"), P()))
    assert kinds(program) == []


def initialize_linen(x):
    return jnn.BatchNorm(False, axis_name="d").init(jax.random.PRNGKey(0), x)


def initialize_nnx(x):
    return nnx.to_pure_dict(nnx.state(jnx.BatchNorm(6, axis_name="d", rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("initialize", [initialize_linen, initialize_nnx])
@pytest.mark.parametrize("check_vma", [True, False])
def test_nothing_collective_in_initialization(initialize, check_vma):
    """Also where the axis exists; and what comes of it is the same on every device, as its type says."""
    x = cases.inputs(replace(CASE, shape=SHAPE))["x"]
    run = jax.jit(jax.shard_map(initialize, mesh=mesh_of(), in_specs=P("d"), out_specs=P(), check_vma=check_vma))
    assert kinds(run.lower(x).compile()) == []
    outside = jax.jit(initialize)(x)
    jax.tree.map(np.testing.assert_array_equal, run(x), outside)


# --- one example alone, whose batch is a mapped axis ------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [cases.call, *APIS.values()], ids=["function", *APIS])
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_evaluate"])
def test_examples_without_a_batch_axis(name, through):
    """vmap over examples of shape (C,), all axes of which are features: the running statistics are of the batch too."""
    case = replace(BY_NAME[name], shape=(12, 6), features=(1,), kept={1: 1})
    given = cases.inputs(case, shape=(12, 6))

    @jax.jit
    def batch(given):
        inner, rest = cases.split(case, given)

        def examples(inner):
            def one(x):
                return through(case, inner | rest | {"x": x}, axis_name="d")

            return jax.vmap(one, out_axes=(0, None), axis_name="d")(inner["x"])

        y, vjp, state = jax.vjp(examples, inner, has_aux=True)
        return y, state, vjp(given["dy"])[0]

    check(case, given, *batch(given))
