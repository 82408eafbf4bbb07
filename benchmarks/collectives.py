"""Collectives of a batch norm over 8 devices, forward and step, in the compiled programs: `python -m benchmarks.collectives` prints JSON.

A process of its own, since the number of devices is set before JAX starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from . import hlo, machine

DEVICES = 8


def counted() -> dict[str, dict[str, dict[str, int]]]:
    """{peer: {"forward" | "step": {kind: number}}}. Devices are virtual, so this needs no second one."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.collectives"], capture_output=True, text=True, cwd=machine.ROOT, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"counting collectives failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}")
    return json.loads(done.stdout.splitlines()[-1])


def norms() -> dict[str, Callable]:
    import flax.linen as nn

    import jnorm

    module = nn.BatchNorm(use_running_average=False, axis_name="d")

    def ours(x: Any, scale: Any, bias: Any, state: Any) -> Any:
        return jnorm.batch_norm(x, state, scale, bias, axis_name="d")

    def flax(x: Any, scale: Any, bias: Any, state: Any) -> Any:
        y, new = module.apply({"params": {"scale": scale, "bias": bias}, "batch_stats": state}, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return {"jnorm": ours, "flax.linen": flax}


def programs(norm: Callable) -> dict[str, dict[str, int]]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    x, scale, bias = jnp.ones((DEVICES * 4, 4, 4, 8)), jnp.ones(8), jnp.zeros(8)
    state = {"mean": jnp.zeros(8), "var": jnp.ones(8)}

    def step(x: Any, scale: Any, bias: Any, state: Any) -> Any:
        y, vjp, new = jax.vjp(lambda *a: norm(*a, state), x, scale, bias, has_aux=True)
        return y, new, vjp(y)

    def count(f: Callable, out_specs: Any) -> dict[str, int]:
        run = jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P(), P(), P()), out_specs=out_specs)
        return hlo.collectives(jax.jit(run).lower(x, scale, bias, state).compile().as_text() or "")

    return {"forward": count(norm, (P("d"), P())), "step": count(step, (P("d"), P(), (P("d"), P(), P())))}


def main() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(json.dumps({name: programs(norm) for name, norm in norms().items()}))


if __name__ == "__main__":
    main()
