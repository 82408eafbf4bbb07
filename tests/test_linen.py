"""Linen's transformations and variables: each gives what the plain call gives, and updates the statistics as often."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import cases
import oracles
import weights
from cases import BY_NAME, CLASSES, PLAIN, replace
from jnorm import linen as jnn
from weights import WRAPPERS, every_other

TRACKED = [c for c in PLAIN if c.state]
each_norm = pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
each_tracked_norm = pytest.mark.parametrize("case", TRACKED, ids=lambda c: c.name)
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)
STATS = ["batch_stats"]
KEY = jax.random.PRNGKey(0)


def class_of(case):
    return getattr(jnn, CLASSES[case.norm])


def options_of(case, **options):
    return {**({"use_running_average": False} if case.state else {}), **case.options, **options}


def module_of(case, **options):
    return class_of(case)(**options_of(case, **options))


def variables_of(case, given):
    return {"params": {k: given[k] for k in case.affine}} | ({"batch_stats": given["state"]} if case.state else {})


def stacked(many):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *many)


def pick(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def check(case, given, y, updates):
    cases.check_value(case, given, y, updates["batch_stats"] if case.state else None)


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, dict(got), dict(want))


def close(got, want):
    """float64: 1e-10 of the largest entry is 1e6 roundings; a wrong term shows at order one."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-10 * max(abs(np.asarray(w)).max(), 1))


def doubled(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


# --- initialization -----------------------------------------------------------------------------------------------------------

X = np.asarray(np.random.default_rng(1).normal(size=(4, 2, 6)), np.float32)
NORMS = {CLASSES[c.norm]: module_of(c, axis_name="unbound") for c in PLAIN}
LAYERS = {
    **NORMS,
    "BatchNorm with a count": jnn.BatchNorm(False, track_count=True, momentum=None, axis_name="unbound", update_running=True),
    "WeightNorm": jnn.WeightNorm(nn.Dense(3)),
    "SpectralNorm": jnn.SpectralNorm(nn.Dense(3)),
    "WeightStandardization": jnn.WeightStandardization(nn.Dense(3)),
}
CALLS = {"SpectralNorm": {"update_stats": True}}
COLLECTIVES = ("psum", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter")


def initialized(name):
    return jax.jit(lambda key: LAYERS[name].init(key, X, **CALLS.get(name, {})))(KEY)


@pytest.mark.parametrize("name", LAYERS)
def test_init_needs_no_axis_and_has_no_collective(name):
    layer, call = LAYERS[name], CALLS.get(name, {})
    program = str(jax.make_jaxpr(lambda key: layer.init(key, X, **call))(KEY))
    assert not any(collective in program for collective in COLLECTIVES)


@pytest.mark.parametrize("name", NORMS)
def test_after_init_the_axis_is_needed(name):
    with pytest.raises(ValueError, match="'unbound' is not bound"):
        NORMS[name].apply(initialized(name), X, mutable=STATS)


@each_norm
def test_init_needs_no_groups_of_the_axis(case):
    variables = module_of(case, axis_name="unbound", axis_index_groups=[[0, 1], [2, 3]]).init(KEY, X)
    equal(variables["params"], initialized(CLASSES[case.norm])["params"])


@each_norm
def test_init_is_the_same_whatever_is_kept(case):
    """Rows merged over an axis are refused with save="output", but initialization merges nothing."""
    module = module_of(case, axis_name="unbound", save="output")
    equal(module.init(KEY, X), initialized(CLASSES[case.norm]))


@pytest.mark.parametrize("axis_name", [None, "unbound"])
def test_init_takes_one_example_alone(axis_name):
    """Initialization takes no statistics, and the batch may be a mapped axis."""
    layer = jnn.BatchNorm(use_running_average=False, axis_name=axis_name)
    equal(layer.init(KEY, X.reshape(-1, 6)[0]), layer.init(KEY, X))


@pytest.mark.parametrize("name", ["BatchNorm", "TrackedInstanceNorm", "BatchNorm with a count"])
def test_init_leaves_the_statistics_at_their_start(name):
    start = {"mean": np.zeros(6), "var": np.ones(6)} | ({"count": np.zeros(())} if "count" in name else {})
    equal(initialized(name)["batch_stats"], start)


def test_init_of_spectral_norm_takes_no_step():
    """A step would make u of length 1, and sigma not 1."""
    updating, not_updating = (jnn.SpectralNorm(nn.Dense(3)).init(KEY, X, update_stats=flag) for flag in (True, False))
    stats = updating["batch_stats"]
    equal(stats, not_updating["batch_stats"])
    assert stats["layer_instance/kernel/sigma"] == 1
    assert abs(np.linalg.norm(stats["layer_instance/kernel/u"]) - 1) > 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_eval_shape_of_init(name):
    shapes = jax.eval_shape(lambda key: LAYERS[name].init(key, X, **CALLS.get(name, {})), KEY)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), initialized(name))


