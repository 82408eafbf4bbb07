"""Wrappers that change the parameters of a layer for its call, and never write them."""

from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import check_output, check_scale_from, check_selected, distinct_axes, feature_shape, result_dtype, state_keys, unit_of
from ..reparam.spectral_norm import spectral_norm
from ..reparam.weight_norm import weight_norm, weight_norm_data_init, weight_norm_scale
from ..reparam.weight_standardization import EpsilonMode, weight_standardization
from ..typing import Axes, AxisName, ScaleFrom, SpectralNormState
from ._variables import (
    Initializer,
    Path,
    PromoteDtype,
    call_with_params,
    checked,
    errors_of,
    key_of,
    params_of,
    promote_dtype,
    static,
    text_of,
    with_params,
    write_params,
    y_dtype,
)


@final
class WeightNorm(nnx.Module):
    """Weight normalization of a layer's kernels: :func:`jnorm.reparam.weight_norm`, in place of `flax.nnx.WeightNorm`.

    The layer keeps its parameters, the directions, and they are never written; `scales` holds an `nnx.Param`, the length, for each, by its
    path in the layer. Other variables that the layer writes in its call are written; plain attributes that it sets on itself are not kept.

    A first batch sets the length and the layer's bias with :meth:`initialize_from`, or for a whole model, whose layers are started in turn
    where they have `scale_from="data"`, with `nnx.view(model, initializing=True)(batch)`.

    Args:
      layer_instance: the layer.
      feature_axes: the axes along which the length varies; None: one length for each weight.
      use_scale: learn the lengths; else they are 1.
      scale_init: initializer of the lengths.
      epsilon: added to the sum of squares.
      dtype: of the weights that are used; None: what `promote_dtype` gives.
      param_dtype: of the lengths.
      variable_filter: which parameters are normalized, at least one.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`, of direction and length.
      rngs: keys for `scale_init`.
      scale_from: where the lengths start. "init": as `scale_init` says; "norm": at those of the directions, so that the layer does at first
        what it does unwrapped (:func:`jnorm.reparam.weight_norm_scale`); "data": from a batch. Until that has been given they are what
        `scale_init` says.
      init_scale: of the start from data: the deviation of the layer's outputs.
      axis_name: of the start from data: the named axis or axes that the batch is split over.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jnx.WeightNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
      >>> layer(jnp.ones((1, 3))).shape
      (1, 2)
      >>> layer.scales[("kernel",)][...].tolist()
      [1.0, 1.0]

      After training, the plain layer:

      >>> type(layer.fold()).__name__
      'Linear'
    """

    scales: dict[Path, nnx.Param[jax.Array]] | None

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = nnx.initializers.ones,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        variable_filter: Any = nnx.PathContains("kernel"),  # noqa: B008
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        scale_from: ScaleFrom = "init",
        init_scale: float = 1.0,
        axis_name: AxisName | None = None,
    ) -> None:
        self.layer_instance = layer_instance
        self.feature_axes = static(feature_axes)
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.promote_dtype = promote_dtype
        self.scale_from: ScaleFrom = scale_from
        self.init_scale = init_scale
        self.axis_name = static(axis_name)
        self.initializing = False  # what `nnx.view` sets
        with errors_of(self):
            check_scale_from(self)
        self.scales = scales_of(self, rngs, self._length if scale_from == "norm" else None)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with normalized weights."""
        if self.initializing and self.scale_from == "data":
            self.initializing = False  # a layer that is called again has its length already
            return self.initialize_from(x, *args, **kwargs)
        return call_with_params(self.layer_instance, self._normalized(), x, *args, **kwargs)

    def initialize_from(self, x: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """Sets the length and the layer's bias so that each output has mean 0 and deviation `init_scale` on this batch.

        This is :func:`jnorm.reparam.weight_norm_data_init`, for a layer with one kernel, such as `nnx.Linear` and `nnx.Conv`. One without a
        bias gets its deviation alone, for mean-only batch normalization or another norm after it.

        Args:
          x: a batch of the layer's input, as what comes before gives it once it is initialized itself.
          *args: the layer's.
          **kwargs: the layer's.

        Returns:
          What the layer now gives for x.
        """
        layer, params = self.layer_instance, {path: param[...] for path, param in params_of(self.layer_instance).items()}
        with errors_of(self):
            if self.scales is None:
                raise ValueError("use_scale is False: there is no scale to set from data; leave it out.")
            unit = unit_of(params, list(self.scales), self.feature_axes)
        v, axes = params[unit.kernel], tuple(range(-len(unit.shape), 0))
        zero = {} if unit.bias is None else {unit.bias: jnp.zeros_like(params[unit.bias])}
        with errors_of(self, unit.kernel):
            scale = _entry(self.scales, unit.kernel)
            direction = weight_norm(v, feature_axes=axes, epsilon=self.epsilon, dtype=y_dtype(self, v, affine=(scale[...],)))
            check_output(lambda w: with_params(layer, {unit.kernel: w, **zero}, copy=True)(x, *args, **kwargs), direction, unit.shape)
            t = call_with_params(layer, {unit.kernel: direction, **zero}, x, *args, **kwargs)
            length, bias, y = weight_norm_data_init(
                t, init_scale=self.init_scale, feature_axes=axes, axis_name=self.axis_name, mean_only=unit.bias is None
            )
        scale.set_value(length.astype(scale.dtype))
        if unit.bias is not None:
            write_params(layer, {unit.bias: bias})
        return y

    def fold(self) -> Any:
        """The layer alone, with the weights that are used in place of its directions: a copy, that gives the same output."""
        return with_params(self.layer_instance, self._normalized(), copy=True)

    def set_view(self, initializing: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          initializing: the next call is :meth:`initialize_from`, where `scale_from="data"`.
        """
        if initializing is not None:
            self.initializing = initializing

    def _normalized(self) -> dict[Path, jax.Array]:
        weights = {}
        for path, v, scale, features in weights_of(self):
            with errors_of(self, path):
                dtype = y_dtype(self, v, affine=(scale,))
                weights[path] = weight_norm(v, scale, feature_axes=features, epsilon=self.epsilon, dtype=dtype)
        return weights

    def _length(self, v: jax.Array, features: Any) -> jax.Array:
        return weight_norm_scale(v, feature_axes=features, epsilon=self.epsilon, dtype=self.param_dtype)


