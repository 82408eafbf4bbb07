"""First derivatives against NumPy, forward against reverse mode, second order against plain jnp in float64, and what is kept."""

import functools
import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import cases
import jnorm
import oracles
import plain
from cases import BY_NAME, CASES, FAMILY, PLAIN
from pairwise import every_other

SMALL = (2, 3, 1, 6)


def name_of(case):
    return case.name


def fitted(mask, shape):
    """The mask's shape for another shape of x."""
    return [n if m > 1 else 1 for m, n in zip(mask, shape[len(shape) - len(mask) :], strict=True)]


def on(case, seed=0):
    """A smaller copy in float64: second-order tests hold one row per element of x."""
    rows = {"batch_norm_matrix": (4, 5)}.get(case.name, (2, 6))
    shape = {"group_norm_channels_first": (2, 6, 1, 2)}.get(case.name, rows if len(case.shape) == 2 else SMALL)
    mask = None if case.mask is None else cases.mask_of(fitted(case.mask, shape), np.random.default_rng(7))
    return cases.inputs(case, seed, "float64", shape, mask, "float64")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradients(case):
    given = cases.inputs(case)
    _, _, gradients = jax.jit(cases.value_and_gradients(case))(given)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "tracked_instance_norm_mask"])
@pytest.mark.parametrize("counted", [[0, 0, 0, 0], [1, 0, 1, 1]])
def test_gradients_where_nothing_is_counted(name, counted):
    case = BY_NAME[name]
    given = cases.inputs(case, mask=np.array(counted, np.int32).reshape(4, 1, 1, 1))
    _, _, gradients = jax.jit(cases.value_and_gradients(case))(given)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("case", PLAIN, ids=name_of)
def test_gradients_with_non_finite_values_under_the_mask(case, rng):
    """They are finite; where the loss does not look at those values, they are what any finite value there gives."""
    given = cases.inputs(case, mask=cases.mask_of(cases.SHAPE, rng))
    given["dy"] = given["dy"] * given["mask"]
    bad = given | {"x": np.where(given["mask"], given["x"], np.float32(np.inf))}
    _, _, gradients = jax.jit(cases.value_and_gradients(case))(bad)
    assert all(np.isfinite(g).all() for g in gradients.values())
    dx = np.where(given["mask"], gradients["x"], cases.oracle(case, given)[0].dx.value)
    cases.check_gradients(case, given, gradients | {"x": dx.astype(np.float32)})


@pytest.mark.parametrize("case", [c if c in FAMILY else p for c, p in zip(CASES, every_other(CASES), strict=True)], ids=name_of)
def test_forward_mode_is_dual_to_reverse_mode(case, x64, unoptimized):
    """In float64 <dy, J·v> is the same whichever mode makes it, and the oracle's."""
    given, tangents = on(case), on(case, seed=1)
    inner, rest = cases.split(case, given)
    v = {k: tangents[k] for k in inner}

    @jax.jit
    def both(inner, v):
        f = lambda inner: cases.call(case, inner | rest)[0]  # noqa: E731
        return jnp.vdot(jax.jvp(f, (inner,), (v,))[1], given["dy"]), jax.vjp(f, inner)[1](given["dy"])[0]

    forward, gradients = both(inner, v)
    cases.check_gradients(case, given, gradients, statistics="float64")
    want = cases.oracle(case, given)[0]
    exact = sum((want.d(k).value * v[k]).sum() for k in inner)
    size, lost = (sum((getattr(want.d(k), part) * abs(v[k])).sum() for k in inner) for part in ("size", "lost"))
    oracles.assert_close(forward, oracles.Told.of((exact, size), lost), given["x"].size, "float64", what=case.name)


def close(got, want, what, times=1.0):
    """float64: 1e-10 of the largest entry is 1e6 roundings; a wrong term shows at order one."""
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=times * 1e-10 * max(np.abs(two).max(), 1), err_msg=what)


def loss_of_xhat(case, given):
    """x̂ told from y has the roundings of scale·x̂ + bias, over scale."""
    scale, bias = (given.get(k, np.full(1, float(k == "scale"))) for k in ("scale", "bias"))
    return 1 + float((abs(bias) / abs(scale)).max()) if case.output else 1.0


