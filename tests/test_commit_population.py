"""Running statistics that move once per optimizer step, by all of its micro-batches: `commit_population`, and for NNX `commit_once`."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from refusals import refuses
from test_recalibrate import ESTIMATORS, FEATURES, LinenNet, NnxNet, second_batches, step, stream, truth

KEEP = 0.75
SIZES = (5, 2, 9, 1)


def check(new, old, want, batches, keep=KEEP):
    """Float32: some tens of roundings of at most eps/2 of the largest."""
    for key, value in want.items():
        atol = 64 * 2.0**-23 * max(abs(b).max() ** 2 for b in batches)
        np.testing.assert_allclose(np.ravel(new[key]), keep * np.ravel(old[key]) + (1 - keep) * value, rtol=0, atol=atol, err_msg=key)


def collected(state, batches, run=step):
    population = tools.population_state(state)
    for x in batches:
        population = run(population, x)
    return population


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_against_the_formulas(estimator, rng):
    """All in one compiled program; the momentum is traced."""
    batches = stream(rng, (4, 4, 4))
    old = {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 5, 6])}

    def run(old, batches, momentum):
        population = tools.population_state(old, estimator=estimator)
        population, _ = jax.lax.scan(lambda p, x: (step(p, x), None), population, batches)
        return tools.commit_population(old, population, momentum=momentum)

    new = jax.jit(run)(old, np.stack(batches), KEEP)
    check(new, old, truth(batches, estimator), batches)
    assert jax.tree.map(lambda a: a.dtype, new) == jax.tree.map(lambda a: a.dtype, old)


def test_one_micro_batch_is_an_update_of_batch_norm(rng):
    (x,) = stream(rng, (7,))
    old = {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 5, 6]), "count": np.float32(2)}
    for momentum in (0.9, None):
        new = tools.commit_population(old, collected(old, [x]), momentum=momentum)
        want = jnorm.batch_norm(x, old, momentum=momentum)[1]
        for key in old:
            np.testing.assert_allclose(new[key], want[key], rtol=4 * 2.0**-23)


def test_three_steps_count_three(rng):
    """A cumulative average over steps, whatever the number of micro-batches in each."""
    state, means = jnorm.batch_norm_state(FEATURES, track_count=True), []
    for sizes in (SIZES, (3,), (2, 6)):
        batches = stream(rng, sizes)
        means.append(truth(batches, "pooled")["mean"])
        state = tools.commit_population(state, collected(state, batches), momentum=None)
    assert float(state["count"]) == 3
    np.testing.assert_allclose(state["mean"], np.mean(means, 0), rtol=0, atol=1e-5)


def test_what_was_not_counted_stays(rng):
    old, mask = {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 5, 6])}, np.array([True, False, True])
    batches = stream(rng)
    new = tools.commit_population(old, collected(old, batches, lambda s, x: step(s, x, mask=mask)), momentum=KEEP)
    assert float(new["mean"][1]) == 2 and float(new["var"][1]) == 5 and float(new["mean"][0]) != 1
    untouched = tools.commit_population(old, tools.population_state(old), momentum=KEEP)
    jax.tree.map(np.testing.assert_array_equal, untouched, old)


def test_narrow_states_and_other_entries(rng):
    """A frozen tree comes back as one, in its dtypes; what is no state in it is the population's."""
    old = flax.core.freeze({"norm": jnorm.batch_norm_state(FEATURES, dtype=jnp.bfloat16), "other": {"u": jnp.zeros(2)}})
    population = tools.population_state(old)
    (x,) = stream(rng, (8,))
    population = flax.core.freeze({"norm": step(dict(population["norm"]), x), "other": {"u": jnp.ones(2)}})
    new = tools.commit_population(old, population, momentum=0.0)
    assert isinstance(new, flax.core.FrozenDict) and new["norm"]["mean"].dtype == jnp.bfloat16
    assert new["other"]["u"].tolist() == [1, 1]
    np.testing.assert_allclose(np.float32(new["norm"]["mean"]), x.mean((0, 1)), rtol=2.0**-7)


# --- every norm with running statistics -------------------------------------------------------------------------------------------

EPSILON = 1e-3
NORMS = {
    "batch_renorm": (jnorm.batch_renorm, jnorm.batch_renorm_state, {"epsilon": EPSILON}),
    "mean_only_batch_norm": (jnorm.mean_only_batch_norm, jnorm.mean_only_batch_norm_state, {}),
    "cross_mini_batch_norm": (jnorm.cross_mini_batch_norm, jnorm.cross_mini_batch_norm_state, {"num_mini_batches": 3}),
    "ghost_batch_norm": (jnorm.ghost_batch_norm, jnorm.batch_norm_state, {"group_size": 2}),
    "divisive_batch_norm": (jnorm.divisive_batch_norm, jnorm.batch_norm_state, {}),
}


