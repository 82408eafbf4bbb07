"""save="output": gradients from y, which is kept in place of x. The table of cases.py has it too, for what holds of every norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
from cases import BY_NAME, PLAIN, keeping_y
from native_fuzz import native
from pairwise import checkerboard
from refusals import NORMS, X, refuses

each_form = pytest.mark.parametrize("form", [pytest.param("native", marks=native), "xla"])
KEEPING = [keeping_y(c) for c in PLAIN]
ACTIVE = [c.norm for c in PLAIN if "activation" in jnorm.__dict__[c.norm].__kwdefaults__]
LEAKY = [keeping_y(c, activation="leaky_relu") if c.norm in ACTIVE else keeping_y(c) for c in PLAIN]
each_norm = pytest.mark.parametrize("case", KEEPING, ids=lambda c: c.name)
each_leaky = pytest.mark.parametrize("case", LEAKY, ids=lambda c: c.name)


def of_input(case):
    return cases.replace(case, options={k: v for k, v in case.options.items() if k != "save"})


def run(case, given, **options):
    return jax.jit(cases.value_and_gradients(case, **options))(given)


def check(case, given, y, state, gradients):
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


# --- values and gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@each_leaky
def test_y_is_the_same_and_gradients_are_right(case, dtype):
    given = cases.inputs(case, dtype=dtype)
    y, state, gradients = run(case, given)
    check(case, given, y, state, gradients)
    same = jax.jit(functools.partial(cases.call, of_input(case)))(given)
    jax.tree.map(np.testing.assert_array_equal, (y, state), same)


@pytest.mark.parametrize("norm", ACTIVE)
def test_a_callable_is_applied_after(norm):
    case = cases.replace(keeping_y(BY_NAME[norm], activation=jnp.tanh), act="tanh")
    given = cases.inputs(case)
    check(case, given, *run(case, given))


@pytest.mark.parametrize("case", LEAKY[:4], ids=lambda c: c.name)
def test_forward_mode_and_second_derivatives_are_as_ever(case, x64):
    """A Hessian times a vector, in float64: 1e-10 of the largest is 1e6 roundings, those of y divided by scale."""
    given, tangents = (cases.inputs(case, seed, "float64", parameters="float64") for seed in (0, 1))
    inner, rest = cases.split(case, given)
    v = {k: tangents[k] for k in inner}

    def both(case):
        f = lambda inner: cases.call(case, inner | rest)[0]  # noqa: E731
        loss = lambda inner: jnp.sum(f(inner) ** 2 * given["dy"])  # noqa: E731
        return jax.jvp(f, (inner,), (v,)), jax.jvp(jax.grad(loss), (inner,), (v,))

    one, two = (jax.jit(functools.partial(both, c))() for c in (case, of_input(case)))
    times = 1 + abs(given.get("bias", np.zeros(1))).max() / abs(given["scale"]).min()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=times * 1e-10 * abs(np.asarray(b)).max())


# --- the floor of scale -----------------------------------------------------------------------------------------------------------

SMALL = np.array([0.0, -0.0, 1e-5, -1e-5, -(2.0**-10), 0.5], np.float32)
FLOORED = np.array([1, 1, 1, -1, -1, 512], np.float32) / 1024


@each_leaky
def test_a_scale_near_zero_is_taken_to_be_further_off(case):
    """In y, which is that of the other scale to the bit; and the gradients are those there, that of scale itself too."""
    given = cases.inputs(case) | {"scale": SMALL}
    there = given | {"scale": FLOORED}
    out = run(case, given)
    check(case, given, *out)
    jax.tree.map(np.testing.assert_array_equal, out, run(case, there))
    y = jax.jit(lambda given: cases.call(of_input(case), given)[0])(there)
    np.testing.assert_array_equal(out[0], y)
    assert (np.asarray(out[2]["scale"]) != 0).all()


# --- under transformations, and over devices -----------------------------------------------------------------------------------------

SOME = pytest.mark.parametrize(
    "name", ["batch_norm_output_mask", "layer_norm_output_mask", "group_norm_output", "instance_norm_output_mask"]
)


@SOME
def test_vmap_and_remat(name):
    case = BY_NAME[name]
    many = [cases.inputs(case, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *many)
    out = jax.jit(jax.vmap(cases.value_and_gradients(case, through=jax.checkpoint(cases.call, static_argnums=0))))(stacked)
    for i, given in enumerate(many):
        check(case, given, *jax.tree.map(lambda a, i=i: a[i], out))


@pytest.mark.parametrize("mode", distributed.MODES)
def test_synchronized_batch_norm(mode, rng):
    case = cases.replace(BY_NAME["batch_norm_output_mask"], shape=(16, 3, 2, 6))
    given = cases.inputs(case, mask=distributed.uneven(rng))
    check(case, given, *distributed.MODES[mode](cases.value_and_gradients(case, axis_name="d"), given))


@pytest.mark.parametrize("name", ["group_norm_output", "instance_norm_output_mask", "tracked_instance_norm"])
def test_positions_over_devices(name):
    case = cases.replace(keeping_y(BY_NAME[name], activation="leaky_relu"), shape=(2, 16, 2, 6), mask=None)
    given = cases.inputs(case)
    check(case, given, *distributed.by_shard_map(cases.value_and_gradients(case, axis_name="d"), given, spec=P(None, "d")))


@SOME
def test_over_a_mesh(name):
    case = cases.replace(BY_NAME[name], shape=(16, 3, 2, 6), mask=None)
    given = cases.inputs(case)
    check(case, given, *distributed.by_auto_mesh(cases.value_and_gradients(case), given))


# --- what is kept ---------------------------------------------------------------------------------------------------------------------


def large_residuals(case, given, **options):
    """-> y, and what of its size is kept."""
    inner, rest = cases.split(case, given)
    y, vjp = jax.vjp(lambda inner: cases.call(case, inner | rest, **options)[0], inner)
    return y, [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= y.size and leaf.dtype != bool]


@each_leaky
@each_form
def test_y_is_kept_and_not_x(form, case):
    case = cases.replace(case, shape=(6, 8, 8, 12))
    given = cases.inputs(case)
    with jnorm.kernels(form):
        y, [kept] = large_residuals(case, given)
        _, [x] = large_residuals(of_input(case), given)
    assert kept.dtype == y.dtype
    np.testing.assert_array_equal(kept.reshape(y.shape), y)
    np.testing.assert_array_equal(x.reshape(y.shape), given["x"])


def test_a_callable_keeps_one_more():
    """What it needs of its own input, here the cosine."""
    case = cases.replace(keeping_y(BY_NAME["batch_norm"], activation=jnp.sin), shape=(6, 8, 8, 12))
    given = cases.inputs(case)
    z, _ = cases.call(keeping_y(BY_NAME["batch_norm"]), given)
    kept = large_residuals(case, given)[1]
    assert len(kept) == 2
    assert sum(np.array_equal(a, z) for a in kept) == sum(np.array_equal(a, jnp.cos(z)) for a in kept) == 1


BATCH, WIDTH = 2048, 128
STACKED = {  # a norm of a matrix, and its y
    "batch_norm": lambda x, s, b, **save: jnorm.batch_norm(x, jnorm.batch_norm_state(WIDTH), s, b, activation="leaky_relu", **save)[0],
    "layer_norm": jnorm.layer_norm,
    "rms_norm": lambda x, s, b, **save: jnorm.rms_norm(x, s, **save),
}


def temporary(norm, depth, dtype):
    """Bytes of temporaries of a training step of so many blocks: a norm, and a product with a matrix in float32, with a row in bfloat16,
    as XLA multiplies matrices of that in float32 and keeps its own copies."""

    def loss(parameters, x):
        for scale, bias, weight in parameters:
            x = jnp.multiply(norm(x, scale, bias), weight) if len(weight) == 1 else norm(x, scale, bias) @ weight
        return jnp.sum(x.astype(jnp.float32) ** 2)

    vector = jax.ShapeDtypeStruct((WIDTH,), "float32")
    matrix = jax.ShapeDtypeStruct((WIDTH if dtype == "float32" else 1, WIDTH), dtype)
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), dtype)
    compiled = jax.jit(jax.grad(loss)).lower([(vector, vector, matrix)] * depth, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def added_by_a_block(name, save, dtype):
    """To the memory of a step, between 4 and 8 blocks, in sizes of x."""
    norm = functools.partial(STACKED[name], save=save)
    return (temporary(norm, 8, dtype) - temporary(norm, 4, dtype)) / 4 / (BATCH * WIDTH * np.dtype(dtype).itemsize)


@native
@pytest.mark.parametrize(("name", "dtype"), checkerboard(STACKED, ["float32", "bfloat16"]))
def test_a_block_of_a_deep_stack_takes_one_x_less(name, dtype):
    """The product keeps y anyway, so that it is y alone instead of x and y. What is small, weights and numbers by row, is in it too."""
    with jnorm.kernels("native"):
        one, two = (added_by_a_block(name, save, dtype) for save in ("output", "input"))
    assert 1 <= one <= 1.1 and 2 <= two <= 2.1, (one, two)


@pytest.mark.parametrize("name", [n if n == "batch_norm" else pytest.param(n, marks=pytest.mark.slow) for n in STACKED])
def test_a_block_takes_no_more_with_xla_s_code(name):
    """XLA decides what it keeps: of rows it takes as much either way."""
    with jnorm.kernels("xla"):
        assert added_by_a_block(name, "output", "float32") <= added_by_a_block(name, "input", "float32") + 0.05


# --- edges ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [[0, 0, 0, 0], [1, 0, 1, 1]])
@each_norm
def test_nothing_counted(case, counted):
    given = cases.inputs(case, mask=np.array(counted, np.int32).reshape(4, 1, 1, 1))
    y, state, gradients = run(case, given)
    check(case, given, y, state, gradients)
    for leaf in jax.tree.leaves((y, state, gradients)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@each_norm
def test_a_constant(case, epsilon):
    """Whatever is finite with save="input" is finite here: all, but for batch statistics with nothing to divide by."""
    case = cases.replace(case, options={**case.options, "epsilon": epsilon}, epsilon=epsilon)
    given = cases.inputs(case) | {"x": np.full(cases.SHAPE, 0 if case.about_zero else 3, np.float32)}
    ours, theirs = run(case, given), run(of_input(case), given)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(two))
    finite = all(np.isfinite(a).all() for a in jax.tree.leaves(ours))
    assert finite or (epsilon == 0 and case.state)
    if finite and epsilon:
        check(case, given, *ours)


def test_not_a_number_under_the_mask_has_the_derivative_of_any_other_element(rng):
    """y there is finite, and nothing in it tells that x was not."""
    for case in (keeping_y(BY_NAME["batch_norm"]), keeping_y(BY_NAME["layer_norm"])):
        given = cases.inputs(case, mask=cases.mask_of(cases.SHAPE, rng))
        bad = ~given["mask"] & (rng.uniform(size=cases.SHAPE) < 0.5)
        given["x"] = np.where(bad, rng.choice([np.nan, np.inf, -np.inf], size=cases.SHAPE).astype(np.float32), given["x"])
        y, state, gradients = run(case, given)
        check(case, given, y, state, gradients)
        assert bad.any() and (np.asarray(gradients["x"])[bad] != 0).all()


# --- refusals -------------------------------------------------------------------------------------------------------------------------

SAVING = pytest.mark.parametrize("name", [c.norm for c in PLAIN])


@SAVING
@pytest.mark.parametrize("save", ["both", None, True])
def test_neither_input_nor_output(name, save):
    with refuses("save", '"input"', '"output"', repr(save)):
        NORMS[name](X, save=save)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("name", ACTIVE)
def test_activations_that_x_cannot_be_told_from(name, activation):
    with refuses('save="output"', repr(activation), "leaky_relu", "callable"):
        NORMS[name](X, save="output", activation=activation)
    NORMS[name](X, save="input", activation=activation)


@SAVING
def test_unknown_activations_are_told_as_ever(name):
    if name in ACTIVE:
        with refuses("activation", "swishy", "relu"):
            NORMS[name](X, save="output", activation="swishy")


def test_a_residual():
    with refuses('save="output"', "residual"):
        NORMS["batch_norm"](X, save="output", residual=X)


def test_complex_x():
    with refuses('save="output"', "real x", kind=TypeError):
        jnorm.batch_norm(X.astype(np.complex64), jnorm.batch_norm_state(6, dtype=np.complex64), save="output")


@SAVING
def test_y_of_another_dtype(name):
    with refuses('save="output"', "dtype", "float32", "bfloat16"):
        NORMS[name](X, save="output", dtype=jnp.bfloat16)
    assert NORMS[name](X, save="output", dtype=jnp.float32).dtype == np.float32


ROWS = {
    "layer_norm": jnorm.layer_norm,
    "rms_norm": jnorm.rms_norm,
    "group_norm of one position": functools.partial(jnorm.group_norm, num_groups=3),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_over_devices(name):
    with refuses('save="output"', "rows", "axis_name", "'i'"):
        jax.vmap(lambda x: ROWS[name](x, save="output", axis_name="i"), axis_name="i")(X[:, 0, 0, None])


@pytest.mark.parametrize("norm", [jnorm.add_layer_norm, jnorm.add_rms_norm])
def test_the_norms_that_add_keep_the_sum(norm):
    with pytest.raises(TypeError, match="save"):
        norm(X, X, save="output")
