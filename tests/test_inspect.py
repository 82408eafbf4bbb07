"""What norms have to do with a bad evaluation: the numbers by their formulas, ailments that are found, and health that is left alone."""

import dataclasses
import json
import sys

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import models
import oracles
from distributed import mesh_of
from jnorm import tools
from jnorm.tools.inspect import Losses, Report
from refusals import refuses

CHANNELS, EPSILON = 4, 1e-5


def step(state, x, momentum=0.9, **options):
    return jnorm.batch_norm(x, state, momentum=momentum, **options)[1]


def trained(batches, momentum=0.9, make=jnorm.batch_norm_state, run=step):
    """The state after these batches; one program."""
    return jax.jit(lambda s, x: jax.lax.scan(lambda s, x: (run(s, x, momentum), None), s, x)[0])(make(CHANNELS), np.stack(batches))


def normal(rng, number, size=64, mean=0.0, std=1.0):
    return [(rng.normal(size=(size, CHANNELS)) * std + mean).astype(np.float32) for _ in range(number)]


def kinds(report):
    return [[finding.kind for finding in layer.findings] for layer in report.layers]


def only(report):
    (layer,) = report.layers
    return layer


# --- the numbers --------------------------------------------------------------------------------------------------------------


def divergence(mean, var, mean_b, var_b):
    """∫ p_b ln(p_b / p) by the formula of textbooks, for normal densities p_b and p."""
    return np.log(np.sqrt(var / var_b)) + (var_b + (mean_b - mean) ** 2) / (2 * var) - 0.5


def test_known_by_hand():
    """{1, 2, 3, 4} has the mean 5/2 and the variance 5/4; the running ones are 2 and 5."""
    state = {"mean": np.float32([2]), "var": np.float32([5])}
    batches = [np.float32([[1], [2]]), np.float32([[3], [4]])]
    layer = only(tools.inspect_norms(step, state, batches, epsilon=0.0))
    assert (layer.path, layer.channels, layer.samples, layer.batches_remembered) == ("", 1, 2, None)
    np.testing.assert_allclose(layer.mean_distance, 0.5 / 1.25**0.5, rtol=1e-6)
    np.testing.assert_allclose([layer.var_ratio, layer.var_ratio_max], 4, rtol=1e-6)
    np.testing.assert_allclose([layer.kl, layer.kl_max], 0.5 * (np.log(4) + 1.2 / 4 - 1), rtol=1e-6)
    np.testing.assert_allclose(layer.noise, (2 / 1.25) ** 0.5, rtol=1e-6)  # the batches' means are 1.5 and 3.5


