"""The operations of a traced function as a graph, with the calls of functions in it opened up, and what marks a norm in it."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching

from ..._jax_internals import new_primitive

# Calls that compute what their body does, by the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}

# An identity that tells where in a program a norm begins and ends. It means nothing to a program that is run.
mark_p = new_primitive("jnorm_mark", lambda x, **_: [x], lambda _, x, **__: [x])
batching.primitive_batchers[mark_p] = lambda xs, axes, **params: (mark_p.bind(*xs, **{**params, "under": "vmap"}), axes)
# Tangents are not marked, and would pass a folded norm unscaled.
ad.primitive_jvps[mark_p] = lambda xs, ts, **params: (mark_p.bind(*xs, **{**params, "under": "a derivative"}), list(ts))


def mark(x: Any, path: str, end: str) -> jax.Array:
    """x, which is where the norm at `path` begins ("in") or ends ("out")."""
    return mark_p.bind(jnp.asarray(x), path=path, end=end, under="")[0]


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program: what makes it, what uses it, which parameter it is, and whether it is the same in each call."""

    shape: tuple[int, ...]
    dtype: Any
    producer: "Step | None" = None
    users: list["Step"] = dataclasses.field(default_factory=list)
    leaf: Any = None
    is_output: bool = False
    fixed: bool = False
    constant: Any = None

    @property
    def uses(self) -> int:
        return len(self.users) + self.is_output


@dataclasses.dataclass(eq=False)
class Step:
    """An operation. `called` is the name of the innermost function that it is in."""

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    called: str

    def __str__(self) -> str:
        return f"{self.called} ({self.name})" if self.called else self.name


@dataclasses.dataclass
class Graph:
    steps: list[Step]
    leaves: dict[Any, Value]

    def marks(self, path: str, end: str) -> list[Step]:
        return [s for s in self.steps if s.name == mark_p.name and (s.params["path"], s.params["end"]) == (path, end)]

    def hidden_in(self, path: str) -> str | None:
        """The operation in whose body a norm is called, such as a scan."""
        return next((s.name for s in self.steps if any(path in marked(body) for body in bodies(s.params))), None)


def bodies(params: dict[str, Any]) -> Iterable[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, jex.ClosedJaxpr | jex.Jaxpr):
                yield getattr(one, "jaxpr", one)


def marked(jaxpr: Any) -> set[str]:
    """The paths of all norms that are called in a body, however deep."""
    here = {e.params["path"] for e in jaxpr.eqns if e.primitive is mark_p}
    return here.union(*(marked(body) for e in jaxpr.eqns for body in bodies(e.params)))


def graph_of(closed: Any, leaves: Sequence[Any], after: Sequence[int | None]) -> Graph:
    """Of a closed jaxpr. What nothing uses is left out.

    Args:
      closed: its first arguments are the model's.
      leaves: their names, of parameters, or None for what is none.
      after: of each result, which of the arguments it is the next value of, if any; where that is as it was, it is no use of it.
    """
    own = [_value(v, leaf=leaf, fixed=True) for v, leaf in zip(closed.jaxpr.invars, leaves, strict=False)]
    inputs = own + [_value(v) for v in closed.jaxpr.invars[len(own) :]]
    steps: list[Step] = []
    for out, before in zip(_open(closed.jaxpr, closed.consts, inputs, "", steps), after, strict=True):
        out.is_output |= before is None or out is not inputs[before]
    used, kept = set(), []
    for step in reversed(steps):
        if any(v.is_output or id(v) in used for v in step.outputs):
            used.update(map(id, step.inputs))
            kept.append(step)
    kept.reverse()
    for step, v in itertools.chain.from_iterable(((s, v) for v in s.inputs) for s in kept):
        v.users.append(step)
    return Graph(kept, {v.leaf: v for v in inputs if v.leaf is not None})


def _value(v: Any, **fields: Any) -> Value:
    return Value(tuple(getattr(v.aval, "shape", ())), getattr(v.aval, "dtype", None), **fields)


def _open(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value], called: str, steps: list[Step]) -> list[Value]:
    """Adds the steps of a body, and gives its results."""
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= {v: _value(v, constant=c, fixed=True) for v, c in zip(jaxpr.constvars, consts, strict=True)}

    def read(v: Any) -> Value:
        return _value(v, constant=v.val, fixed=True) if isinstance(v, jex.Literal) else env[v]

    for eqn in jaxpr.eqns:
        operands, body = [read(v) for v in eqn.invars], eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if body is not None:
            name = eqn.params.get("name", "") if eqn.primitive.name in ("jit", "pjit", "custom_jvp_call") else ""
            results = _open(getattr(body, "jaxpr", body), getattr(body, "consts", ()), operands, name or called, steps)
        else:
            results = [_value(v) for v in eqn.outvars]
            steps.append(Step(eqn.primitive.name, eqn.params, operands, results, called))
            for v in results:
                v.producer = steps[-1]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]
