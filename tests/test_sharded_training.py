"""A transformer block trained on eight devices in every common way is that of one device: losses, parameters, running statistics.

Compared with plain norms in float64 on one device (`block.by_plain`). Float64 unless a test says otherwise: a wrong term cannot hide.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import block
import training
from block import APIS, AXES, LAYOUTS, STATS_AXES, Layout, Names, in_api, on
from test_collectives import collectives

SLOW = [pytest.mark.slow]


def check(got, optimizer, dtype="float64"):
    training.check(got, block.reference(optimizer), block.numbers(), dtype)


def start(layout, mesh, dtype="float64"):
    """-> (params, stats, batches), placed."""
    params, stats = (training.cast(v, dtype) for v in block.numbers())
    batches = training.cast(block.batches(), dtype)
    stream = block.ACTIVATIONS["residual"]
    placed = layout.put(batches, [dict.fromkeys(b, stream) for b in batches], mesh)
    return layout.put(params, AXES, mesh), layout.put(stats, STATS_AXES, mesh), placed


def assert_lies(tree, like):
    """As `like`, and truly in parts where that is."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        assert a.addressable_shards[0].data.shape == b.addressable_shards[0].data.shape


def moments_of(opt_state, params):
    """The optimizer's trees of the parameters' structure."""
    same = jax.tree.structure(params)
    return [t for t in jax.tree.leaves(opt_state, is_leaf=lambda t: jax.tree.structure(t) == same) if jax.tree.structure(t) == same]


# --- jit over sharded arrays --------------------------------------------------------------------------------------------------

ROWS = [
    # layout, explicit, api, optimizer, dtype
    ("data", False, "function", "sgd", "float64"),
    ("fsdp", True, "function", "adamw", "float64"),
    ("tensor", False, "nnx", "sgd", "float32"),
    ("sequence", False, "linen", "sgd", "float32"),
]
REST = [
    (layout, explicit, api, list(training.OPTIMIZERS)[(i + explicit + j) % 2], "float64")
    for i, layout in enumerate(LAYOUTS)
    for explicit in (False, True)
    for j, api in enumerate(APIS)
    if (layout, explicit, api) not in [row[:3] for row in ROWS]
]


@pytest.mark.parametrize(("layout", "explicit", "api", "optimizer", "dtype"), ROWS + [pytest.param(*row, marks=SLOW) for row in REST])
def test_jit_over_sharded_arrays(layout, explicit, api, optimizer, dtype):
    """No norm is told anything. On an explicit mesh the matrix products are (out_sharding)."""
    with jax.enable_x64(dtype == "float64"), on(LAYOUTS[layout], explicit) as mesh:
        params, stats, batches = start(LAYOUTS[layout], mesh, dtype)
        optimizer_ = training.OPTIMIZERS[optimizer]
        opt_state = training.placed_state(optimizer_, params, mesh)
        moments = moments_of(opt_state, params)
        assert len(moments) == {"adamw": 2, "sgd": 1}[optimizer]
        assert_lies(moments, [params] * len(moments))
        apply = in_api(api, block.OnMesh(LAYOUTS[layout], mesh, explicit))
        # On an explicit mesh the types say where everything goes; elsewhere the compiler is told.
        there = None if explicit else jax.tree.map(lambda a: a.sharding, (params, stats, opt_state))
        step = jax.jit(training.step_of(apply, optimizer_), out_shardings=None if explicit else (*there, None))
        got = training.repeated(step, params, stats, opt_state, batches)
        assert_lies((got.params, got.stats, got.opt_state), (params, stats, opt_state))
        check(got, optimizer, dtype)


# --- by hand, in shard_map ----------------------------------------------------------------------------------------------------

MANUAL = {  # the residual stream -> (layout, axis names of the norms)
    "whole": (
        Layout((2, 4), ("data", "model"), (("batch", "data"), *block.TENSOR, ("hidden_norm", "model"))),
        Names(None, "data"),
    ),
    "sequence": (LAYOUTS["sequence"], Names(None, "data")),
    "features": (
        Layout(
            (2, 4),
            ("data", "model"),
            (("batch", "data"), *block.TENSOR, ("stream", "model"), ("stream_norm", "model"), ("hidden_norm", "model")),
        ),
        Names("model", "data"),
    ),
}
BY_HAND = [
    # stream, check_vma, api, optimizer
    ("sequence", False, "nnx", "sgd"),
    ("features", True, "function", "sgd"),
]
BY_HAND_REST = [
    (stream, check_vma, api, "adamw")
    for stream in MANUAL
    for check_vma in (True, False)
    for api in APIS
    if (stream, check_vma, api) not in [row[:3] for row in BY_HAND]
]


