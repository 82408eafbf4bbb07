"""NNX's transformations and state: each gives what the plain call gives, and updates the statistics as often."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cases
import oracles
import weights
from cases import BY_NAME, CLASSES, PLAIN, replace
from jnorm import nnx as jnx
from weights import WRAPPERS, every_other

TRACKED = [c for c in PLAIN if c.state]
each_norm = pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
each_tracked_norm = pytest.mark.parametrize("case", TRACKED, ids=lambda c: c.name)
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)
BATCH = BY_NAME["batch_norm"]


def module_of(case, given, **options):
    """The class's instance that holds the parameters and statistics that are given."""
    module = getattr(jnx, CLASSES[case.norm])(6, **case.options, **options, rngs=nnx.Rngs(0))
    for key in case.affine:
        getattr(module, key)[...] = jnp.asarray(given[key])
    for key, value in given.get("state", {}).items():
        getattr(module, key)[...] = jnp.asarray(value)
    return module


def state_of(case, module):
    return {k: np.asarray(getattr(module, k)[...]) for k in cases.inputs(case)["state"]} if case.state else None


def call(module, x):
    return module(x)


def check(case, given, y, module):
    cases.check_value(case, given, y, state_of(case, module))


def stack_of(modules):
    """Several modules as one, with a leading axis in every variable."""
    graphdef, _ = nnx.split(modules[0])
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, modules)))


def member(stack, i):
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[i], state))


def values(module, kind=nnx.Not(nnx.RngKey)):  # noqa: B008
    """{path: array}, as they are now. Keys never change, only their counts do."""
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(module, kind))}


def equal(got, want):
    assert set(got) == set(want)
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=str(key))


def close(got, want):
    """float64: 1e-10 of the largest entry is 1e6 roundings; a wrong term shows at order one."""
    assert set(got) == set(want)
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=0, atol=1e-10 * max(abs(value).max(), 1), err_msg=str(key))


# --- transformations of the norms ---------------------------------------------------------------------------------------------


@each_norm
def test_jit(case, compilations):
    """The statistics of the module that was passed move; the second step compiles nothing."""
    run = nnx.jit(call)
    given = cases.inputs(case)
    module = module_of(case, given)
    check(case, given, run(module, given["x"]), module)
    second = cases.inputs(case, 1)
    module = module_of(case, second)
    x = jnp.asarray(second["x"])
    with compilations() as count:
        y = run(module, x)
    assert count() == 0
    check(case, second, y, module)


def loss(module, x, dy, f=call):
    y = f(module, x)
    return jnp.sum(y * dy), y


def check_gradients(case, given, gradients):
    (params, dx) = gradients
    cases.check_gradients(case, given, {k: np.asarray(params[k][...]) for k in case.affine} | {"x": dx})


@pytest.mark.parametrize(("case", "graph"), every_other(PLAIN, [True, False]))
def test_value_and_grad(case, graph):
    """Under jit, in graph mode and in tree mode."""
    given = cases.inputs(case)
    module = module_of(case, given)
    step = nnx.jit(lambda *args: nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True, graph=graph)(*args), graph=graph)
    (_, y), (params, dx) = step(module, given["x"], given["dy"])
    check(case, given, y, module)
    check_gradients(case, given, (nnx.state(params, nnx.Param), dx))


@each_norm
def test_remat_updates_once(case):
    given = cases.inputs(case)
    module = module_of(case, given)
    rematted = nnx.remat(call)
    step = nnx.jit(nnx.value_and_grad(lambda *args: loss(*args, f=rematted), argnums=(0, 1), has_aux=True))
    (_, y), gradients = step(module, given["x"], given["dy"])
    check(case, given, y, module)
    check_gradients(case, given, gradients)


