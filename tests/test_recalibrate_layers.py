"""Re-estimation of some norms, and layer by layer: afterwards what every norm sees in evaluation has its running statistics."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import distributed
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import models
import oracles
from jnorm import tools
from refusals import refuses

FEATURES, EPSILON, DEPTH = 3, 1e-5, 3
NAMES = [f"norm_{i}" for i in range(DEPTH)]


@pytest.fixture
def batches(rng):
    """Of one shape, and of means and spreads so different that a batch's own statistics are far from those of all."""
    return [((rng.normal(size=(4, 2, FEATURES)) * s + m) * [1, 2, 3]).astype(np.float32) for s, m in ((0.5, -1), (2, 0), (1, 2))]


@pytest.fixture
def weights(rng):
    return rng.normal(size=(DEPTH, FEATURES, FEATURES)).astype(np.float32)


def chain(state, x, weights, **options):
    """norm, tanh and a dense layer, three times."""
    new = dict(state)
    for name, w in zip(NAMES, weights, strict=True):
        x, new[name] = jnorm.batch_norm(x, state[name], **options)
        x = jnp.tanh(x) @ w
    return new


def states(count=False):
    return {name: jnorm.batch_norm_state(FEATURES, track_count=count) for name in NAMES}


def truth(batches, weights, weight_of=None, given=None):
    """In float64, norm after norm: each normalizes all data with its statistics, which are those of all that it sees.

    `given`: {name: its statistics}, of those that are not estimated.
    """
    seen, found = [b.astype(np.float64) for b in batches], {}
    for name, w in zip(NAMES, weights.astype(np.float64), strict=True):
        if name in (given or {}):
            mean, var = (np.asarray(given[name][key], np.float64) for key in ("mean", "var"))
        elif weight_of is None:
            whole = np.concatenate(seen).reshape(-1, FEATURES)
            mean, var = whole.mean(0), whole.var(0)
        else:
            mean, var = (
                sum(c * f(b) for c, b in zip(weight_of, seen, strict=True)) for f in (lambda b: b.mean((0, 1)), lambda b: b.var((0, 1)))
            )
        found[name] = {"mean": mean, "var": var}
        seen = [np.tanh((b - mean) / np.sqrt(var + EPSILON)) @ w for b in seen]
    return found


def check(got, want, batches, roundings=64):
    """Float32: some tens of roundings of numbers no larger than the largest that a norm sees."""
    large = max(1.0, max(abs(b).max() for b in batches))
    for name, averages in want.items():
        for key, a in averages.items():
            size = large ** (1 if key == "mean" else 2)
            np.testing.assert_allclose(got[name][key], a, rtol=0, atol=roundings * 1.2e-7 * size, err_msg=f"{name} {key}")


class Counted:
    """A step that says how often it was traced, and batches that say how often they were gone over."""

    def __init__(self, step, batches):
        self.traced, self.passes, self.batches = 0, 0, batches

        def run(state, x):
            self.traced += 1
            return step(state, x)

        self.step = jax.jit(run)

    def __call__(self):
        self.passes += 1
        return iter(self.batches)


def test_against_the_chain_in_float64(batches, weights):
    counted = Counted(lambda s, x: chain(s, x, weights), batches)
    one = tools.recalibrate(counted.step, states(), counted)
    assert (counted.traced, counted.passes) == (1, 1)
    new = tools.recalibrate(counted.step, states(True), counted, layer_by_layer=True)
    want = truth(batches, weights)
    check(new, want, batches)
    assert jax.tree.structure(new) == jax.tree.structure(states(True))
    # The first norm sees the data; the others see in training what the batch's own statistics make of it, which is another thing here.
    check({NAMES[0]: one[NAMES[0]]}, {NAMES[0]: want[NAMES[0]]}, batches)
    for name in NAMES[1:]:
        assert abs(np.log(one[name]["var"] / want[name]["var"])).max() > 0.1
    # Two more programs for states with a count, and as many passes as there are norms.
    assert (counted.traced, counted.passes) == (3, 1 + DEPTH)