@pytest.mark.parametrize(("stream", "check_vma", "api", "optimizer"), BY_HAND + [pytest.param(*row, marks=SLOW) for row in BY_HAND_REST])
def test_tensor_parallel_by_hand(stream, check_vma, api, optimizer, x64):
    """Megatron's: local matrix products, and what joins them. The model is differentiated from outside of the shard_map."""
    layout, names = MANUAL[stream]
    with on(layout, False) as mesh:
        params, stats, batches = start(layout, mesh)
        residual = layout.spec(block.ACTIVATIONS["residual"])
        apply = jax.shard_map(
            in_api(api, block.Manual(stream, layout), names),
            mesh=mesh,
            in_specs=(layout.specs(AXES), layout.specs(STATS_AXES), residual),
            out_specs=(residual, layout.specs(STATS_AXES)),
            check_vma=check_vma,
        )
        check(training.trained(apply, params, stats, batches, optimizer), optimizer)


def split_along(spec):
    """The axis that "data" splits, or None."""
    return next((i for i, name in enumerate(spec) if name == "data"), None)


def gathered(tree, specs):
    """Every parameter whole, from the devices' parts. Its transpose scatters the sum of the gradients."""
    return jax.tree.map(
        lambda a, spec: a if split_along(spec) is None else lax.all_gather(a, "data", axis=split_along(spec), tiled=True), tree, specs
    )


def own_part(tree, specs):
    def one(a, spec):
        axis = split_along(spec)
        size = a.shape[axis] // lax.axis_size("data")
        return lax.dynamic_slice_in_dim(a, lax.axis_index("data") * size, size, axis)

    return jax.tree.map(one, tree, specs)


def sharded_step(api, layout, optimizer, check_vma):
    """A whole step on one device's part: the parameters are gathered, used and left, and the optimizer moves a part of each."""
    specs, stats_specs = layout.specs(AXES), layout.specs(STATS_AXES)
    apply = in_api(api, block.Place(), Names(None, "data"))

    def step(params, stats, opt_state, batch):
        def part_of_loss(params):
            y, new = apply(gathered(params, specs), gathered(stats, stats_specs), batch["x"])
            return jnp.sum((y - batch["target"]) ** 2) / (y.size * lax.axis_size("data")), new

        (value, new), gradients = jax.value_and_grad(part_of_loss, has_aux=True)(params)
        if not check_vma:  # with it JAX has summed the gradients of what is not in parts
            gradients = jax.tree.map(lambda g, spec: lax.psum(g, "data") if split_along(spec) is None else g, gradients, specs)
        params, opt_state = training.moved(optimizer, params, gradients, opt_state)
        return params, own_part(new, stats_specs), opt_state, lax.psum(value, "data")

    return step


@pytest.mark.parametrize(
    ("api", "check_vma"),
    [("function", True)]
    + [pytest.param(api, check, marks=SLOW) for api in APIS for check in (False, True) if (api, check) != ("function", True)],
)
def test_fully_sharded_by_hand(api, check_vma, x64):
    layout, optimizer = LAYOUTS["fsdp"], training.OPTIMIZERS["adamw"]
    with on(layout, False) as mesh:
        params, stats, batches = start(layout, mesh)
        opt_state = training.placed_state(optimizer, params, mesh)
        state_specs = jax.tree.map(lambda a: a.sharding.spec if a.ndim else P(), opt_state)
        data = dict.fromkeys(("x", "target"), P("data"))
        trees = (layout.specs(AXES), layout.specs(STATS_AXES), state_specs)
        step = jax.shard_map(
            sharded_step(api, layout, optimizer, check_vma),
            mesh=mesh,
            in_specs=(*trees, data),
            out_specs=(*trees, P()),
            check_vma=check_vma,
        )
        got = training.repeated(jax.jit(step), params, stats, opt_state, batches)
        assert_lies((got.params, got.stats), (params, stats))
        check(got, "adamw")


# --- annotations of Flax's modules --------------------------------------------------------------------------------------------

NAMED = LAYOUTS["fsdp and tensor"]


def by_mesh_axes(api):
    return lambda init, axes: api.with_partitioning(init, tuple(NAMED.spec(axes)))


