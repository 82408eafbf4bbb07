"""Models without their norms: what folds, into which layer, that the output is equal, and why what stays stays. Linen and NNX."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
import models
import oracles
from jnorm import tools
from jnorm.tools._fold.graph import bodies
from pairwise import checkerboard, every_other
from refusals import refuses

IMAGE = (2, 6, 6, 3)


class Net(nnx.Module):
    """Modules, and how they are called."""

    def __init__(self, call, **modules):
        self.run = call
        for name, module in modules.items():
            setattr(self, name, module)

    def __call__(self, x):
        return self.run(self, x)


class Fn(nn.Module):
    """The same in Linen, whose modules are made in the call."""

    run: object

    @nn.compact
    def __call__(self, x):
        return self.run(x)


def chain(*names):
    def run(net, x):
        for name in names:
            x = getattr(net, name)(x)
        return x

    return run


def rngs():
    return nnx.Rngs(0)


def norm(n, kind=jnx.BatchNorm, **options):
    return kind(n, rngs=rngs(), epsilon=0.1, **options)


def linen_norm(kind=jnn.BatchNorm, **options):
    return kind(use_running_average=True, epsilon=0.1, **options)


def ready(model, rng):
    """In evaluation, as after training, in float64."""
    model.eval()

    for kind in (nnx.Param, nnx.BatchStat):
        nnx.update(model, widened(models.with_values(nnx.state(model, kind), rng)))
    return model


def widened(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else jnp.zeros_like(a), tree)


def init(model, x, rng, like=np.float32, **options):
    variables = jax.jit(functools.partial(model.init, **options))(jax.random.key(0), x.astype(like))
    return widened(models.with_values(variables, rng))


def leaves(tree):
    return [np.asarray(a) for a in jax.tree.leaves(tree)]


def close(got, want):
    """In float64: some hundred roundings of numbers of this size, far from what a wrong fold does."""
    want = np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    oracles.assert_close(got, oracles.Bounded(want, np.full(want.shape, abs(want).max())), 500, statistics="float64")


def primitives(jaxpr):
    """The names of all that is in a program."""
    return {e.primitive.name for e in jaxpr.eqns}.union(*(primitives(body) for e in jaxpr.eqns for body in bodies(e.params)))


@nnx.jit
def run_both(one, two, x):
    """In one program: compiling is what takes the time."""
    return one(x), two(x)


def check_nnx(model, x, wanted, **options):
    """Folds as wanted ({norm: layer}), all else kept, with the same output, the given model as it was. -> (folded, report)"""
    before = leaves(nnx.state(model))
    folded, report = tools.fold(model, x, **options)
    assert report.folded == wanted, str(report)
    close(*run_both(folded, model, x))
    for a, b in zip(leaves(nnx.state(model)), before, strict=True):
        np.testing.assert_array_equal(a, b)
    return folded, report


def check_linen(model, variables, x, wanted, **options):
    before = leaves(variables)
    folded = tools.fold(model, variables, x, **options)
    assert folded.report.folded == wanted, str(folded.report)
    close(*jax.jit(lambda folded, variables: (folded.apply(x, **options), model.apply(variables, x, **options)))(folded, variables))
    for a, b in zip(leaves(variables), before, strict=True):
        np.testing.assert_array_equal(a, b)
    return folded


# --- Layers before a norm -----------------------------------------------------------------------------------------------------


class OwnDense(nnx.Module):
    """A layer of no known class: only its operations tell."""

    def __init__(self, bias):
        self.weight = nnx.Param(jnp.ones((3, 4)))
        self.offset = nnx.Param(jnp.ones(4)) if bias else nnx.data(None)

    def __call__(self, x):
        y = jnp.einsum("...i,io->...o", x, self.weight[...])
        return y if self.offset is None else y + self.offset[...].reshape((1,) * (y.ndim - 1) + (4,))


class LinenOwnDense(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("weight", nn.initializers.ones, (4, 3), jnp.float32).T
        return y + self.param("offset", nn.initializers.ones, (4,), jnp.float32).reshape((1,) * (y.ndim - 1) + (4,)) if self.bias else y


def layer(kind, *args, **options):
    return lambda bias: kind(*args, **({"use_bias": bias} | options), rngs=rngs())


# name: (layer of a bias, how many features the norm has, its options, the shape of x)
LAYERS = {
    "Linear": (layer(nnx.Linear, 3, 4), 4, {}, (2, 5, 3)),
    "Conv": (layer(nnx.Conv, 3, 4, (3, 3), strides=2), 4, {}, IMAGE),
    "grouped Conv": (layer(nnx.Conv, 4, 6, (3,), feature_group_count=2, padding="CAUSAL"), 6, {}, (2, 5, 4)),
    "Conv of batch axes": (layer(nnx.Conv, 3, 4, (3,), kernel_dilation=2, padding="CIRCULAR"), 4, {}, (2, 2, 6, 3)),
    "depthwise Conv": (layer(nnx.Conv, 3, 6, (3, 3), feature_group_count=3), 6, {}, IMAGE),
    "masked Conv": (layer(nnx.Conv, 3, 4, (3,), mask=np.broadcast_to(np.tri(3)[:, :, None], (3, 3, 4))), 4, {}, (2, 5, 3)),
    "ConvTranspose": (layer(nnx.ConvTranspose, 3, 4, (3, 3), strides=2), 4, {}, IMAGE),
    "transpose_kernel": (layer(nnx.ConvTranspose, 3, 4, (3,), strides=2, transpose_kernel=True), 4, {}, (2, 5, 3)),
    "circular ConvTranspose": (layer(nnx.ConvTranspose, 3, 4, (3,), strides=2, padding="CIRCULAR"), 4, {}, (2, 5, 3)),
    "LinearGeneral": (layer(nnx.LinearGeneral, 3, (2, 4)), 8, {"axis": (-2, -1)}, (2, 5, 3)),
    "LinearGeneral, last axis": (layer(nnx.LinearGeneral, 3, (2, 4)), 4, {}, (2, 5, 3)),
    "LinearGeneral, batch axes": (layer(nnx.LinearGeneral, 3, 4, batch_axis={0: 2}), 4, {}, (2, 5, 3)),
    "Einsum": (lambda bias: nnx.Einsum("bsi,ihk->bksh", (3, 2, 4), (4, 2) if bias else None, rngs=rngs()), 2, {}, (2, 5, 3)),
    "a layer of one's own": (OwnDense, 4, {}, (2, 5, 3)),
}
LINEN = {
    "Dense": (lambda bias: nn.Dense(4, use_bias=bias), {}, (2, 5, 3)),
    "Conv": (lambda bias: nn.Conv(4, (3, 3), strides=2, feature_group_count=2, use_bias=bias), {}, (2, 6, 6, 4)),
    "ConvTranspose": (lambda bias: nn.ConvTranspose(4, (3,), strides=2, transpose_kernel=True, use_bias=bias), {}, (2, 5, 3)),
    "circular ConvTranspose": (lambda bias: nn.ConvTranspose(4, (3,), padding="CIRCULAR", use_bias=bias), {}, (2, 5, 3)),
    "DenseGeneral": (lambda bias: nn.DenseGeneral((2, 4), axis=(1, -1), use_bias=bias), {"axis": (-2, -1)}, (2, 5, 3)),
    "Einsum": (lambda bias: nn.Einsum((3, 2, 4), "bsi,ihk->bksh", use_bias=bias), {"axis": 1}, (2, 5, 3)),
    "a layer of one's own": (LinenOwnDense, {}, (2, 5, 3)),
}
# Layers that have no place for a bias after all else that they do.
NO_PLACE = ("a layer of one's own", "circular ConvTranspose")


@pytest.mark.parametrize("kind, bias", checkerboard(LAYERS, (False, True)))
def test_the_layer_before(kind, bias, rng, x64):
    make, features, options, shape = LAYERS[kind]
    model = ready(Net(chain("layer", "norm"), layer=make(bias), norm=norm(features, **options)), rng)
    folded, _ = check_nnx(model, rng.normal(size=shape), {"norm": "layer"})
    assert not nnx.state(folded, nnx.BatchStat)
    if kind not in NO_PLACE:
        assert folded.layer.bias is not None and folded.norm.bias is None


@pytest.mark.parametrize("kind, bias", checkerboard(LINEN, (True, False)))
def test_the_layer_before_in_linen(kind, bias, rng, x64):
    make, options, shape = LINEN[kind]
    model, x = Fn(lambda x: linen_norm(name="norm", **options)(make(bias)(x))), rng.normal(size=shape)
    variables = init(model, x, rng)
    (name,) = set(variables["params"]) - {"norm"}
    folded = check_linen(model, variables, x, {"norm": name})
    assert "batch_stats" not in folded.variables
    assert ("norm" in folded.variables["params"]) == (kind in NO_PLACE and not bias)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_folded_variables_are_those_of_the_layer_with_a_bias(bias, rng, x64):
    """Such as a model of the same layers without norms takes them."""
    for make, axis in ((functools.partial(nn.Einsum, (3, 2, 4), "bsi,ihk->bksh"), 1), (functools.partial(nn.DenseGeneral, (2, 4)), -1)):
        x = rng.normal(size=(2, 5, 3))
        model = Fn(lambda x, make=make, axis=axis: linen_norm(axis=axis, name="norm")(make(use_bias=bias, name="layer")(x)))
        folded = tools.fold(model, init(model, x, rng), x)
        plain = Fn(lambda x, make=make: make(use_bias=True, name="layer")(x))
        np.testing.assert_array_equal(plain.apply(folded.variables, x), folded.apply(x))


# --- Layers after a norm ------------------------------------------------------------------------------------------------------

AFTER = {
    "Linear": (layer(nnx.Linear, 3, 4), 3, {}, (2, 5, 3)),
    "Conv": (layer(nnx.Conv, 3, 4, (3, 3), padding="VALID", strides=2), 3, {}, IMAGE),
    "no padding in numbers": (layer(nnx.Conv, 3, 4, (2,), padding=0, kernel_dilation=2), 3, {}, (2, 6, 3)),
    "circular Conv": (layer(nnx.Conv, 3, 4, (3, 3), padding="CIRCULAR"), 3, {}, IMAGE),
    "reflecting Conv": (layer(nnx.Conv, 3, 4, (3,), padding="REFLECT"), 3, {}, (2, 6, 3)),
    "grouped Conv": (layer(nnx.Conv, 4, 6, (3,), padding="VALID", feature_group_count=2), 4, {}, (2, 6, 4)),
    "depthwise Conv": (layer(nnx.Conv, 3, 6, (3,), padding="VALID", feature_group_count=3), 3, {}, (2, 6, 3)),
    "LinearGeneral": (layer(nnx.LinearGeneral, (2, 3), (4, 2), axis=(-2, -1)), 6, {"axis": (-2, -1)}, (5, 2, 3)),
    "LinearGeneral, last axis": (layer(nnx.LinearGeneral, (2, 3), 4, axis=(-2, -1)), 3, {}, (5, 2, 3)),
    "LinearGeneral, batch axes": (layer(nnx.LinearGeneral, 3, 4, batch_axis={0: 2}), 3, {}, (2, 5, 3)),
    "Einsum": (lambda bias: nnx.Einsum("bsi,ihk->bksh", (3, 2, 4), (4, 2) if bias else None, rngs=rngs()), 3, {}, (2, 5, 3)),
}


@pytest.mark.parametrize("kind, bias", checkerboard(AFTER, (False, True)))
def test_the_layer_after(kind, bias, rng, x64):
    make, features, options, shape = AFTER[kind]
    model = ready(Net(chain("norm", "layer"), layer=make(bias), norm=norm(features, **options)), rng)
    folded, report = check_nnx(model, rng.normal(size=shape), {"norm": "layer"})
    assert report[0].direction == "next" and folded.layer.bias is not None


def test_the_layer_after_in_linen(rng, x64):
    for make in (lambda: nn.Dense(4, use_bias=False, name="layer"), lambda: nn.DenseGeneral((2, 2), axis=(1, -1), name="layer")):
        model = Fn(lambda x, make=make: make()(linen_norm(name="norm")(x)))
        x = rng.normal(size=(2, 5, 3))
        check_linen(model, init(model, x, rng), x, {"norm": "layer"})


def test_norms_on_both_sides_of_a_layer(rng, x64):
    """The first has no layer before it; both go into the one between, which gets one bias."""
    model = Net(chain("norm1", "layer", "norm2"), norm1=norm(3), layer=nnx.Linear(3, 4, use_bias=False, rngs=rngs()), norm2=norm(4))
    check_nnx(ready(model, rng), rng.normal(size=(5, 3)), {"norm1": "layer", "norm2": "layer"})


def test_moved_axes_between(rng, x64):
    """Channels first for the norm; positions flattened, pieces cut, and the axis of the heads merged."""

    def run(net, x):
        y = net.norm1(net.conv(x).transpose(0, 3, 1, 2))
        y = net.norm2(net.heads(y.transpose(0, 2, 3, 1)[:, 1:].reshape(-1, 4)).reshape(-1, 6))
        return net.dense(net.norm3(jnp.tanh(y))[::2, None].reshape(-1, 2, 3))

    model = Net(
        run,
        conv=nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs()), norm1=norm(4, axis=1),
        heads=nnx.LinearGeneral(4, (2, 3), rngs=rngs()), norm2=norm(6), norm3=norm(6),
        dense=nnx.LinearGeneral((2, 3), 5, axis=(1, 2), rngs=rngs()),
    )  # fmt: skip
    check_nnx(ready(model, rng), rng.normal(size=IMAGE), {"norm1": "conv", "norm2": "heads", "norm3": "dense"})


# --- Norms --------------------------------------------------------------------------------------------------------------------

NORMS = {
    "Flax": lambda: nnx.BatchNorm(4, epsilon=0.1, rngs=rngs()),
    "no scale, no bias": lambda: norm(4, use_scale=False, use_bias=False),
    "BatchRenorm": lambda: norm(4, jnx.BatchRenorm),
    "GhostBatchNorm": lambda: norm(4, jnx.GhostBatchNorm, group_size=1),
    "MeanOnlyBatchNorm": lambda: jnx.MeanOnlyBatchNorm(4, rngs=rngs()),
    "CrossMiniBatchNorm": lambda: norm(4, jnx.CrossMiniBatchNorm, num_mini_batches=2),
    "TrackedInstanceNorm": lambda: norm(4, jnx.TrackedInstanceNorm),
    "FeatureStandardization": lambda: jnx.FeatureStandardization(4, correction=1, minimum_std=0.7),
    "activation": lambda: norm(4, activation="gelu"),
    "callable": lambda: norm(4, activation=jnp.tanh),
}


@pytest.mark.parametrize("kind", every_other(NORMS))
def test_each_norm(kind, rng, x64):
    model = Net(chain("layer", "norm"), layer=nnx.Linear(3, 4, use_bias=False, rngs=rngs()), norm=NORMS[kind]())
    model = ready(model, rng)
    if kind == "FeatureStandardization":
        model.norm.count.set_value(jnp.full(4, 9.0))
    check_nnx(model, rng.normal(size=(2, 5, 3)), {"norm": "layer"})


def test_a_norm_that_calls_its_layer(rng, x64):
    options, conv = {"epsilon": 0.1, "activation": "relu"}, functools.partial(nn.Conv, 4, (3,), use_bias=False, name="conv")
    inner = nnx.Conv(3, 4, (3,), use_bias=False, rngs=rngs())
    model = Net(chain("norm"), norm=jnx.CrossIterationBatchNorm(inner, rngs=rngs(), **options))
    check_nnx(ready(model, rng), rng.normal(size=(2, 5, 3)), {"norm": "norm/layer_instance"})
    linen = Fn(lambda x: jnn.CrossIterationBatchNorm(conv(), use_running_average=True, name="norm", **options)(x))
    x = rng.normal(size=(2, 5, 3))
    check_linen(linen, init(linen, x, rng), x, {"norm": "conv"})


def test_residual_and_activation_stay(rng, x64):
    def run(net, x):
        return net.norm(net.layer(x), residual=x)

    model = Net(run, layer=nnx.Linear(3, 3, use_bias=False, rngs=rngs()), norm=norm(3, activation="silu"))
    check_nnx(ready(model, rng), rng.normal(size=(2, 5, 3)), {"norm": "layer"})
    linen = Fn(lambda x: linen_norm(name="norm", activation="silu")(LinenOwnDense(False, name="layer")(x)[..., :3], residual=x[..., :3]))
    x = rng.normal(size=(2, 5, 3))
    assert tools.fold(linen, init(linen, x, rng), x).report.kept["norm"].startswith("its input comes from slice")
    linen = Fn(
        lambda x: linen_norm(name="norm", activation="silu")(LinenOwnDense(False, name="layer")(x), residual=jnp.ones((2, 5, 4), x.dtype))
    )
    check_linen(linen, init(linen, x, rng), x, {"norm": "layer"})


@pytest.mark.slow
def test_wrapped_layers_are_made_plain(rng, x64):
    def run(net, x):
        x = net.norm1(net.conv(x))
        return net.norm3(net.last(net.norm2(net.dense(x, update_stats=False))))

    model = Net(
        run,
        conv=jnx.WeightNorm(nnx.Conv(3, 4, (3,), use_bias=False, rngs=rngs()), rngs=rngs()), norm1=norm(4),
        dense=jnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs()), rngs=rngs()), norm2=norm(4),
        last=jnx.WeightStandardization(jnx.WeightNorm(nnx.Linear(4, 5, rngs=rngs()), rngs=rngs()), rngs=rngs()), norm3=norm(5),
    )  # fmt: skip
    wanted = {"norm1": "conv", "norm2": "dense/layer_instance", "norm3": "last"}
    folded, _ = check_nnx(ready(model, rng), rng.normal(size=(2, 5, 3)), wanted)
    assert type(folded.conv) is nnx.Conv and type(folded.last) is nnx.Linear


def test_wrapped_layers_are_made_plain_in_linen(rng, x64):
    def run(x):
        x = linen_norm(name="norm1")(jnn.WeightNorm(nn.Conv(4, (3,), use_bias=False, name="conv"))(x))
        x = linen_norm(name="norm2")(jnn.SpectralNorm(nn.Dense(4, name="dense"))(x, update_stats=False))
        return linen_norm(name="norm3")(jnn.WeightStandardization(nn.Dense(5, name="last"))(x))

    model, x = Fn(run), rng.normal(size=(2, 5, 3))
    variables = init(model, x, rng)
    folded = check_linen(model, variables, x, {"norm1": "conv", "norm2": "dense", "norm3": "last"})
    assert set(folded.variables["params"]) == {"conv", "dense", "last"} and set(folded.variables) == {"params"}


# --- Norms that stay ----------------------------------------------------------------------------------------------------------


def both(net, x):
    y = net.layer(x)
    return net.norm(y) + y


def twice(net, x):
    return net.norm(net.layer(net.norm(net.layer(x))))


def shared(net, x):
    return net.norm(net.layer(x)) + net.layer(2 * x)


def tied(net, x):
    return net.norm(net.layer(x)) @ net.layer.kernel[...].T


def looped(net, x):
    return jax.lax.scan(lambda carry, _: (net.norm(net.layer(carry)), None), x, None, length=2)[0]


def mapped(net, x):
    return jax.vmap(lambda row: net.norm(net.layer(row[None])))(x)


def sown(net, x):
    y = net.layer(x)
    net.seen = nnx.Intermediate(y)
    return net.norm(y)


def given_out(net, x):
    y = net.norm(jnp.tanh(x))
    return net.layer(y), y


def between(f):
    return lambda net, x: net.norm(f(net.layer(x)))


def before_tanh(net, x):
    return net.layer(jnp.tanh(net.norm(jnp.tanh(x))))


def as_weight(net, x):
    return x @ net.norm(jnp.tanh(net.layer(x))).T


def pool(y):
    return jax.lax.reduce_window(y, 0.0, jax.lax.add, (2, 1), (1, 1), "SAME")


KEPT = {
    "its input is used": (both, ["its input is used elsewhere"]),
    "called twice": (twice, ["it is called 2 times"]),
    "a shared layer": (shared, ["layer/bias", "more than once"]),
    "a tied kernel": (tied, ["layer/kernel", "more than once"]),
    "in a scan": (looped, ["in the body of a scan"]),
    "under vmap": (mapped, ["under vmap"]),
    "sown": (sown, ["its input is used elsewhere"]),
    "an activation between": (between(nnx.relu), ["its input comes from relu", "not from a linear layer"]),
    "a pooling between": (between(pool), ["reduce_window"]),
    "a sum before": (between(lambda y: y + jnp.cos(y)), ["its input comes from add"]),
    "a product before": (between(lambda y: y * 2), ["its input comes from mul"]),
    "a bias of all": (between(lambda y: y + 2.0), ["its input comes from add"]),
    "positions mixed": (between(lambda y: jnp.flip(y, -1)), ["its input comes from _flip (rev)"]),
    "features cut": (between(lambda y: jnp.concatenate([y, y], 0)), ["its input comes from concatenate"]),
    "its output is given out": (given_out, ["tanh", "its output is given out"]),
    "an activation after": (before_tanh, ["its output goes to tanh"]),
    "a weight": (as_weight, ["no parameter of the model"]),
}


@pytest.mark.parametrize("call, fragments", KEPT.values(), ids=KEPT)
def test_what_stays(call, fragments, rng):
    """With the reason, and the copy is as the model."""
    model = Net(call, layer=nnx.Linear(3, 3, rngs=rngs()), norm=norm(3))
    model.eval()
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    folded, report = tools.fold(model, x)
    assert not report.folded and all(f in report.kept["norm"] for f in fragments), str(report)
    assert type(folded.norm) is jnx.BatchNorm and nnx.graphdef(folded) == nnx.graphdef(model)
    for got, want in zip(leaves(nnx.state(folded)), leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(got, want)


ZEROS = {
    "SAME": lambda: nnx.Conv(3, 4, (3,), rngs=rngs()),
    "CAUSAL": lambda: nnx.Conv(3, 4, (2,), padding="CAUSAL", rngs=rngs()),
    "one side": lambda: nnx.Conv(3, 4, (3,), padding=((0, 1),), rngs=rngs()),
    "ConvTranspose": lambda: nnx.ConvTranspose(3, 4, (3,), padding="VALID", rngs=rngs()),
    "strided ConvTranspose": lambda: nnx.ConvTranspose(3, 4, (2,), strides=2, rngs=rngs()),
    "masked": lambda: nnx.Conv(3, 4, (1,), mask=np.tri(3, 4)[None], rngs=rngs()),
}


@pytest.mark.parametrize("kind", ZEROS)
def test_zeros_that_the_norm_did_not_make(kind):
    """A shift of the input is missing where a convolution sees padding; with a layer before the norm nothing of that matters."""
    model = Net(chain("norm", "layer"), layer=ZEROS[kind](), norm=norm(3))
    model.eval()
    _, report = tools.fold(model, jnp.ones((2, 5, 3)))
    assert ("masks" if kind == "masked" else "zeros") in report.kept["norm"]


def test_the_zeros_would_have_been_wrong(rng, x64):
    """What `fold` refuses, done by hand: right inside, wrong at the border."""
    model = ready(Net(chain("norm", "layer"), layer=nnx.Conv(3, 4, (3,), rngs=rngs()), norm=norm(3)), rng)
    x, n = rng.normal(size=(2, 6, 3)), model.norm
    want, state = model(x), {"mean": n.mean[...], "var": n.var[...]}
    kernel, bias = tools.fold_into_next(model.layer.kernel[...], model.layer.bias[...], state, n.scale[...], n.bias[...], epsilon=0.1)
    model.layer.kernel.set_value(kernel)
    model.layer.bias.set_value(bias)
    got = model.layer(x)
    close(got[:, 1:-1], want[:, 1:-1])
    assert (abs(got - want)[:, [0, -1]] > 1e-3).any()


def test_a_layer_without_a_place_for_a_bias():
    """Before the norm the bias stays at the norm; after it there is nowhere to put it."""
    model = Net(chain("norm", "layer"), layer=OwnDense(False), norm=norm(3))
    model.eval()
    assert "has no bias" in tools.fold(model, jnp.ones((2, 3))).report.kept["norm"]


def test_options_of_the_call_that_are_no_affine_map():
    calls = {
        "called with fit": lambda net, x: net.features(net.layer(x), fit=True),
        "running statistics move": lambda net, x: net.norm(net.layer(x), update_running=True),
    }
    for reason, call in calls.items():
        model = Net(call, layer=nnx.Linear(3, 3, rngs=rngs()), norm=norm(3), features=jnx.FeatureStandardization(3))
        model.eval()
        assert reason in tools.fold(model, jnp.ones((2, 3))).report.kept["features" if "fit" in reason else "norm"]


def test_norms_that_are_no_affine_map():
    norms = {"each sample": norm(3, jnx.LayerNorm), "own statistics": norm(3, jnx.EvalNorm, mean_weight=0.5), "around": None}
    norms["around"] = jnx.DivisiveBatchNorm(3, rngs=rngs())
    norms["not asked for"] = norm(3)
    model = Net(chain(*(f"norm{i}" for i in range(4))), **{f"norm{i}": n for i, n in enumerate(norms.values())})
    model.eval()
    report = tools.fold(model, jnp.ones((2, 4, 3)), layers="norm[012]").report
    for reason, why in zip(norms, (report.kept[f"norm{i}"] for i in range(4)), strict=True):
        assert reason in why


def test_linen_reasons(rng):
    """Loops, calls under vmap and sown values, as Linen has them."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return linen_norm(name="norm")(nn.Dense(3, name="layer")(x)), None

    def scanned(x):
        return nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)(name="loop")(x, None)[0]

    def sown_in(x):
        class Sows(nn.Module):
            @nn.compact
            def __call__(self, x):
                y = nn.Dense(3)(x)
                self.sow("intermediates", "y", y)
                return linen_norm(name="norm")(y)

        return Sows(name="sows")(x)

    x = jnp.ones((2, 3))
    for run, path, reason in ((scanned, "loop/norm", "in the body of a scan"), (sown_in, "sows/norm", "used elsewhere")):
        model = Fn(run)
        assert reason in tools.fold(model, model.init(jax.random.key(0), x), x).report.kept[path]


