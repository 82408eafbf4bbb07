"""JAX's transformations: each gives what the plain call gives, slice by slice, and compiles once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jnorm
from cases import BY_NAME, FAMILY, PLAIN
from pairwise import checkerboard, every_other

MORE = ["batch_norm_relu_residual", "batch_norm_mask", "batch_norm_counted", "layer_norm_mask", "batch_norm_evaluate", "add_layer_norm"]
SOME = [*PLAIN, *(BY_NAME[name] for name in MORE), *FAMILY]


def name_of(case):
    return case.name


def stacked(case, *shape, keep=()):
    """Inputs with leading axes, different everywhere, but those in `keep`, which are given once."""
    many = [cases.inputs(case, seed) for seed in range(int(np.prod(shape)))]
    tree = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*shape, *np.shape(leaves[0])), *many)
    return {k: many[0][k] if k in keep else v for k, v in tree.items()}


def pick(given, index, keep=()):
    return {k: v if k in keep else jax.tree.map(lambda a: a[index], v) for k, v in given.items()}


def check(case, given, y, state, gradients=None):
    cases.check_value(case, given, y, state)
    if gradients is not None:
        cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("case", every_other(SOME), ids=name_of)
def test_eager(case):
    """jit is what the other files test."""
    given = cases.inputs(case)
    check(case, given, *cases.value_and_gradients(case)(given))


KEPT_ONCE = {
    "batch_norm": ("scale", "bias", "state"),
    "batch_norm_mask": ("mask",),
    "layer_norm": ("x",),
    "group_norm": ("bias",),
    "batch_norm_evaluate": ("x", "scale"),
}


@pytest.mark.parametrize("case", SOME, ids=name_of)
def test_vmap(case):
    """Of value and gradients, some arguments batched and some not."""
    keep = KEPT_ONCE.get(case.name, ())
    given = stacked(case, 3, keep=keep)
    axes = {k: None if k in keep else 0 for k in given}
    out = jax.jit(jax.vmap(cases.value_and_gradients(case), (axes,)))(given)
    for i in range(3):
        check(case, pick(given, i, keep), *jax.tree.map(lambda a, i=i: a[i], out))


@pytest.mark.parametrize(
    "name", ["batch_norm_mask", "layer_norm", "rms_norm_mask", "add_rms_norm", "group_norm_gelu", "tracked_instance_norm"]
)
def test_nested_vmap(name):
    case = BY_NAME[name]
    given = stacked(case, 2, 2)
    out = jax.jit(jax.vmap(jax.vmap(cases.value_and_gradients(case))))(given)
    for index in np.ndindex(2, 2):
        check(case, pick(given, index), *jax.tree.map(lambda a, index=index: a[index], out))


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "group_norm", "instance_norm"])
@pytest.mark.parametrize("axis", [1, -1])
def test_vmap_over_any_axis(name, axis):
    case = BY_NAME[name]
    given = stacked(case, 3)
    moved = given | {"x": np.moveaxis(given["x"], 0, axis)}
    axes = {k: axis if k == "x" else 0 for k in given}
    y, states = jax.jit(jax.vmap(functools.partial(cases.call, case), (axes,), (axis, 0)))(moved)
    for i in range(3):
        cases.check_value(case, pick(given, i), np.moveaxis(y, axis, 0)[i], jax.tree.map(lambda a, i=i: a[i], states))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "group_norm", "instance_norm"])
def test_vmap_with_a_mask(name, batched, rng):
    case, shape = BY_NAME[name], (4, 1, 2, 1)
    given = stacked(case, 3) | {"mask": cases.mask_of((3, *shape) if batched else shape, rng)}
    keep = () if batched else ("mask",)
    axes = {k: None if k in keep else 0 for k in given}
    y, state, gradients = jax.jit(jax.vmap(cases.value_and_gradients(case), (axes,)))(given)
    for i in range(3):
        check(case, pick(given, i, keep), *jax.tree.map(lambda a, i=i: a[i], (y, state, gradients)))


def test_vmap_over_momentum():
    case, momenta = BY_NAME["batch_norm"], np.array([0.0, 0.3, 1.0], np.float32)
    given = cases.inputs(case)
    _, states = jax.jit(jax.vmap(lambda m: cases.call(case, given, momentum=m)))(momenta)
    moments = cases.oracle(case, given)[0].moments
    for i, momentum in enumerate(momenta):
        want = cases.updated(case, given, moments, momentum=momentum)
        cases.check_state(case, given, jax.tree.map(lambda a, i=i: a[i], states), want, 24)


@pytest.mark.parametrize("name", [c.name for c in SOME if c.state] + ["batch_norm_cumulative"])
def test_state_is_a_scan_carry(name):
    case, steps = BY_NAME[name], 3
    given = stacked(case, steps, keep=("scale", "bias", "state"))
    once = {k: given[k] for k in ("scale", "bias") if k in given}
    each = {k: v for k, v in given.items() if k not in (*once, "state")}

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda state, g: cases.call(case, g | once | {"state": state})[::-1], state, each)

    final, ys = run(given["state"])
    state = given["state"]
    for i in range(steps):
        now = pick(each, i) | once | {"state": state}
        state = cases.oracle_state(case, now)
        cases.check_value(case, now, ys[i], state)
    cases.check_state(case, given, final, state, 3 * 24)


@pytest.mark.parametrize("case", PLAIN, ids=name_of)
def test_remat(case):
    """Recomputation updates no statistics twice (there is no hidden state), and gives the same gradients."""
    given = cases.inputs(case)
    inner, rest = cases.split(case, given)
    f = jax.checkpoint(lambda inner: cases.call(case, inner | rest))

    def run(inner):
        y, vjp, state = jax.vjp(f, inner, has_aux=True)
        return y, state, vjp(given["dy"])[0]

    check(case, given, *jax.jit(run)(inner))


@pytest.mark.parametrize("case", SOME, ids=name_of)
def test_eval_shape(case):
    given = cases.inputs(case)
    y, state = jax.eval_shape(functools.partial(cases.call, case), given)
    assert (y.shape, y.dtype) == (given["x"].shape, given["x"].dtype)
    if case.state:
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in given["state"].items()}


# Each with running statistics, and each of the family, takes ten seconds or more.
LEAKS = [
    c if c.name in ("batch_norm", "layer_norm", "group_norm", "add_layer_norm") else pytest.param(c, marks=pytest.mark.slow) for c in SOME
]


@pytest.mark.parametrize("case", LEAKS, ids=name_of)
def test_no_tracer_leaks(case):
    given = cases.inputs(case)
    with jax.checking_leaks():
        jax.jit(lambda given: cases.value_and_gradients(case)(given))(given)


@pytest.mark.parametrize(("case", "how"), checkerboard(SOME, ["jit", "eager"]), ids=lambda v: v if isinstance(v, str) else v.name)
def test_new_values_compile_nothing(case, how, compilations):
    """A second step, values, cotangents, masks and states all new. Eagerly too: no closure may be a compilation key."""
    run = cases.value_and_gradients(case)
    run = jax.jit(run) if how == "jit" else run
    first, second = (jax.tree.map(jnp.asarray, cases.inputs(case, seed)) for seed in range(2))
    jax.block_until_ready(run(first))
    with compilations() as count:
        jax.block_until_ready(run(second))
    assert count() == 0


def test_a_fresh_map_compiles_nothing(compilations):
    """`normalize` with a new closure each call, as a norm written inline has it."""
    x = jnp.asarray(cases.inputs(BY_NAME["batch_norm"])["x"])

    def run(x, factor):
        def map(stats, aux):
            return stats.offset, jax.lax.rsqrt(stats.var + 1e-5) * aux, 0 * aux

        return jax.grad(lambda x: jnp.sum(jnp.sin(jnorm.normalize(x, map, factor, reduction_axes=(0, 1, 2), feature_axes=-1)[0])))(x)

    factors = [jnp.asarray(np.full(6, v, np.float32)) for v in (1, 2)]
    run(x, factors[0])
    with compilations() as count:
        run(x, factors[1])
    assert count() == 0


@pytest.mark.parametrize("momentum", [0.25, -0.5, 1.5])
def test_traced_momentum(momentum, compilations):
    """Clipped to [0, 1]; a schedule compiles once."""
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)
    run = jax.jit(lambda m: cases.call(case, given, momentum=m)[1])
    run(np.float32(0.5))
    with compilations() as count:
        state = run(np.float32(momentum))
    assert count() == 0
    want = cases.updated(case, given, cases.oracle(case, given)[0].moments, momentum=momentum)
    cases.check_state(case, given, state, want, 24)


def test_linearize_and_transpose_of_a_linearized_call():
    case = BY_NAME["group_norm"]
    given = cases.inputs(case)
    inner, rest = cases.split(case, given)
    _, f = jax.linearize(lambda inner: cases.call(case, inner | rest)[0], inner)
    (gradients,) = jax.linear_transpose(f, inner)(given["dy"])
    cases.check_gradients(case, given, gradients)
