"""The example trains to the same losses in its three styles, on one device and on several, and its checkpoints hold any of them."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import digits_linen
import digits_nnx
import jnorm.nnx
from digits_apis import APIS, init_model
from digits_checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from digits_models import NORMS, Architecture
from train_digits import main

# The longest sums, which the styles may take in other orders: the first layer's outputs, and a channel's pixels of a batch.
LONGEST = {"mlp": 300, "cnn": 200 * 8 * 8}
PAIRS = [(model, norm) for model in LONGEST for norm in NORMS if not (model == "mlp" and "instance" in norm)]
QUICK = [("mlp", "batch_norm", 8)]
REST = [(*pair, devices) for pair in PAIRS for devices in (1, 8) if (*pair, devices) not in QUICK]


@pytest.fixture(scope="module", autouse=True)
def devices_are_there():
    jax.devices()  # before the example asks for fewer of them


@pytest.fixture(autouse=True)
def flax_may_promote():
    with jax.numpy_dtype_promotion("standard"):  # its pooling divides by a NumPy integer
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The functional style on one device."""
    return functools.cache(lambda model, norm: trained(tmp_path_factory.mktemp("reference"), model, norm, "functional"))


def example(folder, *arguments):
    return main((*arguments, "--plot", str(folder / "digits.png"), "--checkpoint", str(folder / "checkpoint")))


def trained(folder, model, norm, api, devices=1):
    # Eight steps. The last batch is padded; of eight devices, six have no sample of it.
    arguments = ("--model", model, "--norm", norm, "--api", api, "--devices", str(devices))
    return example(folder, *arguments, "--epochs", "1", "--no-baseline")["runs"][norm]


def rounding(model, steps):
    """What is rounded differently in sums of n terms adds up to some √n·eps, and stays in the parameters for the steps that follow."""
    return steps * np.sqrt(LONGEST[model]) * np.finfo(np.float32).eps


def check_losses(got, want, model, factor=1.0):
    assert got.losses.shape == want.losses.shape == (8,)
    error = np.abs(got.losses.astype(np.float64) - want.losses) / want.losses
    assert np.all(error <= factor * rounding(model, np.arange(1, 9))), error


def check_running(got, want, model, norm):
    one, other = (jax.tree.leaves(run.state) for run in (got, want))  # by layer, then mean and var, in each style
    layers = {"mlp": 3, "cnn": 2}[model] if norm in ("batch_norm", "tracked_instance_norm") else 0
    assert len(one) == len(other) == 2 * layers
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding(model, 8) * np.abs(b).max())


@pytest.mark.parametrize("model, norm, devices", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_styles_and_devices_agree(model, norm, devices, tmp_path, reference):
    want = reference(model, norm)
    for api in APIS if devices > 1 else ("linen", "nnx"):
        got = trained(tmp_path, model, norm, api, devices)
        check_losses(got, want, model)
        check_running(got, want, model, norm)
        tested = example(tmp_path, "--eval")
        assert tested == {"api": api, "norm": norm, "test_accuracy": got.test_accuracies[-1]}


@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_flax_classes_train_to_the_same_losses(api, model, tmp_path, monkeypatch, reference):
    want = reference(model, "batch_norm")
    # What Flax's variance, E[x²] − E[x]², loses of its digits.
    running = [leaf.astype(np.float64) for leaf in jax.tree.leaves(want.state)]
    lost = max(np.max(1 + mean**2 / var) for mean, var in zip(running[::2], running[1::2], strict=True))
    if api == "linen":
        monkeypatch.setattr(digits_linen, "jnorm", SimpleNamespace(linen=nn))
    else:
        classes = SimpleNamespace(BatchNorm=nnx.BatchNorm, TrackedInstanceNorm=jnorm.nnx.TrackedInstanceNorm)
        monkeypatch.setattr(digits_nnx, "jnorm", SimpleNamespace(nnx=classes))
    check_losses(trained(tmp_path, model, "batch_norm", api), want, model, lost)


@pytest.mark.parametrize("api, norm", [("functional", "batch_norm"), ("linen", "rms_norm"), ("nnx", "batch_norm"), ("nnx", "none")])
def test_checkpoint_holds_style_and_arrays(api, norm, tmp_path):
    arch = Architecture("cnn", norm, 2, (4, 4), api)
    params, state = jax.device_get(init_model(arch, jax.random.key(3)))
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(arch, None, params, state))
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert loaded.arch == arch and type(loaded.params) is type(params)
    jax.tree.map(np.testing.assert_array_equal, (loaded.params, loaded.state), (params, state))


def test_checkpoint_without_style_is_functional(tmp_path):
    arch = Architecture("cnn", "layer_norm", 2, (4, 4), "functional")
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(arch, None, *jax.device_get(init_model(arch, jax.random.key(0)))))
    (metadata,) = [path for path in (tmp_path / "checkpoint").glob("metadata/*") if "architecture" in path.read_text()]
    text = metadata.read_text()
    metadata.write_text(text.replace(', "api": "functional"', ""))
    assert metadata.read_text() != text
    assert load_checkpoint(tmp_path / "checkpoint").arch == arch


@pytest.mark.parametrize("api", APIS)
def test_norm_without_an_axis_is_refused(api, tmp_path):
    with pytest.raises(SystemExit, match="--norm instance_norm reduces over the pixels"):
        example(tmp_path, "--api", api, "--norm", "instance_norm")
