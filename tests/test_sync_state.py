"""Running statistics of several devices made one: each kind of state, in each way of being parallel, against the formulas in float64."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import oracles
from distributed import first, mesh_of
from jnorm import _stats, tools
from oracles import Bounded, wide
from refusals import refuses
from test_collectives import kinds

DEVICES, C = 8, 3
GROUPS = [[0, 3, 4, 7], [1, 2, 5, 6]]
sync = functools.partial(tools.sync_state, axis_name="d")

# --- ways to be parallel: `f` of each device's tree, all of them stacked along the first axis -----------------------------------


def on_devices(tree, **options):
    """Each leaf stacked -> a function of it within shard_map, where a device's part has no leading axis."""
    return lambda f, out: jax.jit(
        jax.shard_map(lambda t: f(jax.tree.map(lambda a: a[0], t)), mesh=mesh_of(), in_specs=P("d"), out_specs=out, **options)
    )(tree)


MODES = {
    "pmap": lambda f, tree: first(jax.pmap(f, "d")(tree)),
    "shard_map": lambda f, tree: on_devices(tree)(f, P()),
    "shard_map unchecked": lambda f, tree: on_devices(tree, check_vma=False)(f, P()),
    "vmap": lambda f, tree: by_vmap(f, tree),
}


def by_vmap(f, tree, out_axes=None):
    """What is the same everywhere, a single time."""
    return jax.jit(jax.vmap(f, axis_name="d", out_axes=out_axes))(tree)


# --- every kind of state, and what becomes of it ---------------------------------------------------------------------------------


def states(rng, devices=DEVICES):
    """A tree with each kind of state that the library has, different on each device. Some devices counted nothing."""

    def means(*shape):
        return (3 * rng.normal(size=(devices, *shape))).astype(np.float32)

    def variances(*shape):
        return rng.uniform(0.5, 2, (devices, *shape)).astype(np.float32)

    def numbers(*shape):
        return rng.integers(0, 9, (devices, *shape)).astype(np.float32)

    def running(*shape):
        return {"mean": means(*shape), "var": variances(*shape)}

    index = np.full(devices, 2, np.int32)
    window = {key: means(2, *shape) for key, shape in {"means": (C,), "patches": (4, 1), "slopes": (4, C), "kernels": (4, C)}.items()}
    window |= {"vars": variances(2, C), "counts": numbers(2) + 1, "index": index}
    mini = {"batch_mean": means(C), "batch_var": variances(C), "batch_count": numbers(C), "index": index}
    return {
        "two feature axes": running(C, 2),
        "counted": running(C) | {"count": numbers() / 2},
        "never counted": running(C) | {"count": np.zeros(devices, np.float32)},
        "renorm": {"mean": means(C), "std": variances(C), "count": numbers()},
        "mean only": {"mean": means(C)},
        "pooled": running(C) | {"values": numbers(C), "count": numbers()},
        "of batches": running(C) | {"batches": numbers(C)},
        "mean only, pooled": {"mean": means(C), "values": numbers(C)},
        "mini batches": running(C) | mini,
        "window": running(C) | window,
        "spectral": {"u": means(1, C), "sigma": variances()},
        "layer": {"layer_instance/kernel/u": means(1, C), "layer_instance/kernel/sigma": variances(), "norm": running(C)},
        "input": running(C) | {"count": numbers(C)},
        "eval": running(C) | {key: means(C) for key in ("mean_product", "mean_square", "var_product", "var_square")},
    }


def mixed(mean, var=None, weight=None):
    """-> the mean and variance of everybody's, by weight, or alike where nobody has one; as (value, size)."""
    mean = wide(mean)
    weight = np.ones(len(mean)) if weight is None else wide(weight)
    weight = np.broadcast_to(weight.reshape(weight.shape + (1,) * (mean.ndim - weight.ndim)), mean.shape)
    total = weight.sum(0)
    share = np.where(total > 0, weight / np.where(total > 0, total, 1), 1 / len(mean))
    center = (share * mean).sum(0)
    var = np.zeros_like(mean) if var is None else wide(var)
    spread = share * (var + (mean - center) ** 2)
    return Bounded(center, (share * abs(mean)).sum(0)), Bounded(spread.sum(0), spread.sum(0))


