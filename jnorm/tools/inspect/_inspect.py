"""The function: collects, evaluates, and hands what it found to those that judge."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from .._layers import Layers, chosen
from .._passes import Batches
from .._progress import progress_bar
from ._collect import collect
from ._measure import Signs, measure, measure_scale, of_groups
from ._report import LayerReport, Report
from ._sensitivity import check_loss, measure_losses
from ._subject import in_order, is_frozen, of_module, of_tree
from ._verdicts import findings, overall


def inspect_norms(
    step: Callable[[Any, Any], Any],
    state: Any,
    batches: Batches,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    params: Any = None,
    epsilon: float = 1e-5,
    momentum: float | None = None,
    layers: Layers | None = None,
    progress: bool = False,
) -> Report:
    r"""What the norms of a model have to do with a bad evaluation: numbers for each of them, and a verdict in words.

    .. math:: d = \frac{|\mu - \mu_B|}{\sigma_B}, \qquad r = \frac{\sigma^2}{\sigma_B^2}, \qquad
              \mathrm{KL}\left(\mathcal N(\mu_B, \sigma_B^2)\,\|\,\mathcal N(\mu, \sigma^2)\right)
              = \tfrac12\left(\ln r + \frac{1 + d^2}{r} - 1\right)

    for each channel of each norm, where μ and σ² are the running statistics, and B those of all batches together, as
    :func:`jnorm.tools.recalibrate` would take them. Both variances have the norm's epsilon in them.

    With a loss, three kinds of statistics take each other's place in evaluation: the running ones, those of all batches, and each batch's
    own. Those are what batch norm trains with; of NNX models the third loss is with the norms in training mode, so that it is what training
    does, whatever they normalize with there. Of a state that is not known: ghost, cross mini-batch and cross-iteration batch norm, batch
    renorm and tracked instance norm train with something else than the mean and variance of the batch.
    And those of one layer alone: to have them of the batches, where all others are the running ones;
    and to have the running ones, where all others are of the batches.

    Args:
      step: `step(state, batch) -> state` as for :func:`jnorm.tools.recalibrate`: the model in training mode. With dropout off, which
        evaluation is without. For an NNX model `step(model, batch)`, whose result is not looked at; it is run on a copy in evaluation mode,
        but for the norms, so that dropout is off.
      state: any tree with states of running statistics in it: of pure functions, or "batch_stats" or all variables of Linen. Or an NNX
        model.
      batches: a few, or a function that gives an iterable of them; all are kept in memory. Of training data,
        they tell whether the statistics fit the network; of evaluation data,
        whether they fit these data too.
      loss: `loss(state, batch)` is the loss of the model in evaluation mode with the statistics of that state, a scalar. For an NNX model
        `loss(model, batch)`, run on a copy in evaluation mode. None: no sensitivities.
      params: the parameters beside a state, where the layers have the same paths, as in Linen: the "scale" of each is looked at, of norms
        without running statistics too. An NNX model has its own.
      epsilon: of norms that do not say theirs: those of a state.
      momentum: of norms that do not say theirs. None: 0.9 for what is due to noise, which is careful.
      layers: which of them, by path, as for :func:`jnorm.tools.recalibrate`; None: all. The others keep their statistics in all losses.
      progress: show a progress bar.

    Returns:
      A :class:`jnorm.tools.inspect.Report`: print it, plot it, or take its numbers. What was given stays as it is.

    Raises:
      ValueError: no norms; no batches; `layers` matches none; a step that collected nothing, as in evaluation; a loss that is no scalar;
        parameters of other shapes than the state.

    Numerics:
      Statistics as :func:`jnorm.tools.recalibrate` takes them, what follows from them in float64. Noise is told from how far the batches
      lie apart, so that a verdict needs two of them, and is better with four or more.

    Distributed:
      What the step does: with an axis name, or over sharded arrays, a batch's statistics are those of all devices.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> def step(state, x):
      ...     return jnorm.batch_norm(x, state, momentum=0.99)[1]
      >>> state = jnorm.batch_norm_state(1)
      >>> batches = [jnp.linspace(6.0 + i / 10, 10.0, 50)[:, None] for i in range(4)]
      >>> for x in batches:
      ...     state = step(state, x)
      >>> report = jnorm.tools.inspect_norms(step, state, batches)
      >>> [finding.kind for finding in report.layers[0].findings]
      ['initial values']

    References:
      Re-estimated statistics: Wu, Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576. The variance that
      dropout shifts: Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift", 2018,
      https://arxiv.org/abs/1801.05134.
    """
    make = of_module if isinstance(state, nnx.Module) else of_tree
    subject = make(step, state, loss, params, epsilon, momentum)
    paths = chosen(subject.paths, layers)
    items: Any = batches() if callable(batches) and not hasattr(batches, "__iter__") else batches
    kept = list(items)
    if not kept:
        raise ValueError("there are no batches, and so no statistics. An iterator that an earlier loop used up has none left.")
    if subject.loss is not None:
        check_loss(subject, kept[0])
    paths = in_order(subject, paths, kept[0])
    running = [path for path in paths if path in subject.running]
    evaluations = 0 if loss is None else (3 + 2 * len(running)) * len(kept)
    with progress_bar(progress, "inspect_norms", 2 * len(kept) * bool(running) + evaluations) as done:
        found = collect(subject, running, kept, done)
        losses, alone, without = measure_losses(subject, found, running, kept, done) if loss is not None else (None, {}, {})
    reports = []
    for path in paths:
        scale = subject.scales.get(path)
        about: dict[str, Any] = {"path": path, "kind": subject.kinds.get(path)}
        if path in running:
            state = subject.running[path]
            numbers, signs = measure(found[path], state, subject.epsilons[path], subject.memory(path), scale)
            numbers, signs = of_groups(numbers, signs, subject.groups(path))
            about |= {"frozen": is_frozen(state), "loss_alone": alone.get(path), "loss_without": without.get(path)}
        else:
            numbers, signs = measure_scale(scale), Signs()
        layer = LayerReport(**about, **numbers)
        reports.append(dataclasses.replace(layer, findings=findings(layer, signs, losses)))
    return Report(tuple(reports), losses, len(kept), overall(reports, losses))
