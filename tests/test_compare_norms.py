"""The experiment that compares the norms: its data, its network, its rule for learning rates, what it keeps, and its command line."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import compare_norms
from comparison import PARTS, runner
from comparison.data import Sizes, few_classes, load_task, shuffled
from comparison.methods import METHODS, Phase, Settings
from comparison.networks import convolve, mlp, pool
from comparison.part import Grid, Job, Part, mean_and_interval
from comparison.training import Plan, Runs, errors, trainer, tune
from digits_data import DigitsError

SMALL = Sizes(128, 64, 128)
SETUP = dataclasses.replace(compare_norms.QUICK, sizes=SMALL)


@pytest.fixture(autouse=True)
def as_a_program_of_its_own():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def task():
    return load_task(None, SMALL)


# --- data -------------------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_data_are_disjoint_and_in_proportion():
    task = load_task(None, Sizes())
    assert [len(part.labels) for part in task] == [704, 300, 793]
    assert len(np.unique(np.concatenate([part.images.reshape(-1, 64) for part in task]), axis=0)) == 1797  # all digits, each once
    for part in task:
        shares = np.bincount(part.labels) / len(part.labels)
        assert abs(shares - 0.1).max() < 0.02
    np.testing.assert_allclose((task.train.images.mean(dtype=float), task.train.images.std(dtype=float)), (0, 1), atol=1e-5)


def test_more_images_than_there_are():
    with pytest.raises(DigitsError, match="parts of 1500, 300, 793 images are needed, and there are 1797"):
        load_task(None, Sizes(train=1500))


def test_orders(task):
    labels = task.train.labels
    order = shuffled(labels, 3, epochs=2, batch_size=32)
    assert order.shape == (8, 32)
    for epoch in np.split(order, 2):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(128))
    assert (order != shuffled(labels, 4, epochs=2, batch_size=32)).any()
    for batch in few_classes(labels, 3, epochs=2, batch_size=8):
        assert sorted(np.bincount(labels[batch], minlength=10))[-3:] == [0, 4, 4]
        assert len(np.unique(batch)) == 8


# --- network and training ---------------------------------------------------------------------------------------------------


def test_convolution_and_pooling(rng):
    x, kernel = rng.normal(size=(2, 7, 6, 3)).astype(np.float32), rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    want = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(convolve(x, kernel), want, atol=1e-5)  # sums of 27 terms
    want = x[:, :6].reshape(2, 3, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(pool(x), want, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "instance_norm"])
def test_every_method_trains_and_evaluates(method, task):
    """Its state is as it was in evaluation, where each image is normalized as if it were alone."""
    network = mlp(METHODS[method], Settings(batch_size=4, num_mini_batches=2, momentum=0.5), widths=(8,))
    images = jnp.asarray(task.train.images[:4])
    params, state = network.init(jax.random.key(0), images)
    logits, new = network.apply(params, state, images, Phase(jnp.float32(0.5), jax.random.key(1)))
    assert logits.shape == (4, 10) and np.isfinite(logits).all()
    assert jax.tree.structure(new) == jax.tree.structure(state)
    evaluated, same = network.apply(params, new, images, None)
    jax.tree.map(np.testing.assert_array_equal, same, new)
    alone, _ = network.apply(params, new, images[:1], None)
    np.testing.assert_allclose(alone[0], evaluated[0], rtol=1e-4, atol=1e-5)


def small_runs(task, orders, rates, seeds, num_mini_batches=1):
    network = mlp(METHODS["none"], Settings(), widths=(8,))
    return trainer(network, task, Plan(orders, num_mini_batches), errors(network, task))(rates, seeds)


@pytest.mark.slow
def test_runs_do_not_know_of_one_another(task):
    orders = functools.partial(shuffled, epochs=1, batch_size=32)
    together = small_runs(task, orders, [0.1, 0.01], [5, 6])
    for i, (rate, seed) in enumerate([(0.1, 5), (0.01, 6)]):
        alone = small_runs(task, orders, [rate], [seed])
        np.testing.assert_allclose(alone.losses[0], together.losses[i], rtol=1e-5)
    assert together.losses.shape == (2, 4)


def test_accumulated_gradients_are_those_of_the_whole_batch(task):
    """Without a norm, whose statistics would be those of the mini-batches."""
    whole = small_runs(task, functools.partial(shuffled, epochs=1, batch_size=32), [0.1], [5])
    parts = small_runs(task, lambda labels, seed: shuffled(labels, seed, 1, 32).reshape(-1, 8), [0.1], [5], num_mini_batches=4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), parts.params, whole.params)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)


def test_a_run_that_diverges_is_wrong_everywhere(task):
    runs = small_runs(task, functools.partial(shuffled, epochs=1, batch_size=32), [1e30], [5])
    assert runs.last("test_error").tolist() == [1.0]


# --- the rule for learning rates --------------------------------------------------------------------------------------------


def trains(error, loss=lambda rate: 0.0):
    """What looks like a training, of which these are the results by learning rate."""
    asked = []

    def train(rates, seeds):
        asked.append(sorted(set(rates)))
        found = {"validation_error": np.array([[error(r)] for r in rates]), "validation_loss": np.array([[loss(r)] for r in rates])}
        return Runs(None, None, np.zeros((len(rates), 1)), found)

    return train, asked


def test_the_least_error_and_of_equals_the_least_loss():
    train, asked = trains(lambda rate: abs(rate - 0.1) > 0.08, loss=lambda rate: -rate)
    rate, tried = tune(train, (0.01, 0.03, 0.1, 0.3))
    assert rate == 0.1 and tried == {"0.01": 1, "0.03": 0, "0.1": 0, "0.3": 1} and len(asked) == 1


@pytest.mark.parametrize(("best", "more"), [(1.0, [0.9, 2.7, 8.1, 24]), (0.001, [0.00012, 0.00037, 0.0011, 0.0033])])
def test_the_grid_is_extended_once(best, more):
    train, asked = trains(lambda rate: abs(np.log(rate / best)))
    rate, tried = tune(train, (0.01, 0.1, 0.3, 0.03) if best == 1.0 else (0.01, 0.03, 0.1, 0.3))
    assert len(asked) == 2 and len(tried) == 8
    assert rate == min(map(float, tried), key=lambda rate: abs(np.log(rate / best)))
    np.testing.assert_allclose(asked[1], more, rtol=0.2)


def test_a_loss_that_is_nan_does_not_win():
    train, _ = trains(lambda rate: 0.5, loss=lambda rate: np.nan if rate == 0.03 else rate)
    assert tune(train, (0.01, 0.03, 0.1, 0.3))[0] < 0.03


def test_interval():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / np.sqrt(3))  # the quantile of t with 2 degrees of freedom, from a table
    assert np.isnan(mean_and_interval([1.0])[1])


# --- what is kept -----------------------------------------------------------------------------------------------------------


def counting_part(fail=None):
    ran = []

    def run(setup, task, options):
        ran.append(options["x"])
        if options["x"] == fail:
            raise ValueError("no")
        return {"test_error": [0.5] * setup.seeds}

    jobs = [Job(f"job-{x}", {"x": x}) for x in (1, 2)]
    return Part(9, "nine", "Nine", lambda setup: jobs, run, lambda records: [], lambda records: None), ran


def test_what_was_run_is_not_run_again(tmp_path):
    def run(part, setup=SETUP):
        reported.clear()
        return runner.run_parts((part,), setup, tmp_path, 1, reported.append)[9]

    reported = []
    part, _ = counting_part(fail=2)
    with pytest.raises(ValueError, match="no"):
        run(part)
    part, ran = counting_part()
    records = run(part)
    assert ran == [2] and reported == [part, part] and list(records) == ["job-1", "job-2"]
    more = dataclasses.replace(SETUP, seeds=3)
    run(part, more)
    assert ran == [2, 1, 2]
    (tmp_path / "9-job-1.json").write_text('{"setup"')  # cut off in the middle
    run(part, more)
    assert ran == [2, 1, 2, 1]
    assert json.loads((tmp_path / "9-job-1.json").read_text())["record"] == {"test_error": [0.5] * 3}


def test_tables():
    grid = Grid("errors", ["norm", "32"], [["BN", "1 ± 2"]])
    assert grid.markdown() == "**errors**\n\n| norm | 32 |\n| --- | --: |\n| BN | 1 ± 2 |"
    assert grid.rich().row_count == 1


# --- the command line -------------------------------------------------------------------------------------------------------


def test_a_part_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        compare_norms.main(["--only", "3,7"])
    assert "there is no part '7'; the parts are 1, 2, 3, 4, 5, 6" in capsys.readouterr().err


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"error: --out: .* is not a directory"):
        compare_norms.main(["--quick", "--only", "3", "--out", str(tmp_path / "out")])


def test_the_names_of_parts_and_jobs_are_files_of_their_own():
    assert [part.number for part in PARTS] == list(range(1, 7)) and len({part.name for part in PARTS}) == 6
    for part in PARTS:
        for setup in (compare_norms.QUICK, compare_norms.FULL):
            names = [job.name for job in part.jobs(setup)]
            assert names and len(set(names)) == len(names)


def test_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    records = compare_norms.main(["--quick", "--only", "3", "--workers", "1", "--out", str(tmp_path)])
    assert list(records) == [3] and len(records[3]) == len(PARTS[2].jobs(compare_norms.QUICK))
    text = (tmp_path / "tables.md").read_text()
    assert (
        "128 images to train on, 64 to choose learning rates by and 128 to test with; 2 seeds" in text and f"## 3. {PARTS[2].title}" in text
    )
    assert (tmp_path / f"{PARTS[2].name}.png").read_bytes().startswith(b"\x89PNG")
    assert PARTS[2].title in capsys.readouterr().out
