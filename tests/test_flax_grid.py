"""Drop-in for Flax: with its variables, over a grid of all its options, the outputs and the updated statistics are its own up to rounding.

Both libraries are held against float64: jnorm's to the tolerance of all its tests, Flax's to that of its own, less stable, formulas.
"""

import numpy as np
import pytest

import flax_grid as grid
import oracles
from flax_grid import MODULES, NORMS

APIS = ["linen", "nnx"]


def truth(name, row, ids, x, mask, variables):
    """-> (Answer, running statistics per set, the state after the call)."""
    number = ids.max() + 1
    running = None
    if name == "BatchNorm":
        running = tuple(np.resize(oracles.wide(variables[k]).ravel(), number) for k in grid.STATS)
    evaluate = row.get("average", (None, False))[1]
    # Flax's axes are those of one shard.
    affine = oracles.Affine(tuple(i + 1 for i in grid.features_of(name, row)), variables.get("scale"), variables.get("bias"))
    answer = oracles.norm(
        x,
        ids,
        affine,
        np.zeros(x.shape),
        mask=mask,
        epsilon=grid.epsilon_of(name, row),
        about_zero=name == "RMSNorm",
        running=running,
        evaluate=evaluate,
    )
    if name != "BatchNorm":
        return answer, affine, None, None
    shape, old = variables["mean"].shape, {k: oracles.wide(variables[k]).ravel() for k in grid.STATS}
    momentum = 0.99 if row["momentum"] is None else row["momentum"]
    moments = oracles.Moments(*(a[: old["mean"].size] for a in answer.moments))
    new = old if evaluate else oracles.running_update(old, {"mean": moments.mean, "var": moments.var}, moments.count, momentum)
    return answer, affine, running, {k: v.reshape(shape) for k, v in new.items()}


def compare(api, name, row, run=grid.outputs):
    """Asserts that both are right; returns the largest difference of the two, also of the state, where all is in float32, else 0."""
    ids = grid.sets_of(name, row)
    x, mask, variables = grid.inputs(name, row, ids)
    theirs, ours = (grid.function(api, module, name, row) for module in MODULES[api])
    y, state = run(ours, row, x, mask, variables)
    with grid.lenient():
        flax_y, flax_state = run(theirs, row, x, mask, variables)
    assert (y.dtype, y.shape) == (flax_y.dtype, flax_y.shape), f"y is {y.dtype}{y.shape}, Flax's {flax_y.dtype}{flax_y.shape}"
    answer, affine, running, want = truth(name, row, ids, x, mask, variables)
    length = int(answer.moments.count.max())
    oracles.assert_close(y, answer.y, length, what="y")
    evaluate = row.get("average", (None, False))[1]
    low, about_zero = grid.coarsest(api, row), name == "RMSNorm"
    options = {"mask": mask, "running": running, "evaluate": evaluate, "about_zero": about_zero}
    allowed = grid.flax_y_error(x, ids, answer, affine, grid.epsilon_of(name, row), low, **options)
    check(flax_y, answer.y.value, allowed, "Flax's y")
    exact = row["x"] != "int32" and flax_y.dtype == low.dtype == np.float32
    difference = largest(y, flax_y) * exact
    if want is None:
        assert not state and not flax_state
        return difference
    compare_states(row, x, ids, answer, low, mask, variables, state, flax_state, want)
    return max(difference, *(largest(state[k], flax_state[k]) * exact for k in state))


def compare_states(row, x, ids, answer, low, mask, old, state, flax_state, want):
    allowed = grid.flax_state_error(x, ids, answer, low, mask=mask, old=old)
    size = {"mean": abs(oracles.wide(x)).max(), "var": 0}
    for key in grid.STATS:
        assert state[key].dtype == old[key].dtype
        if row.get("force_float32_reductions", True):
            assert state[key].dtype == flax_state[key].dtype
        bounded = oracles.Bounded(want[key], abs(want[key]) + abs(oracles.wide(old[key])) + size[key])
        oracles.assert_close(state[key], bounded, int(answer.moments.count.max()), what=key)
        check(flax_state[key], want[key], allowed[key], f"Flax's {key}")


def largest(one, two):
    return float(abs(oracles.wide(one) - oracles.wide(two)).max())


def check(got, want, allowed, what):
    """The value of a float type: `allowed`, and its rounding."""
    info = grid.finfo(got.dtype)
    error = abs(oracles.wide(got) - want)
    allowed = allowed + 0.5 * float(info.eps) * (abs(want) + allowed) + float(info.smallest_subnormal)
    assert (error <= allowed).all(), f"{what} is off by {np.max(error / allowed):.3g} times the tolerance"


def run_all(api, name, rows):
    rows, failures, differences = list(rows), [], []
    for row in rows:
        try:
            differences.append(compare(api, name, row))
        except Exception as error:  # the choice is what tells
            failures.append(f"{row}: {type(error).__name__}: {str(error).splitlines()[0]}")
    print(f"{api} {name}: {len(rows)} combinations, largest difference from Flax in float32 {max(differences, default=0.0):.3g}")
    assert not failures, f"{len(failures)} of {len(rows)} combinations:\n" + "\n".join(failures[:5])


QUICK = [("linen", "BatchNorm"), ("nnx", "GroupNorm")]
PAIRS = [pytest.param(api, name, marks=[pytest.mark.slow] * ((api, name) not in QUICK)) for name in NORMS for api in APIS]


@pytest.mark.parametrize(("api", "name"), PAIRS)
def test_any_two_options(api, name):
    run_all(api, name, grid.pairwise(grid.options_of(api, name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("api", APIS)
def test_a_sample_of_all_options(api, name):
    run_all(api, name, grid.sample(grid.options_of(api, name, full=True), 120))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("api", APIS)
def test_groups_of_devices(api, name):
    row = {option: values[0] for option, values in grid.options_of(api, name).items()}
    row |= {"axis_name": "shards", "axis_index_groups": ((0, 2), (1, 3))}
    compare(api, name, row, grid.on_devices)