@each_norm
def test_vmap_is_an_ensemble(case):
    many = [cases.inputs(case, seed) for seed in range(3)]
    ensemble = stack_of([module_of(case, given) for given in many])
    y = nnx.jit(nnx.vmap(call))(ensemble, np.stack([given["x"] for given in many]))
    for i, given in enumerate(many):
        check(case, given, y[i], member(ensemble, i))


@each_norm
def test_an_ensemble_is_made_under_vmap(case):
    """Each member draws its own parameters."""
    inits = {f"{k}_init": nnx.initializers.normal() for k in case.affine}
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: getattr(jnx, CLASSES[case.norm])(6, **case.options, **inits, rngs=rngs)))
    ensemble = make(nnx.Rngs(0))
    for key in case.affine:
        assert ensemble.scale.shape == (3, 6) and len(np.unique(getattr(ensemble, key)[...])) == 18
    if case.state:
        np.testing.assert_array_equal(ensemble.mean[...], np.zeros((3, 6)))
        np.testing.assert_array_equal(ensemble.var[...], np.ones((3, 6)))


@pytest.mark.parametrize("shared", ["params and statistics", "statistics"])
def test_vmap_with_an_axis_name_shares_statistics(shared):
    """Two halves of a batch. Their statistics are one, and so are the running ones; the parameters may be two."""
    given = cases.inputs(BATCH)
    module = module_of(BATCH, given, axis_name="half")
    axes = None
    if shared == "statistics":
        axes = nnx.StateAxes({nnx.Param: 0, ...: None})
        for key in BATCH.affine:
            setattr(module, key, nnx.Param(jnp.stack([given[key], given[key]])))
    halves = given["x"].reshape(2, 2, *given["x"].shape[1:])
    y = nnx.jit(nnx.vmap(call, in_axes=(axes, 0), axis_name="half"))(module, halves)
    check(BATCH, given, y.reshape(given["x"].shape), module)


def layer(x, module):
    """One of a stack: what it was given and what it made are both kept, so that each layer has its own check."""
    y = module(x)
    return jnp.sin(3 * y), (x, y)


@each_norm
def test_scan_over_layers(case):
    many = [cases.inputs(case, seed) for seed in range(3)]
    stack = stack_of([module_of(case, given) for given in many])
    run = nnx.jit(nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)))
    _, (xs, ys) = run(many[0]["x"], stack)
    np.testing.assert_array_equal(xs[0], many[0]["x"])
    for i, given in enumerate(many):
        check(case, given | {"x": np.asarray(xs[i])}, ys[i], member(stack, i))


@each_tracked_norm
def test_scan_carries_the_statistics_of_a_shared_layer(case):
    """The same layer three times: each step moves the statistics that the one before left."""
    given = cases.inputs(case)
    module = module_of(case, given)
    axes = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})
    run = nnx.jit(nnx.scan(layer, in_axes=(nnx.Carry, axes), out_axes=(nnx.Carry, 0), length=3))
    _, (xs, ys) = run(given["x"], module)
    state = given["state"]
    for x, y in zip(np.asarray(xs), ys, strict=True):
        now = given | {"x": x, "state": state}
        state = cases.oracle_state(case, now)
        cases.check_value(case, now, y, state)
    cases.check_state(case, now, state_of(case, module), state, 3 * 24)


@each_norm
def test_eval_shape(case):
    """Of the construction, and of a call, which changes nothing."""
    given = cases.inputs(case)
    module = module_of(case, given)
    shapes = nnx.eval_shape(lambda: module_of(case, given))
    described = {path: (v.shape, v.dtype) for path, v in nnx.to_flat_state(nnx.state(shapes))}
    assert described == {path: (v.shape, v.dtype) for path, v in values(module).items()}
    y = nnx.eval_shape(call, module, given["x"])
    assert (y.shape, y.dtype) == (given["x"].shape, given["x"].dtype)
    equal(
        {k: values(module)[(k,)] for k in (*case.affine, *given.get("state", ()))},
        {**given.get("state", {}), **{k: given[k] for k in case.affine}},
    )


