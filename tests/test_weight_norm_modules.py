"""WeightNorm's starts and its folding, of both APIs: networks that one batch initializes, plain layers after training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
import oracles
import weights
from distributed import mesh_of
from jnorm.reparam import weight_norm_data_init
from oracles import Bounded
from refusals import refuses

P = jax.sharding.PartitionSpec
EPS = 2.0**-23
DEVIATION = 0.5
DATA = {"scale_from": "data", "init_scale": DEVIATION}
APIS = ["linen", "nnx"]
each_api = pytest.mark.parametrize("api", APIS)


def images(n=8, seed=0):
    """Inputs whose mean is far from 0."""
    return (np.random.default_rng(seed).normal(size=(n, 6, 6, 3)) * 4 + 3).astype(np.float32)


# --- a network ----------------------------------------------------------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        outs = []
        for layer in (nn.Conv(5, (3, 3), padding="VALID"), nn.Conv(4, (2, 2), padding="VALID")):
            outs.append(jnn.WeightNorm(layer, **DATA)(x))
            x = nn.relu(outs[-1])
        return [*outs, jnn.WeightNorm(nn.Dense(3), **DATA)(x.mean((1, 2)))]


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        convolution = functools.partial(nnx.Conv, padding="VALID", rngs=rngs)
        layers = [convolution(3, 5, (3, 3)), convolution(5, 4, (2, 2)), nnx.Linear(4, 3, rngs=rngs)]
        self.layers = nnx.List([jnx.WeightNorm(layer, **DATA, rngs=rngs) for layer in layers])

    def __call__(self, x):
        first = self.layers[0](x)
        second = self.layers[1](nnx.relu(first))
        return [first, second, self.layers[2](nnx.relu(second).mean((1, 2)))]


def start_linen(x):
    """-> outputs of the initializing pass, (kernel, scale, bias) of each layer, outputs of the model after it."""
    outs, variables = jax.jit(LinenNet().init_with_output)(jax.random.key(0), x)
    params = variables["params"]
    found = []
    for i, name in enumerate(("Conv_0", "Conv_1", "Dense_0")):
        found.append((params[name]["kernel"], params[f"WeightNorm_{i}"][f"{name}/kernel/scale"], params[name]["bias"]))
    return outs, found, LinenNet().apply(variables, x)


def start_nnx(x):
    net = NNXNet(nnx.Rngs(0))
    outs = nnx.jit(lambda net, x: nnx.view(net, initializing=True)(x))(net, x)
    found = [(w.layer_instance.kernel[...], w.scales[("kernel",)][...], w.layer_instance.bias[...]) for w in net.layers]
    return outs, found, net(x)


START = {"linen": start_linen, "nnx": start_nnx}


@functools.cache
def started(api):
    return START[api](images())


def inputs_of(outs):
    """Of each layer, from the outputs that the one before it gave."""
    x1, x2 = (np.maximum(np.asarray(out), 0) for out in outs[:2])
    return [images(), x1, x2.mean((1, 2))]


def at_one(x, kernel):
    """The layer with lengths of 1 and no bias."""
    layer = weights.dense if kernel.ndim == 2 else weights.conv
    return layer(x, weights.normalized("WeightNorm", kernel)[0], np.zeros(kernel.shape[-1]))


def want_start(t):
    """-> scale, bias and y. A wrong t moves mean and deviation by no more than the root mean square of what it is wrong by."""
    axes = tuple(range(t.value.ndim - 1))
    mean, deviation = t.value.mean(axes), np.sqrt(t.value.var(axes) + 1e-8)
    wrong = np.sqrt((t.size**2).mean(axes))
    g = DEVIATION / deviation
    relative = 1 + wrong / deviation
    y = (t.value - mean) * g
    bias = Bounded(-mean * g, (abs(mean) * relative + wrong + deviation) * g)
    return Bounded(g, g * relative), bias, Bounded(y, (t.size + wrong) * g + (abs(y) + DEVIATION) * relative)


@each_api
def test_numbers_of_each_layer(api):
    """Against float64, from the inputs that each layer had."""
    outs, found, _ = started(api)
    for x, y, (kernel, scale, bias) in zip(inputs_of(outs), outs, found, strict=True):
        t = at_one(x, kernel)
        # the layer after the second has a mean of 16 in float32 before it
        length = weights.terms(kernel) + t.value[..., 0].size + 16
        for name, got, want in zip(("scale", "bias", "y"), (scale, bias, y), want_start(t), strict=True):
            oracles.assert_close(got, want, length, what=name)


@each_api
def test_every_output_has_mean_0_and_the_deviation(api):
    for y in started(api)[0]:
        y = oracles.wide(y)
        axes = tuple(range(y.ndim - 1))
        n = y[..., 0].size
        np.testing.assert_allclose(y.mean(axes), 0, atol=(n + 16) * EPS * DEVIATION)
        # 1e-8 next to the variance of t, which is above 1e-3
        np.testing.assert_allclose(y.std(axes), DEVIATION, rtol=1e-5 + (n + 16) * EPS)


@each_api
def test_the_network_then_gives_these_outputs(api):
    """g·t + b in place of (t - mean)·g; relu and a mean pass the difference on, and weights of length g·1 enlarge it."""
    outs, found, after = started(api)
    wrong = 0.0
    for x, y, again, (kernel, scale, bias) in zip(inputs_of(outs), outs, after, found, strict=True):
        t, g = at_one(x, kernel), oracles.wide(scale)
        here = (
            4 * (weights.terms(kernel) + y[..., 0].size + 32) * EPS * (want_start(t)[2].size + g * t.size + abs(oracles.wide(bias))).max()
        )
        # a row of n inputs, each wrong by as much, has at most sqrt(n) times that length
        wrong = here + wrong * g.max() * np.sqrt(kernel[..., 0].size)
        np.testing.assert_allclose(again, y, atol=wrong)


# --- layers -------------------------------------------------------------------------------------------------------------------

LAYERS = {  # name -> (Linen, NNX, shape of x, options)
    "Dense": (lambda: nn.Dense(4), lambda r: nnx.Linear(3, 4, rngs=r), (16, 3), {}),
    "with a bias": (
        lambda: nn.Dense(4, bias_init=nn.initializers.constant(7.0)),
        lambda r: nnx.Linear(3, 4, bias_init=nnx.initializers.constant(7.0), rngs=r),
        (16, 3),
        {},
    ),
    "bfloat16": (
        lambda: nn.Dense(4, dtype=jnp.bfloat16),
        lambda r: nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=r),
        (16, 3),
        {"param_dtype": jnp.bfloat16},
    ),
    "ConvTranspose": (lambda: nn.ConvTranspose(4, (3,)), lambda r: nnx.ConvTranspose(3, 4, (3,), rngs=r), (4, 6, 3), {}),
    "circular": (
        lambda: nn.Conv(4, (3,), padding="CIRCULAR", feature_group_count=2),
        lambda r: nnx.Conv(2, 4, (3,), padding="CIRCULAR", feature_group_count=2, rngs=r),
        (4, 6, 2),
        {},
    ),
    "two axes": (lambda: nn.DenseGeneral((2, 3)), lambda r: nnx.LinearGeneral(3, (2, 3), rngs=r), (16, 3), {"feature_axes": (-2, -1)}),
    "inside": (lambda: nn.Sequential([nn.Dense(4)]), lambda r: nnx.Sequential(nnx.Linear(3, 4, rngs=r)), (16, 3), {}),
}


def data(shape, seed=3):
    return (np.random.default_rng(seed).normal(size=shape) + 1).astype(np.float32)


def start_one(api, layers, x, **options):
    """-> (y of the initializing pass, y after it)"""
    if api == "linen":
        module = jnn.WeightNorm(layers[0](), **(DATA | options))
        y, variables = module.init_with_output(jax.random.key(0), x)
        return y, module.apply(variables, x)
    rngs = nnx.Rngs(0)
    module = jnx.WeightNorm(layers[1](rngs), **(DATA | options), rngs=rngs)
    return module.initialize_from(x), module(x)


@each_api
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, api):
    *layers, shape, options = LAYERS[name]
    y, after = start_one(api, layers, data(shape), **options)
    low = name == "bfloat16"
    assert y.dtype == after.dtype == (jnp.bfloat16 if low else jnp.float32)
    y, after = oracles.wide(y), oracles.wide(after)
    axes = tuple(range(y.ndim - len(options.get("feature_axes", [0]))))
    n = y.size // np.prod([y.shape[i] for i in range(len(axes), y.ndim)])
    eps = 2.0**-8 if low else (n + 16) * EPS
    np.testing.assert_allclose(y.mean(axes), 0, atol=eps * 2 * DEVIATION)
    np.testing.assert_allclose(y.std(axes), DEVIATION, rtol=1e-5 + eps)
    # terms of a few deviations and means; in bfloat16 weights, scale, bias, t and y are rounded
    np.testing.assert_allclose(after, y, atol=(16 if low else 4) * eps * (4 + abs(y).max()))


@each_api
def test_without_a_bias_the_deviation_alone(api):
    x = data((16, 3))
    y, after = start_one(api, (lambda: nn.Dense(4, use_bias=False), lambda r: nnx.Linear(3, 4, use_bias=False, rngs=r)), x)
    y = oracles.wide(y)
    np.testing.assert_allclose(y.std(0), DEVIATION, rtol=1e-5 + 32 * EPS)
    assert (abs(y.mean(0)) > 0.05).all()
    np.testing.assert_allclose(after, y, atol=64 * EPS * abs(y).max())


@each_api
def test_norm_leaves_the_layer_as_it_is(api):
    """The length of each kernel; in bfloat16 it is rounded."""
    x = data((5, 3))
    for param_dtype in (jnp.float32, jnp.bfloat16):
        options = {"scale_from": "norm", "param_dtype": param_dtype}
        if api == "linen":
            module = jnn.WeightNorm(nn.Dense(4), **options)
            variables = module.init(jax.random.key(0), x)
            y, scale = module.apply(variables, x), variables["params"]["layer_instance/kernel/scale"]
            layer = variables["params"]["layer_instance"]
            kernel, bare = layer["kernel"], nn.Dense(4).apply({"params": layer}, x)
        else:
            rngs = nnx.Rngs(0)
            module = jnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), **options, rngs=rngs)
            y, scale, kernel, bare = module(x), module.scales[("kernel",)][...], module.layer_instance.kernel[...], module.layer_instance(x)
        assert scale.dtype == param_dtype
        want = np.linalg.norm(oracles.wide(kernel), axis=0)
        oracles.assert_close(scale, Bounded(want, want), 3, out=scale.dtype)
        size = abs(x) @ abs(oracles.wide(kernel))
        rounding = 0 if param_dtype == jnp.float32 else 2.0**-8 / (32 * EPS)
        oracles.assert_close(y, Bounded(oracles.wide(bare), size * (1 + rounding)), 16)


@each_api
def test_init_is_flax_start(api):
    """The default: lengths as `scale_init` says, and the layer's bias untouched."""
    x = data((5, 3))
    if api == "linen":
        params = jnn.WeightNorm(nn.Dense(4), init_scale=3.0).init(jax.random.key(0), x)["params"]
        scale, bias = params["layer_instance/kernel/scale"], params["layer_instance"]["bias"]
    else:
        module = jnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), init_scale=3.0, rngs=nnx.Rngs(0))
        nnx.view(module, initializing=True)(x)
        scale, bias = module.scales[("kernel",)][...], module.layer_instance.bias[...]
    np.testing.assert_array_equal(scale, 1)
    np.testing.assert_array_equal(bias, 0)