# --- transformations of the norms ---------------------------------------------------------------------------------------------


@each_norm
def test_nn_jit(case):
    given = cases.inputs(case)
    module = nn.jit(class_of(case))(**options_of(case))
    check(case, given, *module.apply(variables_of(case, given), given["x"], mutable=STATS))


def gradients_of(case, module, given):
    """(y, updates, gradients), as the table's."""

    def f(params, x):
        return module.apply(variables_of(case, given) | {"params": params}, x, mutable=STATS)

    y, vjp, updates = jax.vjp(f, variables_of(case, given)["params"], given["x"], has_aux=True)
    dparams, dx = vjp(given["dy"])
    return y, updates, dparams | {"x": dx}


@each_norm
def test_remat_updates_once(case):
    given = cases.inputs(case)
    module = nn.remat(class_of(case))(**options_of(case))
    y, updates, gradients = jax.jit(functools.partial(gradients_of, case, module))(given)
    check(case, given, y, updates)
    cases.check_gradients(case, given, gradients)


@each_norm
def test_vmap_is_an_ensemble(case):
    """Three members, each with its own parameters and statistics."""
    many = [cases.inputs(case, seed) for seed in range(3)]
    given = stacked(many)
    module = nn.vmap(class_of(case), variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})(**options_of(case))
    y, updates = jax.jit(lambda v, x: module.apply(v, x, mutable=STATS))(variables_of(case, given), given["x"])
    for i in range(3):
        check(case, many[i], y[i], pick(updates, i))


@pytest.mark.parametrize("shared", ["params and statistics", "statistics"])
def test_vmap_with_an_axis_name_shares_statistics(shared):
    """Two halves of a batch. Their statistics are one, and so are the running ones; the parameters may be two."""
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)
    axes = {"params": None if "params" in shared else 0, "batch_stats": None}
    module = nn.vmap(jnn.BatchNorm, variable_axes=axes, split_rngs={"params": True}, axis_name="half")(False, axis_name="half")
    variables = variables_of(case, given)
    if axes["params"] == 0:
        variables["params"] = jax.tree.map(lambda a: np.stack([a, a]), variables["params"])
    halves = given["x"].reshape(2, 2, *given["x"].shape[1:])
    y, updates = jax.jit(lambda v, x: module.apply(v, x, mutable=STATS))(variables, halves)
    check(case, given, y.reshape(given["x"].shape), updates)


class Layer(nn.Module):
    """One of a stack: what it was given and what it made are both kept, so that each layer has its own check."""

    case: cases.Case
    evaluate: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        more = {"use_running_average": self.evaluate} if self.case.state else {}
        y = module_of(self.case, **more)(x)
        return jnp.sin(3 * y), (x, y)


def layer_variables(case, given):
    return {collection: {f"{CLASSES[case.norm]}_0": v} for collection, v in variables_of(case, given).items()}


