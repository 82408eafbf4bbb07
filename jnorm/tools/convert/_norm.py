"""One norm, told without any library: what all converters read into and write from."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

from ... import linen as jnn
from ... import nnx as jnx

KINDS = {
    "BatchNorm": "batch_norm",
    "TrackedInstanceNorm": "tracked_instance_norm",
    "InstanceNorm": "instance_norm",
    "GroupNorm": "group_norm",
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
}
RUNNING = ("BatchNorm", "TrackedInstanceNorm")
_WITHOUT_REDUCTION = ("BatchNorm",)
_STATE = ("mean", "var", "count")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """One norm with its values, as :func:`jnorm.batch_norm` and the others take it, whatever library it came from.

    Args:
      kind: the class of `jnorm.nnx` and `jnorm.linen`: "BatchNorm", "TrackedInstanceNorm", "InstanceNorm", "GroupNorm", "LayerNorm" or
        "RMSNorm". A batch norm that uses batch statistics in evaluation too is a "LayerNorm" whose reduction axes include the batch.
      shape: the sizes of the feature axes, in ascending order of the axes.
      scale, bias: of that shape, NumPy arrays in the dtype that they are trained in, or None.
      mean, var: the running statistics, of that shape, of norms that have them.
      count: jnorm's: the sum of the weights of the batches in a debiased (or cumulative) average, 0 before any; None: no debiasing.
      epsilon: added to the variance.
      momentum: the fraction of the OLD running value that is kept; None: the cumulative average, which needs a count.
      running_var_correction: 0 where the variance of a batch enters the running one biased, 1 where it does unbiased.
      feature_axes: of x, as the functions take them: (-1,) is channels last, (1,) channels second.
      reduction_axes: of x; None: what the norm of this kind reduces by itself.
      num_groups: of a "GroupNorm".
      activation: that is fused into it, which other libraries do not have.

    Example:
      >>> import numpy as np
      >>> from jnorm.tools import convert
      >>> norm = convert.Norm(kind="BatchNorm", shape=(2,), mean=np.zeros(2), var=np.ones(2), epsilon=1e-3, momentum=0.9)
      >>> type(norm.to_nnx()).__name__
      'BatchNorm'
    """

    kind: str
    shape: tuple[int, ...]
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    count: float | None = None
    epsilon: float = 1e-5
    momentum: float | None = 0.99
    running_var_correction: int | float = 0
    feature_axes: tuple[int, ...] = (-1,)
    reduction_axes: tuple[int, ...] | None = None
    num_groups: int | None = None
    activation: Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {list(KINDS)}, got {self.kind!r}.")
        if len(self.shape) != len(self.feature_axes):
            raise ValueError(f"shape has a size for each of the feature axes {self.feature_axes}, got {self.shape}.")
        if self.kind == "GroupNorm" and self.num_groups is None:
            raise ValueError("a GroupNorm needs num_groups.")
        for name in ("scale", "bias", "mean", "var"):
            got = getattr(self, name)
            if got is not None and np.shape(got) != self.shape:
                raise ValueError(f"{name} of a {self.kind} of features {self.shape} has the shape {np.shape(got)}.")
        if self.runs and (self.mean is None or self.var is None):
            raise ValueError(f"a {self.kind} has running statistics, but mean or var is None.")
        if self.runs and self.momentum is None and self.count is None:
            raise ValueError("momentum=None is the cumulative average, which needs a count.")

    @property
    def runs(self) -> bool:
        """Whether it has running statistics."""
        return self.kind in RUNNING

    @property
    def function(self) -> str:
        """The function of jnorm that this is a call of."""
        return KINDS[self.kind]

    def params(self) -> dict[str, jnp.ndarray]:
        """Scale and bias, those that there are: a Linen module's parameters, and arguments of the function."""
        return {name: jnp.asarray(a) for name in ("scale", "bias") if (a := getattr(self, name)) is not None}

    def state(self) -> dict[str, jnp.ndarray]:
        """The running statistics, as the function's state and Linen's "batch_stats"; empty where there are none. At least float32."""
        if not self.runs:
            return {}
        given = {name: jnp.asarray(a) for name in _STATE if (a := getattr(self, name)) is not None}
        return {name: a if a.dtype == np.float64 and name != "count" else a.astype(np.float32) for name, a in given.items()}

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return {**self._shared(), "feature_axes": self._features()}

    def to_nnx(self) -> Any:
        """The NNX module of jnorm, with these values."""
        options = {**self._of_modules(), "rngs": nnx.Rngs(0)}
        module = getattr(jnx, self.kind)(math.prod(self.shape), **options)
        for name, value in {**self.params(), **self.state()}.items():
            getattr(module, name).set_value(value.ravel() if value.ndim else value)
        return module

    def to_linen(self) -> tuple[Any, dict[str, Any]]:
        """The Linen module of jnorm, and its variables."""
        collections = {"params": self.params(), "batch_stats": self.state()}
        return getattr(jnn, self.kind)(**self._of_modules()), {name: tree for name, tree in collections.items() if tree}

    def _shared(self) -> dict[str, Any]:
        """What functions and modules call the same."""
        options: dict[str, Any] = {"epsilon": self.epsilon}
        if self.kind not in _WITHOUT_REDUCTION and self.reduction_axes is not None:
            options["reduction_axes"] = self.reduction_axes
        if self.kind not in ("LayerNorm", "RMSNorm") and self.activation is not None:
            options["activation"] = self.activation
        if self.runs:
            options |= {"momentum": self.momentum, "running_var_correction": self.running_var_correction}
        if self.kind == "GroupNorm":
            options["num_groups"] = self.num_groups
        return options

    def _features(self) -> Any:
        return self.feature_axes[0] if self.kind == "GroupNorm" else self.feature_axes

    def _of_modules(self) -> dict[str, Any]:
        params = [a for a in (self.scale, self.bias) if a is not None]
        options = {**self._shared(), "use_scale": self.scale is not None, "param_dtype": params[0].dtype if params else jnp.float32}
        if self.kind != "RMSNorm":
            options["use_bias"] = self.bias is not None
        if self.runs:
            options["track_count"] = self.count is not None
        options["axis" if self.kind == "BatchNorm" else "feature_axes"] = self._features()
        return options


