"""Running statistics anew, over a stream of batches, for weights that no longer move."""

from typing import Any

from flax import nnx

from ._layers import RUNNING_NNX, Layers, nnx_norms
from ._nnx_states import borrowed, read_states, write_states
from ._passes import Batches, Others, Passes, RecalibrationEstimator, Step, copied
from .population import State


def recalibrate(
    step: Step,
    state: State,
    batches: Batches,
    *,
    estimator: RecalibrationEstimator = "pooled",
    momentum: float | None = None,
    layers: Layers | None = None,
    others: Others = "running",
    layer_by_layer: bool = False,
    tolerance: float = 0.0,
    progress: bool = False,
) -> State:
    r"""The statistics of a stream of batches, for evaluation in place of the running averages.

    .. math:: \text{pooled}: \quad n = \sum_b n_b, \qquad \mu = \frac{1}{n}\sum_b n_b\mu_b, \qquad
              \sigma^2 = \frac{1}{n}\sum_b n_b\left(\sigma_b^2 + (\mu_b - \mu)^2\right)

    .. math:: \text{the others}: \quad \mu = \sum_b w_b\mu_b, \qquad \sigma^2 = \sum_b w_b\,v_b, \qquad
              w_b = \frac{1}{B}\ \text{ or }\ \propto \rho^{B-b}

    "pooled" is the mean and biased variance of all values together, whatever the sizes of the batches. The others average over batches,
    which count alike, whatever their sizes: "mean" the unbiased variances :math:`v_b = \frac{n_b}{n_b-1}\sigma_b^2` (Algorithm 2 of the
    paper), "cumulative" the biased ones :math:`v_b = \sigma_b^2`, as `momentum=None` of the norms does, "exponential" these too, each batch
    with `momentum` times the weight of the next: no statistics from before have a share. The weights of the model stay.

    For :func:`jnorm.batch_norm` and all others with running statistics. Of ghost batch normalization the averages take each group for a
    batch, and of cross mini-batch normalization each mini-batch; of tracked instance normalization all estimators average over samples,
    as its running statistics do. Batch renormalization gets the root of var + epsilon.

    Args:
      step: `step(state, batch) -> state` runs the model in training mode on one batch and returns its new state; dropout is better off.
        Its momentum and `running_var_correction` have no effect here. For an NNX model `step(model, batch)`, which gets a
        copy of it, and whose result is not looked at.
      state: any tree with states of running statistics in it: of pure functions, the collection "batch_stats" of Linen, or all of its
        variables. Or an NNX model.
      batches: at least one; they may be of different sizes. Or a function that gives an iterable of them.
      estimator: "pooled", "mean", "cumulative" or "exponential".
      momentum: of "exponential", from 0 to 1.
      layers: the norms to re-estimate, by path ("encoder/block_0/norm"): a pattern, several, or a function from path to bool; None: all
        but those whose statistics are frozen.
      others: what the rest normalize with meanwhile, their "running" statistics or the "batch"'s own. They keep what they had. Flax's
        own norms of an NNX model do so too, unless the step tells them otherwise; those of Linen do what their call says.
      layer_by_layer: each norm gets the statistics of what it sees in evaluation, where those below it normalize with their new running
        statistics, in place of what it sees in training, where they normalize with the batch's.
      tolerance: with `layer_by_layer`, stop where no mean moves by more than so many standard deviations, and no variance by more than
        that fraction. 0: where nothing moves at all.
      progress: show a bar, on the standard error; needs rich.

    Returns:
      A state as the given one, with the new mean and var; a "count" stays, and so does all that is no running statistic, whatever the
      step makes of it. A feature that no batch counted keeps what it had. Of an NNX model a copy, which has the new statistics.

    Raises:
      ValueError: no batches, or none left for the second pass; no running statistics in the tree; `layers` that match none; a norm that saw
        nothing, such as one of a branch that the step does not run; a step that collected nothing, as evaluation does, or that returns
        another tree; an unknown estimator; a momentum that does not fit.
      TypeError: a Linen module, or the state of an NNX model, without its graph.
      ImportError: `progress` without rich.

    Numerics:
      In at least float32, and then in the dtype of the states. Each batch enters by the difference of its mean, so that no squares are
      subtracted; the mean is rounded once for each batch, and some √B of these roundings add up. One value in a batch has the variance 0.

      Layer by layer: in each pass over the batches all norms normalize with their statistics of the pass before, in the first with the
      batch's, so that after the k-th pass the lowest k of each path are right, up to rounding. It ends where a pass moves nothing, or
      after as many passes as there are norms. The batches must be the same each time. A norm that is called more than once in a step
      meets its own statistics of the pass before.

    Distributed:
      What the step does: with an axis name, or over sharded arrays, a batch's statistics are those of all devices. Where hosts see
      different batches, let each collect, and merge: :func:`merge_populations`.

      A step under `jit` is traced once for all batches of a shape, and once more for the passes after the first.

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
      default; it takes a fixed number of batches, here it is as many as there are. PyTorch's `swa_utils.update_bn` is "mean".
    """
    passes = Passes(estimator, momentum, layers, others, layer_by_layer, tolerance, progress)
    if not isinstance(state, nnx.Module):
        return passes.run(step, state, batches)
    model = nnx.merge(*copied(nnx.split(state)))
    if others == "running":
        _with_running_averages(model)
    with borrowed(model) as (norms, before):

        def run(states: Any, batch: Any) -> Any:
            write_states(norms, states)
            step(model, batch)
            return read_states(norms)

        states = passes.run(run, before, batches)
    new = nnx.clone(state)
    write_states(nnx_norms(new, RUNNING_NNX), states)
    return new


def _with_running_averages(model: nnx.Module) -> None:
    """Flax's own norms, which know no marks."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = True
