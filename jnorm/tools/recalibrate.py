"""Running statistics anew, over a stream of batches, for weights that no longer move."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from .._pipeline.population import BATCHES, KEYS, VALUES, collects, merged
from .._stats import stats_dtype
from ._layers import RUNNING_NNX, entries, map_states, nnx_norms

Estimator = Literal["pooled", "mean"]
State = TypeVar("State")
_KEY = {"pooled": VALUES, "mean": BATCHES}


def recalibrate(step: Callable[[Any, Any], Any], state: State, batches: Iterable[Any], *, estimator: Estimator = "pooled") -> State:
    r"""The statistics of a stream of batches, for evaluation in place of the running averages.

    .. math:: \text{pooled}: \quad n = \sum_b n_b, \qquad \mu = \frac{1}{n}\sum_b n_b\mu_b, \qquad
              \sigma^2 = \frac{1}{n}\sum_b n_b\left(\sigma_b^2 + (\mu_b - \mu)^2\right)

    .. math:: \text{mean}: \quad \mu = \frac{1}{B}\sum_b \mu_b, \qquad \sigma^2 = \frac{1}{B}\sum_b \frac{n_b}{n_b - 1}\,\sigma_b^2

    Each batch is normalized with its own statistics, as in training, and the weights stay. "pooled" is the mean and biased variance of all
    values together, whatever the sizes of the batches; "mean" is Algorithm 2 of the paper, where every batch counts alike.

    For :func:`jnorm.batch_norm` and all others with running statistics. Of ghost batch normalization "mean" takes each group for a batch,
    and of cross mini-batch normalization each mini-batch; of tracked instance normalization both estimators take the average over
    samples, as its running statistics do. Batch renormalization gets the root of var + epsilon.

    Args:
      step: `step(state, batch) -> state` runs the model in training mode on one batch and returns its new state; dropout is better off.
        Its momentum and `running_var_correction` have no effect here. For an NNX model `step(model, batch)`, whose result is not looked
        at.
      state: any tree with states of running statistics in it: of pure functions, or the collection "batch_stats" of Linen. Or an NNX
        model, whose norms are set.
      batches: at least one; they may be of different sizes.
      estimator: "pooled" or "mean".

    Returns:
      A state as the given one, with the new mean and var; a "count" stays. A feature that no batch counted keeps what it had. For an NNX
      model that model.

    Raises:
      ValueError: no batches; no running statistics in the tree; a step that collected nothing, as evaluation does, or that returns another
        tree; an unknown estimator.

    Numerics:
      In at least float32, and then in the dtype of the states. Each batch enters by the difference of its mean, so that no squares are
      subtracted; the mean is rounded once for each batch, and some √B of these roundings add up. One value in a batch has the variance 0.

    Distributed:
      What the step does: with an axis name, or over sharded arrays, a batch's statistics are those of all devices. Where hosts see
      different batches, let each collect, and merge: :func:`merge_populations`.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> def step(state, x):
      ...     return jnorm.batch_norm(x, state, momentum=0.9)[1]
      >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]])]
      >>> float(jnorm.tools.recalibrate(step, jnorm.batch_norm_state(1), batches)["var"][0])
      1.25
      >>> float(jnorm.tools.recalibrate(step, jnorm.batch_norm_state(1), batches, estimator="mean")["var"][0])
      0.5

    References:
      "mean": Algorithm 2 of Ioffe, Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167. "pooled": Wu, Johnson,
      "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576. fvcore's `update_bn_stats` has the pooled one as its
      default; it takes a fixed number of batches, here it is as many as there are.
    """
    if isinstance(state, nnx.Module):
        return _recalibrate_module(step, state, batches, estimator)
    population: Any = population_state(state, estimator=estimator)
    wanted = entries(population)
    number = 0
    for number, batch in enumerate(batches, 1):  # noqa: B007
        population = step(population, batch)
        if entries(population) != wanted:
            raise ValueError(
                f"the step must return the new state, with the entries of the one that it was given, {wanted}; it returned "
                f"{entries(population) or type(population).__name__}."
            )
    _check_number(number)
    new, old = jax.tree.leaves(population_statistics(population)), jax.tree.leaves(state)
    narrowed = [jnp.asarray(a).astype(jnp.asarray(b).dtype) for a, b in zip(new, old, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(state), narrowed)


def population_state(state: State, *, estimator: Estimator = "pooled") -> State:
    """States of running statistics that collect those of a data set: what :func:`recalibrate` runs its step on.

    Args:
      state: any tree with states of running statistics in it.
      estimator: "pooled" or "mean", as in :func:`recalibrate`.

    Returns:
      The tree, where each such state has one more entry, of the shape of its features: "values" (how many values were counted) or
      "batches" (how many batches were). A norm that updates such a state adds its batch. Averages are widened to float32.

    Raises:
      ValueError: no running statistics in the tree; an unknown estimator.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> population = jnorm.tools.population_state({"first": jnorm.batch_norm_state(1)})
      >>> _, population["first"] = jnorm.batch_norm(jnp.array([[1.0], [2.0], [6.0]]), population["first"])
      >>> {k: v.tolist() for k, v in population["first"].items()}
      {'mean': [3.0], 'var': [4.666666507720947], 'values': [3.0]}
    """
    if estimator not in _KEY:
        raise ValueError(f"estimator must be one of {sorted(_KEY)}, got {estimator!r}.")

    def collecting(one: Any) -> Any:
        averages = {k: jnp.asarray(one[k]) for k in ("mean", "var", "std") if k in one}
        averages = {k: a.astype(stats_dtype(a.dtype)) for k, a in averages.items()}
        mean = averages["mean"].real
        return {**{k: v for k, v in one.items() if k not in KEYS}, **averages, _KEY[estimator]: jnp.zeros(mean.shape, mean.dtype)}

    return map_states(collecting, state)


def merge_populations(one: State, two: State) -> State:
    """The collected statistics of two streams of batches, as of two hosts, as if one had seen them all.

    Args:
      one: a tree from :func:`population_state` that collected some batches.
      two: another of the same model and estimator.

    Returns:
      The tree for the batches of both. The order does not matter, but for rounding.

    Raises:
      ValueError: a state that does not collect, or that collects for another estimator.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> start = jnorm.tools.population_state(jnorm.batch_norm_state(1))
      >>> one, two = (jnorm.batch_norm(jnp.array(x), start)[1] for x in ([[1.0], [2.0]], [[3.0], [4.0], [5.0]]))
      >>> both = jnorm.tools.merge_populations(one, two)
      >>> both["mean"].tolist(), both["var"].tolist(), both["values"].tolist()
      ([3.0], [2.0], [5.0])
    """

    def both(a: Any, b: Any) -> Any:
        if not collects(a) or set(a) != set(b):
            raise ValueError(f"both must be from population_state with the same estimator, got states of {sorted(a)} and of {sorted(b)}.")
        return merged(a, b)

    return map_states(both, one, two)


def population_statistics(population: State) -> State:
    """The states for evaluation that a population gives: without the entry that counts.

    Args:
      population: a tree from :func:`population_state` that collected some batches.

    Returns:
      The tree as it was before :func:`population_state`, with the new averages, in at least float32.

    Raises:
      ValueError: nothing was collected (under `jit` or `vmap`, where that is not known, a state keeps what it had).

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> population = jnorm.tools.population_state(jnorm.batch_norm_state(1))
      >>> _, population = jnorm.batch_norm(jnp.array([[1.0], [3.0]]), population)
      >>> {k: v.tolist() for k, v in jnorm.tools.population_statistics(population).items()}
      {'mean': [2.0], 'var': [1.0]}
    """
    seen = []

    def finished(one: Any) -> Any:
        seen.extend(v for k, v in one.items() if k in KEYS)
        return {k: v for k, v in one.items() if k not in KEYS}

    state = map_states(finished, population)
    _check_collected(seen)
    return state


def _check_number(number: int) -> None:
    if not number:
        raise ValueError("there are no batches, and so no statistics. An iterator that an earlier loop used up has none left.")


def _check_collected(counts: list[Any]) -> None:
    if any(isinstance(count, Tracer) for count in counts):
        return  # under a transformation nobody knows yet
    if not any(bool((jnp.asarray(count) > 0).any()) for count in counts):
        raise ValueError(
            "nothing was collected: the step must run the model in training mode (use_running_average=False) and return the new state."
        )


# --- NNX --------------------------------------------------------------------------------------------------------------------


def _recalibrate_module(step: Callable[[Any, Any], Any], model: Any, batches: Iterable[Any], estimator: Estimator) -> Any:
    with _collecting(model, estimator) as norms:
        number = 0
        for number, batch in enumerate(batches, 1):  # noqa: B007
            step(model, batch)
        _check_number(number)
        _check_collected([getattr(norm, _KEY[estimator])[...] for norm in norms])
    return model


@contextlib.contextmanager
def _collecting(model: Any, estimator: Estimator) -> Iterator[list[Any]]:
    """The model's norms collect in here; what goes wrong leaves their statistics as they were."""
    norms = list(nnx_norms(model, RUNNING_NNX).values())
    before = [{k: v[...] for k, v in vars(norm).items() if isinstance(v, nnx.BatchStat)} for norm in norms]
    if any(collects(state) for state in before):
        raise ValueError("the model collects already: recalibrate and commit_once do not go inside of one another.")
    for norm, state in zip(norms, before, strict=True):
        for key, entry in population_state(state, estimator=estimator).items():
            setattr(norm, key, nnx.BatchStat(entry)) if key in KEYS else getattr(norm, key).set_value(entry)
    kept = False
    try:
        yield norms
        kept = True
    finally:
        for norm, state in zip(norms, before, strict=True):
            delattr(norm, _KEY[estimator])
            for key, entry in state.items():
                getattr(norm, key).set_value(getattr(norm, key)[...].astype(entry.dtype) if kept else entry)
