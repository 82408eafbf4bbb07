"""Runs a script in several processes of this machine, as on several hosts: to try out on one what is meant for many.

python examples/launch_local.py --processes 4 examples/train_multihost.py
python examples/launch_local.py --processes 2 --devices-per-process 4 examples/train_multihost.py --quick

Each process is told by its environment what `jax.distributed.initialize` needs: JAX_COORDINATOR_ADDRESS, which JAX reads by itself, and
JAX_NUM_PROCESSES and JAX_PROCESS_ID, which the script passes on. What process 0 prints is shown; what the others print goes to a file
each, and is shown where one fails. As soon as one process fails, all are ended, for the others would wait for it forever.
"""

import argparse
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

LOOPBACK = "127.0.0.1"
LAST_LINES = 25
GRACE_SECONDS = 3.0  # for the others to say why they end too, and once more between SIGTERM and SIGKILL
INTERRUPTED = 128 + signal.SIGINT
TIMED_OUT = 124  # as timeout(1) does


class Launch:
    """The processes of one run."""

    def __init__(self, processes: int, logs: Path) -> None:
        self.logs = [logs / f"process-{i}.txt" for i in range(processes)]
        self.started: list[subprocess.Popen] = []
        self.running: set[int] = set()
        self.failed: list[int] = []  # in the order in which they ended
        self.ended: queue.Queue[tuple[int, int]] = queue.Queue()  # (process, exit status), in the order in which they end

    def start(self, command: Sequence[str], env: dict[str, str]) -> None:
        """Starts the next process."""
        i = len(self.started)
        with open(os.devnull, "rb") as nothing, self.logs[i].open("wb") as log:
            # Process 0 has our own output, so that it may draw a progress bar. Each has a group of processes of its own, which our Ctrl-C
            # does not reach, and which is ended with it.
            out = {} if i == 0 else {"stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, env=env, stdin=nothing, start_new_session=True, **out)
        self.started.append(process)
        self.running.add(i)
        threading.Thread(target=lambda: self.ended.put((i, process.wait())), daemon=True).start()

    def wait(self, seconds: float) -> int | None:
        """Waits until all have ended, or one has failed, which is returned; TimeoutError after that many seconds."""
        deadline = time.monotonic() + seconds
        while self.running:
            try:
                i, status = self.ended.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise TimeoutError from None
            self.running.discard(i)
            if status != 0:
                self.failed.append(i)
                return i
        return None

    def wait_for_rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while self.running:
                self.wait(max(deadline - time.monotonic(), 0))

    def end(self) -> None:
        """Ends what still runs: asks first, then insists. JAX takes SIGTERM for the announcement of a preemption, and goes on."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(KeyboardInterrupt):  # a second one need not wait for the answers to the first
                for i in self.running:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.started[i].pid, how)
                self.wait_for_rest(GRACE_SECONDS)

    def last_lines(self, i: int) -> str:
        if i == 0:
            return "Its output is above."
        lines = self.logs[i].read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join(["Its last lines:", *(f"  | {line}" for line in lines)]) if lines else "It printed nothing."


def environment(i: int, processes: int, devices: int, address: str) -> dict[str, str]:
    env = {"JAX_PLATFORMS": "cpu", **os.environ}
    if any("_proxy" in name.lower() for name in env):
        # gRPC would ask a proxy for this machine itself; and JAX would warn of that.
        env |= {"no_proxy": ",".join(filter(None, [env.get("no_proxy"), LOOPBACK])), "JAX_CHECK_PROXY_ENVS": "0"}
    return env | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # not on the network
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(i),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that stays ours for the run: bound, but not listened to, so that nobody gets it but the coordinator, which shares it."""
    with socket.socket() as held:
        if hasattr(socket, "SO_REUSEPORT"):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((LOOPBACK, 0))
        port = held.getsockname()[1]
        if not hasattr(socket, "SO_REUSEPORT"):
            held.close()
        yield port


def how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by {signal.Signals(-status).name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")


def say(message: str) -> None:
    print(f"launch_local.py: {message}", file=sys.stderr, flush=True)


def run(command: Sequence[str], processes: int, devices: int, timeout: float, logs: Path) -> int:
    """Runs the command in all processes; returns the exit status of the whole."""
    with free_port() as port:
        launch = Launch(processes, logs)
        try:
            for i in range(processes):
                launch.start(command, environment(i, processes, devices, f"{LOOPBACK}:{port}"))
            if launch.wait(timeout) is None:
                return 0
            launch.wait_for_rest(GRACE_SECONDS)
            # By themselves: one that another's failure made fail may have been faster than that one to end.
            failed, rest = tuple(launch.failed), bool(launch.running)
        except KeyboardInterrupt:
            say("interrupted; ending all processes")
            return INTERRUPTED
        except TimeoutError:
            still = ", ".join(map(str, sorted(launch.running)))
            say(f"not done after {timeout:g} s (--timeout); ending all processes, of which these still run: {still}")
            for i in sorted(launch.running):
                say(f"process {i}. {launch.last_lines(i)}")
            return TIMED_OUT
        finally:
            launch.end()
    for i in failed:
        say(f"process {i} of {processes} {how_it_ended(launch.started[i].returncode)}. {launch.last_lines(i)}")
    if rest:
        say("The others were ended.")
    status = launch.started[failed[0]].returncode
    return status if status > 0 else 128 - status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch_local.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=positive_integer, required=True, metavar="N", help="how many to start")
    parser.add_argument("--devices-per-process", type=positive_integer, default=1, metavar="N", help="virtual CPU devices (default: 1)")
    parser.add_argument("--timeout", type=seconds, default=float(threading.TIMEOUT_MAX), metavar="SECONDS", help="end all of it after that")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the processes but 0 print there")
    parser.add_argument("script", help="a Python script, which calls jax.distributed.initialize")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args(argv)
    if not Path(args.script).is_file():
        parser.error(f"there is no script {args.script}")
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as for Ctrl-C: what we started must not outlive us
        signal.signal(number, signal.default_int_handler)
    command = [sys.executable, args.script, *args.arguments]
    with tempfile.TemporaryDirectory() if args.logs is None else contextlib.nullcontext(args.logs) as logs:
        return run(command, args.processes, args.devices_per_process, args.timeout, Path(logs))


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive integer")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
