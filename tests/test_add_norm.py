"""Norms of x + residual: both results and their cotangents together, dtypes of both, and that it is what adding first gives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import oracles
import plain
from cases import BY_NAME, replace
from pairwise import checkerboard
from refusals import X, refuses

ADDING = [c for c in cases.CASES if c.adds]
PLAIN = [BY_NAME["add_layer_norm"], BY_NAME["add_rms_norm"]]
each_case = pytest.mark.parametrize("case", ADDING, ids=lambda c: c.name)
each_norm = pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
KINDS = ["float32", "bfloat16", "float16"]
WIDER = {("bfloat16", "float16"): "float32", ("float16", "bfloat16"): "float32"}


def inputs(case, x="float32", residual="float32", seed=0, **options):
    """As cases.inputs, with a residual of a dtype of its own, and a cotangent of the sum."""
    given = cases.inputs(case, seed, x, **options)
    given["residual"] = given["residual"].astype(residual)
    given["dsum"] = np.random.default_rng(seed + 50).normal(size=given["x"].shape).astype(sum_dtype(x, residual))
    return given


def sum_dtype(x, residual):
    return WIDER.get((x, residual), max(x, residual, key=lambda name: jnp.finfo(name).bits))


def both(case, given, **options):
    """-> (y, x + residual)"""
    given = {k: v for k, v in given.items() if k not in ("dy", "dsum")}
    return getattr(jnorm, case.norm)(**given, **{**case.options, **options})


def results(case, **options):
    """A function of `inputs` -> (y, sum), {argument: gradient}"""

    def run(given):
        inner, rest = cases.split(case, given)
        out, vjp = jax.vjp(lambda inner: both(case, inner | rest, **options), inner)
        return out, vjp((given["dy"], given["dsum"]))[0]

    return run


def wanted(case, given):
    """The oracle's answer on the rounded sum; what x and the residual get has the sum's cotangent in it."""
    kind = sum_dtype(given["x"].dtype.name, given["residual"].dtype.name)
    total = given["x"].astype(kind) + given["residual"].astype(kind)
    answer, _ = cases.oracle(replace(case, norm=case.norm.removeprefix("add_")), {**given, "x": total, "residual": None})
    extra = oracles.wide(given["dsum"])
    dx = oracles.Bounded(answer.dx.value + extra, answer.dx.size + abs(extra))
    return total, answer._replace(dx=dx, dresidual=dx)


def check(case, given, out, gradients, statistics="float32", fused=True):
    (y, total), (want_total, want) = out, wanted(case, given)
    np.testing.assert_array_equal(total, want_total)
    assert total.dtype == want_total.dtype
    n, parameters = cases.lengths(case, given)
    oracles.assert_close(y, want.y, n, statistics, what="y")
    for name, got in gradients.items():
        assert got.dtype == given[name].dtype, name
        # As in cases.check_gradients; dx and the residual's are rounded once more, to the sum's dtype, where that is not their own.
        length = 3 * n + 32 + (0 if name in ("x", "residual") else 3 * parameters + 32)
        bounded = want.d(name)
        if name in ("x", "residual") and not fused:
            # What comes from y is rounded before the sum's cotangent is added: half an eps of it, in units that the tolerance multiplies.
            part = abs(bounded.value - oracles.wide(given["dsum"])) * float(jnp.finfo(got.dtype).eps) / 2
            bounded = bounded._replace(size=bounded.size + part / float(jnp.finfo(statistics).eps) / (length + 16))
        oracles.assert_close(got, bounded, length, statistics, roundings=2, what=f"d{name}")


# --- values and gradients of both ---------------------------------------------------------------------------------------------


@each_case
def test_both_results_and_their_gradients(case):
    given = inputs(case)
    check(case, given, *jax.jit(results(case))(given))


@each_norm
@pytest.mark.parametrize(("x", "residual"), [(a, b) for a in KINDS for b in KINDS if (a, b) != ("float32", "float32")])
def test_dtypes(case, x, residual):
    """Of every width on either side, under strict promotion: the sum is of the wider dtype, y and every gradient of its own."""
    given = inputs(case, x, residual)
    out, gradients = jax.jit(results(case))(given)
    assert out[0].dtype == x
    check(case, given, out, gradients)


@each_norm
def test_float64(case, x64):
    given = inputs(case, "float32", "float64", parameters="float64")
    out, gradients = jax.jit(results(case, dtype=jnp.float64))(given | {"dy": given["dy"].astype("float64")})
    check(case, given, out, gradients, "float64")


@each_norm
@pytest.mark.parametrize("dtype", KINDS)
def test_it_is_addition_and_then_the_norm(case, dtype):
    """Bitwise, also where the compiler could have kept more digits of the sum than its dtype has."""
    given = inputs(case, dtype, dtype)
    y, total = jax.jit(functools.partial(both, case, dtype=jnp.float32))(given)
    alone = {k: given[k] for k in case.affine}
    norm = getattr(jnorm, case.norm.removeprefix("add_"))
    np.testing.assert_array_equal(total, given["x"] + given["residual"])
    np.testing.assert_array_equal(y, jax.jit(lambda h: norm(h, **alone, dtype=jnp.float32))(total))


@pytest.mark.parametrize(
    ("case", "outer"), checkerboard(PLAIN, [jax.jacfwd, jax.jacrev]), ids=lambda v: getattr(v, "__name__", None) or v.name
)
def test_second_order(case, outer, x64):
    """A loss of both results with second derivatives of its own; float64: 1e-10 of the largest entry is 1e6 roundings."""
    shape = (2, 3, 1, 6)
    given = cases.inputs(case, 0, "float64", shape, None, "float64")
    inner, rest = cases.split(case, given)

    def loss(norm):
        def value(inner):
            y, total = norm(inner | rest)
            return jnp.sum(y**2 * given["dy"] + jnp.sin(total) * y + total**3)

        return value

    def theirs(given):
        return plain.norm(case, given), given["x"] + given["residual"]

    ours = jax.jit(outer(jax.jacrev(loss(functools.partial(both, case)))))(inner)
    want = jax.jit(jax.jacfwd(jax.jacrev(loss(theirs))))(inner)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-10 * max(np.abs(two).max(), 1))


@each_case
def test_forward_mode_is_dual_to_reverse_mode(case, x64):
    given, other = (inputs(case, "float64", "float64", seed, parameters="float64") for seed in (0, 1))
    inner, rest = cases.split(case, given)
    v = {k: other[k] for k in inner}
    f = lambda inner: both(case, inner | rest)  # noqa: E731
    _, (dy, dsum) = jax.jit(lambda inner, v: jax.jvp(f, (inner,), (v,)))(inner, v)
    _, gradients = jax.jit(results(case))(given)
    np.testing.assert_array_equal(dsum, v["x"] + v["residual"])
    one = jnp.vdot(dy, given["dy"]) + jnp.vdot(dsum, given["dsum"])
    two = sum(jnp.vdot(gradients[k], v[k]) for k in inner)
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12 * given["x"].size)  # 1e3 roundings of each of the terms of size 1


@each_norm
def test_only_one_result_is_used(case):
    given = inputs(case)
    for unused in ("dy", "dsum"):
        part = given | {unused: np.zeros_like(given[unused])}
        index = 1 if unused == "dy" else 0
        inner, rest = cases.split(case, given)
        _, vjp = jax.vjp(lambda inner, i=index, rest=rest: both(case, inner | rest)[i], inner)
        check(case, part, both(case, given), jax.jit(vjp)(given["dsum" if index else "dy"])[0])


@each_norm
def test_huge_rows(case):
    """The sum's cotangent passes by what is scaled."""
    given = inputs(case)
    given["x"] = given["x"] * np.float32(1e30)
    check(case, given, *jax.jit(results(case))(given))


