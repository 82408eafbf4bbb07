"""Identities that hold for all inputs; hypothesis draws magnitudes, masks, cuts and seeds from few shapes, so that little compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as draw
from hypothesis import strategies as st

import cases
import jnorm
import oracles
from cases import BY_NAME

SHAPE = (6, 4, 6)
EPS = float(np.finfo(np.float32).eps)
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([1e-3, 1.0, 1e3])
means = st.sampled_from([0.0, -1.0, 1e4])


def data(seed, magnitude=1.0, mean=0.0, shape=SHAPE):
    return ((np.random.default_rng(seed).normal(size=shape) + mean) * magnitude).astype(np.float32)


@functools.cache
def jitted(name, **options):
    return jax.jit(functools.partial(getattr(jnorm, name), **options))


def norm(name, **options):
    return jitted(name, **options)


moments = jax.jit(lambda x, mask: jnorm.moments(x, (0, 1), mask=mask))
by_row = jax.jit(lambda x, mask: jnorm.moments(x, 1, mask=mask))
combine = jax.jit(jnorm.combine, static_argnums=1)


def alike(one, two, length, value_size=0.0):
    """Counts exactly, mean and variance to the rounding of `length` additions."""
    np.testing.assert_array_equal(one.count, two.count)
    spread = np.sqrt(np.asarray(two.var)) + value_size
    np.testing.assert_allclose(one.mean, two.mean, rtol=2 * EPS, atol=(length + 16) * EPS * spread.max())
    np.testing.assert_allclose(one.m2, two.m2, rtol=2 * (length + 16) * EPS)


@draw(seeds, magnitudes, means)
def test_moments_of_all_are_the_merged_moments_of_parts(seed, magnitude, mean):
    x, mask = data(seed, magnitude, mean), np.random.default_rng(seed).uniform(size=SHAPE) < 0.6
    alike(combine(by_row(x, mask), 0), moments(x, mask), 24)


@draw(seeds, st.permutations(range(6)))
def test_merging_does_not_depend_on_the_order(seed, order):
    parts = by_row(data(seed, mean=1e4), np.random.default_rng(seed).uniform(size=SHAPE) < 0.6)
    alike(combine(jax.tree.map(lambda a: a[np.array(order)], parts), 0), combine(parts, 0), 24)


def stack(*stats):
    return jnorm.Stats(*(jnp.stack(a) for a in zip(*stats, strict=True)))


@draw(seeds, means)
def test_merging_is_associative(seed, mean):
    """(a ∪ b) ∪ c = a ∪ (b ∪ c), also where one counts nothing."""
    x, mask = data(seed, mean=mean), np.random.default_rng(seed).uniform(size=SHAPE) < 0.6
    mask[seed % 3] = False
    a, b, c = (jax.tree.map(lambda v, i=i: v[i], by_row(x, mask)) for i in range(3))
    left, right = combine(stack(combine(stack(a, b), 0), c), 0), combine(stack(a, combine(stack(b, c), 0)), 0)
    alike(left, right, 12)


@draw(seeds)
def test_merging_with_nothing_changes_nothing(seed):
    one = jax.tree.map(lambda v: v[0], by_row(data(seed, mean=1e4), np.ones(SHAPE, bool)))
    alike(combine(stack(one, jax.tree.map(jnp.zeros_like, one)), 0), one, 4)


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_counted"])
@draw(seed=seeds, magnitude=magnitudes, mean=means)
def test_a_mask_drops_rows(name, seed, magnitude, mean):
    """Three of six rows counted: as if the others were not there."""
    case, x = BY_NAME[name], data(seed, magnitude, mean)
    mask = np.zeros((6, 1, 1), bool)
    mask[np.random.default_rng(seed).choice(6, 3, replace=False)] = True
    rows = mask.ravel()
    given = {
        "scale": data(seed, shape=(6,)),
        "bias": data(seed + 1, shape=(6,)),
        "state": cases.state_of(case, np.random.default_rng(seed)),
    }
    y, state = jitted_call(name)(given | {"x": x, "mask": mask})
    want, want_state = jitted_call(name)(given | {"x": x[rows]})
    size = (1 + abs(np.asarray(want))).max() * (abs(given["scale"]).max() + abs(given["bias"]).max())
    np.testing.assert_allclose(np.asarray(y)[rows], want, atol=2 * 28 * EPS * size)
    for key in state:
        np.testing.assert_allclose(state[key], want_state[key], rtol=4 * 28 * EPS, atol=28 * EPS * magnitude)


@functools.cache
def jitted_call(name):
    return jax.jit(functools.partial(cases.call, BY_NAME[name]))


STATELESS = {
    "layer_norm": (lambda: norm("layer_norm", epsilon=0), -1),
    "group_norm": (lambda: norm("group_norm", num_groups=2, epsilon=0), None),
    "instance_norm": (lambda: norm("instance_norm", epsilon=0), None),
}


def condition(x, axes):
    """How much larger x is than its spread: rounding a·x + b loses that many times eps."""
    wide = x.astype(np.float64)
    return float((abs(wide).max(axes) / wide.std(axes)).max())


@pytest.mark.parametrize("name", STATELESS)
@draw(seed=seeds, factor=st.sampled_from([0.125, 3.0, 1e3]), shift=st.sampled_from([0.0, 10.0, -1e3]))
def test_invariant_to_scale_and_shift(name, seed, factor, shift):
    """f(a·x + b) = f(x) with epsilon 0 and a > 0, up to the rounding of a·x + b itself."""
    f, x = STATELESS[name][0](), data(seed)
    moved = (x.astype(np.float64) * factor + shift).astype(np.float32)
    axes = {"layer_norm": 2, "group_norm": (1,), "instance_norm": 1}[name]
    largest = float(abs(np.asarray(f(x))).max()) + 1
    np.testing.assert_allclose(f(moved), f(x), atol=(24 + 16 + condition(moved, axes)) * EPS * largest)


@draw(seed=seeds, factor=st.sampled_from([0.125, 3.0, 1e3]))
def test_rms_norm_is_invariant_to_scale(seed, factor):
    f, x = norm("rms_norm", epsilon=0), data(seed)
    np.testing.assert_allclose(f(x * np.float32(factor)), f(x), rtol=24 * EPS)


def close(one, two, length, size=4.0):
    np.testing.assert_allclose(one, two, rtol=0, atol=2 * (length + 16) * EPS * size)


@draw(seeds, means)
def test_one_group_is_layer_norm_over_all_but_the_batch(seed, mean):
    x = data(seed, mean=mean)
    close(norm("group_norm", num_groups=1)(x), norm("layer_norm", reduction_axes=(1, 2))(x), 24)


@draw(seeds, means)
def test_a_group_per_channel_is_instance_norm(seed, mean):
    x = data(seed, mean=mean)
    close(norm("group_norm", group_size=1)(x), norm("instance_norm")(x), 4)


@draw(seeds)
def test_instance_norm_is_batch_norm_of_each_sample(seed):
    x, state = data(seed), jnorm.batch_norm_state(6)
    each = jax.vmap(lambda x: jnorm.batch_norm(x, state, epsilon=1e-6)[0])
    close(norm("instance_norm")(x), each(x), 4)


@draw(seeds)
def test_rms_norm_is_layer_norm_on_rows_of_mean_zero(seed):
    """Rows x, −x have mean zero exactly."""
    half = data(seed, shape=(6, 4, 3))
    x = np.concatenate([half, -half], -1)
    close(norm("rms_norm")(x), norm("layer_norm")(x), 6)


@draw(seeds)
def test_frozen_batch_norm_is_affine(seed):
    """f(x) + f(z) − f(0) = f(x + z), and each channel by itself."""
    rng = np.random.default_rng(seed)
    state = {"mean": data(seed, shape=(6,)), "var": rng.uniform(0.5, 2, 6).astype(np.float32)}
    f = lambda v: frozen(v, state)  # noqa: E731
    x, z = data(seed), data(seed + 1)
    np.testing.assert_allclose(f(x) + f(z) - f(0 * x), f(x + z), atol=16 * EPS * 30)


frozen = jax.jit(lambda v, state: jnorm.batch_norm(v, state, use_running_average=True)[0])

PER_SAMPLE = {
    "layer_norm": lambda x: norm("layer_norm")(x),
    "rms_norm": lambda x: norm("rms_norm")(x),
    "group_norm": lambda x: norm("group_norm", num_groups=3)(x),
    "instance_norm": lambda x: norm("instance_norm")(x),
    "frozen": lambda x: frozen(x, jnorm.batch_norm_state(6)),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
@draw(seed=seeds, sample=st.integers(0, 5))
def test_other_samples_do_not_matter(name, seed, sample):
    x, changed = data(seed), data(seed + 1, 100.0)
    changed[sample] = x[sample]
    np.testing.assert_array_equal(PER_SAMPLE[name](x)[sample], PER_SAMPLE[name](changed)[sample])


@draw(seeds)
def test_other_samples_do_matter_to_batch_norm(seed):
    x, changed = data(seed), data(seed + 1, 100.0)
    changed[0] = x[0]
    f = jitted_call("batch_norm_no_affine")
    state = {"mean": np.zeros(6, np.float32), "var": np.ones(6, np.float32)}
    assert abs(np.asarray(f({"x": x, "state": state})[0][0]) - np.asarray(f({"x": changed, "state": state})[0][0])).max() > 0.1


@draw(seeds, magnitudes, means)
def test_output_of_batch_norm_has_the_moments_it_promises(seed, magnitude, mean):
    """Mean 0 and variance var/(var + epsilon), whatever came in."""
    x = data(seed, magnitude, mean)
    y = np.asarray(jitted_call("batch_norm_no_affine")({"x": x, "state": jnorm.batch_norm_state(6)})[0], np.float64)
    var = x.astype(np.float64).var((0, 1))
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=40 * EPS * 4)
    np.testing.assert_allclose(y.var((0, 1)), var / (var + 1e-5), rtol=80 * EPS * 4)


@draw(st.integers(1, 6), st.sampled_from([1, 4]))
def test_padding_is_a_multiple(rows, multiple):
    x, mask = jnorm.pad_batch(data(rows)[:rows], multiple)
    assert len(x) % multiple == 0 and 0 <= len(x) - rows < multiple and int(mask.sum()) == rows
    np.testing.assert_array_equal(x[:rows], data(rows)[:rows])


def test_oracle_helpers_agree_with_numpy():
    """The oracle itself, once, against np.mean and np.var."""
    x = data(3, mean=5).astype(np.float64)
    m = oracles.moments(x, oracles.sets(SHAPE, {2: 1}))
    np.testing.assert_allclose(m.mean, x.mean((0, 1)), rtol=1e-14)
    np.testing.assert_allclose(m.var, x.var((0, 1)), rtol=1e-12)
