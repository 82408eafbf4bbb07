"""Bytes, in X: what is kept for the backward pass, what a program allocates for itself, and its peak. Deterministic."""

from typing import Any

import jax

from . import hlo
from .calling import Arguments, linearized
from .cases import Case
from .peers import Built


def residuals(case: Case, built: Built, given: Arguments) -> float:
    """What crosses from the forward to the backward pass, each array once. x itself, which is alive anyway, counts as 1."""

    def kept(*arguments: Any) -> list[jax.Array]:
        return jax.tree.leaves(linearized(built)(*arguments)[1])

    with built.context():
        jaxpr = jax.make_jaxpr(kept)(given.affine, given.state, given.xs).jaxpr
    distinct = {id(v): v.aval for v in jaxpr.outvars}
    return sum(a.size * a.dtype.itemsize for a in distinct.values()) / case.bytes


def of_program(case: Case, compiled: Any) -> dict[str, float]:
    """`temp`: allocated beside arguments and outputs. `peak`: all three together. `kernels` and `traffic` are read from the program."""
    found: dict[str, float] = {}
    analysis = compiled.memory_analysis()
    if analysis is not None:
        temp = analysis.temp_size_in_bytes
        total = temp + analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        found |= {"temp": temp / case.bytes, "peak": total / case.bytes}
    counted = hlo.count(compiled.as_text())
    return found | {"kernels": counted.kernels, "traffic": counted.bytes / case.bytes}
