"""What processes on several hosts need before they can train together: to find one another, and to have been started for the same run.

Everything that differs between processes would otherwise show late or never: as a hang in the first collective that not all take part in,
or as parameters that drift apart.
"""

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # its client is what Orbax too exchanges small values with; there is no public name for it

from digits_data import DigitsError
from roll_call import NotAllThere, roll_call

HEARTBEAT_SECONDS = 30  # after which a host that went silent is given up, where no collective notices before

_calls = itertools.count()


class Disagreement(DigitsError):
    """Raised in every process, so that all of them end in order."""


@contextlib.contextmanager
def connected(program: str, coordinator: str | None, processes: int | None, process_id: int | None, timeout: int) -> Iterator[None]:
    """Connects the processes. What then fails in one of them ends that one at once.

    An orderly exit waits for the others, which wait for this one in the next collective.
    """
    _connect(coordinator, processes, process_id, timeout)
    try:
        yield
    except Disagreement:
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, DigitsError):
            print(f"{program}: error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _connect(coordinator: str | None, processes: int | None, process_id: int | None, timeout: int) -> None:
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if processes == 1 and process_id in (None, 0):
        return
    if missing and len(missing) < len(given):
        raise DigitsError(f"{', '.join(given)} belong together, or none of them on a cluster that JAX knows; {missing[0]} is missing")
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise DigitsError(f"--process-id must be from 0 to {processes - 1}, since there are {processes} --processes, got {process_id}")
    options: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": timeout,
    }
    if coordinator is None or processes is None or process_id is None:
        try:
            jax.distributed.initialize(**options)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
            # No cluster that JAX knows: one process alone.
        return
    try:
        roll_call(coordinator, processes, process_id, timeout)
    except NotAllThere as error:
        raise DigitsError(str(error)) from None
    jax.distributed.initialize(coordinator, processes, process_id, cluster_detection_method="deactivate", **options)


def agree(topic: str, settings: Mapping[str, Any], timeout: int) -> None:
    """Compares this process's settings with everybody's; raises in every process where they are not the same.

    To be called by all processes, in the same order.
    """
    client, processes = distributed.global_state.client, distributed.global_state.num_processes
    if client is None:
        return
    folder = f"digits/{next(_calls)} {topic}"  # what is written there stays, and can be written only once
    client.key_value_set(f"{folder}/{distributed.global_state.process_id}", json.dumps(settings))
    first = dict(settings)
    for other in range(processes):
        try:
            theirs = json.loads(client.blocking_key_value_get(f"{folder}/{other}", 1000 * timeout))
        except RuntimeError as error:
            raise DigitsError(f"process {other} of {processes} did not tell its {topic} within {timeout} s: {error}") from error
        first = theirs if other == 0 else first
        for name in {**first, **theirs}:
            if theirs.get(name) != first.get(name):
                raise Disagreement(
                    f"the processes were not started for the same run: {name} is {first.get(name)} in process 0 and {theirs.get(name)} in "
                    f"process {other}"
                )