@pytest.mark.parametrize("estimator", ["mean", "cumulative", "exponential"])
def test_every_estimator(estimator, batches, weights):
    """What is collected beside averages that normalize."""
    rho = 0.5
    w = np.array([rho**2, rho, 1]) / (rho**2 + rho + 1) if estimator == "exponential" else np.full(3, 1 / 3)
    options = {"momentum": rho} if estimator == "exponential" else {}
    step = jax.jit(lambda s, x: chain(s, x, weights))
    new = tools.recalibrate(step, states(), batches, estimator=estimator, layer_by_layer=True, **options)
    if estimator == "mean":  # the unbiased variances do not normalize what the biased ones do: only the first is told so simply
        want = {NAMES[0]: truth(batches, weights, w)[NAMES[0]]}
        want[NAMES[0]]["var"] *= 8 / 7
    else:
        want = truth(batches, weights, w)
    check(new, want, batches)


def test_stops_where_nothing_moves(batches, weights):
    """Norms side by side need no more passes than those that follow on one another; with a tolerance fewer will do."""
    wide = lambda s, x: {k: chain(s[k], x, weights) for k in s}  # noqa: E731
    counted = Counted(wide, batches)
    tools.recalibrate(counted.step, {"a": states(), "b": states()}, counted, layer_by_layer=True)
    # Of six norms three follow on one another. One more where the first program rounds otherwise, and one that moves nothing.
    assert DEPTH < counted.passes <= DEPTH + 2
    counted.passes = 0
    tools.recalibrate(counted.step, {"a": states(), "b": states()}, counted, layer_by_layer=True, tolerance=1e9)
    assert (counted.passes, counted.traced) == (2, 2)


def test_inside_jit(batches, weights):
    """Where nobody knows whether something moves, it takes as many passes as there are norms."""
    step = lambda s, x: chain(s, x, weights)  # noqa: E731
    counted = Counted(step, batches)
    run = jax.jit(lambda s: tools.recalibrate(step, s, counted, layer_by_layer=True))
    check(run(states()), truth(batches, weights), batches)
    assert counted.passes == DEPTH


def test_fifty_layers_in_one_scan(rng):
    """Stacked norms have one state, in which they follow on one another."""
    layers, x = 50, [(rng.normal(size=(8, 2)) * s + 1).astype(np.float32) for s in (1, 3)]
    stacked = jax.tree.map(lambda a: jnp.stack([a] * layers), jnorm.batch_norm_state(2))

    def step(state, x):
        def one(x, state):
            y, state = jnorm.batch_norm(x, state)
            return y + 0.5 * jnp.tanh(x), state

        return jax.lax.scan(one, x, state)[1]

    counted = Counted(step, x)
    new = tools.recalibrate(counted.step, stacked, counted, layer_by_layer=True)
    assert counted.traced == 2 and counted.passes <= layers + 2
    seen = np.concatenate(x).astype(np.float64)
    for i in range(layers):
        mean, var = seen.mean(0), seen.var(0)
        # Roundings of each layer below go through it, and are not made larger by a norm.
        np.testing.assert_allclose(new["mean"][i], mean, atol=1.2e-7 * 64 * (i + 1), err_msg=f"layer {i}")
        np.testing.assert_allclose(new["var"][i], var, rtol=1.2e-7 * 64 * (i + 1), err_msg=f"layer {i}")
        seen = (seen - mean) / np.sqrt(var + EPSILON) + 0.5 * np.tanh(seen)


# --- some of the norms --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(rng):
    return {name: {"mean": jnp.asarray(rng.normal(size=FEATURES), jnp.float32), "var": jnp.full(FEATURES, 4.0)} for name in NAMES}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_rest_keep_what_they_have(trained, batches, weights):
    """Bit for bit, and normalize with it, or with the batch's statistics."""
    step = jax.jit(lambda s, x: chain(s, x, weights))
    running = tools.recalibrate(step, trained, batches, layers=NAMES[1])
    for name in (NAMES[0], NAMES[2]):
        same(running[name], trained[name])
    want = truth(batches, weights, given={NAMES[0]: trained[NAMES[0]]})
    check(running, {NAMES[1]: want[NAMES[1]]}, batches)
    batch = tools.recalibrate(step, trained, batches, layers=NAMES[1], others="batch")
    same(batch[NAMES[0]], trained[NAMES[0]])
    same(batch[NAMES[1]], tools.recalibrate(step, trained, batches)[NAMES[1]])
    two = tools.recalibrate(step, trained, batches, layers=["*_0", lambda path: path == NAMES[2]], layer_by_layer=True)
    want = truth(batches, weights, given={NAMES[1]: trained[NAMES[1]]})
    same(two[NAMES[1]], trained[NAMES[1]])
    check(two, want, batches)


