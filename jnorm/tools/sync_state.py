"""The running statistics of several devices, made one."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from .. import nnx as jnx
from .._jax_internals import align, replicated, varying_axes, with_sharding_of
from .._norms.eval_norm_fit import KEYS as FIT
from .._pipeline.arguments import Across
from .._pipeline.marks import KEYS as MARKS
from .._pipeline.population import KEYS, VALUES
from .._stats import all_stack, all_sum, participants, stats_dtype
from ..typing import AxisIndexGroups, AxisName

State = TypeVar("State")
Path = tuple[Any, ...]
# What belongs to batches that are over, and to one device's order of them.
MINI_BATCHES = ("batch_mean", "batch_var", "batch_count", "index")
WINDOW = ("means", "vars", "patches", "slopes", "covariances", "kernels", "counts", "index")
POWER_ITERATION = ("u", "sigma")
ENTRIES = {"mean", "var", "std", "count", *KEYS, *FIT, *MINI_BATCHES, *WINDOW, *POWER_ITERATION, *MARKS}
_STACKED = (
    "States that are stacked along an array axis are made one by "
    'jax.vmap(lambda state: sync_state(state, "d"), axis_name="d", out_axes=None)(states).'
)


def sync_state(
    state: State, axis_name: AxisName, *, axis_index_groups: AxisIndexGroups | None = None, between_devices: bool = True
) -> State:
    r"""The running statistics of all devices as one, for models that were trained without `axis_name`, or with groups.

    .. math:: \mu = \sum_d w_d\,\mu_d, \qquad \sigma^2 = \sum_d w_d\left(\sigma_d^2 + (\mu_d - \mu)^2\right)

    where all devices have the same weight, or weigh by the count of their running statistics. It is called inside of the mapped axis.

    Args:
      state: any tree with states of running statistics in it: of pure functions, the collection "batch_stats" of Linen, a train state, an
        `nnx.State`. Or an NNX model, whose statistics are set. What is no running statistic stays as it is; but a dict with "mean" and
        "var" is taken for one wherever it stands, so that where parameters have these names the collection alone should be given.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` that the states differ over.
      axis_index_groups: groups of equal size within that axis, each of which gets its own statistics.
      between_devices: whether the variance has the second term, the spread of the devices' means. False leaves the mean of variances, which
        is what :func:`jnorm.ghost_batch_norm` with an axis name keeps. For :func:`jnorm.tracked_instance_norm`, whose variances are of
        samples, give False; of an NNX model that is known by the class.

    Returns:
      The tree, the same on all devices of the axis or group, of the same dtypes; for an NNX model that model. Twice is as once. By entry:

      - "mean", "var", "std" (with epsilon in it, which stays): as above. The weights are "count", where there is one.
      - "count": its mean over the devices. After equally many steps of each that is the number that all have; in general the devices
        together hold as many batches as before, so that the next step, synchronized or not, has the weight that it had.
      - Of a population (:func:`population_state`) as :func:`merge_populations` of all: weights are the entry that counts, which is added
        up, so that this is for once, when all is collected. Where batches are counted, variances are averaged alone.
      - Of :func:`jnorm.feature_statistics` by count, of which the mean remains, as above; :func:`jnorm.merge_feature_statistics` adds up.
      - The sums of :func:`jnorm.eval_norm_fit`: their mean, which gives the same weights as their sum.
      - The batch so far of :func:`jnorm.cross_mini_batch_norm`, the earlier iterations of :func:`jnorm.cross_iteration_batch_norm`: none.
        Call it between batches; a window fills again.
      - The marks of :func:`freeze` stay. What is frozen is synchronized too: this is no update by a batch.
      - u and sigma of :func:`jnorm.reparam.spectral_norm`: of the first device. They follow the weights, and are the same where those are.

    Raises:
      ValueError: no `axis_name`, or one that is not bound; groups that do not fit; no running statistics in the tree.
      TypeError: a string in the place of the tree.

    Numerics:
      In at least float32, around a common center, then in the dtype of each entry: a spread of 1e-4 of the mean is kept. Means must stay
      below the largest float divided by the count.

    Distributed:
      One all-gather of 3 numbers per feature for the whole tree, up to 64 participants and 4 MiB; two all-reduces above. With
      `check_vma=True` the result is typed as the same on all devices. Entries that differ over other axes of a mesh too are gathered apart.

    Example:
      >>> import jax, jax.numpy as jnp, jnorm, jnorm.tools
      >>> states = {"mean": jnp.array([[1.0], [5.0]]), "var": jnp.array([[2.0], [4.0]])}  # of two devices
      >>> one = jax.vmap(lambda state: jnorm.tools.sync_state(state, "d"), axis_name="d", out_axes=None)(states)
      >>> {k: v.tolist() for k, v in one.items()}
      {'mean': [3.0], 'var': [7.0]}

    References:
      Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. Flax's examples take the mean
      of all entries over the devices (`cross_replica_mean`), variances and counts alike, which leaves the second term out.
    """
    if isinstance(state, str):
        got = f"the string {state!r}, and axis_name {type(axis_name).__name__}"
        raise TypeError(f"state must be a tree with running statistics, and axis_name comes after it; got {got}.")
    try:
        across = Across.of(axis_name, axis_index_groups)
    except ValueError as error:
        error.add_note(_STACKED)
        raise
    if not across.names:
        raise ValueError(f"axis_name must be the axis that the states differ over, got {axis_name!r}. {_STACKED}")
    if not isinstance(state, nnx.Module):
        return _synced(state, across, between_devices)
    within = {path for path, module in nnx.iter_modules(state) if isinstance(module, jnx.TrackedInstanceNorm)}
    nnx.update(state, _synced(nnx.state(state, nnx.BatchStat), across, between_devices, within))
    return state


class _Mixed(NamedTuple):
    """Numbers that are mixed one by one: of each a mean and a variance on each device, which has a weight."""

    weight: Any
    mean: Any
    var: Any


def _synced(tree: Any, across: Across, between: bool, within: Collection[Path] = ()) -> Any:
    """`within`: the states whose variances are averaged alone."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    paths, leaves = [_names(path) for path, _ in found], [leaf for _, leaf in found]
    states: dict[Path, dict[str, int]] = {}
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if path and (isinstance(leaf, nnx.BatchStat) or not isinstance(leaf, nnx.Variable)):
            states.setdefault(path[:-1], {})[path[-1]] = i
    given = {
        path: {key: jnp.asarray(_value(leaves[i])) for key, i in places.items() if key in ENTRIES}
        for path, places in states.items()
        if _is_state(places)
    }
    if not given:
        raise ValueError("there are no running statistics, such as a dict of 'mean' and 'var', in the tree that was given.")
    parts = {(path, key): part for path, state in given.items() for key, part in _parts(state, between and path not in within, across)}
    mixed: dict[Path, dict[str, _Mixed]] = {path: {} for path in given}
    for (path, key), part in _mix(parts, across).items():
        mixed[path][key] = part
    for path, state in given.items():
        for key, value in _entries(state, mixed[path]).items():
            i, value = states[path][key], with_sharding_of(value.astype(state[key].dtype), jax.typeof(state[key]))
            leaves[i] = leaves[i].replace(value) if isinstance(leaves[i], nnx.Variable) else value
    return jax.tree.unflatten(structure, leaves)


def _names(path: Any) -> Path:
    """The keys of dicts on the way; those that a wrapper of a layer makes are paths themselves."""
    names: list[Any] = []
    for entry in path:
        key = entry.key if isinstance(entry, jax.tree_util.DictKey) else entry
        names += key.split("/") if isinstance(key, str) else key if isinstance(key, tuple) else [key]
    return tuple(names)


def _value(leaf: Any) -> Any:
    return leaf[...] if isinstance(leaf, nnx.Variable) else leaf


def _is_state(keys: Collection[Any]) -> bool:
    averages = "mean" in keys and ("var" in keys or "std" in keys or set(keys) <= {"mean", "count", *KEYS, *MARKS})
    return averages or all(key in keys for key in FIT) or set(keys) == set(POWER_ITERATION)


def _parts(state: Mapping[str, jax.Array], between: bool, across: Across) -> list[tuple[str, _Mixed]]:
    """What is to be mixed of one state, by the entry that it becomes."""
    parts = [(key, _Mixed(1, state[key], 0)) for key in ("count", *FIT) if key in state]
    if "mean" not in state:
        return parts or [(key, _Mixed(_is_first(across), state[key], 0)) for key in POWER_ITERATION]
    mean = state["mean"]
    weight = next((state[key] for key in (*KEYS, "count") if key in state), 1)
    var = state["var"] if "var" in state else _wide(state["std"]) ** 2 if "std" in state else jnp.zeros(mean.shape, mean.real.dtype)
    apart = not between or any(key in state for key in KEYS if key != VALUES)
    parts.append(("mean", _Mixed(weight, mean.real, 0 if apart else var)))
    if jnp.iscomplexobj(mean):
        parts.append(("imag", _Mixed(weight, mean.imag, 0)))
    return [*parts, ("var", _Mixed(weight, var, 0))] if apart else parts


def _is_first(across: Across) -> jax.Array:
    """Whether this is the first device of the axis, or of its group."""
    firsts = [group[0] for group in across.groups] if across.groups else [0]
    return (lax.axis_index(across.names) == jnp.asarray(firsts, jnp.int32)).any()


def _entries(state: Mapping[str, jax.Array], mixed: Mapping[str, _Mixed]) -> dict[str, jax.Array]:
    """The new entries of one state."""
    new = {key: m.mean for key, m in mixed.items() if key not in ("imag", "var")}
    if "mean" not in state:
        return new
    var = mixed["var"].mean if "var" in mixed else mixed["mean"].var
    if "imag" in mixed:
        new["mean"] = lax.complex(new["mean"], mixed["imag"].mean)
        var = var if "var" in mixed else var + mixed["imag"].var
    new |= {"var": var} if "var" in state else {"std": jnp.sqrt(var)} if "std" in state else {}
    new |= {key: mixed["mean"].weight for key in KEYS if key in state}
    over = MINI_BATCHES if "batch_mean" in state else WINDOW if "kernels" in state else ()
    return new | {key: jnp.zeros(state[key].shape, state[key].dtype) for key in (*over, *MARKS) if key in state}


def _mix(parts: Mapping[Any, _Mixed], across: Across) -> dict[Any, _Mixed]:
    """All of them, the weights added up, in one collective, or one for each set of other axes that they vary over."""
    together: dict[frozenset, dict[Any, jax.Array]] = {}
    for key, part in parts.items():
        arrays = jnp.stack(align(_promoted([_like(a, part.mean).ravel() for a in part])))
        together.setdefault(varying_axes(arrays) - set(across.names), {})[key] = arrays
    mixed: dict[Any, _Mixed] = {}
    for some in together.values():
        packed = jnp.concatenate(_promoted(align(list(some.values()))), 1)
        ends = np.cumsum([a.shape[1] for a in some.values()])[:-1]
        outs = jnp.split(jnp.stack(_mixture(packed[0], packed[1], packed[2], across)), ends, 1)
        mixed |= {key: _Mixed(*(a.reshape(parts[key].mean.shape) for a in out)) for key, out in zip(some, outs, strict=True)}
    return mixed


def _mixture(weight: jax.Array, mean: jax.Array, var: jax.Array, across: Across) -> tuple[jax.Array, ...]:
    """The sum of everybody's weights, which may be fractions, and the mean and variance of all: by share of the weights, else alike."""
    number, stacked = participants(*across), all_stack([weight, mean, var], *across)
    if stacked is not None:
        weight, mean, var = jnp.moveaxis(stacked, 1, 0)

    def add(*values: jax.Array) -> list[jax.Array]:
        return all_sum(values, *across) if stacked is None else [v.sum(0, keepdims=True) for v in values]

    total, weighted, alike = add(weight, jnp.where(weight > 0, weight * mean, 0), mean / number)
    some = jnp.where(total > 0, total, 1)
    near = jnp.where(total > 0, weighted / some, alike)
    share = jnp.where(total > 0, weight / some, 1 / number)
    deviation = mean - near
    shift, second = add(*(jnp.where(share > 0, share * a, 0) for a in (deviation, var + deviation**2)))
    mixed = total, near + shift, jnp.maximum(second - shift**2, 0)
    return mixed if stacked is None else tuple(v[0] for v in mixed)


def _like(a: Any, mean: jax.Array) -> jax.Array:
    """In the shape of the mean, and typed as it is: on a mesh of explicit axes what is stacked must lie alike, under vmap too."""
    whole, spec = _wide(a), replicated()
    nothing = ((mean != mean) & False).astype(whole.dtype)
    whole = jnp.broadcast_to(whole, mean.shape) + nothing
    return whole if spec is None else jax.sharding.reshard(whole, spec)


def _wide(a: Any) -> jax.Array:
    a = jnp.asarray(a)
    return a.astype(stats_dtype(a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else jnp.float32)


def _promoted(arrays: list[jax.Array]) -> list[jax.Array]:
    """To the widest dtype, of float32 and float64."""
    widest = max((a.dtype for a in arrays), key=lambda dtype: dtype.itemsize)
    return [a.astype(widest) for a in arrays]