OUTER = {"jacfwd of jacrev": jax.jacfwd, "jacrev of jacrev": jax.jacrev}
SECOND = [(case, list(OUTER)[i % 2]) for i, case in enumerate(CASES)]  # every case once, and the plain norms both ways
SECOND += [(case, mode) for case in PLAIN for mode in OUTER if (case, mode) not in SECOND]
QUICK = [*FAMILY[::2], *PLAIN, *(c for c in CASES[::4] if not c.own)]  # the others take some minutes together
SECOND = [pair if pair[0] in QUICK and i < len(CASES) else pytest.param(*pair, marks=pytest.mark.slow) for i, pair in enumerate(SECOND)]


@pytest.mark.parametrize(("case", "mode"), SECOND, ids=lambda v: v if isinstance(v, str) else v.name)
def test_second_order(case, mode, x64, unoptimized):
    """The Hessian of Σ y²·dy, a loss with second derivatives of its own, in all arguments together."""
    given = on(case)
    inner, rest = cases.split(case, given)
    loss = lambda norm: lambda inner: jnp.sum(norm(inner | rest) ** 2 * given["dy"])  # noqa: E731
    ours = jax.jit(lambda inner: OUTER[mode](jax.jacrev(loss(lambda g: cases.call(case, g)[0])))(inner))(inner)
    theirs = jax.jit(lambda inner: jax.jacfwd(jax.jacrev(loss(functools.partial(plain.norm, case))))(inner))(inner)
    close(ours, theirs, case.name, loss_of_xhat(case, given))


NUMERICAL = ["batch_norm_relu_residual", "add_layer_norm", "layer_norm_mask", "rms_norm", "group_norm", "tracked_instance_norm_mask"]


@pytest.mark.parametrize("name", [*NUMERICAL[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NUMERICAL[2:])])
def test_numerical_gradients_to_second_order(name, x64, unoptimized):
    case = BY_NAME[name]
    inner, rest = cases.split(case, on(case))
    jax.test_util.check_grads(jax.jit(lambda inner: cases.call(case, inner | rest)[0]), (inner,), order=2, atol=1e-4, rtol=1e-4)


UPDATING = [c for c in CASES if c.state and not c.evaluate]
for name in ("batch_norm_evaluate", "tracked_instance_norm_evaluate"):
    options = {"use_running_average": True, "update_running": True}
    UPDATING.append(cases.replace(BY_NAME[name], name=f"{name}_updating", options=options))


def floats_of(state):
    """Without what counts in integers."""
    return {k: v for k, v in state.items() if jnp.issubdtype(v.dtype, jnp.inexact)}


@pytest.mark.parametrize("case", UPDATING, ids=name_of)
def test_no_gradient_through_the_state(case):
    """Neither into what comes out, nor from it to what went in."""
    given = cases.inputs(case)
    floats = {k: given[k] for k in case.differentiable} | {"state": floats_of(given["state"])}

    def total(floats):
        _, state = cases.call(case, given | floats | {"state": given["state"] | floats["state"]})
        return sum(jnp.sum(v) for v in floats_of(state).values())

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(floats)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


KEPT_SHAPE = (6, 8, 8, 12)


def kept_inputs(case, dtype):
    """Large enough that rows and channels are much fewer than elements."""
    shape = {"group_norm_channels_first": (6, 12, 8, 8)}.get(case.name, {2: (96, 42), 4: KEPT_SHAPE}[len(case.shape)])
    mask = None if case.mask is None else np.ones(fitted(case.mask, shape), bool)
    return cases.inputs(case, 0, dtype, shape, mask)


KEPT = [(c, "float32") for c in CASES if c.keeps_x_alone]
KEPT = [(c, "bfloat16") for c in PLAIN[::2]] + [pair if pair[0] in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in KEPT]
KEPT += [pytest.param(c, "bfloat16", marks=pytest.mark.slow) for c in CASES if c.keeps_x_alone and c not in PLAIN[::2]]