def of_nnx(module: Any, shape: tuple[int, ...] | None = None) -> Norm:
    """The norm that an NNX module is, of jnorm's or of Flax's classes.

    `of_nnx(norm).to_nnx()` is jnorm's module of one norm, with copies of its values; :func:`jnorm.tools.replace_norms` with "jnorm" puts
    jnorm's in place of all norms of a model, and :func:`load_flax` fills a model that is written in jnorm's classes.

    Args:
      module: an instance of one of the classes that :class:`Norm` names.
      shape: the sizes of the feature axes, where there are several: an NNX module has all features in one axis of its variables. None:
        one axis.

    Returns:
      The norm.

    Raises:
      ValueError: a module of another class, or with another number of features.

    Example:
      >>> from flax import nnx
      >>> from jnorm.tools import convert
      >>> convert.of_nnx(nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))).options()
      {'epsilon': 1e-06, 'num_groups': 2, 'feature_axes': -1}
    """

    def value(name: str) -> np.ndarray | None:
        array = _host(getattr(module, name, None))
        return array if array is None or shape is None or not array.ndim else array.reshape(shape)

    return _of_module(module, value, shape)


def of_linen(module: Any, variables: Mapping[str, Any]) -> Norm:
    """The norm that a Linen module and its variables are, of jnorm's or of Flax's classes.

    Args:
      module: an instance of one of the classes that :class:`Norm` names.
      variables: its own: {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}, those that there are.

    Returns:
      The norm.

    Raises:
      ValueError: a module of another class.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm.tools import convert
      >>> module = nn.LayerNorm()
      >>> convert.of_linen(module, module.init(jax.random.key(0), jnp.ones((2, 3)))).shape
      (3,)
    """
    entries = {**meta.unbox(variables.get("params", {})), **meta.unbox(variables.get("batch_stats", {}))}
    for name in ("scale", "bias"):
        if bool(wanted := getattr(module, f"use_{name}", False)) != (name in entries):
            raise ValueError(
                f"{type(module).__name__} has use_{name}={wanted}, but its own variables, as needed here, are {list(entries)}."
            )
    return _of_module(module, lambda name: _host(entries.get(name)))


def _is_module(module: Any) -> bool:
    return isinstance(module, nnx.Module | nn.Module)


def _host(variable: Any) -> np.ndarray | None:
    if variable is None:
        return None
    return np.asarray(variable[...] if isinstance(variable, nnx.Variable) else variable)


def _of_module(module: Any, value: Any, shape: tuple[int, ...] | None = None) -> Norm:
    kind = type(module).__name__
    if kind not in KINDS or not _is_module(module):
        raise ValueError(f"{kind} is no norm that can be converted; those are {list(KINDS)}, of jnorm and of Flax.")
    arrays = {name: value(name) for name in ("scale", "bias", "mean", "var")}
    count = value("count")
    sizes = [a.shape for a in arrays.values() if a is not None]
    # Flax's GroupNorm of NNX says feature_axis; its Linen one has the last axis.
    features = module.axis if kind == "BatchNorm" else getattr(module, "feature_axes", getattr(module, "feature_axis", -1))
    features = tuple(features) if isinstance(features, list | tuple) else (features,)
    reduced = getattr(module, "reduction_axes", None)
    running = {}
    if kind in RUNNING:
        running = {"momentum": module.momentum, "running_var_correction": getattr(module, "running_var_correction", 0)}
    return Norm(
        kind=kind,
        shape=sizes[0] if sizes else shape or (getattr(module, "num_features", 0),),
        **arrays,
        count=None if count is None else float(count),
        epsilon=module.epsilon,
        feature_axes=features,
        reduction_axes=tuple(reduced) if isinstance(reduced, list | tuple) else None if reduced is None else (reduced,),
        num_groups=_groups(module, sizes),
        activation=getattr(module, "activation", None),
        **running,
    )


def _groups(module: Any, sizes: list[tuple[int, ...]]) -> int | None:
    if getattr(module, "num_groups", None) is None and getattr(module, "group_size", None) and sizes:
        return sizes[0][0] // module.group_size
    return getattr(module, "num_groups", None)
