"""Masks for optax: which parameters are those of norms, which of them do not train, and which decay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze as frozen_dict

import jnorm.linen as jnn
import jnorm.nnx as jnx
import models
from jnorm import tools
from refusals import refuses

X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
SEQUENCE = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
standard = jax.numpy_dtype_promotion("standard")


class Sundry(nn.Module):
    """Norms that hold other parameters than scale and bias, or fewer, beside layers that look like norms."""

    @nn.compact
    def __call__(self, x):
        x = jnn.CrossIterationBatchNorm(nn.Conv(4, (1, 1), use_bias=False), use_running_average=True)(x)
        x = jnn.ThresholdedLinearUnit()(jnn.FilterResponseNorm(use_learned_epsilon=True)(x))
        x = jnn.WeightNorm(nn.Dense(4))(x)
        x = jnn.DivisiveBatchNorm(use_running_average=True, use_learned_sigma=True)(x)
        x = jnn.MeanOnlyBatchNorm(use_running_average=True)(x)
        return nn.LayerNorm(scale_init=nn.with_partitioning(nn.initializers.ones, (None,)))(x)


def of_linen(model, x, **options):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, **options))["params"]


def true_paths(mask):
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    assert all(isinstance(leaf, bool) for _, leaf in leaves)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, leaf in leaves if leaf}


def paths_of(tree):
    return true_paths(jax.tree.map(lambda _: True, tree))


LINEN = {"resnet": (models.ResNet, X, "BatchNorm"), "transformer": (models.Transformer, SEQUENCE, "Norm")}


@pytest.mark.parametrize("name", LINEN)
@pytest.mark.parametrize("norms", [nn, jnn], ids=["flax", "jnorm"])
def test_models_of_linen(name, norms):
    """By structure, and by class, as by name: here norms are called so."""
    model, x, called = LINEN[name]
    params = of_linen(model(norms), x, train=True)
    want = {path for path in paths_of(params) if called in path.split("/")[0]}
    biases = {path for path in paths_of(params) if path.endswith("/bias")}

    def call(params):
        return model(norms).apply({"params": params}, x, train=True, mutable=True)

    assert want and biases - want
    for options in ({}, {"call": call}):
        assert true_paths(tools.norm_param_mask(params, **options)) == want
        assert true_paths(tools.weight_decay_mask(params, **options)) == paths_of(params) - want - biases
    assert true_paths(tools.weight_decay_mask(params, biases=False)) == paths_of(params) - want
    assert jax.tree.structure(tools.norm_param_mask(frozen_dict(params))) == jax.tree.structure(frozen_dict(params))


@pytest.mark.parametrize("norms", [nnx, jnx], ids=["flax", "jnorm"])
@pytest.mark.parametrize("model", [models.NNXResNet, models.NNXTransformer])
def test_models_of_nnx(model, norms):
    """By class, and by the structure of their parameters: what optax gives to a mask."""
    model = nnx.eval_shape(lambda: model(norms, nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    want = {path for path in paths_of(params) if "norm" in path or "shortcut/layers/1" in path}
    biases = {path for path in paths_of(params) if path.endswith("/bias")}
    assert want and biases - want
    for given in (model, params, nnx.as_pure(params), nnx.to_pure_dict(params)):
        assert true_paths(tools.norm_param_mask(given)) == want
        assert true_paths(tools.weight_decay_mask(given)) == paths_of(params) - want - biases


def test_other_parameters():
    params = of_linen(Sundry(), X)
    by_structure = {
        "CrossIterationBatchNorm_0/scale",
        "CrossIterationBatchNorm_0/bias",
        "FilterResponseNorm_0/scale",
        "FilterResponseNorm_0/bias",
        "FilterResponseNorm_0/learned_epsilon",
        "ThresholdedLinearUnit_0/threshold",
        "DivisiveBatchNorm_0/scale",
        "DivisiveBatchNorm_0/bias",
        "DivisiveBatchNorm_0/sigma",
        "LayerNorm_0/scale",
        "LayerNorm_0/bias",
    }
    assert true_paths(tools.norm_param_mask(params)) == by_structure
    call = lambda params: Sundry().apply({"params": params}, X, mutable=True)  # noqa: E731
    assert true_paths(tools.norm_param_mask(params, call=call)) == by_structure | {"MeanOnlyBatchNorm_0/bias"}
    decays = {"Conv_0/kernel", "Dense_0/kernel", "WeightNorm_0/Dense_0/kernel/scale"}
    assert true_paths(tools.weight_decay_mask(params)) == decays
    assert true_paths(tools.weight_decay_mask(params, biases=False)) == decays | {"Dense_0/bias", "MeanOnlyBatchNorm_0/bias"}


class OneScope(nn.Module):
    """Parameters of a layer and a norm, and the module's own, at one path."""

    def setup(self):
        self.dense, self.norm = nn.Dense(3), jnn.BatchNorm(use_running_average=True, use_bias=False)
        self.own = self.param("temperature", nn.initializers.ones, ())
        nn.share_scope(self, self.norm)
        nn.share_scope(self, self.dense)

    def __call__(self, x):
        return self.norm(self.dense(x)) * self.own


class Shifted(jnn.LayerNorm):
    """A norm with a parameter more."""

    @nn.compact
    def __call__(self, x):
        return jnn.LayerNorm.__call__(self, x) + self.param("shift", nn.initializers.zeros, ())


