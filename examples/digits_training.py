"""The training step, data-parallel or not, and the loop around it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digits_apis import apply_model, init_model
from digits_data import Batch, Dataset, DigitsError, batches
from digits_models import Architecture, Params, State

DEVICE_AXIS = "data"
PERCENTILES = (15, 50, 85)
MAX_PROBES = 100  # points along the time axis of the plot
MAX_PROBE_IMAGES = 1000
MAX_EVALUATION_BATCH = 1000

TrainStep = Callable[[Params, State, optax.OptState, Batch, jax.Array], tuple[Params, State, optax.OptState, jax.Array]]
Report = Callable[[int, float, float], None]  # epoch, loss, test accuracy


class Options(NamedTuple):
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    devices: int


class Run(NamedTuple):
    """The record of one training."""

    params: Params  # NumPy arrays, as is the state
    state: State
    losses: np.ndarray  # (steps,), of each batch
    epoch_losses: list[float]  # the mean over the samples of each epoch
    test_accuracies: list[float]  # after each epoch, with the running statistics
    probe_epochs: list[float]  # when the pre-activations were looked at, in epochs
    percentiles: np.ndarray  # (probes, 3), of the pre-activation of one unit over the test images
    seconds: float


def make_mesh(num_devices: int) -> Mesh | None:
    """A mesh of one axis, or None for one device. Without that many accelerators, a CPU is split into virtual devices."""
    if num_devices == 1:
        return None
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:
        pass  # JAX is in use already, from a test or a notebook: what it has may be enough
    found = jax.devices()
    if len(found) < num_devices:
        hint = "start a fresh process" if found[0].platform == "cpu" else "set JAX_PLATFORMS=cpu to try it on virtual devices"
        raise DigitsError(f"--devices {num_devices}: JAX has only {len(found)} of platform {found[0].platform!r}; {hint}")
    return jax.make_mesh((num_devices,), (DEVICE_AXIS,), axis_types=(AxisType.Auto,), devices=found[:num_devices])


def make_train_step(arch: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> TrainStep:
    """Returns the jitted step `(params, state, opt_state, batch, mask) -> (params, state, opt_state, loss)`, a pure function.

    With a mesh, each device takes its share of the batch, and all hold the same parameters and running statistics.
    """
    axis_name = None if mesh is None else DEVICE_AXIS

    def total(x: jax.Array) -> jax.Array:
        local = jnp.sum(x, dtype=jnp.float32)
        return local if axis_name is None else lax.psum(local, axis_name)

    def train_step(params: Params, state: State, opt_state: optax.OptState, batch: Batch, mask: jax.Array):
        def loss_fn(params: Params) -> tuple[jax.Array, State]:
            logits, new_state, _ = apply_model(arch, params, state, batch.images, train=True, mask=mask, axis_name=axis_name)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            # Total over total: the mean of the devices' means would weigh the samples of a padded share too much.
            return total(jnp.where(mask, losses, 0)) / total(mask), new_state

        # The parameters are the same on all devices, so that shard_map (check_vma=True) sums their gradients by itself.
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, loss

    if mesh is None:
        return jax.jit(train_step)
    in_specs = (P(), P(), P(), P(DEVICE_AXIS), P(DEVICE_AXIS))
    return jax.jit(jax.shard_map(train_step, mesh=mesh, in_specs=in_specs, out_specs=P()))


def make_evaluate(arch: Architecture, images: np.ndarray, labels: np.ndarray) -> Callable[[Params, State], float]:
    """Returns a function to the accuracy on these images, with the running statistics."""

    @jax.jit
    def count_correct(params: Params, state: State, batch: Batch, mask: jax.Array) -> jax.Array:
        logits, _, _ = apply_model(arch, params, state, batch.images, train=False)
        return jnp.sum((jnp.argmax(logits, -1) == batch.labels) & mask)

    def evaluate(params: Params, state: State) -> float:
        chunks = batches(images, labels, min(len(images), MAX_EVALUATION_BATCH))
        return sum(int(count_correct(params, state, batch, mask)) for batch, mask in chunks) / len(images)

    return evaluate


def make_probe(arch: Architecture, images: np.ndarray) -> Callable[[Params, State], jax.Array]:
    """Returns a function to the percentiles of the input to the activation of one unit of the last hidden layer, over the images.

    It normalizes as in training, for that is the distribution the network learns on; the running statistics would only add their own delay.
    """

    @jax.jit
    def probe(params: Params, state: State) -> jax.Array:
        _, _, pre_activation = apply_model(arch, params, state, jnp.asarray(images), train=True)
        if pre_activation.ndim == 4:  # a channel: the unit at the center of the image
            pre_activation = pre_activation[:, pre_activation.shape[1] // 2, pre_activation.shape[2] // 2]
        return jnp.percentile(pre_activation[:, 0], jnp.array(PERCENTILES))

    return probe


def train(arch: Architecture, data: Dataset, options: Options, report: Report) -> Run:
    """Trains with plain SGD, and tests after each epoch."""
    start = time.perf_counter()
    mesh = make_mesh(options.devices)
    optimizer = optax.sgd(options.learning_rate)
    train_step = make_train_step(arch, optimizer, mesh)
    evaluate = make_evaluate(arch, data.test_images, data.test_labels)
    probe = make_probe(arch, data.test_images[:MAX_PROBE_IMAGES])

    params, state = jax.jit(init_model, static_argnums=0)(arch, jax.random.key(options.seed))
    opt_state = optimizer.init(params)
    if mesh is not None:  # as the step returns them: a first call with other shardings would cost a compilation of its own
        params, state, opt_state = jax.device_put((params, state, opt_state), NamedSharding(mesh, P()))

    num_steps = -(-len(data.train_images) // options.batch_size)
    probe_every = -(-options.epochs * num_steps // MAX_PROBES)
    losses, epoch_losses, test_accuracies = [], [], []
    probe_epochs, percentiles = [0.0], [probe(params, state)]
    for epoch in range(options.epochs):
        order = np.random.default_rng((options.seed, epoch)).permutation(len(data.train_images))
        shuffled = batches(data.train_images[order], data.train_labels[order], options.batch_size, options.devices)
        sizes = []
        for batch, mask in shuffled:
            params, state, opt_state, loss = train_step(params, state, opt_state, batch, mask)
            losses.append(loss)
            sizes.append(int(mask.sum()))
            if len(losses) % probe_every == 0:
                probe_epochs.append(len(losses) / num_steps)
                percentiles.append(probe(*_on_one_device(params, state)))
        epoch_losses.append(float(np.average(np.array(losses[-num_steps:]), weights=sizes)))
        test_accuracies.append(evaluate(*_on_one_device(params, state)))
        report(epoch + 1, epoch_losses[-1], test_accuracies[-1])

    params, state = jax.device_get((params, state))
    seconds = time.perf_counter() - start
    return Run(params, state, np.array(losses), epoch_losses, test_accuracies, probe_epochs, np.array(jax.device_get(percentiles)), seconds)


def _on_one_device(params: Params, state: State) -> tuple[Params, State]:
    """From the mesh to the first device alone: with nothing sharded, every device would do the same work."""
    return jax.device_put((params, state), jax.devices()[0])
