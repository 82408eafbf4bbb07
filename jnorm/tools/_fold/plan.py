"""Which norms of a traced model fold into which layers, and the values of the parameters then."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from .._layers import freshly_traced
from .calls import Calls, state_of
from .graph import Graph, Value, graph_of
from .maps import along, evaluation_map, folding_dtype, into_next, into_previous, narrowed, plus, with_complex
from .places import compiled, places
from .report import Folding, Report
from .steps import KeptError, leaf_text
from .walks import Layer, layer_after, layer_before

Key = tuple[Any, ...]
# For a layer without a bias, and the direction, that layer with the one that it can get, or None.
NewBias = Callable[[Layer, str], Layer | None]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A norm and the layer that it folds into. Without a bias in the layer what is added stays at the norm."""

    norm: str
    direction: str
    layer: Layer
    new_bias: bool


def key_of(path: Iterable[Any]) -> Key:
    """The names on the way to an array, without the one of the value in a variable or in a box of metadata."""
    return tuple(k.key if isinstance(k, DictKey) else k.idx if isinstance(k, SequenceKey) else str(k) for k in path if not _is_value(k))


def _is_value(k: Any) -> bool:
    return isinstance(k, GetAttrKey) and k.name == "value"


def trace(run: Callable[..., Any], tree: Any, args: tuple, kwargs: dict, name_of: Callable[[Key], Key | None]) -> Graph:
    """The graph of `run(tree, args, kwargs)`, which gives outputs and a tree; what is no array in the arguments is a constant of it.

    Leaves of the tree have the names that `name_of` gives, or None for what is no parameter.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    ends: list[Key | None] = []
    dynamic = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def traced(tree: Any, arrays: list[Any]) -> list[Any]:
        given = list(leaves)
        for i, a in zip(dynamic, arrays, strict=True):
            given[i] = a
        out, after = run(tree, *jax.tree.unflatten(structure, given))
        named = [(None, leaf) for leaf in jax.tree.leaves(out)] + jax.tree_util.tree_leaves_with_path(after)
        named = [(path, leaf) for path, leaf in named if hasattr(leaf, "dtype")]
        ends.extend(None if path is None else key_of(path) for path, _ in named)
        return [leaf for _, leaf in named]

    with freshly_traced():
        closed = jax.make_jaxpr(traced)(tree, [leaves[i] for i in dynamic])
    keys = [key_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    place = {k: i for i, k in enumerate(keys)}
    return graph_of(closed, [name_of(k) for k in keys], [None if k is None else place.get(k) for k in ends])


def plan(graph: Graph, calls: Calls, chosen: Iterable[str], new_bias: NewBias) -> tuple[list[Pair], Report]:
    """The pairs among the chosen norms, and what becomes of each.

    Args:
      graph: of the model.
      calls: of its norms.
      chosen: paths.
      new_bias: as told there.
    """
    pairs, entries, wanted = [], [], set(chosen)
    for path in calls.norms:
        try:
            if path not in wanted:
                raise KeptError("it was not asked for")
            pair = _pair(graph, calls, path, new_bias)
        except KeptError as kept:
            entries.append(Folding(path, None, None, str(kept)))
        else:
            pairs.append(pair)
            entries.append(Folding(path, "/".join(map(str, pair.layer.kernel[:-1])), pair.direction, ""))
    return pairs, Report(entries)


def _pair(graph: Graph, calls: Calls, path: str, new_bias: NewBias) -> Pair:
    call = calls.check(graph, path)
    try:
        return _before(graph, path, call.features, new_bias)
    except KeptError as before:
        if not call.alone:
            raise
        try:
            return _after(graph, path, call.features, new_bias)
        except KeptError as after:
            raise KeptError(f"{before}, and {after}") from None


def _before(graph: Graph, path: str, features: tuple[int, ...], new_bias: NewBias) -> Pair:
    layer = layer_before(graph.marks(path, "in")[0], features)
    _check_dtypes(graph, path, layer, "previous")
    made = new_bias(layer, "previous") if layer.bias is None and layer.ends else None
    return Pair(path, "previous", made or layer, made is not None)


def _after(graph: Graph, path: str, features: tuple[int, ...], new_bias: NewBias) -> Pair:
    ends = graph.marks(path, "out")
    if not ends:
        raise KeptError("its output is not used")
    layer = layer_after(graph, ends[0], features)
    _check_dtypes(graph, path, layer, "next")
    made = new_bias(layer, "next") if layer.bias is None else None
    if layer.bias is None and made is None:
        raise KeptError("the layer after it has no bias, and is of no class that can get one")
    return Pair(path, "next", made or layer, made is not None)


def _check_dtypes(graph: Graph, path: str, layer: Layer, direction: str) -> None:
    """That nothing complex is to go into what is real. A norm's mean may be complex where its input is."""
    start, own = graph.marks(path, "in")[0], {leaf_text(key): v for key, v in graph.leaves.items()}
    scale, bias = (own.get(f"{path}/{name}".lstrip("/")) for name in ("scale", "bias"))
    kernel = graph.leaves[layer.kernel]
    if _is_complex(scale) and not _is_complex(kernel):
        raise KeptError("its scale is complex, but the kernel of the layer beside it is real")
    shifts = [start.inputs[0], scale, bias, *([kernel] if direction == "next" else [])]
    if layer.bias is not None and any(map(_is_complex, shifts)) and not _is_complex(graph.leaves[layer.bias]):
        raise KeptError("what it adds is complex, but the bias of the layer beside it is real")


