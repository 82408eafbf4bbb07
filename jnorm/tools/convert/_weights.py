"""Models of Keras, Haiku and Equinox as weights by name, in the layouts of Flax, and models of NNX and Linen that are given them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from .._layers import Layers
from ._checks import problems_of
from ._entries import pairs_with, shapes_of
from ._filled import copied, fill_model, filled_variables
from ._haiku import check_debiased, count_of
from ._match import MatchBy, Rename, check_names, names_by_order, read, renamer, selected, some, told
from ._source import Weights, dotted
from ._trees import NORMS, Layer, Model, join, of_linen_model

_BESIDE = ("kernel_scale", "kernel_u", "kernel_sigma")


# --- Loading --------------------------------------------------------------------------------------------------------------------------


def load(
    model: nnx.Module,
    weights: Weights,
    *,
    rename: Rename = None,
    match: MatchBy = "name",
    layers: Layers | None = None,
    ignore: Iterable[str] = (),
    flattened: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """An NNX model with the weights and statistics of a model of Keras, Haiku or Equinox that is built alike.

    Layers that there are rules for: `Linear`, `Conv`, `Embed`, `MultiHeadAttention` of Flax, norms of Flax and jnorm, and jnorm's
    `WeightNorm` and `SpectralNorm` around one of them. Parameters of your own modules are taken as they are.

    Args:
      model: gives the structure, the dtypes and the shardings. It stays as it is, and may be abstract (`nnx.eval_shape`).
      weights: of :func:`weights_of_keras`, :func:`weights_of_haiku` or :func:`weights_of_equinox`.
      rename: what the layers are called there: a dict of regular expressions and what to put in their place, or a function. Of paths such
        as "layer1/0/conv1", in which the "layers" of an `nnx.Sequential` is left out.
      match: "name", or "order": the layers of both in the order of their definition.
      layers: only these, by path.
      ignore: patterns of keys of the source that are left.
      flattened: paths of dense layers and norms whose features were flattened from (C, H, W) there, and are from (H, W, C) here, with
        that shape; of norms over all of these axes too. A norm over several axes in NNX, whose variables are flat, needs it always: with
        (C*H*W,) the order stays.

    Returns:
      A new model. Epsilon and momentum of its norms are those of the source, where the source has them.

    Raises:
      ValueError: keys that are missing or left over, shapes that do not fit, all told at once; layers that there is no rule for; a norm
        that does otherwise there; a debiased average that the norm here cannot go on with, which `track_count=True` lets it; another
        number of heads. For the values alone pass `weights.without_options()`.
      TypeError: weights of another source, such as those that :func:`load_torch` takes.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> from jnorm.tools import convert
      >>> weights = convert.weights_of_haiku({"net/~/linear": {"w": np.ones((3, 4)), "b": np.zeros(4)}})
      >>> model = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0))])
      >>> float(convert.load(model, weights, rename={"^0$": "net/linear"})[0].kernel[0, 0])
      1.0
    """
    new, found = copied(model)
    fill_model(new, found, _values(found, weights, rename, match, layers, ignore, flattened, set_too=True))
    return new


def load_linen(
    model: nn.Module,
    variables: Mapping[str, Any],
    weights: Weights,
    *args: Any,
    rename: Rename = None,
    match: MatchBy = "name",
    layers: Layers | None = None,
    ignore: Iterable[str] = (),
    flattened: Mapping[str, tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> Any:
    """The variables of a Linen model with the weights and statistics of a model of Keras, Haiku or Equinox that is built alike.

    As :func:`load`. A Linen model is code: nothing in it can be set, so that an epsilon or momentum that is another is refused.

    Args:
      model: the Linen model.
      variables: of the model, or `jax.eval_shape` of its `init`: they give the structure and the dtypes.
      weights: see :func:`load`.
      *args: of a call of the model, which is traced to find its layers.
      rename: see :func:`load`; the paths are those of the variables, such as "Dense_0".
      match: "name", or "order": layers in the order in which they are called here and defined there.
      layers: only these, by path.
      ignore: patterns of keys of the source that are left.
      flattened: see :func:`load`.
      **kwargs: of the call of the model.

    Returns:
      New variables: the tree that was given, its collections "params" and "batch_stats" with other values.

    Raises:
      ValueError: as :func:`load`.

    Example:
      >>> import numpy as np
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm.tools import convert
      >>> weights = convert.weights_of_haiku({"linear": {"w": np.ones((3, 4)), "b": np.zeros(4)}})
      >>> model, x = nn.Dense(4), jnp.ones((1, 3))
      >>> variables = convert.load_linen(model, model.init(jax.random.key(0), x), weights, x, rename={"^$": "linear"})
      >>> model.apply(variables, x).tolist()
      [[3.0, 3.0, 3.0, 3.0]]
    """
    found = of_linen_model(model, variables, args, kwargs)
    return filled_variables(variables, found, _values(found, weights, rename, match, layers, ignore, flattened, set_too=False))


def _values(
    found: Model,
    weights: Weights,
    rename: Rename,
    match: MatchBy,
    layers: Layers | None,
    ignore: Iterable[str],
    flattened: Mapping[str, tuple[int, ...]] | None,
    set_too: bool,
) -> dict[str, np.ndarray]:
    """The values of the model's variables, by path; hyperparameters are set, or compared."""
    if not isinstance(weights, Weights):
        raise TypeError(
            f"weights must be of weights_of_keras, weights_of_haiku or weights_of_equinox, got {type(weights).__name__}; load_torch takes "
            "a PyTorch module or its state dict."
        )
    ignore = list(ignore)
    paths, shapes = selected(found, layers), shapes_of(found, flattened)
    kinds = {path: type(layer.module).__name__ for path, layer in found.layers.items() if path in paths}
    if transposed := [path for path, kind in kinds.items() if kind == "ConvTranspose"]:
        raise ValueError(
            f"there is no rule for transposed convolutions of other libraries: {some(transposed, told)}; leave them out with layers=, a "
            "function that is False for their paths, and set them yourself."
        )
    if match not in ("name", "order"):
        raise ValueError(f'match must be "name" or "order", got {match!r}.')
    if match == "order" and rename is not None:
        raise ValueError('match="order" asks for no names: leave rename out.')
    given = renamer(rename)

    def by_name(path: str) -> str:
        return given(path).strip(".")  # the model itself is a layer of the path ""

    name: Callable[[str], str] = by_name
    if match == "order":
        pairs = pairs_with(found, weights, name, shapes)
        by_order = names_by_order(found, _without_beside(weights, set()), pairs, paths, ignore)
        name = functools.partial(_by_order, by_order)
    wrapped = {name(layer.name) for layer in found.layers.values() if layer.wrapper is not None}
    pairs = pairs_with(found, weights, name, shapes)
    check_names(pairs, paths)
    values = read(found, pairs, _without_beside(weights, wrapped), paths, ignore)
    problems: list[str] = []
    for path, layer in found.layers.items():
        heads = weights.heads.get(name(layer.name))
        if path in paths and heads is not None and heads != (ours := getattr(layer.module, "num_heads", heads)):
            problems.append(f"{told(path)}: {ours} heads here, {heads} there")
        if path in paths and type(layer.module).__name__ in NORMS:
            wrong, count = _options_of(layer, weights, name(layer.name), set_too)
            problems += [f"{told(path)}: {problem}" for problem in wrong]
            if count is not None and (at_path := join(layer.prefix, "count")) in found.variables:
                values[at_path] = np.asarray(count, np.float32)
    if problems:
        raise ValueError(
            f"the model does not do what the source does: {some(problems)}. Build it so, or pass weights.without_options() for the values "
            "alone."
        )
    return values