def test_before_its_data_an_nnx_layer_works():
    """With lengths as `scale_init` gives them; and only the view initializes."""
    x, rngs = data((16, 3)), nnx.Rngs(0)
    module = jnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), scale_from="data", rngs=rngs)
    oracles.assert_close(module(x), at_one(x, module.layer_instance.kernel[...]), 16)
    y = nnx.view(module, initializing=True)(x)
    np.testing.assert_allclose(module(x), y, atol=64 * EPS * 8)
    assert not module.initializing


def test_a_linen_layer_that_is_called_twice_starts_once():
    """From its first input: parameters that are there are not written again."""
    x = data((16, 3))
    first, second = x, 3 * x + 1

    class Twice(nn.Module):
        @nn.compact
        def __call__(self):
            layer = jnn.WeightNorm(nn.Dense(4), **DATA)
            return layer(first), layer(second)

    (one, two), variables = Twice().init_with_output(jax.random.key(0))
    np.testing.assert_allclose(oracles.wide(one).std(0), DEVIATION, rtol=1e-5 + 32 * EPS)
    again = Twice().apply(variables)
    np.testing.assert_allclose(one, again[0], atol=64 * EPS * 8)
    np.testing.assert_array_equal(two, again[1])


def test_an_nnx_layer_that_is_called_twice_starts_once():
    x = data((16, 3))
    rngs = nnx.Rngs(0)
    layer = jnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), **DATA, rngs=rngs)
    view = nnx.view(layer, initializing=True)
    one, _ = view(x), view(3 * x + 1)
    np.testing.assert_allclose(oracles.wide(one).std(0), DEVIATION, rtol=1e-5 + 32 * EPS)
    np.testing.assert_allclose(layer(x), one, atol=64 * EPS * 8)