@each_tracked_norm
def test_pure_jit_over_split_state(case):
    given = cases.inputs(case)
    graphdef, state = nnx.split(module_of(case, given))

    @jax.jit
    def step(state, x):
        module = nnx.merge(graphdef, state)
        return module(x), nnx.state(module)

    y, new = step(state, given["x"])
    check(case, given, y, nnx.merge(graphdef, new))
    equal({k: state[k][...] for k in given["state"]}, given["state"])


@each_norm
def test_pure_jit_with_the_module_closed_over(case):
    """Evaluation writes to no variable; training is refused, as for every NNX module."""
    evaluated = replace(case, options=case.options | ({"use_running_average": True} if case.state else {}))
    given = cases.inputs(case)
    module = module_of(case, given)
    module.eval()
    y = jax.jit(lambda x: module(x))(given["x"])
    check(evaluated, given, y, module)
    if case.state:
        module.train()
        with pytest.raises(Exception, match="different trace level"):
            jax.jit(lambda x: module(x))(given["x"])


def test_tree_mode_updates_in_place():
    """Modules as plain pytrees: jit, vmap and scan."""
    many = [cases.inputs(BATCH, seed) for seed in range(2)]
    with nnx.set_graph_mode(False):
        module = module_of(BATCH, many[0])
        check(BATCH, many[0], nnx.jit(call)(module, many[0]["x"]), module)
        ensemble = stack_of([module_of(BATCH, given) for given in many])
        y = nnx.vmap(call)(ensemble, np.stack([given["x"] for given in many]))
        stack = stack_of([module_of(BATCH, given) for given in many])
        _, (xs, ys) = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(many[0]["x"], stack)
    for i, given in enumerate(many):
        check(BATCH, given, y[i], member(ensemble, i))
        check(BATCH, given | {"x": np.asarray(xs[i])}, ys[i], member(stack, i))


# --- state --------------------------------------------------------------------------------------------------------------------

COPIES = {
    "clone": nnx.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "split and merge": lambda module: nnx.merge(*nnx.split(module), copy=True),
}


@pytest.mark.parametrize("how", COPIES)
@each_norm
def test_copies_are_independent(case, how):
    given = cases.inputs(case)
    module = module_of(case, given)
    copied = COPIES[how](module)
    before = values(module)
    check(case, given, copied(given["x"]), copied)
    equal(values(module), before)


def test_state_and_update():
    given, other = (cases.inputs(BATCH, seed) for seed in range(2))
    module, source = module_of(BATCH, given), module_of(BATCH, other)
    assert {path for path in values(module, nnx.Param)} == {("scale",), ("bias",)}
    assert {path for path in values(module, nnx.BatchStat)} == {("mean",), ("var",)}
    nnx.update(module, nnx.state(source))
    check(BATCH, other, module(other["x"]), module)


@each_tracked_norm
def test_train_and_eval(case):
    given = cases.inputs(case)
    module = module_of(case, given)
    module.eval()
    check(replace(case, options={"use_running_average": True}), given, module(given["x"]), module)
    module.train()
    check(case, given, module(given["x"]), module)


@each_tracked_norm
def test_views(case):
    """A view has the flags that it was made with and shares the variables; the original keeps its own flags."""
    given = cases.inputs(case)
    module = module_of(case, given)
    evaluating = nnx.view(module, use_running_average=True)
    evaluated = replace(case, options={"use_running_average": True})
    check(evaluated, given, evaluating(given["x"]), module)
    frozen = nnx.view(module, update_running=False)
    y = frozen(given["x"])
    cases.check_value(case, given, y, cases.oracle_state(case, given))
    equal(state_of(case, module), given["state"])
    check(case, given, nnx.view(evaluating, use_running_average=False)(given["x"]), module)
    assert (module.use_running_average, module.update_running) == (False, None)
    info = nnx.view_info(module)
    assert "use_running_average" in info and "update_running" in info and CLASSES[case.norm] in info