def wanted(name, state):
    """From the definitions: {entry: Bounded}."""
    weight = next((state[key] for key in ("values", "batches", "count") if key in state), None)
    want = {}
    if "mean" in state:
        second = wide(state["std"]) ** 2 if "std" in state else state.get("var")
        want["mean"], total = mixed(state["mean"], None if name == "of batches" else second, weight)
        if "batches" in state:
            total, _ = mixed(second, None, weight)
        if "std" in state:
            want["std"] = Bounded(np.sqrt(total.value), np.sqrt(total.size))
        if "var" in state:
            want["var"] = total
    for key in ("values", "batches"):
        if key in state:
            want[key] = Bounded(state[key].sum(0), state[key].sum(0))
    for key in ("count", "mean_product", "mean_square", "var_product", "var_square"):
        if key in state:
            want[key] = mixed(state[key])[0]
    over = {"mini batches": ("batch_mean", "batch_var", "batch_count", "index")}.get(name, ())
    over = ("means", "vars", "patches", "slopes", "kernels", "counts", "index") if name == "window" else over
    want |= {key: Bounded(np.zeros(state[key].shape[1:]), np.zeros(state[key].shape[1:])) for key in over}
    want |= {key: Bounded(wide(a[0]), 0 * abs(wide(a[0]))) for key, a in state.items() if key.split("/")[-1] in ("u", "sigma")}
    return want | ({"norm": wanted("", state["norm"])} if "norm" in state else {})


def check(got, given):
    """Sums of eight, twice: of the means around one of them, and of what is left."""

    def entries(got, want, path):
        assert set(got) == set(want), path
        for key, value in want.items():
            if isinstance(value, dict):
                entries(got[key], value, f"{path}/{key}")
            else:
                oracles.assert_close(np.asarray(got[key], np.float32), value, 4 * DEVICES, what=f"{path}/{key}")

    for name, state in given.items():
        entries(got[name], wanted(name, state), name)
        for key in set(state) - {"norm"}:
            assert got[name][key].dtype == state[key].dtype


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_state(mode, rng):
    """With check_vma the result is typed as replicated, which out_specs=P() takes."""
    given = states(rng)
    check(MODES[mode](sync, given), given)


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_above_the_limit_of_the_gather(mode, rng, monkeypatch):
    monkeypatch.setattr(_stats, "GATHER_LIMIT", 1)
    given = states(rng)
    check(MODES[mode](sync, given), given)


def test_more_than_64_participants(rng):
    given = {"norm": states(rng, devices=72)["counted"]}
    got = by_vmap(sync, given)["norm"]
    for key, want in wanted("", given["norm"]).items():
        oracles.assert_close(got[key], want, 4 * 72, what=key)


@pytest.mark.parametrize("mode", ["shard_map", "vmap", pytest.param("pmap", marks=pytest.mark.slow)])
def test_groups(mode, rng):
    """Each group by itself: in shard_map with check_vma, and in vmap, JAX's own collectives take no groups."""
    given = states(rng)
    grouped = functools.partial(sync, axis_index_groups=GROUPS)
    if mode == "shard_map":
        got = on_devices(given)(lambda t: jax.tree.map(lambda a: a[None], grouped(t)), P("d"))
    else:
        got = jax.pmap(grouped, "d")(given) if mode == "pmap" else by_vmap(grouped, given, 0)
    for group in GROUPS:
        members = jax.tree.map(lambda a, group=group: np.asarray(a)[np.asarray(group)], (got, given))
        check(first(members[0]), members[1])


def test_several_axes_and_a_channel_axis_that_is_sharded_too(rng):
    """One norm's features are split over the other axis of the mesh, another's are not: each keeps its type, and needs no cast."""
    split = {"mean": rng.normal(size=(4, 2, C)), "var": rng.uniform(1, 2, (4, 2, C))}
    split = {k: v.astype(np.float32) for k, v in split.items()}
    whole = jax.tree.map(lambda a: a[:, 0], split)
    given, specs = {"split": split, "whole": whole}, {"split": P("data", "model"), "whole": P("data")}
    mesh = mesh_of((4, 2), ("data", "model"))

    def run(names, specs, out):
        f = lambda t: tools.sync_state(jax.tree.map(lambda a: a[0], t), names)  # noqa: E731
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=out))

    got = run("data", specs, {"split": P("model"), "whole": P()})(given)
    for name, state in given.items():
        for key, want in wanted("", state).items():
            oracles.assert_close(got[name][key], want, 4 * DEVICES, what=f"{name} {key}")
    flat = jax.tree.map(lambda a: a.reshape(8, C), split)
    got = run(("data", "model"), P(("data", "model")), P())({"all": flat})["all"]
    for key, want in wanted("", flat).items():
        oracles.assert_close(got[key], want, 4 * DEVICES, what=key)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("manual", [False, True])
