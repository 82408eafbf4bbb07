"""How many collectives the programs of every norm have, and of how many bytes, on eight devices and on more than there are."""

import functools
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
from cases import BY_NAME, replace
from counting import BATCH, HEIGHT, SHAPE, WHOLE, C, check, gather, mapped, reduce, rotated, step
from distributed import mesh_of
from test_collectives import sharded_program, traffic


class Row(NamedTuple):
    """A row of the guide's table. The compiler merges all-reduces that do not need each other, as of an update and of gradients."""

    case: cases.Case
    forward: list
    backward: list
    spec: P = BATCH
    parameter_spec: P = WHOLE
    step: list | None = None
    """The compiled step, where it is not forward + backward."""
    checked: list | None = None
    """The same where types are tracked, in which JAX sums the gradients of the parameters."""

    def expected(self, mode):
        found = self.checked if mode == "checked" and self.checked is not None else self.step
        return self.forward + self.backward if found is None else found


def batched(name, **changes):
    return Row(replace(BY_NAME[name], shape=SHAPE), [gather(4 * C)], [reduce(2 * C)])._replace(**changes)


def samples(name, **changes):
    """Norms of a sample whose rows are spread over the devices."""
    case = replace(BY_NAME[name], shape=(2, 16, 1, C), **changes)
    return Row(case, [gather(4 * 2 * C)], [reduce(2 * 2 * C)], HEIGHT)


def whole_samples(name):
    """One statistic for each of two samples; scale and bias lie along what is reduced, so that their gradients are sums of their own."""
    case = replace(BY_NAME[name], shape=(2, 16, 1, C))
    return Row(case, [gather(4 * 2)], [reduce(2 * 2)], HEIGHT, checked=[gather(4 * 2), reduce(2 * 2 + len(case.affine) * C)])


def features(name):
    """Each device has a part of each of four rows, and of scale and bias."""
    case = replace(BY_NAME[name], shape=(4, 16), kept={0: 1}, features=(1,))
    return Row(case, [gather(4 * 4)], [reduce(2 * 4)], HEIGHT, parameter_spec=BATCH)


KERNEL = 4 + 4 * C  # of cross_iteration_batch_norm's cases: a patch, and as much for each output
NORMS = {
    "batch_norm": batched("batch_norm"),
    "batch_renorm": batched("batch_renorm"),
    "mean_only_batch_norm": batched("mean_only_batch_norm"),
    "cross_mini_batch_norm": batched("cross_mini_batch_norm"),
    "cross_iteration_batch_norm": batched(
        "cross_iteration_batch_norm", forward=[gather(4 * C), reduce(KERNEL)], step=[gather(4 * C), reduce(KERNEL + 2 * C)]
    ),
    "divisive_batch_norm": batched("divisive_batch_norm"),
    "ghost_batch_norm": batched("ghost_batch_norm", forward=[reduce(3 * C)], backward=[], checked=[reduce(3 * C + 2 * C)]),
    "layer_norm": features("layer_norm"),
    "rms_norm": features("rms_norm"),
    "add_layer_norm": features("add_layer_norm"),
    "add_rms_norm": features("add_rms_norm"),
    "layer_norm of samples": whole_samples("layer_norm_samples"),
    "group_norm": samples("group_norm"),
    "instance_norm": samples("instance_norm"),
    "tracked_instance_norm": samples("tracked_instance_norm"),
    "filter_response_norm": samples("filter_response_norm"),
    "eval_norm": samples("eval_norm"),
    "divisive_norm": whole_samples("divisive_norm_samples"),
}


@pytest.mark.parametrize(("norm", "mode"), rotated(list(NORMS)))
def test_norms(norm, mode):
    row = NORMS[norm]
    given = cases.inputs(row.case)
    if mode == "pmap" and row.spec != BATCH:
        mode = "unchecked"
    check(step(row.case, given, mode, row.spec, row.parameter_spec), row.expected(mode))


STATE = {"mean": np.zeros(C, np.float32), "var": np.ones(C, np.float32)}


def moments(x):
    return jnorm.moments(x, (0, 1, 2), axis_name="d")


def feature_statistics(x):
    return jnorm.feature_statistics(x, jnorm.feature_statistics_state(C), axis_name="d")


def eval_norm_fit(x):
    return jnorm.eval_norm_fit(x, STATE, jnorm.eval_norm_fit_state(C), axis_name="d")


def data_init(x):
    return jnorm.reparam.weight_norm_data_init(x, axis_name="d")[:2]


OTHERS = {
    moments: [gather(4 * C)],
    feature_statistics: [gather(4 * C)],
    eval_norm_fit: [gather(4 * C), reduce(4 * C)],
    data_init: [gather(4 * C)],
}


@pytest.mark.parametrize("function", OTHERS, ids=lambda f: f.__name__)
def test_statistics_alone(function):
    x = {"x": np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)}
    check(sharded_program(lambda g: function(g["x"]), x, True, P()), OTHERS[function])