@each_norm
def test_scan_over_layers(case):
    """Parameters and statistics of each layer lie side by side."""
    many = [cases.inputs(case, seed) for seed in range(3)]
    axes = {"params": 0, "batch_stats": 0}
    stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)(case)
    variables = layer_variables(case, stacked(many))
    (_, (xs, ys)), updates = jax.jit(lambda v, x: stack.apply(v, x, None, mutable=STATS))(variables, many[0]["x"])
    np.testing.assert_array_equal(xs[0], many[0]["x"])
    for i in range(3):
        own = pick(updates, i).get("batch_stats", {}).get(f"{CLASSES[case.norm]}_0")
        check(case, many[i] | {"x": np.asarray(xs[i])}, ys[i], {"batch_stats": own})


def test_scan_initializes_a_stack():
    stack = nn.scan(Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)(BY_NAME["batch_norm"])
    variables = stack.init(KEY, X, None)
    zeros, ones = np.zeros((3, 6)), np.ones((3, 6))
    equal(
        variables, {"params": {"BatchNorm_0": {"scale": ones, "bias": zeros}}, "batch_stats": {"BatchNorm_0": {"mean": zeros, "var": ones}}}
    )


@each_tracked_norm
def test_scan_carries_the_statistics_of_a_shared_layer(case):
    """The same layer three times: each step moves the statistics that the one before left."""
    given = cases.inputs(case)
    stack = nn.scan(Layer, variable_broadcast="params", variable_carry="batch_stats", split_rngs={"params": False}, length=3)(case)
    run = jax.jit(lambda v, x: stack.apply(v, x, None, mutable=STATS))
    (_, (xs, ys)), updates = run(layer_variables(case, given), given["x"])
    state = given["state"]
    for i in range(3):
        now = given | {"x": np.asarray(xs[i]), "state": state}
        state = cases.oracle_state(case, now)
        cases.check_value(case, now, ys[i], state)
    final = updates["batch_stats"][f"{CLASSES[case.norm]}_0"]
    cases.check_state(case, now, final, state, 3 * 24)


@each_tracked_norm
def test_scan_broadcasts_statistics_in_evaluation(case):
    given = cases.inputs(case)
    everything = ["params", "batch_stats"]
    stack = nn.scan(Layer, variable_broadcast=everything, split_rngs={"params": False}, length=2)(case, evaluate=True)
    _, (xs, ys) = jax.jit(lambda v, x: stack.apply(v, x, None))(layer_variables(case, given), given["x"])
    case = replace(case, options=case.options | {"use_running_average": True})
    for x, y in zip(np.asarray(xs), ys, strict=True):
        now = given | {"x": x}
        cases.check_value(case, now, y, given["state"])


# --- what is mutable ----------------------------------------------------------------------------------------------------------


@each_tracked_norm
def test_training_needs_a_mutable_collection(case):
    given = cases.inputs(case)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        module_of(case).apply(variables_of(case, given), given["x"])


@each_tracked_norm
@pytest.mark.parametrize("how", ["call", "constructor"])
def test_without_an_update_nothing_need_be_mutable(case, how):
    """The batch's statistics normalize: y is that of training."""
    given = cases.inputs(case)
    flag = {"update_running": False}
    module = module_of(case, **(flag if how == "constructor" else {}))
    y = module.apply(variables_of(case, given), given["x"], **(flag if how == "call" else {}))
    cases.check_value(case, given, y, cases.oracle_state(case, given))


@each_tracked_norm
def test_evaluation_needs_nothing_mutable_and_updates_nothing(case):
    case = replace(case, options={"use_running_average": True})
    given = cases.inputs(case)
    y = module_of(case).apply(variables_of(case, given), given["x"])
    cases.check_value(case, given, y, given["state"])
    _, updates = module_of(case).apply(variables_of(case, given), given["x"], mutable=STATS)
    equal(updates["batch_stats"], given["state"])


@pytest.mark.parametrize("counted", [False, True])
def test_updates_have_exactly_the_keys(counted):
    case = BY_NAME["batch_norm_counted" if counted else "batch_norm"]
    given = cases.inputs(case)
    module = jnn.BatchNorm(False, track_count=counted, **case.options)
    y, updates = module.apply(variables_of(case, given), given["x"], mutable=STATS)
    assert set(updates) == {"batch_stats"}
    check(case, given, y, updates)


