"""Everything in jnorm that touches JAX internals, in one file. Tested with jax 0.10.0 and 0.10.2."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import config, core, dispatch, sharding_impls
from jax.extend import core as jex
from jax.interpreters import ad, mlir
from jax.sharding import Mesh, PartitionSpec
from jaxlib import xla_client


def varying_axes(a: jax.Array) -> frozenset:
    """Manual mesh axes over which the type of `a` varies; empty wherever types are not tracked (check_vma off, pmap, vmap)."""
    return core.typeof(a).mat.varying


def align(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Cast every array to vary over all the axes that any of them varies over."""
    union = frozenset().union(*map(varying_axes, arrays))
    return [lax.pcast(a, tuple(union - varying_axes(a)), to="varying") if union - varying_axes(a) else a for a in arrays]


def clamp(low: jax.Array, a: jax.Array, high: jax.Array) -> jax.Array:
    """`lax.clamp` to scalars, also in `shard_map(check_vma=True)` under `vmap(spmd_axis_name=...)`, where JAX leaves them uncast."""
    models = core.get_axis_env().spmd_axis_names & manual_axes() if types_track_varying() else None
    if not models:
        return lax.clamp(low, a, high)
    try:
        return lax.clamp(low, a, high)
    except ValueError:  # what is mapped varies over the models, which its type does not say
        low, high = (lax.pcast(v, tuple(models | varying_axes(a)), to="varying") for v in (low, high))
        return lax.clamp_p.bind(low, a, high)


def zeros_of(aval: Any) -> Any:
    """A zero tangent of this type, with the axes in it by which what it is the tangent of varies or lies."""
    return ad.instantiate_zeros(ad.Zero(aval))


def bound_axis_sizes() -> dict[Any, int]:
    """The named axes that are bound here, by `vmap`, `pmap` or `shard_map`, and their sizes."""
    return dict(core.get_axis_env().axis_sizes)


def manual_axes() -> frozenset:
    """The named axes that belong to a mesh (`shard_map`, `pmap`), and not to a `vmap`."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def mesh_axes() -> frozenset:
    """The axes of the mesh that is set or in use here, whether they are manual or not."""
    return frozenset(jax.sharding.get_abstract_mesh().axis_names)


def types_track_varying() -> bool:
    """Whether `shard_map(check_vma=True)` is being traced."""
    return bool(manual_axes()) and bool(config._check_vma.value)


def x64_enabled() -> bool:
    """The setting of this thread, which may be another than the global one."""
    return bool(config.enable_x64.value)


def new_primitive(name: str, abstract_eval: Callable, lowering: Callable, cpu_lowering: Callable | None = None) -> jex.Primitive:
    """A primitive of several results that runs eagerly, is lowered per platform, and is told the devices when it is."""
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *args, **params: dispatch.apply_primitive(primitive, *args, **params))
    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, lowering)
    if cpu_lowering is not None:
        mlir.register_lowering(primitive, cpu_lowering, platform="cpu")
    dispatch.prim_requires_devices_during_lowering.add(primitive)
    return primitive


def lower_as(fun: Callable, context: Any, *operands: Any) -> Any:
    """Lower the operands of a primitive as `fun` of them, which sees shapes and dtypes only: no shardings in types."""
    if not _has_explicit_axes():
        return mlir.lower_fun(fun, multiple_results=True)(context, *operands)
    plain = context.replace(avals_in=[core.ShapedArray(a.shape, a.dtype) for a in context.avals_in])
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return mlir.lower_fun(fun, multiple_results=True)(plain, *operands)


def _has_explicit_axes() -> bool:
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def automatic_device_count(context: Any) -> int:
    """Devices over which the compiler partitions the program by itself: 1 inside `pmap` and `shard_map`, wholly or partly manual.

    In a partly manual mesh `custom_partitioning` aborts, so the plain form is lowered there and XLA partitions that.
    """
    return getattr(context.module_context.axis_context, "num_devices", 1)


def replicated() -> PartitionSpec | None:
    """What a sum over sharded axes has to be told on a mesh of explicit axes; elsewhere nothing."""
    return PartitionSpec() if _has_explicit_axes() else None


def with_sharding_of(value: jax.Array, aval: Any) -> jax.Array:
    """The value with the sharding in the abstract value's type, on a mesh of explicit axes."""
    if not _has_explicit_axes() or core.typeof(value).sharding.spec == aval.sharding.spec:
        return value
    return jax.sharding.reshard(value, aval.sharding.spec)


