"""Folding where modules are called through transformations, of Flax or JAX: compiled, rematerialized, mapped, looped, differentiated."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from test_fold import Fn, Net, check_linen, check_nnx, close, init, linen_norm, norm, ready, rngs

X = (2, 5, 4)


def lifted(transform, kind, *args, **options):
    return transform(kind)(*args, **options)


# --- Linen -----------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer, in a wrapper of its weights or not, and a norm."""

    wrapper: object = None

    @nn.compact
    def __call__(self, x, _=None):
        layer = nn.Dense(4, use_bias=False, name="layer")
        return linen_norm(name="norm")((layer if self.wrapper is None else self.wrapper(layer, name="wrapper"))(x))


class Wrapped(nn.Module):
    """A layer in a wrapper alone."""

    @nn.compact
    def __call__(self, x):
        return jnn.WeightNorm(nn.Dense(4, name="layer"), name="wrapper")(x)


class Step(nn.Module):
    """A block as a scan takes it."""

    wrapper: object = None

    @nn.compact
    def __call__(self, x, _):
        return Block(self.wrapper, name="block")(x), None


def remat_jit(kind):
    return nn.remat(nn.jit(kind))


THROUGH = {"jit": nn.jit, "remat": nn.remat, "remat of jit": remat_jit}
STACKED = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
ALL_STACKED = {**STACKED, "variable_axes": {True: 0}}


@pytest.mark.parametrize("kind", [jnn.BatchNorm, nn.BatchNorm], ids=["jnorm", "flax"])
@pytest.mark.parametrize("through", THROUGH)
def test_lifted_norms_and_layers(through, kind, rng, x64):
    def run(x):
        x = lifted(THROUGH[through], nn.Dense, 3, use_bias=False, name="layer")(x)
        x = lifted(THROUGH[through], kind, use_running_average=True, name="norm")(x)
        return lifted(THROUGH[through], Block, name="block")(nn.relu(x))

    model, x = Fn(run), rng.normal(size=X)
    variables = init(model, x, rng)
    model.apply(variables, x)  # so that there is a cache of what is compiled
    check_linen(model, variables, x, {"norm": "layer", "block/norm": "block/layer"})


@pytest.mark.parametrize("through", THROUGH)
def test_lifted_wrappers(through, rng, x64):
    """The wrapper itself, and a module that it is in."""

    def run(x):
        x = lifted(THROUGH[through], jnn.WeightNorm, nn.Dense(4, use_bias=False, name="layer"), name="wrapper")(x)
        return lifted(THROUGH[through], Block, jnn.WeightStandardization, name="block")(nn.relu(linen_norm(name="norm")(x)))

    model, x = Fn(run), rng.normal(size=X)
    variables = init(model, x, rng)
    model.apply(variables, x)
    folded = check_linen(model, variables, x, {"norm": "layer", "block/norm": "block/layer"})
    assert set(folded.variables["params"]) == {"layer", "block"} and set(folded.variables["params"]["block"]) == {"layer"}


@pytest.mark.parametrize("wrapper", [None, jnn.WeightNorm], ids=["plain", "wrapped"])
@pytest.mark.parametrize("axes", [STACKED, ALL_STACKED], ids=["some collections", "all collections"])
@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_what_is_lifted_over_an_axis_stays(kind, axes, wrapper, rng, x64):
    def scanned(x):
        return nn.scan(Step, **axes, length=3)(wrapper, name="lifted")(x, None)[0]

    def mapped(x):
        return nn.vmap(Block, **axes, in_axes=0)(wrapper, name="lifted")(x)

    model, x = Fn(scanned if kind == "scan" else mapped), rng.normal(size=(3, *X))
    folded = check_linen(model, init(model, x, rng), x, {})
    (reason,) = folded.report.kept.values()
    assert reason == ("it is called in the body of a scan" if kind == "scan" else "it is called under vmap")


@pytest.mark.parametrize("axes", [STACKED, ALL_STACKED], ids=["some collections", "all collections"])
def test_a_wrapper_that_is_mapped_beside_a_norm_that_is_not(axes, rng, x64):
    """Its weights come out of vmap where that maps all collections; else it stays, and the one that is not mapped is made plain."""

    def run(x):
        x = linen_norm(axis=(0, -1), name="norm")(nn.vmap(Wrapped, **axes, in_axes=0)(name="mapped")(x))
        return linen_norm(name="norm2")(Wrapped(name="other")(nn.relu(x)))

    model, x = Fn(run), rng.normal(size=(3, *X))
    wanted = {"norm2": "other/layer"} | ({"norm": "mapped/layer"} if axes is ALL_STACKED else {})
    folded = check_linen(model, init(model, x, rng), x, wanted)
    assert ("wrapper" in str(jax.tree_util.tree_structure(folded.variables["params"]["mapped"]))) == (axes is STACKED)


