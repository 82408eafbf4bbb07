"""On which devices folded parameters lie: as those that they take the place of."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Places = tuple[dict[Any, NamedSharding], dict[str, NamedSharding]]


def places(used: Mapping[Any, Any], variables: Any, pairs: Iterable[Any]) -> Places | None:
    """The shardings of new kernels and biases, by leaf, and of what is added at norms, by path; None where nothing lies on a mesh.

    A bias that a layer gets is sharded as its kernel along the same axes; what was on no mesh, and what is added at norms, is on all of it.

    Args:
      used: the parameters before, by leaf.
      variables: of the norms.
      pairs: what is folded into what.
    """
    meshes = [a.sharding.mesh for a in jax.tree.leaves((used, variables)) if _on_mesh(a)]
    if not meshes:
        return None
    whole = NamedSharding(meshes[0], PartitionSpec())
    found = {key: a.sharding if _on_mesh(a) else whole for key, a in used.items()}
    for pair in pairs:
        if pair.new_bias:
            kernel = found[pair.layer.kernel]
            along = dict(enumerate(kernel.spec))
            found[pair.layer.bias] = NamedSharding(kernel.mesh, PartitionSpec(*(along.get(a) for a in pair.layer.kept)))
    return found, {pair.norm: whole for pair in pairs if pair.layer.bias is None}


def compiled(run: Callable[..., Any], there: Places | None) -> Callable[..., Any]:
    """The function, compiled, with its results there."""
    if there is None:
        return jax.jit(run)
    if any(AxisType.Explicit in s.mesh.axis_types for s in jax.tree.leaves(there)):
        run = jax.sharding.auto_axes(run, out_sharding=there)  # it scales kernels by norms, however each of the two is sharded
    return jax.jit(run, out_shardings=there)


def _on_mesh(a: Any) -> bool:
    return isinstance(a, jax.Array) and not isinstance(a, Tracer) and isinstance(a.sharding, NamedSharding)