@pytest.mark.parametrize(("case", "dtype"), KEPT, ids=lambda v: v if isinstance(v, str) else v.name)
def test_of_the_size_of_x_only_x_is_kept(case, dtype):
    """And the residual, where an activation follows it. A mask of x's size is an input too."""
    given = kept_inputs(case, dtype)
    inner, rest = cases.split(case, given)
    _, vjp = jax.vjp(lambda inner: cases.call(case, inner | rest)[0], inner)
    large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= given["x"].size and leaf.dtype != bool]
    wanted = 1 + (case.residual and case.act is not None)
    assert [(leaf.size, leaf.dtype) for leaf in large] == [(given["x"].size, given["x"].dtype)] * wanted
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp) if leaf.size < given["x"].size)
    arguments = sum(leaf.nbytes for leaf in jax.tree.leaves(given) if leaf.size < given["x"].size)
    # Per statistic, count or power, mean in two floats, and m2 or 1/s, all float32; group norm's are per channel. Beside them the
    # arguments, zero tangents of those that no gradient is taken of, and a few scalars in place of arguments that are not there.
    statistics = oracles.sets(given["x"].shape, dict.fromkeys(case.kept, 1)).max() + 1
    assert small <= 4 * 4 * statistics + 2 * arguments + 64


UNITS = [
    "batch_norm",
    "batch_norm_relu_residual",
    "batch_norm_mask",
    "tracked_instance_norm",
    "batch_norm_output_mask",
]
FUSED = [
    "layer_norm",
    "add_layer_norm",
    "add_rms_norm_leading",
    "rms_norm_mask",
    "group_norm",
    "group_norm_gelu",
    "group_norm_mask",
    "group_norm_matrix",
    "instance_norm",
    "instance_norm_leaky_relu",
    "layer_norm_output_mask",
    "group_norm_output",
]


def ops_of(f, *args):
    return re.findall(r"= (jnorm_\w+)", str(jax.make_jaxpr(f)(*args)))


@pytest.mark.parametrize(("name", "number"), [(n, 2) for n in UNITS] + [(n, 1) for n in FUSED])
def test_ops_each_way(name, number):
    """The unit has two; where nothing is merged over names, norms of samples and rows have one, the backward pass too."""
    case, given = BY_NAME[name], cases.inputs(BY_NAME[name])
    inner, rest = cases.split(case, given)
    assert len(ops_of(lambda inner: cases.call(case, inner | rest)[0], inner)) == number
    _, vjp = jax.vjp(lambda inner: cases.call(case, inner | rest)[0], inner)
    assert len(ops_of(vjp, given["dy"])) == number


@pytest.mark.parametrize("case", [c for c in PLAIN if c.norm not in ("layer_norm", "rms_norm")], ids=name_of)
def test_a_callable_activation_keeps_one_more(case):
    given = kept_inputs(case, "float32")
    inner, rest = cases.split(case, given)
    _, vjp = jax.vjp(lambda inner: cases.call(case, inner | rest, activation=jnp.sin)[0], inner)
    assert sum(leaf.size >= given["x"].size for leaf in jax.tree.leaves(vjp)) <= 2


def test_gradient_of_one_argument_alone(rng):
    """Constants cost nothing and break nothing."""
    case = BY_NAME["batch_norm_relu_residual"]
    given = cases.inputs(case)
    want = cases.oracle(case, given)[0]
    for name in case.differentiable:
        f = lambda v, name=name: jnp.vdot(cases.call(case, given | {name: v})[0], given["dy"])  # noqa: E731
        oracles.assert_close(jax.jit(jax.grad(f))(given[name]), want.d(name), 3 * 48, what=name)


def test_statistics_returned_by_normalize_carry_no_gradient():
    def variance(x):
        _, stats = jnorm.normalize(x, lambda s, aux: (s.offset, s.m2, 0 * s.m2), (), reduction_axes=(0, 1, 2), feature_axes=-1)
        return jnp.sum(stats.var)

    np.testing.assert_array_equal(jax.grad(variance)(cases.inputs(BY_NAME["batch_norm"])["x"]), 0)