def by_logical_axes(init, axes):
    return nn.with_logical_partitioning(init, axes)


# The rest of both is slow.
@pytest.mark.parametrize(
    ("explicit", "logical"), [(False, True), *(pytest.param(*row, marks=SLOW) for row in ((True, False), (False, False), (True, True)))]
)
def test_linen_partitioning(explicit, logical, x64):
    """Parameters in their boxes, made where they belong, and trained there; the running statistics are put beside the scale."""
    module = block.LinenBlock(block.Place(), Names(), by_logical_axes if logical else by_mesh_axes(nn))
    # Not on the explicit mesh, where a box refuses what an initializer of Flax makes.
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(block.batches()[0]["x"]))
    with on(NAMED, explicit) as mesh:
        _, stats, batches = start(NAMED, mesh)
        module = module.clone(place=block.OnMesh(NAMED, mesh, explicit))
        specs = nn.get_partition_spec(boxed)["params"]
        if logical:
            specs = nn.logical_to_mesh(specs, NAMED.rules)
        assert specs == NAMED.specs(AXES)
        placed = NAMED.put(training.cast(block.numbers()[0], "float64"), AXES, mesh)
        params = jax.tree.map(lambda box, a: box.replace_boxed(a), boxed["params"], placed, is_leaf=lambda v: isinstance(v, nn.Partitioned))

        def apply(params, stats, x):
            y, updates = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        with nn.logical_axis_rules(NAMED.rules), contextlib.nullcontext() if explicit else jax.set_mesh(mesh):
            got = training.trained(apply, params, stats, batches, "adamw")
        check(got._replace(params=nn.unbox(got.params)), "adamw")


@pytest.mark.parametrize("explicit", [pytest.param(False, marks=SLOW), True], ids=["auto", "explicit"])
def test_nnx_partitioning(explicit, x64):
    """Variables are made where their annotations say, and so is what nnx.Optimizer keeps of each."""
    with on(NAMED, explicit) as mesh, contextlib.nullcontext() if explicit else jax.set_mesh(mesh):
        params, stats, batches = start(NAMED, mesh)
        model = block.NnxBlock(block.OnMesh(NAMED, mesh, explicit), Names(), by_mesh_axes(nnx), jnp.float64)
        assert_lies(nnx.state(model, nnx.Param), params)
        specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
        assert nnx.to_pure_dict(specs) == NAMED.specs(AXES)
        for kind, values in ((nnx.Param, params), (nnx.BatchStat, stats)):
            state = nnx.state(model, kind)
            nnx.replace_by_pure_dict(state, values)
            nnx.update(model, state)
        with jax.numpy_dtype_promotion("standard"):
            optimizer = nnx.Optimizer(model, training.OPTIMIZERS["sgd"], wrt=nnx.Param)
        traces = [a for a in jax.tree.leaves(nnx.state(optimizer)) if a.ndim]
        assert_lies(traces, params)

        @nnx.jit
        def step(model, optimizer, batch):
            value, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(batch["x"]) - batch["target"]) ** 2))(model)
            with jax.numpy_dtype_promotion("standard"):
                optimizer.update(model, gradients)
            return value

        losses = np.array([step(model, optimizer, batch) for batch in batches])
        got = [nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat)]
        check(training.Trained(losses, *got, None), "sgd")


# --- what travels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, pytest.param(True, marks=SLOW)], ids=["auto", "explicit"])
def test_a_fully_sharded_step_sends_parameters_alone(explicit):
    """No activation: what travels is at most the largest kernel or everybody's statistics, smaller than any activation of the batch."""
    layout, times = LAYOUTS["fsdp"], 4
    largest = max(*(int(np.prod([block.SIZES[a] for a in axes])) for axes in block.KERNELS.values()), 8 * 4 * block.HIDDEN)
    activation = times * block.BATCH * block.LENGTH * block.WIDTH
    with on(layout, explicit) as mesh:
        params, stats, batches = start(layout, mesh, "float32")
        batch = {k: jax.device_put(np.tile(v, (times, 1, 1)), v.sharding) for k, v in batches[0].items()}
        apply = in_api("function", block.OnMesh(layout, mesh, explicit))
        optimizer = optax.sgd(0.1)
        step = jax.jit(training.step_of(apply, optimizer))
        sent = collectives(step.lower(params, stats, optimizer.init(params), batch).compile())
    assert largest < activation and all(size <= largest for _, size in sent), sent