@each_tracked_norm
def test_the_call_overrides(case):
    given = cases.inputs(case)
    module = module_of(case, given)
    y = nnx.jit(lambda m, x: m(x, use_running_average=True))(module, given["x"])
    check(replace(case, options={"use_running_average": True}), given, y, module)
    y = nnx.jit(lambda m, x: m(x, update_running=False))(module, given["x"])
    cases.check_value(case, given, y, cases.oracle_state(case, given))
    equal(state_of(case, module), given["state"])
    module.eval()
    check(case, given, nnx.jit(lambda m, x: m(x, use_running_average=False))(module, given["x"]), module)


@each_tracked_norm
def test_traced_momentum_compiles_once(case, compilations):
    run = nnx.jit(lambda module, x, momentum: module(x, momentum=momentum))
    given = cases.inputs(case)
    x, one, two = jnp.asarray(given["x"]), jnp.float32(0.5), jnp.float32(0.25)
    run(module_of(case, given), x, one)
    module = module_of(case, given)
    with compilations() as count:
        y = run(module, x, two)
    assert count() == 0
    check(replace(case, options={"momentum": 0.25}), given, y, module)


def test_a_count_is_kept():
    case = BY_NAME["batch_norm_cumulative"]
    given = cases.inputs(case)
    module = jnx.BatchNorm(6, momentum=None, track_count=True, use_scale=False, rngs=nnx.Rngs(0))
    for key, value in {**given["state"], "bias": given["bias"]}.items():
        getattr(module, key)[...] = jnp.asarray(value)
    check(case, given, nnx.jit(call)(module, given["x"]), module)


@each_norm
def test_no_scale_may_get_one_later(case):
    """What is absent is data, as in Flax: a parameter put there is used, and belongs to the state."""
    given = cases.inputs(case)
    absent = {f"use_{k}": False for k in case.affine}
    module = getattr(jnx, CLASSES[case.norm])(6, **case.options, **absent, rngs=nnx.Rngs(0))
    assert values(module, nnx.Param) == {}
    for key in case.affine:
        setattr(module, key, nnx.Param(jnp.asarray(given[key])))
    for key, value in given.get("state", {}).items():
        getattr(module, key)[...] = jnp.asarray(value)
    check(case, given, nnx.jit(call)(module, given["x"]), module)


