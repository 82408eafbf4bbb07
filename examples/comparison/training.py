"""Plain training, of many runs at once: one compiled program, mapped over learning rates and seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from comparison.data import Task
from comparison.methods import Phase
from comparison.networks import Network
from jnorm.tools import population_state, population_statistics

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)  # the grid, which is extended where the best is at an end of it
MOMENTUM = 0.9  # of the optimizer
TUNING_SEEDS = (1000, 1001, 1002)  # no others than these choose a learning rate, and no result is theirs
INIT_IMAGES = 128  # the images that an initialization from data sees
MEMORY = 640  # images over which the running averages reach back, whatever the batch size

Orders = Callable[[np.ndarray, int], np.ndarray]  # (labels, seed) -> (batches, batch_size) indices
Probe = Callable[[Any, Any], dict[str, jax.Array]]  # (params, state) -> numbers


@dataclass(frozen=True)
class Plan:
    orders: Orders
    num_mini_batches: int = 1  # whose gradients make an update
    probes: int = 1  # how often the runs are measured, the last time at the end
    at_start: bool = False  # measure once more, before the first update
    decay: bool = True  # the learning rate, linearly to 0


class Runs(NamedTuple):
    params: Any  # of each run, along the first axis
    state: Any
    losses: np.ndarray  # (runs, updates)
    probed: dict[str, np.ndarray]  # (runs, probes, ...)

    def last(self, name: str) -> np.ndarray:
        return self.probed[name][:, -1]


Train = Callable[[Sequence[float], Sequence[int]], Runs]  # learning rates and seeds, a pair for each run


def running_momentum(batch_size: int) -> float:
    return 1 - batch_size / MEMORY


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def is_wrong(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """A run that diverged has no answer: that the largest of NaN is called class 0 is not one."""
    return (jnp.argmax(logits, -1) != labels) | ~jnp.isfinite(logits).all(-1)


def errors(network: Network, task: Task, names: Sequence[str] = Task._fields) -> Probe:
    """The probe that all comparisons are made with: error and loss on these parts of the images."""

    parts = {name: getattr(task, name) for name in names}
    images, labels = (jnp.concatenate([jnp.asarray(part[i]) for part in parts.values()]) for i in range(2))

    def probe(params: Any, state: Any) -> dict[str, jax.Array]:
        logits, _ = network.apply(params, state, images, None)  # of all in one: the network is compiled once
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        wrong = is_wrong(logits, labels)
        ends = np.cumsum([len(part.labels) for part in parts.values()])[:-1]
        return {
            f"{name}_{kind}": share.mean()
            for kind, values in (("error", wrong), ("loss", losses))
            for name, share in zip(parts, jnp.split(values, ends), strict=True)
        }

    return probe


def trainer(network: Network, task: Task, plan: Plan, probe: Probe) -> Train:
    """Returns a function that trains one network for each of its pairs of a learning rate and a seed."""
    images, labels = jnp.asarray(task.train.images), jnp.asarray(task.train.labels)

    def train(learning_rate: jax.Array, key: jax.Array, order: jax.Array) -> tuple[Any, ...]:
        order = order.reshape(-1, plan.num_mini_batches, order.shape[-1])
        updates = len(order)
        if updates % plan.probes:
            raise ValueError(f"{updates} updates cannot be measured {plan.probes} times at even distances")
        optimizer = optax.sgd(lambda count: learning_rate * (1 - count / updates if plan.decay else 1), momentum=MOMENTUM)
        init_key, key = jax.random.split(key)
        params, state = network.init(init_key, images[:INIT_IMAGES])

        def gradient(params: Any, state: Any, phase: Phase, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
            def loss(params: Any) -> tuple[jax.Array, Any]:
                logits, new_state = network.apply(params, state, images[batch], phase)
                return cross_entropy(logits, labels[batch]), new_state

            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return grads, state, value

        def accumulated(params: Any, state: Any, phase: Phase, batches: jax.Array) -> tuple[Any, Any, jax.Array]:
            if len(batches) == 1:
                return gradient(params, state, phase, batches[0])

            def add(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
                total, state = carry
                grads, state, value = gradient(params, state, phase, batch)
                return (jax.tree.map(jnp.add, total, grads), state), value

            (total, state), values = lax.scan(add, (jax.tree.map(jnp.zeros_like, params), state), batches)
            return jax.tree.map(lambda g: g / len(batches), total), state, values.mean()

        def update(carry: Any, now: Any) -> tuple[Any, jax.Array]:
            params, state, opt_state = carry
            number, batches = now
            phase = Phase(number / updates, jax.random.fold_in(key, number))
            grads, state, value = accumulated(params, state, phase, batches)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, changes), state, opt_state), value

        def stretch(carry: Any, now: Any) -> tuple[Any, Any]:
            carry, values = lax.scan(update, carry, now)
            return carry, (values, probe(*carry[:2]))

        steps = jnp.arange(updates, dtype=jnp.float32), order
        cut = jax.tree.map(lambda a: a.reshape(plan.probes, -1, *a.shape[1:]), steps)
        first = probe(params, state) if plan.at_start else None
        (params, state, _), (values, probed) = lax.scan(stretch, (params, state, optimizer.init(params)), cut)
        if first is not None:
            probed = jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), first, probed)
        return params, state, values.reshape(-1), probed

    compiled = jax.jit(jax.vmap(train))

    def run(learning_rates: Sequence[float], seeds: Sequence[int]) -> Runs:
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        orders = jnp.asarray(np.stack([plan.orders(task.train.labels, seed) for seed in seeds]))
        params, state, values, probed = compiled(jnp.asarray(learning_rates, jnp.float32), keys, orders)
        return Runs(params, state, np.asarray(values), jax.tree.map(np.asarray, probed))

    return run


def tune(train: Train, grid: Sequence[float]) -> tuple[float, dict[str, Any]]:
    """The learning rate with the least validation error over the tuning seeds (of equals, with the least loss), and how all did.

    Where the best is at an end of the grid, as many more are tried beyond that end, once. One alone is taken as it is.
    """
    grid, tried = sorted(grid), {}
    if len(grid) == 1:
        return grid[0], {}

    def attempt(rates: Sequence[float]) -> None:
        runs = train([rate for rate in rates for _ in TUNING_SEEDS], TUNING_SEEDS * len(rates))
        error, loss = (runs.last(name).reshape(len(rates), -1).mean(1) for name in ("validation_error", "validation_loss"))
        tried.update(zip(rates, zip(error.tolist(), np.nan_to_num(loss, nan=np.inf).tolist(), strict=True), strict=True))

    attempt(grid)
    best = min(tried, key=lambda rate: tried[rate])
    if best in (grid[0], grid[-1]):
        ratio = (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))
        factors = [ratio ** (k + 1) for k in range(len(grid))]
        attempt([float(f"{best * f if best == grid[-1] else best / f:.2g}") for f in factors])
        best = min(tried, key=lambda rate: tried[rate])
    return best, {f"{rate:g}": error for rate, (error, _) in sorted(tried.items())}


def tuned_runs(train: Train, seeds: int, grid: Sequence[float] = LEARNING_RATES) -> tuple[Runs, dict[str, Any]]:
    """Runs of all seeds with the tuned learning rate, and the record of them that every comparison keeps."""
    rate, tried = tune(train, grid)
    runs = train([rate] * seeds, range(seeds))
    record = {"learning_rate": rate, "validation_errors_in_tuning": tried, "test_error": runs.last("test_error").tolist()}
    return runs, record


def reestimated(step: Callable[[Any, jax.Array], Any], state: Any, batches: jax.Array) -> Any:
    """The state with the statistics of these batches; `step(state, batch) -> state` runs the network as in training."""
    population, _ = lax.scan(lambda population, batch: (step(population, batch), None), population_state(state), batches)
    return population_statistics(population)
