"""Equinox's norms: outputs in training and evaluation and running statistics are Equinox's own, there and back, for several steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jnorm.tools import convert
from refusals import refuses

eqx = pytest.importorskip("equinox", reason="Equinox is an optional test dependency")

SHAPE = (4, 6, 5, 3)  # channels second
ATOL = 60 * 10 * 2**-24  # sums of at most 60 numbers of order ten in float32
CASES = {
    "BatchNorm": ("BatchNorm", (6,), {"mode": "batch", "momentum": 0.9}),
    "BatchNorm-slow": ("BatchNorm", (6,), {"mode": "batch", "momentum": 0.99, "eps": 1e-3}),
    "BatchNorm-plain": ("BatchNorm", (6,), {"mode": "batch", "momentum": 0.5, "channelwise_affine": False}),
    "LayerNorm": ("LayerNorm", ((6, 5, 3),), {"eps": 1e-3}),
    "LayerNorm-scale": ("LayerNorm", ((6, 5, 3),), {"use_bias": False}),
    "GroupNorm": ("GroupNorm", (3, 6), {"eps": 1e-2}),
    "GroupNorm-plain": ("GroupNorm", (2, 6), {"channelwise_affine": False}),
    "RMSNorm": ("RMSNorm", ((6, 5, 3),), {"use_bias": False, "eps": 1e-3}),
}
call = nnx.jit(lambda module, x: module(x))


def with_values(layer, rng):
    for name in ("weight", "bias"):
        if (a := getattr(layer, name)) is not None:
            new = jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
            layer = eqx.tree_at(lambda one, name=name: getattr(one, name), layer, new)
    return layer


@eqx.filter_jit
def run(layer, state, x, inference=False):
    """-> y and the state."""
    with jax.numpy_dtype_promotion("standard"):
        if isinstance(layer, eqx.nn.BatchNorm):
            layer = eqx.nn.inference_mode(layer, inference)
            return jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)
        return jax.vmap(layer)(x), state


def clone(state):
    """Equinox's states are good for one use."""
    return jax.tree.map(lambda a: a, state)


def batches(rng, number=3):
    return [(rng.normal(size=SHAPE) * (i + 1) + i).astype(np.float32) for i in range(number)]


def made(case, rng, steps=2):
    kind, args, options = CASES[case]
    if kind == "BatchNorm":
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(*args, "batch", **options)
    else:
        layer, state = getattr(eqx.nn, kind)(*args, **options), None
    layer = with_values(layer, rng)
    for x in batches(rng, steps) if kind == "BatchNorm" else ():
        _, state = run(layer, state, x)
    return layer, state


def statistics(layer, state):
    """As Equinox normalizes with in evaluation."""
    steps, hidden = state.get(layer.batch_counter), state.get(layer.batch_state_index)
    return [np.asarray(a) / (1 - layer.momentum ** int(steps)) for a in hidden], int(steps)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, rng):
    layer, state = made(case, rng)
    norm = convert.of_equinox(layer, state, channels_last=False)
    back, state_back = convert.as_equinox(norm)
    assert jax.tree.structure(eqx.filter(back, eqx.is_array)) == jax.tree.structure(eqx.filter(layer, eqx.is_array))
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            np.testing.assert_array_equal(getattr(back, name), getattr(layer, name))
    module = norm.to_nnx()
    for x in batches(rng):
        if state is not None:
            module.eval()
            want, _ = run(layer, clone(state), x, inference=True)
            np.testing.assert_allclose(call(module, x), want, rtol=0, atol=ATOL)
            np.testing.assert_allclose(run(back, clone(state_back), x, inference=True)[0], want, rtol=0, atol=ATOL)
            module.train()
        want, state = run(layer, state, x)
        y, state_back = run(back, state_back, x)
        np.testing.assert_allclose(y, want, rtol=0, atol=ATOL)
        np.testing.assert_allclose(call(module, x), want, rtol=0, atol=ATOL)
        if state is None:
            continue
        there, steps = statistics(layer, state)
        again, steps_again = statistics(back, state_back)
        assert steps == steps_again
        for i, name in enumerate(("mean", "var")):
            bound = ATOL * max(1, abs(there[i]).max())
            np.testing.assert_allclose(getattr(module, name)[...], there[i], rtol=0, atol=bound, err_msg=name)
            np.testing.assert_allclose(again[i], there[i], rtol=0, atol=bound, err_msg=name)


def test_channels_last(rng):
    layer, state = made("GroupNorm", rng)
    x = batches(rng)[0]
    module = convert.of_equinox(layer).to_nnx()
    np.testing.assert_allclose(np.moveaxis(module(np.moveaxis(x, 1, -1)), -1, 1), run(layer, state, x)[0], rtol=0, atol=ATOL)


