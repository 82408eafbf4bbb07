"""What the tests of bad input share: good input, every norm of it, and how a refusal is told."""

import re

import numpy as np
import pytest

import jnorm

X = np.ones((4, 3, 2, 6), np.float32)
STATE = {"mean": np.zeros(6, np.float32), "var": np.ones(6, np.float32)}
NORMS = {
    "batch_norm": lambda x, **kw: jnorm.batch_norm(x, STATE, **kw)[0],
    "layer_norm": jnorm.layer_norm,
    "rms_norm": jnorm.rms_norm,
    "add_layer_norm": lambda x, **kw: jnorm.add_layer_norm(x, x, **kw)[0],
    "add_rms_norm": lambda x, **kw: jnorm.add_rms_norm(x, x, **kw)[0],
    "group_norm": lambda x, **kw: jnorm.group_norm(x, **({"num_groups": 3} | kw)),
    "instance_norm": jnorm.instance_norm,
    "tracked_instance_norm": lambda x, **kw: jnorm.tracked_instance_norm(x, STATE, **kw)[0],
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


def refuses(*fragments, kind=ValueError):
    """The message has every fragment."""
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{re.escape(f)})" for f in fragments))