def _by_order(names: Mapping[str, str], path: str) -> str:
    return names.get(path, path.replace("/", "."))


def _without_beside(weights: Weights, wrapped: set[str]) -> dict[str, np.ndarray]:
    """Kernels as they are used, but of layers that normalize theirs here too."""
    state = dict(weights.values)
    for key, plain in weights.plain.items():
        layer = key.rpartition(".")[0]
        if layer not in wrapped:
            state[key] = plain
            for beside in _BESIDE:
                state.pop(dotted(layer, beside), None)
    return state


def _options_of(layer: Layer, weights: Weights, name: str, set_too: bool) -> tuple[list[str], float | None]:
    """What the norm here does otherwise, and the count that its average goes on with."""
    norm, module = weights.norms.get(name), layer.module
    if norm is not None:
        if type(module).__name__ == "InstanceNorm" and norm.kind == "GroupNorm" and norm.num_groups == math.prod(norm.shape):
            norm = dataclasses.replace(norm, kind="InstanceNorm", num_groups=None)
        if problems := problems_of(layer, norm, norm.kind, set_too):
            return problems, None
    momentum = getattr(module, "momentum", None)
    for what in ("mean", "var"):
        if momentum is not None and (ema := weights.debiased.get(dotted(name, what))) is not None:
            check_debiased(name, what, ema, momentum)
    count = count_of(weights.steps[name], momentum) if name in weights.steps and momentum is not None else norm.count if norm else None
    if momentum is None or not 0 <= momentum < 1:
        return [], count
    if count is None:
        return [], 1 / (1 - momentum)  # as an average that is not debiased goes on
    if not getattr(module, "track_count", False) and 1 - count * (1 - momentum) > 2**-20:
        problem = f"the average is debiased, and its count of {count:g} has not come to the limit: the norm needs track_count=True"
        return [problem], None
    return [], count