def test_the_divergence_is_the_integral():
    x = np.linspace(-60, 60, 400001)
    mean, var, mean_b, var_b = 2.0, 5.0, 2.5, 1.25
    p, p_b = (np.exp(-((x - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v) for m, v in ((mean, var), (mean_b, var_b)))
    there = p_b > 0
    integral = np.sum(p_b[there] * np.log(p_b[there] / p[there])) * (x[1] - x[0])
    np.testing.assert_allclose(divergence(mean, var, mean_b, var_b), integral, rtol=1e-6)


def test_against_the_formulas(rng):
    sizes = (40, 7, 90)
    batches = [(rng.normal(size=(n, 2, CHANNELS)) * 2 + rng.normal(size=CHANNELS)).astype(np.float32) for n in sizes]
    state = {"mean": rng.normal(size=CHANNELS).astype(np.float32), "var": rng.uniform(0.5, 3, CHANNELS).astype(np.float32)}
    params = {"norm": {"scale": np.float32([1, -3, 2, 0.5])}}
    layer = only(tools.inspect_norms(lambda s, x: {"norm": step(s["norm"], x)}, {"norm": state}, iter(batches), params=params))
    wide = [b.reshape(-1, CHANNELS).astype(np.float64) for b in batches]
    whole = np.concatenate(wide)
    mean_b, var_b = whole.mean(0), whole.var(0) + EPSILON
    mean, var = state["mean"].astype(np.float64), state["var"].astype(np.float64) + EPSILON
    distance, ratio, kl = abs(mean - mean_b) / np.sqrt(var_b), var / var_b, divergence(mean, var, mean_b, var_b)
    noise = np.var([w.mean(0) for w in wide], axis=0, ddof=1) / var_b
    least = np.mean([1 / len(w) for w in wide])  # of independent values
    vars_ = np.array([w.var(0) + EPSILON for w in wide])
    of_var = np.var(vars_, axis=0, ddof=1) / vars_.mean(0) ** 2
    want = {
        "samples": np.mean([2 * n for n in sizes]),
        "noise": np.sqrt(noise.mean()),
        "mean_distance": np.sqrt(np.mean(distance**2)),
        "mean_distance_max": distance.max(),
        "var_ratio": np.prod(ratio) ** (1 / CHANNELS),
        "var_ratio_max": max(ratio.max(), 1 / ratio.min()),
        "kl": kl.mean(),
        "kl_max": kl.max(),
        "kl_noise": 0.5 * (max(noise.mean(), least) + max(of_var.mean(), 2 * least) / 2) * (1 / 3 + 0.1 / 1.9),  # of a momentum of 0.9
        "scale_min": 0.5,
        "scale_max": 3.0,
        "gain_max": max(np.array([1, 3, 2, 0.5]) / np.sqrt(var)),
    }
    assert layer.path == "norm"
    for name, value in want.items():
        # sums of 274 float32 values, whose rounding differences of statistics have again
        oracles.assert_close(
            np.float32(getattr(layer, name)), oracles.Bounded(np.float64(value), abs(value) + 1), 2 * sum(sizes), what=name
        )


def test_noise_of_dependent_values(rng):
    """Sixteen positions that are alike are one value; what independent ones would give is not believed."""
    batches = [np.repeat(b[:, None], 16, axis=1) for b in normal(rng, 200, size=9)]
    layer = only(tools.inspect_norms(step, jnorm.batch_norm_state(CHANNELS), batches))
    assert layer.samples == 9 * 16
    np.testing.assert_allclose(layer.noise, 1 / 3, rtol=0.05)  # of 4·199 degrees of freedom: two standard errors


# --- ailments -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "momentum, size, mean, std", [(0.9, 32, 0.0, 1.0), (0.99, 64, 3.0, 2.0), (0.5, 32, -5.0, 0.1), (0.9, 24, 100.0, 7.0)]
)
def test_health_is_not_accused(momentum, size, mean, std):
    """Sixty trainings that were long enough, by momentums, sizes and distributions."""
    jitted = jax.jit(lambda s, x: jax.lax.scan(lambda s, x: (step(s, x, momentum), None), s, x)[0])
    collect = jax.jit(step)
    for seed in range(15):
        batches = normal(np.random.default_rng(seed), 800, size, mean, std)
        state = jitted(jnorm.batch_norm_state(CHANNELS), np.stack(batches))
        report = tools.inspect_norms(collect, state, batches[:4], momentum=momentum, params={"scale": np.ones(CHANNELS)})
        assert kinds(report) == [[]], only(report).verdict
    assert only(report).verdict == "Nothing is wrong." and "Nothing is wrong with the norm" in report.verdict


def test_too_few_steps(rng):
    batches = normal(rng, 24, mean=3.0, std=2.0)
    layer = only(tools.inspect_norms(step, trained(batches, 0.99), batches[:4], momentum=0.99))
    (finding,) = layer.findings
    assert finding.kind == "initial values" and f"{layer.initial:.0%}" in finding.text and "remember 100 batches" in finding.text
    assert "recalibrate" in finding.remedy and "momentum" in finding.remedy
    np.testing.assert_allclose(layer.initial, 0.99**24, rtol=0.02)
    # Averages that count are free of what they started as.
    state = trained(batches, 0.99, make=lambda c: jnorm.batch_norm_state(c, track_count=True))
    report = tools.inspect_norms(step, state, batches[:4])
    assert kinds(report) == [[]] and only(report).initial is None
    np.testing.assert_allclose(only(report).batches_remembered, sum(0.99**k for k in range(24)), rtol=1e-5)


def test_other_data(rng):
    """Of a shift, and of the same images in another unit."""
    state = trained(normal(rng, 100))
    shifted = tools.inspect_norms(step, state, normal(rng, 4, mean=0.7))
    assert kinds(shifted) == [["other data"]] and "preprocessed" in only(shifted).verdict
    images = [rng.uniform(0, 255, (64, CHANNELS)).astype(np.float32) for _ in range(100)]
    other_unit = tools.inspect_norms(step, trained(images), [b / 255 for b in images[:4]])
    assert kinds(other_unit) == [["other data"]]
    np.testing.assert_allclose(only(other_unit).var_ratio, 255**2, rtol=0.2)
    one_channel = normal(rng, 4) + np.float32([0, 0, 1.5, 0])
    assert kinds(tools.inspect_norms(step, state, list(one_channel))) == [["other data"]]


def test_batches_of_two(rng):
    """A batch's variance lacks what lies between batches: the running one is a half of what all have."""
    batches = normal(rng, 400, size=2)
    layer = only(tools.inspect_norms(step, trained(batches, 0.99), batches[:100], momentum=0.99))
    assert [f.kind for f in layer.findings] == ["small batches", "few samples"]
    np.testing.assert_allclose([layer.noise, layer.var_ratio], [0.5**0.5, 0.5], rtol=0.2)
    assert "cross_mini_batch_norm" in layer.verdict and "axis_name" in layer.verdict


def test_batches_of_one_class_each(rng):
    centers = rng.normal(size=(10, CHANNELS)) * 3
    ordered = [(b + centers[i % 10]).astype(np.float32) for i, b in enumerate(normal(rng, 10))]
    assert "unlike batches" in kinds(tools.inspect_norms(step, trained(ordered), ordered))[0]
    shuffled = np.concatenate(ordered)[rng.permutation(640)].reshape(10, 64, CHANNELS)
    assert kinds(tools.inspect_norms(step, trained(list(shuffled) * 10), list(shuffled))) == [[]]


def test_dropout_before_the_norm(rng):
    """Its running variance is 1 / (1 − rate) times that of what evaluation sees, here with a mean of 0."""
    batches = normal(rng, 100)
    dropped = [(b * rng.binomial(1, 0.5, b.shape) / 0.5).astype(np.float32) for b in batches]
    layer = only(tools.inspect_norms(step, trained(dropped), batches[:4]))
    assert [f.kind for f in layer.findings] == ["noise in training"] and "dropout" in layer.verdict
    np.testing.assert_allclose(layer.var_ratio, 2, rtol=0.2)


def test_channels(rng):
    """Each by its number, and nothing else is said of them."""
    factors = np.float32([1, 0, 1e-4, 1])
    batches = [b * factors + np.float32([0, 7, 0, 0]) for b in normal(rng, 300)]
    state = trained(batches)
    layer = only(tools.inspect_norms(step, state, batches[:4], params={"scale": np.float32([1, 1, 1, 1e-9])}))
    assert (layer.constant, layer.below_epsilon, layer.dead, layer.exploding) == ((1,), (2,), (3,), ())
    assert {f.kind for f in layer.findings} == {"constant input", "below epsilon", "dead channels"}
    assert "1 of 4 channels (3)" in layer.verdict
    for scale, which in (
        ([1, 1, 500, 1], (2,)),
        ([0.01, 0.02, 3, 0.01], (2,)),
        ([1, 50, 0.1, 1], ()),
        ([0] * 4, ()),
    ):
        found = only(tools.inspect_norms(step, state, batches[:4], params={"scale": np.float32(scale)}))
        assert found.exploding == which and ("exploding scale" in {f.kind for f in found.findings}) == bool(which)


def test_statistics_that_are_no_numbers(rng):
    state = {"mean": np.float32([0, np.nan, 0, 0]), "var": np.float32([1, 1, 1, np.inf])}
    report = tools.inspect_norms(step, state, normal(rng, 2))
    layer = only(report)
    assert layer.not_finite == (1, 3) and [f.kind for f in layer.findings] == ["not finite"]
    assert np.isfinite(layer.kl) and json.dumps(report.to_dict(), allow_nan=False)
    nothing = {key: np.full(CHANNELS, np.nan, np.float32) for key in state}
    lost = tools.inspect_norms(step, nothing, normal(rng, 2))
    assert only(lost).kl is None and kinds(lost) == [["not finite"]] and lost.verdict == "1 of 1 norms has findings: 1 × not finite."
    state = {"mean": np.zeros(CHANNELS, np.float32), "var": np.float32([1, -0.5, 1, 1])}
    scale = np.float32([1, 1, np.nan, np.inf])
    negative = only(tools.inspect_norms(step, state, normal(rng, 2), params={"scale": scale}))
    assert [f.kind for f in negative.findings] == ["not finite", "negative variance"]
    assert (negative.negative_variance, negative.not_finite_scale, negative.exploding) == ((1,), (2, 3), ())
    assert (negative.scale_min, negative.scale_max) == (1, 1)


@pytest.mark.parametrize("flax", [False, True])
def test_batches_that_are_no_numbers(flax, rng):
    """The channels that have them, of one batch of three; a loss that is no number is no health either."""
    batches = normal(rng, 3)
    batches[1][3, 2], batches[1][5, 0] = np.nan, np.inf
    state = {"mean": np.zeros(CHANNELS, np.float32), "var": np.ones(CHANNELS, np.float32)}
    run, loss = step, lambda s, x: jnp.mean(jnorm.batch_norm(x, s, use_running_average=True)[0])
    if flax:
        net, params = nn.BatchNorm(use_running_average=False), {"scale": np.ones(CHANNELS), "bias": np.zeros(CHANNELS)}
        run = lambda s, x: net.apply({"params": params, "batch_stats": s}, x, mutable=["batch_stats"])[1]["batch_stats"]  # noqa: E731
    report = tools.inspect_norms(run, state, batches, loss=loss)
    assert only(report).not_finite_input == (0, 2) and kinds(report) == [["not finite input"]]
    assert "gives no finite loss" in report.verdict and np.isfinite(only(report).kl)
    healthy = tools.inspect_norms(run, state, batches[:1], loss=lambda s, x: jnp.sum(s["mean"]) * jnp.nan)
    assert "Nothing is wrong" not in healthy.verdict and "No norm has findings" in healthy.verdict


# --- the loss -----------------------------------------------------------------------------------------------------------------


class LinenNet(nn.Module):
    norms: object = jnn

    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            x = jnp.tanh(self.norms.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm_{i}")(x))
        return x


class NnxNet(nnx.Module):
    def __init__(self, norms=jnx):
        self.norms = nnx.List([norms.BatchNorm(CHANNELS, momentum=0.9, rngs=nnx.Rngs(0)) for _ in range(2)])

    def __call__(self, x):
        for norm in self.norms:
            x = jnp.tanh(norm(x))
        return x


def functional(state, x, **options):
    new = {}
    for name in state:
        x, new[name] = jnorm.batch_norm(x, state[name], **options)
        x = jnp.tanh(x)
    return x, new


STATE = {
    "norm_0": {"mean": np.linspace(-1, 1, CHANNELS, dtype=np.float32), "var": np.linspace(1, 3, CHANNELS, dtype=np.float32)},
    "norm_1": {"mean": np.linspace(0.5, 0, CHANNELS, dtype=np.float32), "var": np.linspace(0.5, 2, CHANNELS, dtype=np.float32)},
}


def target_loss(y):
    return ((y - 1) ** 2).mean()


def by_api(api, norms=None):
    """step, state and loss of one network."""
    if api == "functional":
        return lambda s, x: functional(s, x)[1], STATE, lambda s, x: target_loss(functional(s, x, use_running_average=True)[0])
    if api == "linen":
        net = LinenNet(norms or jnn)
        params = net.init(jax.random.key(0), np.ones((2, CHANNELS), np.float32), train=True)["params"]

        def run(stats, x):
            return net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        return run, STATE, lambda s, x: target_loss(net.apply({"params": params, "batch_stats": s}, x, train=False))
    model = NnxNet(norms or jnx)
    for norm, state in zip(model.norms, STATE.values(), strict=True):
        for key, value in state.items():
            getattr(norm, key).set_value(jnp.asarray(value))
    return lambda m, x: m(x), model, lambda m, x: target_loss(m(x))


def numpy_network(x, statistics):
    for mean, var in statistics:
        x = np.tanh((x - mean) / np.sqrt(var + EPSILON))
    return x


def numpy_statistics(batches):
    """Of all batches at each norm, and each one's own, where those below have their own."""
    own, values = [], [b.astype(np.float64) for b in batches]
    pooled = []
    for _ in range(2):
        whole = np.concatenate(values)
        pooled.append((whole.mean(0), whole.var(0)))
        own.append([(v.mean(0), v.var(0)) for v in values])
        values = [numpy_network(v, [s]) for v, s in zip(values, own[-1], strict=True)]
    return pooled, own


@pytest.mark.parametrize("api", ["functional", "linen", "nnx", "linen-flax", "nnx-flax"])
def test_losses_against_numpy(api, rng):
    """And Flax's own norms, which do not collect, are told by their averages."""
    kind, _, flax = api.partition("-")
    run, given, loss = by_api(kind, {"linen": nn, "nnx": nnx}[kind] if flax else None)
    batches = [(b + rng.normal(size=CHANNELS)).astype(np.float32) for b in normal(rng, 3, size=16)]
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(given)) if kind == "nnx" else given)
    report = tools.inspect_norms(run, given, lambda: iter(batches), loss=loss)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(given)) if kind == "nnx" else given, before)

    pooled, own = numpy_statistics(batches)
    running = [(s["mean"].astype(np.float64), s["var"].astype(np.float64)) for s in STATE.values()]
    evaluate = lambda s: np.array([target_loss(numpy_network(b.astype(np.float64), s)) for b in batches])  # noqa: E731
    assert isinstance(report.losses, Losses)
    for got, want in ((report.losses.running, evaluate(running)), (report.losses.pooled, evaluate(pooled))):
        np.testing.assert_allclose(got, want, rtol=2e-5)  # tanh, and sums of 64; told from averages, statistics lose a digit
    mine = [target_loss(numpy_network(b.astype(np.float64), [own[0][i], own[1][i]])) for i, b in enumerate(batches)]
    np.testing.assert_allclose(report.losses.own, mine, rtol=2e-5)
    for i, layer in enumerate(report.layers):
        assert layer.path == ("norms/" if kind == "nnx" else "norm_") + str(i) and layer.kind == ("BatchNorm" if kind == "nnx" else None)
        alone, without = ([*start[:i], other[i], *start[i + 1 :]] for start, other in ((running, pooled), (pooled, running)))
        np.testing.assert_allclose(layer.loss_alone, (evaluate(alone) - evaluate(running)).mean(), atol=2e-5)
        np.testing.assert_allclose(layer.loss_without, (evaluate(without) - evaluate(pooled)).mean(), atol=2e-5)
        assert layer.samples == (None if flax else 16)
        np.testing.assert_allclose(
            layer.mean_distance, np.sqrt(np.mean((running[i][0] - pooled[i][0]) ** 2 / (pooled[i][1] + EPSILON))), rtol=1e-4
        )