def test_what_the_compiler_partitions(kind, manual, rng):
    """States that lie sharded: stacked along an axis of the mesh, under vmap; and a channel axis that a partly manual mesh leaves."""
    given = {"one": {"mean": means(rng, 4), "var": 1 + means(rng, 4) ** 2}, "two": {"mean": means(rng, 6), "var": 1 + means(rng, 6) ** 2}}
    given["one"]["count"] = 1 + np.arange(8, dtype=np.float32)
    given = jax.tree.map(lambda a: a[:4], given)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto if manual else kind, kind))
    specs = jax.tree.map(lambda a: P("d", "m") if a.shape == (4, 4) else P("d"), given)
    placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), given, specs)
    with jax.set_mesh(mesh):
        if manual:
            of_shard = lambda t: sync(jax.tree.map(lambda a: a[0], t))  # noqa: E731
            got = jax.jit(jax.shard_map(of_shard, in_specs=P("d"), out_specs=P(), axis_names={"d"}))(placed)
        else:
            got = by_vmap(sync, placed)
    for name, state in given.items():
        for key, want in wanted("", state).items():
            oracles.assert_close(np.asarray(got[name][key]), want, 4 * DEVICES, what=f"{name} {key}")
    assert got["one"]["mean"].sharding.spec == P("m")


def means(rng, *shape):
    return rng.normal(size=(DEVICES, *shape)).astype(np.float32)


@pytest.mark.parametrize("limit", [64, 1])
def test_one_collective_for_the_whole_tree(limit, rng, monkeypatch):
    """Above 64 participants two all-reduces. With a state among others that is replicated already."""
    monkeypatch.setattr(_stats, "GATHER_LIMIT", limit)
    apart, same = states(rng), {"same": {"mean": np.ones(C, np.float32)}}
    run = lambda apart, same: sync({"apart": jax.tree.map(lambda a: a[0], apart), **same})  # noqa: E731
    run = jax.shard_map(run, mesh=mesh_of(), in_specs=(P("d"), P()), out_specs=P())
    program = jax.jit(run).lower(apart, same).compile()
    assert kinds(program) == (["all-gather"] if limit == 64 else ["all-reduce"] * 2)


def test_twice_is_once(rng):
    """The second time they are replicated already. Populations are added up, and are no part of it."""
    given = {name: state for name, state in states(rng).items() if not {"values", "batches"} & set(state)}
    once = MODES["shard_map"](sync, given)
    twice = jax.jit(jax.shard_map(sync, mesh=mesh_of(), in_specs=P(), out_specs=P()))(once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), twice, once)


def test_a_large_mean_keeps_its_variance(rng):
    """Around 1e4 squares of float32 would leave no digit of a variance of 1; the mean itself is rounded by up to 1e4·eps/2."""
    given = {"mean": (1e4 + rng.normal(size=(DEVICES, C))).astype(np.float32), "var": np.full((DEVICES, C), 0.25, np.float32)}
    for limit in (64, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_stats, "GATHER_LIMIT", limit)
            got = by_vmap(sync, given)
        want = wanted("", given)
        oracles.assert_close(got["mean"], want["mean"], 4 * DEVICES, what="mean")
        oracles.assert_close(got["var"], want["var"], 4 * DEVICES, what="var")