# --- Whole models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [jnn, pytest.param(nn, marks=pytest.mark.slow)], ids=["jnorm", "flax"])
def test_resnet_in_linen(norms, rng, x64):
    model, x = models.ResNet(norms, jnp.float64), rng.normal(size=(2, 8, 8, 3))
    variables = init(model, x, rng, like=np.float64, train=False)
    frozen = flax.core.freeze(variables)
    folded = tools.fold(model, frozen, x, train=False)
    assert len(folded.report.folded) == 20 and not folded.report.kept
    assert all(layer == name.replace("BatchNorm", "Conv") for name, layer in folded.report.folded.items())
    assert isinstance(folded.variables, flax.core.FrozenDict) and set(folded.variables) == {"params"}
    close(*jax.jit(lambda folded, variables: (folded.apply(x, train=False), model.apply(variables, x, train=False)))(folded, variables))
    left = primitives(jax.make_jaxpr(lambda folded, x: folded.apply(x, train=False))(folded, x).jaxpr)
    assert not left & {"rsqrt", "sqrt", "jnorm_apply", "jnorm_mark"} and "conv_general_dilated" in left
    restored = flax.serialization.from_bytes(folded.variables, flax.serialization.to_bytes(folded.variables))
    jax.tree.map(np.testing.assert_array_equal, restored, folded.variables)