@pytest.mark.parametrize("api", ["functional", "nnx"])
def test_a_model_that_is_a_norm(api, rng):
    """Its path is "", and its statistics take each other's place as those of any other do."""
    batches = [b + np.float32(i) for i, b in enumerate(normal(rng, 3))]
    if api == "nnx":
        model = jnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))
        report = tools.inspect_norms(lambda m, x: m(x), model, batches, loss=lambda m, x: jnp.mean(jnp.abs(m(x))))
    else:
        loss = lambda s, x: jnp.mean(jnp.abs(jnorm.batch_norm(x, s, use_running_average=True)[0]))  # noqa: E731
        report = tools.inspect_norms(step, jnorm.batch_norm_state(CHANNELS), batches, loss=loss)
    whole, eps = np.concatenate(batches).astype(np.float64), EPSILON
    running = np.mean([abs(b / np.sqrt(1 + eps)).mean() for b in batches])
    pooled = np.mean(abs((whole - whole.mean(0)) / np.sqrt(whole.var(0) + eps)))
    own = np.mean([abs((b - b.mean(0)) / np.sqrt(b.var(0) + eps)).mean() for b in np.float64(batches)])
    np.testing.assert_allclose(report.losses.means, [running, pooled, own], rtol=2e-5)  # sums of 256 values in float32
    np.testing.assert_allclose([only(report).loss_alone, -only(report).loss_without], pooled - running, rtol=1e-4)
    assert "does not depend" not in report.verdict


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_means_of_norms_that_do_not_collect(mean, rng):
    """Flax's averages hold them rounded to float32: a relative 2^-24 twice, of the average and of 1 - momentum."""
    net = nn.BatchNorm(use_running_average=False, momentum=0.99, use_fast_variance=False)
    batches = normal(rng, 2, mean=mean)
    whole = np.concatenate(batches).astype(np.float64)
    state = {"mean": np.float32(whole.mean(0)), "var": np.float32(whole.var(0))}
    params = {"scale": np.ones(CHANNELS, np.float32), "bias": np.zeros(CHANNELS, np.float32)}
    run = lambda s, x: net.apply({"params": params, "batch_stats": s}, x, mutable=["batch_stats"])[1]["batch_stats"]  # noqa: E731
    layer = only(tools.inspect_norms(run, state, batches))
    assert layer.mean_distance_max < 8 * 2**-24 * mean and not layer.findings  # a mean of 64 values, and rounding that of the state
    np.testing.assert_allclose(layer.var_ratio_max, 1, rtol=1e-3)


