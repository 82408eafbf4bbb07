"""Fused activations and residuals against the composition with jax.nn, and callables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jnorm
import oracles
import plain
from cases import BY_NAME, replace

ACTIVE = ["batch_norm", "group_norm", "instance_norm", "tracked_instance_norm"]
NAMES = ["relu", "leaky_relu", "silu", "gelu"]


@pytest.mark.parametrize("activation", NAMES)
def test_oracle_is_jax_nn(activation):
    """The oracle's formulas mean what jax.nn means. 8 float32 roundings."""
    z = np.linspace(-6, 6, 61).astype(np.float32)
    value, slope = oracles.ACTIVATIONS[activation](z.astype(np.float64))
    f = plain.activation(activation)
    np.testing.assert_allclose(f(z), value, atol=8 * 2**-23 * 6)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(z), np.where(z == 0, jax.grad(f)(0.0), slope), atol=8 * 2**-23 * 6)


PAIRS = [(n, a) for i, n in enumerate(ACTIVE) for j, a in enumerate(NAMES) if n == "batch_norm" or (i + j) % 2]


@pytest.mark.parametrize(("norm", "activation"), PAIRS)
def test_named(norm, activation):
    case = replace(BY_NAME[norm], options=BY_NAME[norm].options | {"activation": activation}, act=activation)
    given = cases.inputs(case)
    y, state, gradients = jax.jit(cases.value_and_gradients(case))(given)
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("activation", [*NAMES, "tanh"])
def test_with_residual(activation):
    """Added before the activation; "tanh" is a callable."""
    option = jnp.tanh if activation == "tanh" else activation
    case = replace(BY_NAME["batch_norm"], options={"activation": option}, act=activation, residual=True, mask=(4, 1, 1, 1))
    given = cases.inputs(case)
    y, state, gradients = jax.jit(cases.value_and_gradients(case))(given)
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("norm", ACTIVE)
def test_callable(norm):
    case = replace(BY_NAME[norm], options=BY_NAME[norm].options | {"activation": jnp.tanh}, act="tanh")
    given = cases.inputs(case)
    y, _, gradients = jax.jit(cases.value_and_gradients(case))(given)
    cases.check_value(replace(case, state=None), {k: v for k, v in given.items() if k != "state"}, y, None)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("act", ["silu", "tanh"])
def test_low_precision(act):
    """silu is fused; tanh is a callable, which gets z rounded to the output's dtype: 2^-8 of z's size more."""
    case = replace(BY_NAME["batch_norm"], options={"activation": jnp.tanh if act == "tanh" else act}, residual=True, act=act)
    given = cases.inputs(case, dtype="bfloat16")
    y, _, gradients = jax.jit(cases.value_and_gradients(case))(given)
    want, _ = cases.oracle(case, given)
    wider = lambda b: b if act == "silu" else oracles.Bounded(b.value, b.size * 2**-8 / (24 * 2**-23))  # noqa: E731
    assert y.dtype == gradients["x"].dtype == gradients["residual"].dtype == jnp.bfloat16
    oracles.assert_close(y, wider(want.y), 24)
    oracles.assert_close(gradients["residual"], wider(want.dresidual), 24)


def test_a_callable_may_close_over_traced_values():
    """PReLU: its slope is a traced argument, and gets its gradient."""
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)

    def loss(slope):
        prelu = lambda z: jnp.where(z > 0, z, slope * z)  # noqa: E731
        return jnp.vdot(cases.call(case, given, activation=prelu)[0], given["dy"])

    z = cases.oracle(case, given)[0].y
    want = (np.minimum(z.value, 0) * given["dy"]).sum()
    got = jax.jit(jax.grad(loss))(np.float32(0.1))
    oracles.assert_close(got, oracles.Bounded(want, (z.size * abs(given["dy"])).sum()), given["x"].size)


def test_a_residual_without_activation_is_added():
    case = BY_NAME["batch_norm_residual"]
    given = cases.inputs(case)
    y, _ = cases.call(case, given)
    alone, _ = cases.call(case, {k: v for k, v in given.items() if k != "residual"})
    np.testing.assert_allclose(y, alone + given["residual"], rtol=0, atol=2**-22 * abs(np.asarray(y)).max())


def test_second_order_through_an_activation(x64):
    case = replace(BY_NAME["batch_norm"], options={"activation": "gelu"}, act="gelu", residual=True)
    given = cases.inputs(case, 0, "float64", (2, 2, 1, 6), None, "float64")
    inner, rest = cases.split(case, given)
    tangent = {k: v for k, v in cases.inputs(case, 1, "float64", (2, 2, 1, 6), None, "float64").items() if k in inner}

    def hvp(norm):
        loss = lambda inner: jnp.sum(norm(inner | rest) ** 2 * given["dy"])  # noqa: E731
        return jax.jit(lambda inner: jax.jvp(jax.grad(loss), (inner,), (tangent,))[1])(inner)

    ours, theirs = hvp(lambda g: cases.call(case, g)[0]), hvp(functools.partial(plain.norm, case))
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-10 * max(abs(np.asarray(two)).max(), 1))


def test_evaluation_takes_activation_and_residual():
    given = cases.inputs(BY_NAME["batch_norm_evaluate_silu"])
    options = {"use_running_average": True, "activation": "silu", "residual": given["residual"]}
    y, state = jnorm.batch_norm(given["x"], given["state"], given["scale"], given["bias"], **options)
    cases.check_value(BY_NAME["batch_norm_evaluate_silu"], given, y, state)
