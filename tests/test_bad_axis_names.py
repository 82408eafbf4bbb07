"""Named axes that cannot be: unbound, of JAX's unsupported kind, or divided into groups that do not fit."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jnorm
from distributed import mesh_of
from jnorm import reparam, tools
from refusals import NORMS, STATE, X, refuses

FIT = jnorm.eval_norm_fit_state(6)
MEAN = {"mean": STATE["mean"]}
# Every function that takes an axis name, of x and options.
FUNCTIONS = NORMS | {
    "accumulated_moments": lambda x, **kw: jnorm.accumulated_moments(lambda x: x, x, (0, 1), **kw),
    "divisive_batch_norm": lambda x, **kw: jnorm.divisive_batch_norm(x, STATE, **kw)[0],
    "divisive_norm": lambda x, **kw: jnorm.divisive_norm(x, sum_field=(1, None, None, 1), **kw)[0],
    "eval_norm_fit": lambda x, **kw: jnorm.eval_norm_fit(x, STATE, FIT, **kw),
    "feature_statistics": lambda x, **kw: jnorm.feature_statistics(x, jnorm.feature_statistics_state(6), **kw),
    "mean_only_batch_norm": lambda x, **kw: jnorm.mean_only_batch_norm(x, MEAN, **kw)[0],
    "moments": lambda x, **kw: jnorm.moments(x, (0, 1, 2), **kw),
    "normalize": lambda x, **kw: jnorm.normalize(x, centered, (), reduction_axes=(0, 1, 2), feature_axes=-1, **kw)[0],
    "sync_state": lambda x, **kw: tools.sync_state(STATE, **kw),
    "weight_norm_data_init": reparam.weight_norm_data_init,
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def centered(stats, aux):
    return stats.offset, jnp.ones_like(stats.offset), jnp.zeros_like(stats.offset)


def trace(f, *args):
    """Without running it: mistakes are told while JAX traces."""
    return jax.eval_shape(f, *args)


def test_every_function_with_an_axis_name_is_here():
    public = [(n, getattr(module, n)) for module in (jnorm, reparam, tools) for n in module.__all__]
    assert {n for n, f in public if inspect.isfunction(f) and "axis_name" in inspect.signature(f).parameters} == set(FUNCTIONS)


@each_function
def test_they_work_where_the_axis_is_bound(name):
    """So that what is refused below is refused for its axis."""
    run = functools.partial(FUNCTIONS[name], axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    trace(jax.vmap(run, axis_name="batch"), np.stack([X] * 4))


@each_function
def test_axis_name_that_is_not_bound(name):
    with refuses("axis_name", "'batch'", "(bound: none)"):
        trace(functools.partial(FUNCTIONS[name], axis_name="batch"), X)


@each_function
def test_axis_name_that_is_not_bound_says_which_are(name):
    with refuses("axis_name", "'bacth'", "'batch'"):
        trace(jax.vmap(functools.partial(FUNCTIONS[name], axis_name="bacth"), axis_name="batch"), X[None])


@each_function
def test_axis_of_a_mesh_that_the_compiler_partitions_over(name):
    """It exists, but not as a named axis: under jit statistics are global."""
    with jax.set_mesh(mesh_of()), refuses("'d' is not bound", "mesh", "global without", "Leave it out", "shard_map"):
        trace(jax.jit(functools.partial(FUNCTIONS[name], axis_name="d")), X)


@each_function
def test_axis_index_groups_without_axis_name(name):
    call = FUNCTIONS[name] if name != "sync_state" else functools.partial(FUNCTIONS[name], axis_name=None)
    with refuses("axis_index_groups", "axis_name"):
        trace(functools.partial(call, axis_index_groups=[[0, 1], [2, 3]]), X)


@each_function
def test_axis_index_groups_that_do_not_fit(name):
    run = functools.partial(FUNCTIONS[name], axis_name="batch", axis_index_groups=[[0, 1], [2]])
    with refuses("axis_index_groups", "every index", "'batch'", "0 to 3"):
        trace(jax.vmap(run, axis_name="batch"), np.stack([X] * 4))


EVALUATED = ["batch_norm", "batch_renorm", "cross_mini_batch_norm", "divisive_batch_norm", "ghost_batch_norm", "mean_only_batch_norm"]


@pytest.mark.parametrize("name", [*EVALUATED, "cross_iteration_batch_norm", "tracked_instance_norm"])
def test_evaluation_merges_nothing_and_needs_no_axis(name):
    """A model that was trained on many devices is evaluated on one, by the same call."""
    y = FUNCTIONS[name](X, use_running_average=True, axis_name="nowhere", axis_index_groups=[[0, 1], [2, 3]])
    np.testing.assert_array_equal(y, FUNCTIONS[name](X, use_running_average=True))
    with refuses("'nowhere' is not bound"):
        FUNCTIONS[name](X, use_running_average=True, update_running=True, axis_name="nowhere")


# --- names --------------------------------------------------------------------------------------------------------------------------


def named(axis_name, **options):
    return trace(jax.vmap(lambda x: NORMS["batch_norm"](x, axis_name=axis_name, **options), axis_name="batch"), X)


@pytest.mark.parametrize("several", [list, tuple])
def test_names_as_a_list_or_a_tuple(several):
    named(several(["batch"]))
    named(several([]))  # none


@pytest.mark.parametrize("names", [("batch", "batch"), ["batch", "batch"]])
def test_a_name_twice(names):
    with refuses("axis_name", repr(names), "twice"):
        named(names)


@pytest.mark.parametrize("name", [{"batch"}, {"batch": 1}, np.ones(2), [["batch"]]])
def test_what_is_no_name(name):
    with refuses("axis_name", "a name or a tuple of names", "batch" if "batch" in str(name) else "1., 1.", kind=TypeError):
        named(name)


def test_the_axis_of_arrays_that_jit_has_sharded():
    """No axis is bound under jit, whatever the arrays are sharded over; the message says that none is needed."""
    x = jax.device_put(np.ones((8, 6), np.float32), NamedSharding(mesh_of(), P("d")))
    with refuses("'d' is not bound", "under jit over sharded arrays", "without it"):
        jax.jit(lambda x: NORMS["batch_norm"](x, axis_name="d"))(x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_axis_that_a_partly_manual_mesh_leaves_to_the_compiler(kind):
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto, kind))
    local = lambda x: NORMS["batch_norm"](x, axis_name=("d", "m"))  # noqa: E731
    with refuses("'m' is not bound", "mesh", "global without"):
        trace(jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})), np.ones((8, 6), np.float32))


def test_one_of_several_axis_names_is_not_bound():
    with refuses("axis_name", "'model'", "'batch'"):
        jax.vmap(lambda x: NORMS["layer_norm"](x, axis_name=("batch", "model")), axis_name="batch")(X)


def test_a_misspelled_axis_name_is_an_error_under_shard_map_too():
    run = jax.shard_map(lambda x: NORMS["batch_norm"](x, axis_name="e"), mesh=mesh_of(), in_specs=P("d"), out_specs=P("d"))
    with refuses("axis_name", "'e'", "'d'"):
        run(np.ones((8, 6), np.float32))


@pytest.mark.parametrize("norm", [NORMS["batch_norm"], NORMS["layer_norm"]], ids=["batch_norm", "layer_norm"])
def test_collective_over_a_vmap_axis_inside_shard_map_with_check_vma(norm):
    """JAX cannot: the message says what to do. With check_vma off it works."""

    def program(check_vma):
        lanes = jax.vmap(lambda x: norm(x, axis_name="lane"), axis_name="lane")
        return jax.shard_map(lanes, mesh=mesh_of(), in_specs=P(None, "d"), out_specs=P(None, "d"), check_vma=check_vma)

    x = np.random.default_rng(0).normal(size=(4, 16, 6)).astype(np.float32)
    with refuses("lane", "vmap", "check_vma"):
        program(True)(x)
    assert np.isfinite(jax.jit(program(False))(x)).all()


def grouped(groups, **options):
    return trace(jax.vmap(lambda x: NORMS["batch_norm"](x, axis_index_groups=groups, **options), axis_name="i"), X)


def test_axis_index_groups_with_several_names():
    with refuses("axis_index_groups", "axis_name"):
        jax.vmap(lambda x: grouped([[0, 1], [2, 3]], axis_name=("i", "j")), axis_name="j")(np.ones((2, 1)))


def test_axis_index_groups_with_no_name():
    with refuses("axis_index_groups", "single named axis", "()"):
        grouped([[0, 1], [2, 3]], axis_name=())


@pytest.mark.parametrize(
    "groups",
    [[[0, 1], [2]], [[0, 1], [2, 4]], [[0, 1], [1, 2]], [[0, 1]], [], [[]], [[-1, 0], [1, 2]], [[0, 1], [2, 3], [0, 1]], [[0, 0], [1, 2]]],
)
def test_axis_index_groups_that_do_not_cover_the_axis(groups):
    with refuses("axis_index_groups", "every index", "(0 to 3) once", str(tuple(map(tuple, groups)))):
        grouped(groups, axis_name="i")


@pytest.mark.parametrize("groups", [[[0, 1, 2], [3]], [[0, 1, 2, 3], []]])
def test_axis_index_groups_of_unequal_size(groups):
    with refuses("axis_index_groups", "equal", str([len(g) for g in groups])):
        grouped(groups, axis_name="i")


@pytest.mark.parametrize(
    "groups", [[0, 1, 2, 3], 2, [[0.0, 1.0], [2.0, 3.0]], [[0.5, 1], [2, 3]], "0123", [["0", "1"], ["2", "3"]], [[0, 1], None]]
)
def test_axis_index_groups_that_are_no_groups_of_ints(groups):
    with refuses("axis_index_groups", "[[0, 1], [2, 3]]", repr(groups), kind=TypeError):
        grouped(groups, axis_name="i")


def test_axis_index_groups_as_arrays():
    grouped(np.arange(4).reshape(2, 2), axis_name="i")
    grouped([range(2), range(2, 4)], axis_name="i")


def test_an_axis_of_both_samples_and_batch():
    """Of `tracked_instance_norm`: what splits the samples does not split the batch."""

    def norm(x):
        return jnorm.tracked_instance_norm(x, jnorm.batch_norm_state(6), axis_name="i", batch_axis_name=("i",))

    with refuses("axis_name='i'", "batch_axis_name=('i',)"):
        jax.vmap(norm, axis_name="i")(np.ones((2, 2, 3, 6), np.float32))


def test_a_batch_axis_name_that_is_not_bound():
    with refuses("batch_axis_name", "'nowhere'"):
        jnorm.tracked_instance_norm(np.ones((2, 3, 6), np.float32), jnorm.batch_norm_state(6), batch_axis_name="nowhere")


# --- masks --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [P(), P("d"), P(None, "d"), P(None, None, None, "d")])
def test_a_mask_that_is_sharded_otherwise_than_x(spec):
    """Under jit it is one array, wherever it lies."""
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(8, 8, 2, 8)).astype(np.float32), rng.uniform(size=(8, 8, 2, 8)) < 0.6
    state = jnorm.batch_norm_state(8)
    run = jax.jit(lambda x, mask: jnorm.batch_norm(x, state, mask=mask, momentum=0.0)[1])
    got = run(jax.device_put(x, NamedSharding(mesh_of(), P("d"))), jax.device_put(mask, NamedSharding(mesh_of(), spec)))
    counted = [x[..., c][mask[..., c]].astype(np.float64) for c in range(8)]
    np.testing.assert_allclose(got["mean"], [v.mean() for v in counted], atol=1e-6)
    np.testing.assert_allclose(got["var"], [v.var() for v in counted], rtol=1e-5)
