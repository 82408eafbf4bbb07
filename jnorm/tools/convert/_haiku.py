"""Haiku's norms. Its modules live in a transformed function only: what is read and written are its trees, and no Haiku is needed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._norm import Norm

Axis = int | Sequence[int] | slice
Tree = Mapping[str, Mapping[str, Any]]
_CLASSES = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
_PARAMS = (("scale", "scale"), ("bias", "offset"))
_EMA = (("mean", "mean_ema"), ("var", "var_ema"))


class HaikuNorm(NamedTuple):
    """A norm as Haiku has it: `getattr(hk, cls)(**options, name=name)`, and its entries of the trees of parameters and state."""

    cls: str
    options: dict[str, Any]
    params: dict[str, dict[str, np.ndarray]]
    state: dict[str, dict[str, np.ndarray]]


# --- From Haiku -----------------------------------------------------------------------------------------------------------------------


def of_haiku(
    cls: str,
    name: str,
    params: Tree,
    state: Tree | None = None,
    *,
    decay_rate: float | None = None,
    eps: float = 1e-5,
    axis: Axis | None = None,
    param_axis: int | Sequence[int] | None = None,
    groups: int | None = None,
    data_format: str = "channels_last",
    ndim: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Norm:
    """The norm that a module of Haiku is, out of the trees, and with what was passed to its constructor, which the trees do not have.

    Haiku's `decay_rate` is the fraction of the OLD value, as the momentum here. Its averages are debiased: the state has hidden, average
    and a counter k, with average = hidden / (1 - decay_rate^k), and here the mean is the average and the count
    (1 - decay_rate^k) / (1 - decay_rate). The values are copied.

    Args:
      cls: "BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm" or "RMSNorm".
      name: of the module, as in the trees: "resnet/~/batch_norm".
      params: the tree of all parameters, {"resnet/~/batch_norm": {"scale": …, "offset": …}, …}.
      state: the tree of all state, for a BatchNorm: {"resnet/~/batch_norm/~/mean_ema": {"hidden", "average", "counter"}, …}.
      decay_rate: of a BatchNorm.
      eps: as Haiku's.
      axis: the axes that are reduced, as Haiku's: for LayerNorm and RMSNorm needed.
      param_axis: of LayerNorm and RMSNorm; None: the last, as Haiku's.
      groups: of a GroupNorm.
      data_format: as Haiku's.
      ndim: the number of axes of x, where `axis` is a slice and no parameter tells it.
      shape: the sizes of the feature axes, where there is neither scale nor offset to tell it.

    Returns:
      The norm.

    Raises:
      ValueError: another class; no such module in the trees; a `decay_rate` that is missing, or that hidden and average contradict; what
        jnorm's norms do not do.

    Example:
      >>> import numpy as np
      >>> from jnorm.tools import convert
      >>> params = {"norm": {"scale": np.ones((1, 1, 4)), "offset": np.zeros((1, 1, 4))}}
      >>> ema = {"hidden": np.full((1, 1, 4), 0.19), "average": np.ones((1, 1, 4)), "counter": np.int32(2)}
      >>> norm = convert.of_haiku("BatchNorm", "norm", params, {"norm/~/mean_ema": ema, "norm/~/var_ema": ema}, decay_rate=0.9)
      >>> norm.mean.shape, round(norm.count, 6)
      ((4,), 1.9)
    """
    if cls not in _CLASSES:
        raise ValueError(f"cls must be one of {list(_CLASSES)}, got {cls!r}.")
    arrays = _entry(params, name, ("scale", "offset"), cls == "BatchNorm" or shape is not None)
    values: dict[str, Any] = {ours: np.array(arrays[theirs]) for ours, theirs in _PARAMS if theirs in arrays}
    if cls == "BatchNorm":
        return _batch_norm(name, values, state or {}, decay_rate, eps, axis, _channel(data_format))
    channel = _channel(data_format)
    if cls in ("LayerNorm", "RMSNorm"):
        ndim = max((a.ndim for a in values.values() if a.ndim > 1), default=ndim)  # the last axis alone is kept without the others
        features = (-1,) if param_axis is None else _axes(param_axis, ndim)
        reduced = _axes(_needed(axis, "axis", cls), ndim)
        values = {key: a if a.ndim == 1 else a.reshape([a.shape[i] for i in features]) for key, a in values.items()}
    else:
        features = (channel,)
        reduced = None if axis is None or axis == slice(1, None) else _reduced_with_channel(axis, ndim, channel)
        values = {key: a.ravel() for key, a in values.items()}
    sizes = shape if shape is not None else next(iter(values.values())).shape
    if cls == "GroupNorm":
        _needed(groups, "groups", cls)
    return Norm(kind=cls, shape=tuple(sizes), epsilon=eps, feature_axes=features, reduction_axes=reduced, num_groups=groups, **values)


def _entry(tree: Tree, name: str, keys: tuple[str, ...], may_miss: bool = False) -> Mapping[str, Any]:
    found = tree.get(name, {} if may_miss else None)
    if found is None:
        raise ValueError(f"there is no module {name!r} in the tree, which has {sorted(tree)}; a norm without parameters needs shape.")
    if extra := sorted(set(found) - set(keys)):
        raise ValueError(f"{name!r} has {extra}, which no norm has; it has {list(keys)}.")
    return found


def _needed(value: Any, what: str, cls: str) -> Any:
    if value is None:
        raise ValueError(f"{what} of a {cls} is not in Haiku's trees: pass what its constructor was given.")
    return value


def _channel(data_format: str) -> int:
    if data_format in ("channels_last", "NWC", "NHWC", "NDHWC", "N...C"):
        return -1
    if data_format in ("channels_first", "NCW", "NCHW", "NCDHW", "NC..."):
        return 1
    raise ValueError(f"data_format must be 'channels_last' or 'channels_first', got {data_format!r}.")


def _axes(axis: Axis, ndim: int | None) -> tuple[int, ...]:
    if isinstance(axis, int):
        return (axis,)
    if not isinstance(axis, slice):
        return tuple(axis)
    if ndim is None:
        raise ValueError(f"axis={axis} needs ndim, the number of axes of x.")
    return tuple(range(ndim))[axis]


def _reduced_with_channel(axis: Axis, ndim: int | None, channel: int) -> tuple[int, ...]:
    axes = _axes(axis, ndim)
    if channel not in axes and (ndim is None or channel % ndim not in {a % ndim for a in axes}):
        raise ValueError(f"axis={axis} of a GroupNorm leaves the channels out, and so has no groups: it is an instance norm.")
    return axes


def _batch_norm(name: str, values: dict, state: Tree, decay: Any, eps: float, axis: Axis | None, channel: int) -> Norm:
    decay = _needed(decay, "decay_rate", "BatchNorm")
    emas = {ours: _entry(state, f"{name}/~/{theirs}", ("hidden", "average", "counter")) for ours, theirs in _EMA}
    for ours, ema in emas.items():
        check_debiased(name, ours, ema, decay)
    mean = np.asarray(emas["mean"]["average"])
    ndim = mean.ndim
    reduced = None if axis is None else {a % ndim for a in _axes(axis, ndim)}
    features = (channel,) if reduced is None else tuple(a for a in range(ndim) if a not in reduced)
    shape = tuple(mean.shape[a] for a in features)
    arrays: dict[str, Any] = {ours: np.array(ema["average"]) for ours, ema in emas.items()} | values
    for key, a in arrays.items():
        if a.size != math.prod(shape):
            raise ValueError(f"{key} of {name!r} has the shape {a.shape}, but the features are {shape}.")
    arrays = {key: a.reshape(shape) for key, a in arrays.items()}
    counter = int(emas["mean"]["counter"])
    return Norm(
        kind="BatchNorm",
        shape=shape,
        epsilon=eps,
        momentum=decay,
        count=count_of(counter, decay),
        feature_axes=features,
        **arrays,
    )


def count_of(steps: int, momentum: float) -> float:
    """The count here of a debiased average after so many steps: the sum of the weights of the batches."""
    return -math.expm1(steps * math.log(momentum)) / (1 - momentum) if momentum else float(min(steps, 1))


def steps_of(count: float | None, momentum: float | None, name: str) -> int:
    """The number of steps after which a debiased average has this count; without a count so many that nothing is left to debias."""
    if momentum is None or momentum >= 1:
        raise ValueError(f"{name} has no cumulative average: give the norm a momentum below 1 with dataclasses.replace.")
    if not momentum:
        return 0 if count == 0 else 1
    enough = math.ceil(-25 * math.log(2) / math.log(momentum))  # the power is under half of float32's epsilon
    if count is None:
        return enough
    left = 1 - count * (1 - momentum)
    steps = enough if left <= 2**-25 else round(math.log(left) / math.log(momentum))
    if abs(count_of(steps, momentum) - count) > 1e-4 * max(count, 1):
        raise ValueError(
            f"the count {count:g} is that of no whole number of steps with momentum={momentum:g}, which {name} keeps in its place: pass "
            "dataclasses.replace(norm, count=None), which changes further training only."
        )
    return steps


def check_debiased(name: str, what: str, ema: Mapping[str, Any], decay: float) -> None:
    """A wrong decay_rate shows here, and so does an average that was changed without what it is made from."""
    steps, hidden, average = int(ema["counter"]), np.asarray(ema["hidden"]), np.asarray(ema["average"])
    eps = float(np.finfo(average.dtype).eps) if average.dtype.kind == "f" else 2.0**-7  # bfloat16
    left = decay**steps
    # Haiku's rounding of the decay grows with the power, and its difference from 1 is divided by.
    rounding = 4 * max(eps, 2.0**-23) * (2 + steps * left / max(1 - left, eps)) + 4 * eps
    hidden, average = hidden.astype(np.float64), average.astype(np.float64)
    if (abs(average * (1 - left) - hidden) > rounding * abs(hidden) + 1e-30).any():
        raise ValueError(
            f"the {what} of {name!r} has an average that is not hidden / (1 - {decay:g}**{steps}): decay_rate, the momentum "
            "here, is another, or one of the two was set by hand."
        )


# --- To Haiku -------------------------------------------------------------------------------------------------------------------------


def as_haiku(norm: Norm, name: str, *, ndim: int = 4) -> HaikuNorm:
    """The module of Haiku that a norm is, with its entries of the trees.

    Args:
      norm: of :func:`of_haiku`, :func:`of_nnx` or :func:`of_linen`, or made by hand.
      name: of the module, as it will be in the trees.
      ndim: the number of axes of x, which the shapes of Haiku's arrays have.

    Returns:
      The class's name, the options of its constructor, and {name: {"scale", "offset"}} and {name/~/mean_ema: …, name/~/var_ema: …}, which
      are to be merged into the trees. An average that is not debiased gets a counter so large that nothing is left to debias.

    Raises:
      ValueError: what Haiku's class cannot do: an unbiased running variance, a cumulative average, a fused activation, a count that is of
        no whole number of steps.

    Example:
      >>> import numpy as np
      >>> from jnorm.tools import convert
      >>> norm = convert.Norm(kind="BatchNorm", shape=(2,), mean=np.ones(2), var=np.ones(2), count=1.9, momentum=0.9)
      >>> theirs = convert.as_haiku(norm, "norm", ndim=2)
      >>> ema = theirs.state["norm/~/mean_ema"]
      >>> theirs.options["decay_rate"], ema["hidden"].round(6).tolist(), int(ema["counter"])
      (0.9, [[0.19, 0.19]], 2)
    """
    if norm.kind not in _CLASSES:
        raise ValueError(f"Haiku has no {norm.kind}; it has {list(_CLASSES)}.")
    if norm.activation is not None:
        raise ValueError("Haiku's norms have no activation: put it after, and pass dataclasses.replace(norm, activation=None).")
    values = {theirs: a for ours, theirs in _PARAMS if (a := getattr(norm, ours)) is not None}
    options: dict[str, Any] = {"eps": norm.epsilon, "create_scale": norm.scale is not None}
    if norm.kind != "RMSNorm":
        options["create_offset"] = norm.bias is not None
    last = tuple(a % ndim for a in norm.feature_axes) == (ndim - 1,)
    kept = [1] * ndim
    for a, n in zip(norm.feature_axes, norm.shape, strict=True):
        kept[a] = n
    if norm.kind == "BatchNorm":
        state = _batch_norm_state(norm, name, tuple(kept))
        options |= {"decay_rate": norm.momentum} | _format_or_axis(norm, ndim, last)
        return HaikuNorm("BatchNorm", options, _tree(name, values, tuple(kept)), state)
    if norm.kind in ("LayerNorm", "RMSNorm"):
        options |= {"axis": norm.feature_axes if norm.reduction_axes is None else norm.reduction_axes, "param_axis": norm.feature_axes}
        return HaikuNorm(norm.kind, options, _tree(name, values, norm.shape if last else tuple(kept)), {})
    options |= _format_or_axis(norm, ndim, last)
    if "axis" in options or (norm.kind == "InstanceNorm" and norm.reduction_axes is not None):
        raise ValueError(f"Haiku's {norm.kind} has its channels last or second, and no other axes, got {norm.feature_axes}.")
    if norm.kind == "GroupNorm":
        options |= {"groups": norm.num_groups} | ({} if norm.reduction_axes is None else {"axis": norm.reduction_axes})
        kept = kept[1:]
    return HaikuNorm(norm.kind, options, _tree(name, values, norm.shape if last else tuple(kept)), {})


def _tree(name: str, values: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    return {name: {key: np.array(a).reshape(shape) for key, a in values.items()}} if values else {}


def _format_or_axis(norm: Norm, ndim: int, last: bool) -> dict[str, Any]:
    features = {a % ndim for a in norm.feature_axes}
    if last or features == {1}:
        return {"data_format": "channels_last" if last else "channels_first"}
    return {"axis": [a for a in range(ndim) if a not in features]}


def _batch_norm_state(norm: Norm, name: str, shape: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    if norm.running_var_correction:
        raise ValueError(
            f"Haiku's running variance is biased, that of this norm has running_var_correction={norm.running_var_correction}: pass "
            "dataclasses.replace(norm, running_var_correction=0), which changes further training only."
        )
    steps = steps_of(norm.count, norm.momentum, "Haiku's BatchNorm")
    rest = 1 - (norm.momentum or 0) ** steps
    state = {}
    for ours, theirs in _EMA:
        average = np.array(getattr(norm, ours)).reshape(shape)
        hidden = (average.astype(np.float64) * rest).astype(average.dtype)
        state[f"{name}/~/{theirs}"] = {"hidden": hidden, "average": average, "counter": np.int32(steps)}
    return state