def test_evaluation_may_update():
    """update_running=True with use_running_average=True: y of evaluation, statistics of training."""
    case = BY_NAME["batch_norm_evaluate"]
    given = cases.inputs(case)
    module = jnn.BatchNorm(True, update_running=True)
    y, updates = module.apply(variables_of(case, given), given["x"], mutable=STATS)
    want = cases.updated(replace(case, options={}), given, oracles.moments(given["x"], oracles.sets(given["x"].shape, case.kept)))
    cases.check_value(case, given, y, given["state"])
    cases.check_state(case, given, updates["batch_stats"], want, 24)


@pytest.mark.parametrize("frozen", [False, True])
def test_variables_may_be_frozen(frozen):
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)
    variables = variables_of(case, given)
    y, updates = module_of(case).apply(flax.core.freeze(variables) if frozen else variables, given["x"], mutable=STATS)
    check(case, given, y, flax.core.unfreeze(updates))


def test_bfloat16_variables():
    """Widened, used, and rounded back to what they are stored in; y is of the type that x and the parameters promote to."""
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case, parameters="bfloat16")
    given["state"] = {k: v.astype(jnp.bfloat16) for k, v in given["state"].items()}
    y, updates = module_of(case).apply(variables_of(case, given), given["x"], mutable=STATS)
    want, state = cases.oracle(case, given)
    assert y.dtype == np.float32
    oracles.assert_close(y, want.y, 24)
    for k, v in updates["batch_stats"].items():
        assert v.dtype == jnp.bfloat16
        oracles.assert_close(v, oracles.Bounded(state[k], abs(state[k]) + abs(given["x"]).max()), 24, what=k)


# --- in a model ---------------------------------------------------------------------------------------------------------------


class InSetup(nn.Module):
    def setup(self):
        self.norm = jnn.BatchNorm()

    def __call__(self, x, train):
        return self.norm(self.norm(x, not train), not train)


class InCompact(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = jnn.BatchNorm(name="norm")
        return norm(norm(x, not train), not train)


@pytest.mark.parametrize("model", [InSetup, InCompact])
def test_the_same_instance_twice(model, x64):
    """One set of parameters, and two updates."""
    case = BY_NAME["batch_norm"]
    given = doubled(cases.inputs(case))
    assert set(model().init(KEY, given["x"], True)["params"]) == {"norm"}
    variables = {k: {"norm": v} for k, v in variables_of(case, given).items()}
    y, updates = jax.jit(lambda v, x: model().apply(v, x, True, mutable=STATS))(variables, given["x"])
    first, state = cases.oracle(case, given)
    second, final = cases.oracle(case, given | {"x": first.y.value, "state": state})
    close(y, second.y.value)
    close(updates["batch_stats"]["norm"], final)


def test_intermediates_are_captured():
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)
    run = {"mutable": ["batch_stats", "intermediates"], "capture_intermediates": True}
    y, updates = module_of(case).apply(variables_of(case, given), given["x"], **run)
    assert set(updates) == {"batch_stats", "intermediates"}
    np.testing.assert_array_equal(updates["intermediates"]["__call__"][0], y)
    check(case, given, y, updates)


def partitioned(init, *names):
    return nn.with_partitioning(init, names)


def test_partitioned_parameters():
    """The names of axes travel with the boxes; boxed and unboxed variables compute the same."""
    inits = {"scale_init": partitioned(nn.initializers.ones, "model"), "bias_init": partitioned(nn.initializers.zeros, "model")}
    for case in PLAIN:
        given = cases.inputs(case)
        module = module_of(case, **{k: v for k, v in inits.items() if k.removesuffix("_init") in case.affine})
        boxed = module.init(KEY, given["x"])
        specs = nn.get_partition_spec(boxed)
        assert specs["params"] == {k: P("model") for k in case.affine}
        assert jax.tree.leaves(specs.get("batch_stats", {})) == [P()] * len(given.get("state", {}))
        boxed["params"] = {k: v.replace_boxed(given[k]) for k, v in boxed["params"].items()}
        boxed |= {"batch_stats": given["state"]} if case.state else {}
        y, updates = module.apply(boxed, given["x"], mutable=STATS)
        check(case, given, y, updates)
        again, _ = module.apply(nn.unbox(boxed), given["x"], mutable=STATS)
        np.testing.assert_array_equal(y, again)


