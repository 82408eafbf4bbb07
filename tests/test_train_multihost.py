"""The example for several hosts: the losses of one process, checkpoints from many to one and back, and what is not started alike."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_digits
import train_multihost
from launch_local import free_port
from test_multihost import launch

EXAMPLES = Path(train_multihost.__file__).parent
LONGEST, STEPS = 300, 16  # the longest sums: the outputs of the first layer; two epochs
USES_EXAMPLES = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"


@pytest.fixture(autouse=True)
def flax_may_promote():
    with jax.numpy_dtype_promotion("standard"):
        yield


def train_here(checkpoint, *arguments):
    """In one process, on its eight devices."""
    return train_multihost.main(["--processes", "1", "--quick", "--checkpoint", str(checkpoint), *arguments])


def eval_here(checkpoint):
    return train_multihost.main(["--processes", "1", "--eval", "--checkpoint", str(checkpoint)])["test_accuracy"]


RECORDER = """
import jax
import numpy as np
from hosts import connected
from train_multihost import evaluate_checkpoint, parse_args, train_and_save

folder, theirs, *arguments = sys.argv[1:]
args = parse_args(["--quick", "--checkpoint", f"{folder}/checkpoint", *arguments])
with connected("recorder", args.coordinator, args.processes, args.process_id, args.timeout):
    result = train_and_save(args)
    there = evaluate_checkpoint(parse_args(["--eval", "--checkpoint", theirs]))["test_accuracy"]
    numbers = [result["losses"], *jax.tree.leaves(result["state"]), result["test_accuracy"], there]
    np.savez(f"{folder}/{jax.process_index()}.npz", *numbers)
"""


def train_there(folder, theirs, processes, devices, *arguments):
    """In several processes, which also test the checkpoint `theirs`: -> (losses, state, accuracy, accuracy of theirs) of each."""
    (folder / "recorder.py").write_text(USES_EXAMPLES + RECORDER)
    sizes = ("--processes", processes, "--devices-per-process", devices)
    ended = launch(*sizes, folder / "recorder.py", folder, theirs, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    numbers = [list(np.load(folder / f"{i}.npz").values()) for i in range(processes)]
    return ended.stdout, [(n[0], n[1:-2], float(n[-2]), float(n[-1])) for n in numbers]


FAST = [(2, 2, "functional", "mlp", "batch_norm")]
SLOW = [
    (4, 1, "linen", "mlp", "batch_norm"),
    (4, 2, "nnx", "mlp", "batch_norm"),
    (2, 2, "nnx", "cnn", "tracked_instance_norm"),
    (4, 1, "linen", "cnn", "group_norm"),
]


@pytest.mark.parametrize("processes, devices, api, model, norm", [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_losses_and_checkpoints_of_one_process(processes, devices, api, model, norm, tmp_path):
    arguments = ("--api", api, "--model", model, "--norm", norm)
    here = train_here(tmp_path / "here", *arguments)
    (tmp_path / "there").mkdir()
    printed, runs = train_there(tmp_path / "there", tmp_path / "here", processes, devices, *arguments)
    assert printed.count("training loss") == 1, printed  # process 0 speaks, once
    # As in test_examples.py: what is rounded differently in sums of n terms adds up to some √n·eps, and stays for the steps that follow.
    longest = LONGEST if model == "mlp" else 200 * 8 * 8
    rounding = np.arange(1, STEPS + 1) * np.sqrt(longest) * np.finfo(np.float32).eps
    for losses, state, accuracy, of_theirs in runs:
        assert losses.shape == (STEPS,) and losses[-1] < losses[0]
        assert np.all(abs(losses - here["losses"]) / here["losses"] <= rounding)
        for mine, want in zip(state, jax.tree.leaves(here["state"]), strict=True):
            np.testing.assert_allclose(mine, want, rtol=0, atol=rounding[-1] * abs(np.asarray(want)).max())
        # Every process has the same, bitwise.
        np.testing.assert_array_equal(losses, runs[0][0])
        assert of_theirs == here["test_accuracy"] and accuracy == runs[0][2]
    assert eval_here(tmp_path / "there" / "checkpoint") == runs[0][2]
    digits = train_digits.main(["--eval", "--checkpoint", str(tmp_path / "there" / "checkpoint")])
    assert digits["test_accuracy"] == runs[0][2]


# --- what goes wrong ------------------------------------------------------------------------------------------------------------

DIES = """
import jax, os, train_multihost
batches = train_multihost.global_batches
def until_one_dies(*arguments):
    for step, batch in enumerate(batches(*arguments)):
        if step == 3 and jax.process_index() == 1:
            {how}
        yield batch
