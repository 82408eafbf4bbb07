"""One op: a primitive over x in its own axes, with rules for AD, batching and partitioning over devices, lowered to a plain XLA form.

Operands have x's rank, with 1 where they are constant along an axis. On the CPU the lowering is a call of a native kernel, where that is
chosen and has the case.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from .._jax_internals import (
    align,
    automatic_device_count,
    lower_as,
    mesh_and_spec,
    new_primitive,
    result_avals,
    with_sharding_of,
    x64_enabled,
)
from ._library import active

Spans = Callable[[Sequence[int]], tuple]


def one_device(axes: Sequence[int]) -> tuple:
    """The mesh axes over which the given axes of x are split: none."""
    return ()


class Op:
    """A primitive whose first `linear(**params)` operands it is linear in.

    Args:
      name: the primitive's name, after "jnorm_".
      form: `form(*operands, spans, **params) -> list`, the op in plain jnp. It merges what it reduces over the mesh axes `spans(axes)`.
        Every parameter whose name ends in "axes" is a tuple of axes of x.
      linear: number of leading operands in which the op is linear, given the parameters.
      cpu_form: the plain form on the CPU, where it is another one.
      native: the same as a call of a native kernel; None where the kernel does not have the case.
    """

    def __init__(
        self,
        name: str,
        form: Callable,
        linear: Callable[..., int] = lambda **_: 0,
        *,
        cpu_form: Callable | None = None,
        native: Callable | None = None,
    ):
        self.form, self.linear = form, linear
        cpu_lowering = self._lowering(cpu_form or form, native) if cpu_form or native else None
        self.primitive = new_primitive(f"jnorm_{name}", self._abstract, self._lowering(form), cpu_lowering)
        ad.primitive_jvps[self.primitive] = self._jvp
        batching.primitive_batchers[self.primitive] = self._batch

    def __call__(self, *operands: jax.Array, **params: Any) -> list[jax.Array]:
        return self.primitive.bind(*align(operands), **params)

    def _abstract(self, *avals: Any, **params: Any) -> list:
        like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        return result_avals(avals[_index_of_x(avals)], jax.eval_shape(functools.partial(self.form, spans=one_device, **params), *like))

    # --- AD ---------------------------------------------------------------------------------------------------------------

    def _jvp(self, primals: Sequence, tangents: Sequence, /, **params: Any) -> tuple[list, list]:
        """The linear operands: the op itself. The others, met in second order only: the derivative of the plain form."""
        out, n = self.primitive.bind(*primals, **params), self.linear(**params)
        zero = [type(t) is ad.Zero for t in tangents]
        out_tangents = [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in out]
        if not all(zero[:n]):
            out_tangents = self(*map(ad.instantiate_zeros, tangents[:n]), *primals[n:], **params)
        rest = [i for i in range(n, len(primals)) if not zero[i]]
        if rest:
            more = self._jvp_of_form(primals, tangents, rest, **params)
            out_tangents = [ad.add_tangents(a, b) for a, b in zip(out_tangents, more, strict=True)]
        return out, out_tangents

    def _jvp_of_form(self, primals: Sequence, tangents: Sequence, moving: list[int], /, **params: Any) -> list:
        def of_moving(*values: jax.Array) -> list:
            full = list(primals)
            for i, v in zip(moving, values, strict=True):
                full[i] = v
            return self.form(*align(full), spans=one_device, **params)

        return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])[1]

    # --- batching: the new dimension becomes one more that is kept ----------------------------------------------------------

    def _batch(self, operands: Sequence, dims: Sequence, /, **params: Any) -> tuple[list, list]:
        size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
        stacked = [
            jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True)
        ]
        shifted = {k: tuple(i + 1 for i in v) if k.endswith("axes") else v for k, v in params.items()}
        out = self(*stacked, **shifted)
        return out, [0] * len(out)

    # --- lowering -----------------------------------------------------------------------------------------------------------

    def _lowering(self, form: Callable, native: Callable | None = None) -> Callable:
        def lower(context: Any, *operands: Any, **params: Any) -> Any:
            # Asked here: the compiler calls the body back on a thread of its own, where another choice may hold.
            chosen = native_or(form, native) if native and active() == "native" and _all_known(context.avals_in) else form
            body = functools.partial(chosen, **params)
            if automatic_device_count(context) > 1:
                return lower_as(_partitioned(body, context.avals_in, context.avals_out), context, *operands)
            return lower_as(functools.partial(body, spans=one_device), context, *operands)

        return lower


def _index_of_x(avals: Sequence) -> int:
    """The operand that is constant along the fewest axes. Sizes may be symbols, of which none is the larger."""
    return max(range(len(avals)), key=lambda i: sum(n != 1 for n in avals[i].shape))


def _all_known(avals: Sequence) -> bool:
    """Whether all sizes are numbers: `jax.export` takes symbols, of which no kernel knows whether it has the case."""
    return all(isinstance(n, int) for a in avals for n in a.shape)


def native_or(form: Callable, native: Callable) -> Callable:
    """The native form where it has the case, else the plain one."""

    def either(*operands: jax.Array, **params: Any) -> list[jax.Array]:
        out = native(*operands, **params)
        return form(*operands, **params) if out is None else out

    return either


def adjoint(a: Op, b: Op) -> None:
    """Declare two ops each other's transpose in their linear operands; the other operands are the same."""
    for f, g in ((a, b), (b, a)):
        ad.primitive_transposes[f.primitive] = functools.partial(_transpose, f, g)