@pytest.mark.slow
@pytest.mark.parametrize("norms", [jnx, nnx], ids=["jnorm", "flax"])
def test_resnet_in_nnx(norms, rng, x64):
    model, x = ready(models.NNXResNet(norms, rngs(), jnp.float64), rng), rng.normal(size=(2, 8, 8, 3))
    folded, report = tools.fold(model, x)
    assert len(report.folded) == 20 and not report.kept
    got, want = run_both(folded, model, x)
    close(got, want)
    graphdef, state = nnx.split(folded)
    left = primitives(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x).jaxpr)
    assert not left & {"rsqrt", "sqrt", "jnorm_apply", "jnorm_mark"} and "conv_general_dilated" in left
    assert not nnx.state(folded, nnx.BatchStat)
    nnx.view(folded, use_running_average=True)
    pure = nnx.to_pure_dict(nnx.state(folded))
    restored = nnx.clone(folded)
    nnx.update(restored, jax.tree.map(jnp.zeros_like, pure))
    nnx.update(restored, pure)
    for a, b in zip(leaves(nnx.state(restored)), leaves(nnx.state(folded)), strict=True):
        np.testing.assert_array_equal(a, b)


def three_layers():
    layers = [(nnx.Conv(n, 6, (3, 3), use_bias=False, rngs=rngs()), norm(6), nnx.relu) for n in (3, 6, 6)]
    return nnx.Sequential(*(m for three in layers for m in three))


