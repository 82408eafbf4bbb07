"""What each norm of a model is called with, and whether that is an affine map of fixed numbers."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from ..._kernels._forms import activate
from ..._norms.feature_standardization import divisor_of
from ..._pipeline.marks import STATISTICS, UPDATES
from .._layers import STATELESS
from .graph import Graph, mark
from .steps import KeptError

# In evaluation y = (x - mean)·mul + bias, with the running statistics.
AFFINE = (
    "BatchNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "CrossMiniBatchNorm",
    "FeatureStandardization",
    "GhostBatchNorm",
    "MeanOnlyBatchNorm",
    "TrackedInstanceNorm",
)
_SWITCHES = ("use_running_average", "update_running")
_OTHERS = {
    "DivisiveBatchNorm": "it divides by what it finds around each value",
    "EvalNorm": "a sample's own statistics enter its evaluation",
}


@dataclasses.dataclass
class Call:
    """A norm's call in the trace.

    Args:
      shape: of its input.
      features: the axes of the features.
      dtype: of its output.
      alone: whether it does nothing beside normalizing.
    """

    shape: tuple[int, ...]
    features: tuple[int, ...]
    dtype: Any
    alone: bool


class Calls:
    """The norms of a model, by path, and their calls."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self.norms: dict[str, Any] = {}
        self.seen: dict[str, Call] = {}
        self.reasons: dict[str, str] = {}

    def note(self, path: str, norm: Any) -> bool:
        """Whether it may be folded, as far as its class says."""
        if path not in self.norms:
            self.norms[path] = norm
            if type(norm).__name__ not in AFFINE:
                sample = "its statistics are those of each sample"
                self.reasons[path] = _OTHERS.get(type(norm).__name__, sample if type(norm).__name__ in (*STATELESS, "InstanceNorm") else "")
        return type(norm).__name__ in AFFINE

    def run(self, path: str, norm: Any, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The norm's output, with marks at both ends."""
        given = inspect.signature(type(norm).__call__).bind(norm, *args, **kwargs).arguments
        name, x = next(item for item in given.items() if item[0] != "self")
        x = jnp.asarray(x)
        if _is_linen(norm) and not norm.has_variable("batch_stats", "mean"):
            raise ValueError(f"the norm {path!r} has no running statistics in the variables that were given: give all collections.")
        evaluates, updates = _switches(norm, given)
        if not evaluates:
            raise ValueError(
                f"fold needs the model as it evaluates, but the norm {path!r} was called with use_running_average=False: {self.remedy}."
            )
        if updates and _is_linen(norm):
            raise ValueError(
                f"fold needs the model as it evaluates, but the running statistics of {path!r} move in this call: {self.remedy}."
            )
        # A mask tells what enters the statistics of x, of which evaluation takes none.
        options = {key for key in ("statistics", "fit") if given.get(key) is not None and given.get(key) is not False}
        if options:
            self.reasons[path] = f"it is called with {' and '.join(sorted(options))}"
        elif updates:
            self.reasons[path] = "its running statistics move in this call"
        if has_layer(norm):
            # What it does after its layer is told apart; the rest of its own way there is used by nothing.
            dtype, x = call(*args, **kwargs).dtype, norm.layer_instance(x)
            out = mark(x, path, "in").astype(dtype)
        else:
            marked = mark(x, path, "in")
            out = call(marked, *args[1:], **kwargs) if args else call(**{**kwargs, name: marked})
        axes = norm.axis if hasattr(norm, "axis") else getattr(norm, "feature_axes", -1)
        features = tuple(sorted({int(a) % x.ndim for a in (axes if isinstance(axes, tuple | list) else (axes,))}))
        alone = getattr(norm, "activation", None) is None and given.get("residual") is None and not has_layer(norm)
        self.seen[path] = Call(x.shape, features, out.dtype, alone)
        return mark(out, path, "out")

    def check(self, graph: Graph, path: str) -> Call:
        """The one call of a norm that may be folded."""
        if self.reasons.get(path) is not None:
            raise KeptError(self.reasons[path])
        if path not in self.seen:
            raise KeptError("it is not called")
        if hidden := graph.hidden_in(path):
            raise KeptError(f"it is called in the body of a {hidden}")
        found = graph.marks(path, "in")
        if len(found) != 1:
            raise KeptError(f"it is called {len(found)} times" if found else "what it gives out is not used")
        if under := found[0].params["under"]:
            raise KeptError(f"it is called under {under}")
        return self.seen[path]


def has_layer(norm: Any) -> bool:
    """Whether it calls the layer before it itself."""
    return type(norm).__name__ == "CrossIterationBatchNorm"


def _is_linen(norm: Any) -> bool:
    return hasattr(norm, "has_variable")


def _has(norm: Any, key: str) -> bool:
    return norm.has_variable("batch_stats", key) if _is_linen(norm) else hasattr(norm, key)


def _switches(norm: Any, given: dict[str, Any]) -> tuple[bool, bool]:
    """Whether running statistics normalize, and whether they move, in this call. Flax's own norms know no marks and no `update_running`."""
    if type(norm).__name__ == "FeatureStandardization":
        return True, bool(given.get("fit"))
    evaluates, moves = (getattr(norm, name, None) if given.get(name) is None else given[name] for name in _SWITCHES)
    moves = not evaluates if moves is None else moves
    if not hasattr(norm, "update_running"):
        return bool(evaluates), bool(moves)
    return bool(evaluates) or _has(norm, STATISTICS), bool(moves) and not _has(norm, UPDATES)


def state_of(norm: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """What the map is made of, as "mean", "var" or "std", "scale" and "bias", of a norm's variables."""
    known = {key: variables[key] for key in ("mean", "var", "std", "scale", "bias") if variables.get(key) is not None}
    if type(norm).__name__ == "FeatureStandardization":
        statistics: Any = {"count": variables["count"], **known}
        return {"mean": known["mean"], "std": divisor_of(statistics, norm.correction, norm.minimum_std)}
    return known


def finished(x: Any, bias: Any, residual: Any, activation: Any, dtype: Any) -> jax.Array:
    """What stays of a norm that was folded into the layer before it."""
    x = jnp.asarray(x)
    others = [jnp.asarray(other) for other in (bias, residual) if other is not None]
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.result_type(x.dtype, jnp.float32) if others else x.dtype
    for other in others:
        x = x.astype(wide) + other.reshape((1,) * (x.ndim - other.ndim) + other.shape).astype(wide)
    if callable(activation):
        return cast(jax.Array, activation(x.astype(dtype)))
    return activate(activation, x).astype(dtype)
