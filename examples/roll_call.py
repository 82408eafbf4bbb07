"""The first meeting of processes that were started one by one: who came, and whether all were told the same number of processes.

`jax.distributed.initialize` waits for the others too. But when its time is over it aborts, without saying who is missing; and it takes it
for granted that all were told the same. So they meet before, where JAX's coordinator will be.
"""

import contextlib
import json
import os
import socket
import time
from typing import Any

LATER = 0.1  # seconds, until the next attempt
SHORT = 5.0  # seconds, for what should be there at once


class NotAllThere(Exception):
    """Raised in all processes that came, with one message."""


def roll_call(coordinator: str, processes: int, process_id: int, timeout: float) -> None:
    """Returns in every process once all have come. `coordinator` is HOST:PORT, where process 0 can be reached."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise NotAllThere(f"the address of the coordinator must be HOST:PORT, got {coordinator!r}")
    try:
        if process_id == 0:
            objection = _call(int(port), processes, timeout)
        else:
            objection = _answer((host.strip("[]"), int(port)), {"process": process_id, "processes": processes}, timeout)
    except OSError as error:
        objection = f"cannot meet at {coordinator}: {error}"
    if objection:
        raise NotAllThere(objection)


def _call(port: int, processes: int, timeout: float) -> str:
    """Process 0 hears who comes, and tells all of them what speaks against going on: nothing, if all is well."""
    deadline, came, objection = time.monotonic() + timeout, {0}, ""
    with contextlib.ExitStack() as opened:
        server, callers = opened.enter_context(_server(port)), []
        while len(came) < processes and not objection:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller = opened.enter_context(server.accept()[0])
                said = _read(caller, SHORT)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = ", ".join(str(i) for i in range(processes) if i not in came)
                    objection = f"{len(came)} of {processes} processes came within {timeout:g} s; missing: {missing}"
                continue
            if "process" in said:  # and not a stranger, who found the port open
                callers.append(caller)
                objection = _objection(said, came, processes)
                came.add(said["process"])
        for caller in callers:
            with contextlib.suppress(OSError):
                caller.sendall(json.dumps({"objection": objection}).encode() + b"\n")
                _read(caller, SHORT)  # it hangs up first: then the port is free at once
    return objection


def _objection(said: dict[str, Any], came: set[int], processes: int) -> str:
    if said["processes"] != processes:
        return (
            "the processes were not started for the same run: --processes is "
            f"{processes} in process 0 and {said['processes']} in process {said['process']}"
        )
    return f"two processes were started as process {said['process']}" if said["process"] in came else ""


def _answer(address: tuple[str, int], who: dict[str, int], timeout: float) -> str:
    """The others call until process 0 is there, and then wait for what it says."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=SHORT) as connection:
            connection.sendall(json.dumps(who).encode() + b"\n")
            said = _read(connection, timeout + SHORT)
            if "objection" in said:
                return said["objection"]
        time.sleep(LATER)
    return f"process 0 did not answer at {address[0]}:{address[1]} within {timeout:g} s"


def _read(connection: socket.socket, timeout: float) -> dict[str, Any]:
    """One line of JSON; nothing where that is not what comes."""
    connection.settimeout(timeout)
    line = connection.makefile("rb").readline(1000)
    with contextlib.suppress(ValueError):
        said = json.loads(line)
        return said if isinstance(said, dict) else {}
    return {}


def _server(port: int) -> socket.socket:
    """At the address that JAX's coordinator is told to listen at, or else at all of this host's."""
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    options: dict[str, Any] = {"reuse_port": hasattr(socket, "SO_REUSEPORT")}  # with the launcher, who holds it
    if not bound and socket.has_dualstack_ipv6():
        options |= {"family": socket.AF_INET6, "dualstack_ipv6": True}
    return socket.create_server((bound, port), **options)
