"""examples/roll_call.py: everybody who came is told the same, whether that is good news or not."""

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from launch_local import free_port
from roll_call import NotAllThere, roll_call


def answer(port, told, who, timeout):
    try:
        return roll_call(f"127.0.0.1:{port}", told, who, timeout)
    except NotAllThere as error:
        return str(error)


def meet(*started, timeout=20.0, stranger=None):
    """What each of the processes, (number it was told, which it is), is told: None where all is well."""
    with free_port() as port, ThreadPoolExecutor(len(started)) as pool:
        if stranger is not None:
            threading.Thread(target=stranger, args=(port,), daemon=True).start()
        return [f.result() for f in [pool.submit(answer, port, *each, timeout) for each in started]]


def test_all_come():
    assert meet((4, 3), (4, 1), (4, 0), (4, 2)) == [None] * 4
    assert meet((1, 0)) == [None]


def test_one_is_missing():
    said = meet((4, 0), (4, 1), (4, 3), timeout=1.0)
    assert said == ["3 of 4 processes came within 1 s; missing: 2"] * 3


def test_process_0_is_missing():
    (said,) = meet((2, 1), timeout=0.5)
    assert said.startswith("process 0 did not answer at 127.0.0.1:")


def test_different_numbers():
    said = meet((2, 0), (3, 1))
    assert said == ["the processes were not started for the same run: --processes is 2 in process 0 and 3 in process 1"] * 2


def test_the_same_process_twice():
    """The first of the two may be gone already, with the objection."""
    said = meet((3, 0), (3, 1), (3, 1), timeout=2.0)
    assert said == ["two processes were started as process 1"] * 3


@pytest.mark.parametrize("says", [b"", b"GET / HTTP/1.1\n", b"[]\n"])
def test_a_stranger_is_no_process(says):
    def call(port):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(says)
                return
            except OSError:
                threading.Event().wait(0.01)

    assert meet((2, 0), timeout=1.0, stranger=call) == ["1 of 2 processes came within 1 s; missing: 1"]


def test_addresses():
    for address in ("host", "host:", ":1", "host:port"):
        with pytest.raises(NotAllThere, match="must be HOST:PORT"):
            roll_call(address, 2, 1, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(NotAllThere, match="cannot meet at 127.0.0.1"):
        roll_call(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, 1)
