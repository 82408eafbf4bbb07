"""Part 6: plain convolutional networks of many layers: with norms, with norms of the weights, and with an initialization alone."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

import jnorm
from comparison.data import Task, shuffled
from comparison.methods import GROUPS, METHODS, LinearOp, Method, Params, Phase, Settings, State, without_state
from comparison.networks import Network, convolve, he_normal, head, init_head, pool
from comparison.part import Grid, Job, Part, Record, Records, Setup, geometric, tuned_grids
from comparison.style import figure, look, plain_ticks
from comparison.training import Plan, cross_entropy, errors, running_momentum, trainer, tuned_runs
from jnorm import reparam

DEPTHS = (2, 4, 8, 16, 32)
SIDE = 8  # of the images, smaller ones of MNIST's; after the first layer they are pooled to half of it
WIDTH = 8  # channels
GRADIENT_IMAGES = 128
BATCH_SIZE = 32
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))  # gives the relu of standard normal numbers the variance 1


class Variant(NamedTuple):
    """A method with the initialization of its kernels."""

    label: str
    method: Method
    look: str  # the method whose color and mark it has in the figure
    initializer: jax.nn.initializers.Initializer = he_normal


def _scaled_weight_standardization(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    kernel = reparam.weight_standardization(params["kernel"], params["scale"], fan_in=True, epsilon_mode="max", epsilon=1e-4, correction=0)
    return RELU_GAIN * jax.nn.relu(linear_op(inputs, kernel) + params["bias"]), state


def _weight_standardization_and_group_norm(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    x = linear_op(inputs, reparam.weight_standardization(params["kernel"]))
    return jnorm.group_norm(x, params["scale"], params["bias"], num_groups=GROUPS, activation="relu"), state


_one_over_n = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_scaled = Method("scaled WS", without_state, _scaled_weight_standardization)
_grouped = Method("WS + GN", without_state, _weight_standardization_and_group_norm)
VARIANTS = {
    "he": Variant("no norm, He initialization", METHODS["none"], "none"),
    "naive": Variant("no norm, deviation 1/√n", METHODS["none"], "accumulated_batch_norm", _one_over_n),
    "batch_norm": Variant("BN", METHODS["batch_norm"], "batch_norm"),
    "group_norm": Variant("GN", METHODS["group_norm"], "group_norm"),
    "weight_standardization": Variant("WS + GN", _grouped, "cross_mini_batch_norm"),
    "scaled_weight_standardization": Variant("scaled WS", _scaled, "weight_norm"),
    "normalization_propagation": Variant(
        "norm propagation, gain 1/1.21", METHODS["normalization_propagation"], "normalization_propagation"
    ),
}


# With borders of zeros, a third of what a layer sees of 4x4 pixels would be none of its inputs, and its outputs would be the smaller.
_wrapped = partial(convolve, borders="wrap")


def plain(variant: Variant, settings: Settings, depth: int) -> Network:
    """`depth` 3x3 convolutions of the same width, each with its norm and activation, with a pooling after the first, and a dense layer."""
    method = variant.method

    def init_layer(key: jax.Array, channels: int) -> tuple[Params, State]:
        # No method here is initialized from its inputs.
        return method.init(settings, variant.initializer(key, (3, 3, channels, WIDTH)), jnp.zeros((1, SIDE, SIDE, channels)), _wrapped)

    def init(key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        first_key, key, head_key = jax.random.split(key, 3)
        first, first_state = init_layer(first_key, 1)
        layers, state = jax.vmap(partial(init_layer, channels=WIDTH))(jax.random.split(key, depth - 1))
        return {"first": first, "layers": layers, "head": init_head(head_key, (SIDE // 2) ** 2 * WIDTH)}, (first_state, state)

    def apply(params: Any, state: Any, x: jax.Array, phase: Phase | None) -> tuple[jax.Array, Any]:
        if x.shape[1:3] != (SIDE, SIDE):
            x = jax.image.resize(x, (len(x), SIDE, SIDE, 1), "linear")

        def layer(x: jax.Array, now: tuple[Params, State]) -> tuple[jax.Array, State]:
            return method.apply(settings, *now, x, _wrapped, phase)

        x, first_state = layer(x, (params["first"], state[0]))
        x, rest = lax.scan(layer, pool(x), (params["layers"], state[1]))  # compiled once, however many they are
        return head(params["head"], x), (first_state, rest)

    return Network(init, apply)


def jobs(setup: Setup) -> list[Job]:
    return [
        Job(f"{variant}-{depth}", {"variant": variant, "depth": depth})
        for depth in reversed(DEPTHS)  # the longest first, so that no process is left with one of them alone
        for variant in VARIANTS
        if not setup.quick or (variant, depth) in QUICK
    ]


QUICK = [("batch_norm", 4), ("scaled_weight_standardization", 4)]


def run(setup: Setup, task: Task, options: dict[str, Any]) -> Record:
    network = plain(VARIANTS[options["variant"]], Settings(BATCH_SIZE, momentum=running_momentum(BATCH_SIZE)), options["depth"])
    plan = Plan(partial(shuffled, epochs=-(-setup.epochs // 2), batch_size=BATCH_SIZE))
    runs, record = tuned_runs(trainer(network, task, plan, errors(network, task)), setup.seeds, setup.learning_rates)
    if options["depth"] == DEPTHS[-1]:
        record["first_gradient"] = _first_gradient(network, task, setup.seeds)
    return record | {name: runs.last(name).tolist() for name in ("train_error", "train_loss")}


def _first_gradient(network: Network, task: Task, seeds: int) -> list[float]:
    """The norm of the loss's gradient for the first layer's kernel, of networks that saw no update."""
    images, labels = (jnp.asarray(a[:GRADIENT_IMAGES]) for a in task.train)

    def norm(key: jax.Array) -> jax.Array:
        params, state = network.init(key, images)
        phase = Phase(jnp.float32(0), key)
        grads = jax.grad(lambda params: cross_entropy(network.apply(params, state, images, phase)[0], labels))(params)
        return jnp.linalg.norm(grads["first"]["kernel"])

    return np.asarray(jax.jit(jax.vmap(norm))(jax.random.split(jax.random.key(0), seeds))).tolist()


def _by_depth(records: Records, variant: str) -> list[tuple[int, Record]]:
    return [(depth, record) for depth in DEPTHS if (record := records.get(f"{variant}-{depth}"))]


def grids(records: Records) -> list[Grid]:
    titles = (
        "test error in %, by the number of layers (90 is chance, a run that diverged counts as 100)",
        "loss on the training images, in evaluation, times 1000",
        "the learning rate that was chosen",
    )
    labels = {variant: VARIANTS[variant].label for variant in VARIANTS}
    made = tuned_grids(titles, labels, DEPTHS, lambda variant, depth: records.get(f"{variant}-{depth}"))
    gradients = {
        variant: record["first_gradient"] for variant in VARIANTS for _, record in _by_depth(records, variant) if "first_gradient" in record
    }
    rows = [[VARIANTS[variant].label, geometric(values, ".2g")] for variant, values in gradients.items()]
    if not rows:
        return made
    return [*made, Grid(f"norm of the first kernel's gradient before any update, {DEPTHS[-1]} layers", ["", "geometric mean"], rows)]


def _quartiles(values: np.ndarray) -> np.ndarray:
    """Where some seeds train and others do not, a mean is like none of them. A run that diverged is worse than all others."""
    return np.quantile(np.nan_to_num(values, nan=np.inf, posinf=np.inf), (0.25, 0.5, 0.75), method="nearest")


def draw(records: Records) -> Figure:
    def panels(axes: Any, made: Figure) -> None:
        for panel, name, unit in zip(axes, ("test_error", "train_loss"), (100, 1), strict=True):
            for k, (variant, shown) in enumerate(VARIANTS.items()):
                points = [(depth, *_quartiles(unit * np.array(record[name]))) for depth, record in _by_depth(records, variant)]
                points = np.array([point for point in points if np.isfinite(point).all()])
                if len(points):
                    depth, low, middle, high = points.T
                    x = depth * 1.015 ** (k - len(VARIANTS) / 2)  # side by side
                    panel.errorbar(x, middle, (middle - low, high - middle), capsize=2, label=shown.label, **look(shown.look))
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            plain_ticks(panel.yaxis)
            panel.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
            panel.set_xlabel("layers")
        axes[0].set_ylabel("test error in %, median and quartiles")
        axes[1].set_ylabel("training loss, median and quartiles")
        axes[1].set_title("not shown where a quarter of the runs or more diverged", fontsize=10)
        axes[0].legend(fontsize=8)

    return figure(2, panels, height=4.8, width=5.6)


DEPTH = Part(6, "depth", "Plain convolutional networks by depth", jobs, run, grids, draw)
