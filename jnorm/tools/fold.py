"""Norms that evaluate with running statistics, multiplied into the linear layers beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._pipeline.arguments import check_epsilon
from .._pipeline.axes import canonical_axes
from ..typing import Axes
from ._fold.maps import EvaluationMap, evaluation_map, folding_dtype, into_next, into_previous, plus
from ._fold.on_linen import fold_linen
from ._fold.on_nnx import fold_nnx
from ._layers import Layers


def fold(model: Any, *args: Any, layers: Layers | None = None, **kwargs: Any) -> Any:
    """A model for inference without its norms: those that evaluate with running statistics go into the linear layers beside them.

    In evaluation such a norm is a fixed affine map of each feature, which the linear layer before or after it can do beside its own. Which
    layers these are is found by tracing a call of the model: by what its operations do, not by names. So layers of your own fold too,
    where their kernel is a parameter that goes into one product or convolution.

    A norm folds into the layer before it where that layer's output goes to nothing else; else into the layer after it, where its own
    output goes to nothing else, and no zeros are padded between: there the shift would be missing at the border. It stays, and the report
    says why, where neither is so: at an activation, a pooling or a sum between them, a layer or a norm that is called twice, an output
    that is also given out or sown, in the body of a loop, under `vmap` or a derivative that the model takes itself, or where the statistics
    are those of each sample.

    The result is the model for this call, and for others of the same way through it: another method, or a switch that takes another way,
    finds the layers as they are folded, also where it does not call the norm.

    Args:
      model: an NNX model, set to evaluate; or a Linen model.
      *args: for an NNX model the arguments of its call; for a Linen model its variables, and then these. Of arrays only shape and dtype
        matter, and a `jax.ShapeDtypeStruct` will do.
      layers: which norms, by their paths, such as "encoder/block_0/norm": a pattern ("*" stands for anything) or the path of something that
        they lie in, several of these, or a function from path to bool. None: all.
      **kwargs: of the call, such as `train=False`.

    Returns:
      For an NNX model `(model, report)`: a copy with the new kernels and biases, in which an identity is in place of each folded norm, with
      the norm's activation where it has one. A layer without a bias gets one. For a Linen model an object with `variables`, `report` and
      `apply(x, train=False)`, since the model's code goes on to call the norms. The model or the variables that were given stay as they
      are. `str(report)` is a table; `report.folded` and `report.kept` are dicts by path.

    Raises:
      ValueError: there are no norms in the model; a norm is called in training mode; `layers` matches nothing, which lists what there is.

    Numerics:
      Kernels are computed in at least float32 and rounded once to their own dtype. The output is that of the model in evaluation but for
      rounding: with bfloat16 kernels that is each kernel's. A float16 kernel may overflow, where a small running variance or a large scale
      makes it larger than 65504.

    Distributed:
      New kernels and biases are sharded as those that they take the place of, whatever the sharding of the norm's variables; those of
      wrapped layers as their wrapper's computation leaves them. A bias that a layer gets is sharded as the outputs of its kernel, and has
      no metadata; what is added where a layer has no place for it lies on all devices of the mesh.

    Example:
      >>> import jax.numpy as jnp, jnorm.tools
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, use_bias=False, rngs=rngs), jnx.BatchNorm(3, rngs=rngs), nnx.relu)
      >>> y = model(jnp.ones((4, 2)))
      >>> model.eval()
      >>> folded, report = jnorm.tools.fold(model, jnp.ones((4, 2)))
      >>> print(report)
      1 of 1 norms folded
      layers/1  folded into 'layers/0', before it
      >>> bool(jnp.allclose(folded(jnp.ones((4, 2))), model(jnp.ones((4, 2))), atol=1e-6))
      True

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
      https://arxiv.org/abs/1712.05877, section 3.2, for the layer before. PyTorch's `torch.nn.utils.fuse_conv_bn_eval` folds one pair that
      it is given.
    """
    if isinstance(model, nnx.Module):
        return fold_nnx(model, args, kwargs, layers)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Linen or an NNX module, got {type(model).__name__}.")
    if not args or not isinstance(args[0], Mapping):
        raise TypeError("fold of a Linen model takes its variables after the model, and then the arguments of its call.")
    return fold_linen(model, args[0], args[1:], kwargs, layers)


def fold_into_previous(
    kernel: jax.Array,
    bias: jax.Array | None,
    state: Mapping[str, Any],
    scale: jax.Array | None = None,
    norm_bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
    output_axes: Axes = -1,
    bias_axes: Axes | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The kernel and bias of a linear layer and the norm after it, as one layer.

    .. math:: K' = K \cdot m, \qquad b' = (b - \mu)\,m + \beta, \qquad m = \frac{\gamma}{\sqrt{\sigma^2 + \varepsilon}}

    The features are the layer's outputs, so that strides, padding, dilation and groups of a convolution do not matter, and neither does
    where a transposed one puts its zeros.

    Args:
      kernel: of a dense layer, a convolution, or any other layer that is linear in it.
      bias: None: it has none, and gets one.
      state: of the norm: its "mean", and "var" or, as batch renormalization has it, "std", which has epsilon in it already; with neither
        only the mean is subtracted. Of the shape of the features.
      scale: of the same shape; None: 1.
      norm_bias: of the same shape; None: 0.
      epsilon: of the norm.
      output_axes: the kernel's axes of the outputs that are the norm's features: the last one for Flax's layers, -2 for a transposed
        convolution with `transpose_kernel=True`, 0 for PyTorch's layout, 1 for its transposed convolutions.
      bias_axes: the bias's axes of the same features; None: its last ones.

    Returns:
      The new kernel, of the kernel's dtype, and the new bias, of the bias's or else the kernel's; a new bias is complex where the norm's
      mean, scale or bias is.

    Raises:
      ValueError: shapes, axes, groups or an epsilon that do not fit.
      TypeError: a kernel or bias that is not floating, or real where it would become complex.

    Numerics:
      In at least float32, and float64 where anything given is; rounded once. What is new may overflow in float16.

    Example:
      >>> import jax.numpy as jnp, jnorm.tools
      >>> state = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 1.0])}
      >>> kernel, bias = jnorm.tools.fold_into_previous(jnp.ones((3, 2)), None, state, epsilon=0.0)
      >>> kernel[0].tolist(), bias.tolist()
      ([0.5, 1.0], [-0.5, -2.0])

    References:
      As :func:`fold`.
    """
    axes = canonical_axes(output_axes, jnp.ndim(kernel), "output_axes", "kernel")
    norm, dtype = _map_of(kernel, bias, state, scale, norm_bias, epsilon)
    _check_features(norm, kernel, axes, "output_axes")
    of_bias: Sequence[int] = ()
    if bias is None and bias_axes is not None:
        raise ValueError(f"bias_axes={bias_axes!r} are given, but no bias.")
    if bias is not None:
        last = tuple(range(jnp.ndim(bias) - len(axes), jnp.ndim(bias)))
        of_bias = last if bias_axes is None else canonical_axes(bias_axes, jnp.ndim(bias), "bias_axes", "bias")
        if [jnp.shape(bias)[a] for a in of_bias] != [jnp.shape(kernel)[a] for a in axes]:
            raise ValueError(f"the bias of shape {jnp.shape(bias)} does not have the features of the kernel of shape {jnp.shape(kernel)}.")
    wide = None if bias is None else jnp.asarray(bias).astype(dtype)
    new, added = into_previous(jnp.asarray(kernel).astype(dtype), wide, norm, axes, of_bias)
    return _narrowed(new, kernel), _narrowed_bias(added, kernel, bias, state, scale, norm_bias)