# --- wrappers -----------------------------------------------------------------------------------------------------------------

OPTIONS = {"WeightStandardization": {"use_scale": True}}
INNER = {"dense": (nn.Dense(3), (5, 4)), "conv": (nn.Conv(3, (2, 2), padding="VALID"), (2, 4, 3, 2))}


def wrapped(name, layer, **options):
    return getattr(jnn, name)(layer, **OPTIONS.get(name, {}), **options)


def init(module, *args, **options):
    """Compiled as a whole, which is quicker than operation by operation."""
    return jax.jit(lambda: module.init(KEY, *args, **options))()


def wrapper_call(name, update=True):
    return {"update_stats": update} if name == "SpectralNorm" else {}


def randomized(variables, rng):
    """No scale may stay at 1, and no bias at 0."""
    return jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape) + 0.5 * (a.ndim > 0), a.dtype), variables)


def check_wrapped(name, variables, x, y, updates, at=("layer_instance",)):
    """y and the power iteration (where it moved) of a wrapped Dense or Conv, against NumPy."""
    prefix, layer = "/".join(at), variables["params"]
    for key in at:
        layer = layer[key]
    stats = variables.get("batch_stats", {})
    scale, u = variables["params"].get(f"{prefix}/kernel/scale"), stats.get(f"{prefix}/kernel/u")
    weight, moved = weights.normalized(name, layer["kernel"], scale, u)
    length = weights.terms(layer["kernel"])
    out = (weights.dense if layer["kernel"].ndim == 2 else weights.conv)(x, weight, layer["bias"])
    oracles.assert_close(y, out, length, what=f"{name}: y")
    for k, want in moved.items() if updates else ():
        oracles.assert_close(updates["batch_stats"][f"{prefix}/kernel/{k}"], size_of(want, layer["kernel"]), length, what=f"{name}: {k}")


def size_of(want, kernel):
    """u and sigma are sums of products of unit vectors with the kernel, u over sigma."""
    return oracles.Bounded(np.asarray(want), np.full(np.shape(want), max(np.linalg.norm(kernel), 1) ** 2))


@pytest.mark.parametrize(("name", "inner", "jitted"), every_other(WRAPPERS, INNER, [True, False]))
def test_wrapped_layers(name, inner, jitted, rng):
    layer, shape = INNER[inner]
    x = rng.normal(size=shape).astype(np.float32)
    module, call = wrapped(name, layer), wrapper_call(name)
    variables = randomized(init(module, x, **call), rng)
    run = lambda v, x: module.apply(v, x, **call, mutable=STATS)  # noqa: E731
    y, updates = (jax.jit(run) if jitted else run)(variables, x)
    check_wrapped(name, variables, x, y, updates)
    assert set(updates) == ({"batch_stats"} if name == "SpectralNorm" else set())


