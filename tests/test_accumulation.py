"""A batch in micro-batches: two sweeps over them are the whole batch, to the rounding of the dtype; and statistics given to batch_norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core as jex
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import oracles
import plain
from cases import BY_NAME, replace
from refusals import refuses

SHAPE = (16, 3, 2, 6)
OF_UPDATE = ("momentum", "running_var_correction")
MASKS = {
    "none": lambda rng: None,
    "uneven": lambda rng: distributed.uneven(rng, SHAPE),  # one micro-batch of two rows counts nothing
    "element": lambda rng: cases.mask_of(SHAPE, rng),
    "nothing": lambda rng: np.zeros((16, 1, 1, 1), bool),
}


def two_sweeps(case, parts, cast=False, **across):
    """The function of `cases.inputs` that `cases.value_and_gradients` is, over so many micro-batches: statistics, then y and gradients.

    `cast`: what devices share is cast before the loop, as the guide has it."""
    reduced = tuple(i for i in range(len(case.shape)) if i not in case.features)
    options = {k: v for k, v in case.options.items() if k not in OF_UPDATE}
    of_update = {k: v for k, v in case.options.items() if k in OF_UPDATE}

    def run(given):
        inner, rest = cases.split(case, given)

        def norm(inner):
            a = inner | rest
            batches = {k: a[k].reshape(parts, -1, *a[k].shape[1:]) for k in ("x", "mask", "residual") if k in a}
            stats = jnorm.accumulated_moments(lambda b: (b["x"], b.get("mask")), batches, reduced, **across)

            shared = stats, {k: a[k] for k in case.affine}
            shared_stats, affine = jax.lax.pcast(shared, "d", to="varying") if cast else shared

            def one(b):
                return jnorm.batch_norm(state=a["state"], statistics=shared_stats, update_running=False, **b, **affine, **options)[0]

            y = jax.lax.map(jax.checkpoint(one), batches)
            return y.reshape(a["x"].shape), jnorm.update_running(a["state"], stats, **of_update)

        y, vjp, state = jax.vjp(norm, inner, has_aux=True)
        return y, state, vjp(given["dy"])[0]

    return run


def whole(name, mask, dtype="float32"):
    case = replace(BY_NAME[name], shape=SHAPE)
    mask = MASKS[mask](np.random.default_rng(0))
    return case, cases.inputs(case, dtype=dtype, mask=np.ones((16, 1, 1, 1), bool) if mask is None and case.mask else mask)


def check(case, given, y, state, gradients):
    cases.check_value(case, given, y, state)
    if given["x"].dtype == np.float32:
        return cases.check_gradients(case, given, gradients)
    # dx is the sum of what comes directly and what comes through the statistics, each of x's dtype, as JAX adds cotangents up.
    want, length = cases.oracle(case, given)[0], 3 * sum(cases.lengths(case, given)) + 64
    half = 0.5 * float(jnp.finfo(given["x"].dtype).eps)
    for name, got in gradients.items():
        wanted = oracles.Told.of(want.d(name), half * want.d(name).size) if name == "x" else want.d(name)
        assert got.dtype == given[name].dtype
        oracles.assert_close(got, wanted, length, what=f"{case.name}: d{name}")


ONE_NORM = [
    ("batch_norm", "uneven", 8, "float32"),
    ("batch_norm", "nothing", 2, "float32"),
    ("batch_norm", "uneven", 4, "bfloat16"),
    ("batch_norm_relu_residual", "element", 8, "float32"),
    ("batch_norm_relu_residual", "none", 4, "float16"),
    ("batch_norm_counted", "none", 1, "float32"),
    ("batch_norm_mask", "uneven", 16, "float32"),
    ("batch_norm_two_features", "uneven", 2, "float32"),
    ("batch_norm_output_mask", "uneven", 8, "float32"),
]


@pytest.mark.parametrize(("name", "mask", "parts", "dtype"), ONE_NORM)
def test_two_sweeps_are_one_batch(name, mask, parts, dtype):
    case, given = whole(name, mask, dtype)
    check(case, given, *jax.jit(two_sweeps(case, parts))(given))


OPTIONS = [c.name for c in cases.CASES if c.norm == "batch_norm" and not c.evaluate and len(c.shape) == 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mask", "parts"), [(name, mask, (1, 4, 16)[(i + k) % 3]) for i, name in enumerate(OPTIONS) for k, mask in enumerate(MASKS)]
)
def test_two_sweeps_of_every_option(name, mask, parts):
    case, given = whole(name, mask)
    check(case, given, *jax.jit(two_sweeps(case, parts))(given))


@pytest.mark.parametrize("mode", distributed.MODES)
def test_two_sweeps_over_devices(mode):
    """Eight devices of two micro-batches; one device counts nothing."""
    case, given = whole("batch_norm", "uneven")
    check(case, given, *distributed.MODES[mode](two_sweeps(case, 2, axis_name="d"), given))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*distributed.MODES, "auto"])
@pytest.mark.parametrize(
    ("name", "mask"), [("batch_norm_relu_residual", "element"), ("batch_norm_counted", "none"), ("batch_norm", "nothing")]
)
def test_two_sweeps_of_options_over_devices(name, mask, mode):
    case, given = whole(name, mask)
    if mode == "auto":
        check(case, given, *distributed.by_auto_mesh(two_sweeps(case, 2), given))
    else:
        check(case, given, *distributed.MODES[mode](two_sweeps(case, 2, axis_name="d"), given))


def test_two_sweeps_over_sharded_arrays():
    case, given = whole("batch_norm", "uneven")
    check(case, given, *distributed.by_auto_mesh(two_sweeps(case, 2), given))


def test_two_sweeps_under_vmap():
    """Three models side by side."""
    case = replace(BY_NAME["batch_norm"], shape=SHAPE)
    many = [cases.inputs(case, seed) for seed in range(3)]
    out = jax.jit(jax.vmap(two_sweeps(case, 4)))(jax.tree.map(lambda *leaves: np.stack(leaves), *many))
    for i, given in enumerate(many):
        check(case, given, *jax.tree.map(lambda a, i=i: a[i], out))


def test_second_order(x64):
    """A Hessian times a vector, in x, scale and bias together; 1e-10 of the largest is 1e6 roundings."""
    case = replace(BY_NAME["batch_norm"], shape=(6, 2, 1, 3))
    given, other = (cases.inputs(case, seed, "float64", parameters="float64") for seed in range(2))
    inner, rest = cases.split(case, given)
    tangent = {k: other[k] for k in inner}

    def product(norm):
        def loss(inner):
            return jnp.sum(norm(inner | rest) ** 2 * given["dy"])

        return jax.jit(lambda: jax.jvp(jax.grad(loss), (inner,), (tangent,))[1])()

    got, want = product(lambda g: two_sweeps(case, 3)(g)[0]), product(functools.partial(plain.norm, case))
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=0, atol=1e-10 * abs(np.asarray(want[key])).max())


# --- networks: one sweep for each norm, and one for the gradients ----------------------------------------------------------------

WIDTH = 4


def network(norms, rng):
    layers = [
        {k: rng.normal(size=(WIDTH, WIDTH) if k == "w" else WIDTH) / (2 if k == "w" else 1) for k in ("w", "scale", "bias")}
        for _ in range(norms)
    ]
    states = [{"mean": rng.normal(size=WIDTH), "var": rng.uniform(1, 2, WIDTH)} for _ in range(norms)]
    return {"layers": layers, "last": rng.normal(size=(WIDTH, 2))}, states


def forward(params, states, stats, x):
    """The output; with fewer statistics than norms, the input of the norm whose are missing."""
    for i, layer in enumerate(params["layers"]):
        x = x @ layer["w"]
        if i == len(stats):
            return x
        options = {"statistics": stats[i], "update_running": False, "activation": "silu"}
        x = jnorm.batch_norm(x, states[i], layer["scale"], layer["bias"], **options)[0]
    return x @ params["last"]


def by_sweeps(params, states, batches, number, **across):
    """The loss of this device's micro-batches, of `number` rows on all devices, and the states; L + 1 sweeps."""
    stats = []
    for _ in states:
        f = lambda b, known=tuple(stats): (forward(params, states, known, b["x"]), b["mask"])  # noqa: E731
        stats.append(jnorm.accumulated_moments(f, batches, 0, **across))

    @jax.checkpoint
    def loss(b):
        y = forward(params, states, stats, b["x"])
        return jnp.where(b["mask"], (y - b["target"]) ** 2, 0).sum()

    return jax.lax.map(loss, batches).sum() / number, [jnorm.update_running(*both) for both in zip(states, stats, strict=True)]


