"""Programs in which a norm is just within, or just beyond, what folds without a change of the output."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jnorm.nnx as jnx
from jnorm import tools
from test_fold import IMAGE, Net, check_nnx, norm, ready, rngs


def conv(i, o, **options):
    return nnx.Conv(i, o, (2, 2), padding="VALID", rngs=rngs(), **options)


# --- A norm before and a norm after the same layer --------------------------------------------------------------------------


def summed(net, x):
    return net.b(net.conv(net.a(x)).sum((1, 2)))


def padded(net, x):
    return net.b(jnp.pad(net.conv(net.a(x)), ((0, 0), (1, 1), (1, 1), (0, 0))))


def summed_and_added(net, x):
    return net.b(net.conv(net.a(x)).sum((1, 2)) + net.bias[...])


@pytest.mark.parametrize("call", [summed, padded, summed_and_added], ids=["sum", "pad", "sum and bias"])
def test_what_lies_between_a_layer_and_the_second_norm(call, rng, x64):
    """The bias that the first norm brings is scaled as the kernel is."""
    model = ready(Net(call, a=norm(3), conv=conv(3, 4, use_bias=False), b=norm(4), bias=nnx.Param(jnp.ones((1, 4)))), rng)
    check_nnx(model, jnp.asarray(rng.normal(size=IMAGE)), {"a": "conv", "b": "conv"})