@pytest.mark.parametrize(
    "make, depth",
    [(three_layers, 3), pytest.param(lambda: models.NNXResNet(jnx, rngs()), 20, marks=pytest.mark.slow)],
    ids=["three layers", "resnet"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_folded_model_is_near_to_the_truth(dtype, make, depth, rng):
    """As the model itself in its dtype, and the rounding of each kernel, in directions that know nothing of each other.

    The truth is in float64, of the same numbers.
    """
    model, x = make(), rng.normal(size=(2, 8, 8, 3)).astype(dtype)
    model.eval()
    params, statistics = (models.with_values(nnx.state(model, kind), rng) for kind in (nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree.map(lambda a: a.astype(dtype), params))
    nnx.update(model, statistics)
    with jax.numpy_dtype_promotion("standard"):  # bfloat16 parameters beside float32 statistics
        folded, report = tools.fold(model, x)
        got, unfolded = map(oracles.wide, run_both(folded, model, x))
    assert len(report.folded) == depth and {a.dtype for a in jax.tree.leaves(nnx.state(folded))} == {jnp.dtype(dtype)}
    with jax.enable_x64(True):
        nnx.update(model, jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), nnx.state(model)))
        truth = np.asarray(nnx.jit(lambda model, x: model(x))(model, np.asarray(x, np.float64)))
    error, unavoidable, size = (np.sqrt(np.mean(a**2)) for a in (got - truth, unfolded - truth, truth))
    assert error <= 2 * unavoidable + depth**0.5 * float(jnp.finfo(dtype).eps) / 2 * size, (error, unavoidable, size)


def test_transformers_have_nothing_to_fold(rng):
    x = jnp.ones((2, 4, 8))
    report = tools.fold(models.NNXTransformer(jnx, rngs()), x).report
    assert not report.folded and set(report.kept.values()) == {"its statistics are those of each sample"}
    model = models.Transformer(jnn)
    with jax.numpy_dtype_promotion("standard"):
        variables = model.init(jax.random.key(0), x, train=False)
        folded = tools.fold(model, variables, x, train=False)
        np.testing.assert_array_equal(folded.apply(x, train=False), model.apply(variables, x, train=False))
    assert len(folded.report.kept) == 3 and "0 of 3 norms folded" in str(folded.report)


def test_fifty_layers_are_one_program(compilations):
    """Whatever the number of layers, nothing is compiled for each."""
    layers = [m for i in range(50) for m in (nnx.Linear(4 + i % 2, 5 - i % 2, rngs=rngs()), norm(5 - i % 2), nnx.relu)]
    model = nnx.Sequential(*layers)
    model.eval()
    tools.fold(nnx.Sequential(*layers[:2]), jnp.ones((2, 4)))  # what is compiled once for all models
    with compilations() as count:
        report = tools.fold(model, jnp.ones((2, 4))).report
    assert len(report.folded) == 50 and count() <= 2


def test_functions_within_are_looked_into(rng, x64):
    """jit, remat and custom derivatives compute what their bodies do, in both APIs."""

    def run(net, x):
        inner = nnx.jit(lambda net, x: net.norm(net.layer(x)))
        return nnx.remat(lambda net, x: net.norm2(net.layer2(x)))(net, inner(net, x))

    model = Net(run, layer=nnx.Linear(3, 4, rngs=rngs()), norm=norm(4), layer2=nnx.Linear(4, 4, use_bias=False, rngs=rngs()), norm2=norm(4))
    check_nnx(ready(model, rng), rng.normal(size=(2, 3)), {"norm": "layer", "norm2": "layer2"})

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen_norm(name="norm")(nn.Dense(4, name="layer")(x))

    linen, x = Fn(lambda x: nn.remat(Block)(name="b")(nn.jit(Block)(name="a")(x))), rng.normal(size=(2, 3))
    check_linen(linen, init(linen, x, rng), x, {"a/norm": "a/layer", "b/norm": "b/layer"})


def test_boxes_of_metadata_and_shapes_alone(rng, x64):
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = Fn(lambda x: linen_norm(name="norm")(nn.Dense(4, kernel_init=kernel_init, name="layer")(x)))
    x = rng.normal(size=(2, 3))
    variables = init(model, x, rng)
    folded = tools.fold(model, variables, jax.ShapeDtypeStruct((2, 3), jnp.float64))
    assert folded.variables["params"]["layer"]["kernel"].names == (None, "model")
    close(folded.apply(x), model.apply(variables, x))


def test_some_of_the_norms(rng, x64):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs()), norm(4), nnx.relu, nnx.Linear(4, 4, rngs=rngs()), norm(4))
    folded, report = check_nnx(ready(model, rng), rng.normal(size=(2, 3)), {"layers/4": "layers/3"}, layers="layers/4")
    assert report.kept == {"layers/1": "it was not asked for"} and type(folded.layers[1]) is jnx.BatchNorm
    assert str(report).splitlines() == [
        "1 of 2 norms folded",
        "layers/1  kept because it was not asked for",
        "layers/4  folded into 'layers/3', before it",
    ]