@each_norm
def test_sharding_annotations(case):
    """By the initializer and by metadata."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        kinds = {"scale_init": nnx.with_partitioning(nnx.initializers.ones, ("model",)), "bias_metadata": {"out_sharding": ("model",)}}
        kinds = {k: v for k, v in kinds.items() if k.split("_")[0] in case.affine}
        given = cases.inputs(case)
        module = module_of(case, given, **kinds)
        specs = nnx.get_partition_spec(nnx.state(module))
        for key in case.affine:
            assert specs[key].get_value() == getattr(module, key)[...].sharding.spec == P("model")
        for key in given.get("state", ()):
            assert specs[key].get_value() == P()
        check(case, given, nnx.jit(call)(module, given["x"]), module)
    metadata = {f"{k}_metadata": {"tag": k} for k in case.affine}
    tagged = module_of(case, given, **metadata)
    assert [getattr(tagged, k).get_metadata("tag") for k in case.affine] == list(case.affine)


def every_layer():
    rngs = nnx.Rngs(0)
    norms = [module_of(c, cases.inputs(c)) for c in PLAIN]
    return [*norms, *(wrapped(name, nnx.Linear(4, 3, rngs=rngs)) for name in WRAPPERS)]


def test_repr_and_display(capsys):
    for module in every_layer():
        assert type(module).__name__ in repr(module)
        nnx.display(module)
        assert type(module).__name__ in capsys.readouterr().out


# --- wrappers -----------------------------------------------------------------------------------------------------------------

OPTIONS = {"WeightStandardization": {"use_scale": True}}
INNER = {
    "linear": (lambda rngs: nnx.Linear(4, 3, rngs=rngs), (5, 4)),
    "conv": (lambda rngs: nnx.Conv(2, 3, (2, 2), padding="VALID", rngs=rngs), (2, 4, 3, 2)),
}


def wrapped(name, layer, **options):
    return getattr(jnx, name)(layer, **OPTIONS.get(name, {}), **options, rngs=nnx.Rngs(1))


def randomized(module, rng, dtype=np.float32):
    """No scale may stay at 1, and no bias at 0."""
    old = nnx.state(module, (nnx.Param, nnx.BatchStat))
    nnx.update(module, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) + 0.5 * (a.ndim > 0), dtype), old))
    return module


def linear(rng, name="WeightNorm", features=3, **options):
    return randomized(wrapped(name, nnx.Linear(4, features, rngs=nnx.Rngs(0)), **options), rng)


def check_wrapped(name, before, x, y, after, at=()):
    """y and the power iteration of a wrapped Linear or Conv, against NumPy; nothing else may have moved."""
    kernel, bias = (before[("layer_instance", *at, k)] for k in ("kernel", "bias"))
    scale, u = before.get(("scales", (*at, "kernel"))), before.get(("batch_stats", (*at, "kernel", "u")))
    weight, moved = weights.normalized(name, kernel, scale, u)
    length = weights.terms(kernel)
    oracles.assert_close(y, (weights.dense if kernel.ndim == 2 else weights.conv)(x, weight, bias), length, what=f"{name}: y")
    size = max(np.linalg.norm(kernel), 1) ** 2
    for k, want in moved.items():
        got = after[("batch_stats", (*at, "kernel", k))]
        oracles.assert_close(got, oracles.Bounded(np.asarray(want), np.full(np.shape(want), size)), length, what=f"{name}: {k}")
    parameters = [path for path in before if path[0] == "scales" or path[-1] in ("kernel", "bias")]
    equal({path: after[path] for path in parameters}, {path: before[path] for path in parameters})


@pytest.mark.parametrize(("name", "inner", "how"), every_other(WRAPPERS, INNER, ["eager", "jit", "remat", "tree mode"]))
def test_wrapped_layers(name, inner, how, rng):
    make, shape = INNER[inner]
    x = rng.normal(size=shape).astype(np.float32)
    module = randomized(wrapped(name, make(nnx.Rngs(0))), rng)
    before = values(module)
    run = {"jit": nnx.jit(call), "remat": nnx.remat(call), "tree mode": nnx.jit(call, graph=False)}.get(how, call)
    check_wrapped(name, before, x, run(module, x), values(module))


@each_wrapper
def test_wrapped_layers_compile_once(name, rng, compilations):
    run = nnx.jit(call)
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    run(linear(rng, name), x)
    module = linear(rng, name)
    before = values(module)
    with compilations() as count:
        y = run(module, x)
    assert count() == 0
    check_wrapped(name, before, x, y, values(module))


@pytest.mark.parametrize(("name", "how"), every_other(WRAPPERS, ["scan", "vmap"]))
def test_stacks_of_wrapped_layers(name, how, rng):
    x = rng.normal(size=(5, 4)).astype(np.float32)
    stack = stack_of([linear(rng, name, features=4) for _ in range(3)])
    before = [values(member(stack, i)) for i in range(3)]
    if how == "scan":
        _, (xs, ys) = nnx.jit(nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)))(x, stack)
    else:
        xs, ys = [x] * 3, nnx.jit(nnx.vmap(call, in_axes=(0, None)))(stack, x)
    for i in range(3):
        check_wrapped(name, before[i], np.asarray(xs[i]), ys[i], values(member(stack, i)))


@each_wrapper
def test_a_shared_wrapped_layer_in_a_scan(name, rng):
    """The power iteration goes on from step to step."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = linear(rng, name, features=4)
    now = values(module)
    axes = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})
    _, (xs, ys) = nnx.jit(nnx.scan(layer, in_axes=(nnx.Carry, axes), out_axes=(nnx.Carry, 0), length=3))(x, module)
    for i in range(3):
        moved = now | moves(name, now)
        check_wrapped(name, now, np.asarray(xs[i]), ys[i], values(module) if i == 2 else moved)
        now = moved


