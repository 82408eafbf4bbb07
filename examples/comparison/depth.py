"""Part 6: plain networks of many layers: with norms, with norms of the weights, and with an initialization alone."""

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
from comparison.methods import GROUPS, METHODS, LinearOp, Method, Params, Phase, Settings, State
from comparison.networks import Network, he_normal, head, init_head
from comparison.part import Grid, Job, Part, Record, Records, Setup, mean_and_interval, percent
from comparison.style import figure, look, plain_ticks
from comparison.training import Plan, errors, running_momentum, trainer, tuned_runs
from jnorm import reparam

DEPTHS = (2, 4, 8, 16, 32)
SIDE = 8  # of the images, smaller ones of MNIST's: the layers have as many outputs as inputs, and are all alike
WIDTH = SIDE * SIDE
BATCH_SIZE = 32
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))  # gives the relu of standard normal numbers the variance 1


class Variant(NamedTuple):
    """A method with the initialization of its kernels."""

    label: str
    method: Method
    look: str  # the method whose color and mark it has in the figure
    initializer: jax.nn.initializers.Initializer = he_normal


def _affine(settings: Settings, kernel: jax.Array, inputs: jax.Array, linear_op: LinearOp) -> tuple[Params, State]:
    return {"kernel": kernel, "scale": jnp.ones(kernel.shape[-1]), "bias": jnp.zeros(kernel.shape[-1])}, {}


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
_scaled = Method("scaled WS", _affine, _scaled_weight_standardization)
_grouped = Method("WS + GN", _affine, _weight_standardization_and_group_norm)
VARIANTS = {
    "he": Variant("no norm, He initialization", METHODS["none"], "none"),
    "naive": Variant("no norm, deviation 1/√n", METHODS["none"], "accumulated_batch_norm", _one_over_n),
    "batch_norm": Variant("BN", METHODS["batch_norm"], "batch_norm"),
    "group_norm": Variant("GN", METHODS["group_norm"], "group_norm"),
    "weight_standardization": Variant("WS + GN", _grouped, "cross_mini_batch_norm"),
    "scaled_weight_standardization": Variant("scaled WS", _scaled, "weight_norm"),
    "normalization_propagation": Variant("norm propagation", METHODS["normalization_propagation"], "normalization_propagation"),
}


def plain(variant: Variant, settings: Settings, depth: int) -> Network:
    """`depth` dense layers of the same width, each with its norm and activation, and one more that classifies."""
    method = variant.method

    def init(key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        key, head_key = jax.random.split(key)

        def layer(key: jax.Array) -> tuple[Params, State]:
            # No method here is initialized from its inputs.
            return method.init(settings, variant.initializer(key, (WIDTH, WIDTH)), jnp.zeros((len(images), WIDTH)), jnp.matmul)

        layers, state = jax.vmap(layer)(jax.random.split(key, depth))
        return {"layers": layers, "head": init_head(head_key, WIDTH)}, state

    def apply(params: Any, state: Any, x: jax.Array, phase: Phase | None) -> tuple[jax.Array, Any]:
        if x.shape[1:3] != (SIDE, SIDE):
            x = jax.image.resize(x, (len(x), SIDE, SIDE, 1), "linear")

        def layer(x: jax.Array, now: tuple[Params, State]) -> tuple[jax.Array, State]:
            return method.apply(settings, *now, x, jnp.matmul, phase)

        x, state = lax.scan(layer, x.reshape(len(x), WIDTH), (params["layers"], state))  # compiled once, however many they are
        return head(params["head"], x), state

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
    plan = Plan(partial(shuffled, epochs=-(-setup.epochs // 2), batch_size=BATCH_SIZE))  # half of the epochs show what there is to show
    runs, record = tuned_runs(trainer(network, task, plan, errors(network, task)), setup.seeds, setup.learning_rates)
    return record | {name: runs.last(name).tolist() for name in ("train_error", "train_loss")}


def _by_depth(records: Records, variant: str) -> list[tuple[int, Record]]:
    return [(depth, record) for depth in DEPTHS if (record := records.get(f"{variant}-{depth}"))]


def _thousandths(values: Any) -> str:
    diverged = int(np.isnan(values).sum())
    if diverged:
        return f"{diverged} of {len(values)} diverged"
    mean, half = mean_and_interval(values)
    return f"{1000 * mean:.0f} ± {1000 * half:.0f}"


def grids(records: Records) -> list[Grid]:
    made, present = [], [depth for depth in DEPTHS if any(f"{variant}-{depth}" in records for variant in VARIANTS)]
    for name, title, show in (
        ("test_error", f"test error in %, by the number of layers of {WIDTH}", percent),
        ("train_loss", "loss on the training images, in evaluation, times 1000", _thousandths),
        ("learning_rate", "the learning rate that was chosen", lambda rate: f"{rate:.2g}"),
    ):
        rows = []
        for variant in VARIANTS:
            found = dict(_by_depth(records, variant))
            if found:
                rows.append([VARIANTS[variant].label, *(show(found[d][name]) if d in found else "" for d in present)])
        made.append(Grid(title, ["", *map(str, present)], rows))
    return made


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
        axes[1].set_title("runs that diverged have no training loss", fontsize=10)
        axes[0].legend(fontsize=8)

    return figure(2, panels, height=4.8, width=5.6)


DEPTH = Part(6, "depth", "Plain networks by depth", jobs, run, grids, draw)