# --- what it costs ------------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_op_each_way_and_the_sum_alone_is_kept(case, dtype):
    given = inputs(replace(case, mask=None), dtype, dtype, shape=(6, 8, 8, 12))
    inner, rest = cases.split(case, given)
    _, vjp = jax.vjp(lambda inner: both(case, inner | rest), inner)
    text = str(jax.make_jaxpr(vjp)((given["dy"], given["dsum"])))
    assert re.findall(r"= (jnorm_\w+)", text) == ["jnorm_row_cotangent"]
    size = given["x"].size
    assert not re.search(r":\w+\[6,8,8,12\] = (?!jnorm)", text), "an addition of the size of x of its own"
    large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= size]
    assert [(leaf.size, leaf.dtype) for leaf in large] == [(size, given["x"].dtype)]


# --- transformations and devices ------------------------------------------------------------------------------------------------


@each_norm
def test_vmap(case):
    many = [inputs(case, seed=seed) for seed in range(3)]
    stacked = {k: np.stack([g[k] for g in many]) for k in many[0]} | {"residual": many[0]["residual"]}
    axes = {k: None if k == "residual" else 0 for k in stacked}
    out, gradients = jax.jit(jax.vmap(results(case), (axes,)))(stacked)
    for i, given in enumerate(many):
        given = given | {"residual": many[0]["residual"]}
        check(case, given, *jax.tree.map(lambda a, i=i: a[i], (out, gradients)))