def test_layers_of_a_linen_scan_start_in_turn():
    """Each from what the one before gives."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = jnn.WeightNorm(nn.Dense(3), **DATA)(x)
            return nn.relu(y), y

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    (_, ys), variables = stack.init_with_output(jax.random.key(0), data((16, 3)), None)
    # 1e-8 next to variances of t that relu and lengths of 1 do not bring below 1e-3
    np.testing.assert_allclose(oracles.wide(ys).std(1), DEVIATION, rtol=1e-5 + 32 * EPS)
    np.testing.assert_allclose(oracles.wide(ys).mean(1), 0, atol=32 * EPS)
    np.testing.assert_allclose(stack.apply(variables, data((16, 3)), None)[1], ys, atol=256 * EPS * 8)


def test_layers_that_draw_or_write_in_their_call():
    """Dropout after the weight is linear in it, and draws once; what is sown is kept."""
    x, rngs = data((64, 3)), nnx.Rngs(0)
    module = jnx.WeightNorm(nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)), **DATA, rngs=rngs)
    y = module.initialize_from(x)
    assert module.layer_instance.layers[1].rngs.count[...] == 1
    np.testing.assert_allclose(oracles.wide(y).std(0), DEVIATION, rtol=1e-5 + 80 * EPS)
    layer = jnn.WeightNorm(nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=False)]), **DATA)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    y, _ = layer.init_with_output(keys, x)
    np.testing.assert_allclose(oracles.wide(y).std(0), DEVIATION, rtol=1e-5 + 80 * EPS)


# --- devices and metadata -----------------------------------------------------------------------------------------------------


def linen_parts(x, axis_name=None):
    y, variables = jnn.WeightNorm(nn.Dense(4), **DATA, axis_name=axis_name).init_with_output(jax.random.key(0), x)
    return y, variables["params"]["layer_instance/kernel/scale"], variables["params"]["layer_instance"]["bias"]


def nnx_parts(x, axis_name=None):
    rngs = nnx.Rngs(0)
    module = jnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), **DATA, axis_name=axis_name, rngs=rngs)
    return module.initialize_from(x), module.scales[("kernel",)][...], module.layer_instance.bias[...]


PARTS = {"linen": linen_parts, "nnx": nnx_parts}


@each_api
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_batch_over_devices(api, check_vma):
    """Lengths and biases are those of the whole batch, and the same on all devices."""
    x, parts = data((16, 3)), PARTS[api]
    out = (P("d"), P(), P())
    run = jax.shard_map(functools.partial(parts, axis_name="d"), mesh=mesh_of(), in_specs=P("d"), out_specs=out, check_vma=check_vma)
    for got, want in zip(jax.jit(run)(x), parts(x), strict=True):
        # sums of 16 numbers, in another order, over deviations that are not below a tenth of the numbers
        np.testing.assert_allclose(got, want, atol=10 * 32 * EPS * abs(want).max())


def test_boxes_of_metadata_stay():
    """Around the lengths, the bias, and folded kernels; values are those without boxes."""
    x = data((16, 3))
    boxed = nn.with_partitioning
    dense = nn.Dense(
        4,
        kernel_init=boxed(nn.initializers.lecun_normal(), (None, "model")),
        bias_init=boxed(nn.initializers.zeros, ("model",)),
    )
    for source in ("norm", "data"):
        module = jnn.WeightNorm(dense, scale_from=source, scale_init=boxed(nn.initializers.ones, ("model",)))
        variables = module.init(jax.random.key(0), x)
        specs = nn.get_partition_spec(variables)["params"]
        assert specs == {
            "layer_instance": {"kernel": P(None, "model"), "bias": P("model")},
            "layer_instance/kernel/scale": P("model"),
        }
        bare = jnn.WeightNorm(nn.Dense(4), scale_from=source).init(jax.random.key(0), x)
        jax.tree.map(np.testing.assert_array_equal, nn.unbox(variables), bare)
        folded = module.fold(variables)
        assert nn.get_partition_spec(folded) == {"params": specs["layer_instance"]}
        np.testing.assert_array_equal(dense.apply(folded, x), module.apply(variables, x))


# --- fold ---------------------------------------------------------------------------------------------------------------------

FOLDED = [{}, {"use_scale": False}, {"feature_axes": None}, {"dtype": jnp.bfloat16}, {"epsilon": 0.5}]


@pytest.mark.parametrize("options", FOLDED, ids=lambda o: "-".join(o) or "plain")
def test_fold_in_linen(options):
    """The same numbers without the wrapper, whose output is that of the same operations."""
    x = data((2, 5, 5, 3))
    conv = nn.Conv(4, (3, 3), dtype=options.get("dtype"))
    module = jnn.WeightNorm(conv, scale_init=nn.initializers.normal(1.0), **options)
    variables = module.init(jax.random.key(0), x)
    folded = module.fold(variables)
    assert jax.tree.map(np.shape, folded) == {"params": {"kernel": (3, 3, 3, 4), "bias": (4,)}}
    assert folded["params"]["kernel"].dtype == options.get("dtype", jnp.float32)
    np.testing.assert_array_equal(conv.apply(folded, x), module.apply(variables, x))
    traced = jax.jit(module.fold)(variables)["params"]["kernel"]
    want = oracles.wide(folded["params"]["kernel"])
    np.testing.assert_allclose(oracles.wide(traced), want, rtol=2.0**-7 if "dtype" in options else 64 * EPS)


@pytest.mark.parametrize("options", FOLDED, ids=lambda o: "-".join(o) or "plain")
def test_fold_in_nnx(options):
    """A layer of its own: what is trained further does not reach the wrapper."""
    x, rngs = data((2, 5, 5, 3)), nnx.Rngs(0)
    conv = nnx.Conv(3, 4, (3, 3), dtype=options.get("dtype"), rngs=rngs)
    module = jnx.WeightNorm(conv, scale_init=nnx.initializers.normal(1.0), **options, rngs=rngs)
    folded = module.fold()
    assert type(folded) is nnx.Conv
    before = module(x)
    np.testing.assert_array_equal(folded(x), before)
    folded.kernel[...], folded.bias[...] = 0 * folded.kernel[...], 1 + folded.bias[...]
    np.testing.assert_array_equal(module(x), before)


def test_fold_keeps_what_else_the_layer_has():
    """Other collections of Linen; layers inside the layer; filters."""
    x = data((16, 3))
    layer = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    module = jnn.WeightNorm(layer, variable_filter={"layers_0/kernel"}, scale_init=nn.initializers.normal(1.0))
    variables = module.init(jax.random.key(0), x)
    folded = module.fold(variables)
    assert set(folded) == {"params", "batch_stats"}
    np.testing.assert_array_equal(layer.apply(folded, x), module.apply(variables, x))
    np.testing.assert_array_equal(folded["params"]["layers_2"]["kernel"], variables["params"]["layer_instance"]["layers_2"]["kernel"])


def test_fold_of_a_part_of_a_linen_model():
    """A layer of `setup` is a part of the variables; one of a compact method lies beside its wrapper."""
    x = data((16, 3))

    class Setup(nn.Module):
        def setup(self):
            self.first = jnn.WeightNorm(nn.Dense(4), scale_init=nn.initializers.normal(1.0))

        def __call__(self, x):
            return self.first(x)

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnn.WeightNorm(nn.Dense(4), scale_init=nn.initializers.normal(1.0))(x)

    variables = Setup().init(jax.random.key(0), x)
    folded = jnn.WeightNorm(nn.Dense(4)).fold({"params": variables["params"]["first"]})
    np.testing.assert_array_equal(nn.Dense(4).apply(folded, x), Setup().apply(variables, x))
    # a method of a bound module too
    bound = Setup().bind(variables)
    np.testing.assert_array_equal(nn.Dense(4).apply(bound.first.fold(bound.first.variables), x), Setup().apply(variables, x))
    variables = Compact().init(jax.random.key(0), x)
    params = variables["params"]
    folded = jnn.WeightNorm(nn.Dense(4)).fold({"params": {**params["WeightNorm_0"], "Dense_0": params["Dense_0"]}})
    np.testing.assert_array_equal(nn.Dense(4).apply(folded, x), Compact().apply(variables, x))
    chosen = {**params["WeightNorm_0"], "Dense_0": params["Dense_0"]}
    kernel = jnn.WeightNorm(nn.Dense(4), variable_filter={"Dense_0/kernel"}).fold({"params": chosen})["params"]["kernel"]
    np.testing.assert_array_equal(kernel, folded["params"]["kernel"])  # by the name that it has there
    with refuses("Dense_0/kernel", "no scale"):
        jnn.WeightNorm(nn.Dense(4)).fold({"params": {"Dense_0": params["Dense_0"]}})
    for given in (variables, {"params": params["WeightNorm_0"]}, {}):
        with refuses("fold takes the variables of this WeightNorm", str(sorted(given.get("params", {}))), "belongs to it"):
            jnn.WeightNorm(nn.Dense(4)).fold(given)


# --- refusals -----------------------------------------------------------------------------------------------------------------

REFUSED = {  # name -> (Linen, NNX, fragments)
    "several": (
        lambda: nn.Sequential([nn.Dense(3), nn.Dense(3)]),
        lambda r: nnx.Sequential(nnx.Linear(3, 3, rngs=r), nnx.Linear(3, 3, rngs=r)),
        ('scale_from="data"', "one normalized weight", "0/kernel", "1/kernel", "by itself"),
    ),
    "none": (lambda: nn.LayerNorm(), lambda r: nnx.LayerNorm(3, rngs=r), ("variable_filter selects none", "scale")),
    "more": (
        lambda: nn.Sequential([nn.Dense(3), nn.LayerNorm()]),
        lambda r: nnx.Sequential(nnx.Linear(3, 3, rngs=r), nnx.LayerNorm(3, rngs=r)),
        ('scale_from="data"', "plus a bias", "1/scale", "beside", "0/kernel"),
    ),
    "not linear": (
        lambda: nn.Sequential([nn.Dense(3), nn.relu]),
        lambda r: nnx.Sequential(nnx.Linear(3, 3, rngs=r), nnx.relu),
        ('scale_from="data"', "0/kernel", "not", "linear", "after the wrapped layer"),
    ),
    "several axes": (
        lambda: nn.DenseGeneral((2, 3)),
        lambda r: nnx.LinearGeneral(3, (2, 3), rngs=r),
        ('scale_from="data"', "bias has shape (2, 3)", "lengths (3,)", "feature_axes"),
    ),
    "features in front": (
        lambda: nn.Sequential([nn.Dense(4), jnp.transpose]),
        lambda r: nnx.Sequential(nnx.Linear(3, 4, rngs=r), jnp.transpose),
        ('scale_from="data"', "features (4,) on its last axes", "(4, 16)"),
    ),
    "no array": (
        lambda: nn.Sequential([nn.Dense(4), lambda x: (x, x)]),
        lambda r: nnx.Sequential(nnx.Linear(3, 4, rngs=r), lambda x: (x, x)),
        ('scale_from="data"', "features (4,) on its last axes", "tuple"),
    ),
}


@each_api
@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_data_cannot_start(name, api):
    *layers, fragments = REFUSED[name]
    with refuses("WeightNorm", *fragments):
        start_one(api, layers, data((16, 3)))


DENSE = (lambda: nn.Dense(4), lambda r: nnx.Linear(3, 4, rngs=r))


@each_api
def test_options_that_data_cannot_have(api):
    for axes in (None, 0):
        with refuses("WeightNorm", "last axes", f"feature_axes={axes}"):
            start_one(api, DENSE, data((16, 3)), feature_axes=axes)
    with refuses("WeightNorm", "scale_from", "'ones'", "('init', 'norm', 'data')"):
        start_one(api, DENSE, data((16, 3)), scale_from="ones")
    for source in ("norm", "data"):
        with refuses("WeightNorm", f"scale_from='{source}'", "use_scale is False"):
            start_one(api, DENSE, data((16, 3)), scale_from=source, use_scale=False)
    with refuses("WeightNorm", "kernel", "(1, 4)", "batch of data"):
        start_one(api, DENSE, data((1, 3)))
    with refuses("WeightNorm", "kernel", "init_scale", "positive"):
        start_one(api, DENSE, data((16, 3)), init_scale=0)
    with refuses("WeightNorm", "axis_name 'nowhere' is not bound"):
        start_one(api, DENSE, data((16, 3)), axis_name="nowhere")


def test_lengths_that_are_not_there():
    module = jnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), use_scale=False, rngs=nnx.Rngs(0))
    with refuses("WeightNorm", "use_scale is False", "no scale"):
        module.initialize_from(data((16, 3)))


def test_the_function_is_what_the_layers_use():
    """A layer by hand: the same numbers as the module's."""
    x = data((16, 3))
    y, variables = jnn.WeightNorm(nn.Dense(4), **DATA).init_with_output(jax.random.key(0), x)
    params = variables["params"]
    t = at_one(x, params["layer_instance"]["kernel"])
    scale, _, by_hand = weight_norm_data_init(t.value.astype(np.float32), init_scale=DEVIATION)
    np.testing.assert_allclose(params["layer_instance/kernel/scale"], scale, rtol=256 * EPS)
    np.testing.assert_allclose(y, by_hand, atol=256 * EPS)


@pytest.mark.parametrize("name", ["WeightNorm", "WeightStandardization", "NormalizationPropagation"])
def test_a_filter_that_selects_nothing(name):
    """A wrapper that does nothing is a mistake, most easily of spelling."""
    told, x, rngs = f"{name}: variable_filter selects none of the layer's parameters", jnp.ones((1, 2)), nnx.Rngs(0)
    with refuses(told, "layer_instance/bias, layer_instance/kernel"):
        getattr(jnn, name)(nn.Dense(3), variable_filter={"kernle"}).init(jax.random.key(0), x)
    with refuses(told, "bias, kernel"):
        getattr(jnx, name)(nnx.Linear(2, 3, rngs=rngs), variable_filter=nnx.PathContains("kernle"), rngs=rngs)(x)
