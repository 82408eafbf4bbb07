"""Every way to spread one call over eight devices, for every norm: a `Way` makes programs of a case.

A program takes `cases.inputs` of the whole batch and gives [(those inputs, (y, state, gradients))], one entry for each model that it ran.
Arrays are split along axes of the mesh that lie on the batch, and of some ways also on the positions or the channels; scale, bias and
state are split as the features are.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cases

OF_X = ("x", "dy", "residual", "mask", "inputs")  # what has x's axes, but for the last of inputs; a mask may have 1 there


class Where(NamedTuple):
    """The mesh axes that x is split over."""

    batch: Any = None
    positions: Any = None
    channels: Any = None

    def dims(self, case, ndim):
        """One entry for each axis of x. Positions lie on the first axis that is neither the batch nor a feature."""
        dims = [None] * ndim
        dims[0] = self.batch
        if self.positions is not None:
            dims[next(i for i in range(1, ndim) if i not in case.features)] = self.positions
        if self.channels is not None:
            dims[channel_axis(case)] = self.channels
        return tuple(dims)

    def specs(self, case, given):
        """The PartitionSpec of each array."""
        shape = np.shape(given["x"])
        dims = self.dims(case, len(shape))

        def of_features(value):
            got = np.shape(value)
            if got == tuple(shape[i] for i in case.features) and got:
                return P(*(dims[i] for i in case.features))
            whole = not got or case.features != (len(shape) - 1,) or got[-1] != shape[-1]
            return P() if whole else P(*[None] * (len(got) - 1), dims[-1])

        def of_x(key, value):
            full = (*shape[:-1], 0) if key == "inputs" else shape
            return P(*(d if n == m else None for d, n, m in zip(dims, np.shape(value), full, strict=True)))

        return {k: of_x(k, v) if k in OF_X else jax.tree.map(of_features, v) for k, v in given.items()}


def channel_axis(case):
    return case.features[-1] if case.features else 3


def answer_specs(case, where):
    return where["x"], where.get("state", P()), {k: where[k] for k in case.differentiable}


def summed(local, case, where, names):
    """Sum each parameter's gradient over the axes that hold the same of it."""

    def run(given):
        y, state, gradients = local(given)
        for k in set(gradients) - {"x", "residual"}:
            split = [n for d in where[k] if d is not None for n in (d if isinstance(d, tuple) else (d,))]
            whole = tuple(n for n in names if n not in split)
            gradients[k] = jax.lax.psum(gradients[k], whole) if whole else gradients[k]
        return y, state, gradients

    return run


# --- by name ------------------------------------------------------------------------------------------------------------------


class ByShardMap(NamedTuple):
    """`names` of the mesh are ours; what is beyond them is left to the compiler."""

    mesh: Callable[[], Any]
    where: Where
    names: tuple
    merged: Any
    check_vma: bool = True
    steps: int = 1
    placed: Where | None = None
    models: str | None = None

    def program(self, case, through=cases.call, **options):
        mesh = self.mesh()
        local = cases.value_and_gradients(case, through, **names_of(case, self.merged, self.where), **options)
        local = functools.partial(steps, local, self.steps)

        def run(given):
            where = self.where.specs(case, given)
            f = local if self.check_vma else summed(local, case, where, [n for n in self.names if n != self.models])
            manual = {"mesh": mesh, "axis_names": set(self.names), "check_vma": self.check_vma}
            return jax.shard_map(f, in_specs=(where,), out_specs=answer_specs(case, where), **manual)(given)

        if self.models:
            return of_models(run, case, mesh, self.where, self.models)
        run = jax.jit(run)

        def call(given):
            if self.placed is None:
                return [(given, run(given))]
            with context(mesh):
                return [(given, run(place(case, given, mesh, self.placed)))]

        return call


def names_of(case, merged, where):
    """What a norm has to be told; some of those within samples know no axis name."""
    of_batch = {"batch_axis_name": where.batch} if case.tracked else {}
    return of_batch if merged is None else {"axis_name": merged, **of_batch}


def steps(local, number, given):
    """The last of several steps, of which each has the state of the one before."""
    if number == 1:
        return local(given)

    def step(state, _):
        y, state, gradients = local(given | {"state": state})
        return state, (y, gradients)

    state, (y, gradients) = jax.lax.scan(step, given["state"], None, length=number)
    return jax.tree.map(lambda a: a[-1], y), state, jax.tree.map(lambda a: a[-1], gradients)


class ByLanes(NamedTuple):
    """`pmap`, or `vmap` with an axis name; the whole state comes out of each lane."""

    map: Callable[..., Any]
    merged: Any

    def program(self, case, through=cases.call, **options):
        local = cases.value_and_gradients(case, through, **names_of(case, self.merged, Where("d")), **options)
        whole = dict.fromkeys(case.differentiable, P())
        mapped = functools.cache(lambda keys: self.map(summed(local, case, whole, ("d",)), axis_name="d", in_axes=(lanes_of(keys),)))

        def call(given):
            pieces = {k: v.reshape(8, -1, *v.shape[1:]) if k in OF_X else v for k, v in given.items()}
            y, state, gradients = mapped(tuple(given))(pieces)
            state = jax.tree.map(alike, state)
            return [(given, (flat(y), state, {k: flat(v) if k in OF_X else alike(v) for k, v in gradients.items()}))]

        return call


def lanes_of(keys):
    return {k: 0 if k in OF_X else None for k in keys}


def flat(a):
    return np.asarray(a).reshape(-1, *a.shape[2:])


def alike(a):
    """What is the same on every device."""
    a = np.asarray(a)
    np.testing.assert_array_equal(a, np.broadcast_to(a[:1], a.shape))
    return a[0]