def test_the_variance_is_biased(rng):
    """Equinox's docstring says that the one of evaluation is unbiased."""
    layer, state = made("BatchNorm", rng, steps=0)
    x = batches(rng)[0]
    _, state = run(layer, state, x)
    hidden = np.asarray(state.get(layer.batch_state_index)[1], np.float64)
    np.testing.assert_allclose((hidden - 0.9) / 0.1, x.astype(np.float64).var((0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("case", ["BatchNorm", "BatchNorm-slow"])
def test_before_any_step_the_variances_part(case, rng):
    """Equinox debiases a hidden variance that started at 1 as if it had started at 0: it is too large by m^k / (1 - m^k) for ever."""
    layer, state = made(case, rng, steps=0)
    module = convert.of_equinox(layer, state, channels_last=False).to_nnx()
    module.eval()
    first = batches(rng)[0]
    np.testing.assert_allclose(call(module, first), run(layer, clone(state), first, inference=True)[0], rtol=0, atol=ATOL)
    module.train()
    for k, x in enumerate(batches(rng), 1):
        want, state = run(layer, state, x)
        np.testing.assert_allclose(call(module, x), want, rtol=0, atol=ATOL)
        (mean, var), _ = statistics(layer, state)
        left = layer.momentum**k
        np.testing.assert_allclose(module.mean[...], mean, rtol=0, atol=2 * ATOL)
        np.testing.assert_allclose(module.var[...] + left / (1 - left), var, rtol=1e-4)


def test_ema_mode(rng):
    """It normalizes with the running statistics in training too: evaluation can be had, and so can the averages."""
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    layer, state = make(6, "batch", mode="ema", momentum=0.9)
    with refuses("seen no batch"):
        convert.of_equinox(eqx.nn.inference_mode(layer), state)
    for x in batches(rng):
        want, state = run(layer, state, x)
    with refuses("mode='ema'", "inference_mode"):
        convert.of_equinox(layer, state)
    module = convert.of_equinox(eqx.nn.inference_mode(layer), state, channels_last=False).to_nnx()
    module.eval()
    np.testing.assert_allclose(call(module, x), run(layer, clone(state), x, inference=True)[0], rtol=0, atol=ATOL)
    module.train()
    y = call(module, x)
    want, state = run(layer, state, x)
    for got, there in zip((module.mean[...], module.var[...]), state.get(layer.ema_state_index), strict=True):
        np.testing.assert_allclose(got, there, rtol=0, atol=10 * ATOL)
    assert abs(y - want).max() > 0.1  # what differs


def test_without_a_count(rng):
    """An average that is not debiased goes on as it is, there too."""
    kept = {name: rng.uniform(0.5, 1.5, 6).astype(np.float32) for name in ("mean", "var")}
    norm = convert.Norm(kind="BatchNorm", shape=(6,), momentum=0.99, feature_axes=(1,), scale=np.full(6, 2, np.float32), **kept)
    module, (layer, state) = norm.to_nnx(), convert.as_equinox(norm)
    x = batches(rng)[0]
    np.testing.assert_allclose(call(module, x), run(layer, clone(state), x)[0], rtol=0, atol=ATOL)
    _, state = run(layer, state, x)
    for got, there in zip((module.mean[...], module.var[...]), statistics(layer, state)[0], strict=True):
        np.testing.assert_allclose(got, there, rtol=0, atol=ATOL)


def test_dtypes(rng):
    layer = with_values(eqx.nn.GroupNorm(2, 6, dtype=jnp.bfloat16), rng)
    norm = convert.of_equinox(layer)
    assert norm.scale.dtype == jnp.bfloat16 and norm.to_nnx().scale.dtype == jnp.bfloat16
    back, _ = convert.as_equinox(norm)
    assert back.weight.dtype == back.bias.dtype == jnp.bfloat16


def test_refusals(rng):
    layer, state = made("BatchNorm", rng)
    with refuses("equinox.nn.State"):
        convert.of_equinox(layer)
    with refuses("Linear"):
        convert.of_equinox(eqx.nn.Linear(2, 2, key=jax.random.key(0)))
    biased = eqx.nn.RMSNorm(4)
    assert convert.of_equinox(biased).kind == "RMSNorm"  # a bias of 0
    with refuses("bias that is not 0"):
        convert.of_equinox(with_values(biased, rng))
    norm = convert.of_equinox(layer, state)
    for change, told in (
        ({"running_var_correction": 1}, "running_var_correction=0"),
        ({"momentum": None}, "cumulative"),
        ({"count": 1.05}, "no whole number of steps"),
        ({"activation": "relu"}, "no activation"),
        ({"kind": "TrackedInstanceNorm"}, "TrackedInstanceNorm"),
        ({"kind": "LayerNorm", "feature_axes": (1,)}, "feature_axes=(1,)"),
    ):
        with refuses(told):
            convert.as_equinox(dataclasses.replace(norm, **change))