def test_a_model_that_is_a_norm():
    model = norm(3)
    model.eval()
    folded, report = tools.fold(model, jnp.ones((2, 3)))
    assert type(folded) is jnx.BatchNorm and "no output of a layer" in report.kept[""]


def test_the_output_keeps_its_dtype(rng):
    model = Net(chain("layer", "norm"), layer=nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=rngs()), norm=norm(4, dtype=jnp.float32))
    model.eval()
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    assert tools.fold(model, x).model(x).dtype == model(x).dtype == jnp.float32


# --- Refusals -------------------------------------------------------------------------------------------------------------------


def test_training_mode():
    model = Net(chain("layer", "norm"), layer=nnx.Linear(3, 4, rngs=rngs()), norm=norm(4))
    with refuses("'norm'", "model.eval()", "use_running_average"):
        tools.fold(model, jnp.ones((2, 3)))
    linen, x = models.ResNet(jnn), jnp.ones((2, 8, 8, 3))
    variables = jax.eval_shape(functools.partial(linen.init, train=False), jax.random.key(0), x)
    with refuses("'BatchNorm_0'", "train=False", "use_running_average"):
        tools.fold(linen, variables, x, train=True)


def test_no_norms_and_no_matches():
    with refuses("there is no norm", "BatchNorm"):
        tools.fold(nnx.Linear(3, 4, rngs=rngs()), jnp.ones((2, 3)))
    x = jnp.ones((2, 3))
    with refuses("there is no norm", "BatchNorm"):
        tools.fold(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), x), x)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs()), norm(4))
    model.eval()
    with refuses("layers='encoder'", "'layers/1'"):
        tools.fold(model, x, layers="encoder")


