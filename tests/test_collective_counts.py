"""How many collectives the programs have, and of how many bytes: for every option, norm and way over devices of the guide's tables.

What is expected is (kind, numbers that each device sends), in the dtype of the statistics.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import test_docs
from case import LEAKY_OUTPUT, OUTPUT
from cases import BY_NAME, replace
from distributed import mesh_of
from jnorm import _stats
from test_collectives import auto_program, kinds, sharded_program, traffic

C = 6
SHAPE = (16, 2, 1, C)
MODES = ["checked", "unchecked", "pmap"]
INTERLEAVED = [[0, 2, 4, 6], [1, 3, 5, 7]]
WHOLE, BATCH, HEIGHT = P(), P("d"), P(None, "d")


def gather(numbers):
    return ("all-gather", numbers)


def reduce(numbers):
    return ("all-reduce", numbers)


def check(program, expected, itemsize=4, participants=8):
    """The collectives of a program are the expected ones, and no others."""
    assert traffic(program, participants) == sorted((kind, itemsize * numbers) for kind, numbers in expected)


def local_step(case, **options):
    """y, the state as that of one device, and the gradients."""
    step = cases.value_and_gradients(case, **options)

    def run(given):
        y, state, gradients = step(given)
        return y, jax.tree.map(lambda a: a[None], state), gradients

    return run


def mapped(case, given, check_vma, mesh, spec, parameter_spec=WHOLE, **options):
    """The training step over the devices of a mesh. Unchecked, the gradients of the parameters are each device's own part."""
    where = {k: parameter_spec if k in distributed.PARAMETERS else s for k, s in distributed.specs(given, spec).items()}
    gradients = {k: where[k] for k in case.differentiable}
    out = (spec, P(mesh.axis_names), gradients)
    run = jax.shard_map(local_step(case, **options), mesh=mesh, in_specs=(where,), out_specs=out, check_vma=check_vma)
    return jax.jit(run)


def step(case, given, mode, spec=BATCH, parameter_spec=WHOLE, **options):
    """The compiled program of a training step over eight devices."""
    if mode == "pmap":
        pieces, axes = distributed.cut(given, 8)
        return jax.pmap(cases.value_and_gradients(case, axis_name="d", **options), "d", in_axes=(axes,)).lower(pieces).compile()
    return mapped(case, given, mode == "checked", mesh_of(), spec, parameter_spec, axis_name="d", **options).lower(given).compile()


def rotated(rows, rare=()):
    """Every row with one of the modes by default, but for rare ones, and with all of them in the full run."""
    slow = pytest.mark.slow
    both = [(row, mode, row in rare or i % 3 != j) for i, row in enumerate(rows) for j, mode in enumerate(MODES)]
    return [pytest.param(row, mode, marks=[slow] if rest else [], id=f"{row}-{mode}") for row, mode, rest in both]


# --- batch_norm: every option -------------------------------------------------------------------------------------------------


def batch_norm(**changes):
    return replace(BY_NAME["batch_norm"], shape=SHAPE, **changes)


def with_options(**options):
    return batch_norm(options=options)


OPTIONS = {
    "plain": batch_norm(),
    "mask": batch_norm(mask=(16, 1, 1, 1)),
    "mask by element": batch_norm(mask=SHAPE),
    "residual": batch_norm(residual=True),
    "relu and residual": batch_norm(options={"activation": "relu"}, residual=True),
    **{act: with_options(activation=act) for act in ("relu", "leaky_relu", "silu", "gelu")},
    "callable": with_options(activation=jnp.tanh),
    "output": with_options(**OUTPUT),
    "output of leaky_relu": with_options(**LEAKY_OUTPUT),
    "debiased": batch_norm(state="count"),
    "cumulative": batch_norm(state="count", options={"momentum": None}),
    "unbiased variance": with_options(running_var_correction=1),
    "no update": with_options(update_running=False),
    "no affine": batch_norm(affine=()),
    "scale alone": batch_norm(affine=("scale",)),
    "bias alone": batch_norm(affine=("bias",)),
    "y in bfloat16": with_options(dtype=jnp.bfloat16),
    "second axis": replace(BY_NAME["batch_norm_channels_first"], shape=(16, C, 2, 1)),
}
RARE = ("mask by element", "residual", "unbiased variance", "no update", "scale alone", "bias alone")