def test_frozen_norms_are_left_alone(trained, batches, weights):
    step = jax.jit(lambda s, x: chain(s, x, weights))
    frozen = tools.freeze(trained, NAMES[0])
    new = tools.recalibrate(step, frozen, batches)
    same(new[NAMES[0]], frozen[NAMES[0]])
    check(new, {NAMES[1]: truth(batches, weights, given={NAMES[0]: trained[NAMES[0]]})[NAMES[1]]}, batches)
    with refuses("layers='norm_0'", "not frozen", "'norm_1', 'norm_2'"):
        tools.recalibrate(step, frozen, batches, layers=NAMES[0])
    with refuses("all norms are frozen", "thaw"):
        tools.recalibrate(step, tools.freeze(trained), batches)


def test_the_given_is_untouched(trained, batches, weights):
    """Though the step takes its argument's memory."""
    step = jax.jit(lambda s, x: chain(s, x, weights), donate_argnums=0)
    before = jax.tree.map(np.array, trained)
    for options in ({}, {"layer_by_layer": True}, {"layers": NAMES[1]}):
        new = tools.recalibrate(step, trained, batches, **options)
        assert not any(a.is_deleted() for a in jax.tree.leaves((trained, new)))
    same(trained, before)


def test_narrow_states_normalize_as_they_are_kept(batches, weights):
    """Evaluation has the statistics in bfloat16, and so have the passes."""
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), states())
    new = tools.recalibrate(jax.jit(lambda s, x: chain(s, x, weights)), narrow, batches, layer_by_layer=True)
    assert {a.dtype for a in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    want = truth(batches, weights, given={NAMES[0]: new[NAMES[0]]})[NAMES[1]]
    for key, a in want.items():  # rounded once, to 8 bits
        np.testing.assert_allclose(np.float64(new[NAMES[1]][key]), a, rtol=2**-8, atol=2**-8 * 1e-2)


# --- devices ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["shard_map", "sharded"])
def test_over_devices(named, rng, weights):
    batches = [(rng.normal(size=(16, 2, FEATURES)) * s + s).astype(np.float32) for s in (1, 3)]
    mesh, spec = distributed.mesh_of(), jax.P("d")
    run = lambda s, x: chain(s, x, weights, axis_name="d" if named else None)  # noqa: E731
    if named:
        run = jax.shard_map(run, mesh=mesh, in_specs=(jax.P(), spec), out_specs=jax.P())
    counted = Counted(run, [jax.device_put(b, jax.NamedSharding(mesh, spec)) for b in batches])
    # Placed as the step returns them; else the second batch would be traced again.
    start = jax.device_put(states(), jax.NamedSharding(mesh, jax.P()))
    new = tools.recalibrate(counted.step, start, counted, layer_by_layer=True)
    check(new, truth(batches, weights), batches)
    assert counted.traced == 2


# --- modules ------------------------------------------------------------------------------------------------------------------


def seen_in_evaluation(net, variables, batches):
    """What each norm of a Linen model is given, by its path."""
    seen = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, jnn.BatchNorm) and context.method_name == "__call__":
            seen.setdefault("/".join(context.module.path), []).append(args[0])
        return call(*args, **kwargs)

    @jax.jit
    def run(x):
        with nn.intercept_methods(note):
            net.apply(variables, x, train=False)
        found = {path: xs[0] for path, xs in seen.items()}
        seen.clear()
        return found

    parts = [run(x) for x in batches]
    return {path: np.concatenate([np.float64(p[path]) for p in parts]).reshape(-1, parts[0][path].shape[-1]) for path in parts[0]}