# --- jit over sharded arrays ----------------------------------------------------------------------------------------------------


def context(mesh):
    return jax.set_mesh(mesh) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()


def place(case, given, mesh, where):
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), given, where.specs(case, given))


class BySharding(NamedTuple):
    """No axis name: the compiler, or on Explicit axes the types, say where things are."""

    mesh: Callable[[], Any]
    where: Where
    models: str | None = None

    def program(self, case, through=cases.call, **options):
        mesh = self.mesh()
        run = cases.value_and_gradients(case, through, **options)
        if self.models:
            return of_models(run, case, mesh, self.where, self.models)
        run = jax.jit(run)

        def call(given):
            with context(mesh):
                out = run(place(case, given, mesh, self.where))
            want = answer_specs(case, self.where.specs(case, given))
            if AxisType.Explicit in mesh.axis_types:
                jax.tree.map(check_lies, out, (want[0], want[1] if out[1] else None, want[2]))
            elif self.where.batch is not None:
                assert not out[0].sharding.is_fully_replicated and len(out[0].sharding.device_set) == 8
            return [(given, out)]

        return call


def check_lies(a, spec):
    got, want = (tuple(s) + (None,) * (a.ndim - len(tuple(s))) for s in (a.sharding.spec, spec))
    assert got == want, (a.shape, got, want)


def of_models(run, case, mesh, where, name):
    """Two models side by side, over their own axis of the mesh by `spmd_axis_name`, each with its batch on the other one."""
    mapped = jax.jit(jax.vmap(run, spmd_axis_name=name))

    def call(given):
        both = [given, {**given, "x": (1 - given["x"] / 2).astype(given["x"].dtype)}]
        stacked = jax.tree.map(lambda *a: np.stack(a), *both)
        specs = jax.tree.map(lambda s: P(name, *s), where.specs(case, given), is_leaf=lambda s: isinstance(s, P))
        out = mapped(jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), stacked, specs))
        return [(g, jax.tree.map(lambda a, i=i: a[i], out)) for i, g in enumerate(both)]

    return call


def mesh(kind, shape, names):
    return functools.partial(jax.make_mesh, shape, names, axis_types=(kind,) * len(names))


LINE, AUTO, EXPLICIT = {"d": 8}, AxisType.Auto, AxisType.Explicit
GRID = {"d": 4, "m": 2}


def of(kind, axes):
    return mesh(kind, tuple(axes.values()), tuple(axes))


def by_names(merged, axes=LINE, check_vma=True, where=Where("d"), kind=AUTO, names=None, **more):  # noqa: B008
    return ByShardMap(of(kind, axes), where, tuple(names or axes), merged, check_vma, **more)


def by_types(kind, axes=LINE, where=Where("d"), **more):  # noqa: B008
    return BySharding(of(kind, axes), where, **more)


BOTH, CHANNELS, PLACES = Where("d", channels="m"), Where(channels="d"), Where("d", positions="m")
TWO = {"axes": {"a": 2, "b": 4}, "where": Where(("a", "b"))}
MODELS = {"axes": {"m": 2, "d": 4}, "models": "m"}
PARTLY = {"axes": GRID, "names": ("d",), "placed": PLACES}

JIT = {
    "auto batch": by_types(AUTO),
    "auto batch and channels": by_types(AUTO, GRID, BOTH),
    "explicit batch": by_types(EXPLICIT),
    "explicit channels": by_types(EXPLICIT, where=CHANNELS),
    "explicit batch and channels": by_types(EXPLICIT, GRID, BOTH),
    "explicit batch and positions": by_types(EXPLICIT, GRID, PLACES),
    "spmd_axis_name, auto": by_types(AUTO, **MODELS),
}


def ways(merged):
    """The batch is split; `merged`: "d", or None for norms that need nothing of other samples."""
    two = None if merged is None else ("a", "b")
    return JIT | {
        "pmap": ByLanes(jax.pmap, merged),
        "vmap": ByLanes(lambda *a, **k: jax.jit(jax.vmap(*a, **k)), merged),
        "shard_map": by_names(merged),
        "shard_map unchecked": by_names(merged, check_vma=False),
        "two names": by_names(two, **TWO),
        "two names unchecked": by_names(two, check_vma=False, **TWO),
        "batch and channels": by_names(merged, GRID, where=BOTH),
        "batch and channels unchecked": by_names(merged, GRID, False, where=BOTH),
        "partly manual": by_names(merged, **PARTLY),
        "partly manual unchecked": by_names(merged, check_vma=False, **PARTLY),
        "partly manual, explicit": by_names(merged, kind=EXPLICIT, **PARTLY),
        "spmd_axis_name, shard_map": by_names(merged, **MODELS),
        "spmd_axis_name, shard_map unchecked": by_names(merged, check_vma=False, **MODELS),
    }


OVER_BATCH = ways("d") | {
    "scan": by_names("d", steps=2),
    "scan unchecked": by_names("d", check_vma=False, steps=2),
}
WITHIN_SAMPLES = ways(None)


def split_samples(axis):
    """Samples that are split themselves, along "positions" or "channels", by the name of the mesh axis."""
    grid = Where("d", **{axis: "m"})
    pair = {"axes": {"a": 2, "b": 2, "d": 2}, "where": Where("d", **{axis: ("a", "b")})}
    return {
        f"{axis} by name": by_names("m", GRID, where=grid),
        f"{axis} by name unchecked": by_names("m", GRID, False, where=grid),
        f"{axis} by two names": by_names(("a", "b"), **pair),
        f"{axis} by two names unchecked": by_names(("a", "b"), check_vma=False, **pair),
    }