TRAINED_OTHERWISE = {
    "GhostBatchNorm": {"group_size": 8},
    "TrackedInstanceNorm": {},
    "BatchRenorm": {},
    "CrossMiniBatchNorm": {"num_mini_batches": 2},
}


@pytest.mark.parametrize("name", TRAINED_OTHERWISE)
def test_own_is_as_in_training(name, rng):
    """Whatever the norm normalizes with there, and whatever mode it is given in; the loss of a copy in training mode is what it is."""
    model = getattr(jnx, name)(CHANNELS, rngs=nnx.Rngs(0), **TRAINED_OTHERWISE[name])
    model.mean.set_value(model.mean[...] + 0.5)
    batches = [(b * (1 + np.arange(2)[:, None])).astype(np.float32) for b in (b.reshape(-1, 2, CHANNELS) for b in normal(rng, 2))]
    loss = lambda m, x: jnp.mean(jnp.abs(m(x)))  # noqa: E731
    want = [float(loss(nnx.clone(model), x)) for x in batches]
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    report = tools.inspect_norms(lambda m, x: m(x), model, batches, loss=loss)
    np.testing.assert_allclose(report.losses.own, want, rtol=1e-5)  # sums of 256 values, compiled another way
    assert report.losses.as_in_training and "with the norms in training mode" in report.verdict and model.use_running_average
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    # A loss that sets the mode itself is that of evaluation, whatever; what training has is not told then.
    fixed = lambda m, x: jnp.mean(m(x, use_running_average=True)) + 1  # noqa: E731
    model.train()
    cured = tools.recalibrate(lambda m, x: m(x), model, batches)
    unknown = tools.inspect_norms(lambda m, x: m(x), cured, batches, loss=fixed)
    assert not unknown.losses.as_in_training and f"not told by that: {name} normalize" in unknown.verdict


