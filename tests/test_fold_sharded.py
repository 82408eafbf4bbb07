"""Folding of parameters that lie on several devices: the values are those of one device, and each array stays where it was."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jnorm.nnx as jnx
from jnorm import tools
from test_fold import Fn, LinenOwnDense, Net, chain, close, init, linen_norm, norm, ready, rngs

X = (2, 5, 4)
# How kernels and biases lie, and how the variables of norms do.
WAYS = {
    "outputs": (P(None, "m"), P("m"), P("m")),
    "inputs": (P("m"), P(), P()),
    "kernels alone": (P(None, "m"), P(), P()),
    "norms alone": (P(), P(), P("m")),
    "both axes": (P("d", "m"), P("d"), P("m")),
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("d", "m"), axis_types=(kind, kind))


def specs(way, key):
    kernel, bias, of_norm = WAYS[way]
    return of_norm if "norm" in key else kernel if "kernel" in key else bias


def lies(a, mesh, spec):
    return a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)


def put(mesh, way, key, a):
    return jax.device_put(a, NamedSharding(mesh, specs(way, key))) if a.ndim else a


def nnx_model(bias, rng):
    """A norm before a layer, one after it, and one after another layer."""
    names = ("norm1", "first", "norm2", "second", "norm3")
    layers = {"first": nnx.Linear(4, 8, use_bias=bias, rngs=rngs()), "second": nnx.Linear(8, 4, use_bias=bias, rngs=rngs())}
    return ready(Net(chain(*names), **layers, norm1=norm(4), norm2=norm(8), norm3=norm(4, jnx.BatchRenorm)), rng)


def check_state(got, want, mesh, way, bias):
    """All arrays of one device's fold, and where they lie."""
    for (path, a), (other, b) in zip(nnx.to_flat_state(nnx.state(got)), nnx.to_flat_state(nnx.state(want)), strict=True):
        assert path == other
        close(np.asarray(a[...]), b[...])
        kernel = (*specs(way, ("kernel",)), None, None)
        new = P(kernel[1]) if path[-1] == "bias" and not bias else specs(way, path)
        assert lies(a[...], mesh, new), (path, a[...].sharding)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_sharded_models(way, bias, rng, x64):
    model, mesh = nnx_model(bias, rng), mesh_of()
    want, report = tools.fold(model, np.ones(X))
    nnx.update(model, nnx.map_state(functools.partial(put_variable, mesh, way), nnx.state(model)))
    got, same = tools.fold(model, np.ones(X))
    assert same.folded == report.folded == {"norm1": "first", "norm2": "first", "norm3": "second"}
    check_state(got, want, mesh, way, bias)


def put_variable(mesh, way, path, v):
    return v.replace(put(mesh, way, path, v[...]))


@pytest.mark.parametrize("context", [False, True], ids=["arrays", "context"])
@pytest.mark.parametrize("way", ["outputs", "kernels alone", "norms alone"])
def test_sharding_in_types(way, context, rng, x64):
    """On an explicit mesh. The ways are those that the model itself has there: norms of one layer's two sides are of one mesh axis."""
    model, mesh = nnx_model(False, rng), mesh_of(AxisType.Explicit)
    want, _ = tools.fold(model, np.ones(X))
    nnx.update(model, nnx.map_state(functools.partial(put_variable, mesh, way), nnx.state(model)))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        got, report = tools.fold(model, np.ones(X))
    assert not report.kept
    check_state(got, want, mesh, way, False)


def test_sharded_variables_of_linen(rng, x64):
    """The last norm's shift has no place in its layer, and lies on all devices."""

    def run(x):
        x = linen_norm(name="norm1")(nn.Conv(8, (2,), use_bias=False, name="conv")(x))
        return linen_norm(name="norm2")(LinenOwnDense(False, name="own")(nn.relu(nn.Dense(3, name="dense")(x))))

    model, x, mesh = Fn(run), rng.normal(size=X), mesh_of()
    variables = init(model, x, rng)
    want = tools.fold(model, variables, x)
    there = {"conv": P(None, None, "m"), "dense": P("m"), "own": P("m"), "norm1": P("m"), "norm2": P("d")}
    sharded = jax.tree_util.tree_map_with_path(
        lambda path, a: jax.device_put(a, NamedSharding(mesh, there[path[1].key] if path[-1].key != "bias" else P())), variables
    )
    got = tools.fold(model, sharded, x)
    assert got.report == want.report and not got.report.kept
    jax.tree.map(lambda a, b: close(np.asarray(a), b), got.variables, want.variables)
    params = got.variables["params"]
    for name in ("conv", "dense"):
        assert lies(params[name]["kernel"], mesh, there[name])
    assert lies(params["own"]["weight"], mesh, there["own"])
    assert lies(params["conv"]["bias"], mesh, P("m")) and lies(params["norm2"]["bias"], mesh, P())
    close(np.asarray(got.apply(x)), want.apply(x))


