"""Running statistics that move once per optimizer step, by all of the step's micro-batches."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, unfreeze
from jax import lax

from .._pipeline.population import ENTRIES, collects, key_of
from .._pipeline.running import check_momentum, update
from ..typing import Momentum
from ._layers import entries, map_states
from ._nnx_states import borrowed, read_states, write_states
from .population import Estimator, State, averages_of, population_state


def commit_population(state: State, population: State, *, momentum: Momentum = 0.99) -> State:
    r"""Running statistics moved once, by what several micro-batches collected: where gradients are accumulated.

    .. math:: s \leftarrow \rho\,s + (1 - \rho)\,s_\text{step}, \qquad
              \mu_\text{step} = \frac{1}{n}\sum_k n_k\mu_k, \qquad
              \sigma^2_\text{step} = \frac{1}{n}\sum_k n_k\left(\sigma_k^2 + (\mu_k - \mu_\text{step})^2\right)

    Each micro-batch is normalized with its own statistics; the running ones move as if all of the step's had been seen at once.

    Args:
      state: any tree with states of running statistics in it: of pure functions, or the collection "batch_stats" of Linen. For an NNX
        model there is :func:`commit_once`.
      population: the tree that :func:`population_state` made of it before the first micro-batch, after the last one.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]). None: the cumulative
        average over steps, which needs a "count" in each state.

    Returns:
      The tree with the structure and dtypes of `state`. Averages move once, and so does a "count"; what else the states hold, such as the
      earlier iterations of cross-iteration normalization, is that of the population, which went through the micro-batches. A feature
      that none of them counted stays as it is. No gradient flows through it.

    Raises:
      ValueError: a population that does not collect, or is of another tree; no running statistics in the tree; a static momentum that does
        not fit.

    Numerics:
      In at least float32, and then in the dtype of the states; as :func:`population_state` collects. With its estimator "mean" the
      variance is the mean of the micro-batches' unbiased ones, in place of the biased one of all values.

    Distributed:
      What the micro-batches do: with an axis name, or over sharded arrays, their statistics are those of all devices.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> state = jnorm.batch_norm_state(1)
      >>> population = jnorm.tools.population_state(state)
      >>> for x in (jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]])):
      ...     y, population = jnorm.batch_norm(x, population)
      >>> new = jnorm.tools.commit_population(state, population, momentum=0.5)
      >>> new["mean"].tolist(), new["var"].tolist()
      ([1.25], [1.125])
    """

    def committed(collected: Any, old: Any) -> Any:
        if not collects(collected):
            raise ValueError(f"population must come from population_state, got a state of {sorted(collected)}, which collects nothing.")
        return _committed(collected, old, momentum)

    _check_same_tree(population, state)
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(map_states(committed, *map(_thawed, (population, state)))))


@contextlib.contextmanager
def commit_once(model: nnx.Module, *, momentum: Momentum = None, estimator: Estimator = "pooled") -> Iterator[None]:
    """In this context the norms of an NNX model collect, and at its end their running statistics move once: :func:`commit_population`.

    Args:
      model: an NNX model, whose norms with running statistics are set. Each call of it in training mode is a micro-batch.
      momentum: the fraction of the old running value that is kept; None: each norm's own. 1 with `track_count` is the cumulative average.
      estimator: "pooled"; "mean", or "cumulative": the variance is then the mean of the micro-batches' unbiased or biased ones.

    Returns:
      A context manager. Where the context is left by an error, all running statistics are as they were before it.

    Raises:
      ValueError: there is no norm with running statistics in the model; it collects already; a static momentum that does not fit.

    Example:
      >>> import jax.numpy as jnp, jnorm.tools
      >>> from flax import nnx
      >>> layer = jnorm.nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> with jnorm.tools.commit_once(layer):
      ...     for x in (jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]])):
      ...         y = layer(x)
      >>> layer.mean[...].tolist(), layer.var[...].tolist()
      ([1.25], [1.125])
    """
    with borrowed(model) as (norms, before):
        write_states(norms, population_state(before, estimator=estimator))
        yield
        momenta = {path: norm.momentum if momentum is None else momentum for path, norm in norms.items()}
        write_states(norms, {path: _committed(one, before[path], momenta[path]) for path, one in read_states(norms).items()})


def _thawed(tree: Any) -> Any:
    """With dicts for Flax's frozen ones: `apply` returns a plain collection, whichever it was given."""
    return jax.tree.map(lambda n: unfreeze(n) if isinstance(n, FrozenDict) else n, tree, is_leaf=lambda n: isinstance(n, FrozenDict))


def _check_same_tree(population: Any, state: Any) -> None:
    got, wanted = ({e for e in entries(tree) if e.split("/")[-1] not in ENTRIES} for tree in (state, population))
    if got != wanted:
        raise ValueError(
            f"state must be the tree that the population was made of; state alone has {sorted(got - wanted)[:5]}, "
            f"the population alone {sorted(wanted - got)[:5]}."
        )


def _committed(collected: Any, old: Any, momentum: Momentum) -> dict[str, Any]:
    """`old` moved by the averages of `collected`, which has all else."""
    check_momentum(momentum, old)
    averages = {key: jnp.asarray(a) for key, a in averages_of(collected).items()}
    running = {key: a for key, a in old.items() if key in (*averages, "count")}
    moved = {**collected, **update(running, averages, collected[key_of(collected)] > 0, momentum)}
    return {key: lax.stop_gradient(jnp.asarray(moved[key])).astype(jnp.asarray(a).dtype) for key, a in old.items()}
