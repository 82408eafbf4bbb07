"""Norms under jit whose x, parameters and running statistics lie in different parts: values, gradients, where results lie, what travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import jnorm
from block import Layout, on
from cases import BY_NAME, FAMILY, PLAIN, replace
from test_collectives import collectives
from weights import every_other

SLOW = [pytest.mark.slow]
# Of both, a share of x is larger than everybody's statistics.
ROWS_OF = {"shape": (8, 8, 512), "kept": {0: 1, 1: 1}, "features": (2,)}
BATCH_OF = {"shape": (64, 24, 16), "kept": {2: 1}, "features": (2,)}
TRAVELS = {  # x and the parameters on a mesh -> (shape, names, x, scale and bias and state)
    "features": ((8,), ("model",), P(None, None, "model"), P("model")),
    "fsdp": ((8,), ("data",), P("data"), P("data")),
    "2-D": ((2, 4), ("data", "model"), P("data", None, "model"), P(("model", "data"))),
    "sequence": ((2, 4), ("data", "model"), P("data", "model"), P("data")),
}
TRAVELERS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "batch_norm"]
# A quarter in the default run: every norm twice, every layout, and both kinds of mesh.
TRIPS = [
    pytest.param(name, layout, explicit, marks=SLOW if (i + j + explicit) % 4 else [])
    for i, name in enumerate(TRAVELERS)
    for j, layout in enumerate(TRAVELS)
    for explicit in (False, True)
]


@pytest.mark.parametrize(("name", "layout", "explicit"), TRIPS)
def test_x_is_never_gathered(name, layout, explicit):
    """With everything in parts, value and gradients send less than one device's share of x."""
    shape, names, of_x, of_parameters = TRAVELS[layout]
    case = replace(BY_NAME[name], **(BATCH_OF if name == "batch_norm" else ROWS_OF))
    given = cases.inputs(case)
    with on(Layout(shape, names, ()), explicit) as mesh:
        whole = {k: of_x if k in ("x", "dy", "residual") else of_parameters for k in given}
        placed = {k: jax.tree.map(lambda a, k=k: jax.device_put(a, NamedSharding(mesh, whole[k])), v) for k, v in given.items()}
        run = jax.jit(cases.value_and_gradients(case))
        sent = collectives(run.lower(placed).compile())
        assert all(size < given["x"].size // 8 for _, size in sent), sent
        y, state, gradients = run(placed)
    assert y.sharding.is_equivalent_to(placed["x"].sharding, 3)
    cases.check_gradients(case, given, gradients)
    cases.check_value(case, given, y, state)


# --- every norm ---------------------------------------------------------------------------------------------------------------

SHAPE = (16, 2, 2, 16)
OTHERWISE = {  # (shape, names, x, what is by feature)
    "fsdp": ((8,), ("data",), P("data"), "data"),
    "2-D": ((2, 4), ("data", "model"), P("data", None, None, "model"), ("model", "data")),
}
# Norms with running statistics first: in the default run one layout of each.
NAMES = sorted((c.name for c in [*PLAIN, *FAMILY, BY_NAME["add_layer_norm"]]), key=lambda name: BY_NAME[name].state is None)


def where_of(key, value, of_x, of_features):
    """Features come last; a mask, a kernel and what belongs to its inputs lie everywhere."""
    if key in ("x", "dy", "residual"):
        return of_x
    by_feature = key not in ("mask", "kernel") and np.ndim(value) and np.shape(value)[-1] == SHAPE[-1]
    return P(*(None,) * (np.ndim(value) - 1), of_features) if by_feature else P()


@pytest.mark.parametrize(("name", "layout"), every_other(NAMES, OTHERWISE))
def test_parameters_and_state_in_other_parts(name, layout):
    """On a mesh of explicit axes, where types must fit. The state comes out where it went in."""
    shape, names, of_x, of_features = OTHERWISE[layout]
    case = replace(BY_NAME[name], shape=SHAPE)
    case = replace(case, kept={0: 1, 3: 4}, options={"num_groups": 4}) if name == "group_norm" else case
    given = cases.inputs(case)
    with on(Layout(shape, names, ()), explicit=True):
        placed = {k: jax.tree.map(lambda a, k=k: jax.device_put(a, where_of(k, a, of_x, of_features)), v) for k, v in given.items()}
        y, state, gradients = jax.jit(cases.value_and_gradients(case))(placed)
    cases.check_value(case, given, y, state)
    cases.check_gradients(case, given, gradients)
    out = {"x": y, **gradients, **({"state": state} if state else {})}
    for key, value in out.items():
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(placed[key]), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (key, a.sharding, b.sharding)


@pytest.mark.parametrize(("name", "key"), [("batch_norm", "values"), ("batch_norm", "batches"), ("tracked_instance_norm", "batches")])
def test_a_collecting_state_in_other_parts(name, key, rng):
    """Of a data set of one batch: its mean and variance, or the samples' own."""
    shape, names, of_x, of_features = OTHERWISE["2-D"]
    x = (rng.normal(size=SHAPE) + 2).astype(np.float32)
    state = {k: np.zeros(SHAPE[-1], np.float32) for k in ("mean", "var", key)}
    with on(Layout(shape, names, ()), explicit=True):
        placed = jax.device_put(x, of_x), jax.device_put(state, P(of_features))
        new = jax.jit(getattr(jnorm, name))(*placed)[1]
    axes = (0, 1, 2) if name == "batch_norm" else (1, 2)
    wide = x.astype(np.float64)
    var = wide.var(axes, ddof=int(key == "batches"))
    want = {"mean": wide.mean((0, 1, 2)), "var": var.reshape(-1, SHAPE[-1]).mean(0)}
    want[key] = np.full(SHAPE[-1], x[..., 0].size if key == "values" else 1 if name == "batch_norm" else len(x))
    for k, value in want.items():
        assert new[k].sharding.is_equivalent_to(placed[1][k].sharding, 1)
        np.testing.assert_allclose(new[k], value, rtol=(x[..., 0].size + 16) * 2.0**-23, err_msg=k)


# --- explicit axes ------------------------------------------------------------------------------------------------------------

ROWS, SPLIT = (8, 6, 8), P("data", None, "model")


def weighted_sines(normalize):
    """A loss whose second derivative is none of the trivial ones."""
    return lambda x: (jnp.sin(normalize(x)) * jnp.cos(jnp.arange(x.shape[-1]))[None, None]).sum()


def gradient_of_squared_gradient(loss):
    return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())


