"""Wrappers that change the parameters of a layer for its call, and never write them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from .._modules import Unit, check_output, check_scale_from, distinct_axes, errors_in, feature_shape, result_dtype, state_keys, unit_of
from ..reparam.spectral_norm import spectral_norm, spectral_norm_state
from ..reparam.weight_norm import weight_norm, weight_norm_data_init, weight_norm_scale
from ..reparam.weight_standardization import EpsilonMode, weight_standardization
from ..typing import Axes, AxisName, ScaleFrom, SpectralNormState
from ._variables import (
    Initializer,
    Path,
    StateVariables,
    boxed_as,
    call_with_params,
    errors_of,
    is_box,
    params_of,
    pure_call,
    write_param,
)


@final
class WeightNorm(nn.Module):
    """Weight normalization of a layer's kernels: :func:`jnorm.reparam.weight_norm`, in place of `flax.linen.WeightNorm`.

    The layer keeps its parameters, the directions, where they are; "params" of this module holds a length for each, at 1 in the beginning:
    `"Dense_0/kernel/scale"`. The stored directions are those of the layer's own initializers.

    With `scale_from="data"`, `init` sets the length and the layer's bias from the batch that it is given
    (:func:`jnorm.reparam.weight_norm_data_init`), and the layer gives out what it normalized: so one `init` of a model with a batch of real
    data starts all of its layers in turn. This is for layers with one kernel, such as `Dense` and `Conv`. One without a bias gets its
    deviation alone, for mean-only batch normalization or another norm after it.

    Args:
      layer_instance: the layer.
      epsilon: added to the sum of squares.
      dtype: of the weights that are used; None: what direction and length promote to.
      param_dtype: of the lengths.
      use_scale: learn the lengths; else they are 1.
      scale_init: initializer of the lengths.
      feature_axes: the axes along which the length varies; None: one length for each weight.
      variable_filter: the parameters whose path, such as "Dense_0/kernel", contains one of these are normalized, at least one;
        None: all.
      scale_from: where the lengths start. "init": as `scale_init` says; "norm": at those of the directions, so that the layer does at first
        what it does unwrapped (:func:`jnorm.reparam.weight_norm_scale`); "data": from the batch that `init` is given. A box of metadata
        that `scale_init` makes around the lengths stays.
      init_scale: of "data": the deviation of the layer's outputs.
      axis_name: of "data": the named axis or axes that the batch of `init` is split over.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer = jnn.WeightNorm(nn.Dense(2))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'layer_instance': {'bias': (2,), 'kernel': (3, 2)}, 'layer_instance/kernel/scale': (2,)}

      After training, the plain layer:

      >>> y = nn.Dense(2).apply(layer.fold(variables), jnp.ones((1, 3)))
    """

    layer_instance: nn.Module
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = nn.initializers.ones
    feature_axes: Axes | None = -1
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})
    scale_from: ScaleFrom = "init"
    init_scale: float = 1.0
    axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with normalized weights."""
        with errors_of(self):
            check_scale_from(self)
        if self.scale_from == "data" and self.is_initializing():
            self.layer_instance(*args, **kwargs)  # makes the parameters
            with errors_of(self):
                unit = self._unit()
            # One that was here before in this pass has its length already.
            if not self.has_variable("params", f"{self._name_of(unit.kernel)}/scale"):
                return self._start(unit, args, kwargs)

        def normalized(path: str, v: jax.Array) -> jax.Array:
            scale, features = scale_of(self, path, v, self._length_of(v) if self.scale_from == "norm" else None)
            with errors_of(self), errors_in(lambda: path):
                return weight_norm(v, scale, feature_axes=features, epsilon=self.epsilon, dtype=result_dtype(v, scale, dtype=self.dtype))

        return call_with_params(self, self.layer_instance, filtered(self.variable_filter, normalized), args, kwargs)

    def fold(self, variables: Any) -> dict[str, Any]:
        """The variables of the layer alone, with the weights that are used in place of directions and lengths.

        Args:
          variables: of this module: what its `init` returned, or of a larger model the part that belongs to it, such as
            `{"params": variables["params"]["name"]}`. Where the layer was made in a compact method, its parameters lie beside this
            module's: `{"params": {**params["WeightNorm_0"], "Dense_0": params["Dense_0"]}}`.

        Returns:
          Variables for the unwrapped layer, which gives the same output with them. Boxes of metadata stay.
        """
        params = variables.get("params", {})
        layers = [name for name, entry in params.items() if isinstance(entry, Mapping)]
        if len(layers) != 1:
            raise ValueError(
                "fold takes the variables of this WeightNorm, with the parameters of one layer beside its scales, but got "
                f"{sorted(params)}; give the part of a model's variables that belongs to it."
            )
        (name,) = layers
        selects = _selects(self.variable_filter)

        def used(path: Any, value: Any) -> Any:
            here = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            return meta.replace_boxed(value, self._used(meta.unbox(value), params, here)) if selects(here) else value

        folded = jax.tree_util.tree_map_with_path(used, params[name], is_leaf=is_box)
        return {**{kind: entries[name] for kind, entries in variables.items() if name in entries}, "params": folded}

    def _used(self, v: jax.Array, params: Any, path: str) -> jax.Array:
        """The weight at `path` that the layer is called with."""
        found = [meta.unbox(params[key]) for key in (f"{path}/value/scale", f"{path}/scale") if key in params]
        with errors_in(lambda: f"WeightNorm: {path}"):
            if self.use_scale and not found:
                raise ValueError(f"fold found no scale for it; the variables have {sorted(params)}.")
            scale = found[0] if self.use_scale else None
            features = None if self.feature_axes is None else distinct_axes(self.feature_axes, v.ndim)
            return weight_norm(v, scale, feature_axes=features, epsilon=self.epsilon, dtype=result_dtype(v, scale, dtype=self.dtype))

    def _length_of(self, v: jax.Array) -> Callable[[Any], jax.Array]:
        return lambda features: weight_norm_scale(v, feature_axes=features, epsilon=self.epsilon, dtype=self.param_dtype)

    def _unit(self) -> Unit:
        """Of a layer whose parameters are made."""
        params, selects = params_of(self.layer_instance), _selects(self.variable_filter)
        return unit_of(params, [path for path in params if selects(self._name_of(path))], self.feature_axes)

    def _name_of(self, path: Path) -> str:
        return "/".join((str(self.layer_instance.name), *path))

    def _start(self, unit: Unit, args: tuple, kwargs: dict) -> jax.Array:
        """Sets the length and the bias from data, and gives out what they make of it."""
        layer, params = self.layer_instance, params_of(self.layer_instance)
        call, v, axes = pure_call(self, layer, args, kwargs), params[unit.kernel], tuple(range(-len(unit.shape), 0))
        if unit.bias is not None:
            params[unit.bias] = jnp.zeros_like(params[unit.bias])
        with errors_of(self), errors_in(lambda: self._name_of(unit.kernel)):
            dtype = result_dtype(v, jnp.dtype(self.param_dtype), dtype=self.dtype)
            direction = weight_norm(v, feature_axes=axes, epsilon=self.epsilon, dtype=dtype)
            check_output(lambda w: call({**params, unit.kernel: w}), direction, unit.shape)
            t = call({**params, unit.kernel: direction})
            scale, bias, y = weight_norm_data_init(
                t, init_scale=self.init_scale, feature_axes=axes, axis_name=self.axis_name, mean_only=unit.bias is None
            )
        scale_of(self, self._name_of(unit.kernel), v, lambda _: scale)
        if unit.bias is not None:
            write_param(layer, unit.bias, bias)
        return y


