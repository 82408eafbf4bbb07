"""Part 2: batches that are no sample of the data, of two classes each, and what helps a network that was trained on them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

import jnorm
from comparison.data import Images, Task, few_classes, shuffled
from comparison.methods import METHODS, LinearOp, Method, Params, Phase, Settings, State
from comparison.networks import Network, cnn
from comparison.part import Grid, Job, Part, Record, Records, Setup, mean_and_interval, percent
from comparison.style import figure, look, plain_ticks
from comparison.training import Plan, Runs, errors, is_wrong, reestimated, running_momentum, trainer, tuned_runs

BATCH_SIZE = 32
OWN_EPOCHS = 5  # of test batches that are normalized by themselves, whose draw matters
ORDERS = {"shuffled": shuffled, "classes": few_classes}
BATCHES = {"shuffled": "shuffled batches", "classes": "batches of two classes"}
TRAINED = ("batch_norm", "batch_renorm", "group_norm")
EVALUATIONS = {
    "running": "running averages",
    "reestimated_shuffled": "re-estimated on shuffled batches",
    "reestimated_classes": "re-estimated on batches of two classes",
    "eval_norm_rule": "EvalNorm, weight 1/32",
    "eval_norm_fitted": "EvalNorm, weights fitted in training batches",
    "own_shuffled": "statistics of shuffled test batches",
    "own_classes": "statistics of test batches of two classes",
}


def jobs(setup: Setup) -> list[Job]:
    return [
        Job(f"{method}-{order}", {"method": method, "order": order})
        for method in TRAINED
        for order in ORDERS
        if not setup.quick or (method, order) == ("batch_norm", "classes")
    ]


def run(setup: Setup, task: Task, options: dict[str, Any]) -> Record:
    settings = Settings(BATCH_SIZE, 1, running_momentum(BATCH_SIZE))
    network = cnn(METHODS[options["method"]], settings)
    plan = Plan(partial(ORDERS[options["order"]], epochs=setup.epochs, batch_size=BATCH_SIZE))
    runs, record = tuned_runs(trainer(network, task, plan, errors(network, task)), setup.seeds, setup.learning_rates)
    record["evaluations"] = {"running": record["test_error"]}
    if options["method"] == "batch_norm":
        record["evaluations"] |= _other_evaluations(settings, network, task, runs, options["order"])
    return record


def _other_evaluations(settings: Settings, network: Network, task: Task, runs: Runs, order: str) -> dict[str, list[float]]:
    """The same networks, with other statistics in evaluation."""
    images = jnp.asarray(task.train.images)
    batches = {name: jnp.asarray(make(task.train.labels, 0, 1, BATCH_SIZE)) for name, make in ORDERS.items()}
    test_batches = {name: jnp.asarray(make(task.test.labels, 0, OWN_EPOCHS, BATCH_SIZE)) for name, make in ORDERS.items()}
    with_running, with_samples = (errors(one, task, ("test",)) for one in (network, cnn(EVAL_NORM, settings)))

    def evaluate(params: Any, state: Any) -> dict[str, jax.Array]:
        def step(state: Any, batch: jax.Array) -> Any:
            return network.apply(params, state, images[batch], Phase(jnp.float32(1), jax.random.key(0)))[1]

        found = {}
        for name in ORDERS:
            population = reestimated(step, state, batches[name])
            found[f"reestimated_{name}"] = with_running(params, population)["test_error"]
            found[f"own_{name}"] = _own_error(network, params, state, task.test, test_batches[name])
        rule = [{"running": layer, "weights": (jnp.float32(1 / BATCH_SIZE),) * 2} for layer in state]
        found["eval_norm_rule"] = with_samples(params, rule)["test_error"]
        fitted = _fitted(settings, params, state, images, batches[order])
        found["eval_norm_fitted"] = with_samples(params, fitted)["test_error"]
        return found

    return jax.tree.map(lambda a: np.asarray(a).tolist(), jax.jit(jax.vmap(evaluate))(runs.params, runs.state))


def _own_error(network: Network, params: Any, state: Any, part: Images, batches: jax.Array) -> jax.Array:
    """Of batches that are normalized by themselves, as in training."""
    images, labels = jnp.asarray(part.images), jnp.asarray(part.labels)

    def error(batch: jax.Array) -> jax.Array:
        logits, _ = network.apply(params, state, images[batch], Phase(jnp.float32(1), jax.random.key(0)))
        return is_wrong(logits, labels[batch]).mean()

    return lax.map(error, batches).mean()


def _eval_norm(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    """In training as batch normalization, with running averages that stay: what moves is the fit of the weights."""
    x, scale, bias = linear_op(inputs, params["kernel"]), params["scale"], params["bias"]
    given: Any = {"activation": settings.activation}
    if phase is None:
        mean_weight, var_weight = state["weights"]
        return jnorm.eval_norm(x, state["running"], scale, bias, mean_weight=mean_weight, var_weight=var_weight, **given), state
    y, _ = jnorm.batch_norm(x, state["running"], scale, bias, update_running=False, **given)
    return y, {**state, "fit": jnorm.eval_norm_fit(x, state["running"], state["fit"])}


EVAL_NORM = Method("EvalNorm", METHODS["batch_norm"].init, _eval_norm)


def _fitted(settings: Settings, params: Any, state: Any, images: jax.Array, batches: jax.Array) -> Any:
    empty = [{"running": layer, "fit": jnorm.eval_norm_fit_state(len(layer["mean"]))} for layer in state]
    network, phase = cnn(EVAL_NORM, settings), Phase(jnp.float32(1), jax.random.key(0))
    filled, _ = lax.scan(lambda fit, batch: (network.apply(params, fit, images[batch], phase)[1], None), empty, batches)
    return [{"running": layer["running"], "weights": jnorm.eval_norm_weights(layer["fit"])} for layer in filled]


def _rows(records: Records) -> list[tuple[str, str, dict[str, list[float]]]]:
    """Method, label, and the test errors by the order of the training."""
    rows = []
    for method in TRAINED:
        for name, label in EVALUATIONS.items():
            found = {order: record["evaluations"].get(name) for order in ORDERS if (record := records.get(f"{method}-{order}"))}
            if any(found.values()):
                rows.append((method, METHODS[method].label + (f": {label}" if method == "batch_norm" else ""), found))
    return rows


def grids(records: Records) -> list[Grid]:
    rows = [[label, *(percent(found[order]) if found.get(order) else "" for order in ORDERS)] for _, label, found in _rows(records)]
    return [Grid("test error in %, by what the network was trained on", ["in evaluation", *BATCHES.values()], rows)]


def draw(records: Records) -> Figure:
    rows = _rows(records)

    def panel(axes: Any, made: Figure) -> None:
        for order, offset, filled in (("shuffled", 0.12, "none"), ("classes", -0.12, "full")):
            for k, (method, _, found) in enumerate(reversed(rows)):
                if found.get(order):
                    mean, half = mean_and_interval([100 * e for e in found[order]])
                    shown: Any = look(method) | {"fillstyle": filled, "markersize": 7, "capsize": 2}
                    axes[0].errorbar(mean, k + offset, xerr=half, label=BATCHES[order] if (k == 0) else None, **shown)
        axes[0].set_yticks(range(len(rows)), [label for _, label, _ in reversed(rows)])
        axes[0].set_xscale("log")
        plain_ticks(axes[0].xaxis)
        axes[0].set_xlabel("test error in %, mean and 95 % interval")
        axes[0].legend(title="trained on", loc="upper right")

    return figure(1, panel, height=4.6, width=8.5)


CLASS_BATCHES = Part(2, "class_batches", "Batches of few classes", jobs, run, grids, draw)