def moves(name, before, at=()):
    """The batch_stats that the oracle leaves."""
    u = before.get(("batch_stats", (*at, "kernel", "u")))
    moved = weights.normalized(name, before[("layer_instance", *at, "kernel")], u=u)[1]
    return {("batch_stats", (*at, "kernel", k)): v for k, v in moved.items()}


@each_wrapper
def test_gradients_of_wrapped_layers(name, rng, x64):
    """Through jit, grad and remat: those of the wrapper's formula, that is the plain gradient of a layer with these weights."""
    x = rng.normal(size=(5, 4))
    module = randomized(wrapped(name, nnx.Linear(4, 3, rngs=nnx.Rngs(0))), rng, np.float64)
    module.eval()
    values64 = values(module)

    def wanted(params, x):
        kernel, scale = params[("layer_instance", "kernel")], params.get(("scales", ("kernel",)))
        w = plain_weight(name, kernel, scale, values64.get(("batch_stats", ("kernel", "u"))))
        return jnp.sum(jnp.sin(jnp.matmul(x, w) + params[("layer_instance", "bias")][None]))

    want, want_x = jax.grad(wanted, (0, 1))(values(module, nnx.Param), x)
    assert all(abs(leaf).max() > 1e-3 for leaf in want.values())
    for f in (call, nnx.remat(call)):
        step = nnx.jit(nnx.grad(lambda module, x, f=f: jnp.sum(jnp.sin(f(module, x))), argnums=(0, 1)))
        gradients, dx = step(module, x)
        close({path: np.asarray(v[...]) for path, v in nnx.to_flat_state(gradients)} | {"x": dx}, want | {"x": want_x})
    equal(values(module), values64)


def plain_weight(name, kernel, scale, u):
    """The formulas in plain jnp."""
    scale = 1 if scale is None else scale[None]
    if name == "WeightNorm":
        return scale * kernel / jnp.sqrt(jnp.sum(kernel**2, 0, keepdims=True) + 1e-12)
    if name == "WeightStandardization":
        return scale * (kernel - jnp.mean(kernel, 0, keepdims=True)) / (jnp.std(kernel, 0, ddof=1, keepdims=True) + 1e-5)
    fixed = jax.lax.stop_gradient(kernel)
    v = unit(jnp.matmul(u, fixed.T))
    return kernel / jnp.matmul(jnp.matmul(v, kernel), unit(jnp.matmul(v, fixed)).T)


def unit(a):
    return a / jnp.sqrt(jnp.sum(a**2) + 1e-12)