@pytest.mark.parametrize("name", NORMS)
def test_every_norm(name, rng):
    norm, make, options = NORMS[name]
    old, batches = make(FEATURES), stream(rng, (4, 4, 4))
    population = collected(old, batches, jax.jit(lambda s, x: norm(x, s, **options)[1]))
    new = tools.commit_population(old, population, momentum=KEEP)
    want = truth(batches, "pooled")
    if name == "batch_renorm":
        want["std"] = np.sqrt(want.pop("var") + EPSILON)
    check(new, old, {k: v for k, v in want.items() if k in old}, batches)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), old)
    if name == "cross_mini_batch_norm":
        assert int(new["index"]) == 3  # it went through the micro-batches


# --- models -----------------------------------------------------------------------------------------------------------------------


def linen_net(x):
    net = LinenNet()
    variables = net.init(jax.random.key(0), x, train=True)

    def run(stats, x):
        return net.apply(variables | {"batch_stats": stats}, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return variables["batch_stats"], jax.jit(run)


def test_linen(rng):
    batches = stream(rng, (4, 4, 4))
    old, run = linen_net(batches[0])
    new = tools.commit_population(old, collected(old, batches, run), momentum=KEEP)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    check(new["BatchNorm_0"], old["BatchNorm_0"] | {"mean": np.zeros(FEATURES)}, {"mean": truth(batches, "pooled")["mean"]}, batches, 0)
    assert float(new["BatchNorm_0"]["count"]) == 1  # debiased: the first step's statistics
    second = second_batches(batches)
    check(new["BatchNorm_1"], old["BatchNorm_1"], truth(second, "pooled"), [b.astype(np.float32) for b in second])


@pytest.mark.parametrize("momentum", [None, KEEP])
def test_nnx(momentum, rng):
    """Momentum of the norms, or one for all."""
    batches, model = stream(rng, (4, 4, 4)), NnxNet(nnx.Rngs(0))
    model.two.momentum = 0.5
    before = jax.tree.structure(nnx.to_pure_dict(nnx.state(model)))
    run = nnx.jit(lambda m, x: m(x))
    with tools.commit_once(model, momentum=momentum):
        for x in batches:
            run(model, x)
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(model))) == before
    check({"mean": model.one.mean[...]}, {"mean": np.zeros(FEATURES)}, {"mean": truth(batches, "pooled")["mean"]}, batches, 0)
    assert float(model.one.count[...]) == 1
    second = second_batches(batches)
    old, new = jnorm.batch_norm_state(FEATURES), {k: getattr(model.two, k)[...] for k in ("mean", "var")}
    check(new, old, truth(second, "pooled"), [b.astype(np.float32) for b in second], 0.5 if momentum is None else momentum)


def test_nnx_inside_jit(rng):
    """The whole step is one program, and the second one compiles nothing."""
    batches, model = np.stack(stream(rng, (4, 4))), jnx.BatchNorm(FEATURES, momentum=KEEP, rngs=nnx.Rngs(0))
    traced = []

    @nnx.jit
    def run(model, batches):
        traced.append(1)
        with tools.commit_once(model):
            for x in batches:
                model(x)

    run(model, batches)
    check(
        {k: getattr(model, k)[...] for k in ("mean", "var")},
        jnorm.batch_norm_state(FEATURES),
        truth(list(batches), "pooled"),
        list(batches),
    )
    run(model, batches)
    assert len(traced) == 1


def test_nnx_leaves_the_model_as_it_was_after_an_error():
    model = jnx.BatchNorm(1, rngs=nnx.Rngs(0))
    with pytest.raises(KeyError), tools.commit_once(model):
        model(np.float32([[1], [3]]))
        raise KeyError
    assert model.mean[...].tolist() == [0] and model.var[...].tolist() == [1] and not hasattr(model, "values")


def test_nnx_does_not_collect_twice_at_once():
    model = jnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    with tools.commit_once(model):
        with pytest.raises(ValueError, match="collects already"), tools.commit_once(model):
            pass
        model(np.float32([[1], [3]]))
    assert model.mean[...].tolist() == [1] and not hasattr(model, "values")


@pytest.mark.parametrize("freeze_population", [True, False])
def test_frozen_collections(freeze_population):
    state = {"norm": jnorm.batch_norm_state(1)}
    population = tools.population_state(state)
    _, population["norm"] = jnorm.batch_norm(np.float32([[1], [3]]), population["norm"])
    frozen = freeze(state), freeze(population) if freeze_population else population
    new = tools.commit_population(*frozen, momentum=0.5)
    assert jax.tree.structure(new) == jax.tree.structure(frozen[0])
    assert new["norm"]["mean"].tolist() == [1]


def test_a_population_of_another_tree():
    one, two = ({name: jnorm.batch_norm_state(1)} for name in ("one", "two"))
    with pytest.raises(ValueError, match="state alone has .*one/mean.*the population alone .*two/mean"):
        tools.commit_population(one, tools.population_state(two))


