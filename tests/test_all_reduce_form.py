"""Statistics merged by two dependent all-reduces, as above 64 participants, with the limit set below eight devices.

The answer is that of one device to the same tolerances as where everybody's statistics are gathered.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import oracles
import plain
from distributed import MODES
from jnorm import _stats
from test_collectives import close, hessian_vector, second_order_inputs
from test_devices import INTERLEAVED, SHAPE, check, check_halves, height, stacked_state, whole_batch

EVERY_WAY = {**MODES, "sharded": distributed.by_auto_mesh}


@pytest.fixture(autouse=True)
def _all_reduces(monkeypatch):
    monkeypatch.setattr(_stats, "GATHER_LIMIT", 1)


def local(case, way, **options):
    return cases.value_and_gradients(case, **({} if way == "sharded" else {"axis_name": "d"}), **options)


@pytest.mark.parametrize(
    ("name", "way", "offset"),
    [
        ("batch_norm", "shard_map", 1e4),
        ("batch_norm", "pmap", 1e4),
        ("batch_norm", "sharded", 1e4),
        ("batch_norm_counted", "vmap", 1e4),
        ("batch_norm_relu_residual", "shard_map unchecked", 0),
        pytest.param("batch_norm_two_features", "sharded", 0, marks=pytest.mark.slow),
        pytest.param("batch_norm_counted", "shard_map", 1e4, marks=pytest.mark.slow),
        pytest.param("batch_norm_relu_residual", "pmap", 1e4, marks=pytest.mark.slow),
        pytest.param("batch_norm_two_features", "vmap", 1e4, marks=pytest.mark.slow),
        pytest.param("batch_norm", "shard_map unchecked", 1e4, marks=pytest.mark.slow),
    ],
)
def test_uneven_masks_and_an_empty_shard(name, way, offset, rng):
    case, given = whole_batch(name, rng)
    given["x"] += np.float32(offset)
    check(case, given, *EVERY_WAY[way](local(case, way), given))


def test_devices_far_apart(rng):
    """Each device's mean is another, some thousand spreads from the next."""
    case, given = whole_batch("batch_norm", rng)
    given["x"] += np.repeat(1e3 * rng.normal(size=8), 2).astype(np.float32).reshape(-1, 1, 1, 1)
    check(case, given, *distributed.by_shard_map(local(case, "shard_map"), given))


def test_variance_at_mean_1e4(rng):
    """A few roundings of itself, and nothing of mean²: the same as of a gather."""
    x = (1e4 + rng.normal(size=(8, 16, 6))).astype(np.float32)
    x[3] += 7
    want = oracles.moments(x, oracles.sets(x.shape, {2: 1}))
    stats = jax.vmap(lambda v: jnorm.moments(v, 0, axis_name="d"), axis_name="d")(x)
    for key in ("var", "mean"):
        value = getattr(want, key)
        oracles.assert_close(getattr(stats, key)[0], oracles.Bounded(value, abs(value)), 128 if key == "var" else 0, what=key)


@pytest.mark.parametrize(
    "way", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow), pytest.param("sharded", marks=pytest.mark.slow)]
)
def test_nothing_counted_anywhere(way, rng):
    case, given = whole_batch("batch_norm", rng)
    given["mask"] = np.zeros_like(given["mask"])
    y, state, gradients = EVERY_WAY[way](local(case, way), given)
    check(case, given, y, state, gradients)
    jax.tree.map(np.testing.assert_array_equal, dict(state), given["state"])


@pytest.mark.parametrize(
    "mode", ["shard_map", "pmap", pytest.param("shard_map unchecked", marks=pytest.mark.slow), pytest.param("vmap", marks=pytest.mark.slow)]
)
def test_axis_index_groups(mode, rng):
    """By slots of our own where types are tracked, and in vmap; by JAX's groups elsewhere."""
    case, given = whole_batch("batch_norm", rng)
    given["x"] += np.float32(1e4)
    step = local(case, mode, axis_index_groups=INTERLEAVED)
    if mode.startswith("shard_map"):
        out = MODES[mode](stacked_state(step), given, state_spec=P("d"))
    else:
        out = MODES[mode](step, given, whole_state=False)
    check_halves(case, given, *out, [[2 * d + i for d in group for i in (0, 1)] for group in INTERLEAVED])


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        ("group_norm", True),
        pytest.param("layer_norm_samples", False, marks=pytest.mark.slow),
        pytest.param("instance_norm", False, marks=pytest.mark.slow),
        pytest.param("rms_norm_mask", True, marks=pytest.mark.slow),
        pytest.param("tracked_instance_norm", True, marks=pytest.mark.slow),
    ],
)
def test_positions_over_devices(name, check_vma, rng):
    case, given = height(name, rng)
    check(case, given, *distributed.by_shard_map(local(case, "shard_map"), given, check_vma=check_vma, spec=P(None, "d")))


@pytest.mark.parametrize("limit", [1, 64])
@pytest.mark.parametrize("scale", [1e18, 1e35])
def test_huge_values(scale, limit, rng, monkeypatch):
    """Right up to 1e18, and finite beyond, where sums of squares overflow; both ways, and with a shard that counts nothing."""
    monkeypatch.setattr(_stats, "GATHER_LIMIT", limit)
    case, given = whole_batch("batch_norm", rng)
    given["x"] = (given["x"] * scale).astype(np.float32)
    local = jax.vmap(functools.partial(cases.call, case, axis_name="d"), (axes_of(given),), axis_name="d")
    y, state = jax.jit(local)(distributed.cut(given, 8)[0])
    if scale == 1e18:
        oracles.assert_close(np.reshape(y, SHAPE), cases.oracle(case, given)[0].y, cases.lengths(case, given)[0])
    assert all(np.isfinite(v).all() for v in (y, *state.values()))


def axes_of(given):
    return distributed.cut(given, 8)[1]


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("shard_map unchecked", marks=pytest.mark.slow)])
def test_second_order(mode, rng, x64, monkeypatch):
    monkeypatch.setattr(distributed, "WHOLE", (*distributed.WHOLE, "v_scale", "v_bias"))
    case, given = second_order_inputs(rng)
    static = {k: given.pop(k) for k in ("mask", "state")}
    want = jax.jit(lambda floats: hessian_vector(functools.partial(plain.norm, case))(static | floats)[2])(given)
    got = MODES[mode](hessian_vector(lambda g: cases.call(case, g, axis_name="d")[0]), given | static)[2]
    close(got, want)