class WithNorm(nnx.Module):
    """What is wrapped may have statistics, random numbers and intermediates of its own."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = jnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        h = self.dense(x)
        self.sow(nnx.Intermediate, "h", h)
        return self.dropout(self.norm(h))


@pytest.mark.parametrize(("name", "how"), every_other(WRAPPERS, ["eager", "jit", "remat", "evaluation"]))
def test_a_wrapped_module_with_statistics(name, how, rng):
    """The layer inside updates its own, once; its keys advance, once; what it sows is captured."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = randomized(wrapped(name, WithNorm(nnx.Rngs(0))), rng)
    inner = module.layer_instance
    inner.norm.var[...] = abs(inner.norm.var[...]) + jnp.float32(0.5)
    before = values(module)
    if how == "evaluation":
        module.eval()
    run = nnx.remat(call) if how == "remat" else call
    captured = lambda module, x: nnx.capture(run, nnx.Intermediate)(module, x)  # noqa: E731
    y, sown = (nnx.jit(captured) if how == "jit" else captured)(module, x)
    after, train = values(module), how != "evaluation"
    (h,) = sown["layer_instance"]["h"].get_value()
    moved = after if train else after | moves(name, before, ("dense",))
    check_wrapped(name, before, x, h, moved, at=("dense",))
    if not train:
        equal(after, before)
    assert set(after) == set(before)  # no intermediates stay behind
    at = ("layer_instance", "norm")
    case = replace(BY_NAME["batch_norm_matrix"], options={} if train else {"use_running_average": True})
    given = {k: before[(*at, k)] for k in case.affine} | {"x": np.asarray(h), "dy": np.ones_like(h)}
    given["state"] = {k: before[(*at, k)] for k in ("mean", "var")}
    want, state = cases.oracle(case, given)
    cases.check_state(case, given, {k: after[(*at, k)] for k in state}, state, 5)
    (count,) = (path for path in before if path[-1] == "count")
    assert after[count] - before[count] == train
    kept = np.asarray(y) != 0
    assert kept.any() and train != kept.all()
    oracles.assert_close(y, oracles.Bounded(*(np.where(kept, a * (2 if train else 1), 0) for a in want.y)), 5)


@each_wrapper
def test_a_tied_layer(name, rng):
    """A layer that is wrapped and used as it is: only the wrapper sees normalized weights, and gradients come from both."""

    class Tied(nnx.Module):
        def __init__(self):
            self.wrapper = linear(rng, name, features=4)
            self.layer = self.wrapper.layer_instance

        def __call__(self, x):
            before = self.layer(x)
            return before, self.wrapper(x), self.layer(x)

    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = Tied()
    kernel = np.asarray(module.layer.kernel[...])
    before, _, behind = nnx.jit(call)(module, x)
    assert module.layer is module.wrapper.layer_instance
    np.testing.assert_array_equal(module.layer.kernel[...], kernel)
    np.testing.assert_array_equal(before, behind)
    oracles.assert_close(before, weights.dense(x, oracles.Bounded(kernel, abs(kernel)), module.layer.bias[...]), 4)
    module.eval()
    single = [nnx.grad(lambda m, i=i: jnp.sum(jnp.sin(m(x)[i])))(module) for i in (0, 1)]
    both = nnx.grad(lambda m: jnp.sum(jnp.sin(m(x)[0])) + jnp.sum(jnp.sin(m(x)[1])))(module)
    parts, total = ([np.asarray(leaf) for leaf in jax.tree.leaves(g)] for g in (single[0], both))
    for one, other, whole in zip(parts, map(np.asarray, jax.tree.leaves(single[1])), total, strict=True):
        # Sums of 5·4 terms that are at most about |x|·|weight|, in another order.
        np.testing.assert_allclose(whole, one + other, rtol=0, atol=64 * 2.0**-23 * max(abs(whole).max(), 1))