@final
class WeightStandardization(nnx.Module):
    """Weight standardization of a layer's kernels: :func:`jnorm.reparam.weight_standardization`.

    The layer keeps its parameters, and they are never written; with `use_scale`, `scales` holds an `nnx.Param`, the gain, for each, by its
    path in the layer. Other variables and plain attributes: as in :class:`WeightNorm`.

    Args:
      layer_instance: the layer.
      feature_axes: the axes of the outputs.
      use_scale: learn a gain.
      scale_init: initializer of the gains.
      epsilon: see :func:`jnorm.reparam.weight_standardization`.
      dtype: of the weights that are used; None: what `promote_dtype` gives.
      param_dtype: of the gains.
      variable_filter: which parameters are standardized, at least one.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`, of weight and gain.
      rngs: keys for `scale_init`.
      correction: 1 is the unbiased variance, 0 the biased.
      epsilon_mode: "outside", "inside" or "max".
      fan_in: n·σ² in place of σ²: scaled weight standardization.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jnx.WeightStandardization(nnx.Conv(2, 4, (3, 3), rngs=rngs), rngs=rngs)
      >>> layer(jnp.ones((1, 8, 8, 2))).shape
      (1, 8, 8, 4)
    """

    scales: dict[Path, nnx.Param[jax.Array]] | None

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes = -1,
        use_scale: bool = False,
        scale_init: Initializer = nnx.initializers.ones,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        variable_filter: Any = nnx.PathContains("kernel"),  # noqa: B008
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        correction: int | float = 1,
        epsilon_mode: EpsilonMode = "outside",
        fan_in: bool = False,
    ) -> None:
        self.layer_instance = layer_instance
        self.feature_axes = static(feature_axes)
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.promote_dtype = promote_dtype
        self.correction = correction
        self.epsilon_mode: EpsilonMode = epsilon_mode
        self.fan_in = fan_in
        self.scales = scales_of(self, rngs)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with standardized weights."""
        return call_with_params(self.layer_instance, self._standardized(), x, *args, **kwargs)

    def fold(self) -> Any:
        """The layer alone, with the weights that are used in place of its own: a copy, that gives the same output."""
        return with_params(self.layer_instance, self._standardized(), copy=True)

    def _standardized(self) -> dict[Path, jax.Array]:
        weights = {}
        for path, w, scale, features in weights_of(self):
            with errors_of(self, path):
                weights[path] = weight_standardization(
                    w,
                    scale,
                    feature_axes=features,
                    correction=self.correction,
                    epsilon=self.epsilon,
                    epsilon_mode=self.epsilon_mode,
                    fan_in=self.fan_in,
                    dtype=y_dtype(self, w, affine=(scale,)),
                )
        return weights


@final
class SpectralNorm(nnx.Module):
    """Spectral normalization of a layer's weights: :func:`jnorm.reparam.spectral_norm`, in place of `flax.nnx.SpectralNorm`.

    The layer keeps its parameters, and they are never written; `batch_stats` holds "u" and "sigma" of each that has two axes or more, by
    its path in the layer. Other variables and plain attributes: as in :class:`WeightNorm`.

    Args:
      layer_instance: the layer.
      n_steps: steps of the power iteration in each call; below 1 the weights are used as they are.
      epsilon: added to the squared norms of u and v.
      dtype: of the weights that are used; None: what weight and state promote to.
      param_dtype: of u and sigma.
      error_on_non_matrix: refuse weights of more than two axes, in place of flattening all but the last.
      update_stats: whether u and sigma are stored (training); what :meth:`train`, :meth:`eval` and `nnx.view` set.
      rngs: the stream "params" initializes u.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jnx.SpectralNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
      >>> y = layer(jnp.ones((1, 3)), update_stats=True)
      >>> layer.batch_stats[("kernel", "u")].shape
      (1, 2)
    """

    batch_stats: dict[Path, nnx.BatchStat[jax.Array]]

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        self.use_running_average = not update_stats  # what train() and eval() set
        stats = {}
        for path, w in self._matrices():
            initial = SpectralNormState(
                u=nnx.initializers.normal()(checked(rngs).params(), (1, w.shape[-1]), param_dtype), sigma=jnp.ones((), param_dtype)
            )
            stats |= {(*path, key): nnx.BatchStat(initial[key]) for key in state_keys(SpectralNormState)}
        self.batch_stats = nnx.data(stats)

    def __call__(self, x: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """The layer's output, with normalized weights.

        Args:
          x: the layer's input.
          update_stats: whether u and sigma are stored; None: the constructor's, or what :meth:`train` and :meth:`eval` set.
          **kwargs: the layer's.

        Returns:
          What the layer returns.
        """
        update = not self.use_running_average if update_stats is None else update_stats
        weights = {path: self._normalized(path, w[...], update) for path, w in self._matrices()}
        return call_with_params(self.layer_instance, weights, x, **kwargs)

    def fold(self) -> Any:
        """The layer alone, with the weights that evaluation uses in place of its own: a copy, that gives the same output."""
        weights = {path: self._normalized(path, w[...], False) for path, w in self._matrices()}
        return with_params(self.layer_instance, weights, copy=True)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: u and sigma are not stored (evaluation).
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _matrices(self) -> list[tuple[Path, nnx.Param[jax.Array]]]:
        found = [(path, w) for path, w in params_of(self.layer_instance).items() if w.ndim > 1] if self.n_steps >= 1 else []
        for path, w in found:
            if w.ndim > 2 and self.error_on_non_matrix:
                with errors_of(self, path):
                    raise ValueError(f"a weight of {w.ndim} axes is no matrix, and error_on_non_matrix is True.")
        return found

    def _normalized(self, path: Path, w: jax.Array, update_stats: bool) -> jax.Array:
        with errors_of(self, path):
            entries = {key: _entry(self.batch_stats, (*path, key)) for key in state_keys(SpectralNormState)}
            state: Any = {key: entry[...] for key, entry in entries.items()}
            dtype = result_dtype(w, *state.values(), dtype=self.dtype)
            bar, new = spectral_norm(w, state, n_steps=self.n_steps, epsilon=self.epsilon, update_stats=update_stats, dtype=dtype)
        if new is not state:
            for key, entry in entries.items():
                entry.set_value(new[key])
        return bar


def _entry(entries: dict[Path, Any], path: Path) -> Any:
    if path not in entries:
        raise ValueError(
            f"nothing was made for it at construction, only {sorted(entries)}; the layer's parameters must be those that it had then."
        )
    return entries[path]


def scales_of(module: Any, rngs: nnx.Rngs, start: Callable[[jax.Array, Any], jax.Array] | None = None) -> Any:
    """A scale for each parameter that the filter selects, as data. It starts as `start` of parameter and features says, or `scale_init`."""
    if not module.use_scale:
        return nnx.data(None)
    scales = {}
    for path, param in _selected(module).items():
        features, shape = _features(module, path, param[...])
        scales[path] = nnx.Param(module.scale_init(key_of(rngs, path), shape, module.param_dtype))
        if start is not None:
            with errors_of(module, path):
                scales[path].set_value(start(param[...], features))
    return nnx.data(scales)


def weights_of(module: Any) -> list[tuple[Path, jax.Array, jax.Array | None, Any]]:
    """Path, value, scale and feature axes of each parameter that the filter selects."""
    found = []
    for path, param in _selected(module).items():
        with errors_of(module, path):
            scale = None if module.scales is None else _entry(module.scales, path)[...]
        found.append((path, param[...], scale, _features(module, path, param[...])[0]))
    return found


def _selected(module: Any) -> dict[Path, nnx.Param[jax.Array]]:
    params = params_of(module.layer_instance)
    selected = {path: param for path, param in params.items() if module.variable_filter(path, param)}
    with errors_of(module):
        check_selected([text_of(path) for path in params if path not in selected], len(params))
    return selected


def _features(module: Any, path: Path, value: jax.Array) -> tuple[Any, tuple[int, ...]]:
    if module.feature_axes is None:
        return None, ()
    features = distinct_axes(module.feature_axes, value.ndim)
    with errors_of(module):
        return features, feature_shape(value, features, "feature_axes", of=text_of(path))
