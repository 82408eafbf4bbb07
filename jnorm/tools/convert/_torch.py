"""PyTorch's norms, one at a time, and its tensors."""

import functools
import importlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._norm import Norm

_SIDE = re.compile(r"(?:^|(?<=\.))(\w+)_(g|orig)$")  # names of the hooks that were before parametrizations


def import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("PyTorch is not installed: pip install 'jnorm[torch]'.", name="torch") from error


def array_of(tensor: Any) -> np.ndarray:
    """A tensor, or anything like an array, as one of NumPy; bfloat16 stays bfloat16."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    return tensor.float().numpy().astype(jnp.bfloat16) if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()


def tensor_of(array: np.ndarray) -> Any:
    torch = import_torch()
    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.astype(np.float32)).bfloat16()
    return torch.tensor(array)


def canonical_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """With the names of parametrizations for those of the hooks that `torch.nn.utils.weight_norm` and `spectral_norm` were before."""
    names = {}
    for key in state:
        if match := _SIDE.search(key):
            stem, weight, kind = key[: match.start()], match[1], match[2]
            beside = {"g": ("v",), "orig": ("u", "v")}[kind]
            if all(f"{stem}{weight}_{name}" in state for name in beside):
                to = f"{stem}parametrizations.{weight}."
                new = ("original0", "original1") if kind == "g" else ("original", "0._u", "0._v")
                names |= {f"{stem}{weight}_{old}": to + now for old, now in zip((kind, *beside), new, strict=True)}
    return {names.get(key, key): value for key, value in state.items()}


def parametrized_keys(key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What may stand for a weight's key: of weight normalization (length, direction), and of spectral normalization (weight, u, v)."""
    stem, _, name = key.rpartition(".")
    to = f"{stem}.parametrizations.{name}." if stem else f"parametrizations.{name}."
    return (f"{to}original0", f"{to}original1"), (f"{to}original", f"{to}0._u", f"{to}0._v")


def folded_weight(key: str, arrays: list[np.ndarray], dim: int) -> np.ndarray:
    """The weight that a parametrization gives in evaluation. `dim` is of the rows that spectral normalization sees."""
    arrays = [a.astype(np.float64) for a in arrays]
    if len(arrays) == 2:
        length, v = arrays
        if length.shape not in ((), *(tuple(n if i == d else 1 for i, n in enumerate(v.shape)) for d in range(v.ndim))):
            raise ValueError(f"{key}: the length of weight normalization has shape {length.shape}, the direction {v.shape}.")
        rest = tuple(d for d in range(v.ndim) if length.ndim == 0 or length.shape[d] == 1)
        # An axis of size 1 is summed over either way.
        return v * length / np.sqrt((v**2).sum(rest, keepdims=True))
    w, u, v = arrays
    matrix = np.moveaxis(w, dim, 0).reshape(w.shape[dim], -1)
    if (u.size, v.size) != matrix.shape:
        raise ValueError(f"{key}: u and v of spectral normalization have the sizes {u.size} and {v.size}, the matrix {matrix.shape}.")
    return w / (u @ matrix @ v)


# --- Norms ----------------------------------------------------------------------------------------------------------------------------


def of_torch(module: Any, *, channels_last: bool = True, ndim: int | None = None) -> Norm:
    """The norm that a PyTorch module is, with its values and with what a state dict does not have.

    PyTorch's momentum is the fraction of the NEW value (0.1 is 0.9 here), its running variance is unbiased, its epsilon is inside of the
    root, as here. The values are copied.

    Args:
      module: BatchNorm1d, 2d, 3d, SyncBatchNorm, InstanceNorm1d, 2d, 3d, GroupNorm, LayerNorm or RMSNorm, of `torch.nn`.
      channels_last: x here has its channels last, as Flax's layers give it, not second as in PyTorch. LayerNorm and RMSNorm normalize the
        last axes either way: where x has another layout here, give them another x, or other axes.
      ndim: of x, which a batch norm without running statistics needs where its class does not say it (BatchNorm1d, SyncBatchNorm).

    Returns:
      The norm. A batch norm that was made with `track_running_stats=False` uses batch statistics always: it is a "LayerNorm" over the
      batch and all positions. An instance norm with running statistics and momentum=None never moves them, as in PyTorch.

    Raises:
      ValueError: another module, or a lazy one that has no sizes yet; `ndim` is missing.

    Numerics:
      RMSNorm's eps=None is, whatever PyTorch's documentation says, that of the dtype it computes in: float32's for bfloat16 x.

    Example:
      >>> import torch
      >>> from jnorm.tools import convert
      >>> norm = convert.of_torch(torch.nn.BatchNorm2d(4, momentum=0.25))
      >>> norm.kind, norm.momentum, norm.running_var_correction
      ('BatchNorm', 0.75, 1)
    """
    name = type(module).__name__
    if name.startswith("Lazy"):
        raise ValueError(f"{name} has no sizes yet: run it on a batch first.")
    read = _READERS.get(re.sub(r"[123]d$", "", name))
    if read is None:
        of_function = ": it has no values; call jnorm.local_response_norm with its size, alpha, beta and k"
        hint = of_function if name == "LocalResponseNorm" else ""
        raise ValueError(f"{name} is no norm of PyTorch that has a counterpart in convert.Norm{hint}.")
    params = {ours: None if (t := getattr(module, theirs, None)) is None else array_of(t).copy() for ours, theirs in _PARAMS}
    return read(module, params, name, channels_last, ndim)