@pytest.mark.parametrize("check_vma", [True, False])
def test_derivative_of_moments(check_vma):
    """Where types are tracked, a function of the statistics alone is everybody's, and so is its derivative by them."""
    x = {"x": np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)}
    run = jax.grad(lambda g: (moments(g["x"]).var ** 2).sum())
    check(sharded_program(run, x, check_vma, {"x": P("d")}), [gather(4 * C)] + ([] if check_vma else [reduce(2 * C)]))


@pytest.mark.parametrize("mode", ["checked", "unchecked"])
def test_the_magnitude_of_divisive_batch_norm(mode):
    """A penalty on it sums two numbers, and takes the same statistics: they are gathered once."""
    given = cases.inputs(replace(BY_NAME["divisive_batch_norm"], shape=SHAPE))

    def loss(x, given):
        y, _, l1 = jnorm.divisive_batch_norm(x, given["state"], given["scale"], given["bias"], sigma=1.0, axis_name="d")
        return (y * given["dy"]).sum() + l1

    where = distributed.specs(given, P("d"))
    run = jax.shard_map(
        lambda g: jax.grad(loss)(g["x"], g), mesh=mesh_of(), in_specs=(where,), out_specs=P("d"), check_vma=mode == "checked"
    )
    found = traffic(jax.jit(run).lower(given).compile())
    assert found[0] == ("all-gather", 4 * 4 * C)
    assert {kind for kind, _ in found[1:]} == {"all-reduce"} and sum(size for _, size in found[1:]) <= 4 * (4 * C + 5)


# --- more devices than there are: collectives as JAX calls them --------------------------------------------------------------------

CALLS = {"all_gather": "all-gather", "all_gather_invariant": "all-gather", "psum": "all-reduce", "psum_invariant": "all-reduce"}


def called(jaxpr):
    """-> [(kind, numbers that each device sends)], sorted."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CALLS:
            found.append((CALLS[eqn.primitive.name], sum(v.aval.size for v in eqn.invars)))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += called(inner)
    return sorted(found)


@functools.cache
def traced(norm, devices, check_vma=True):
    """The calls of a training step on that many devices."""
    row = NORMS[norm]
    axis = row.spec.index("d")
    shape = tuple(2 * devices if i == axis else n for i, n in enumerate(row.case.shape))
    given = cases.inputs(replace(row.case, shape=shape))
    mesh = AbstractMesh((devices,), ("d",))
    run = mapped(row.case, given, check_vma, mesh, row.spec, row.parameter_spec, axis_name="d")
    return called(jax.make_jaxpr(run)(given).jaxpr)


@pytest.mark.parametrize("devices", [64, 65, 512, 4096])
def test_the_limit(devices):
    """One all-gather up to 64 devices, two all-reduces above; backward one all-reduce."""
    want = [gather(4 * C), reduce(2 * C)] if devices <= 64 else 3 * [reduce(2 * C)]
    assert traced("batch_norm", devices) == sorted(want)


def merging(devices, features, dtype, check_vma=True, groups=None):
    """The calls of a merge of so many statistics."""
    x = jax.ShapeDtypeStruct((devices, features), dtype)
    local = functools.partial(jnorm.moments, reduction_axes=0, axis_name="d", axis_index_groups=groups)
    out = BATCH if groups else WHOLE
    run = jax.shard_map(
        lambda x: local(x).m2[None], mesh=AbstractMesh((devices,), ("d",)), in_specs=BATCH, out_specs=out, check_vma=check_vma
    )
    return called(jax.make_jaxpr(run)(x).jaxpr)


@pytest.mark.parametrize(("devices", "features"), [(64, 4096), (8, 2**15)])
def test_the_limit_of_what_is_received(devices, features):
    """4 MiB, of 16 bytes for each participant and feature."""
    assert merging(devices, features, jnp.float32) == [gather(4 * features)]
    assert merging(devices, features + 1, jnp.float32) == 2 * [reduce(2 * (features + 1))]


def test_the_limit_in_float64(x64):
    assert merging(64, 2048, jnp.float64) == [gather(4 * 2048)]
    assert merging(64, 2049, jnp.float64) == 2 * [reduce(2 * 2049)]


def test_groups_on_more_than_64_devices():
    """Groups of eight gather eight where JAX takes groups; where it does not, all would be gathered, and slots are summed instead."""
    groups = np.arange(128).reshape(16, 8).tolist()
    assert merging(128, C, jnp.float32, check_vma=False, groups=groups) == [gather(4 * C)]
    assert merging(128, C, jnp.float32, check_vma=True, groups=groups) == 2 * [reduce(16 * 2 * C)]


@pytest.mark.parametrize("norm", [norm for norm in NORMS if not norm.startswith("divisive")])  # what they give beside y is traced too
def test_norms_on_more_than_64_devices(norm):
    row = NORMS[norm]
    forward = [pair for kind, n in row.forward for pair in ([(kind, n)] if kind == "all-reduce" else 2 * [reduce(n // 2)])]
    assert traced(norm, 65, check_vma=False) == sorted(forward + row.backward)