def test_what_is_not_finite_and_has_no_weight():
    """A device that counted nothing may hold anything."""
    given = {"mean": np.float32([[1], [np.nan], [3]]), "var": np.float32([[1], [np.inf], [1]]), "count": np.float32([2, 0, 2])}
    got = by_vmap(sync, given)
    assert got["mean"].tolist() == [2] and got["var"].tolist() == [2]


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "float64", "complex128"])
def test_dtypes(dtype, rng):
    """Entries keep theirs. Bfloat16 is merged in float32: of eight and their mean in bfloat16 the variance would be wrong by a percent."""
    with jax.enable_x64(dtype in ("float64", "complex128")):
        values = 4 + rng.normal(size=(2, DEVICES, C))
        mean = jnp.asarray(values[0] + 1j * values[1] if "complex" in dtype else values[0]).astype(dtype)
        var = jnp.ones((DEVICES, C), mean.real.dtype)
        got = by_vmap(sync, {"mean": mean, "var": var, "count": jnp.full(DEVICES, 2, jnp.float32)})
        assert {k: v.dtype for k, v in got.items()} == {"mean": mean.dtype, "var": var.dtype, "count": jnp.float32}
        exact = np.asarray(mean).astype(np.complex128)
        eps = float(jnp.finfo(mean.dtype).eps)
        center = exact.mean(0)
        np.testing.assert_allclose(np.asarray(got["mean"]).astype(np.complex128), center, atol=16 * eps)
        np.testing.assert_allclose(
            np.asarray(got["var"]).astype(np.float64), 1 + (abs(exact - center) ** 2).mean(0), rtol=eps if dtype == "bfloat16" else 32 * eps
        )


def test_populations_are_merged_as_by_hand(rng):
    """As `merge_populations` of all of them, one after the other: one way to do it."""
    for estimator in ("pooled", "mean"):
        start = tools.population_state({"norm": jnorm.batch_norm_state(C)}, estimator=estimator)
        x = rng.normal(size=(DEVICES, 6, C)).astype(np.float32)
        mask = rng.uniform(size=(DEVICES, 6, 1)) < 0.6
        mask[3] = False
        collect = lambda x, mask, start=start: {"norm": jnorm.batch_norm(x, start["norm"], mask=mask)[1]}  # noqa: E731
        collected = jax.jit(jax.vmap(collect))(x, mask)
        got = MODES["vmap"](sync, collected)
        by_hand = functools.reduce(tools.merge_populations, [jax.tree.map(lambda a, i=i: a[i], collected) for i in range(DEVICES)])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, by_hand)


# --- trained without synchronization, evaluated on one device ---------------------------------------------------------------------


def batches(rng, steps=3, rows=4):
    """(steps, devices, rows, C), with devices that see different data."""
    apart = 2 * rng.normal(size=(DEVICES, 1, C))
    return (rng.normal(size=(steps, DEVICES, rows, C)) + apart).astype(np.float32)