def test_the_verdict_of_losses(rng):
    batches = normal(rng, 4, mean=2.0)
    loss = lambda s, x: jnp.mean(jnorm.batch_norm(x, s, use_running_average=True)[0] ** 2)  # noqa: E731
    stale = tools.inspect_norms(step, jnorm.batch_norm_state(CHANNELS), batches, loss=loss)
    assert "is due to the norms; recalibrate closes" in stale.verdict and "they make the loss 3.75 more" in only(stale).verdict
    healthy = tools.inspect_norms(step, tools.recalibrate(step, jnorm.batch_norm_state(CHANNELS), batches), batches, loss=loss)
    assert "The norms make no gap" in healthy.verdict and "if they are batch norms" in healthy.verdict and kinds(healthy) == [[]]
    blind = tools.inspect_norms(step, jnorm.batch_norm_state(CHANNELS), batches, loss=lambda s, x: jnp.mean(x**2))
    assert "does not depend on the statistics" in blind.verdict
    # What remains after recalibration is due to the batches themselves: each of one sign.
    signs = [(b * 0.01 + (-1) ** i).astype(np.float32) for i, b in enumerate(normal(rng, 4))]
    stepwise = lambda s, x: jnp.mean(jnorm.batch_norm(x, s, use_running_average=True)[0]) ** 2 + 0.1  # noqa: E731
    apart = tools.inspect_norms(step, tools.recalibrate(step, jnorm.batch_norm_state(CHANNELS), signs), signs, loss=stepwise)
    assert "recalibrate closes 0% of it" in apart.verdict and "what a batch's own statistics tell of it" in apart.verdict


# --- models -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["nnx", pytest.param("linen", marks=pytest.mark.slow)])
def test_resnet(api, rng, compilations):
    """Two or three programs, however many layers and losses there are."""
    images = [jnp.asarray(rng.normal(size=(8, 8, 8, 3)), jnp.float32) for _ in range(2)]
    labels = jnp.arange(8) % models.CLASSES
    cross_entropy = lambda logits: -jax.nn.log_softmax(logits)[jnp.arange(8), labels].mean()  # noqa: E731
    if api == "nnx":
        model = nnx.eval_shape(lambda: models.NNXResNet(jnx, nnx.Rngs(0)))
        nnx.update(model, models.with_values(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), nnx.state(model)), rng))
        arguments = {"step": lambda m, x: m(x), "state": model, "loss": lambda m, x: cross_entropy(m(x))}
        snapshot = lambda: jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))  # noqa: E731
    else:
        model = models.ResNet(jnn)
        shapes = jax.eval_shape(lambda k: model.init(k, images[0], train=True), jax.random.key(0))
        variables = models.with_values(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes), rng)
        stats = {"batch_stats": variables["batch_stats"]}
        fixed = {"params": variables["params"]}
        arguments = {
            "step": lambda s, x: model.apply({**fixed, "batch_stats": s}, x, train=True, mutable=["batch_stats"])[1]["batch_stats"],
            "state": stats["batch_stats"],
            "loss": lambda s, x: cross_entropy(model.apply({**fixed, "batch_stats": s}, x, train=False)),
            "params": variables["params"],
        }
        snapshot = lambda: jax.tree.map(np.asarray, variables)  # noqa: E731
    before = snapshot()
    tools.inspect_norms(
        **arguments, batches=images, layers="*norm1" if api == "nnx" else "BatchNorm_1"
    )  # what JAX computes by itself, once
    with compilations() as count:
        report = tools.inspect_norms(**arguments, batches=images)
    assert count() < 16  # and a few small ones, of zeros and the like
    jax.tree.map(np.testing.assert_array_equal, snapshot(), before)
    assert len(report.layers) == 20
    for layer in report.layers:
        assert layer.kl > 0 and layer.scale_max <= 1.5 and np.isfinite([layer.loss_alone, layer.loss_without, layer.noise]).all()
    assert "other data" in {k for some in kinds(report) for k in some}