@each_wrapper
def test_what_is_wrapped_is_never_written(name, rng):
    """Also where everything is mutable."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = wrapped(name, nn.Dense(3))
    variables = randomized(init(module, x, **wrapper_call(name)), rng)
    _, updates = module.apply(variables, x, **wrapper_call(name), mutable=True)
    equal(updates["params"], variables["params"])
    stored = jax.tree.map(np.asarray, module.init(KEY, x, **wrapper_call(name)))["params"]["layer_instance"]
    # The stored kernel is the initializer's own, not a normalized one: of the scale 1/√4 that Dense draws with, in columns of no length 1.
    assert not np.allclose(np.linalg.norm(stored["kernel"], axis=0), 1, atol=1e-3)


@each_wrapper
def test_gradients_of_a_wrapped_layer_under_remat(name, rng, x64):
    """Through jit, remat and the wrapper: the gradients of the plain wrapper, in all parameters and in x."""
    x = rng.normal(size=(5, 4))
    call = wrapper_call(name, False)
    plain = wrapped(name, nn.Dense(3))
    variables = doubled(randomized(init(plain, np.float32(x), **call), rng))

    def gradients(layer):
        """A loss that remat may run twice."""

        def loss(params, x):
            run = nn.remat(lambda module, x: module(x, **call)) if layer is None else (lambda module, x: module(x, **call))
            y = nn.apply(run, wrapped(name, nn.Dense(3) if layer is None else layer))(variables | {"params": params}, x)
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, (0, 1))(variables["params"], x)

    want = jax.jit(lambda: gradients(nn.Dense(3)))()
    assert all(abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want))
    close(jax.jit(lambda: gradients(None))(), want)
    close(jax.jit(lambda: gradients(nn.remat(nn.Dense)(3)))(), want)


class WrappedLayer(nn.Module):
    """One of a stack. In compact the wrapped layer belongs to this module, beside the wrapper."""

    name_of: str

    @nn.compact
    def __call__(self, x, _=None):
        y = wrapped(self.name_of, nn.Dense(4))(x, **wrapper_call(self.name_of))
        return jnp.sin(y), (x, y)


def as_a_wrapper_has_them(name, variables):
    """Variables of a wrapper inside a compact module -> those of one that holds its layer itself."""
    own = {c: {k.replace("Dense_0", "layer_instance"): v for k, v in tree.get(f"{name}_0", {}).items()} for c, tree in variables.items()}
    own["params"]["layer_instance"] = variables["params"]["Dense_0"]
    return own


@pytest.mark.parametrize(("name", "transform"), every_other(WRAPPERS, [nn.jit, nn.remat]))
def test_wrapped_layers_transformed(name, transform, rng):
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = transform(WrappedLayer)(name)
    variables = randomized(init(module, x), rng)
    (_, (_, y)), updates = module.apply(variables, x, mutable=STATS)
    own = as_a_wrapper_has_them(name, variables)
    check_wrapped(name, own, x, y, as_a_wrapper_has_them(name, {"params": variables["params"], **updates}))


@pytest.mark.parametrize(("name", "shared"), every_other(WRAPPERS, [False, True]))
def test_scan_over_wrapped_layers(name, shared, rng):
    """Stacked, or one layer that is used three times: then its power iteration goes on from step to step."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    if shared:
        axes = {"variable_broadcast": "params", "variable_carry": "batch_stats", "split_rngs": {"params": False}}
        variables = init(WrappedLayer(name), x)
    else:
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    stack = nn.scan(WrappedLayer, length=3, **axes)(name)
    variables = randomized(variables if shared else init(stack, x, None), rng)
    (_, (xs, ys)), updates = jax.jit(lambda v, x: stack.apply(v, x, None, mutable=STATS))(variables, x)
    now = as_a_wrapper_has_them(name, variables)
    moved = as_a_wrapper_has_them(name, {"params": variables["params"], **updates})
    for i in range(3):
        if shared:
            check_wrapped(name, now, np.asarray(xs[i]), ys[i], moved if i == 2 else after(name, now))
            now |= after(name, now)
        else:
            check_wrapped(name, pick(now, i), np.asarray(xs[i]), ys[i], pick(moved, i))


def after(name, variables):
    """The batch_stats that the oracle leaves."""
    kernel, u = variables["params"]["layer_instance"]["kernel"], variables.get("batch_stats", {}).get("layer_instance/kernel/u")
    moved = weights.normalized(name, kernel, u=u)[1]
    return {"batch_stats": {f"layer_instance/kernel/{k}": v for k, v in moved.items()}}