train_multihost.global_batches = until_one_dies
train_multihost.main(["--quick", "--checkpoint", sys.argv[1]])
"""
DEATHS = {"os._exit(7)": (7, "ended with exit status 7"), "raise OSError('the disk is gone')": (1, "OSError: the disk is gone")}


@pytest.mark.slow  # test_launch_local.py has the same without a training
@pytest.mark.parametrize("how", DEATHS)
def test_a_process_that_dies_ends_the_run(how, tmp_path):
    (tmp_path / "script.py").write_text(USES_EXAMPLES + DIES.format(how=how))
    ended = launch("--processes", 2, tmp_path / "script.py", tmp_path / "checkpoint")
    status, said = DEATHS[how]
    assert ended.returncode == status and "process 1 of 2" in ended.stderr and said in ended.stderr, ended.stderr
    assert not (tmp_path / "checkpoint").exists()


def started_by_hand(*each, devices=(1, 1), timeout=60):
    """train_multihost.py with the arguments of each process, without a launcher: -> [(status, output)]."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROCESS"))} | {"JAX_PLATFORMS": "cpu"}
    with free_port() as port:
        command = [sys.executable, str(EXAMPLES / "train_multihost.py"), "--coordinator", f"127.0.0.1:{port}", "--quick"]
        processes = [
            subprocess.Popen(
                [*command, *map(str, arguments)],
                env=env | {"JAX_NUM_CPU_DEVICES": str(n)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for arguments, n in zip(each, devices, strict=False)
        ]
        try:
            return [(process.communicate(timeout=timeout)[0], process.returncode)[::-1] for process in processes]
        finally:
            for process in processes:
                process.kill()


def refused(results, *said):
    for status, out in results:
        assert status == 1 and all(re.search(part, out) for part in said), out
        assert "Traceback" not in out


def test_different_numbers_of_processes(tmp_path):
    checkpoint = ("--checkpoint", tmp_path / "checkpoint")
    results = started_by_hand(("--processes", 2, "--process-id", 0, *checkpoint), ("--processes", 3, "--process-id", 1, *checkpoint))
    refused(results, "train_multihost.py: error: .*--processes is 2 in process 0 and 3 in process 1")


@pytest.mark.slow
def test_a_process_that_does_not_come(tmp_path):
    results = started_by_hand(("--processes", 3, "--process-id", 0, "--timeout", 8), ("--processes", 3, "--process-id", 1, "--timeout", 8))
    refused(results, "error: 2 of 3 processes came within 8 s; missing: 2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "of_one, devices, said",
    [
        ((), (1, 2), "the number of devices is 1 in process 0 and 2 in process 1"),
        (("--seed", 1), (1, 1), "--seed is 0 in process 0 and 1 in process 1"),
        (("--model", "cnn"), (1, 1), "--model is mlp in process 0 and cnn in process 1"),
        (("--batch-size", 100), (1, 1), "--batch-size is 200 in process 0 and 100 in process 1"),
        (("--epochs", 5), (1, 1), "--epochs is 2 in process 0 and 5 in process 1"),
    ],
    ids=["devices", "seed", "model", "batches", "epochs"],
)
def test_different_settings(of_one, devices, said, tmp_path):
    common = ("--processes", 2, "--checkpoint", tmp_path / "checkpoint")
    refused(started_by_hand((*common, "--process-id", 0), (*common, "--process-id", 1, *of_one), devices=devices), f"error: .*{said}")


FEWER = """
import train_multihost
load = train_multihost.load_data
def fewer(folder):
    data = load(folder)
    return data._replace(train_images=data.train_images[:-1], train_labels=data.train_labels[:-1])
if int(__import__("os").environ["JAX_PROCESS_ID"]) == 1:
    train_multihost.load_data = fewer
train_multihost.main(["--quick", "--checkpoint", sys.argv[1]])
"""


def test_data_of_another_size(tmp_path):
    """Which would end as a batch that one process waits for."""
    (tmp_path / "script.py").write_text(USES_EXAMPLES + FEWER)
    ended = launch("--processes", 2, tmp_path / "script.py", tmp_path / "checkpoint")
    assert ended.returncode == 1
    assert "error: the processes were not started for the same run" in ended.stderr
    assert "the number of training images is 1437 in process 0 and 1436 in process 1" in ended.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--coordinator", "127.0.0.1:1", "--processes", "2"), "--process-id is missing"),
        (("--coordinator", "127.0.0.1:1", "--processes", "2", "--process-id", "2"), "--process-id must be from 0 to 1"),
        (("--processes", "1", "--norm", "instance_norm"), "--norm instance_norm reduces over the pixels"),
    ],
)
def test_refused_at_once(arguments, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        train_multihost.main([*arguments, "--checkpoint", str(tmp_path / "checkpoint")])