def test_fifty_layers(rng, compilations):
    """A network of fifty norms: a hundred and three losses for each batch, and two programs."""

    def network(state, x, **options):
        new = {}
        for i in range(50):
            y, new[f"norm_{i}"] = jnorm.batch_norm(x, state[f"norm_{i}"], **options)
            x = x + 0.1 * jnp.tanh(y)
        return x, new

    state = {f"norm_{i}": jnorm.batch_norm_state(CHANNELS) for i in range(50)}
    batches = normal(rng, 2)
    called = []

    def loss(state, x):
        called.append(1)
        return jnp.mean(network(state, x, use_running_average=True)[0] ** 2)

    with compilations() as count:
        report = tools.inspect_norms(lambda s, x: network(s, x)[1], state, batches, loss=loss)
    assert len(report.layers) == 50 and len(called) == 1 and count() < 10  # and a few small ones, of zeros and the like


def test_transformer_has_scales_only(rng):
    """Layer norms do the same in training and evaluation; their scales may be ill."""
    model = nnx.eval_shape(lambda: models.NNXTransformer(jnx, nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda a: np.ones(a.shape, a.dtype), nnx.state(model)))
    model.norm.scale.set_value(np.float32([1, 1, 1e4, 1, 1, 1, 1, 1]))
    x = jnp.ones((2, 3, 8))
    report = tools.inspect_norms(lambda m, x: m(x), model, [x])
    assert {a.path: [f.kind for f in a.findings] for a in report.layers} == {
        "block/norm1": [],
        "block/norm2": [],
        "norm": ["exploding scale"],
    }
    assert "the same in training and in evaluation" in report.verdict and "1 of 3 norms has findings" in report.verdict
    with refuses("nothing to plot"):
        report.plot()
    params = {"norm": {"scale": np.ones(3), "bias": np.zeros(3)}, "dense": {"kernel": np.ones((3, 3)), "bias": np.ones(3)}}
    of_params = tools.inspect_norms(step, {}, [x], params=params)
    assert [a.path for a in of_params.layers] == ["norm"] and "the same in training" in of_params.verdict


def test_dropout_is_off_in_copies():
    """And the norms are in training mode for the step, whatever mode the model is in."""

    class Net(nnx.Module):
        def __init__(self):
            self.dropout, self.norm = nnx.Dropout(0.5, rngs=nnx.Rngs(1)), jnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.dropout(x))

    model, x = Net(), np.ones((8, CHANNELS), np.float32)
    for mode in (model.train, model.eval):
        mode()
        report = tools.inspect_norms(lambda m, x: m(x), model, [x, x], loss=lambda m, x: jnp.mean(m(x)))
        assert only(report).constant == (0, 1, 2, 3)
        np.testing.assert_allclose(report.losses.running, 1 / (1 + 1e-5) ** 0.5, rtol=1e-6)
    assert model.norm.use_running_average and model.dropout.deterministic


@pytest.mark.parametrize("jit", [False, True])
def test_order_of_calls(jit):
    """Not that of the names of attributes; also inside of what is compiled, and traced before."""

    class Net(nnx.Module):
        def __init__(self):
            self.a, self.b = jnx.LayerNorm(CHANNELS, rngs=nnx.Rngs(0)), jnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))
            self.blocks = nnx.List([nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))])
            self.aside = jnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.a(self.b(self.blocks[0](x)))

    model, x = Net(), jnp.ones((8, CHANNELS))
    run = (nnx.jit if jit else lambda f: f)(lambda m, x: m(x))
    for _ in range(2):
        assert [a.path for a in tools.inspect_norms(run, model, [x]).layers] == ["blocks/0", "b", "a", "aside"]


@pytest.mark.parametrize("frozen", [False, True])
def test_all_variables(frozen, rng):
    """In place of a collection of them: the same report, with the parameters that are there too."""
    net, batches = LinenNet(), normal(rng, 2, size=16)
    variables = {"params": net.init(jax.random.key(0), batches[0], train=True)["params"], "batch_stats": STATE}
    variables["params"]["norm_0"]["scale"] = np.float32([1, 0, 1, 1])
    run, state, _ = by_api("linen")
    given = flax.core.freeze(variables) if frozen else variables

    def step_of_all(variables, x):
        return type(variables)({**variables, **net.apply(variables, x, train=True, mutable=["batch_stats"])[1]})

    report = tools.inspect_norms(step_of_all, given, batches, loss=lambda v, x: target_loss(net.apply(v, x, train=False)))
    assert [(a.path, a.dead) for a in report.layers] == [("norm_0", (1,)), ("norm_1", ())]
    assert [a.kl for a in report.layers][0] == tools.inspect_norms(run, state, batches).layers[0].kl
    assert np.ptp(report.losses.means) > 0
    whole = tools.inspect_norms(run, state, batches, params=given)
    assert [(a.path, a.dead) for a in whole.layers] == [("norm_0", (1,)), ("norm_1", ())]
    with refuses("no scale in params has the path of a state", "'net/norm_0'", "'norm_0'"):
        tools.inspect_norms(run, state, batches, params={"net": variables["params"]})