def test_what_is_no_model():
    with refuses("Linen or an NNX module", "dict", kind=TypeError):
        tools.fold({}, jnp.ones(3))
    with refuses("variables", kind=TypeError):
        tools.fold(nn.Dense(3), jnp.ones((2, 3)))


def test_a_model_that_reads_its_norm():
    model = Net(lambda net, x: net.norm(net.layer(x)) * net.norm.scale[...], layer=nnx.Linear(3, 4, rngs=rngs()), norm=norm(4))
    model.eval()
    with refuses("'scale'", "'norm'", "layers", kind=AttributeError):
        tools.fold(model, jnp.ones((2, 3)))


def test_variables_of_another_model(rng):
    """Flax's own errors name the parameter."""
    model, x = models.ResNet(jnn), jnp.ones((2, 8, 8, 3))
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    params = variables["params"]
    with refuses("Conv_0", kind=flax.errors.ScopeParamNotFoundError):
        tools.fold(model, {**variables, "params": {name: v for name, v in params.items() if name != "Conv_0"}}, x, train=False)
    wrong = {**params, "Conv_3": {"kernel": jnp.ones((3, 3, 5, 4))}}
    with refuses("Conv_3", "(3, 3, 5, 4)", kind=flax.errors.ScopeParamShapeError):
        tools.fold(model, {**variables, "params": wrong}, x, train=False)
