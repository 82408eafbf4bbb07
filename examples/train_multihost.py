"""Trains a network on handwritten digits on one host or on several, with synchronized batch normalization, to the same losses.

python examples/train_multihost.py                                              # this host, on all its devices
python examples/launch_local.py --processes 4 examples/train_multihost.py       # four processes of this machine, as if on four hosts
srun --nodes=4 --ntasks-per-node=1 python examples/train_multihost.py           # on a cluster that JAX knows, nothing more to say
python examples/train_multihost.py --coordinator HOST:1234 --processes 2 --process-id 0     # elsewhere, once on each host
python examples/train_multihost.py --eval                                       # test the checkpoint, on any number of hosts
"""

import argparse
import contextlib
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import jnorm
from digits_apis import APIS, apply_model, init_model
from digits_checkpoint import Checkpoint, check_destination, load_checkpoint, save_checkpoint
from digits_data import Batch, Dataset, DigitsError, load_data
from digits_models import MODELS, NORMS, Architecture, Params, State, check_architecture
from digits_training import DEVICE_AXIS, MAX_EVALUATION_BATCH, make_train_step
from hosts import agree, connected

PROGRAM = "train_multihost.py"
EPOCHS, QUICK_EPOCHS = 20, 2
LEARNING_RATES = {"mlp": 0.01, "cnn": 0.1}
GROUPS = 2  # of group_norm

Report = Callable[[int, float], None]  # steps done, loss of the last


class Run(NamedTuple):
    params: Params
    state: State
    losses: np.ndarray  # (steps,), of each batch
    epoch_losses: list[float]  # the mean over the samples of each epoch


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line; returns the results. What cannot be done ends the program with a one-line reason."""
    args = parse_args(argv)
    try:
        with connected(PROGRAM, args.coordinator, args.processes, args.process_id, args.timeout):
            return evaluate_checkpoint(args) if args.eval else train_and_save(args)
    except DigitsError as error:
        raise SystemExit(f"{PROGRAM}: error: {error}") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0])
    hosts = parser.add_argument_group("hosts", "not needed for one process, under launch_local.py, and on a cluster that JAX knows")
    env = os.environ.get
    hosts.add_argument("--coordinator", default=env("JAX_COORDINATOR_ADDRESS"), metavar="HOST:PORT", help="where process 0 can be reached")
    hosts.add_argument("--processes", type=int, default=env("JAX_NUM_PROCESSES"), metavar="N", help="how many there are, the same in all")
    hosts.add_argument("--process-id", type=int, default=env("JAX_PROCESS_ID"), metavar="I", help="which of them this is, from 0")
    hosts.add_argument("--timeout", type=int, default=60, metavar="SECONDS", help="to wait for the others at the start (default: 60)")
    parser.add_argument("--model", choices=MODELS, default="mlp", help="hidden layers of 300 and 100, or two convolutions (default: mlp)")
    parser.add_argument("--norm", choices=NORMS, default="batch_norm", help="default: batch_norm")
    parser.add_argument("--api", choices=APIS, default="functional", help="pure functions, or modules of Flax (default: functional)")
    parser.add_argument("--data-dir", help="a directory with MNIST's IDX files, on every host (default: scikit-learn's digits)")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}, or {QUICK_EPOCHS} with --quick")
    parser.add_argument("--batch-size", type=int, default=200, help="over all devices of all hosts (default: 200)")
    parser.add_argument("--learning-rate", type=float, help="of plain SGD (default: 0.01 for the mlp, 0.1 for the cnn)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of the order of the samples (default: 0)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs, to see that everything works")
    parser.add_argument("--checkpoint", type=Path, default=Path("multihost-checkpoint"), metavar="DIR", help="where all hosts can write")
    parser.add_argument("--eval", action="store_true", help="test the network in --checkpoint; api, model, norm and data are read there")
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "learning_rate", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    return args


def train_and_save(args: argparse.Namespace) -> dict[str, Any]:
    check_destination(args.checkpoint)
    data = load_data(args.data_dir)
    arch = Architecture(args.model, args.norm, GROUPS, data.image_shape, args.api)
    check_architecture(arch)
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else EPOCHS)
    learning_rate = args.learning_rate or LEARNING_RATES[args.model]
    agree("settings", settings(args, data) | {"--epochs": epochs, "--learning-rate": learning_rate}, args.timeout)
    mesh = make_mesh(args.timeout)

    console = make_console()
    console.print(f"{arch.model} ({arch.api}) with {arch.norm} on {where()}: {len(data.train_images)} images, batches of {args.batch_size}")
    start = time.perf_counter()
    with progress(console, epochs * num_batches(data, args.batch_size)) as report:
        run = train(arch, data, mesh, epochs, args.batch_size, learning_rate, args.seed, report)
    accuracy = evaluate(arch, run.params, run.state, data, mesh)
    seconds = time.perf_counter() - start

    data_dir = None if args.data_dir is None else str(Path(args.data_dir).resolve())
    save_checkpoint(args.checkpoint, Checkpoint(arch, data_dir, run.params, run.state))  # by all processes together
    console.print(f"training loss {run.epoch_losses[-1]:.4f}, test accuracy {accuracy:.2%}, after {epochs} epochs in {seconds:.1f} s")
    console.print(f"checkpoint: {args.checkpoint}")
    return {"losses": run.losses, "state": jax.device_get(run.state), "test_accuracy": accuracy}


def evaluate_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Tests the network of a checkpoint, on as many hosts as there are now: the arrays are read onto their devices."""
    mesh = make_mesh(args.timeout)
    checkpoint = load_checkpoint(args.checkpoint, NamedSharding(mesh, P()))
    data = load_data(args.data_dir or checkpoint.data_dir)
    agree("settings", settings(args, data), args.timeout)
    arch = checkpoint.arch
    if data.image_shape != arch.image_shape:
        raise DigitsError(f"the network in {args.checkpoint} is for images of {arch.image_shape} pixels; these have {data.image_shape}")
    accuracy = evaluate(arch, checkpoint.params, checkpoint.state, data, mesh)
    make_console().print(f"{arch.model} ({arch.api}) with {arch.norm} on {where()}: test accuracy {accuracy:.2%}")
    return {"test_accuracy": accuracy}