def _transpose(f: Op, g: Op, cotangents: Sequence, /, *operands: Any, **params: Any) -> list:
    n = f.linear(**params)
    out = g(*map(ad.instantiate_zeros, cotangents), *operands[n:], **params)
    linear = zip(out, operands, strict=False)
    return [with_sharding_of(o, x.aval) if ad.is_undefined_primal(x) else None for o, x in linear] + [None] * (len(operands) - n)


# --- partitioning: jit over sharded arrays --------------------------------------------------------------------------------------


def _partitioned(body: Callable, avals_in: Sequence, avals_out: Sequence) -> Callable:
    """`body` run on every device's part, which merges what it reduces: x is never gathered."""
    large = _index_of_x(avals_in)
    full = avals_in[large].shape
    x64 = x64_enabled()

    def partition(mesh: Any, parts: Sequence, _results: Any) -> tuple:
        mesh, spec = mesh_and_spec(parts[large].sharding, mesh, len(full))
        # An axis that its devices do not divide is padded by the compiler, and the padding would be counted: such an axis is gathered.
        spec = [s if n % math.prod(mesh.shape[name] for name in _as_tuple(s)) == 0 else None for s, n in zip(spec, full, strict=True)]

        def spans(axes: Sequence[int]) -> tuple:
            return tuple(name for i in axes for name in _as_tuple(spec[i]))

        def aligned(aval: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(s if n == m else None for s, n, m in zip(spec, aval.shape, full, strict=True))))

        def local(*operands: jax.Array) -> tuple:
            # The compiler calls back on a thread of its own, which does not have this thread's setting.
            with jax.enable_x64(x64):
                return tuple(body(*operands, spans=spans))

        return mesh, local, tuple(map(aligned, avals_out)), tuple(map(aligned, avals_in))

    def plain(*operands: jax.Array) -> tuple:
        return tuple(body(*operands, spans=one_device))

    op = custom_partitioning(plain)
    rule = _sharding_rule([a.shape for a in avals_in], [a.shape for a in avals_out], full)
    op.def_partition(partition=partition, sharding_rule=rule, decode_shardings=False)
    return lambda *operands: list(op(*operands))


def _as_tuple(entry: Any) -> tuple:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _sharding_rule(ins: Sequence[tuple], outs: Sequence[tuple], full: tuple) -> SdyShardingRule:
    """Axes that an operand shares with x in full are x's factors; where it is constant, a factor of its own."""
    own = iter(range(10**6))

    def mapping(shape: tuple) -> ArrayMapping:
        return ArrayMapping(*(f"x{i}" if n == m else f"own{next(own)}" for i, (n, m) in enumerate(zip(shape, full, strict=True))))

    return SdyShardingRule(operand_mappings=tuple(map(mapping, ins)), result_mappings=tuple(map(mapping, outs)))