def trained(step, x, mode="shard_map", state=None):
    """Each device with its own state through all steps; then one state of all."""
    state = jnorm.batch_norm_state(C, track_count=True) if state is None else state

    def run(x):
        own = state if mode != "shard_map" else jax.tree.map(lambda a: jax.lax.pcast(a, "d", to="varying"), state)
        return sync(jax.lax.scan(lambda s, x: (step(x, s), None), own, x)[0])

    return MODES[mode](run, np.moveaxis(x, 1, 0))


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_trained_apart_then_evaluated(mode, rng):
    """The cumulative average of equal batches: everybody's mean is that of all it saw, and of all of them that of all data."""
    x = batches(rng)
    state = trained(lambda x, s: jnorm.batch_norm(x, s, momentum=None)[1], x, mode)
    data = x.astype(np.float64)
    own = data.mean((0, 2))
    mean = own.mean(0)
    var = data.var(2).mean((0, 1)) + own.var(0)
    np.testing.assert_allclose(state["mean"], mean, atol=64 * 2.0**-24 * abs(data).max())
    np.testing.assert_allclose(state["var"], var, rtol=64 * 2.0**-24)
    assert float(state["count"]) == len(x)
    y, same = jnorm.batch_norm(x[0, 0], state, use_running_average=True)
    np.testing.assert_allclose(y, (data[0, 0] - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    assert same is state


def test_one_step_is_that_of_the_whole_batch(rng):
    """Of a single step, all of whose batch enters the state, nothing is lost: the statistics of the whole batch. Without the second
    term, as in a mean of the states, they are not."""
    x = batches(rng, steps=1)
    state = trained(lambda x, s: jnorm.batch_norm(x, s, momentum=0.0)[1], x, state=jnorm.batch_norm_state(C))
    whole = x.astype(np.float64).reshape(-1, C)
    np.testing.assert_allclose(state["mean"], whole.mean(0), atol=64 * 2.0**-24 * abs(whole).max())
    np.testing.assert_allclose(state["var"], whole.var(0), rtol=64 * 2.0**-24)
    assert (x.var(2).mean((0, 1)) < 0.5 * whole.var(0)).all()


def test_trained_in_groups(rng):
    """Four groups of two: within a group the states are the same, and all of them are made one."""
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    x = batches(rng)
    state = trained(lambda x, s: jnorm.batch_norm(x, s, momentum=None, axis_name="d", axis_index_groups=groups)[1], x)
    data = x.astype(np.float64).reshape(3, 4, -1, C)
    own = data.mean((0, 2))
    np.testing.assert_allclose(state["mean"], own.mean(0), atol=64 * 2.0**-24 * abs(data).max())
    np.testing.assert_allclose(state["var"], data.var(2).mean((0, 1)) + own.var(0), rtol=64 * 2.0**-24)


@pytest.mark.parametrize("name", ["ghost_batch_norm", "tracked_instance_norm"])
def test_variances_within_groups_and_samples(name, rng):
    """Without the second term it is what the norm on one device makes of the whole batch: both average variances."""
    x = batches(rng)[..., None, :] * np.float32([[1], [2]])  # two positions
    norm = functools.partial(jnorm.ghost_batch_norm, group_size=2) if "ghost" in name else jnorm.tracked_instance_norm
    train = lambda x: jax.lax.scan(lambda s, x: (norm(x, s)[1], None), jnorm.batch_norm_state(C), x)[0]  # noqa: E731
    one = jax.jit(train)(x.reshape(len(x), -1, 2, C))
    got = by_vmap(lambda x: sync(train(x), between_devices=False), np.moveaxis(x, 1, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, one)


def test_counts_go_on_as_steps(rng):
    """Trained apart, synchronized, trained apart and synchronized again: the cumulative average over all batches."""
    x = batches(rng, steps=5)
    step = lambda x, s: jnorm.batch_norm(x, s, momentum=None)[1]  # noqa: E731
    state = trained(step, x[2:], state=trained(step, x[:2]))
    assert float(state["count"]) == 5
    np.testing.assert_allclose(state["mean"], x.astype(np.float64).mean((0, 1, 2)), atol=1e-5)


# --- Flax -------------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jnn.BatchNorm(use_running_average=not train, momentum=0.0)(nn.Dense(C)(x))
        return jnn.BatchRenorm(use_running_average=not train, momentum=0.0)(x)


class WithStatistics(TrainState):
    batch_stats: flax.core.FrozenDict | dict


def test_train_state_of_linen_with_pmap(rng):
    """`replicate`, steps on each device by itself, the states made one before evaluation, `unreplicate`. Each batch renormalization moved
    by what its own device gave."""
    net, x = Net(), batches(rng)[0]
    variables = net.init(jax.random.key(0), x[0], train=True)
    start = WithStatistics.create(
        apply_fn=net.apply, params=variables["params"], tx=optax.sgd(0.1), batch_stats=flax.core.freeze(variables["batch_stats"])
    )

    def step(state, x):
        def loss(params):
            y, updates = state.apply_fn({"params": params, "batch_stats": state.batch_stats}, x, train=True, mutable=["batch_stats"])
            return (y**2).mean(), flax.core.freeze(updates["batch_stats"])

        gradients, stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=jax.lax.pmean(gradients, "d")).replace(batch_stats=stats)

    def together(state):
        """The train state in whole is a tree with states in it as well."""
        return state.replace(batch_stats=sync(state.batch_stats)), sync(state)

    apart = jax.pmap(step, axis_name="d")(jax_utils.replicate(start), x)
    state, whole = jax_utils.unreplicate(jax.pmap(together, axis_name="d")(apart))
    assert isinstance(state.batch_stats, flax.core.FrozenDict) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, whole, state)
    stats = jax.tree.map(np.asarray, flax.core.unfreeze(apart.batch_stats))
    for name, entries in stats.items():
        for key, want in wanted(name, entries).items():
            oracles.assert_close(np.asarray(state.batch_stats[name][key]), want, 4 * DEVICES, what=f"{name} {key}")
    net.apply({"params": state.params, "batch_stats": state.batch_stats}, x[0], train=False)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(C, C, rngs=rngs)
        self.norm = jnx.BatchNorm(C, momentum=0.0, rngs=rngs)
        self.tracked = jnx.TrackedInstanceNorm(C, momentum=0.0, rngs=rngs)
        self.wrapped = jnx.SpectralNorm(nnx.Linear(C, C, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        return self.wrapped(self.norm(x) + self.tracked(x))


STATS_APART = nnx.StateAxes({nnx.BatchStat: 0, ...: None})


def apart_in_nnx(rng):
    """A model whose statistics have an axis of devices in front, each trained on other data. -> the model, its statistics"""
    model, x = NnxNet(nnx.Rngs(0)), batches(rng)[0][:, :, None] + np.float32([[0], [1]])
    nnx.update(model, jax.tree.map(lambda a: jnp.stack([a] * DEVICES), nnx.state(model, nnx.BatchStat)))
    nnx.pmap(lambda m, x: m(x), in_axes=(STATS_APART, 0), axis_name="d")(model, x)
    return model, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def sync_in_place(model):
    assert sync(model) is model


def synced(model, mode):
    if mode == "shard_map":  # each device's part has an axis of 1 in front, which is one of its features'
        placed = nnx.StateSharding({nnx.BatchStat: P("d"), ...: P()})
        nnx.jit(nnx.shard_map(sync_in_place, mesh=mesh_of(), in_specs=(placed,), out_specs=P()))(model)
    else:
        mapped = {"pmap": nnx.pmap, "vmap": nnx.vmap}[mode]
        mapped(sync_in_place, in_axes=(STATS_APART,), axis_name="d")(model)
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def check_nnx(got, before, within=()):
    for name in ("norm", "tracked"):
        want = wanted("", before[name])
        if name in within:
            want["var"] = mixed(before[name]["var"])[0]
        for key, bounded in want.items():
            oracles.assert_close(np.asarray(got[name][key]), bounded, 4 * DEVICES, what=f"{name} {key}")
    u = before["wrapped"]["batch_stats"][("kernel", "u")]
    np.testing.assert_array_equal(got["wrapped"]["batch_stats"][("kernel", "u")], u[0])


@pytest.mark.parametrize("mode", ["pmap", "shard_map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_nnx_model(mode, rng):
    """The model's statistics are set, here those of each device. Of a tracked instance norm variances are averaged alone."""
    model, before = apart_in_nnx(rng)
    check_nnx(first(synced(model, mode)), before, within=["tracked"])


def test_nnx_state(rng):
    """Of which nothing but a BatchStat is a running statistic, and in which no class is known."""
    model, before = apart_in_nnx(rng)
    stats = nnx.state(model, nnx.BatchStat)
    got = by_vmap(sync, stats, 0)
    assert jax.tree.structure(got) == jax.tree.structure(stats) and isinstance(got["norm"]["mean"], nnx.BatchStat)
    check_nnx(first(nnx.to_pure_dict(got)), before)
    with refuses("no running statistics"):
        params = nnx.State({"norm": {"mean": nnx.Param(jnp.ones((2, 1))), "var": nnx.Param(jnp.ones((2, 1)))}})
        jax.vmap(sync, axis_name="d")(params)


# --- refused ----------------------------------------------------------------------------------------------------------------------


def test_no_axis():
    state = jnorm.batch_norm_state(1)
    with refuses("'d' is not bound", "none") as refused:
        sync(state)
    assert "out_axes=None" in refused.value.__notes__[0]
    for nothing in (None, ()):
        with refuses("axis_name", "differ over", "jax.vmap"):
            tools.sync_state(state, nothing)
    with refuses("axis_index_groups", "axis_name"):
        tools.sync_state(state, None, axis_index_groups=[[0]])


@pytest.mark.parametrize("tree", [{"kernel": jnp.ones((2, 3))}, {"mean": jnp.ones((2, 3)), "kernel": jnp.ones((2, 3))}, [jnp.ones(2)], {}])
def test_no_running_statistics(tree):
    with refuses("no running statistics"):
        jax.vmap(sync, axis_name="d", axis_size=2)(tree)


def test_a_model_without_running_statistics():
    with refuses("no running statistics"):
        jax.vmap(lambda _: sync(nnx.Linear(1, 1, rngs=nnx.Rngs(0))).kernel[...], axis_name="d")(np.ones(2))


def test_what_is_no_state_stays(rng):
    """Parameters, and an entry that the library does not know."""
    given = {
        "norm": {"mean": np.float32([[1], [3]]), "var": np.float32([[1], [1]]), "mine": np.arange(2)},
        "kernel": np.float32([[5], [6]]),
    }
    got = by_vmap(sync, given, 0)
    assert got["norm"]["mine"].tolist() == [0, 1] and got["kernel"].tolist() == [[5], [6]]
    assert got["norm"]["mean"].tolist() == [[2], [2]] and got["norm"]["var"].tolist() == [[2], [2]]