# --- NNX -------------------------------------------------------------------------------------------------------------------------


class Nested(nnx.Module):
    """Methods that are transformed."""

    def __init__(self):
        self.layer = nnx.Linear(4, 4, use_bias=False, rngs=rngs())
        self.norm = norm(4)

    @nnx.jit
    def __call__(self, x):
        return self.inner(x)

    @nnx.remat
    def inner(self, x):
        return self.norm(self.layer(x))


@nnx.jit
def called(module, x):
    return module(x)


def split_and_merged(net, x):
    graphdef, state = nnx.split(net.norm)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, net.layer(x))


NNX = {
    "jit of each": lambda net, x: called(net.norm, called(net.layer, x)),
    "remat": lambda net, x: nnx.remat(lambda norm, x: norm(x))(net.norm, net.layer(x)),
    "remat of jit": lambda net, x: nnx.remat(lambda net, x: called(net.norm, net.layer(x)))(net, x),
    "split in jax.jit": split_and_merged,
    "jax.checkpoint": lambda net, x: jax.checkpoint(lambda x: net.norm(net.layer(x)))(x),
}


@pytest.mark.parametrize("call", NNX.values(), ids=NNX)
def test_transformed_calls(call, rng, x64):
    layer = nnx.Linear(4, 4, use_bias=False, rngs=rngs())
    model, x = ready(Net(call, layer=layer, norm=norm(4)), rng), jnp.asarray(rng.normal(size=X))
    model(x)  # so that there is a cache of what is compiled
    check_nnx(model, x, {"norm": "layer"})


def test_transformed_methods(rng, x64):
    check_nnx(ready(Nested(), rng), jnp.asarray(rng.normal(size=X)), {"norm": "layer"})


def test_a_wrapper_in_a_transformed_call(rng, x64):
    layer = jnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs()), rngs=rngs())
    model = Net(NNX["remat of jit"], layer=layer, norm=norm(4))
    check_nnx(ready(model, rng), jnp.asarray(rng.normal(size=X)), {"norm": "layer"})


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.norm = jnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.layer(x))


OVER = {
    "scan": lambda net, x: nnx.scan(lambda x, pair: pair(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, net.pairs),
    "vmap": lambda net, x: nnx.vmap(lambda pair, x: pair(x), in_axes=(0, None))(net.pairs, x),
}


@pytest.mark.parametrize("call", OVER.values(), ids=OVER)
def test_what_is_transformed_over_an_axis_stays(call, rng, x64):
    model = Net(call, pairs=nnx.vmap(Pair)(rngs().split(3)))
    _, report = check_nnx(ready(model, rng), jnp.asarray(rng.normal(size=X)), {})
    assert report.kept["pairs/norm"] in ("it is called in the body of a scan", "it is called under vmap")


# --- Derivatives in a model ---------------------------------------------------------------------------------------------------


def slope(net, x):
    return nnx.grad(lambda norm, y: norm(y).sum(), argnums=1)(net.norm, net.layer(x))


def energy(net, x):
    return jax.grad(lambda x: (net.norm(net.layer(x)) ** 2).sum())(x)


def tangent(net, x):
    y = net.layer(x)
    return jax.jvp(net.norm, (y,), (jnp.ones_like(y),))[1]


@pytest.mark.parametrize("call", [slope, energy, tangent], ids=lambda call: call.__name__)
def test_what_is_differentiated_stays(call, rng, x64):
    """The derivative with respect to the norm's input has its scale in it."""
    model = Net(call, layer=nnx.Linear(4, 4, rngs=rngs()), norm=norm(4))
    _, report = check_nnx(ready(model, rng), jnp.asarray(rng.normal(size=X)), {})
    assert report.kept["norm"] == "it is called under a derivative"


def test_the_model_may_be_differentiated(rng, x64):
    """Around a fold, and around what it gives."""
    model, x = Fn(lambda x: linen_norm(name="norm")(nn.Dense(4, name="layer")(x))), jnp.asarray(rng.normal(size=X))
    variables = init(model, x, rng)

    def loss(apply, params):
        return (apply({**variables, "params": params}, x) ** 2).sum()

    def folded(variables, x):
        return tools.fold(model, variables, x).apply(x)

    want = jax.jit(jax.grad(functools.partial(loss, model.apply)))(variables["params"])
    got = jax.jit(jax.grad(functools.partial(loss, folded)))(variables["params"])
    jax.tree.map(close, got, want)
