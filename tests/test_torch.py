"""PyTorch has five of the norms: values, gradients and running statistics in float64, where nothing but the definition can differ.

Its momentum is the fraction of the new value; its running variance has ddof 1; channels come second.
"""

import jax
import numpy as np
import pytest

import jnorm

torch = pytest.importorskip("torch", reason="PyTorch is an optional test dependency")

SHAPE = (5, 3, 2, 6)
ATOL = 1e-12  # 1e4 roundings of numbers of order one


@pytest.fixture(autouse=True)
def _float64(x64):
    yield


def data(shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    c = shape[-1]
    return rng.normal(size=shape) * 2 + 1, rng.normal(size=c), rng.normal(size=c), rng.normal(size=shape)


def first(a):
    """Channels last to channels second."""
    return torch.tensor(np.moveaxis(a, -1, 1).copy(), dtype=torch.float64)


def last(t):
    return np.moveaxis(t.detach().numpy(), 1, -1)


def theirs(module, x, scale, bias, dy, channels_second=True):
    """-> y and the gradients of x, scale, bias."""
    there, back = (first, last) if channels_second else (lambda a: torch.tensor(a), lambda t: t.detach().numpy())
    module.weight.data, module.bias.data = torch.tensor(scale), torch.tensor(bias)
    tx = there(x).requires_grad_()
    y = module(tx)
    y.backward(there(dy))
    return back(y), back(tx.grad), module.weight.grad.numpy(), module.bias.grad.numpy()


def ours(f, x, scale, bias, dy):
    y, vjp = jax.vjp(jax.jit(f), x, scale, bias)
    return y, *vjp(dy)


def compare(got, want):
    for name, one, two in zip(("y", "dx", "dscale", "dbias"), got, want, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=ATOL * 10 * max(abs(two).max(), 1), err_msg=name)


BATCH_NORMS = [("BatchNorm1d", (7, 4)), ("BatchNorm1d", (5, 6, 4)), ("BatchNorm2d", SHAPE), ("BatchNorm3d", (2, 2, 3, 2, 4))]


@pytest.mark.parametrize(("module", "shape"), BATCH_NORMS)
def test_batch_norm(module, shape):
    x, scale, bias, dy = data(shape)
    bn = getattr(torch.nn, module)(shape[-1], eps=1e-5, momentum=0.1, dtype=torch.float64)
    state = jnorm.batch_norm_state(shape[-1])
    compare(ours(lambda x, s, b: jnorm.batch_norm(x, state, s, b)[0], x, scale, bias, dy), theirs(bn, x, scale, bias, dy))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_running_statistics(momentum):
    """Three training steps, then evaluation. The state is float32: three roundings."""
    bn = torch.nn.BatchNorm2d(6, momentum=momentum, dtype=torch.float64)
    state = jnorm.batch_norm_state(6, track_count=momentum is None)
    ours_of_theirs = None if momentum is None else 1 - momentum
    step = jax.jit(lambda x, state: jnorm.batch_norm(x, state, momentum=ours_of_theirs, running_var_correction=1)[1])
    for seed in range(3):
        x = data(seed=seed)[0]
        bn(first(x))
        state = step(x, state)
    for key in ("mean", "var"):
        np.testing.assert_allclose(state[key], getattr(bn, f"running_{key}").numpy(), rtol=4 * 2**-23, atol=4 * 2**-23)
    exact = {k: getattr(bn, f"running_{k}").numpy() for k in ("mean", "var")}
    y, _ = jnorm.batch_norm(x, exact, use_running_average=True)
    np.testing.assert_allclose(y, last(bn.eval()(first(x))), atol=ATOL)


@pytest.mark.parametrize("normalized", [1, 2])
def test_layer_norm(normalized):
    x, _, _, dy = data()
    shape, axes = SHAPE[-normalized:], tuple(range(4 - normalized, 4))
    scale, bias = np.random.default_rng(1).normal(size=(2, *shape))
    ln = torch.nn.LayerNorm(shape, eps=1e-6, dtype=torch.float64)
    f = lambda x, s, b: jnorm.layer_norm(x, s, b, reduction_axes=axes, feature_axes=axes)  # noqa: E731
    compare(ours(f, x, scale, bias, dy), theirs(ln, x, scale, bias, dy, channels_second=False))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(groups):
    x, scale, bias, dy = data()
    gn = torch.nn.GroupNorm(groups, 6, eps=1e-6, dtype=torch.float64)
    compare(ours(lambda x, s, b: jnorm.group_norm(x, s, b, num_groups=groups), x, scale, bias, dy), theirs(gn, x, scale, bias, dy))


def test_instance_norm():
    x, scale, bias, dy = data()
    norm = torch.nn.InstanceNorm2d(6, eps=1e-6, affine=True, dtype=torch.float64)
    compare(ours(lambda x, s, b: jnorm.instance_norm(x, s, b), x, scale, bias, dy), theirs(norm, x, scale, bias, dy))


def test_tracked_instance_norm():
    x, scale, bias, dy = data()
    norm = torch.nn.InstanceNorm2d(6, eps=1e-6, affine=True, track_running_stats=True, momentum=0.1, dtype=torch.float64)
    run = lambda x, s, b, state: jnorm.tracked_instance_norm(x, state, s, b, momentum=0.9, running_var_correction=1)  # noqa: E731
    state = jnorm.batch_norm_state(6)
    compare(ours(lambda x, s, b: run(x, s, b, state)[0], x, scale, bias, dy), theirs(norm, x, scale, bias, dy))
    _, state = run(x, scale, bias, state)
    for key in ("mean", "var"):
        np.testing.assert_allclose(state[key], getattr(norm, f"running_{key}").numpy(), rtol=4 * 2**-23, atol=4 * 2**-23)
    exact = {k: getattr(norm, f"running_{k}").numpy() for k in ("mean", "var")}
    y, _ = jnorm.tracked_instance_norm(x, exact, scale, bias, use_running_average=True)
    np.testing.assert_allclose(y, last(norm.eval()(first(x))), atol=ATOL)


def test_rms_norm():
    x, scale, _, dy = data()
    tx, weight = torch.tensor(x).requires_grad_(), torch.tensor(scale).requires_grad_()
    y = torch.nn.functional.rms_norm(tx, (6,), weight, 1e-6)
    y.backward(torch.tensor(dy))
    got, vjp = jax.vjp(jax.jit(lambda x, s: jnorm.rms_norm(x, s)), x, scale)
    for one, two in zip((got, *vjp(dy)), (y.detach(), tx.grad, weight.grad), strict=True):
        np.testing.assert_allclose(one, two.numpy(), rtol=0, atol=ATOL * 10)


def test_second_derivatives():
    """Torch's double backward of batch norm, once."""
    x, scale, bias, dy = data()
    tx = first(x).requires_grad_()
    y = torch.nn.functional.batch_norm(tx, None, None, torch.tensor(scale), torch.tensor(bias), training=True)
    (grad,) = torch.autograd.grad((y**2 * first(dy)).sum(), tx, create_graph=True)
    (want,) = torch.autograd.grad((grad * first(dy)).sum(), tx)
    state = jnorm.batch_norm_state(6)
    loss = lambda x: (jnorm.batch_norm(x, state, scale, bias)[0] ** 2 * dy).sum()  # noqa: E731
    got = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (dy,))[1])(x)
    np.testing.assert_allclose(got, last(want), atol=1e-10 * max(abs(last(want)).max(), 1))
