"""How many collectives the programs of batch normalization have, and of how many bytes: every option, every way over devices, networks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import test_docs
from case import LEAKY_OUTPUT, OUTPUT
from cases import BY_NAME, replace
from counting import MODES, SHAPE, C, batch_norm, check, gather, mapped, reduce, rotated, step, with_options
from distributed import mesh_of
from jnorm import _stats
from test_collectives import auto_program, kinds

INTERLEAVED = [[0, 2, 4, 6], [1, 3, 5, 7]]
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


# --- networks: 2L collectives for L norms ------------------------------------------------------------------------------------------

LAYERS = 3
STATE = {"mean": np.zeros(C, np.float32), "var": np.ones(C, np.float32)}
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
