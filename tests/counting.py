"""Training steps over devices, and the collectives that are expected of their programs: (kind, numbers that each device sends)."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

import cases
import distributed
from cases import BY_NAME, replace
from distributed import mesh_of
from test_collectives import traffic

C = 6
SHAPE = (16, 2, 1, C)
MODES = ["checked", "unchecked", "pmap"]
WHOLE, BATCH, HEIGHT = P(), P("d"), P(None, "d")


def gather(numbers):
    return ("all-gather", numbers)


def reduce(numbers):
    return ("all-reduce", numbers)


def check(program, expected, itemsize=4, participants=8):
    """The collectives of a program are the expected ones, and no others."""
    got, want = traffic(program, participants), sorted((kind, itemsize * numbers) for kind, numbers in expected)
    assert got == want, f"the program has {got}, and should have {want}"


def local_step(case, **options):
    """y, the state as that of one device, and the gradients."""
    step = cases.value_and_gradients(case, **options)

    def run(given):
        y, state, gradients = step(given)
        return y, jax.tree.map(lambda a: a[None], state), gradients

    return run


def mapped(case, given, check_vma, mesh, spec, parameter_spec=WHOLE, **options):
    """The training step over the devices of a mesh. Unchecked, the gradients of the parameters are each device's own part."""
    where = {k: parameter_spec if k in distributed.PARAMETERS else s for k, s in distributed.specs(given, spec).items()}
    gradients = {k: where[k] for k in case.differentiable}
    out = (spec, P(mesh.axis_names), gradients)
    run = jax.shard_map(local_step(case, **options), mesh=mesh, in_specs=(where,), out_specs=out, check_vma=check_vma)
    return jax.jit(run)


def step(case, given, mode, spec=BATCH, parameter_spec=WHOLE, **options):
    """The compiled program of a training step over eight devices."""
    if mode == "pmap":
        pieces, axes = distributed.cut(given, 8)
        return jax.pmap(cases.value_and_gradients(case, axis_name="d", **options), "d", in_axes=(axes,)).lower(pieces).compile()
    return mapped(case, given, mode == "checked", mesh_of(), spec, parameter_spec, axis_name="d", **options).lower(given).compile()


def rotated(rows, rare=()):
    """Every row with one of the modes by default, but for rare ones, and with all of them in the full run."""
    slow = pytest.mark.slow
    both = [(row, mode, row in rare or i % 3 != j) for i, row in enumerate(rows) for j, mode in enumerate(MODES)]
    return [pytest.param(row, mode, marks=[slow] if rest else [], id=f"{row}-{mode}") for row, mode, rest in both]


def batch_norm(**changes):
    return replace(BY_NAME["batch_norm"], shape=SHAPE, **changes)


def with_options(**options):
    return batch_norm(options=options)
