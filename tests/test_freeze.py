"""Frozen norms: against the formulas of evaluation in every norm with running statistics, and that nothing moves or thaws them."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distributed
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import oracles
import pairwise
from jnorm import tools
from refusals import refuses
from test_collectives import kinds
from test_flax_models import CHECKPOINTS

N, M, C = 4, 5, 3
MARKS = ("frozen_statistics", "frozen_updates")
SWITCHES = {"both": {}, "statistics": {"updates": False}, "updates": {"statistics": False}}
MODES = {
    "training": {"use_running_average": False},
    "training that updates": {"use_running_average": False, "update_running": True},
    "training that does not": {"use_running_average": False, "update_running": False},
    "evaluation": {"use_running_average": True},
    "evaluation that updates": {"use_running_average": True, "update_running": True},
}
APIS = ("function", "linen", "nnx")
# norm -> (class, options, whether the state has a count)
NORMS = {
    "batch_norm": ("BatchNorm", {"epsilon": 1e-5}, False),
    "batch_renorm": ("BatchRenorm", {}, True),
    "mean_only_batch_norm": ("MeanOnlyBatchNorm", {}, False),
    "ghost_batch_norm": ("GhostBatchNorm", {"group_size": 2}, True),
    "ghost_batch_norm each": ("GhostBatchNorm", {"group_size": 2, "update": "each"}, False),
    "eval_norm": ("EvalNorm", {"mean_weight": 0.25}, False),
    "cross_iteration_batch_norm": ("CrossIterationBatchNorm", {}, False),
    "cross_mini_batch_norm": ("CrossMiniBatchNorm", {"num_mini_batches": 1}, True),
    "tracked_instance_norm": ("TrackedInstanceNorm", {"epsilon": 1e-5}, False),
    "divisive_batch_norm": ("DivisiveBatchNorm", {"sigma": 0.7}, False),
}
ROWS = pairwise.covering(NORMS, APIS, SWITCHES, MODES, allowed=lambda norm, api, *_: (norm, api) != ("eval_norm", "function"))
# The first have every value of each, and most pairs.
ROWS = [pytest.param(*row, marks=[pytest.mark.slow] * (i >= 20)) for i, row in enumerate(ROWS)]


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(size=(N, M, C)) * 1.5 + 2, "dy": rng.normal(size=(N, M, C)), "scale": rng.normal(size=C) + 0.7}
    return {k: np.asarray(v, np.float32) for k, v in (arrays | {"bias": rng.normal(size=C)}).items()}


def state_of(norm, seed=1):
    """Averages that are none of the batch's."""
    rng, (_, _, counts) = np.random.default_rng(seed), NORMS[norm]
    make = getattr(jnorm, f"{norm.split()[0]}_state", jnorm.batch_norm_state)
    state = make((C, C) if norm == "cross_iteration_batch_norm" else C, track_count=counts)
    drawn = {"mean": rng.normal(size=C), "var": rng.uniform(0.5, 2, C), "std": rng.uniform(0.5, 2, C), "count": np.array(2.5)}
    return {k: jnp.asarray(drawn[k], jnp.float32) if k in drawn else a for k, a in state.items()}


def run(norm, api, state, given, **mode):
    """-> y, the new state, and the gradients. The kernel before cross-iteration normalization is the identity."""
    affine = {k: given[k] for k in ("scale", "bias") if not norm.startswith("mean_only") or k == "bias"}
    run = {"function": by_function, "linen": by_linen, "nnx": by_nnx}[api]
    call = lambda inner, dy: jax.vjp(lambda i: run(norm, state, i, mode), inner, has_aux=True)  # noqa: E731

    @jax.jit
    def step(inner, dy):
        y, vjp, new = call(inner, dy)
        return y, new, vjp(dy)[0]

    return step({"x": given["x"], **affine}, given["dy"])


def by_function(norm, state, inner, mode):
    name, options = norm.split()[0], dict(NORMS[norm][1])
    if name == "cross_iteration_batch_norm":
        options |= {"inputs": inner["x"], "kernel": np.eye(C, dtype=np.float32), "linear_op": jnp.matmul}
    affine = {k: v for k, v in inner.items() if k != "x"}
    y, new, *_ = getattr(jnorm, name)(inner["x"], state, **affine, **options, **mode)
    return y, new


