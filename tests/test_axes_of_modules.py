"""Every module with an axis name, in both APIs: initialization and evaluation merge nothing and need no axis, training does."""

import inspect

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
from distributed import mesh_of
from refusals import refuses

X = np.random.default_rng(0).normal(size=(4, 2, 6)).astype(np.float32)
KEY = jax.random.key(0)
COLLECTIVES = ("psum", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter")
APIS = {"linen": jnn, "nnx": jnx}
# What a class needs beside its defaults, of the constructor and of a call that trains.
MADE = {
    "CrossMiniBatchNorm": {"num_mini_batches": 2},
    "DivisiveNorm": {"sum_field": (1, None, 1)},
    "EvalNorm": {"mean_weight": 0.5},
    "GhostBatchNorm": {"group_size": 2},
    "GroupNorm": {"num_groups": 3},
    "WeightNorm": {"scale_from": "data"},
}
CALLED = {"FeatureStandardization": {"fit": True}}
ADDS = ("AddLayerNorm", "AddRMSNorm")
# These wrap a layer. Weight normalization initializes from data, which is the one start that looks at a batch.
WRAPS = {"CrossIterationBatchNorm": False, "WeightNorm": True}


def takes(name, option):
    return option in inspect.signature(getattr(jnx, name).__init__).parameters


NAMES = [name for name in jnx.__all__ if takes(name, "axis_name")]
RUNNING = [name for name in NAMES if takes(name, "use_running_average")]
each = pytest.mark.parametrize(("api", "name"), [(api, name) for name in NAMES for api in APIS])
each_running = pytest.mark.parametrize(("api", "name"), [(api, name) for name in RUNNING for api in APIS])


def module_of(api, name, **options):
    options = MADE.get(name, {}) | options
    if name in RUNNING:
        options.setdefault("use_running_average", False)
    if api == "linen":
        return getattr(jnn, name)(*([nn.Dense(6, use_bias=WRAPS[name])] if name in WRAPS else []), **options)
    rngs = nnx.Rngs(0)
    first = nnx.Linear(6, 6, use_bias=WRAPS[name], rngs=rngs) if name in WRAPS else 6
    return getattr(jnx, name)(first, **options, rngs=rngs)


def inputs(name, x):
    return (x, x) if name in ADDS else (x,)


def initialize(api, name, x=X, **options):
    """Linen's variables, or NNX's module, of a class with these options."""
    module = module_of(api, name, **options)
    return module.init(KEY, *inputs(name, x)) if api == "linen" else nnx.state(module)


def call(api, name, x, start=None, called=None, **options):
    """What a call gives, and the statistics after it; `start`: Linen's variables."""
    called = CALLED.get(name, {}) if called is None else called
    module = module_of(api, name, **options)
    if api == "linen":
        return module.apply(start, *inputs(name, x), **called, mutable=["batch_stats"])
    if name == "WeightNorm":
        return module.initialize_from(x)
    return module(*inputs(name, x), **called), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def start_of(api, name, **options):
    """Variables from a module that knows no axis."""
    return initialize(api, name, **({"scale_from": "init"} | options if name == "WeightNorm" else options)) if api == "linen" else None


def found(program):
    return sorted({collective for collective in COLLECTIVES if collective in str(program)})


def in_the_axis(f, x):
    """The program of f on a part of x, in an axis "d" of eight devices."""
    specs = {"mesh": mesh_of(), "in_specs": jax.P("d"), "out_specs": jax.P(), "check_vma": False}
    return jax.make_jaxpr(jax.shard_map(f, **specs))(np.concatenate([x] * 8))


def starts_from_data(api, name):
    """In Linen the start is `init`; in NNX it is a method of its own, which is no construction."""
    return name == "WeightNorm" and api == "linen"


@each
@pytest.mark.parametrize("inside", [False, True])
def test_initialization_has_no_collective(api, name, inside):
    """Outside of the axis there is none to name."""
    program = lambda x: initialize(api, name, x, axis_name="d")  # noqa: E731
    if starts_from_data(api, name) and not inside:
        with refuses("WeightNorm", "'d' is not bound"):
            jax.eval_shape(program, X)
        return
    made = in_the_axis(program, X) if inside else jax.make_jaxpr(program)(X)
    assert bool(found(made)) == starts_from_data(api, name)


@each
def test_training_needs_the_axis(api, name):
    """And merges over it: a count of nothing above is no blindness."""
    if starts_from_data(api, name):
        return
    start = start_of(api, name)
    with refuses(name, "axis_name", "'bacth' is not bound", "(bound: 'd')"):
        in_the_axis(lambda x: call(api, name, x, start, axis_name="bacth"), X)
    with refuses(name, "axis_name", "'bacth' is not bound", "(bound: none)"):
        jax.eval_shape(lambda x: call(api, name, x, start, axis_name="bacth"), X)
    assert found(in_the_axis(lambda x: call(api, name, x, start, axis_name="d"), X))


@each_running
def test_evaluation_needs_no_axis(api, name):
    """With an axis that exists nowhere, nor its groups: the program of the same module without, and no collective inside of the axis."""
    start, evaluates = start_of(api, name), {"use_running_average": True}
    options = {"axis_name": "nowhere", "axis_index_groups": [[0, 1], [2, 3]]}
    one, two = (jax.make_jaxpr(lambda x, o=o: call(api, name, x, start, **evaluates, **o))(X) for o in (options, {}))
    assert str(one) == str(two)
    assert not found(in_the_axis(lambda x: call(api, name, x, start, **evaluates, axis_name="d"), X))


@each
def test_a_mistake_in_the_groups_names_the_module(api, name):
    if not takes(name, "axis_index_groups"):
        assert name == "WeightNorm"
        return
    start = start_of(api, name)
    with refuses(name, "axis_index_groups", "axis_name"):
        jax.eval_shape(lambda x: call(api, name, x, start, axis_index_groups=[[0, 1]]), X)
    with refuses(name, "axis_index_groups", "every index", "0 to 7"):
        in_the_axis(lambda x: call(api, name, x, start, axis_name="d", axis_index_groups=[[0, 1], [2, 3]]), X)


@pytest.mark.parametrize("api", APIS)
def test_an_axis_of_the_mesh_that_is_not_manual(api):
    start = start_of(api, "BatchNorm")
    with jax.set_mesh(mesh_of()), refuses("BatchNorm", "'d' is not bound", "mesh", "global without", "Leave it out"):
        jax.eval_shape(jax.jit(lambda x: call(api, "BatchNorm", x, start, axis_name="d")), X)


def test_every_class_is_here():
    """Also what Linen's classes take; `jnx` is asked above."""
    assert NAMES == [name for name in jnn.__all__ if "axis_name" in inspect.signature(getattr(jnn, name).__init__).parameters]
    assert {*MADE, *WRAPS, *CALLED, *ADDS} <= set(NAMES)
