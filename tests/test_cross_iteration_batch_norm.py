"""Cross-iteration batch normalization: the definition, over several iterations and layers; numbers; the window; devices; refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import oracles
from cases import BY_NAME, replace
from distributed import MODES
from refusals import refuses

CASE, GROUPS, EXACT = (BY_NAME[f"cross_iteration_batch_norm{end}"] for end in ("", "_groups_mask", "_exact_silu"))


def conv(inputs, kernel, strides=(1, 1), groups=1, layout="NHWC"):
    numbers = (layout, "HWIO", layout)
    return lax.conv_general_dilated(inputs, kernel, strides, "SAME", dimension_numbers=numbers, feature_group_count=groups)


LAYERS = {  # linear_op, shape of the inputs, of the kernel, options
    "dense": (jnp.matmul, (6, 5), (5, 4), {}),
    "strided, grouped": (functools.partial(conv, strides=(2, 1), groups=2), (2, 4, 3, 4), (3, 2, 2, 6), {"num_groups": 2}),
    "depthwise": (functools.partial(conv, groups=3), (2, 3, 3, 3), (2, 2, 1, 3), {"num_groups": 3}),
    "channels first": (functools.partial(conv, layout="NCHW"), (2, 3, 4, 3), (2, 2, 3, 4), {"feature_axes": 1}),
}


def iterations(layer, number, rng, step=0.3):
    """Inputs and kernels of each iteration, and the cotangents of y."""
    op, of_inputs, of_kernel, options = LAYERS[layer]
    kernel, all_of_them = rng.normal(size=of_kernel), []
    for _ in range(number):
        kernel = kernel + step * rng.normal(size=of_kernel)
        inputs = rng.normal(size=of_inputs) + 0.5
        all_of_them.append({"inputs": inputs, "kernel": kernel, "dy": rng.normal(size=jax.eval_shape(op, inputs, kernel).shape)})
    return jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *all_of_them)


def at(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def ours(layer, many, window, exact=False, **options):
    """y, dx and the state after each iteration: the state is the carry of a scan."""
    op, _, of_kernel, fixed = LAYERS[layer]
    made = {"window": window, "exact_second_moment": exact, "num_groups": fixed.get("num_groups", 1), "dtype": many["kernel"].dtype}
    state = jnorm.cross_iteration_batch_norm_state(of_kernel, **made)

    def step(state, now):
        given = {"inputs": now["inputs"], "kernel": now["kernel"], "linear_op": op, "epsilon": 1e-3}
        f = lambda x: jnorm.cross_iteration_batch_norm(x, state, **given, **fixed, **options)  # noqa: E731
        y, vjp, state_after = jax.vjp(f, op(now["inputs"], now["kernel"]), has_aux=True)
        return state_after, (y, vjp(now["dy"])[0])

    final, (y, dx) = jax.jit(lambda state, many: lax.scan(step, state, many))(state, many)
    return y, dx, final


def published(layer, many, window, rule="max", compensation=1.0):
    """y and dx after the last iteration, by the definition: E[x] and E[x²], and their derivatives by the kernel from JAX."""
    op, _, _, options = LAYERS[layer]
    number = len(many["kernel"])
    axis = options.get("feature_axes", -1)
    now = at(many, -1)

    def moments(x):
        rows = jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        return jnp.stack([rows.mean(0), (rows**2).mean(0)])

    def moved(i):
        before = at(many, i)
        change = compensation * (now["kernel"] - before["kernel"])
        value, slope = jax.jvp(lambda w: moments(op(before["inputs"], w)), (before["kernel"],), (change,))
        return value + slope

    earlier = [moved(i) for i in range(max(number - window, 0), number - 1)]

    def y_of(x):
        mean, square = jnp.stack([*earlier, moments(x)], 1)
        valid = ((square >= mean**2) | (rule == "max")).astype(square.dtype)
        square = valid * jnp.maximum(square, mean**2)
        n = valid.sum(0)
        mean = (mean * valid).sum(0) / n
        var = square.sum(0) / n - mean**2
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        return (x - mean.reshape(shape)) / jnp.sqrt(var.reshape(shape) + 1e-3), valid.min()

    y, vjp, valid = jax.vjp(y_of, op(now["inputs"], now["kernel"]), has_aux=True)
    return y, vjp(now["dy"])[0], valid


def same(got, want):
    """float64: 1e-10 is 1e6 roundings; a wrong term shows at order one."""
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


DROPS = {"rule": "drop", "compensation": 1.5}


@pytest.mark.parametrize(("layer", "options"), [(k, {}) for k in LAYERS] + [("strided, grouped", DROPS)])
def test_the_definition(layer, options, rng, x64):
    """Over more iterations than the window has, for several kinds of layers: mean patches and slopes are right for each."""
    many = iterations(layer, 5, rng, 0.3 if options else 0.2)
    y, dx, _ = ours(layer, many, 3, **options)
    for last in (2, 5):  # a window that grows, and one that is full
        part = jax.tree.map(lambda a, last=last: a[:last], many)
        want = jax.jit(functools.partial(published, layer, window=3, **options))(part)
        same(y[last - 1], want[0])
        same(dx[last - 1], want[1])
    assert want[2] == (0 if options else 1)  # whether something was dropped


@pytest.mark.parametrize("layer", ["strided, grouped", "channels first"])
def test_what_the_variance_leaves_out(layer, rng, x64):
    """The mean is exact. The variance lacks the mean of (ΔW·p)² of the earlier iteration, and with its covariance nothing."""
    many = iterations(layer, 2, rng, 0.1)
    op, _, _, options = LAYERS[layer]
    axis = options.get("feature_axes", -1)
    rows = lambda i, w: np.moveaxis(np.asarray(op(many["inputs"][i], w)), axis, -1).reshape(-1, w.shape[-1])  # noqa: E731
    kernel = many["kernel"][1]
    x, other = rows(1, kernel), rows(0, kernel)
    left_out = (rows(0, kernel - many["kernel"][0]) ** 2).mean(0) / 2
    pooled = np.concatenate([x, other])
    for exact in (False, True):
        y = np.moveaxis(np.asarray(ours(layer, many, 2, exact)[0][1]), axis, -1).reshape(x.shape)
        same(y, (x - pooled.mean(0)) / np.sqrt(pooled.var(0) - (0 if exact else left_out) + 1e-3))


def scalar(kernels, batches, **options):
    """y of the last of several iterations with x = kernel·input, one feature."""
    state = jnorm.cross_iteration_batch_norm_state((1, 1), window=len(kernels))
    run = jax.jit(functools.partial(jnorm.cross_iteration_batch_norm, linear_op=jnp.matmul, epsilon=0.0, **options))
    for kernel, inputs in zip(kernels, np.array(batches, np.float32)[..., None], strict=True):
        y, state = run(kernel * inputs, state, inputs=inputs, kernel=np.full((1, 1), kernel, np.float32))
    return np.ravel(y)


NUMBERS = [  # kernel of the second iteration, options, mean, variance
    (1.5, {}, 3.75, 2.1875),
    (3.0, {}, 7.5, 6.75),
    (3.0, {"rule": "drop"}, 9.0, 9.0),
    (3.0, {"compensation": 0.0}, 5.5, 17.25),  # {1, 3} and {6, 12}: (1 + 9)/2 + 3.5²
]


@pytest.mark.parametrize(("kernel", "options", "mean", "var"), NUMBERS)
def test_numbers(kernel, options, mean, var):
    y = scalar([1.0, kernel], [[1.0, 3.0], [2.0, 4.0]], **options)
    np.testing.assert_allclose(y, (np.array([2, 4]) * kernel - mean) / var**0.5, rtol=1e-6)


def given_of(case, seed=0, **changes):
    given = cases.inputs(case, seed)
    return given | changes


def call(case, given, **options):
    return jax.jit(functools.partial(cases.call, case, **options))(given)


def fresh(case, **options):
    kernel = cases.inputs(case)["kernel"]
    options |= {"num_groups": case.options.get("num_groups", 1), "track_count": case.state == "count"}
    return jnorm.cross_iteration_batch_norm_state(kernel.shape, **options)


def batch_norm_of(given, **options):
    keys = [k for k in ("mean", "var", "count") if k in given["state"]]
    rest = {k: given[k] for k in ("scale", "bias", "mask", "residual") if k in given}
    return jnorm.batch_norm(given["x"], {k: given["state"][k] for k in keys}, **rest, **options)


def test_a_window_of_one_is_batch_normalization():
    """Bitwise where there are no slots; to rounding in a burn-in, and as long as no slot is filled. Slots are filled in a burn-in too."""
    given = given_of(CASE, state=fresh(CASE, window=1))
    y, state = call(CASE, given)
    want, running = jax.jit(batch_norm_of)(given)
    np.testing.assert_array_equal(y, want)
    for key in ("mean", "var"):
        np.testing.assert_array_equal(state[key], running[key])
    bounded = oracles.Bounded(oracles.wide(want), cases.oracle(CASE, given_of(CASE))[0].y.size)
    run = jax.jit(lambda g, n: cases.call(CASE, g, window_size=n))
    for filled, window_size in [(fresh(CASE), None), (cases.inputs(CASE)["state"], 1), (cases.inputs(CASE)["state"], np.int32(-3))]:
        burning = given_of(CASE, state=filled)
        y, state = run(burning, window_size)
        oracles.assert_close(y, bounded, 24)
        assert state["counts"][burning["state"]["index"]] == 24


@pytest.mark.parametrize("window_size", [None, 2])
def test_an_unmoved_kernel_pools_the_newest_iterations(window_size):
    """As batch normalization of them all at once. The counts differ."""
    case, history, state = CASE, [], fresh(CASE, window=3)
    run = jax.jit(lambda g, n: cases.call(case, g, window_size=n))
    for i in range(5):
        mask = np.arange(4).reshape(4, 1, 1, 1) <= i % 4
        history.append(given_of(case, i, kernel=cases.inputs(case)["kernel"], state=state, mask=mask))
        y, state = run(history[-1], window_size)
    newest = history[-(window_size or 3) :]
    pooled = {k: np.concatenate([g[k] for g in newest]) for k in ("x", "mask")}
    once = replace(BY_NAME["batch_norm"], shape=pooled["x"].shape)
    shared = {k: newest[-1][k] for k in ("scale", "bias")} | {"state": cases.inputs(once)["state"]}
    want = cases.oracle(once, pooled | shared | {"dy": np.zeros(pooled["x"].shape)})[0].y
    oracles.assert_close(y, oracles.Bounded(want.value[-4:], want.size[-4:]), pooled["x"].size // 6)


def test_traced_options_compile_once(compilations):
    run = jax.jit(lambda given, n, factor: cases.call(CASE, given, window_size=n, compensation=factor))
    given = jax.tree.map(jnp.asarray, cases.inputs(CASE))
    _, state = run(given, np.int32(1), np.float32(0))
    steps = [(np.int32(n), np.float32(n / 4)) for n in (2, 3, 4, 9)]
    with compilations() as count:
        for step in steps:
            _, state = run(given | {"state": state}, *step)
    assert count() == 0
    assert state["index"] == (1 + 5) % 3


def test_only_x_and_the_affine_parameters_have_gradients():
    """The slots, and by how much they are brought to the present kernel, are constants."""
    given = cases.inputs(CASE)
    names = ("kernel", "inputs", "compensation")

    def loss(values):
        inner = dict(zip(names, values, strict=True))
        factor = inner.pop("compensation")
        return jnp.vdot(cases.call(CASE, given | inner, compensation=factor)[0], given["dy"])

    for gradient in jax.jit(jax.grad(loss))((given["kernel"], given["inputs"], np.float32(1))):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_nothing_that_linear_op_closes_over_has_a_gradient_through_the_state():
    given = cases.inputs(CASE)

    def total(factor):
        linear_op = lambda inputs, kernel: CASE.options["linear_op"](inputs, kernel * factor)  # noqa: E731
        x = linear_op(given["inputs"], given["kernel"])
        state = cases.call(CASE, given | {"x": jax.lax.stop_gradient(x)}, linear_op=linear_op)[1]
        return sum(jnp.sum(v) for k, v in state.items() if k != "index")

    assert jax.grad(total)(jnp.float32(1.5)) == 0


def test_a_kernel_that_did_not_move_is_told_as_such():
    """Also where the state is narrow: the same batch twice gives the statistics of one."""
    rng = np.random.default_rng(0)
    inputs, kernel = (rng.normal(size=s).astype(np.float32) for s in ((8, 5), (5, 4)))
    state = jnorm.cross_iteration_batch_norm_state((5, 4), dtype=jnp.bfloat16)
    run = lambda s: jnorm.cross_iteration_batch_norm(inputs @ kernel, s, inputs=inputs, kernel=kernel, linear_op=jnp.matmul)  # noqa: E731
    one, state = run(state)
    np.testing.assert_allclose(run(state)[0], one, atol=32 * 1.2e-7 * abs(one).max())


@pytest.mark.parametrize("case", [CASE, EXACT], ids=["slopes", "exact"])
def test_explicit_mesh(case):
    """Sharding in types, of the batch."""
    case = replace(case, shape=SHAPE)
    given = cases.inputs(case, shape=SHAPE)
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))):
        placed = {k: jax.device_put(v, P() if k in distributed.WHOLE else P("d")) for k, v in given.items()}
        y, state, gradients = jax.jit(cases.value_and_gradients(case))(placed)
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_x(dtype):
    given = cases.inputs(CASE, dtype=dtype)
    y, state = call(CASE, given)
    assert y.dtype == dtype
    cases.check_value(CASE, given, y, state)


def test_narrow_inputs_and_kernel_are_read_as_float32():
    """A mean of float16 patches over many rows would lose them."""
    given = cases.inputs(CASE)
    narrow = {k: given[k].astype(np.float16) for k in ("inputs", "kernel")}
    same = {k: v.astype(np.float32) for k, v in narrow.items()}
    for one, two in zip(*(jax.tree.leaves(call(CASE, given | g)) for g in (narrow, same)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_float64(x64):
    given = cases.inputs(CASE, dtype="float64", parameters="float64")
    y, _ = call(CASE, given)
    oracles.assert_close(y, cases.oracle(CASE, given)[0].y, 24, "float64")


def test_evaluation_is_that_of_batch_norm():
    given = given_of(GROUPS)
    y, state = cases.call(GROUPS, given, use_running_average=True)
    assert state is given["state"]
    np.testing.assert_array_equal(y, batch_norm_of(given, use_running_average=True)[0])
    _, moved = call(GROUPS, given, use_running_average=True, update_running=True)
    for key, value in call(GROUPS, given)[1].items():
        np.testing.assert_array_equal(moved[key], value)


def test_an_iteration_that_counts_nothing():
    """It uses the running statistics, and is no iteration: the state stays."""
    given = given_of(GROUPS, mask=np.zeros((4, 1, 1, 1), bool))
    y, state = call(GROUPS, given)
    want, _ = jax.jit(functools.partial(batch_norm_of, use_running_average=True))(given)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    for key, value in given["state"].items():
        np.testing.assert_array_equal(state[key], value)


def test_non_finite_values_under_the_mask():
    given = cases.inputs(GROUPS)
    out = ~given["mask"]
    assert out.any()
    bad = given | {k: np.where(out, np.float32(np.inf), given[k]) for k in ("x", "inputs")}
    (y, state), (want, want_state) = call(GROUPS, bad), call(GROUPS, given)
    inside = np.broadcast_to(given["mask"], y.shape)
    np.testing.assert_array_equal(np.asarray(y)[inside], np.asarray(want)[inside])
    for key, value in want_state.items():
        np.testing.assert_array_equal(state[key], value)


def test_vmap():
    """Models side by side, each with its own kernel and state."""
    many = [cases.inputs(CASE, seed) for seed in range(2)]
    y, states = jax.jit(jax.vmap(functools.partial(cases.call, CASE)))(jax.tree.map(lambda *a: np.stack(a), *many))
    for i, given in enumerate(many):
        cases.check_value(CASE, given, y[i], at(states, i))


# --- devices ----------------------------------------------------------------------------------------------------------------

SHAPE = (16, 3, 2, 6)


def on_devices(case, rng, **options):
    """Inputs of the whole batch without the kernel, which every device has, and the local function."""
    case = replace(case, shape=SHAPE)
    given = cases.inputs(case, shape=SHAPE, mask=distributed.uneven(rng, SHAPE))
    kernel = {"kernel": given.pop("kernel")}
    return case, given, kernel, lambda local: cases.value_and_gradients(case, **options)(local | kernel)


@pytest.mark.parametrize(
    ("case", "mode"),
    [(GROUPS, m) for m in MODES] + [(EXACT, "shard_map"), (EXACT, "pmap")],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_devices_give_the_answer_of_one(case, mode, rng):
    """With uneven masks, and nothing counted on one of them."""
    case, given, kernel, local = on_devices(case, rng, axis_name="d")
    y, state, gradients = MODES[mode](local, given)
    cases.check_value(case, given | kernel, y, state)
    cases.check_gradients(case, given | kernel, gradients)


def test_sharded_arrays_without_a_name(rng):
    case, given, kernel, run = on_devices(GROUPS, rng)
    y, state, gradients = distributed.by_auto_mesh(run, given)
    cases.check_value(case, given | kernel, y, state)
    cases.check_gradients(case, given | kernel, gradients)


def test_groups_of_devices():
    """Each pair is a batch of its own, with slots of its own."""
    case = replace(CASE, shape=SHAPE)
    given = cases.inputs(case, shape=SHAPE)
    once = {k: given[k] for k in ("scale", "bias", "kernel", "state")}
    pieces = {k: given[k].reshape(4, 4, *given[k].shape[1:]) for k in ("x", "inputs")}
    options = {"axis_name": "d", "axis_index_groups": [[0, 2], [1, 3]]}
    y, states = jax.jit(jax.vmap(lambda piece: cases.call(case, piece | once, **options), axis_name="d"))(pieces)
    for pair in options["axis_index_groups"]:
        both = {k: np.concatenate([v[i] for i in pair]) for k, v in pieces.items()}
        for i, half in enumerate(np.split(np.arange(8), 2)):
            want, want_state = cases.oracle(case, both | once | {"dy": np.zeros_like(both["x"])})
            bounded = oracles.Bounded(want.y.value[half], want.y.size[half])
            oracles.assert_close(y[pair[i]], bounded, 48)
            cases.check_state(case, both | once, at(states, pair[i]), want_state, 48)


# --- refusals ---------------------------------------------------------------------------------------------------------------

STATE = jnorm.cross_iteration_batch_norm_state((5, 4))
GOOD = {"inputs": np.ones((3, 5), np.float32), "kernel": np.ones((5, 4), np.float32), "linear_op": jnp.matmul}


def norm(x=np.ones((3, 4), np.float32), state=STATE, **changes):  # noqa: B008
    return jnorm.cross_iteration_batch_norm(x, state, **GOOD | changes)


def without(key):
    return {k: v for k, v in STATE.items() if k != key}


BAD = [
    ({"kernel": np.ones((6, 4), np.float32)}, ("kernel has shape (6, 4)", "made for kernels of shape (5, 4)", "norm_state(kernel.shape)")),
    ({"kernel": np.ones((5, 3), np.float32)}, ("x of shape (3, 4) has features (4,)", "kernel of shape (5, 3) has 3 outputs")),
    ({"kernel": np.float32(1)}, ("kernel must have the axis of the outputs",)),
    ({"num_groups": 2}, ("num_groups is 2", "made with num_groups=1", "feature_group_count")),
    ({"num_groups": 3}, ("num_groups must be a positive divisor of the number of outputs, 4, got 3",)),
    ({"x": np.ones((2, 4), np.float32)}, ("x must be linear_op(inputs, kernel)", "(2, 4)", "gives (3, 4)")),
    ({"inputs": np.ones((3, 7), np.float32)}, ("linear_op fails for inputs of shape (3, 7)", "(5, 4)")),
    ({"rule": "mean"}, ('rule must be "max" or "drop", got \'mean\'',)),
    ({"window_size": 0}, ("window_size must be an int from 1 to 4", "got 0")),
    ({"window_size": 5}, ("window_size must be an int from 1 to 4", "got 5")),
    ({"window_size": np.float32(2)}, ("window_size must be",)),
    ({"window_size": jnp.ones(2, jnp.int32)}, ("window_size must be an integer scalar", "(2,)")),
    ({"compensation": np.ones(2)}, ("compensation must be a real scalar",)),
    ({"compensation": None}, ("compensation must be a real scalar", "None")),
    ({"mask": np.ones((3, 4), bool)}, ("mask of shape (3, 4) varies along the features", "must have size 1 there")),
    ({"momentum": None}, ("momentum=None is the cumulative average", "track_count=True")),
    ({"state": jnorm.batch_norm_state(4)}, ("state must be a dict of", "'slopes'", "make it with jnorm.cross_iteration_batch_norm_state")),
    ({"state": without("index")}, ("state must be a dict of", "'index'")),
    ({"state": STATE | {"means": jnp.zeros((3, 5))}}, ("state['means'] must have shape (3, 4), got (3, 5)",)),
]
OF_OTHER_TYPE = [
    ({"linear_op": None}, ("linear_op must be a function of inputs and kernel", "got None")),
    ({"x": np.ones((3, 4), np.complex64)}, ("x must be of a floating dtype",)),
    ({"inputs": np.ones((3, 5), np.int32)}, ("inputs must be of a floating dtype", "inputs.astype")),
    ({"kernel": np.ones((5, 4), np.int32)}, ("kernel must be of a floating dtype",)),
    ({"state": STATE | {"index": jnp.zeros(())}}, ("state['index'] must be an integer",)),
]


@pytest.mark.parametrize(("changes", "fragments"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_refusals(changes, fragments):
    with refuses(*fragments):
        norm(**changes)


@pytest.mark.parametrize(("changes", "fragments"), OF_OTHER_TYPE, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_refusals_of_types(changes, fragments):
    with refuses(*fragments, kind=TypeError):
        norm(**changes)


@pytest.mark.parametrize("shape", [5, np.ones((5, 4), np.float32), (5, 4.0)])
def test_a_shape_that_is_none(shape):
    with refuses("kernel_shape must be a sequence of ints", kind=TypeError):
        jnorm.cross_iteration_batch_norm_state(shape)


BAD_STATES = [
    (((5, 4),), {"window": 0}, ("window must be an int of at least 1", "got 0")),
    (((5, 4),), {"window": 2.0}, ("window must be an int of at least 1", "got 2.0")),
    (((5, 4),), {"num_groups": 3}, ("num_groups must be a positive divisor", "4, got 3")),
    (((),), {}, ("kernel_shape must have the axis of the outputs",)),
]


@pytest.mark.parametrize(("args", "options", "fragments"), BAD_STATES)
def test_refusals_of_the_state_maker(args, options, fragments):
    with refuses(*fragments):
        jnorm.cross_iteration_batch_norm_state(*args, **options)
    with refuses("dtype must be floating", kind=TypeError):
        jnorm.cross_iteration_batch_norm_state((5, 4), dtype=jnp.int32)


def test_groups_that_are_not_the_layers():
    """A convolution of two groups does not take one output."""
    op, of_inputs, of_kernel, _ = LAYERS["strided, grouped"]
    inputs, kernel = jnp.ones(of_inputs), jnp.ones(of_kernel)
    state = jnorm.cross_iteration_batch_norm_state(of_kernel)
    with refuses("linear_op fails", "num_groups=1", "feature_group_count"):
        jnorm.cross_iteration_batch_norm(op(inputs, kernel), state, inputs=inputs, kernel=kernel, linear_op=op)