def test_some_arrays_lie_on_a_mesh(rng, x64):
    """The others are numbers of NumPy, as of a checkpoint, or on no device in particular."""
    model, x, mesh = Fn(lambda x: linen_norm(name="norm")(nn.Dense(8, name="layer")(x))), rng.normal(size=X), mesh_of()
    variables = init(model, x, rng)
    want = tools.fold(model, variables, x).variables["params"]["layer"]
    variables["params"]["layer"]["bias"] = np.asarray(variables["params"]["layer"]["bias"])
    variables["params"]["norm"]["scale"] = jax.device_put(variables["params"]["norm"]["scale"], NamedSharding(mesh, P("m")))
    got = tools.fold(model, variables, x).variables["params"]["layer"]
    for name, a in got.items():
        close(np.asarray(a), want[name])
        assert lies(a, mesh, P())


# --- Metadata -----------------------------------------------------------------------------------------------------------------


def test_metadata_of_sharding(rng, x64):
    """NNX puts variables where they say when they are made. What is new lies with its kernel, and says nothing."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        init_kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "m"))
        scale = {"scale_init": nnx.with_partitioning(nnx.initializers.ones, ("m",))}
        modules = {"layer": nnx.Linear(4, 8, use_bias=False, kernel_init=init_kernel, rngs=rngs()), "norm": norm(8, **scale)}
        model = Net(chain("layer", "norm"), **modules)
        there = jax.tree.map(lambda a: a.sharding, nnx.state(model))
        nnx.update(model, jax.tree.map(jax.device_put, nnx.state(ready(model, rng)), there))
        assert lies(model.layer.kernel[...], mesh, P(None, "m")) and lies(model.norm.scale[...], mesh, P("m"))
        folded, report = tools.fold(model, np.ones(X))
    assert report.folded == {"norm": "layer"}
    x = jnp.asarray(rng.normal(size=X))
    close(np.asarray(folded(x)), np.asarray(model(x)))
    kernel, bias = folded.layer.kernel, folded.layer.bias
    assert kernel.get_metadata() == model.layer.kernel.get_metadata() and lies(kernel[...], mesh, P(None, "m"))
    assert lies(bias[...], mesh, P("m")) and "out_sharding" not in bias.get_metadata()


@pytest.mark.parametrize("logical", [False, True], ids=["with_partitioning", "with_logical_partitioning"])
def test_boxes_of_sharded_variables(logical, rng, x64):
    box = nn.with_logical_partitioning if logical else nn.with_partitioning
    names = ("in", "out") if logical else (None, "m")

    def run(x):
        x = nn.Dense(8, kernel_init=box(nn.initializers.lecun_normal(), names), use_bias=False, name="layer")(x)
        return linen_norm(name="norm", scale_init=box(nn.initializers.ones, names[1:]))(x)

    model, x, mesh = Fn(run), rng.normal(size=X), mesh_of()
    variables = init(model, x, rng)
    want = tools.fold(model, variables, x)
    there = {1: P("m"), 2: P(None, "m")}
    sharded = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, there[a.ndim])), variables)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("in", None), ("out", "m")]):
        got = tools.fold(model, sharded, x)
        y = jax.jit(lambda got, x: got.apply(x))(got, x)
    close(np.asarray(y), want.apply(x))
    layer = got.variables["params"]["layer"]
    assert layer["kernel"].names == names and lies(layer["kernel"].value, mesh, there[2]) and lies(layer["bias"], mesh, there[1])
    jax.tree.map(lambda a, b: close(np.asarray(a), b), got.variables, want.variables)


def test_folding_under_jit(rng, x64):
    """Nothing is known of where arrays lie there."""
    model, x, mesh = Fn(lambda x: linen_norm(name="norm")(nn.Dense(8, name="layer")(x))), rng.normal(size=X), mesh_of()
    variables = init(model, x, rng)
    want = tools.fold(model, variables, x).variables
    sharded = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("m"))), variables)
    got = jax.jit(lambda variables: tools.fold(model, variables, x).variables)(sharded)
    jax.tree.map(lambda a, b: close(np.asarray(a), jnp.asarray(b)), got, want)