def test_samples_of_a_statistic(rng):
    """Of a group of ghost batch norm; instance norm counts instances, which say nothing of noise."""
    batches = [b.reshape(-1, 2, CHANNELS) for b in normal(rng, 8)]  # 32 examples of two values
    for norm, samples, found in (
        (jnx.GhostBatchNorm(CHANNELS, group_size=2, rngs=nnx.Rngs(0)), 4, ["few samples"]),
        (jnx.GhostBatchNorm(CHANNELS, group_size=16, rngs=nnx.Rngs(0)), 32, []),
        (jnx.TrackedInstanceNorm(CHANNELS, rngs=nnx.Rngs(0)), None, []),
    ):
        layer = only(tools.inspect_norms(lambda m, x: m(x), tools.recalibrate(lambda m, x: m(x), norm, batches), batches))
        assert (layer.samples, [f.kind for f in layer.findings]) == (samples, found)
        if samples:
            np.testing.assert_allclose(layer.noise, samples**-0.5, rtol=0.5)  # of 4·7 degrees of freedom: three standard errors


OTHERS = {
    "batch_renorm": (jnorm.batch_renorm, jnorm.batch_renorm_state, {"momentum": 0.9}),
    "mean_only_batch_norm": (jnorm.mean_only_batch_norm, jnorm.mean_only_batch_norm_state, {"momentum": 0.9}),
    "tracked_instance_norm": (jnorm.tracked_instance_norm, jnorm.batch_norm_state, {"momentum": 0.9}),
    "ghost_batch_norm": (jnorm.ghost_batch_norm, jnorm.batch_norm_state, {"momentum": 0.9, "group_size": 16}),
    "cross_mini_batch_norm": (jnorm.cross_mini_batch_norm, jnorm.cross_mini_batch_norm_state, {"momentum": 0.9, "num_mini_batches": 2}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_norms(name, rng):
    """Healthy after 100 batches; with a shift of the input they are not."""
    norm, make, options = OTHERS[name]
    run = jax.jit(lambda s, x: norm(x, s, **options)[1])
    loss = lambda s, x: jnp.mean(norm(x, s, use_running_average=True, **options)[0] ** 2)  # noqa: E731
    batches = [b.reshape(32, 2, CHANNELS) for b in normal(rng, 100)]
    state = trained(batches, make=make, run=lambda s, x, _: run(s, x))
    report = tools.inspect_norms(run, state, batches[:4], loss=loss)
    assert kinds(report) in ([[]], [["few samples"]] if name == "tracked_instance_norm" else [[]]), only(report).verdict
    shifted = only(tools.inspect_norms(run, state, [b + np.float32(2) for b in batches[:4]], loss=loss))
    assert "other data" in {f.kind for f in shifted.findings} and shifted.loss_alone < 0
    if name == "mean_only_batch_norm":
        assert shifted.var_ratio is None and shifted.noise is None
        np.testing.assert_allclose(shifted.mean_distance, 2, rtol=0.1)


def test_frozen_and_absent_layers(rng):
    """What is frozen, or in no batch, is not accused; the others are."""
    state = {name: jnorm.batch_norm_state(CHANNELS) for name in ("frozen", "plain", "unused")}
    state = tools.freeze(state, layers="frozen", updates=False)

    def run(state, x):
        return {**state, **{name: step(state[name], x) for name in ("frozen", "plain")}}

    loss = lambda s, x: sum(jnp.mean(jnorm.batch_norm(x, s[k], use_running_average=True)[0] ** 2) for k in ("frozen", "plain"))  # noqa: E731
    report = tools.inspect_norms(run, state, normal(rng, 4, mean=5.0), loss=loss)
    frozen, plain, unused = report.layers
    assert frozen.frozen and not frozen.findings and frozen.loss_alone is None and frozen.mean_distance > 4
    assert [f.kind for f in plain.findings] == ["initial values"]
    assert unused.kl is None and not unused.findings and unused.loss_alone is None
    assert "frozen" in str(report)


def test_complex_and_narrow_states(rng):
    z = [(a + 1j * b).astype(np.complex64) for a, b in zip(normal(rng, 4), normal(rng, 4), strict=True)]
    state = {"mean": np.full(CHANNELS, 3 + 4j, np.complex64), "var": np.full(CHANNELS, 2, np.float32)}
    layer = only(tools.inspect_norms(step, state, z, loss=lambda s, x: jnp.abs(jnorm.batch_norm(x, s, use_running_average=True)[0]).mean()))
    np.testing.assert_allclose(layer.mean_distance, 5 / 2**0.5, rtol=0.1)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), jnorm.batch_norm_state(CHANNELS))
    loss = lambda s, x: jnp.mean(jnorm.batch_norm(x, s, use_running_average=True)[0] ** 2)  # noqa: E731
    report = tools.inspect_norms(step, narrow, normal(rng, 2, mean=2.0), loss=loss)
    assert report.losses.pooled[0] < report.losses.running[0] and kinds(report) == [["initial values"]]