@each_wrapper
def test_vmap_over_wrapped_layers(name, rng):
    """An ensemble with its own parameters and power iterations."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    axes = {"params": 0, "batch_stats": 0}
    module = nn.vmap(WrappedLayer, in_axes=None, variable_axes=axes, split_rngs={"params": True}, axis_size=2)(name)
    variables = randomized(init(module, x), rng)
    (_, (_, ys)), updates = jax.jit(lambda v, x: module.apply(v, x, mutable=STATS))(variables, x)
    own = as_a_wrapper_has_them(name, variables)
    moved = as_a_wrapper_has_them(name, {"params": variables["params"], **updates})
    for i in range(2):
        check_wrapped(name, pick(own, i), x, ys[i], pick(moved, i))


class WithNorm(nn.Module):
    """What is wrapped may have statistics, random numbers and intermediates of its own."""

    @nn.compact
    def __call__(self, x, train=True):
        h = nn.Dense(3, name="dense")(x)
        self.sow("intermediates", "h", h)
        h = jnn.BatchNorm(name="norm")(h, not train)
        return nn.Dropout(0.5, deterministic=not train)(h)


def own_entries(tree):
    """What the wrapper keeps for its layer's "dense"."""
    return {k.removeprefix("layer_instance/"): v for k, v in tree.items() if "/" in k}


@each_wrapper
@pytest.mark.parametrize("train", [True, False])
def test_a_wrapped_module_with_statistics(name, train, rng):
    """The layer inside updates its own, once; what it sows is kept."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = wrapped(name, WithNorm())
    call, keys = wrapper_call(name, train), {"params": KEY, "dropout": jax.random.PRNGKey(1)}
    start = module.init(keys, x, train, **call)
    equal(start["batch_stats"]["layer_instance"]["norm"], {"mean": np.zeros(3), "var": np.ones(3)})
    variables = randomized(start, rng)
    variables["batch_stats"] = jax.tree.map(lambda a: abs(a) + np.float32(0.5), variables["batch_stats"])
    mutable = [*STATS, "intermediates"]
    run = jax.jit(lambda v, x: module.apply(v, x, train, **call, mutable=mutable, rngs={"dropout": KEY}))
    y, updates = run(variables, x)
    (h,) = updates["intermediates"]["layer_instance"]["h"]
    renamed, moved = ({c: own_entries(v) for c, v in tree.items()} for tree in (variables, updates))
    renamed["params"]["dense"] = variables["params"]["layer_instance"]["dense"]
    check_wrapped(name, renamed, x, h, moved if train else None, at=("dense",))
    if not train:
        equal(own_entries(updates["batch_stats"]), own_entries(variables["batch_stats"]))
    case = replace(BY_NAME["batch_norm_matrix"], options={} if train else {"use_running_average": True})
    given = {"x": np.asarray(h), "dy": np.ones_like(h), **variables["params"]["layer_instance"]["norm"]}
    given["state"] = variables["batch_stats"]["layer_instance"]["norm"]
    want, state = cases.oracle(case, given)
    cases.check_state(case, given, updates["batch_stats"]["layer_instance"]["norm"], state, 5)
    kept = np.asarray(y) != 0
    assert kept.any() and (train != kept.all())
    want = oracles.Bounded(*(np.where(kept, a * (2 if train else 1), 0) for a in want.y))
    oracles.assert_close(y, want, 5)


@each_wrapper
def test_a_partitioned_kernel(name, rng):
    """In its box the kernel is normalized, and the boxes stay what they are; out of it, it has the same name."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    plain, call = wrapped(name, nn.Dense(3)), wrapper_call(name, False)
    boxed = wrapped(name, nn.Dense(3, kernel_init=partitioned(nn.initializers.lecun_normal(), None, "model")))
    variables = boxed.init(KEY, x, **call)
    assert nn.get_partition_spec(variables)["params"]["layer_instance"]["kernel"] == P(None, "model")
    np.testing.assert_array_equal(boxed.apply(variables, x, **call), plain.apply(nn.unbox(variables), x, **call))


