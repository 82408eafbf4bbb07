"""Re-estimation of every norm with running statistics at once, by every estimator, in every style, merged, and beside what normalizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from test_recalibrate import DECAY, FEATURES, NORMS, check_averages, stream, truth_of

ESTIMATORS = ("pooled", "mean", "cumulative", "exponential")
WRAPPER = "CrossIterationBatchNorm"
FUNCTIONS = {name: given for name, given in NORMS.items() if given[0]}


@pytest.fixture
def batches(rng):
    """Of two shapes, which groups divide."""
    return stream(rng, (6, 2, 6))


def momentum(estimator):
    return {"momentum": DECAY} if estimator == "exponential" else {}


def functions(state, x):
    return {name: norm(x, state[name], **options)[1] for name, (norm, _, options) in FUNCTIONS.items()}


def start():
    return {name: make(FEATURES) for name, (_, make, _) in FUNCTIONS.items()}


class Linen(nn.Module):
    """Side by side: each sees the input itself, the wrapper's through a kernel that changes nothing."""

    @nn.compact
    def __call__(self, x, train):
        for name, (_, _, options) in NORMS.items():
            layer = [nn.Dense(FEATURES, use_bias=False, name="layer")] if name == WRAPPER else []
            getattr(jnn, name)(*layer, use_running_average=not train, name=name, **options)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        layer = nnx.Linear(FEATURES, FEATURES, use_bias=False, kernel_init=lambda *_: jnp.eye(FEATURES), rngs=rngs)
        made = {n: getattr(jnx, n)(layer if n == WRAPPER else FEATURES, **options, rngs=rngs) for n, (_, _, options) in NORMS.items()}
        self.norms = nnx.Dict(made)

    def __call__(self, x):
        for norm in self.norms.values():
            norm(x)


def linen():
    """The step of the collection, and the collection."""
    net = Linen()
    variables = net.init(jax.random.key(0), jnp.zeros((2, 2, FEATURES)), train=True)
    params = {**variables["params"], "layer": {"kernel": jnp.eye(FEATURES)}}

    def step(stats, x):
        return net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return jax.jit(step), variables["batch_stats"]


def found(model):
    return {name: {k: v[...] for k, v in vars(m).items() if isinstance(v, nnx.BatchStat)} for name, m in model.norms.items()}


@pytest.mark.parametrize("estimator", ["cumulative", "exponential"])
def test_averages_of_batches(estimator, batches):
    new = tools.recalibrate(jax.jit(functions), start(), batches, estimator=estimator, **momentum(estimator))
    for name, state in new.items():
        check_averages(name, state, batches, estimator)