@each_wrapper
def test_an_optimizer_steps_every_parameter(name, rng):
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = linear(rng, name)
    optimizer = nnx.Optimizer(module, optax.sgd(0.5), wrt=nnx.Param)
    before = values(module, nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        gradients = nnx.grad(lambda module: jnp.sum(jnp.sin(module(x))))(module)
        optimizer.update(module, gradients)
        return gradients

    gradients = {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(step(module, optimizer))}
    assert set(gradients) == set(before) and len(before) == (2 if name == "SpectralNorm" else 3)
    for path, value in values(module, nnx.Param).items():
        assert abs(gradients[path]).max() > 1e-3
        # A product and a difference: two roundings.
        np.testing.assert_allclose(
            value, before[path] - 0.5 * gradients[path], rtol=0, atol=2.0**-23 * (abs(before[path]) + abs(gradients[path])).max()
        )


@each_wrapper
def test_evaluation_of_a_wrapper_writes_nothing(name, rng):
    """With the module closed over, plain jit can evaluate; every way of saying so."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = linear(rng, name)
    before = values(module)
    after = before | moves(name, before)
    if name == "SpectralNorm":
        check_wrapped(name, before, x, module(x, update_stats=False), after)
        check_wrapped(name, before, x, nnx.view(module, use_running_average=True)(x), after)
    module.eval()
    check_wrapped(name, before, x, jax.jit(lambda x: module(x))(x), after)
    equal(values(module), before)
    module.train()
    y = module(x)
    check_wrapped(name, before, x, y, values(module))


@pytest.mark.parametrize("how", COPIES)
@each_wrapper
def test_copies_of_wrappers_are_independent(name, how, rng):
    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = linear(rng, name)
    before = values(module)
    copied = COPIES[how](module)
    check_wrapped(name, before, x, copied(x), values(copied))
    equal(values(module), before)


@each_wrapper
def test_wrappers_as_links_of_a_chain(name, rng):
    """In Sequential, each with its own statistics."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    chain = nnx.Sequential(linear(rng, name, features=4), jnp.sin, linear(rng, name))
    links = [chain.layers[0], chain.layers[2]]
    before = [values(link) for link in links]
    y = nnx.jit(call)(chain, x)
    after = [values(link) for link in links]
    for link, state in zip(links, before, strict=True):
        nnx.update(link, nnx.from_flat_state({path: v.replace(jnp.asarray(state[path])) for path, v in nnx.to_flat_state(nnx.state(link))}))
    h = links[0](x)
    check_wrapped(name, before[0], x, h, after[0])
    # The same program in another jit may round each sum of 4 differently, twice in a row.
    np.testing.assert_allclose(y, links[1](jnp.sin(h)), rtol=0, atol=64 * 2.0**-23 * max(abs(np.asarray(y)).max(), 1))
    close_enough = {k: v for k, v in values(links[1]).items() if k in moves(name, before[1])}
    for path, value in close_enough.items():
        np.testing.assert_allclose(after[1][path], value, rtol=0, atol=64 * 2.0**-23 * max(abs(value).max(), 1))


def test_partitioned_kernel_and_scale(rng):
    """Annotations of the wrapped layer and of the wrapper are both found, and the layer still computes."""
    mesh = jax.make_mesh((3,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    x = rng.normal(size=(5, 4)).astype(np.float32)
    with jax.set_mesh(mesh):
        kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        scale_init = nnx.with_partitioning(nnx.initializers.constant(2.0), ("model",))
        for name in WRAPPERS:
            layer = nnx.Linear(4, 3, kernel_init=kernel_init, rngs=nnx.Rngs(0))
            module = wrapped(name, layer, **({} if name == "SpectralNorm" else {"scale_init": scale_init}))
            specs = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.get_partition_spec(nnx.state(module)))}
            assert specs[("layer_instance", "kernel")] == P(None, "model")
            assert specs.get(("scales", ("kernel",)), P("model")) == P("model")
            before = values(module)
            check_wrapped(name, before, x, nnx.jit(call)(module, x), values(module))


@each_wrapper
def test_what_a_wrapped_layer_makes_stays_with_it(name, rng):
    """A variable that the first call makes, and the second one changes; and one that each call puts in place of the last."""

    class Counting(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.renewed = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            if not hasattr(self, "calls"):
                self.calls = nnx.BatchStat(jnp.zeros(()))
            self.calls[...] += 1
            self.renewed = nnx.BatchStat(jnp.floor(self.renewed[...]) + 1)
            return self.dense(x)

    x = rng.normal(size=(5, 4)).astype(np.float32)
    module = randomized(wrapped(name, Counting()), rng)
    start = module.layer_instance.renewed[...]
    for number in (1, 2):
        before = values(module)
        check_wrapped(name, before, x, nnx.jit(call)(module, x), values(module), at=("dense",))
        assert module.layer_instance.calls[...] == number
        assert module.layer_instance.renewed[...] == jnp.floor(start) + number
