"""What a call of a norm says about folding it, and what `fold` is called with."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from refusals import refuses
from test_fold import Fn, Net, chain, check_linen, check_nnx, init, linen_norm, norm, ready, rngs

X = np.ones((2, 3))


def layer_and(n, call=None):
    model = Net(call or chain("layer", "norm"), layer=nnx.Linear(3, 3, rngs=rngs()), norm=n)
    model.eval()
    return model


def fn(**options):
    """A Linen model of a layer and a norm."""
    return Fn(lambda x: linen_norm(name="norm")(nn.Dense(3, name="layer")(x), **options))


# --- Masks ----------------------------------------------------------------------------------------------------------------------

MASKED = {
    "BatchNorm": lambda: norm(3),
    "nnx.BatchNorm": lambda: norm(3, nnx.BatchNorm),
    "BatchRenorm": lambda: norm(3, jnx.BatchRenorm),
    "CrossMiniBatchNorm": lambda: norm(3, jnx.CrossMiniBatchNorm, num_mini_batches=2),
    "FeatureStandardization": lambda: jnx.FeatureStandardization(3),
    "GhostBatchNorm": lambda: norm(3, jnx.GhostBatchNorm, group_size=2),
    "MeanOnlyBatchNorm": lambda: jnx.MeanOnlyBatchNorm(3, rngs=rngs()),
    "TrackedInstanceNorm": lambda: norm(3, jnx.TrackedInstanceNorm),
}


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_means_nothing_in_evaluation(kind, rng, x64):
    """y is bitwise that without the mask, where that is 0 too; so it folds."""
    model = ready(layer_and(MASKED[kind](), lambda net, x: net.norm(net.layer(x), mask=x > 0)), rng)
    if kind == "FeatureStandardization":
        model.norm.count.set_value(jnp.full(3, 9.0))
    x = jnp.asarray(rng.normal(size=(2, 4, 3)))
    masks = jnp.stack([x > 0, jnp.zeros_like(x, bool), jnp.ones_like(x, bool)])
    same = nnx.jit(lambda n, masks: [n(x), *(n(x, mask=mask) for mask in masks)])
    plain, *masked = same(model.norm, masks)
    for y in masked:
        np.testing.assert_array_equal(y, plain)
    check_nnx(model, x, {"norm": "layer"})


def test_a_mask_of_a_norm_that_calls_its_layer(rng, x64):
    inner = nnx.Conv(3, 4, (1,), use_bias=False, rngs=rngs())
    model = Net(lambda net, x: net.norm(x, mask=x[..., :1] > 0), norm=jnx.CrossIterationBatchNorm(inner, rngs=rngs()))
    x = jnp.asarray(rng.normal(size=(2, 4, 3)))
    plain, masked = nnx.jit(lambda n, x: (n(x), n(x, mask=x[..., :1] > 0)))(ready(model, rng).norm, x)
    np.testing.assert_array_equal(masked, plain)
    check_nnx(model, x, {"norm": "norm/layer_instance"})


# --- Running statistics that move ---------------------------------------------------------------------------------------------


def test_frozen_norms(rng, x64):
    """The marks of freezing go before the switches, as in the norm itself."""
    model = ready(layer_and(norm(3, update_running=True)), rng)
    assert "statistics move" in tools.fold(model, X).report.kept["norm"]
    check_nnx(tools.freeze(model), jnp.asarray(rng.normal(size=(2, 3))), {"norm": "layer"})
    moving = tools.freeze(ready(layer_and(norm(3)), rng), updates=False)
    moving.train()
    assert "statistics move" in tools.fold(moving, X).report.kept["norm"]


def test_frozen_norms_in_linen(rng, x64):
    model, x = fn(update_running=True), rng.normal(size=(2, 3))
    variables = init(model, x, rng)
    with refuses("'norm'", "running statistics", "move", "train=False"):
        tools.fold(model, variables, x)
    check_linen(model, tools.freeze(variables), x, {"norm": "layer"})
    training = fn(use_running_average=False)
    with refuses("'norm'", "running statistics", "move", "train=False"):
        tools.fold(training, tools.freeze(variables, updates=False), x)


def test_norms_of_flax_know_no_marks(rng, x64):
    model = Fn(lambda x: nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(3, name="layer")(x)))
    with refuses("'norm'", "use_running_average=False"):
        tools.fold(model, tools.freeze(init(model, X, rng)), X)


# --- What is given, and what is told ----------------------------------------------------------------------------------------------


def test_parameters_that_are_no_arrays(rng, x64):
    model = ready(layer_and(norm(3)), rng)
    model.extra = nnx.Param({"a": jnp.ones(2)})
    check_nnx(model, jnp.asarray(rng.normal(size=(2, 3))), {"norm": "layer"})


def test_norms_that_are_not_called():
    model = layer_and(norm(3), lambda net, x: net.layer(x))
    assert tools.fold(model, X).report.kept["norm"] == "it is not called"
    unused = layer_and(norm(3), lambda net, x: (net.norm(x), net.layer(x))[1])
    assert tools.fold(unused, X).report.kept["norm"] == "what it gives out is not used"


def test_a_layer_that_is_the_model_itself(rng, x64):
    model = ready(Net(lambda net, x: net.norm(x @ net.kernel[...]), norm=norm(3), kernel=nnx.Param(jnp.ones((3, 3)))), rng)
    _, report = check_nnx(model, jnp.asarray(rng.normal(size=(2, 3))), {"norm": ""})
    assert str(report).splitlines()[1] == "norm  folded into the model itself, before it"


def test_arguments_of_apply(rng, x64):
    variables = init(fn(), X, rng)
    for name, value in (("mutable", ["batch_stats"]), ("capture_intermediates", True)):
        with refuses(name, "fold returns", kind=TypeError):
            tools.fold(fn(), variables, X, **{name: value})


def test_variables_that_are_not_all(rng, x64):
    variables = init(fn(), X, rng)
    with refuses("'norm'", "running statistics", "all collections"):
        tools.fold(fn(), {"params": variables["params"]}, X)
    with refuses("all variables", "batch_stats", "['layer', 'norm']"):
        tools.fold(fn(), variables["params"], X)


class Sharing(nn.Module):
    """Two modules in its own scope."""

    def setup(self):
        self.dense = nn.Dense(4, use_bias=False)
        self.norm = jnn.BatchNorm(use_running_average=True)
        nn.share_scope(self, self.norm)

    def __call__(self, x):
        return self.norm(self.dense(x))


class SharingDense(nn.Module):
    """A layer in the scope of a module that has an own `use_bias`."""

    use_bias: bool = False

    def setup(self):
        self.dense = nn.Dense(4, use_bias=False)
        nn.share_scope(self, self.dense)

    def __call__(self, x):
        x = self.dense(x)
        return x + 1 if self.use_bias else x


@pytest.mark.parametrize("within", [False, True], ids=["the model", "a module"])
def test_scopes_that_are_shared(within, rng, x64):
    """The path of the norm is that of another module."""
    model, x = (Fn(lambda x: Sharing(name="block")(x)) if within else Sharing()), rng.normal(size=(2, 3))
    folded = check_linen(model, init(model, x, rng), x, {})
    assert "Sharing shares its scope" in folded.report.kept["block" if within else ""]


def test_a_layer_in_a_shared_scope(rng, x64):
    model, x = Fn(lambda x: linen_norm(name="norm")(SharingDense(name="block")(x))), rng.normal(size=(2, 3))
    check_linen(model, init(model, x, rng), x, {"norm": "block"})