def of_one_batch(params, states, x, target):
    """The same in plain jnp on the rows that count."""
    new = []
    for layer, state in zip(params["layers"], states, strict=True):
        x = x @ layer["w"]
        mean, var = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        new.append({"mean": 0.99 * state["mean"] + 0.01 * mean[0], "var": 0.99 * state["var"] + 0.01 * var[0]})
        x = jax.nn.silu((x - mean) / jnp.sqrt(var + 1e-5) * layer["scale"][None] + layer["bias"][None])
    return ((x @ params["last"] - target) ** 2).sum() / len(x), new


def rows(rng, sizes, depth):
    """Micro-batches of `depth` rows of which so many count, and the rows that do."""
    x, target = rng.normal(size=(len(sizes), depth, WIDTH)) * 2 + 3, rng.normal(size=(len(sizes), depth, 2))
    mask = np.arange(depth) < np.array(sizes)[:, None]
    return {"x": np.where(mask[..., None], x, 1e3), "target": target, "mask": mask[..., None]}, x[mask], target[mask]


def check_tree(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(abs(np.asarray(b)).max(), 1))


def answer_of(params, states, x, target):
    return jax.jit(jax.value_and_grad(of_one_batch, argnums=(0, 2), has_aux=True))(params, states, x, target)


@pytest.mark.parametrize("norms", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_networks(norms, rng, x64):
    """In float64: the loss, the states, and the gradients of all parameters and of x."""
    params, states = network(norms, rng)
    sizes = (5, 2, 0, 4)
    batches, x, target = rows(rng, sizes, 5)
    run = jax.value_and_grad(lambda p, x: by_sweeps(p, states, batches | {"x": x}, sum(sizes)), argnums=(0, 1), has_aux=True)
    (loss, new), (dparams, dx) = jax.jit(run)(params, batches["x"])
    (want, want_new), (want_dparams, want_dx) = answer_of(params, states, x, target)
    check_tree((loss, new, dparams), (want, want_new, want_dparams))
    check_tree(dx[batches["mask"][..., 0]], want_dx)
    assert not np.any(np.asarray(dx)[~batches["mask"][..., 0]])


@pytest.mark.parametrize("check_vma", [True, False])
def test_networks_over_devices(check_vma, rng, x64):
    """Two norms, on eight devices of two micro-batches: what count differs, and one device has nothing."""
    params, states = network(2, rng)
    sizes = (2, 1, 0, 0, 2, 2, 1, 0, 0, 1, 2, 2, 1, 1, 2, 2)
    batches, x, target = rows(rng, sizes, 2)

    def local(params, batches):
        run = jax.value_and_grad(lambda p: by_sweeps(p, states, batches, sum(sizes), axis_name="d"), has_aux=True)
        (loss, new), gradient = run(params)
        return jax.lax.psum(loss, "d"), new, gradient if check_vma else jax.lax.psum(gradient, "d")

    run = jax.shard_map(local, mesh=distributed.mesh_of(), in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma)
    (want, want_new), (want_dparams, _) = answer_of(params, states, x, target)
    check_tree(jax.jit(run)(params, batches), (want, want_new, want_dparams))


def test_memory_is_that_of_one_micro_batch(rng):
    """Four times as many: temporaries grow by statistics, some dozen numbers per feature and micro-batch, and not by x or what comes of it,
    which has 256 of them."""
    depth, width = 256, 32
    layers = [{"w": jnp.ones((width, width)), "scale": jnp.ones(width), "bias": jnp.ones(width)}]
    params, states = {"layers": layers, "last": jnp.ones((width, 2))}, [jnorm.batch_norm_state(width)]

    def temporary(number):
        of = lambda *shape, dtype="float32": jax.ShapeDtypeStruct((number, depth, *shape), dtype)  # noqa: E731
        batches = {"x": of(width), "target": of(2), "mask": of(1, dtype="bool")}
        step = jax.grad(lambda p, b: by_sweeps(p, states, b, number * depth)[0])
        return jax.jit(step).lower(params, batches).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(4), temporary(16)
    assert (many - few) / 12 <= 32 * width * 4, (few, many)
    assert few < 24 * depth * width * 4, few


def executed(jaxpr, times=1):
    """How many collectives and products of matrices run: those in the body of a scan as often as it does."""
    found = {"gather": 0, "sum": 0, "product": 0}
    for eqn in jaxpr.eqns:
        for sub in jex.jaxprs_in_params(eqn.params):
            for kind, n in executed(sub, times * eqn.params.get("length", 1)).items():
                found[kind] += n
        name = eqn.primitive.name
        found["gather"] += times * name.startswith("all_gather")
        found["sum"] += times * name.startswith("psum")
        found["product"] += times * (name == "dot_general")
    return found


@pytest.mark.parametrize("norms", [1, 3])
def test_what_sweeps_cost(norms, rng):
    """2 (L + 2) / 3 times the products of matrices of one large batch, forward and backward, gradients of x included."""
    params, states = jax.tree.map(np.float32, network(norms, rng))
    batches, x, target = (jax.tree.map(lambda a: a if a.dtype == bool else np.float32(a), v) for v in rows(rng, (4, 4, 4), 4))
    sweeps = jax.grad(lambda p, x: by_sweeps(p, states, batches | {"x": x}, 12)[0], argnums=(0, 1))
    once = jax.grad(lambda p, x: of_one_batch(p, states, x, target)[0], argnums=(0, 1))
    many = executed(jax.make_jaxpr(sweeps)(params, batches["x"]).jaxpr)["product"]
    few = executed(jax.make_jaxpr(once)(params, x).jaxpr)["product"]
    assert many / len(batches["x"]) == few * 2 * (norms + 2) / 3


@pytest.mark.parametrize(("check_vma", "cast"), [(True, True), (True, False), (False, False)])
def test_collectives(check_vma, cast):
    """One merge, whatever the number of micro-batches, and one sum for it. What JAX sums by itself, scale, bias and statistics, it sums
    where they are used: in the loop, but for a cast, after which it is once for each array."""
    case, given = whole("batch_norm", "uneven")
    given = {k: np.concatenate([v, v]) if np.shape(v)[:1] == (16,) else v for k, v in given.items()}
    out = (P("d"), P(), {"x": P("d")} | dict.fromkeys(("scale", "bias"), P() if check_vma else P("d")))
    specs = {"mesh": distributed.mesh_of(), "in_specs": (distributed.specs(given, P("d")),), "out_specs": out, "check_vma": check_vma}
    counts = []
    for parts in (2, 4):
        local = two_sweeps(replace(case, shape=(4, 3, 2, 6)), parts, cast, axis_name="d")
        count = executed(jax.make_jaxpr(jax.shard_map(local, **specs))(given).jaxpr)
        counts.append((count["gather"], count["sum"]))
    in_the_loop = [(1, 2), (1, 4)]
    assert counts == (in_the_loop if check_vma and not cast else [(1, 4 if cast else 1)] * 2)


# --- statistics that are given ----------------------------------------------------------------------------------------------------

CASE = BY_NAME["batch_norm"]
GIVEN = cases.inputs(CASE)
AXES = (0, 1, 2)


def normalized(statistics, x=GIVEN["x"], state=GIVEN["state"], **options):
    return jnorm.batch_norm(x, state, GIVEN["scale"], GIVEN["bias"], statistics=statistics, **options)


def test_the_derivative_in_the_statistics(x64):
    """Against the formula, in float64: the mean as two numbers, the variance as m2 / count."""
    x = GIVEN["x"][0, 0].astype(np.float64)
    stats = jnorm.Stats(*(jnp.asarray(a) for a in (np.full(6, 7.0), np.full(6, 2.0), np.full(6, 0.25), np.arange(8.0, 14))))

    def formula(s):
        per_feature = s.center + s.offset, s.m2 / s.count, GIVEN["scale"].astype(float), GIVEN["bias"].astype(float)
        mean, var, scale, bias = (a[None] for a in per_feature)
        return jnp.sin((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias).sum()

    ours = lambda s: jnp.sin(normalized(s, x, jax.tree.map(np.float64, GIVEN["state"]))[0]).sum()  # noqa: E731
    both = lambda f: jax.jit(lambda s: (jax.grad(f)(s), jax.hessian(f)(s)))(stats)  # noqa: E731
    for a, b in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(formula)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_the_state_moves_by_them(rng):
    stats = jnorm.moments(rng.normal(size=(50, 6)).astype(np.float32) * 3, 0)
    y, state = normalized(stats, momentum=0.5, running_var_correction=1)
    want = jnorm.update_running(GIVEN["state"], stats, momentum=0.5, running_var_correction=1)
    jax.tree.map(np.testing.assert_array_equal, state, want)
    var = np.asarray(stats.m2, np.float64) / 49
    np.testing.assert_allclose(state["var"], 0.5 * GIVEN["state"]["var"] + 0.5 * var, rtol=1e-6)
    np.testing.assert_allclose(state["mean"], 0.5 * GIVEN["state"]["mean"] + 0.5 * np.asarray(stats.mean), rtol=1e-6)
    same, kept = normalized(stats, update_running=False)
    assert kept is GIVEN["state"]
    np.testing.assert_array_equal(same, y)


def test_update_running_with_a_count_and_of_what_was_not_counted():
    state = jnorm.batch_norm_state(2, track_count=True)
    one, two = (jnorm.moments(np.float32([[a, 7], [a + 2, 7]]), 0, mask=np.array([True, m])) for a, m in ((1, True), (4, False)))
    state = jnorm.update_running(jnorm.update_running(state, one, momentum=None), two, momentum=None)
    assert {k: np.asarray(v).tolist() for k, v in state.items()} == {"mean": [3.5, 7], "var": [1, 0], "count": 2}


def test_what_was_not_counted_is_normalized_with_the_running_statistics():
    """To the bit as in evaluation, whatever stands in the statistics there."""
    stats = jnorm.Stats(*jnp.zeros((4, 6)))._replace(center=jnp.full(6, jnp.nan))
    y, state = normalized(stats)
    np.testing.assert_array_equal(
        y, jnorm.batch_norm(GIVEN["x"], GIVEN["state"], GIVEN["scale"], GIVEN["bias"], use_running_average=True)[0]
    )
    jax.tree.map(np.testing.assert_array_equal, state, GIVEN["state"])
    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(lambda s: normalized(s)[0].sum()))(stats))