@pytest.mark.parametrize("placed", [False, True])
def test_sharded_batches_and_frozen_collections(placed, rng, compilations):
    """On eight devices as on one; a state that lies on all of them stays there, so that nothing is compiled anew."""
    mesh = mesh_of()
    batches = normal(rng, 2, size=16)
    run, state, loss = by_api("linen")
    given = flax.core.freeze(state)
    want = tools.inspect_norms(run, given, batches, loss=loss)
    if placed:
        given = jax.device_put(given, NamedSharding(mesh, P()))
    with compilations() as count:
        got = tools.inspect_norms(run, given, [jax.device_put(b, NamedSharding(mesh, P("d"))) for b in batches], loss=loss)
    assert count() < 10
    for one, other in zip(got.layers, want.layers, strict=True):
        # means of 32 values, in another order
        np.testing.assert_allclose([one.kl, one.loss_alone, one.noise], [other.kl, other.loss_alone, other.noise], rtol=1e-4, atol=1e-6)


# --- the report ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    batches = normal(np.random.default_rng(0), 3, mean=1.0)
    run, state, loss = by_api("functional")
    return tools.inspect_norms(run, state, batches, loss=loss, params={"norm_1": {"scale": np.float32([1, 0, 1, 1])}})


def test_dict(report):
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [layer["path"] for layer in plain["layers"]] == ["norm_0", "norm_1"] and plain["batches"] == 3
    assert plain["layers"][1]["dead"] == [1] and plain["layers"][1]["kl"] == report.layers[1].kl
    assert plain["losses"]["running"] == list(report.losses.running) and plain["verdict"] == report.verdict
    assert plain["layers"][1]["verdict"] == report.layers[1].verdict and plain["layers"][1]["findings"][-1]["kind"] == "dead channels"
    assert repr(report) == "Report(2 norms, 2 with findings, 3 batches)"


@pytest.mark.parametrize("width", [80, 140])
def test_table(report, width):
    import io

    from rich.console import Console

    text = io.StringIO()
    report.print(Console(file=text, width=width, color_system=None))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    for layer in report.layers:
        assert any(layer.path in line and f"{layer.loss_alone:+.3f}" in line for line in lines)
    assert "dead channels (norm_1)" in text.getvalue()
    if width == 140:
        assert str(report) == text.getvalue().rstrip()


def test_figure(report, tmp_path):
    figure = report.plot(tmp_path / "new" / "report.png")
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 4 and [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["norm_0", "norm_1"]


@pytest.mark.parametrize("worst, ticks", [(1.6, ["1/2", "1", "2"]), (90.0, ["1/100", "1", "100"])])
def test_ticks_of_ratios(report, worst, ticks):
    layers = tuple(dataclasses.replace(layer, var_ratio_max=worst) for layer in report.layers)
    axis = dataclasses.replace(report, layers=layers).plot().axes[1]
    assert [t.get_text() for t in axis.get_xticklabels()] == ticks


@pytest.mark.parametrize("package, use", [("rich.console", str), ("matplotlib.figure", Report.plot)])
def test_packages_that_are_not_there(report, monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with refuses("pip install", "jnorm[examples]", kind=ImportError):
        use(report)


def test_progress(capfd):
    tools.inspect_norms(step, jnorm.batch_norm_state(1), [np.float32([[1], [2]])], loss=lambda s, x: jnp.sum(s["mean"]), progress=True)
    assert "inspect_norms" in capfd.readouterr().err


# --- refused ------------------------------------------------------------------------------------------------------------------


def test_refusals(rng):
    state, batches = {"a": jnorm.batch_norm_state(CHANNELS)}, normal(rng, 1)
    run = lambda s, x: {"a": step(s["a"], x)}  # noqa: E731
    with refuses("there are no norms", "'scale'"):
        tools.inspect_norms(run, {"kernel": np.ones(3)}, batches)
    with refuses("there is no norm in the model"):
        tools.inspect_norms(run, nnx.Linear(1, 1, rngs=nnx.Rngs(0)), batches)
    with refuses("layers='b' matches none of the norms: 'a'"):
        tools.inspect_norms(run, state, batches, layers="b")
    with refuses("no batches", "iterator"):
        tools.inspect_norms(run, state, iter(()))
    with refuses("no batches"):
        tools.inspect_norms(run, state, lambda: iter(()))
    with refuses("nothing was collected", "training mode"):
        tools.inspect_norms(lambda s, x: {"a": step(s["a"], x, use_running_average=True)}, state, batches)
    with refuses("must return the new state", "NoneType"):
        tools.inspect_norms(lambda s, x: None, state, batches)
    with refuses("the loss must be a real scalar", "(64,)"):
        tools.inspect_norms(run, state, batches, loss=lambda s, x: x[:, 0])
    with refuses("the loss must be a scalar", "a tuple of 2 arrays", "its first alone"):
        tools.inspect_norms(run, state, batches, loss=lambda s, x: (x.mean(), x.max()))
    with refuses("scale of 'a'", "(3,)", "(4,)"):
        tools.inspect_norms(run, state, batches, params={"a": {"scale": np.ones(3)}})
    with refuses("params are for a state"):
        tools.inspect_norms(run, jnx.BatchNorm(1, rngs=nnx.Rngs(0)), batches, params={})
