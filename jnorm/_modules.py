"""What the classes of Flax do around a norm, for both of its APIs: its rules for dtypes and axes, and errors that say which module."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ._norms.batch_norm import batch_norm
from ._norms.eval_norm import check_share, eval_norm
from ._norms.eval_norm_fit import eval_norm_fit, eval_norm_weights
from ._pipeline.arguments import away_from_zero, check_switches
from ._pipeline.axes import canonical_axes
from ._pipeline.population import collects
from ._pipeline.values import as_dtype
from ._stats import stats_dtype
from .typing import Axes, ScaleFrom


def floating(x: Any, dtype: Any) -> jax.Array:
    """x as the functions take it: integers become float32, as in Flax. A dtype of float64 has the statistics taken in it."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    return x.astype(dtype) if dtype is not None and as_dtype(dtype) == np.float64 and not jnp.iscomplexobj(x) else x


def result_dtype(*arrays: Any, dtype: Any) -> Any:
    """Flax's rule for y's dtype: what is asked for, else what x as given, scale and bias promote to, also under strict promotion."""
    if dtype is not None:
        return dtype
    with jax.numpy_dtype_promotion("standard"):
        promoted = jnp.result_type(*(a for a in arrays if a is not None))
    return promoted if jnp.issubdtype(promoted, jnp.inexact) else jnp.dtype(jnp.float32)


def state_dtype(x_dtype: Any, param_dtype: Any, force_float32: bool) -> Any:
    """The dtype of running statistics: float32, or with `force_float32_reductions=False` the parameters' if that is no narrower."""
    real = jnp.dtype(jnp.float32) if force_float32 else stats_dtype(param_dtype)
    complex_dtype = jnp.complex128 if real == np.float64 else jnp.complex64
    return complex_dtype if jnp.issubdtype(x_dtype, jnp.complexfloating) else real


def state_for(x: jax.Array, state: Any) -> Any:
    """For complex x a complex mean, which Flax's variables get by the first update only."""
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(state["mean"]):
        wide = state_dtype(x.dtype, jnp.result_type(state["mean"]), False)
        return {**state, "mean": jnp.asarray(state["mean"]).astype(wide)}
    return state


def state_keys(state: Any, optional: bool = True) -> tuple[str, ...]:
    """The keys of a state's TypedDict, in order, with the optional ones or without."""
    return tuple(key for key in state.__annotations__ if optional or key in state.__required_keys__)


def distinct_axes(axes: Any, ndim: int) -> Any:
    """The axes without repetitions, as Flax takes them; None, or what is out of range or no axis, is left to the functions."""
    given = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    if not all(isinstance(a, int | np.integer) and -ndim <= a < ndim for a in given):
        return axes
    return tuple(sorted({int(a) % ndim for a in given}))


def feature_shape(x: jax.Array, axes: Axes, name: str, of: str = "x") -> tuple[int, ...]:
    return tuple(x.shape[i] for i in canonical_axes(axes, x.ndim, name, of))


def check_groups(num_groups: Any, group_size: Any) -> None:
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"give one of num_groups and group_size, got num_groups={num_groups} and group_size={group_size}; "
            "num_groups is 32 by default, so that group_size needs num_groups=None."
        )


def check_keeps_batch(reduction_axes: Axes | None, features: Axes, ndim: int) -> None:
    """InstanceNorm without explicit axes keeps the leading one as the batch."""
    if reduction_axes is None and 0 in canonical_axes(features, ndim, "feature_axes"):
        raise ValueError(
            f"feature_axes={features!r} include the leading axis, which is the batch; say with reduction_axes what is reduced."
        )


def takes_statistics(use_running_average: Any, update_running: Any, state: Any) -> bool:
    """Whether a norm with running statistics looks at those of x."""
    evaluates, updates = check_switches(use_running_average, update_running, state)
    return updates or not evaluates


def merged_axes(module: Any, merges: bool) -> dict[str, Any]:
    """The module's named axis as arguments of a function; where nothing is merged, none: as in Flax, the axis need not exist there."""
    named = merges or module.axis_name is None
    axes = {"axis_name": module.axis_name if named else None, "axis_index_groups": module.axis_index_groups if named else None}
    if hasattr(module, "batch_axis_name"):
        axes["batch_axis_name"] = module.batch_axis_name if merges else None
    return axes


class Unit(NamedTuple):
    """The one normalized weight of a layer, by its path, the bias beside it where there is one, and the shape of the layer's features."""

    kernel: tuple[Any, ...]
    bias: tuple[Any, ...] | None
    shape: tuple[int, ...]


def told_layer(layer: Any) -> str:
    """What an error says of what is no layer, most easily its class."""
    return f"the class {layer.__name__}; make a layer of it, {layer.__name__}(...)" if isinstance(layer, type) else type(layer).__name__


def check_selected(left: Sequence[str], number: int) -> None:
    """That a filter does not leave all of a layer's parameters: a wrapper that does nothing is a mistake."""
    if left and len(left) == number:
        raise ValueError(f"variable_filter selects none of the layer's parameters, which are {', '.join(left)}.")


def check_scale_from(module: Any) -> None:
    if module.scale_from not in get_args(ScaleFrom):
        raise ValueError(f"scale_from must be one of {get_args(ScaleFrom)}, got {module.scale_from!r}.")
    if module.scale_from != "init" and not module.use_scale:
        raise ValueError(f"scale_from={module.scale_from!r} says where the scale starts, but use_scale is False; leave one of the two out.")