@pytest.mark.parametrize(("option", "mode"), rotated(list(OPTIONS), RARE))
def test_options(option, mode):
    case = OPTIONS[option]
    given = cases.inputs(case)
    if option == "y in bfloat16":
        given["dy"] = given["dy"].astype(jnp.bfloat16)
    check(step(case, given, mode), [gather(4 * C), reduce(2 * C)])


@pytest.mark.parametrize("mode", ["checked", pytest.param("unchecked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(dtype, mode, request):
    """Statistics are in float32 at least."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    case = batch_norm()
    given = cases.inputs(case, dtype=dtype)
    check(step(case, given, mode), [gather(4 * C), reduce(2 * C)], itemsize=8 if dtype == "float64" else 4)


@pytest.mark.parametrize("mode", ["checked", pytest.param("unchecked", marks=pytest.mark.slow)])
def test_features_on_two_axes(mode):
    case = replace(BY_NAME["batch_norm_two_features"], shape=(16, 2, 1, C))
    check(step(case, cases.inputs(case), mode), [gather(4 * 2 * C), reduce(2 * 2 * C)])


@pytest.mark.parametrize("mode", ["unchecked", pytest.param("checked", marks=pytest.mark.slow)])
def test_complex(mode):
    """Two numbers for one."""
    case = batch_norm()
    given = cases.inputs(case, dtype="complex64")
    given["state"]["mean"] = given["state"]["mean"].astype(np.complex64)
    check(step(case, given, mode), [gather(4 * 2 * C), reduce(2 * 2 * C)])


@pytest.mark.parametrize("mode", ["checked", "unchecked"])
def test_several_names(mode):
    case = batch_norm()
    given = cases.inputs(case)
    run = mapped(case, given, mode == "checked", mesh_of((2, 4), ("a", "b")), P(("a", "b")), axis_name=("a", "b"))
    check(run.lower(given).compile(), [gather(4 * C), reduce(2 * C)])


@pytest.mark.parametrize("mode", ["unchecked", "pmap"])
def test_groups(mode):
    case = batch_norm()
    check(step(case, cases.inputs(case), mode, axis_index_groups=INTERLEAVED), [gather(4 * C), reduce(2 * C)], participants=4)


def test_groups_where_types_are_tracked():
    """JAX's collectives take no groups there: everybody's statistics are gathered, and sums go through one slot for each group.

    In the same all-reduce JAX sums the gradients of scale and bias, over both groups.
    """
    case = batch_norm()
    check(step(case, cases.inputs(case), "checked", axis_index_groups=INTERLEAVED), [gather(4 * C), reduce(2 * 2 * C + 2 * C)])


@pytest.mark.parametrize("mode", MODES)
def test_evaluation(mode):
    """Of scale and bias JAX sums the gradients, where it does."""
    case = with_options(use_running_average=True)
    check(step(case, cases.inputs(case), mode), [reduce(2 * C)] if mode == "checked" else [])


@pytest.mark.parametrize(
    "mode", ["unchecked", pytest.param("pmap", marks=pytest.mark.slow), pytest.param("checked", marks=pytest.mark.slow)]
)
def test_evaluation_that_updates(mode):
    case = with_options(use_running_average=True, update_running=True)
    check(step(case, cases.inputs(case), mode), [gather(4 * C)] + ([reduce(2 * C)] if mode == "checked" else []))


# --- the family -----------------------------------------------------------------------------------------------------------------


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
    return Row(case, [gather(4 * 2)], [reduce(2 * 2)], HEIGHT, checked=[gather(4 * 2), reduce(2 * 2 + 2 * C)])


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


# --- ways over devices -------------------------------------------------------------------------------------------------------------


def test_sharded_arrays():
    case = batch_norm()
    check(auto_program(cases.value_and_gradients(case), cases.inputs(case)), [gather(4 * C), reduce(2 * C)])


def explicit_program(case):
    given = cases.inputs(case)
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))):
        placed = {k: v if k in distributed.WHOLE else jax.device_put(v, P("d")) for k, v in given.items()}
        return jax.jit(cases.value_and_gradients(case)).lower(placed).compile()


def test_an_explicit_mesh():
    check(explicit_program(batch_norm()), [gather(4 * C), reduce(2 * C)])


def test_evaluation_over_sharded_arrays():
    case = with_options(use_running_average=True)
    assert kinds(auto_program(functools.partial(cases.call, case), cases.inputs(case))) == []


@pytest.mark.parametrize("way", ["checked", "pmap", "sharded"])
def test_two_all_reduces_forward(way, monkeypatch):
    """What is done for more participants than the limit, with the limit below eight."""
    monkeypatch.setattr(_stats, "GATHER_LIMIT", 7)
    case = batch_norm()
    given = cases.inputs(case)
    program = auto_program(cases.value_and_gradients(case), given) if way == "sharded" else step(case, given, way)
    check(program, 3 * [reduce(2 * C)])


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


# --- networks: 2L collectives for L norms ------------------------------------------------------------------------------------------

LAYERS = 3
X = np.random.default_rng(0).normal(size=(16, C)).astype(np.float32)


class Functional:
    """Dense layers with a norm after each. `run(parameters, x)` gives (y, the new state)."""

    def __init__(self, axis_name):
        self.options = {"axis_name": axis_name, "activation": "relu"}

    def parameters(self):
        layer = {"kernel": np.eye(C, dtype=np.float32), "scale": np.ones(C, np.float32), "bias": np.zeros(C, np.float32)}
        return LAYERS * [layer]

    def run(self, parameters, x):
        states = []
        for layer in parameters:
            x, state = jnorm.batch_norm(x @ layer["kernel"], STATE, layer["scale"], layer["bias"], **self.options)
            states.append(state)
        return x, states


class LinenNetwork(nn.Module):
    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = nn.relu(jnn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(nn.Dense(C)(x)))
        return x


class Linen:
    def __init__(self, axis_name):
        self.network = LinenNetwork(axis_name)
        self.variables = jax.tree.map(np.asarray, self.network.init(jax.random.key(0), X))

    def parameters(self):
        return self.variables["params"]

    def run(self, parameters, x):
        variables = {"params": parameters, "batch_stats": self.variables["batch_stats"]}
        return self.network.apply(variables, x, mutable=["batch_stats"])


class NNXNetwork(nnx.Module):
    def __init__(self, axis_name, rngs):
        self.layers = nnx.List([nnx.Linear(C, C, rngs=rngs) for _ in range(LAYERS)])
        self.norms = nnx.List([jnx.BatchNorm(C, axis_name=axis_name, rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return x


class NNX:
    def __init__(self, axis_name):
        self.graph, parameters, self.rest = nnx.split(NNXNetwork(axis_name, nnx.Rngs(0)), nnx.Param, ...)
        self.held = parameters

    def parameters(self):
        return self.held

    def run(self, parameters, x):
        network = nnx.merge(self.graph, parameters, self.rest, copy=True)
        return network(x), nnx.state(network, nnx.BatchStat)


APIS = {"functional": Functional, "linen": Linen, "nnx": NNX}


@pytest.mark.parametrize("api", APIS)
def test_twice_the_layers(api):
    """A training step of a network with L norms, whose gradients the caller sums: 2L collectives."""
    network = APIS[api]("d")

    def local(parameters, x):
        def loss(parameters, x):
            y, state = network.run(parameters, x)
            return (y**2).sum(), state

        (_, state), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
        return state, gradients

    specs = {"in_specs": (P(), P("d")), "out_specs": (P(), (P(), P("d"))), "check_vma": False}
    program = jax.jit(jax.shard_map(local, mesh=mesh_of(), **specs)).lower(network.parameters(), X).compile()
    check(program, LAYERS * [gather(4 * C), reduce(2 * C)])


@pytest.mark.parametrize("api", ["functional", pytest.param("linen", marks=pytest.mark.slow), pytest.param("nnx", marks=pytest.mark.slow)])
def test_twice_the_layers_over_sharded_arrays(api):
    """Here the gradient of x, which needs no sum of its own."""
    network = APIS[api](None)

    def run(given):
        return jax.grad(lambda x: (network.run(network.parameters(), x)[0] ** 2).sum())(given["x"])

    check(auto_program(run, {"x": X}), LAYERS * [gather(4 * C), reduce(2 * C)])


def test_the_guide():
    """What its code counts and computes is what it says."""
    names, text = (test_docs.run("guide/collectives.md"), test_docs.text_of("guide/collectives.md"))
    assert len(names["printed"]) == 1 + 3 * 9
    assert all(line in text for line in names["printed"])
    assert [kind for kind, _ in names["counted"]] == ["all-gather", "all-reduce"]
