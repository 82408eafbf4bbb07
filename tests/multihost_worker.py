"""What each process of tests/test_multihost.py runs: every check against the oracle on the whole batch, in the order of the command line.

python multihost_worker.py FOLDER CHECK...    writes FOLDER/<process>.json, {check: None, or its traceback}; four devices in all
"""

import functools
import json
import os
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import oracles
import test_module_devices as modules
from cases import BY_NAME, replace
from jnorm import linen as jnn
from jnorm import tools

DEVICES = 4
SHAPE = (16, 3, 2, 6)
RATE = 0.1
CHECKS = {}


def check(f):
    CHECKS[f.__name__] = f
    return f


# --- arrays over all processes ------------------------------------------------------------------------------------------------


def placed(given, spec=distributed.BATCH_SPEC, shape=(DEVICES,), names=("d",)):
    """Global arrays, of which each process makes the parts of its own devices."""
    mesh, where = distributed.mesh_of(shape, names), distributed.specs(given, spec)
    return {k: jax.tree.map(lambda a, k=k: place(a, NamedSharding(mesh, where[k])), v) for k, v in given.items()}


def place(a, sharding):
    a = np.asarray(a)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


def whole(tree):
    """In every process all of it."""
    return jax.tree.map(lambda a: np.asarray(a) if a.is_fully_replicated else multihost_utils.process_allgather(a, tiled=True), tree)


def compare(case, given, out):
    y, state, gradients = map(whole, out)
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)


def by_shard_map(case, given, local, spec=distributed.BATCH_SPEC, **options):
    assert jax.device_count() == DEVICES
    compare(case, given, distributed.by_shard_map(local, placed(given, spec), shape=(DEVICES,), spec=spec, **options))


def by_jit(case, given, run, spec=distributed.BATCH_SPEC, shape=(DEVICES,), names=("d",)):
    """No axis name; of the native kernels, each process compiles the same partitioned program."""
    layout = {"spec": spec, "shape": shape, "names": names}
    y, state, gradients = distributed.by_auto_mesh(run, placed(given, **layout), **layout)
    assert not y.is_fully_addressable and not y.is_fully_replicated
    compare(case, given, (y, state, gradients))


def batch(name, shape=SHAPE, **changes):
    """Masked, a different number on each device, and nothing on the second."""
    case = replace(BY_NAME[name], shape=shape, **changes)
    return case, cases.inputs(case, mask=distributed.uneven(np.random.default_rng(0), shape, slice(4, 8)))


# --- the checks ---------------------------------------------------------------------------------------------------------------


def shard_map_of(name, check_vma):
    case, given = batch(name)
    by_shard_map(case, given, cases.value_and_gradients(case, axis_name="d"), check_vma=check_vma)


@check
def shard_map_batch_norm():
    shard_map_of("batch_norm", True)


@check
def shard_map_unchecked_counted():
    shard_map_of("batch_norm_counted", False)


@check
def shard_map_batch_renorm():
    shard_map_of("batch_renorm", True)


@check
def shard_map_ghost():
    shard_map_of("ghost_batch_norm", False)


@check
def shard_map_mean_only():
    shard_map_of("mean_only_batch_norm", True)


@check
def shard_map_cross_iteration():
    """Its update sums slopes, of the kernel's size, over the devices."""
    case, given = batch("cross_iteration_batch_norm")
    kernel = {"kernel": given.pop("kernel")}
    by_shard_map(case, given | kernel, lambda local: cases.value_and_gradients(case, axis_name="d")(local))


@check
def shard_map_positions():
    """Group norm of samples whose rows lie on several hosts."""
    case = replace(BY_NAME["group_norm"], shape=(2, 16, 2, 6))
    mask = cases.mask_of((2, 16, 1, 1), np.random.default_rng(0))
    mask[0, 4:8] = False
    given = cases.inputs(case, mask=mask)
    by_shard_map(case, given, cases.value_and_gradients(case, axis_name="d"), spec=P(None, "d"))


@check
def shard_map_features():
    """Layer norm of rows that lie on several hosts, and scale and bias with them."""
    case = replace(BY_NAME["layer_norm"], shape=(4, 16), kept={0: 1}, features=(1,))
    given = cases.inputs(case)
    specs = {k: P("d") if v.ndim == 1 else P(None, "d") for k, v in given.items()}
    mesh = distributed.mesh_of((DEVICES,))
    run = jax.shard_map(
        lambda g: cases.value_and_gradients(case, axis_name="d")(g)[::2],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P(None, "d"), {k: specs[k] for k in case.differentiable}),
    )
    y, gradients = jax.jit(run)({k: place(v, NamedSharding(mesh, specs[k])) for k, v in given.items()})
    compare(case, given, (y, None, gradients))


def jit_of(name, shape=SHAPE):
    case, given = batch(name, shape)
    by_jit(case, given, cases.value_and_gradients(case))


@check
def jit_batch_norm():
    jit_of("batch_norm_relu_residual")


@check
def jit_tracked_instance_norm():
    jit_of("tracked_instance_norm")


@check
def jit_ghost():
    jit_of("ghost_batch_norm")


@check
def jit_layer_norm():
    jit_of("layer_norm")


@check
def jit_batch_and_height():
    """On a mesh of two axes, of which one is within a process where a process has two devices."""
    case, given = batch("batch_norm_counted", (16, 4, 2, 6))
    by_jit(case, given, cases.value_and_gradients(case), P("b", "h"), (2, 2), ("b", "h"))


@check
def jit_features():
    case = replace(BY_NAME["layer_norm"], shape=(4, 2, 2, 16))
    by_jit(case, cases.inputs(case), cases.value_and_gradients(case), P(None, None, None, "d"))