@pytest.mark.parametrize("api", ["function", pytest.param("linen", marks=pytest.mark.slow), pytest.param("nnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("estimator", ["pooled", *(pytest.param(e, marks=pytest.mark.slow) for e in ESTIMATORS[1:])])
def test_beside_what_normalizes(api, estimator, batches):
    """The passes after the first, in which running statistics normalize and others are collected."""
    options = {"estimator": estimator, "layer_by_layer": True, **momentum(estimator)}
    if api == "nnx":
        model = Nnx(nnx.Rngs(0))
        before = jax.tree.map(jnp.shape, found(model))
        new = found(tools.recalibrate(nnx.jit(lambda m, x: m(x)), model, batches, **options))
        assert jax.tree.map(jnp.shape, new) == before
    else:
        step, state = linen() if api == "linen" else (jax.jit(functions), start())
        new = tools.recalibrate(step, state, batches, **options)
        assert jax.tree.structure(new) == jax.tree.structure(state)
    for name, state in new.items():
        check_averages(name, state, batches, estimator)


@pytest.mark.parametrize("estimator", ["pooled", "cumulative", pytest.param("mean", marks=pytest.mark.slow)])
def test_merged(estimator, batches):
    """Of each norm, in place of its averages and beside them. Instance norms merge what they average with the estimators that do."""
    step, both = jax.jit(functions), functools.partial(functools.reduce, tools.merge_populations)
    states = start()
    for given in (states, tools.freeze(states, updates=False)):
        population = tools.population_state(given, estimator=estimator)
        new = tools.population_statistics(both([step(population, x) for x in batches]))
        assert jax.tree.structure(new) == jax.tree.structure(given)
        for name, state in new.items():
            if (name, estimator) != ("TrackedInstanceNorm", "pooled"):
                check_averages(name, state, batches, estimator)


def test_exponential_forgets(batches):
    """With a momentum of 0 the last batch remains, with 1 it is cumulative; what was there before has no share."""
    step = jax.jit(lambda s, x: jnorm.batch_norm(x, s)[1])
    far = {"mean": jnp.full(FEATURES, 1e8), "var": jnp.full(FEATURES, 1e8)}
    last = tools.recalibrate(step, far, batches, estimator="exponential", momentum=0.0)
    jax.tree.map(np.testing.assert_array_equal, last, tools.recalibrate(step, far, batches[-1:], estimator="cumulative"))
    all_alike = tools.recalibrate(step, far, batches, estimator="exponential", momentum=1.0)
    jax.tree.map(np.testing.assert_array_equal, all_alike, tools.recalibrate(step, far, batches, estimator="cumulative"))


def test_as_the_norm_counts(batches):
    """With a count in the state the norm's own averages are debiased: those are the exponential and the cumulative ones."""
    run = jax.jit(lambda s, x, momentum: jnorm.batch_norm(x, s, momentum=momentum)[1])
    for estimator, rho in (("exponential", DECAY), ("cumulative", 1.0)):
        state = jnorm.batch_norm_state(FEATURES, track_count=True)
        for x in batches:
            state = run(state, x, rho)
        new = tools.recalibrate(
            lambda s, x: run(s, x, 0.9), jnorm.batch_norm_state(FEATURES), batches, estimator=estimator, **momentum(estimator)
        )
        want = truth_of("BatchNorm", batches, estimator)
        for key in ("mean", "var"):
            size = abs(want[key]).max() + max(abs(b).max() ** 2 for b in batches)
            np.testing.assert_allclose(new[key], state[key], rtol=0, atol=16 * 1.2e-7 * size)


# --- what else a step changes ------------------------------------------------------------------------------------------------


class Busy(nnx.Module):
    """Beside a norm: one of Flax, dropout, and a count of calls."""

    def __init__(self, rngs):
        self.norm, self.flax = jnx.BatchNorm(FEATURES, rngs=rngs), nnx.BatchNorm(FEATURES, momentum=0.5, rngs=rngs)
        self.dropout, self.calls = nnx.Dropout(0.5, rngs=rngs), nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.norm(self.flax(self.dropout(x) * 0 + x))


@pytest.mark.parametrize("others", ["running", "batch"])
def test_all_else_of_a_model_stays_and_may_be_donated(others, batches):
    model = Busy(nnx.Rngs(0))
    model.flax.mean[...] = jnp.full(FEATURES, 3.0)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    keys = jax.tree.map(lambda k: np.array(jax.random.key_data(k)), nnx.to_pure_dict(nnx.state(model, nnx.RngKey)))
    step = nnx.jit(lambda m, x: m(x), donate_argnums=0)
    new = tools.recalibrate(step, model, batches, others=others)
    model(batches[0])  # nothing of it was donated
    after = nnx.to_pure_dict(nnx.state(new, nnx.Not(nnx.RngState)))
    seen = batches if others == "running" else [b - b.mean((0, 1)) for b in batches]
    np.testing.assert_allclose(after["norm"].pop("mean"), np.concatenate(seen).mean((0, 1)) - 3 * (others == "running"), atol=1e-4)
    assert (np.asarray(after["norm"].pop("var")) != 1).all()
    del before["norm"]["mean"], before["norm"]["var"]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not new.flax.use_running_average and [int(c) for c in jax.tree.leaves(nnx.state(new, nnx.RngCount))] == [0]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(jax.random.key_data, nnx.to_pure_dict(nnx.state(new, nnx.RngKey))), keys)


def test_all_else_of_variables_stays_and_may_be_donated(batches):
    variables = {"params": {"w": jnp.ones(FEATURES)}, "batch_stats": {"n": jnorm.batch_norm_state(FEATURES)}, "calls": {"n": jnp.zeros(())}}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(v, x):
        new = jnorm.batch_norm(x * v["params"]["w"][None, None], v["batch_stats"]["n"])[1]
        return {**v, "batch_stats": {"n": new}, "calls": {"n": v["calls"]["n"] + 1}}

    new = tools.recalibrate(step, variables, batches)
    assert float(new["calls"]["n"]) == float(variables["calls"]["n"]) == 0
    assert new["params"]["w"].tolist() == variables["batch_stats"]["n"]["var"].tolist() == [1] * FEATURES
    check_averages("BatchNorm", new["batch_stats"]["n"], batches, "pooled")