def unit_of(params: Mapping[tuple[Any, ...], Any], chosen: Sequence[tuple[Any, ...]], feature_axes: Axes | None) -> Unit:
    """Of a layer whose parameters, by path, are a weight that was chosen and at most a bias: what a batch can set the length of."""

    def listed(paths: Iterable[tuple[Any, ...]]) -> list[str]:
        return ["/".join(map(str, path)) for path in paths]

    check_selected([] if chosen else listed(params), len(params))
    if len(chosen) != 1:
        raise ValueError(
            f'scale_from="data" is for a layer with one normalized weight, but variable_filter selects {listed(chosen)} of '
            f"{listed(params)}; wrap each layer by itself."
        )
    (kernel,) = chosen
    bias = (*kernel[:-1], "bias")
    if more := [path for path in params if path not in (kernel, bias)]:
        raise ValueError(
            f'scale_from="data" is for a layer that is a weight times x plus a bias, but this one has {listed(more)} beside '
            f"{listed([kernel])}; wrap the layer of that weight alone."
        )
    ndim = params[kernel].ndim
    axes = (
        () if feature_axes is None else canonical_axes(distinct_axes(feature_axes, ndim), ndim, "feature_axes", "/".join(map(str, kernel)))
    )
    if not axes or axes != tuple(range(ndim - len(axes), ndim)):
        raise ValueError(
            f'scale_from="data" sets a length for each feature that the layer gives out, the last axes of its weight, '
            f"but feature_axes={feature_axes!r}."
        )
    shape = tuple(params[kernel].shape[i] for i in axes)
    if bias in params and params[bias].shape != shape:
        raise ValueError(
            f'scale_from="data" sets a bias for each length, but the bias has shape {params[bias].shape} and the lengths {shape}; '
            "name all axes of the features in feature_axes."
        )
    return Unit(kernel, bias if bias in params else None, shape)


def check_output(layer: Callable[[jax.Array], Any], weight: jax.Array, shape: tuple[int, ...]) -> None:
    """An array of features, linear in the layer's weight: only then does the length of the one stretch the other."""
    out = jax.eval_shape(layer, weight)
    got = getattr(out, "shape", None)
    if got is None or got[-len(shape) :] != shape:
        what = type(out).__name__ if got is None else f"an array of shape {got}"
        raise ValueError(f'scale_from="data" is for a layer whose output has the features {shape} on its last axes, but it gives {what}.')
    try:
        jax.eval_shape(jax.linear_transpose(layer, weight), out)
    except Exception as error:  # what has no transpose fails in many ways
        raise ValueError(
            'scale_from="data" is for a layer that is linear in its weight, such as a dense layer or a convolution, but this one is not; '
            "apply the nonlinearity, or what else it is, after the wrapped layer."
        ) from error


def run_eval_norm(
    module: Any, x: jax.Array, call: dict[str, Any], fit: Any, weights: tuple, *, mask: Any, features: Axes, initializes: bool = False
) -> tuple[jax.Array, Any, Any]:
    """One call of an EvalNorm: y, the state, and the sums that its weights are learned from. To initialize no weight is needed."""
    _check_eval_weights(module)
    state, new, y, before = call["state"], call["state"], x, fit
    if len(feature_shape(x, features, "feature_axes")) < x.ndim:
        check_keeps_batch(module.reduction_axes, features, x.ndim)
    samples = {"reduction_axes": distinct_axes(module.reduction_axes, x.ndim), "feature_axes": features, "mask": mask}
    evaluates, updates = check_switches(call["use_running_average"], call["update_running"], state)
    if updates or not evaluates or initializes:
        y, new = batch_norm(x, **call, running_var_correction=module.running_var_correction, feature_axes=features, mask=mask)
    if updates and module.learn_weights and not collects(state):
        across = {key: call[key] for key in ("momentum", "axis_name", "axis_index_groups")}
        fit = eval_norm_fit(x, state, fit, **samples, **across)
    if evaluates and not initializes:
        options = {key: call[key] for key in ("state", "scale", "bias", "epsilon", "activation", "dtype")}
        if call["save"] == "output":  # as in training
            options["scale"] = away_from_zero(options["scale"])
        y = eval_norm(x, **options, **samples, **_eval_weights(module, before, *weights))
    return y, new, fit


def _check_eval_weights(module: Any) -> None:
    """Those of the constructor, in training too."""
    given = {name: getattr(module, name) for name in ("mean_weight", "var_weight") if getattr(module, name) is not None}
    if module.learn_weights and given:
        raise ValueError("learn_weights=True fits the weights, so that mean_weight and var_weight of the constructor must be None.")
    for name, weight in given.items():
        check_share(weight, name)


def _eval_weights(module: Any, fit: Any, mean_weight: Any, var_weight: Any) -> dict[str, Any]:
    """Of the call, else those learned, else of the constructor. As in the function, a mean_weight alone is for both."""
    if mean_weight is None:
        mean_weight, other = eval_norm_weights(fit) if module.learn_weights else (module.mean_weight, module.var_weight)
        var_weight = other if var_weight is None else var_weight
    if mean_weight is None:
        raise ValueError(
            "evaluation needs mean_weight, the share of a sample's own statistics: pass it to the constructor or to the call "
            "(1 / N after training on batches of N), or fit it with learn_weights=True."
        )
    return {"mean_weight": mean_weight, "var_weight": var_weight}


@contextlib.contextmanager
def errors_in(where: Callable[[], str]) -> Iterator[None]:
    """Puts before the message of a refusal which module refused."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # JAX's own errors are subclasses, whose message is not theirs to change.
        if type(error) in (TypeError, ValueError) and error.args:
            error.args = (f"{where()}: {error.args[0]}", *error.args[1:])
        else:
            error.add_note(f"in {where()}")
        raise