def test_norms_that_share_a_scope():
    x = jnp.ones((2, 3))
    model = nn.Sequential([OneScope(), Shifted()])
    variables = model.init(jax.random.key(0), x)
    mask = tools.norm_param_mask(variables["params"], call=lambda params: model.apply({**variables, "params": params}, x))
    assert set(variables["params"]["layers_0"]) == {"kernel", "bias", "scale", "temperature"}
    assert true_paths(mask) == {"layers_0/scale", *(f"layers_1/{name}" for name in ("scale", "bias", "shift"))}


def test_a_norm_alone_and_one_that_wraps_the_layer():
    assert tools.norm_param_mask({"scale": X, "bias": X}) == {"scale": True, "bias": True}
    wrapped = {"layer_instance": {"kernel": X}, "scale": X}
    assert tools.norm_param_mask(wrapped) == {"layer_instance": {"kernel": False}, "scale": True}
    layer = jnx.MeanOnlyBatchNorm(3, rngs=nnx.Rngs(0))
    assert true_paths(tools.norm_param_mask(layer)) == {"bias"}
    inner = {"scale": X, "query": {"kernel": X}}  # a layer with a scale of its own
    assert true_paths(tools.weight_decay_mask(inner)) == {"scale", "query/kernel"}


def test_a_choice_of_norms():
    params = of_linen(models.ResNet(jnn), X, train=True)
    chosen = tools.frozen_param_mask(params, ["BatchNorm_1", "BatchNorm_1?"])
    assert {path.split("/")[0] for path in true_paths(chosen)} == {"BatchNorm_1", *(f"BatchNorm_1{i}" for i in range(10))}
    model = nnx.eval_shape(lambda: models.NNXResNet(jnx, nnx.Rngs(0)))
    assert true_paths(tools.frozen_param_mask(model, "blocks/0")) == {
        f"blocks/0/norm{i}/{name}" for i in (1, 2) for name in ("scale", "bias")
    }
    with refuses("layers='block'", "blocks/0/norm1"):
        tools.frozen_param_mask(model, "block")
    with refuses("layers='encoder'", "BatchNorm_0"):
        tools.frozen_param_mask(params, "encoder")


def test_refusals():
    params = {"kernel": X, "bias": X}
    for mask in (tools.norm_param_mask, tools.frozen_param_mask):
        with refuses("no norm", "scale", "call"):
            mask(params)
        model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        with refuses("no norm in the model", "BatchNorm") as error:
            mask(model)
        assert "call" not in str(error.value)
        with refuses("no norm with parameters") as error:
            mask(params, call=lambda params: params)
        assert "give call" not in str(error.value)
        with refuses("call is for parameters of Linen", kind=TypeError):
            mask(model, call=lambda params: params)
    assert tools.weight_decay_mask(params) == {"kernel": True, "bias": False}
    with refuses("call is for parameters of Linen", kind=TypeError):
        tools.weight_decay_mask(model, call=lambda params: params)


def stepped(optimizer, params, gradients):
    """The parameters after one step."""

    @jax.jit
    def step(params, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    with standard:
        return step(params, gradients)


def moved(before, after):
    return {path for path, old in flat(before).items() if not np.array_equal(old, flat(after)[path])}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in leaves}


def drawn(rng):
    return models.with_values(of_linen(models.Transformer(jnn), SEQUENCE, train=True), rng)


def test_weight_decay_of_optax(rng):
    """What gradients of zero move."""
    params = drawn(rng)
    zeros, want = jax.tree.map(np.zeros_like, params), true_paths(tools.weight_decay_mask(params))
    for mask, moves in ((tools.weight_decay_mask, want), (tools.weight_decay_mask(params), want), (None, paths_of(params))):
        assert moved(params, stepped(optax.adamw(1e-2, weight_decay=0.1, mask=mask), params, zeros)) == moves


def test_what_is_frozen_does_not_move_and_has_no_moments(rng):
    params = drawn(rng)
    mask, trains = tools.frozen_param_mask(params, "LayerNorm_*"), optax.adamw(1e-2, weight_decay=0.1)
    frozen = true_paths(mask)
    parts = optax.multi_transform({False: trains, True: optax.set_to_zero()}, mask)
    for optimizer in (parts, optax.chain(trains, optax.masked(optax.set_to_zero(), mask))):
        assert moved(params, stepped(optimizer, params, params)) == paths_of(params) - frozen
    moments = [a for a in jax.tree.leaves(jax.eval_shape(parts.init, params)) if a.ndim]
    assert len(moments) == 2 * len(paths_of(params) - frozen)


@pytest.mark.parametrize("given", ["function", "mask of the model"])
def test_the_optimizer_of_nnx(given):
    """Its parameters are Variables when it starts, and arrays when it steps."""
    model = models.NNXTransformer(jnx, nnx.Rngs(0))
    mask, frozen = tools.weight_decay_mask(model), tools.frozen_param_mask(model, "block")
    decays = optax.add_decayed_weights(-0.1, mask=tools.weight_decay_mask if given == "function" else mask)
    trains = optax.multi_transform({False: optax.sgd(0.1), True: optax.set_to_zero()}, frozen)

    def params_of(model):
        return nnx.as_pure(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, gradient):
        changed = []
        for tx, g in ((decays, jax.tree.map(jnp.zeros_like, gradient)), (trains, gradient)):
            before = params_of(model)
            nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, g)
            changed.append(jax.tree.map(lambda a, b: (a != b).any(), before, params_of(model)))
        return changed

    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    decayed, trained = ({path for path, leaf in flat(tree).items() if leaf} for tree in step(model, gradients))
    start = flat(nnx.state(models.NNXTransformer(jnx, nnx.Rngs(0)), nnx.Param))
    assert decayed == {path for path in true_paths(mask) if abs(start[path]).max() > 0}  # what is 0 has nothing to decay
    assert trained == paths_of(gradients) - true_paths(frozen)
