"""The wrappers for cross-iteration batch normalization: the function of the layer's output, over steps in which the kernel moves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm
from jnorm import linen as jnn
from jnorm import nnx as jnx
from pairwise import checkerboard
from refusals import refuses
from test_cross_iteration_batch_norm import LAYERS
from test_modules import assert_equal

CONV = {"strides": (2, 1), "feature_group_count": 2, "use_bias": False}
each_api = pytest.mark.parametrize("api", ["linen", "nnx"])


def linen_layer(kind, **options):
    return nn.Dense(4, use_bias=False, **options) if kind == "dense" else nn.Conv(6, (3, 2), **CONV, **options)


def nnx_layer(kind, **options):
    rngs = nnx.Rngs(0)
    return (
        nnx.Linear(5, 4, use_bias=False, rngs=rngs, **options) if kind == "dense" else nnx.Conv(4, 6, (3, 2), **CONV, rngs=rngs, **options)
    )


def inputs_of(kind, seed=0):
    _, of_inputs, of_kernel, _ = LAYERS[kind]
    rng = np.random.default_rng(seed)
    given = {"inputs": rng.normal(size=of_inputs), "kernel": rng.normal(size=of_kernel)}
    given |= {name: rng.normal(size=of_kernel[-1:]) + 1 for name in ("scale", "bias")}
    return {k: v.astype(np.float32) for k, v in given.items()}


def by_function(kind, state, g, window_size, **options):
    op, _, _, fixed = LAYERS[kind]
    x = op(g["inputs"], g["kernel"])
    options = {"inputs": g["inputs"], "kernel": g["kernel"], "linear_op": op, "window_size": window_size, **fixed, **options}
    return jnorm.cross_iteration_batch_norm(x, state, g["scale"], g["bias"], **options)


def by_linen(kind, state, g, window_size, **options):
    module = jnn.CrossIterationBatchNorm(linen_layer(kind), use_running_average=False, window=3, **options)
    variables = {"params": {"layer_instance": {"kernel": g["kernel"]}, "scale": g["scale"], "bias": g["bias"]}, "batch_stats": state}
    y, new = module.apply(variables, g["inputs"], window_size=window_size, mutable=["batch_stats"])
    return y, new["batch_stats"]


def by_nnx(kind, state, g, window_size, **options):
    module = jnx.CrossIterationBatchNorm(nnx_layer(kind), window=3, **options, rngs=nnx.Rngs(0))
    module.layer_instance.kernel = nnx.Param(jnp.asarray(g["kernel"]))
    for name in ("scale", "bias"):
        setattr(module, name, nnx.Param(jnp.asarray(g[name])))
    for key, value in state.items():
        setattr(module, key, nnx.BatchStat(jnp.asarray(value)))
    y = module(g["inputs"], window_size=window_size)
    return y, {key: getattr(module, key)[...] for key in state}


THROUGH = {"linen": by_linen, "nnx": by_nnx}
OPTIONS = {"rule": "drop", "compensation": 0.5, "running_var_correction": 1, "momentum": 0.9, "activation": "relu"}


@pytest.mark.parametrize(("api", "row"), checkerboard(["linen", "nnx"], [("dense", OPTIONS), ("strided, grouped", {})]))
def test_the_wrapper_is_the_function(api, row):
    kind, options = row
    """Bitwise, over three steps: y, the state, and the gradients of inputs, kernel, scale and bias."""
    kernel = LAYERS[kind][2]
    state = jnorm.cross_iteration_batch_norm_state(kernel, window=3, num_groups=LAYERS[kind][3].get("num_groups", 1))

    def step(through):
        def run(state, g, window_size):
            f = lambda g: through(kind, state, g, window_size, **options)  # noqa: E731
            y, vjp, new = jax.vjp(f, g, has_aux=True)
            return y, new, vjp(jnp.cos(y))[0]

        return jax.jit(run)

    one, two = step(by_function), step(THROUGH[api])
    for i, window_size in enumerate(np.int32([1, 3, 2])):
        wanted = one(state, inputs_of(kind, i), window_size)
        assert_equal(two(state, inputs_of(kind, i), window_size), wanted)
        state = wanted[1]
    assert state["index"] == 1


@pytest.mark.parametrize(("api", "kind"), [("linen", "strided, grouped"), ("nnx", "dense")])
def test_layers_that_compute_in_bfloat16(api, kind):
    """What is kept of the inputs is float32 all the same: bfloat16 has 8 bits of it."""
    given = inputs_of(kind)
    state = jnorm.cross_iteration_batch_norm_state(LAYERS[kind][2], window=3, num_groups=LAYERS[kind][3].get("num_groups", 1))
    _, want = by_function(kind, state, given, None)
    if api == "linen":
        module = jnn.CrossIterationBatchNorm(linen_layer(kind, dtype=jnp.bfloat16), use_running_average=False, window=3)
        variables = {"params": {"layer_instance": {"kernel": given["kernel"]}, "scale": given["scale"], "bias": given["bias"]}}
        y, new = module.apply(variables | {"batch_stats": state}, given["inputs"], mutable=["batch_stats"])
        patches = new["batch_stats"]["patches"]
    else:
        module = jnx.CrossIterationBatchNorm(nnx_layer(kind, dtype=jnp.bfloat16), window=3, rngs=nnx.Rngs(0))
        y, patches = module(given["inputs"]), module.patches[...]
    assert y.dtype == np.float32
    np.testing.assert_allclose(patches, want["patches"], rtol=1e-5, atol=1e-6)


def test_initialization_and_evaluation_of_linen():
    """Boxes of metadata stay; init leaves the slots empty; evaluation is that of batch_norm and writes nothing."""
    given = inputs_of("dense")["inputs"]
    layer = linen_layer("dense", kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))
    module = jnn.CrossIterationBatchNorm(layer, window=2, track_count=True)
    variables = module.init(jax.random.key(0), given, use_running_average=False)
    assert isinstance(variables["params"]["layer_instance"]["kernel"], nn.Partitioned)
    assert variables["batch_stats"]["counts"].tolist() == [0]
    _, moved = module.apply(variables, given, use_running_average=False, momentum=1.0, mutable=["batch_stats"])
    assert moved["batch_stats"]["counts"].tolist() == [6]
    y = module.apply({**variables, **moved}, given, use_running_average=True)
    running = {k: moved["batch_stats"][k] for k in ("mean", "var")}
    want, _ = jnorm.batch_norm(given @ np.ones((5, 4), np.float32), running, use_running_average=True)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_training_and_evaluation_of_nnx():
    module = jnx.CrossIterationBatchNorm(nnx_layer("dense"), window=2, exact_second_moment=True, rngs=nnx.Rngs(0))
    given = inputs_of("dense")["inputs"]

    @nnx.jit
    def step(module, inputs):
        loss = lambda module: jnp.sum(jnp.sin(module(inputs)))  # noqa: E731
        gradients = nnx.grad(loss)(module)
        kernel = module.layer_instance.kernel
        kernel.set_value(kernel[...] - 0.1 * gradients["layer_instance"]["kernel"][...])

    for _ in range(2):
        step(module, given)
    assert module.counts[...].tolist() == [6] and module.covariances[...].any()
    module.eval()
    before = nnx.state(module, nnx.BatchStat)
    module(given)
    assert_equal(nnx.state(module, nnx.BatchStat), before)


WRONG = {
    "bias": ({"use_bias": True}, ValueError, "layer_instance has a bias"),
    "mask": ({"mask": np.ones((3, 2, 2, 6), np.float32)}, ValueError, "layer_instance has a mask"),
}


@each_api
@pytest.mark.parametrize("what", WRONG)
def test_layers_that_are_refused(api, what):
    options, kind, message = WRONG[what]
    options = CONV | options
    with refuses("CrossIterationBatchNorm", message, kind=kind):
        if api == "linen":
            layer = jnn.CrossIterationBatchNorm(nn.Conv(6, (3, 2), **options), use_running_average=False)
            jax.eval_shape(layer.init, jax.random.key(0), inputs_of("strided, grouped")["inputs"])
        else:
            jnx.CrossIterationBatchNorm(nnx.Conv(4, 6, (3, 2), **options, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


@each_api
def test_other_layers_are_refused(api):
    with refuses("CrossIterationBatchNorm", "layer_instance must be an", "got Embed", "jnorm.cross_iteration_batch_norm", kind=TypeError):
        if api == "linen":
            layer = jnn.CrossIterationBatchNorm(nn.Embed(3, 4), use_running_average=False)
            jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(3))
        else:
            jnx.CrossIterationBatchNorm(nnx.Embed(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