@final
class WeightStandardization(nn.Module):
    """Weight standardization of a layer's kernels: :func:`jnorm.reparam.weight_standardization`.

    The layer keeps its parameters; with `use_scale` "params" of this module holds a gain for each: `"Conv_0/kernel/scale"`.

    Args:
      layer_instance: the layer.
      epsilon: see :func:`jnorm.reparam.weight_standardization`.
      dtype: of the weights that are used; None: what weight and gain promote to.
      param_dtype: of the gains.
      use_scale: learn a gain.
      scale_init: initializer of the gains.
      feature_axes: the axes of the outputs.
      variable_filter: the parameters whose path, such as "Conv_0/kernel", contains one of these are standardized, at least one;
        None: all.
      correction: 1 is the unbiased variance, 0 the biased.
      epsilon_mode: "outside", "inside" or "max".
      fan_in: n·σ² in place of σ²: scaled weight standardization.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer = jnn.WeightStandardization(nn.Conv(4, (3, 3)))
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> y.shape
      (1, 8, 8, 4)
    """

    layer_instance: nn.Module
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = False
    scale_init: Initializer = nn.initializers.ones
    feature_axes: Axes = -1
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})
    correction: int | float = 1
    epsilon_mode: EpsilonMode = "outside"
    fan_in: bool = False

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with standardized weights."""

        def standardized(path: str, w: jax.Array) -> jax.Array:
            scale, features = scale_of(self, path, w)
            with errors_of(self), errors_in(lambda: path):
                return weight_standardization(
                    w,
                    scale,
                    feature_axes=features,
                    correction=self.correction,
                    epsilon=self.epsilon,
                    epsilon_mode=self.epsilon_mode,
                    fan_in=self.fan_in,
                    dtype=result_dtype(w, scale, dtype=self.dtype),
                )

        return call_with_params(self, self.layer_instance, filtered(self.variable_filter, standardized), args, kwargs)


@final
class SpectralNorm(nn.Module):
    """Spectral normalization of a layer's weights: :func:`jnorm.reparam.spectral_norm`, in place of `flax.linen.SpectralNorm`.

    The layer keeps its parameters; `collection_name` holds "u" and "sigma" of each that has two axes or more: `"Dense_0/kernel/u"`.
    Initialization updates nothing.

    Args:
      layer_instance: the layer.
      n_steps: steps of the power iteration in each call; below 1 the weights are used as they are.
      epsilon: added to the squared norms of u and v.
      dtype: of the weights that are used; None: what weight and state promote to.
      param_dtype: of u and sigma.
      error_on_non_matrix: refuse weights of more than two axes, in place of flattening all but the last.
      collection_name: the collection of u and sigma.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer = jnn.SpectralNorm(nn.Dense(2))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)), update_stats=False)
      >>> y, updates = layer.apply(variables, jnp.ones((1, 3)), update_stats=True, mutable=["batch_stats"])
      >>> list(updates["batch_stats"])
      ['layer_instance/kernel/u', 'layer_instance/kernel/sigma']
    """

    layer_instance: nn.Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """The layer's output, with normalized weights.

        Args:
          *args: the layer's.
          update_stats: whether u and sigma are stored (training); `collection_name` must be mutable for it.
          **kwargs: the layer's.

        Returns:
          What the layer returns.
        """

        def normalized(path: str, w: jax.Array) -> jax.Array:
            if w.ndim < 2 or self.n_steps < 1:
                return w
            with errors_of(self), errors_in(lambda: path):
                if w.ndim > 2 and self.error_on_non_matrix:
                    raise ValueError(f"a weight of {w.ndim} axes is no matrix, and error_on_non_matrix is True.")
                variables = self._state_variables(path, w.shape[-1])
                state = variables.read()
                bar, new = spectral_norm(
                    w,
                    state,
                    n_steps=self.n_steps,
                    epsilon=self.epsilon,
                    update_stats=False if self.is_initializing() else update_stats,
                    dtype=result_dtype(w, *state.values(), dtype=self.dtype),
                )
                variables.write(state, new)
                return bar

        return call_with_params(self, self.layer_instance, normalized, args, kwargs)

    def _state_variables(self, path: str, features: int) -> StateVariables:
        def make() -> Any:
            return spectral_norm_state(self.make_rng("params"), features, dtype=self.param_dtype)

        return StateVariables(self, make, state_keys(SpectralNormState), self.collection_name, prefix=f"{path}/")


def _selects(names: Iterable[str] | None) -> Callable[[str], bool]:
    """Whether a path contains one of the names. No names: always, as in Flax."""
    if isinstance(names, str):
        raise TypeError(f"variable_filter must be a collection of names, such as {{{names!r}}}, got the string {names!r}.")
    wanted = tuple(names or ("",))
    return lambda path: any(name in path for name in wanted)


def filtered(names: Iterable[str] | None, change: Callable[[str, jax.Array], jax.Array]) -> Callable[[str, jax.Array], jax.Array | None]:
    """`change` of the parameters that are selected, and None of the others."""
    selects = _selects(names)
    return lambda path, value: change(path, value) if selects(path) else None


def scale_of(module: Any, path: str, value: jax.Array, start: Callable[[Any], jax.Array] | None = None) -> tuple[jax.Array | None, Any]:
    """The parameter of this module that belongs to one of the layer's, and the feature axes that it varies along.

    It starts as `start` of these axes gives it, or as `scale_init` does.
    """
    if module.feature_axes is None:
        features, shape = None, ()
    else:
        features = distinct_axes(module.feature_axes, value.ndim)
        with errors_of(module):
            shape = feature_shape(value, features, "feature_axes", of=path)
    if not module.use_scale:
        return None, features
    # Flax's name for a parameter in a box, which an old checkpoint may have.
    name = f"{path}/value/scale" if module.has_variable("params", f"{path}/value/scale") else f"{path}/scale"
    init = module.scale_init
    if start is not None and module.is_initializing():  # later on Flax would evaluate it in each call, for its shape
        init = boxed_as(init, functools.partial(start, features))
    return module.param(name, init, shape, module.param_dtype), features