def test_one_example_alone():
    stats = jnorm.moments(GIVEN["x"], AXES)
    one = jax.vmap(lambda x: normalized(stats, x, update_running=False)[0])(GIVEN["x"].reshape(-1, 6))
    np.testing.assert_array_equal(one.reshape(CASE.shape), normalized(stats)[0])


def test_large_means_and_what_stands_under_the_mask(rng):
    """A spread of 1 around 1e4, by micro-batches whose means are 3 apart; what is not a number is read as the mean."""
    x = (1e4 + rng.normal(size=(4, 8, 2, 6)) + 3 * np.arange(4).reshape(4, 1, 1, 1)).astype(np.float32)
    mask = np.arange(8).reshape(1, 8, 1, 1) < np.array([8, 3, 0, 5]).reshape(4, 1, 1, 1)
    bad = np.where(mask, x, np.float32(np.nan))
    stats = jnorm.accumulated_moments(lambda b: b, (bad, mask), (0, 1))
    wide = np.broadcast_to(x.astype(np.float64), x.shape)[np.broadcast_to(mask, x.shape)].reshape(-1, 6)
    # Sums of 32 values with a spread below 4.
    np.testing.assert_allclose(stats.var, wide.var(0), rtol=64 * 2.0**-23)
    state = jnorm.batch_norm_state(6)
    y = jnorm.batch_norm(bad, state, statistics=stats, mask=mask)[0]
    want = (x - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(np.where(mask, y, 0), np.where(mask, want, 0), atol=4 * 64 * 2.0**-23)
    np.testing.assert_allclose(np.where(mask, 0, y), 0, atol=64 * 2.0**-23)
    gradients = jax.jit(jax.grad(lambda x: (jnorm.batch_norm(x, state, statistics=stats, mask=mask)[0] ** 2).sum()))(bad)
    assert np.isfinite(gradients).all()


def test_an_axis_name_merges_nothing():
    """They are merged: no collective forward, and backward only that of what merged them."""
    stats = jnorm.moments(GIVEN["x"], AXES)
    f = lambda x: normalized(stats, x, axis_name="d")[0]  # noqa: E731
    x = GIVEN["x"][None]
    assert executed(jax.make_jaxpr(f, axis_env=[("d", 1)])(x[0]).jaxpr) == {"gather": 0, "sum": 0, "product": 0}
    np.testing.assert_array_equal(jax.vmap(f, axis_name="d")(x)[0], normalized(stats)[0])


def test_they_are_not_taken():
    """The program has no reduction of x."""
    stats = jnorm.moments(GIVEN["x"], AXES)
    assert "moments" in str(jax.make_jaxpr(lambda x: normalized(None, x)[0])(GIVEN["x"]))
    assert "moments" not in str(jax.make_jaxpr(lambda x: normalized(stats, x)[0])(GIVEN["x"]))


def test_a_state_that_collects():
    population = {**GIVEN["state"], "values": np.zeros(6, np.float32)}
    stats = jnorm.moments(GIVEN["x"], AXES)
    for state in (normalized(stats, state=population)[1], jnorm.update_running(population, stats)):
        np.testing.assert_array_equal(state["values"], stats.count)
        np.testing.assert_allclose(state["var"], stats.var, rtol=1e-6)


# --- modules ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["batch_norm_relu_residual", "batch_norm_two_features"])
def test_modules(name, api, rng):
    """To the bit what the function gives; the axis of the constructor needs not be bound."""
    case = BY_NAME[name]
    given = cases.inputs(case)
    shape = (9, *(n if i in case.features else 1 for i, n in enumerate(case.shape) if i))
    more = rng.normal(size=shape).astype(np.float32)
    stats = jax.tree.map(lambda a: a.reshape(case.feature_shape), jnorm.moments(more, tuple(i for i in range(4) if i not in case.features)))
    rest = {k: given[k] for k in ("residual",) if k in given}
    want = cases.call(case, given, statistics=stats)
    if api == "linen":
        module, variables = cases.linen_module(case, given, axis_name="batch")
        y, updates = module.apply(variables, given["x"], statistics=stats, **rest, mutable=["batch_stats"])
        state = updates["batch_stats"]
    else:
        module = cases.nnx_module(case, given, axis_name="batch")
        y = module(given["x"], statistics=stats, **rest)
        state = {k: getattr(module, k)[...].reshape(np.shape(v)) for k, v in given["state"].items()}
    jax.tree.map(np.testing.assert_array_equal, (y, dict(state)), want)


def test_linen_initializes_with_statistics():
    """Also one example alone."""
    stats, layer = jnorm.moments(GIVEN["x"], AXES), jnn.BatchNorm(use_running_average=False)
    for x in (GIVEN["x"], GIVEN["x"][0, 0, 0]):
        y, variables = layer.init_with_output(jax.random.key(0), x, statistics=stats)
        assert np.asarray(variables["batch_stats"]["mean"]).tolist() == [0] * 6
        np.testing.assert_array_equal(y, jnorm.batch_norm(x, variables["batch_stats"], np.ones(6), np.zeros(6), statistics=stats)[0])


# --- refused ----------------------------------------------------------------------------------------------------------------------


def test_refused_statistics():
    stats = jnorm.moments(GIVEN["x"], AXES)
    with refuses("use_running_average=True", "give one", "update_running"):
        normalized(stats, use_running_average=True)
    with refuses("shape of x's feature axes (6,)", "(2, 6)", "micro-batches"):
        normalized(jax.tree.map(lambda a: jnp.stack([a, a]), stats))
    with refuses("jnorm.Stats", "got tuple", kind=TypeError):
        normalized(tuple(stats))
    with refuses("of one shape", "()"):
        normalized(stats._replace(count=jnp.float32(3)))
    with refuses("floating", "int32", kind=TypeError):
        normalized(stats._replace(count=jnp.ones(6, jnp.int32)))
    with refuses("real x", kind=TypeError):
        jnorm.batch_norm(GIVEN["x"].astype(np.complex64), jnorm.batch_norm_state(6, dtype=np.complex64), statistics=stats)
    with refuses("BatchNorm", "use_running_average=True"):
        jnx.BatchNorm(6, use_running_average=True, rngs=nnx.Rngs(0))(GIVEN["x"], statistics=stats)


def test_refused_updates():
    stats = jnorm.moments(GIVEN["x"], AXES)
    with refuses("jnorm.Stats", "ndarray", kind=TypeError):
        jnorm.update_running(GIVEN["state"], GIVEN["x"])
    with refuses("(6,)", "state['mean']", "(5,)"):
        jnorm.update_running(jnorm.batch_norm_state(5), stats)
    with refuses("'mean', 'var'", "'std'"):
        jnorm.update_running(jnorm.batch_renorm_state(6), stats)
    with refuses("momentum", "2"):
        jnorm.update_running(GIVEN["state"], stats, momentum=2)
    with refuses("needs a count"):
        jnorm.update_running(GIVEN["state"], stats, momentum=None)


def test_refused_batches():
    take = functools.partial(jnorm.accumulated_moments, lambda b: b)
    with refuses("no micro-batches", "(0, 4, 6)"):
        take(np.ones((0, 4, 6), np.float32), 0)
    with refuses("leading axis", "(3, 4)", "(2, 4)"):
        take((np.ones((3, 4), np.float32), np.ones((2, 4), bool)), 0)
    with refuses("leading axis", "()"):
        take(np.float32(1), 0)
    with refuses("'d' is not bound"):
        take(np.ones((2, 4, 6), np.float32), 0, axis_name="d")
    with refuses("reduction_axes=2", "2 axes"):
        take(np.ones((2, 4, 6), np.float32), 2)
    for wrong in (lambda b: [b], lambda b: (b,), lambda b: (b, {"mean": b}), lambda b: (b, None, b), lambda b: None):
        with pytest.raises(TypeError, match="f must return x, or"):
            jnorm.accumulated_moments(wrong, np.ones((2, 4, 6), np.float32), 0)