def fold_into_next(
    kernel: jax.Array,
    bias: jax.Array | None,
    state: Mapping[str, Any],
    scale: jax.Array | None = None,
    norm_bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
    input_axes: Axes = -2,
    output_axes: Axes = -1,
    groups: int = 1,
) -> tuple[jax.Array, jax.Array]:
    r"""The kernel and bias of a linear layer and the norm before it, as one layer.

    .. math:: K'_{io} = K_{io}\,m_i, \qquad b'_o = b_o + \sum_i K_{io}\,(\beta_i - \mu_i m_i), \qquad
              m = \frac{\gamma}{\sqrt{\sigma^2 + \varepsilon}}

    The sum runs over all inputs of an output, those of all positions of a convolution's window. So this is wrong where a window has zeros
    in it that the norm did not make: with zero padding ("SAME", "CAUSAL", numbers above 0) at the border, and with a dilated input, as of
    a transposed convolution, everywhere. Padding with values of the norm's output, such as circular, is fine. :func:`fold` sees to that;
    this function is not told.

    Args:
      kernel: of a dense layer or a convolution.
      bias: None: it has none, and gets one.
      state: as for :func:`fold_into_previous`, of the shape of the features.
      scale: of the same shape; None: 1.
      norm_bias: of the same shape; None: 0.
      epsilon: of the norm.
      input_axes: the kernel's axes of the inputs that are the norm's features.
      output_axes: its axes of the outputs, which are those of the bias; over all others the sum runs.
      groups: of a convolution: how many times as many inputs there are as the kernel has, `feature_group_count`; as many as there are
        features for a depthwise one.

    Returns:
      The new kernel, of the kernel's dtype, and the new bias, of the bias's or else the kernel's; a new bias is complex where the norm's
      mean, scale or bias is.

    Raises:
      ValueError: shapes, axes, groups or an epsilon that do not fit.
      TypeError: a kernel or bias that is not floating, or real where it would become complex.

    Numerics:
      As for :func:`fold_into_previous`.

    Example:
      >>> import jax.numpy as jnp, jnorm.tools
      >>> state = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 1.0])}
      >>> kernel, bias = jnorm.tools.fold_into_next(jnp.ones((2, 1)), jnp.array([7.0]), state, epsilon=0.0)
      >>> kernel.tolist(), bias.tolist()
      ([[0.5], [1.0]], [4.5])

    References:
      As :func:`fold`.
    """
    axes = canonical_axes(input_axes, jnp.ndim(kernel), "input_axes", "kernel")
    kept = canonical_axes(output_axes, jnp.ndim(kernel), "output_axes", "kernel")
    if common := set(axes) & set(kept):
        raise ValueError(f"input_axes={input_axes!r} and output_axes={output_axes!r} have the kernel's axes {sorted(common)} in common.")
    if isinstance(groups, bool) or not isinstance(groups, int | np.integer) or groups < 1:
        raise ValueError(f"groups must be a whole number of at least 1, got {groups!r}.")
    norm, dtype = _map_of(kernel, bias, state, scale, norm_bias, epsilon)
    if bias is not None and jnp.iscomplexobj(kernel) and not jnp.iscomplexobj(bias):
        raise TypeError(
            f"with a kernel of {jnp.asarray(kernel).dtype} what is added to the bias is complex, but the bias is real: widen it."
        )
    if groups != 1 and (len(axes), len(kept)) != (1, 1):
        raise ValueError(f"with groups={groups} there is one axis of inputs and one of outputs, got {input_axes!r} and {output_axes!r}.")
    if groups != 1 and jnp.shape(kernel)[kept[0]] % groups:
        raise ValueError(f"the {jnp.shape(kernel)[kept[0]]} outputs of the kernel are not in groups={groups} of one size.")
    _check_features(norm, kernel, axes, "input_axes", groups)
    shape = tuple(jnp.shape(kernel)[a] for a in kept)
    if bias is not None and jnp.shape(bias) != shape:
        raise ValueError(f"the bias must have the shape of the kernel's outputs, {shape}, got {jnp.shape(bias)}.")
    new, added = into_next(jnp.asarray(kernel).astype(dtype), norm, axes, kept, groups)
    added = added if bias is None else plus(jnp.asarray(bias).astype(dtype), added, range(len(kept)))
    return _narrowed(new, kernel), _narrowed_bias(added, kernel, bias, state, scale, norm_bias)


