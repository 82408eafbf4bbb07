"""Named axes that cannot be: unbound, of JAX's unsupported kind, or divided into groups that do not fit."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distributed import mesh_of
from refusals import NORMS, X, each_norm, refuses


@each_norm
def test_axis_name_that_is_not_bound(norm):
    with refuses("axis_name", "'batch'"):
        norm(X, axis_name="batch")


def test_axis_name_that_is_not_bound_says_which_are():
    with refuses("axis_name", "'bacth'", "'batch'"):
        jax.vmap(lambda x: NORMS["batch_norm"](x, axis_name="bacth"), axis_name="batch")(X)


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
    return jax.vmap(lambda x: NORMS["batch_norm"](x, axis_index_groups=groups, **options), axis_name="i")(X)


def test_axis_index_groups_without_axis_name():
    with refuses("axis_index_groups", "axis_name"):
        grouped([[0, 1], [2, 3]])


def test_axis_index_groups_with_several_names():
    with refuses("axis_index_groups", "axis_name"):
        jax.vmap(lambda x: grouped([[0, 1], [2, 3]], axis_name=("i", "j")), axis_name="j")(np.ones((2, 1)))


@pytest.mark.parametrize("groups", [[[0, 1], [2]], [[0, 1], [2, 4]], [[0, 1], [1, 2]], [[0, 1]], []])
def test_axis_index_groups_that_do_not_cover_the_axis(groups):
    with refuses("axis_index_groups"):
        grouped(groups, axis_name="i")


def test_axis_index_groups_of_unequal_size():
    with refuses("axis_index_groups", "equal"):
        grouped([[0, 1, 2], [3]], axis_name="i")