_PARAMS = (("scale", "weight"), ("bias", "bias"))


def _channels(channels_last: bool) -> tuple[int, ...]:
    return (-1,) if channels_last else (1,)


def _statistics(module: Any) -> dict[str, Any]:
    return {
        "mean": array_of(module.running_mean).copy(),
        "var": array_of(module.running_var).copy(),
        "running_var_correction": 1,
    }


def _batch_norm(module: Any, params: dict, name: str, channels_last: bool, ndim: int | None) -> Norm:
    shared = {"shape": (module.num_features,), "epsilon": module.eps, "feature_axes": _channels(channels_last), **params}
    if module.running_mean is None:
        digits = [int(d) + 2 for d in name if d in "23"]
        ndim = digits[0] if digits else ndim
        if ndim is None:
            raise ValueError(f"a {name} without running statistics needs ndim, the number of axes of x, to say what it reduces.")
        reduced = tuple(range(ndim - 1)) if channels_last else (0, *range(2, ndim))
        return Norm(kind="LayerNorm", reduction_axes=reduced, **shared)
    cumulative = module.momentum is None
    count = float(module.num_batches_tracked) if cumulative else None
    return Norm(kind="BatchNorm", momentum=None if cumulative else 1 - module.momentum, count=count, **_statistics(module), **shared)


def _instance_norm(module: Any, params: dict, name: str, channels_last: bool, ndim: int | None) -> Norm:
    shared = {"shape": (module.num_features,), "epsilon": module.eps, "feature_axes": _channels(channels_last), **params}
    if module.running_mean is None:
        return Norm(kind="InstanceNorm", **shared)
    return Norm(kind="TrackedInstanceNorm", momentum=1 - (module.momentum or 0), **_statistics(module), **shared)


def _group_norm(module: Any, params: dict, name: str, channels_last: bool, ndim: int | None) -> Norm:
    axes = _channels(channels_last)
    return Norm(
        kind="GroupNorm", shape=(module.num_channels,), epsilon=module.eps, num_groups=module.num_groups, feature_axes=axes, **params
    )


def _layer_norm(module: Any, params: dict, name: str, channels_last: bool, ndim: int | None) -> Norm:
    shape = tuple(module.normalized_shape)
    axes, epsilon = tuple(range(-len(shape), 0)), module.eps
    if epsilon is None:
        weight = params["scale"]
        epsilon = float(np.finfo(np.float64 if weight is not None and weight.dtype == np.float64 else np.float32).eps)
    return Norm(kind=name, shape=shape, epsilon=epsilon, feature_axes=axes, reduction_axes=axes, **params)


_READERS = {
    "BatchNorm": _batch_norm,
    "SyncBatchNorm": _batch_norm,
    "InstanceNorm": _instance_norm,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "RMSNorm": _layer_norm,
}