@each_norm
@pytest.mark.parametrize("spec", [P("d"), P(None, None, None, "d")], ids=["batch", "features"])
def test_jit_over_sharded_arrays(case, spec):
    case = replace(case, shape=(8, 3, 2, 16))
    given = inputs(case)
    mesh, split = distributed.mesh_of(), ("x", "residual", "dy", "dsum")
    placed = {k: jax.device_put(v, NamedSharding(mesh, spec if k in split else P())) for k, v in given.items()}
    out, gradients = jax.jit(results(case))(placed)
    check(case, given, out, gradients)
    assert {a.sharding.spec for a in (*out, gradients["x"], gradients["residual"])} == {spec}


@each_norm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_features_over_named_devices(case, dtype, check_vma):
    """The sum that is normalized is the rounded one there too."""
    case = replace(case, shape=(4, 16), kept={0: 1}, features=(1,))
    given = inputs(case, dtype, dtype)
    specs = {k: P("d") if v.ndim == 1 else P(None, "d") for k, v in given.items()}
    run = jax.shard_map(
        results(case, axis_name="d"),
        mesh=distributed.mesh_of(),
        in_specs=(specs,),
        out_specs=((P(None, "d"),) * 2, {k: specs[k] for k in case.differentiable}),
        check_vma=check_vma,
    )
    check(case, given, *jax.jit(run)(given), fused=False)


# --- the modules ----------------------------------------------------------------------------------------------------------------

NAMES = pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])


def of_api(api, name, features=6, **options):
    """A function of (x, residual or nothing) with scales that are not ones."""
    if api == "nnx":
        return getattr(jnx, name)(features, **options, scale_init=nnx.initializers.constant(1.5), rngs=nnx.Rngs(0))
    module = getattr(jnn, name)(**options, scale_init=nnx.initializers.constant(1.5))
    return lambda *args: module.init_with_output(jax.random.key(0), *args)[0]


@pytest.mark.parametrize("api", ["linen", "nnx"])
@NAMES
def test_a_module_is_the_one_of_the_sum(name, api):
    """Bitwise, with the other's variables: a checkpoint goes from one to the other."""
    given = inputs(PLAIN[0])
    x, residual = (jnp.asarray(given[k]) for k in ("x", "residual"))
    y, total = of_api(api, f"Add{name}")(x, residual)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(y, of_api(api, name)(x + residual))


@pytest.mark.parametrize("api", ["linen", "nnx"])
@NAMES
@pytest.mark.parametrize(
    ("x", "residual", "dtype", "y", "total"),
    [
        ("bfloat16", "bfloat16", None, "float32", "bfloat16"),
        ("bfloat16", "float32", "bfloat16", "bfloat16", "float32"),
        ("float32", "float32", "float64", "float64", "float32"),
        ("int32", "float32", None, "float32", "float32"),
        ("int32", "int32", "bfloat16", "bfloat16", "float32"),
    ],
)
def test_dtypes_of_a_module(name, api, x, residual, dtype, y, total, x64):
    """y's by Flax's rule for x, scale and bias; the sum's by what is added."""
    given = inputs(PLAIN[0])
    out = of_api(api, f"Add{name}", dtype=dtype)(jnp.asarray(given["x"].astype(x)), jnp.asarray(given["residual"].astype(residual)))
    assert tuple(a.dtype for a in out) == (y, total)


def test_a_module_says_where_it_refuses():
    for name in ("AddLayerNorm", "AddRMSNorm"):
        with refuses(f"{name}: ", "residual", "(4, 6)", "(4, 3, 2, 6)"):
            getattr(jnn, name)().init(jax.random.key(0), X, X[:, 0, 0])
        with refuses(f"{name}(num_features=6): ", "residual", "(4, 6)", "(4, 3, 2, 6)"):
            getattr(jnx, name)(6, rngs=nnx.Rngs(0))(X, X[:, 0, 0])