def lying_along(value: jax.Array, x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The value, whose last axes are these of x, with x's sharding along them, on a mesh of explicit axes; elsewhere as it is."""
    if not _has_explicit_axes():
        return value
    spec, of_x = ((*s, *(None,) * (a.ndim - len(s))) for a, s in ((v, core.typeof(v).sharding.spec) for v in (value, x)))
    wanted = (*spec[: value.ndim - len(axes)], *(of_x[i] for i in axes))
    return value if wanted == spec else jax.sharding.reshard(value, PartitionSpec(*wanted))


def whole_along(value: jax.Array, axes: Collection[int]) -> jax.Array:
    """The value, gathered along axes that are split over a mesh of explicit axes; elsewhere as it is."""
    if not _has_explicit_axes():
        return value
    spec = core.typeof(value).sharding.spec
    wanted = PartitionSpec(*(None if i in axes else name for i, name in enumerate(spec)))
    return value if wanted == spec else jax.sharding.reshard(value, wanted)


def lies_whole_along(a: jax.Array, axes: Collection[int]) -> bool:
    """Whether no axis of these is split in the type of the array, as it may be on a mesh of explicit axes."""
    return not _has_explicit_axes() or all(i not in axes or name is None for i, name in enumerate(core.typeof(a).sharding.spec))


def cut_first_axis(value: jax.Array, sizes: tuple[int, int], axis: int) -> jax.Array:
    """The first axis as two. On a mesh of explicit axes what it is split over goes to `axis` of these, and is gathered where that does not
    divide."""
    shape = (*sizes, *value.shape[1:])
    if not _has_explicit_axes():
        return value.reshape(shape)
    sharding = core.typeof(value).sharding
    names = () if sharding.spec[0] is None else np.atleast_1d(np.asarray(sharding.spec[0], object))
    if sizes[axis] % math.prod(sharding.mesh.shape[name] for name in names):
        return whole_along(value, (0,)).reshape(shape)
    two = [None, None]
    two[axis] = sharding.spec[0]
    return lax.reshape(value, shape, out_sharding=PartitionSpec(*two, *sharding.spec[1:]))


def join_first_axes(value: jax.Array, like: jax.Array) -> jax.Array:
    """The first two axes as one, of which the result has as many as `like`, and its sharding on a mesh of explicit axes."""
    shape = (value.shape[0] * value.shape[1], *value.shape[2:])
    if not _has_explicit_axes():
        return value.reshape(shape)[: len(like)]
    spec = core.typeof(like).sharding.spec
    if shape[0] == len(like):
        return lax.reshape(value, shape, out_sharding=PartitionSpec(*spec))
    return jax.sharding.reshard(whole_along(value, (0, 1)).reshape(shape)[: len(like)], spec)


def lying_as(value: jax.Array, other: jax.Array) -> jax.Array:
    """The value, of the other's shape, with its sharding, on a mesh of explicit axes."""
    return with_sharding_of(value, core.typeof(other)) if value.shape == other.shape else value


def mesh_and_spec(sharding: Any, mesh: Mesh, ndim: int) -> tuple[Any, tuple]:
    """A mesh and the names of its axes that each axis of an array is split over, for what the compiler knows as the sharding.

    The mesh is the program's own. Where there is none, or one axis of it is split over two of the array, as a reshape leaves it, it is one
    with an axis for each of the array.
    """
    devices, tiling = np.asarray(sharding._device_assignment, object), sharding._hlo_sharding
    if not mesh.empty:
        with contextlib.suppress(ValueError, AssertionError):
            spec = sharding_impls.parse_flatten_op_sharding(tiling, mesh)[0]
            return mesh, tuple(spec) + (None,) * (ndim - len(spec))
    if tiling.is_replicated():
        return Mesh(devices, ("all",)), (None,) * ndim
    tiles = tiling.tile_assignment_dimensions()
    names = tuple(f"axis{i}" for i in range(len(tiles)))
    mesh = Mesh(devices[np.asarray(tiling.tile_assignment_devices())].reshape(tiles), names)
    return mesh, tuple(n if size > 1 else None for n, size in zip(names[:ndim], tiles, strict=False))


def result_avals(like: Any, shapes: Iterable[Any]) -> list:
    """Abstract results with the manual axes of the abstract operand `like`, and its sharding along every axis they share in full."""
    spec = tuple(like.sharding.spec) + (None,) * (len(like.shape) - len(like.sharding.spec))
    avals = []
    for s in shapes:
        aligned = [p if n == m else None for p, n, m in zip(spec, s.shape, like.shape, strict=True)]
        sharding = like.sharding.update(spec=PartitionSpec(*aligned))
        avals.append(core.ShapedArray(s.shape, s.dtype, sharding=sharding, manual_axis_type=like.mat))
    return avals


def register_cpu_target(name: str, function: Any) -> None:
    """Register a foreign function of a loaded library at once, which raises where it is of another version of XLA's interface.

    `jax.ffi.register_ffi_target` notes it down until the CPU backend starts, which then fails to, for all that runs on JAX.
    """
    xla_client._xla.register_custom_call_target(name, jax.ffi.pycapsule(function), "cpu", 1, 0)  # pyright: ignore[reportPrivateImportUsage]