# --- optax.MultiSteps: gradients are accumulated, and statistics with them ----------------------------------------------------------


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnn.BatchNorm(momentum=KEEP, use_running_average=False)(nn.Dense(FEATURES, use_bias=False)(x))
        return nn.Dense(1)(nn.tanh(x))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs)
        self.norm = jnx.BatchNorm(FEATURES, momentum=KEEP, rngs=rngs)
        self.two = nnx.Linear(FEATURES, 1, rngs=rngs)

    def __call__(self, x):
        return self.two(jnp.tanh(self.norm(self.one(x))))


@pytest.fixture
def promotion():
    """optax divides floats by its count of steps, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def squares(y):
    return jnp.mean((y - 1) ** 2)


def one_step(params, batches):
    """In float64 NumPy and plain jnp: the mean of the micro-batches' gradients, once; the pooled statistics of what the norm saw, once."""
    first, scale, bias, last, last_bias = (jnp.asarray(p, jnp.float64) for p in params)

    def loss(p, x):
        first, scale, bias, last, last_bias = p
        h = x @ first
        h = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5) * scale[None] + bias[None]
        return squares(jnp.tanh(h) @ last + last_bias[None])

    p = (first, scale, bias, last, last_bias)
    gradients = [jax.grad(loss)(p, jnp.asarray(x, jnp.float64)) for x in batches]
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
    seen = np.concatenate([x.astype(np.float64) @ np.asarray(first) for x in batches])
    want = {"mean": (1 - KEEP) * seen.mean(0), "var": KEEP + (1 - KEEP) * seen.var(0)}
    return [np.asarray(a - 0.1 * g) for a, g in zip(p, mean, strict=True)], want


def check_step(params, state, before, batches):
    with jax.enable_x64(True):
        want, want_state = one_step([np.asarray(p) for p in before], batches)
    for a, b in zip(params, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    for key in want_state:
        np.testing.assert_allclose(state[key], want_state[key], rtol=1e-5, atol=1e-5)


def test_multi_steps_linen(rng, promotion):
    batches = [b[:, 0] for b in stream(rng, (4, 4, 4))]
    model, optimizer = Model(), optax.MultiSteps(optax.sgd(0.1), every_k_schedule=len(batches))
    variables = model.init(jax.random.key(0), batches[0])
    params, stats = variables["params"], variables["batch_stats"]
    opt_state, population = optimizer.init(params), tools.population_state(stats)

    def loss(params, population, x):
        y, new = model.apply({"params": params, "batch_stats": population}, x, mutable=["batch_stats"])
        return squares(y), new["batch_stats"]

    @jax.jit
    def micro_step(params, population, opt_state, x):
        gradient, population = jax.grad(loss, has_aux=True)(params, population, x)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), population, opt_state

    def listed(p):
        return [p["Dense_0"]["kernel"], *(p["BatchNorm_0"][k] for k in ("scale", "bias")), p["Dense_1"]["kernel"], p["Dense_1"]["bias"]]

    before = listed(params)
    for x in batches:
        assert not optimizer.has_updated(opt_state)
        params, population, opt_state = micro_step(params, population, opt_state, x)
    assert optimizer.has_updated(opt_state)
    stats = tools.commit_population(stats, population, momentum=KEEP)
    check_step(listed(params), stats["BatchNorm_0"], before, batches)


def test_multi_steps_nnx(rng, promotion):
    batches, model = [b[:, 0] for b in stream(rng, (4, 4, 4))], Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.1), every_k_schedule=len(batches)), wrt=nnx.Param)

    @nnx.jit
    def micro_step(model, optimizer, x):
        gradient = nnx.grad(lambda m: squares(m(x)))(model)
        optimizer.update(model, gradient)

    def listed():
        return [v[...] for v in (model.one.kernel, model.norm.scale, model.norm.bias, model.two.kernel, model.two.bias)]

    before = listed()
    with tools.commit_once(model):
        for x in batches:
            micro_step(model, optimizer, x)
    check_step(listed(), {k: getattr(model.norm, k)[...] for k in ("mean", "var")}, before, batches)


# --- refused ----------------------------------------------------------------------------------------------------------------------


def test_refused():
    state = {"a": jnorm.batch_norm_state(1)}
    population = tools.population_state(state)
    with refuses("population_state", "collects nothing"):
        tools.commit_population(state, state)
    with refuses("the tree that the population was made of", "'a/var'"):
        tools.commit_population({"a": jnorm.mean_only_batch_norm_state(1)}, population)
    with refuses("no running statistics"):
        tools.commit_population({"a": {"kernel": 1.0}}, {"a": {"kernel": 1.0}})
    with refuses("momentum", "1.5"):
        tools.commit_population(state, population, momentum=1.5)
    with refuses("needs a count"):
        tools.commit_population(state, population, momentum=None)
    with refuses("no norm with running statistics"), tools.commit_once(nnx.Linear(1, 1, rngs=nnx.Rngs(0))):
        pass