def by_linen(norm, state, inner, mode):
    name, options, counts = NORMS[norm]
    kernel = {"layer_instance": {"kernel": jnp.eye(C)}} if name == "CrossIterationBatchNorm" else {}
    wrapped = [nn.Dense(C, use_bias=False)] if kernel else []
    module = getattr(jnn, name)(*wrapped, **options, track_count=counts)
    variables = {"params": {**kernel, **{k: v for k, v in inner.items() if k != "x"}}, "batch_stats": state}
    y, updates = module.apply(variables, inner["x"], **mode, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def by_nnx(norm, state, inner, mode):
    name, options, counts = NORMS[norm]
    wrapped = nnx.Linear(C, C, use_bias=False, kernel_init=lambda *_: jnp.eye(C), rngs=nnx.Rngs(0))
    first = wrapped if name == "CrossIterationBatchNorm" else C
    module = getattr(jnx, name)(first, **options, track_count=counts, rngs=nnx.Rngs(0))
    for key, value in inner.items():
        if key != "x":
            getattr(module, key).set_value(value)
    for key, value in state.items():
        setattr(module, key, nnx.BatchStat(value))
    y = module(inner["x"], **mode)
    return y, {key: getattr(module, key)[...] for key in state}


def formula(norm, state, given):
    """y of evaluation and its gradients, in float64: affine, but for the share of a sample's own statistics in EvalNorm."""
    x, dy, scale, bias = (oracles.wide(given[k]) for k in ("x", "dy", "scale", "bias"))
    s, (name, options, _) = {k: oracles.wide(v) for k, v in state.items()}, NORMS[norm]
    share, own = options.get("mean_weight", 0.0), x.mean(1, keepdims=True)
    mean = share * own + (1 - share) * s["mean"]
    if name == "MeanOnlyBatchNorm":
        scale, rstd = np.ones(C), np.ones(C)
    elif name == "BatchRenorm":
        rstd = 1 / s["std"]
    else:
        epsilon = options["sigma"] ** 2 if "sigma" in options else 1e-5
        rstd = 1 / np.sqrt(share * x.var(1, keepdims=True) + (1 - share) * s["var"] + epsilon)
    z, size = (x - mean) * rstd, (abs(x) + abs(mean)) * rstd
    through_mean = -(scale * rstd * dy).sum(1, keepdims=True) * share / M
    through_var = -(scale * dy * z * rstd**2).sum(1, keepdims=True) * share * (x - own) / M
    sum_of = lambda a: a.sum((0, 1))  # noqa: E731
    dx = scale * rstd * dy + through_mean + through_var
    of_dx = abs(scale * rstd) * (abs(dy) + share * (abs(dy) * (1 + size**2)).sum(1, keepdims=True))
    return {
        "y": oracles.Bounded(z * scale + bias, size * abs(scale) + abs(bias)),
        "x": oracles.Bounded(dx, of_dx),
        "scale": oracles.Bounded(sum_of(dy * z), sum_of(abs(dy) * size)),
        "bias": oracles.Bounded(sum_of(dy), sum_of(abs(dy))),
    }


def moved_mean(norm, state, given):
    """By the mean of the batch; by that of each group in turn where they are taken so."""
    x, state = oracles.wide(given["x"]), {k: oracles.wide(v) for k, v in state.items() if k in ("mean", "count")}
    for part in x.reshape(2, -1, C) if norm.endswith("each") else [x.reshape(-1, C)]:
        state = oracles.running_update(state, {"mean": part.mean(0)}, np.ones(C), 0.99)
    return oracles.Bounded(state["mean"], abs(state["mean"]) + abs(x).max((0, 1)))


def same(one, two):
    """In structure, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("norm", "api", "switches", "mode"), ROWS)
def test_the_switches(norm, api, switches, mode):
    given, state, options = inputs(), state_of(norm), MODES[mode]
    frozen = tools.freeze(state, **SWITCHES[switches])
    assert set(frozen) - set(state) == {mark for mark in MARKS if switches == "both" or mark.endswith(switches)}
    y, new, gradients = run(norm, api, frozen, given, **options)
    evaluates = switches != "updates" or options["use_running_average"]
    updates = switches == "statistics" and options.get("update_running", not options["use_running_average"])
    assert set(new) == set(frozen)
    if evaluates:
        want = formula(norm, state, given)
        for key, got in {"y": y, **gradients}.items():
            oracles.assert_close(got, want[key], N * M, what=key)
    else:
        of_training, _, gradients_of_training = run(norm, api, state, given, **options)
        same((of_training, gradients_of_training), (y, gradients))
    if updates:
        oracles.assert_close(new["mean"], moved_mean(norm, state, given), N * M, what="mean")
        _, unfrozen, _ = run(norm, api, state, given, use_running_average=True, update_running=True)
        same({k: v for k, v in new.items() if k not in MARKS}, unfrozen)
    else:
        same(new, frozen)
    same(tools.thaw(new), {k: v for k, v in new.items() if k not in MARKS})


# --- transformations, devices ----------------------------------------------------------------------------------------------------


def simple(**changes):
    return {"mean": jnp.arange(3.0), "var": jnp.arange(1.0, 4.0), **changes}


def test_in_loops_and_over_stacked_states():
    """A frozen state is a carry, and one that is stacked may be frozen before and after."""
    x, state = inputs()["x"], simple()
    frozen = tools.freeze(state)
    want, _ = jnorm.batch_norm(x, state, use_running_average=True)

    @jax.jit
    def looped(state, xs):
        return jax.lax.scan(lambda state, x: jnorm.batch_norm(x, state)[::-1], state, xs)

    end, ys = looped(frozen, jnp.stack([x, x]))
    same(end, frozen)
    np.testing.assert_array_equal(ys, jnp.stack([want, want]))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a + 1]), state)
    for many in (tools.freeze(stacked), jax.vmap(tools.freeze)(stacked)):
        ys, new = jax.jit(jax.vmap(jnorm.batch_norm, (None, 0)))(x, many)
        same(new, many)
        np.testing.assert_allclose(ys[0], want, rtol=1e-6, atol=1e-6)
    ys, new = jax.pmap(jnorm.batch_norm, in_axes=(None, 0))(x, tools.freeze(stacked))
    same(new, tools.freeze(stacked))
    np.testing.assert_allclose(ys[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["checked", "unchecked"])
@pytest.mark.parametrize("norm", pairwise.every_other([norm for norm in NORMS if norm not in ("eval_norm", "ghost_batch_norm each")]))
def test_no_collective(norm, mode):
    """In training, over devices; the gradients of scale and bias are summed by JAX where it is checked, unless nobody takes them."""
    given, frozen = inputs(), tools.freeze(state_of(norm))
    x = np.tile(given["x"], (4, 1, 1))  # two examples on each of eight devices

    def local(x, state):
        def y_of(x):
            options = {"axis_name": "d", "use_running_average": False}
            return by_function(norm, state, {"x": x, **{k: given[k] for k in affine}}, options)

        y, vjp, new = jax.vjp(y_of, x, has_aux=True)
        return y, new, vjp(y)[0]

    affine = ["bias"] if norm.startswith("mean_only") else ["scale", "bias"]
    specs = {"in_specs": (P("d"), P()), "out_specs": (P("d"), P(), P("d"))}
    run = jax.shard_map(local, mesh=distributed.mesh_of(), check_vma=mode == "checked", **specs)
    assert kinds(jax.jit(run).lower(x, frozen).compile()) == []


@pytest.mark.parametrize("switches", SWITCHES)
def test_modules_need_the_axis_where_they_take_statistics(switches):
    """ "d" is no axis here."""
    given, state = inputs(), simple()
    module = jnn.BatchNorm(use_running_average=False, axis_name="d", use_bias=False, use_scale=False)
    layer = jnx.BatchNorm(C, axis_name="d", use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
    frozen = tools.freeze({"batch_stats": state}, **SWITCHES[switches])
    calls = [
        lambda: module.apply(frozen, given["x"], mutable=["batch_stats"])[0],
        lambda: tools.freeze(layer, **SWITCHES[switches])(given["x"]),
    ]
    for call in calls:
        if switches == "both":
            assert call().shape == given["x"].shape
        else:
            with refuses("axis_name", "'d'"):
                call()


def test_layers_that_linen_scans():
    """Their states lie stacked in one collection."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnn.BatchNorm(use_running_average=False)(x), None

    scanned = nn.scan(Body, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)()
    x = inputs()["x"]
    variables = scanned.init(jax.random.key(0), x, None)
    variables = tools.freeze(variables | {"batch_stats": {"BatchNorm_0": jax.tree.map(lambda a: jnp.stack([a, 2 * a]), simple())}})
    (y, _), new = scanned.apply(variables, x, None, mutable=["batch_stats"])
    want, wide = oracles.wide(x), {k: oracles.wide(v) for k, v in simple().items()}
    for times in (1, 2):
        want = (want - times * wide["mean"]) / np.sqrt(times * wide["var"] + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    same(new["batch_stats"], variables["batch_stats"])


def test_statistics_that_are_given():
    """They normalize no frozen norm, but move it if only its statistics are frozen."""
    x, state = inputs()["x"], simple()
    given = jnorm.moments(x, (0, 1))
    want, _ = jnorm.batch_norm(x, state, use_running_average=True)
    y, new = jnorm.batch_norm(x, tools.freeze(state), statistics=given)
    np.testing.assert_array_equal(y, want)
    same(new, tools.freeze(state))
    y, new = jnorm.batch_norm(x, tools.freeze(state, updates=False), statistics=given)
    np.testing.assert_array_equal(y, want)
    same(tools.thaw(new), jnorm.update_running(state, given))
    layer = tools.freeze(jnx.BatchNorm(C, rngs=nnx.Rngs(0)))
    assert layer(x, statistics=given).shape == x.shape and float(abs(layer.mean[...]).max()) == 0
    with refuses("statistics", "use_running_average=True"):
        jnorm.batch_norm(x, tools.freeze(state), statistics=given, use_running_average=True)


# --- the other tools ---------------------------------------------------------------------------------------------------------------


def test_the_update_by_hand():
    given = jnorm.moments(inputs()["x"], (0, 1))
    frozen = tools.freeze(simple())
    assert jnorm.update_running(frozen, given) is frozen
    same(tools.thaw(jnorm.update_running(tools.freeze(simple(), updates=False), given)), jnorm.update_running(simple(), given))


def test_what_is_frozen_is_not_estimated_anew():
    """The layer before is settled, and normalizes what the other collects."""
    x, state = inputs()["x"], {"one": simple(), "two": simple()}

    def step(state, x):
        x, one = jnorm.batch_norm(x, state["one"])
        _, two = jnorm.batch_norm(x, state["two"])
        return {"one": one, "two": two}

    new = tools.recalibrate(step, tools.freeze(state, "one"), [x])
    same(new["one"], tools.freeze(simple()))
    between, _ = jnorm.batch_norm(x, simple(), use_running_average=True)
    np.testing.assert_allclose(new["two"]["mean"], between.mean((0, 1)), rtol=1e-5, atol=1e-5)
    with refuses("frozen", "thaw"):
        tools.recalibrate(step, tools.freeze(state), [x])
    model = nnx.Sequential(*[jnx.BatchNorm(C, rngs=nnx.Rngs(0)) for _ in range(2)])
    some = tools.recalibrate(lambda model, x: model(x), tools.freeze(model, "layers/0"), [x])
    same(nnx.state(some.layers[0]), nnx.state(tools.freeze(model).layers[0]))
    np.testing.assert_allclose(some.layers[1].mean[...], x.mean((0, 1)), rtol=1e-5)


def test_a_commit_leaves_what_is_frozen():
    x, state = inputs()["x"], {"one": simple(count=jnp.float32(2)), "two": simple(count=jnp.float32(2))}
    frozen = tools.freeze(state, "one")
    population = tools.population_state(frozen)
    population = {path: jnorm.batch_norm(x, one)[1] for path, one in population.items()}
    new = tools.commit_population(frozen, population)
    same(new["one"], frozen["one"])
    want = jnorm.batch_norm(x, state["two"])[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new["two"], want)


def test_synchronized():
    """Devices that differ are made one, frozen or not, and stay frozen."""
    for state in (simple(), {"mean": jnp.arange(3.0)}):
        stacked = jax.tree.map(lambda a: jnp.stack([a, a + 2]), state)
        sync = jax.vmap(lambda state: tools.sync_state(state, "d"), axis_name="d", out_axes=None)
        new = sync(tools.freeze(stacked))
        same(tools.thaw(new), sync(stacked))
        assert set(new) == {*state, *MARKS} and new["mean"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_weights_of_eval_norm_are_not_learned(api):
    x = inputs()["x"]
    if api == "nnx":
        layer = jnx.EvalNorm(C, learn_weights=True, rngs=nnx.Rngs(0))
        layer(x)
        layer = tools.freeze(layer)
        before = nnx.to_pure_dict(nnx.state(layer))
        layer(x)
        same(nnx.to_pure_dict(nnx.state(layer)), before)
    else:
        module = jnn.EvalNorm(learn_weights=True, use_running_average=False)
        variables = module.init(jax.random.key(0), x)
        variables = tools.freeze({**variables, **module.apply(variables, x, mutable=["batch_stats"])[1]})
        same(module.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"], variables["batch_stats"])


# --- trees and modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES)
def test_thawed_it_is_as_before(switches):
    options = SWITCHES[switches]
    variables = {"params": {"a": {"mean": jnp.ones(3)}}, "batch_stats": {"a": simple(), "b": {"c": simple(count=jnp.float32(1))}}}
    for tree in (variables, variables["batch_stats"], flax.core.freeze(variables), flax.core.freeze(simple()), [simple(), None]):
        frozen = tools.freeze(tree, **options)
        assert type(frozen) is type(tree) and jax.tree.structure(frozen) != jax.tree.structure(tree)
        same(tools.thaw(frozen, **options), tree)
        same(tools.freeze(frozen, **options), frozen)  # twice is as once
        same(tools.thaw(tree), tree)
    assert set(variables["batch_stats"]["a"]) == {"mean", "var"} and set(tools.freeze(variables)["params"]["a"]) == {"mean"}


def test_marks_are_like_the_mean():
    for dtype in (jnp.bfloat16, jnp.float32, jnp.complex64):
        frozen = tools.freeze(jnorm.batch_norm_state(3, dtype=dtype))
        assert all(frozen[mark].dtype == frozen["var"].dtype and frozen[mark].shape == (3,) for mark in MARKS)
    x = inputs()["x"].astype(np.complex64)
    y, new = jnorm.batch_norm(x, frozen)
    same(new, frozen)
    np.testing.assert_allclose(y, x, rtol=1e-5)
    layer = jnx.BatchNorm(C, rngs=nnx.Rngs(0))
    layer.mean = nnx.BatchStat(layer.mean[...], note="of the mean")
    assert tools.freeze(layer).frozen_updates.get_metadata("note") == "of the mean"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_abstract_ones(dtype):
    """As those that a checkpoint is loaded into: of the shapes, dtypes and shardings that real ones have."""
    sharding = NamedSharding(distributed.mesh_of(), P("d"))
    state = {
        "norm": jax.device_put(jnorm.batch_norm_state(8, track_count=True, dtype=dtype), {"mean": sharding, "var": sharding, "count": None})
    }
    like = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)  # noqa: E731
    frozen = tools.freeze(like(state))
    assert frozen == like(tools.freeze(state)) and frozen["norm"]["frozen_updates"].sharding == sharding
    assert tools.thaw(frozen) == like(state)
    assert jax.eval_shape(tools.freeze, state)["norm"].keys() == frozen["norm"].keys()


def test_abstract_models():
    make = lambda: nnx.Sequential(jnx.BatchNorm(C, track_count=True, rngs=nnx.Rngs(0)))  # noqa: E731
    abstract = tools.freeze(nnx.eval_shape(make))
    graphdef, want = nnx.split(abstract)
    real = nnx.state(tools.freeze(make()))
    assert jax.tree.structure(want) == jax.tree.structure(real)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(want)] == [(a.shape, a.dtype) for a in jax.tree.leaves(real)]
    x = inputs()["x"]
    np.testing.assert_allclose(nnx.merge(graphdef, real)(x), x, rtol=1e-5)
    assert nnx.graphdef(tools.thaw(abstract)) == nnx.graphdef(make())


def test_scalar_statistics():
    """With a count, which has their shape then."""
    state = jnorm.batch_norm_state((), track_count=True)
    same(tools.thaw(tools.freeze({"a": state})), {"a": state})
    assert set(tools.freeze(state)) == {*state, *MARKS}
    with refuses("no running statistics"):
        tools.freeze(jnorm.feature_statistics_state(3))


def test_switches_are_thawed_apart():
    frozen = tools.freeze({"a": simple(), "b": simple()})
    some = tools.thaw(frozen, "a", statistics=False)
    assert [set(some[path]) - {"mean", "var"} for path in "ab"] == [{"frozen_statistics"}, set(MARKS)]


def test_no_call_of_the_model_thaws():
    model = nnx.Sequential(jnx.BatchNorm(C, rngs=nnx.Rngs(0)), nnx.Dropout(0.0, rngs=nnx.Rngs(0)))
    x = inputs()["x"]
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    frozen = tools.freeze(model)
    same(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)  # the model itself is not
    frozen.train()
    views = [frozen, nnx.view(frozen, use_running_average=False, update_running=True, deterministic=False), nnx.clone(frozen)]
    for view in (*views, nnx.merge(*nnx.split(frozen))):
        y = nnx.jit(lambda model, x: model(x))(view, x)
        np.testing.assert_allclose(y, x, rtol=1e-5)
        same(nnx.to_pure_dict(nnx.state(tools.thaw(view), nnx.BatchStat)), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    thawed = tools.thaw(frozen)
    assert nnx.graphdef(thawed) == nnx.graphdef(model)
    thawed(x)
    assert abs(thawed.layers[0].mean[...]).max() > 0 and abs(frozen.layers[0].mean[...]).max() == 0


@pytest.mark.parametrize(("api", "way"), [(api, way) for api, ways in CHECKPOINTS.items() for way in ways])
def test_saved_and_loaded(api, way, tmp_path):
    if api == "linen":
        state = tools.freeze({"params": {"norm": {"scale": jnp.ones(3)}}, "batch_stats": {"norm": simple()}})
        like = jax.tree.map(jnp.zeros_like, state)
    else:
        model = tools.freeze(jnx.BatchNorm(C, rngs=nnx.Rngs(0)))
        state, like = nnx.state(model), nnx.state(nnx.clone(model))
    same(CHECKPOINTS[api][way](state, like, tmp_path), state)


def test_refusals():
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    norm = jnx.LayerNorm(3, rngs=nnx.Rngs(0))
    for tool in (tools.freeze, tools.thaw):
        with refuses("layers='encoder'", "'a'", "'b/c'"):
            tool({"a": simple(), "b": {"c": simple()}}, "encoder")
        with refuses("layers='encoder'", "layers/1"):
            tool(model, "encoder")
        with refuses("'layers/0'", "flax.nnx.BatchNorm", "jnorm.nnx.BatchNorm"):
            tool(model)
        for tree in ({"params": {"a": {"mean": jnp.ones(3)}}}, {"a": jnp.ones(3)}, {"batch_stats": {}}):
            with refuses("no running statistics"):
                tool(tree)
        with refuses("no norm with running statistics"):
            tool(norm)
        with refuses("statistics and updates"):
            tool(simple(), statistics=False, updates=False)
        for state in (nnx.state(model), nnx.to_flat_state(nnx.state(model)), {"a": dict(mean=model.layers[1].mean)}):
            with refuses("NNX", "give the model", kind=TypeError):
                tool(state)
        with refuses("Linen", "variables", kind=TypeError):
            tool(jnn.BatchNorm())
        for models in ([norm, model], {"a": [model]}):
            with refuses("nnx.List", kind=TypeError):
                tool(models)
    assert not hasattr(tools.freeze(model, "layers/1").layers[0], "frozen_updates")
    assert hasattr(tools.freeze(nnx.List([model]), "0/layers/1")[0].layers[1], "frozen_updates")


def test_a_mark_of_another_shape():
    with refuses("frozen_updates", "(3,)", "()"):
        jnorm.batch_norm(inputs()["x"], simple(frozen_updates=jnp.float32(0)))
    with refuses("BatchNorm at layers_0", "frozen_updates", "(2,)"):
        model = nn.Sequential([jnn.BatchNorm(use_running_average=False)])
        variables = model.init(jax.random.key(0), inputs()["x"])
        variables["batch_stats"]["layers_0"]["frozen_updates"] = jnp.zeros(2)
        model.apply(variables, inputs()["x"], mutable=["batch_stats"])