@check
def jit_groups():
    """Two groups of channels on four devices."""
    case = replace(BY_NAME["group_norm"], shape=(4, 3, 2, 16), kept={0: 1, 3: 8}, options={"num_groups": 2})
    by_jit(case, cases.inputs(case), cases.value_and_gradients(case), P(None, None, None, "d"))


@check
def evaluation_sends_nothing():
    case = replace(BY_NAME["batch_norm_evaluate"], shape=SHAPE)
    given = cases.inputs(case)
    program = jax.jit(lambda g: cases.call(case, g)[0])
    arrays = placed({k: v for k, v in given.items() if k != "dy"})
    text = program.lower(arrays).compile().as_text()
    assert "all-reduce" not in text and "all-gather" not in text
    cases.check_value(case, given, whole(program(arrays)), given["state"])


@check
def shard_map_linen():
    case, given = batch("batch_norm")
    by_shard_map(case, given, modules.value_and_gradients("linen", case, axis_name="d"))


@check
def jit_nnx():
    case, given = batch("batch_norm")
    by_jit(case, given, modules.value_and_gradients("nnx", case))


@check
def train_step():
    """Of a Linen and an NNX module, both over the same sharded batch: parameters moved by SGD, running statistics, and no replica apart."""
    case, given = batch("batch_norm")
    module, optimizer = jnn.BatchNorm(use_running_average=False), optax.sgd(RATE)

    @jax.jit
    def step(given):
        params = {k: given[k] for k in case.affine}

        def loss(params):
            variables = {"params": params, "batch_stats": given["state"]}
            y, updates = module.apply(variables, given["x"], mask=given["mask"], mutable=["batch_stats"])
            return (y * given["dy"]).sum(), updates["batch_stats"]

        gradients, state = jax.grad(loss, has_aux=True)(params)
        linen = optax.apply_updates(params, optimizer.update(gradients, optimizer.init(params))[0]), state
        model = modules.nnx_module(case, given)
        of_model = nnx.grad(lambda model: (model(given["x"], mask=given["mask"]) * given["dy"]).sum())(model)
        nnx.Optimizer(model, optimizer, wrt=nnx.Param).update(model, of_model)
        return linen, ({k: getattr(model, k)[...] for k in case.affine}, {k: getattr(model, k)[...] for k in given["state"]})

    want, want_state = cases.oracle(case, given)
    length, of_parameter = (3 * n + 32 for n in cases.lengths(case, given))
    for params, state in step(placed(given)):
        assert_same_everywhere((params, state))
        params, state = whole((params, state))
        cases.check_state(case, given, state, want_state, length)
        for name, value in params.items():
            moved = oracles.Bounded(given[name] - RATE * want.d(name).value, abs(given[name]) + RATE * want.d(name).size)
            oracles.assert_close(value, moved, length + of_parameter, what=name)


@check
def recalibration():
    """Each process collects the statistics of its own batches, of another number each; merged, they are those of all values."""
    rng, me = np.random.default_rng(0), jax.process_index()
    streams = [[rng.normal(size=(3 + b, 6)).astype(np.float32) + p for b in range(p + 1)] for p in range(jax.process_count())]
    population = tools.population_state(jnorm.batch_norm_state(6))
    for x in streams[me]:
        _, population = jnorm.batch_norm(x, population)
    everybody = multihost_utils.process_allgather(population)
    parts = [jax.tree.map(lambda a, p=p: a[p], everybody) for p in range(jax.process_count())]
    state = tools.population_statistics(functools.reduce(tools.merge_populations, parts))
    x = np.concatenate(sum(streams, [])).astype(np.float64)
    for key, want in {"mean": x.mean(0), "var": x.var(0)}.items():
        # Sums of len(x) terms, none of which is larger than its square or the largest x.
        oracles.assert_close(state[key], oracles.Bounded(want, abs(want) + abs(x).max()), len(x), what=key)


@check
def recalibration_of_global_batches():
    """Two norms, layer by layer, over batches that all processes have parts of: each stops after the same pass."""
    mesh, rng = distributed.mesh_of((DEVICES,)), np.random.default_rng(0)
    batches = [rng.normal(size=(16, 6)).astype(np.float32) * s + s for s in (1, 3)]
    everywhere, spread = (NamedSharding(mesh, jax.P(*spec)) for spec in ((), ("d",)))

    def step(state, x):
        y, first = jnorm.batch_norm(x, state["first"])
        return {"first": first, "second": jnorm.batch_norm(jnp.tanh(y), state["second"])[1]}

    start = jax.tree.map(lambda a: place(a, everywhere), {name: jnorm.batch_norm_state(6) for name in ("first", "second")})
    new = tools.recalibrate(jax.jit(step), start, [place(x, spread) for x in batches], layer_by_layer=True)
    assert_same_everywhere(new)
    x = np.concatenate(batches).astype(np.float64)
    for name in ("first", "second"):
        for key, want in {"mean": x.mean(0), "var": x.var(0)}.items():
            oracles.assert_close(new[name][key], oracles.Bounded(want, abs(want) + abs(x).max() ** 2), len(x), what=f"{name} {key}")
        x = np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))


def assert_same_everywhere(tree):
    """Bitwise, on all devices of all processes."""
    for a in jax.tree.leaves(tree):
        assert a.is_fully_replicated
        mine = np.stack([shard.data for shard in a.addressable_shards])
        everybody = multihost_utils.process_allgather(mine)
        np.testing.assert_array_equal(everybody, np.broadcast_to(mine[:1], everybody.shape))


def main(folder, *names):
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    process, processes = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
    options = {"initialization_timeout": 60, "cluster_detection_method": "deactivate"}
    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], processes, process, **options)
    results = {}
    for name in names:
        try:
            CHECKS[name]()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    (Path(folder) / f"{process}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