def test_resnet_sees_its_statistics(rng):
    """Of whole variables; one trace a kind of pass, as many passes as norms follow on one another."""
    net, batches = models.ResNet(jnn), [(rng.normal(size=(4, 8, 8, 3)) * s + s).astype(np.float32) for s in (1, 2)]
    variables = models.with_values(jax.eval_shape(functools.partial(net.init, train=True), jax.random.key(0), batches[0]), rng)
    counted = Counted(lambda v, x: {**v, **net.apply(v, x, train=True, mutable=["batch_stats"])[1]}, batches)
    new = tools.recalibrate(counted.step, variables, counted, layer_by_layer=True)
    same(new["params"], variables["params"])
    assert counted.traced == 2 and counted.passes <= 19  # 17 in the longest path of its 20
    seen = seen_in_evaluation(net, new, batches)
    assert len(seen) == 20
    worst = 0
    for path, values in seen.items():
        state, mean, var = new["batch_stats"][path], values.mean(0), values.var(0)
        # Other programs round otherwise, at each of 17 layers, of which each sums 144 products at most.
        worst = max(worst, (abs(state["mean"] - mean) / np.sqrt(var)).max(), abs(state["var"] / var - 1).max())
    assert worst <= 1.2e-7 * 17 * 144**0.5 * 4, worst
    batch = tools.recalibrate(counted.step, variables, counted)
    last = max(seen)
    assert abs(batch["batch_stats"][last]["var"] / seen[last].var(0) - 1).max() > 0.05


class Net(nnx.Module):
    def __init__(self, weights, rngs):
        self.weights = nnx.data(jnp.asarray(weights))
        self.norms = nnx.List([jnx.BatchNorm(FEATURES, rngs=rngs) for _ in NAMES])

    def __call__(self, x):
        for norm, w in zip(self.norms, self.weights, strict=True):
            x = jnp.tanh(norm(x)) @ w
        return x


def test_nnx(batches, weights):
    model, traced = Net(weights, nnx.Rngs(0)), []

    @nnx.jit
    def step(model, x):
        traced.append(0)
        model(x)

    before = jax.tree.structure(nnx.to_pure_dict(nnx.state(model)))
    model = tools.recalibrate(step, model, batches, layer_by_layer=True)
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(model))) == before and len(traced) == 2

    def found():
        return {name: {k: np.array(getattr(m, k)[...]) for k in ("mean", "var")} for name, m in zip(NAMES, model.norms, strict=True)}

    check(found(), truth(batches, weights), batches)
    old = found()
    model = tools.recalibrate(step, model, [b + 1 for b in batches], layers="norms/0")
    same({name: found()[name] for name in NAMES[1:]}, {name: old[name] for name in NAMES[1:]})
    np.testing.assert_allclose(found()[NAMES[0]]["mean"], old[NAMES[0]]["mean"] + 1, rtol=1e-5)
    frozen = tools.freeze(model, "norms/1")
    marked = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(frozen)))
    new = nnx.to_pure_dict(nnx.state(tools.recalibrate(lambda m, x: m(x), frozen, batches[:1], layers="norms/0", others="batch")))
    assert jax.tree.structure(new) == jax.tree.structure(marked)
    same([new["norms"][i] for i in (1, 2)], [marked["norms"][i] for i in (1, 2)])
    with refuses("layers='encoder'", "'norms/0', 'norms/1', 'norms/2'"):
        tools.recalibrate(step, model, batches, layers="encoder")


def test_nnx_is_as_it_was_after_an_error(batches, weights):
    model, calls = Net(weights, nnx.Rngs(0)), []

    def step(model, x):
        calls.append(0)
        model(x)
        if len(calls) > len(batches):
            raise KeyError

    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(KeyError):
        tools.recalibrate(step, model, batches, layer_by_layer=True)
    same(nnx.to_pure_dict(nnx.state(model)), before)


@pytest.mark.slow
def test_nnx_resnet(rng):
    """As the one in Linen: evaluation of one batch that is all data has the batch's own statistics."""
    model, x = models.NNXResNet(jnx, nnx.Rngs(0)), rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
    model = tools.recalibrate(nnx.jit(lambda m, x: m(x)), model, [x[:3], x[3:]], layer_by_layer=True)
    run = nnx.jit(lambda m, x: m(x))
    model.eval()
    evaluated = run(model, x)
    model.train()
    np.testing.assert_allclose(evaluated, run(model, x), atol=1.2e-7 * 17 * 144**0.5 * 16)