def as_torch(norm: Norm, ndim: int = 4) -> Any:
    """The PyTorch module that a norm is, with its values. Its x has the channels second.

    Args:
      norm: of :func:`of_torch`, :func:`of_nnx` or :func:`of_linen`, or made by hand.
      ndim: the number of axes of x, batch and channels included, which is in the names of PyTorch's classes: 2 or 3 for BatchNorm1d, 4
        for BatchNorm2d.

    Returns:
      The module, in training mode. Where the norm has one of scale and bias, and PyTorch's class both or none, the other is 1 or 0 and
      takes no gradient. Parameters and statistics have the wider of their dtypes, as PyTorch needs one for all.

    Raises:
      ValueError: what PyTorch's class cannot do: a biased running variance, a debiased average, a fused activation, other axes. The error
        says with which `dataclasses.replace` that is given up, which keeps evaluation as it is.

    Example:
      >>> import torch
      >>> from jnorm.tools import convert
      >>> norm = convert.Norm(kind="GroupNorm", shape=(4,), num_groups=2, epsilon=1e-3)
      >>> module = convert.as_torch(norm)
      >>> type(module).__name__, module.eps
      ('GroupNorm', 0.001)
    """
    torch = import_torch()
    if norm.activation is not None:
        raise ValueError("PyTorch's norms have no activation: put it after, and pass dataclasses.replace(norm, activation=None).")
    _check_axes(norm, ndim)
    has = norm.scale is not None or norm.bias is not None
    # All have one dtype there. That of the statistics is the wider one as a rule, in which PyTorch takes x of bfloat16 too.
    dtypes = [a.dtype for a in (norm.scale, norm.bias, norm.mean, norm.var) if a is not None]
    options: dict[str, Any] = {"eps": norm.epsilon}
    channels, dims = norm.shape[0], f"{max(ndim - 2, 1)}d"
    if norm.runs:
        options |= _running_options(norm)
    if norm.kind == "BatchNorm" or _is_over_batch(norm):
        module = getattr(torch.nn, f"BatchNorm{dims}")(channels, affine=has, track_running_stats=norm.runs, **options)
    elif norm.kind in ("InstanceNorm", "TrackedInstanceNorm"):
        module = getattr(torch.nn, f"InstanceNorm{dims}")(channels, affine=has, track_running_stats=norm.runs, **options)
    elif norm.kind == "GroupNorm":
        module = torch.nn.GroupNorm(norm.num_groups, channels, affine=has, **options)
    else:
        extra = {"bias": norm.bias is not None} if norm.kind == "LayerNorm" and has else {}
        module = getattr(torch.nn, norm.kind)(norm.shape, elementwise_affine=has, **extra, **options)
    _fill(module, norm)
    return module.to(tensor_of(np.zeros((), functools.reduce(np.promote_types, dtypes))).dtype) if dtypes else module


def _is_over_batch(norm: Norm) -> bool:
    return norm.kind == "LayerNorm" and norm.reduction_axes is not None and 0 in norm.reduction_axes


def _check_axes(norm: Norm, ndim: int) -> None:
    """PyTorch's classes have their axes by themselves: these have to be the same, wherever the channels of x are here."""
    told = f"this one has reduction_axes={norm.reduction_axes} and feature_axes={norm.feature_axes}."
    if norm.kind in ("LayerNorm", "RMSNorm") and not _is_over_batch(norm):
        trailing = tuple(range(-len(norm.shape), 0))
        if norm.feature_axes != trailing or norm.reduction_axes not in (None, trailing):
            raise ValueError(f"PyTorch's {norm.kind} normalizes the last axes, those of its weight; {told}")
        return
    if len(norm.shape) != 1:
        raise ValueError(f"PyTorch's {norm.kind} has one axis of channels; {told}")
    if norm.reduction_axes is None or norm.kind == "BatchNorm":
        return
    # That of a batch norm says how many axes x has: (batch, channels) and (batch, channels, length) are of one class there.
    axes = len(norm.reduction_axes) + 1 if _is_over_batch(norm) and ndim < 4 else ndim
    reduced, channels = {a % axes for a in norm.reduction_axes}, norm.feature_axes[0] % axes
    batch = set() if _is_over_batch(norm) else {0}
    if norm.kind == "GroupNorm":
        reduced.discard(channels)
    if reduced != set(range(axes)) - batch - {channels} or axes > max(ndim, 3):
        name = "BatchNorm" if _is_over_batch(norm) else norm.kind
        raise ValueError(f"PyTorch's {name} of x with ndim={axes} reduces all of its positions; {told}")


def _running_options(norm: Norm) -> dict[str, Any]:
    if norm.momentum is None and norm.kind == "TrackedInstanceNorm":
        raise ValueError("PyTorch's instance norms have no cumulative average: give the norm a momentum with dataclasses.replace.")
    limit = None if norm.momentum in (None, 1) else 1 / (1 - norm.momentum)
    if norm.running_var_correction != 1:
        raise ValueError(
            f"PyTorch's running variance is unbiased, that of this norm has running_var_correction={norm.running_var_correction}: pass "
            "dataclasses.replace(norm, running_var_correction=1), which changes further training only."
        )
    if norm.momentum is not None and norm.count is not None and not (limit and np.isclose(norm.count, limit, rtol=1e-3)):
        raise ValueError(
            "PyTorch's average is not debiased, that of this norm is, and its count has not come to the limit: pass "
            "dataclasses.replace(norm, count=None), which changes further training only."
        )
    return {"momentum": None if norm.momentum is None else 1 - norm.momentum}


def _fill(module: Any, norm: Norm) -> None:
    torch = import_torch()
    with torch.no_grad():
        for ours, theirs in (*_PARAMS, ("mean", "running_mean"), ("var", "running_var")):
            there, value = getattr(module, theirs, None), getattr(norm, ours)
            if there is not None and value is not None:
                there.data = tensor_of(value)
            elif there is not None and ours in ("scale", "bias"):
                there.requires_grad_(False)
        if norm.momentum is None and norm.runs:
            module.num_batches_tracked.fill_(round(norm.count or 0))