@pytest.mark.parametrize(
    "normalize",
    [
        jnorm.layer_norm,
        pytest.param(lambda x: x * jnorm.accumulated_moments(lambda b: b, x.swapaxes(0, 1), 0).var[None, None], marks=SLOW),
    ],
    ids=["layer_norm", "accumulated_moments"],
)
def test_second_order_along_split_axes(normalize, rng):
    second = gradient_of_squared_gradient(weighted_sines(normalize))
    x = rng.normal(size=ROWS).astype(np.float32) + 2
    with on(Layout((2, 4), ("data", "model"), ()), explicit=True):
        got = jax.jit(second)(jax.device_put(x, SPLIT))
    want = jax.jit(second)(x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("groups", [None, pytest.param([[0], [1]], marks=SLOW)])
def test_manual_over_one_axis_of_two(groups, rng):
    """The features are split over the other, explicit one: batch norm merges over the manual one, layer norm over the explicit one."""

    def local(x):
        state = jnorm.batch_norm_state(ROWS[-1])
        return jnorm.batch_norm(x, state, axis_name="data", axis_index_groups=groups)[0], jnorm.layer_norm(x)

    x = rng.normal(size=ROWS).astype(np.float32) + 2
    with on(Layout((2, 4), ("data", "model"), ()), explicit=True):
        mapped = jax.shard_map(local, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=groups is None)
        batch, row = jax.jit(mapped)(jax.device_put(x, SPLIT))
    parts = x.astype(np.float64).reshape(2 if groups else 1, -1, ROWS[-1])
    want = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(batch, want.reshape(ROWS), atol=1e-5)
    np.testing.assert_allclose(row, jnorm.layer_norm(x), atol=1e-5)
