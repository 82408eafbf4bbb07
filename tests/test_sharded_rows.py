"""Row norms under jit over a sharded feature axis: each device's statistics of its part of a row are merged, in one collective."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import cases
import distributed
import oracles
from cases import BY_NAME, replace
from jnorm import _stats
from test_collectives import auto_program, traffic
from test_devices import check

SHAPE = (6, 16)
SPEC = P(None, "d")
NORMS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]


def rows(name, **changes):
    case = replace(BY_NAME[name], shape=SHAPE, kept={0: 1}, features=(1,), **changes)
    return case, cases.inputs(case)


def by_devices(case, given):
    return distributed.by_auto_mesh(cases.value_and_gradients(case), given, spec=SPEC)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("layer_norm", [4 * 5 * 6, 4 * 2 * 6]),
        ("rms_norm", [4 * 5 * 6, 4 * 2 * 6]),
        pytest.param("add_layer_norm", [4 * 5 * 6, 4 * 2 * 6], marks=pytest.mark.slow),
        pytest.param("add_rms_norm", [4 * 5 * 6, 4 * 2 * 6], marks=pytest.mark.slow),
    ],
)
def test_one_collective_each_way(name, sizes):
    case, given = rows(name)
    program = auto_program(cases.value_and_gradients(case), given, spec=SPEC)
    assert traffic(program) == [("all-gather", sizes[0]), ("all-reduce", sizes[1])]


@pytest.mark.parametrize("name", ["layer_norm", pytest.param("add_rms_norm", marks=pytest.mark.slow)])
def test_masks_and_devices_that_count_nothing(name, rng):
    """Of the third row only the last device counts; of the fourth nobody does."""
    case, given = rows(name, mask=SHAPE)
    given["mask"] = cases.mask_of(SHAPE, rng)
    given["mask"][:, 4:6] = False
    given["mask"][2, :14], given["mask"][2, 14:] = False, True
    given["mask"][3] = False
    check(case, given, *by_devices(case, given))


def test_above_the_limit(monkeypatch, rng):
    monkeypatch.setattr(_stats, "GATHER_LIMIT", 1)
    case, given = rows("layer_norm", mask=SHAPE)
    given["mask"] = cases.mask_of(SHAPE, rng)
    check(case, given, *by_devices(case, given))


def sizes_of_all_kinds(rng):
    """Rows of which a part is large, all is, or the devices are far apart; and at 1e4, and the largest finite numbers."""
    x = rng.normal(size=SHAPE)
    x[0, 3:5] *= 1e30
    x[1] *= 1e35
    x[2] = np.repeat([1e28, -1e28, 1e30, 3e33, 1, 1e-3, 0, 1e20], 2)
    x[3] = 1e4 + 1e-2 * x[3]
    x[4] = np.repeat([1.0, -1.0], 8) * np.finfo(np.float32).max
    x[5] *= 1e-12
    return x.astype(np.float32)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_of_all_sizes(name, rng):
    case, given = rows(name)
    given["x"] = sizes_of_all_kinds(rng)
    y, _, gradients = by_devices(case, given)
    oracles.assert_close(y, cases.oracle(case, given)[0].y, cases.lengths(case, given)[0])
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(gradients))