def test_a_checkpoint_of_flax_with_a_partitioned_kernel(rng):
    """Flax names the scale after the inside of the box."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    kernel_init = partitioned(nn.initializers.lecun_normal(), None, "model")
    theirs = nn.WeightNorm(nn.Dense(3, kernel_init=kernel_init), scale_init=nn.initializers.constant(2.0))
    variables = theirs.init(KEY, x)
    assert "layer_instance/kernel/value/scale" in variables["params"]
    y = jnn.WeightNorm(nn.Dense(3, kernel_init=kernel_init)).apply(variables, x)
    renamed = {k.replace("/value", ""): v for k, v in nn.unbox(variables)["params"].items()}
    check_wrapped("WeightNorm", {"params": renamed}, x, y, {})


def test_a_partitioned_scale(rng):
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = jnn.WeightNorm(nn.Dense(3), scale_init=partitioned(nn.initializers.constant(2.0), "model"))
    variables = module.init(KEY, x)
    assert nn.get_partition_spec(variables)["params"]["layer_instance/kernel/scale"] == P("model")
    bare = nn.unbox(variables)
    check_wrapped("WeightNorm", bare, x, module.apply(variables, x), {})
    check_wrapped("WeightNorm", bare, x, module.apply(bare, x), {})


def test_sequential(rng, x64):
    """Wrappers and norms as links of a chain."""
    x = rng.normal(size=(6, 4))
    links = [jnn.WeightNorm(nn.Dense(3)), jnn.LayerNorm(), jnp.sin, jnn.BatchNorm(False), jnn.WeightStandardization(nn.Dense(2))]
    chain = nn.Sequential(links)
    variables = doubled(randomized(init(chain, np.float32(x)), rng))
    variables["batch_stats"] = jax.tree.map(abs, variables["batch_stats"])
    y, updates = jax.jit(lambda v, x: chain.apply(v, x, mutable=STATS))(variables, x)
    h = x
    for i, link in enumerate(links):
        own = {c: tree[f"layers_{i}"] for c, tree in variables.items() if f"layers_{i}" in tree}
        h = link(h) if link is jnp.sin else link.apply(own, h, mutable=STATS)
        if link is not jnp.sin:
            h, moved = h
            if moved:
                close(updates["batch_stats"][f"layers_{i}"], moved["batch_stats"])
    close(y, h)


@each_wrapper
def test_a_wrapper_used_twice(name, rng):
    """The same weights; the power iteration takes two steps."""

    class Twice(nn.Module):
        def setup(self):
            self.layer = wrapped(name, nn.Dense(4))

        def __call__(self, x):
            h = self.layer(x, **wrapper_call(name))
            return h, self.layer(h, **wrapper_call(name))

    x = rng.normal(size=(5, 4)).astype(np.float32)
    variables = randomized(init(Twice(), x), rng)
    (h, y), updates = jax.jit(lambda v, x: Twice().apply(v, x, mutable=STATS))(variables, x)
    own = {c: tree["layer"] for c, tree in variables.items()}
    check_wrapped(name, own, x, h, after(name, own))
    own |= after(name, own)
    check_wrapped(name, own, np.asarray(h), y, {c: tree["layer"] for c, tree in updates.items()})


@each_wrapper
def test_a_layer_wrapped_and_used_as_it_is(name, rng):
    """Only the wrapper sees normalized weights."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="tied")
            before = layer(x)
            return before, wrapped(name, layer)(x, **wrapper_call(name)), layer(x)

    x = rng.normal(size=(5, 4)).astype(np.float32)
    variables = randomized(init(Tied(), x), rng)
    (before, _, behind), _ = Tied().apply(variables, x, mutable=STATS)
    want = nn.Dense(3).apply({"params": variables["params"]["tied"]}, x)
    np.testing.assert_array_equal(before, want)
    np.testing.assert_array_equal(behind, want)


def test_spectral_norm_says_what_must_be_mutable():
    module = jnn.SpectralNorm(nn.Dense(3), collection_name="spectra")
    variables = module.init(KEY, X, update_stats=False)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="spectra"):
        module.apply(variables, X, update_stats=True)
    module.apply(variables, X, update_stats=False)
    _, updates = module.apply(variables, X, update_stats=True, mutable=["spectra"])
    assert set(updates) == {"spectra"}