def _is_complex(value: Value | None) -> bool:
    return value is not None and jnp.issubdtype(value.dtype, jnp.complexfloating)


def with_bias(layer: Layer, key: Key, kept: tuple[int, ...], direction: str) -> Layer:
    """The layer with a new bias of the sizes of these axes of the kernel."""
    wanted = layer.axes if direction == "previous" else kept
    return dataclasses.replace(layer, bias=key, bias_axes=tuple(kept.index(a) for a in wanted), kept=kept)


def einsum_order(equation: str | None, kernel_axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of an einsum's kernel that its output has, in the order of its bias; None where the equation does not tell."""
    if equation is None:
        return None
    operands, _, result = equation.replace(" ", "").partition("->")
    kernel = operands.split(",")[-1]
    order = None if "." in kernel else tuple(kernel.index(c) for c in result if c in kernel)
    return order if order is not None and sorted(order) == sorted(kernel_axes) else None


def folded_values(
    values: Mapping[Key, Any], pairs: list[Pair], calls: Calls, variables: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[Key, jax.Array], dict[str, jax.Array]]:
    """The new kernels and biases, by leaf, and what is added at norms whose layers have none, in one compiled program.

    Args:
      values: all parameters.
      pairs: what to fold.
      calls: the norms.
      variables: of each norm in `pairs`, by path.
    """
    used = {key: values[key] for pair in pairs for key in (pair.layer.kernel, pair.layer.bias) if key in values}
    some = {p.norm: dict(variables[p.norm]) for p in pairs}
    return compiled(lambda used, variables: _folded(used, pairs, calls, variables), places(used, some, pairs))(used, some)


def _folded(used: Any, pairs: list[Pair], calls: Calls, variables: Any) -> Any:
    dtypes, shifts = {key: jnp.asarray(a).dtype for key, a in used.items()}, {}
    wide: dict[Key, Any] = {}
    # Norms after a layer first: they scale its kernel, of which a norm before it then makes the bias that it brings.
    for pair in sorted(pairs, key=lambda p: p.direction == "next"):
        layer, norm = pair.layer, calls.norms[pair.norm]
        state = state_of(norm, variables[pair.norm])
        kernel, bias = (wide.get(key, used.get(key)) for key in (layer.kernel, layer.bias))
        dtype = folding_dtype(kernel, bias, *state.values())
        kernel, mapped = kernel.astype(dtype), evaluation_map(state, state.get("scale"), state.get("bias"), _epsilon(norm), dtype)
        if bias is None and pair.new_bias:
            bias = jnp.zeros([kernel.shape[a] for a in layer.kept], dtype)
            dtypes[layer.bias] = with_complex(dtypes[layer.kernel], dtype)
        bias: Any = bias if bias is None else bias.astype(dtype)
        if pair.direction == "previous":
            wide[layer.kernel], new = into_previous(kernel, bias, mapped, layer.axes, layer.bias_axes)
        else:
            wide[layer.kernel], added = into_next(kernel, mapped, layer.axes, layer.kept, layer.groups)
            new = plus(bias, added, layer.bias_axes)
        if layer.bias is None:
            call = calls.seen[pair.norm]
            view = along(new.reshape([call.shape[a] for a in call.features]), len(call.shape), call.features)
            shifts[pair.norm] = view.reshape(view.shape[call.features[0] :])  # leading axes may be others in another call
        else:
            wide[layer.bias] = new
    return {key: narrowed(a, dtypes[key]) for key, a in wide.items()}, shifts


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "epsilon", 0.0)