def _map_of(kernel: Any, bias: Any, state: Any, scale: Any, norm_bias: Any, epsilon: Any) -> tuple[EvaluationMap, Any]:
    if not isinstance(state, Mapping) or "mean" not in state:
        raise ValueError(f"state must be that of a norm with running statistics, with 'mean' in it, got {state!r:.200}.")
    for name, a in (("kernel", kernel), ("bias", bias)):
        if a is not None and not jnp.issubdtype(jnp.asarray(a).dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating, got {jnp.asarray(a).dtype}.")
    if _any_complex(scale) and not _any_complex(kernel):
        raise TypeError("with a complex scale the new kernel is complex, but the kernel is real: widen it.")
    if bias is not None and _any_complex(state["mean"], scale, norm_bias) and not _any_complex(bias):
        raise TypeError("the norm's mean, scale or norm_bias is complex, and so is the new bias, but the bias is real: widen it.")
    shape = jnp.shape(state["mean"])
    for name, value in {**{key: state[key] for key in ("var", "std") if key in state}, "scale": scale, "norm_bias": norm_bias}.items():
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(f"{name} must have the shape of the mean, {shape}, got {jnp.shape(value)}.")
    dtype = folding_dtype(kernel, bias, scale, norm_bias, *(state[key] for key in ("mean", "var", "std") if key in state))
    return evaluation_map(state, scale, norm_bias, check_epsilon(epsilon), dtype), dtype


def _check_features(norm: EvaluationMap, kernel: Any, axes: Sequence[int], name: str, groups: int = 1) -> None:
    shape = tuple(jnp.shape(kernel)[a] for a in axes)
    wanted = shape if groups == 1 else (shape[0] * groups,)
    if norm.mean.shape != wanted:
        raise ValueError(
            f"the kernel of shape {jnp.shape(kernel)} has features of shape {wanted} along {name}={tuple(axes)}"
            f"{f' in groups={groups}' if groups != 1 else ''}, but the norm's are of shape {norm.mean.shape}."
        )


def _any_complex(*arrays: Any) -> bool:
    return any(jnp.iscomplexobj(a) for a in arrays if a is not None)


def _narrowed(a: jax.Array, like: Any) -> jax.Array:
    dtype = jnp.asarray(like).dtype
    return (a if jnp.issubdtype(dtype, jnp.complexfloating) else a.real).astype(dtype)


def _narrowed_bias(new: jax.Array, kernel: Any, bias: Any, state: Any, scale: Any, norm_bias: Any) -> jax.Array:
    """Of the bias's dtype; where there was none of the kernel's, but complex where the norm's map is."""
    if bias is None and _any_complex(state["mean"], scale, norm_bias) and not _any_complex(kernel):
        return new
    return _narrowed(new, kernel if bias is None else bias)
