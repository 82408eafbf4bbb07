"""bf16, f16, f32, f64 and complex: what y is, what the statistics are, and that nothing is rounded before it is reduced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jnorm
import oracles
from cases import BY_NAME, FAMILY, PLAIN, replace
from pairwise import checkerboard

LOW = ["bfloat16", "float16"]


def name_of(case):
    return case.name


MORE = ["batch_norm_relu_residual", "layer_norm_mask", "group_norm_gelu", "add_layer_norm", "add_rms_norm"]
SOME = [*PLAIN, *(BY_NAME[name] for name in MORE), *FAMILY]


@pytest.mark.parametrize(("case", "dtype"), checkerboard(SOME, LOW), ids=lambda v: v if isinstance(v, str) else v.name)
def test_low_precision(case, dtype):
    """y and dx are float32 answers rounded once; scale and bias are float32, and so are their gradients."""
    given = cases.inputs(case, dtype=dtype)
    y, state, gradients = jax.jit(cases.value_and_gradients(case))(given)
    assert y.dtype == dtype
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "rms_norm", "group_norm"])
def test_low_precision_parameters(name):
    """bf16 scale and bias: gradients of their dtype, the state float32 all the same."""
    case = BY_NAME[name]
    given = cases.inputs(case, dtype="bfloat16", parameters="bfloat16")
    y, state, gradients = jax.jit(cases.value_and_gradients(case))(given)
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("case", [*PLAIN, *FAMILY], ids=name_of)
def test_float64(case, x64):
    """Statistics are float64 (a float32 step would be wrong by 1e7 tolerances); the state stays float32."""
    given = cases.inputs(case, dtype="float64", parameters="float64")
    y, state, gradients = jax.jit(cases.value_and_gradients(case))(given)
    assert y.dtype == "float64"
    cases.check_value(case, given, y, state, statistics="float64")
    cases.check_gradients(case, given, gradients, statistics="float64")


@pytest.mark.parametrize("case", PLAIN, ids=name_of)
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_dtype_of_y(case, dtype, out):
    given = cases.inputs(case, dtype=dtype)
    y, state = jax.jit(functools.partial(cases.call, case, dtype=jnp.dtype(out)))(given)
    assert y.dtype == out
    cases.check_value(case, given, y, state)


@pytest.mark.parametrize("case", PLAIN, ids=name_of)
def test_numpy_and_jax_inputs_are_alike(case):
    given = cases.inputs(case)
    one = cases.call(case, given)
    two = cases.call(case, jax.tree.map(jnp.asarray, given))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert isinstance(one[0], jax.Array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_statistics_are_float32(dtype):
    x = cases.inputs(BY_NAME["batch_norm"], dtype=dtype)["x"]
    assert {a.dtype for a in jnorm.moments(x, (0, 1, 2))} == {np.dtype("float32")}


def test_statistics_of_float64(x64):
    assert {a.dtype for a in jnorm.moments(np.ones((3, 2)), 0)} == {np.dtype("float64")}


@pytest.mark.parametrize("dtype", LOW)
def test_nothing_is_rounded_before_it_is_reduced(dtype):
    """One large and many small: sums in the input's precision lose the small ones."""
    x = np.full((1025, 1), 1, dtype)
    x[0] = 1024
    stats = jnorm.moments(x, 0)
    want = oracles.moments(x, oracles.sets(x.shape, {1: 1}))
    oracles.assert_close(stats.var, oracles.Bounded(want.var, want.var), 1025)


def test_batch_norm_state():
    state = jnorm.batch_norm_state(3)
    assert list(state) == ["mean", "var"]
    np.testing.assert_array_equal(state["mean"], np.zeros(3, np.float32))
    np.testing.assert_array_equal(state["var"], np.ones(3, np.float32))
    counted = jnorm.batch_norm_state((2, 3), track_count=True)
    assert {k: (v.shape, v.dtype) for k, v in counted.items()} == {
        "mean": ((2, 3), "float32"),
        "var": ((2, 3), "float32"),
        "count": ((), "float32"),
    }
    assert counted["count"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_state_of_any_dtype_keeps_it(dtype):
    """A state the user made in another dtype comes back in it."""
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)
    given["state"] = {k: v.astype(dtype) for k, v in given["state"].items()}
    _, state = cases.call(case, given)
    assert {v.dtype for v in state.values()} == {np.dtype(dtype)}


# --- complex ----------------------------------------------------------------------------------------------------------------


def complex_inputs(case, seed=0, dtype="complex64"):
    one, two = cases.inputs(case, seed), cases.inputs(case, seed + 100)
    kind = lambda k: (one[k] * 2 + 1j * two[k] - 3j).astype(dtype)  # noqa: E731
    state = {k: v for k, v in one["state"].items()} | {"mean": (one["state"]["mean"] + 1j * two["state"]["mean"]).astype("complex64")}
    return one | {k: kind(k) for k in ("x", "dy", "residual") if k in one} | {"state": state}


COMPLEX = [BY_NAME[n] for n in ("batch_norm", "batch_norm_mask", "batch_norm_residual", "batch_norm_counted", "batch_norm_evaluate")]


@pytest.mark.parametrize("case", COMPLEX, ids=name_of)
def test_complex(case):
    """Variance of re plus variance of im; scale, bias and var real."""
    given = complex_inputs(case)
    y, state, gradients = jax.jit(cases.value_and_gradients(case))(given)
    assert (y.dtype, state["mean"].dtype, state["var"].dtype) == ("complex64", "complex64", "float32")
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


def test_complex128(x64):
    given = complex_inputs(BY_NAME["batch_norm"], dtype="complex128")
    y, _, gradients = jax.jit(cases.value_and_gradients(BY_NAME["batch_norm"]))(given)
    assert y.dtype == "complex128"
    want, _ = cases.oracle(BY_NAME["batch_norm"], given)
    oracles.assert_close(y, want.y, 24, "float64")
    oracles.assert_close(gradients["x"], want.dx, 24, "float64")


def test_complex_state():
    state = jnorm.batch_norm_state(4, dtype=jnp.complex64)
    assert {k: v.dtype for k, v in state.items()} == {"mean": "complex64", "var": "float32"}


def test_complex_x_with_a_real_state():
    given = complex_inputs(BY_NAME["batch_norm"])
    with pytest.raises((TypeError, ValueError), match="(?s)(?=.*state)(?=.*complex)"):
        cases.call(BY_NAME["batch_norm"], given | {"state": jnorm.batch_norm_state(6)})


@pytest.mark.parametrize("case", PLAIN[1:], ids=name_of)
def test_complex_x_elsewhere(case):
    given = cases.inputs(case)
    with pytest.raises((TypeError, ValueError), match="(?s)(?=.*x)(?=.*complex)"):
        cases.call(case, given | {"x": given["x"].astype(np.complex64)})


def test_complex_over_a_named_axis():
    case = BY_NAME["batch_norm"]
    given = complex_inputs(case)
    run = jax.vmap(lambda x: cases.call(case, given | {"x": x}, axis_name="i"), 0, (0, None), axis_name="i")
    y, state = jax.jit(run)(given["x"][:, None])
    cases.check_value(case, given, y[:, 0], state)


def test_python_scalar_options_do_not_promote():
    """Under strict promotion and rank promotion "raise", which conftest sets: weak scalars everywhere."""
    case = replace(BY_NAME["batch_norm_relu_residual"], options={"activation": "relu", "momentum": np.float32(0.5), "epsilon": 1e-5})
    given = cases.inputs(case, dtype="bfloat16")
    cases.check_value(case, given, *cases.call(case, given))