# --- refused ------------------------------------------------------------------------------------------------------------------


def test_batches_that_are_used_up(batches, weights):
    step = jax.jit(lambda s, x: chain(s, x, weights))
    for once in (iter(batches), (b for b in batches)):
        with refuses("several times", type(once).__name__, "a function that makes an iterator"):
            tools.recalibrate(step, states(), once, layer_by_layer=True)
    rest = iter(batches)
    with refuses("no batches left for pass 2"):
        tools.recalibrate(step, states(), lambda: rest, layer_by_layer=True)


def test_a_branch_that_is_not_run(batches, weights):
    """By name; without it all is well."""
    step = lambda s, x: {**s, "chain": chain(s["chain"], x, weights)}  # noqa: E731
    state = {"chain": states(), "head": {"norm": jnorm.batch_norm_state(FEATURES)}}
    with refuses("nothing was collected in 'head/norm'", "layers"):
        tools.recalibrate(step, state, batches)
    new = tools.recalibrate(step, state, batches, layers="chain")
    same(new["head"], state["head"])


def test_layers_that_match_nothing(batches):
    with refuses("layers='encoder/*'", "'norm_0', 'norm_1', 'norm_2'"):
        tools.recalibrate(None, states(), batches, layers="encoder/*")


def test_steps_that_return_another_tree(batches):
    with refuses("must return the new state", "lacks norm_0/mean", "has also 1"):
        tools.recalibrate(lambda s, x: ({}, x), {"norm_0": states()["norm_0"]}, batches)
    with refuses("must return the new state", "norm_0/mean of shape (2,) for (3,)"):
        tools.recalibrate(lambda s, x: jax.tree.map(lambda a: a[:2], s), states(), batches)


def test_bad_arguments(batches):
    for options, fragments in (
        ({"estimator": "exponential"}, ["momentum", "exponential", "None"]),
        ({"momentum": 0.9}, ["momentum", "0.9 with 'pooled'"]),
        ({"estimator": "exponential", "momentum": 1.5}, ["from 0 to 1", "1.5"]),
        ({"others": "frozen"}, ["others", "'running' or 'batch'".replace("'", '"'), "'frozen'"]),
        ({"tolerance": 0.1}, ["layer_by_layer=True", "0.1"]),
        ({"tolerance": -1.0, "layer_by_layer": True}, ["at least 0", "-1.0"]),
    ):
        with refuses(*fragments):
            tools.recalibrate(None, states(), batches, **options)
    with refuses("collects already"):
        tools.recalibrate(None, tools.population_state(states()), batches)


# --- progress -----------------------------------------------------------------------------------------------------------------


def test_progress(batches, weights, capsys):
    pytest.importorskip("rich")
    step = jax.jit(lambda s, x: chain(s, x, weights))
    tools.recalibrate(step, states(), batches, progress=True)
    out, err = capsys.readouterr()
    assert not out and "batches" in err and "3/3" in err
    tools.recalibrate(step, states(), lambda: iter(batches), progress=True, layer_by_layer=True)
    assert "pass 3" in capsys.readouterr().err


def test_frozen_dict(batches, weights):
    given = flax.core.freeze(states())
    new = tools.recalibrate(lambda s, x: chain(flax.core.unfreeze(s), x, weights), given, batches, layers=NAMES[:2])
    assert isinstance(new, flax.core.FrozenDict)
    same(new[NAMES[2]], given[NAMES[2]])


def test_oracle_is_of_float64():
    """The chain's truth, by hand, of two values."""
    found = truth([np.array([[[1.0] * 3, [3.0] * 3]])], np.array([np.eye(3)] * DEPTH))
    assert found[NAMES[0]]["mean"].tolist() == [2] * 3 and found[NAMES[0]]["var"].tolist() == [1] * 3
    np.testing.assert_allclose(found[NAMES[1]]["var"], np.tanh(1 / np.sqrt(1 + EPSILON)) ** 2)
    assert oracles.full_mask(None, (1,)).all()