# --- the hosts ----------------------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """All that must be the same in every process: else they would train different networks, or wait for a batch that one does not have."""
    same = {f"--{name}": getattr(args, name.replace("-", "_")) for name in ("model", "norm", "api", "batch-size", "seed", "eval")}
    return same | {
        "the number of training images": len(data.train_images),
        "the number of test images": len(data.test_images),
        "the checksum of the data": zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in data)),
        "the version of JAX": jax.__version__,
    }


def make_mesh(timeout: int) -> Mesh:
    """One axis over the devices of all hosts."""
    agree("devices", {"the number of devices": jax.local_device_count()}, timeout)
    return jax.make_mesh((jax.device_count(),), (DEVICE_AXIS,), axis_types=(AxisType.Auto,))


def where() -> str:
    processes, devices = jax.process_count(), jax.device_count()
    return f"{devices} device{'s' * (devices > 1)} of {processes} process{'es' * (processes > 1)}"


def make_console() -> Console:
    """Process 0 speaks for all."""
    return Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(console: Console, steps: int) -> Iterator[Report]:
    """A bar, on process 0 only."""
    columns = (TextColumn("training"), BarColumn(20), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=console.quiet) as bar:
        task = bar.add_task("", total=steps, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.4f}")


# --- the data -----------------------------------------------------------------------------------------------------------------


def num_batches(data: Dataset, batch_size: int) -> int:
    return -(-len(data.train_images) // batch_size)


def global_batches(
    images: np.ndarray, labels: np.ndarray, order: np.ndarray, batch_size: int, mesh: Mesh
) -> Iterator[tuple[Batch, jax.Array, int]]:
    """Yields (batch, mask, samples): arrays over all devices of all hosts, of which each process loads the rows of its own devices.

    `order` is the same in every process, and so are the number of batches and what each holds, however many processes there are. A batch
    that the devices do not divide is padded, and so is the last one; the mask is False on what pads.
    """
    devices = mesh.size
    padded_size = -(-batch_size // devices) * devices
    sharding = NamedSharding(mesh, P(DEVICE_AXIS))
    for start in range(0, len(order), batch_size):
        padded, padded_mask = map(np.asarray, jnorm.pad_batch(jnp.asarray(order[start : start + batch_size]), padded_size))

        def on_devices(rows: Callable[[slice], np.ndarray], shape: tuple[int, ...]) -> jax.Array:
            # JAX asks for the rows of each device that is this process's own: here a file, or a shard of a data set, would be read.
            def read(index: Any) -> np.ndarray:
                return rows(index[0])

            return jax.make_array_from_callback((padded_size, *shape), sharding, read)

        batch = Batch(
            on_devices(lambda rows, p=padded: images[p[rows]], images.shape[1:]),
            on_devices(lambda rows, p=padded: labels[p[rows]], ()),
        )
        mask = on_devices(lambda rows, m=padded_mask: m[rows], ())
        yield batch, mask, len(order[start : start + batch_size])


# --- training and evaluation --------------------------------------------------------------------------------------------------


def train(
    arch: Architecture,
    data: Dataset,
    mesh: Mesh,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Report,
) -> Run:
    """Trains with plain SGD. Nothing here knows how many processes there are."""
    optimizer = optax.sgd(learning_rate)
    train_step = make_train_step(arch, optimizer, mesh)

    def init() -> tuple[Params, State, optax.OptState]:
        params, state = init_model(arch, jax.random.key(seed))
        return params, state, optimizer.init(params)

    params, state, opt_state = jax.jit(init, out_shardings=NamedSharding(mesh, P()))()
    losses, sizes, epoch_losses = [], [], []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(data.train_images))
        first = len(losses)
        for batch, mask, samples in global_batches(data.train_images, data.train_labels, order, batch_size, mesh):
            params, state, opt_state, loss = train_step(params, state, opt_state, batch, mask)
            losses.append(float(loss))  # the same in every process
            sizes.append(samples)
            report(len(losses), losses[-1])
        epoch_losses.append(float(np.average(losses[first:], weights=sizes[first:])))
    return Run(params, state, np.array(losses), epoch_losses)


def evaluate(arch: Architecture, params: Params, state: State, data: Dataset, mesh: Mesh) -> float:
    """The accuracy on the test images, with the running statistics: under jit, each device counts on its rows."""

    @jax.jit
    def count_correct(params: Params, state: State, batch: Batch, mask: jax.Array) -> jax.Array:
        logits, _, _ = apply_model(arch, params, state, batch.images, train=False)
        return jnp.sum((jnp.argmax(logits, -1) == batch.labels) & mask)

    order, size = np.arange(len(data.test_images)), min(len(data.test_images), MAX_EVALUATION_BATCH)
    chunks = global_batches(data.test_images, data.test_labels, order, size, mesh)
    return sum(int(count_correct(params, state, batch, mask)) for batch, mask, _ in chunks) / len(order)


if __name__ == "__main__":
    main()
