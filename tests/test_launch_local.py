"""examples/launch_local.py on scripts without JAX: what it tells them, and how a run ends where one fails, hangs, or is interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
WHO = "import os, sys, time\ni = int(os.environ['JAX_PROCESS_ID'])\n"


# A shell lets what it starts in the background ignore SIGINT, and the tests may be that. (preexec_fn would fork: JAX warns.)
HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
HEEDING = [sys.executable, "-c", HEED]


def start(folder, code, *arguments, processes=3, options=()):
    script = folder / "script.py"
    script.write_text(WHO + code)
    command = [sys.executable, str(EXAMPLES / "launch_local.py"), "--processes", str(processes), *options, str(script), *arguments]
    return subprocess.Popen([*HEEDING, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(folder, code, *arguments, **how):
    process = start(folder, code, *arguments, **how)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def alive(folder):
    """The processes, of which each left its number."""
    return [int(path.name) for path in folder.glob("pid/*") if Path("/proc", path.name).exists()]


def leave_number(folder):
    (folder / "pid").mkdir()
    return f"open({str(folder / 'pid')!r} + f'/{{os.getpid()}}', 'w').close()\n"


def test_what_the_processes_are_told(tmp_path):
    """Also arguments that look like the launcher's own; and that process 0 alone is shown."""
    code = """
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_NUM_CPU_DEVICES")
print(*(os.environ[n] for n in names), *sys.argv[1:])
"""
    options = ("--devices-per-process", "2", "--logs", str(tmp_path / "logs"))
    status, out, err = run(tmp_path, code, "--processes", "7", options=options)
    assert (status, err) == (0, "")
    address, *rest = out.split()
    assert address.startswith("127.0.0.1:") and rest == ["3", "0", "2", "--processes", "7"]
    assert (tmp_path / "logs" / "process-2.txt").read_text().split() == [address, "3", "2", "2", "--processes", "7"]


@pytest.mark.parametrize("how, status, said", [("sys.exit(7)", 7, "exit status 7"), ("os.kill(os.getpid(), 9)", 137, "killed by SIGKILL")])
def test_a_process_that_dies_ends_the_others(how, status, said, tmp_path):
    """Also where they take no notice of SIGTERM, as with JAX."""
    code = f"""
import signal
signal.signal(signal.SIGTERM, lambda *_: None)
if i == 1:
    print("the reason")
    sys.stdout.flush()
    {how}
while True:
    time.sleep(100)
"""
    start = time.monotonic()
    got, _, err = run(tmp_path, leave_number(tmp_path) + code)
    assert got == status and time.monotonic() - start < 30
    assert f"process 1 of 3 {'ended with ' if 'exit' in said else 'was '}{said}" in err and "  | the reason" in err
    assert not alive(tmp_path)


def test_process_0_has_said_why(tmp_path):
    status, _, err = run(tmp_path, "sys.exit('no data' if i == 0 else 0)")
    assert status == 1 and err.startswith("no data\n") and "Its output is above." in err


def test_all_that_fail_are_named_the_first_first(tmp_path):
    """What fails next, for the first is gone, fails differently; and may be faster than what made it fail."""
    status, _, err = run(tmp_path, "time.sleep(0 if i == 2 else 0.5); sys.exit(5 if i == 2 else 6)")
    assert status == 5 and "process 2 of 3 ended with exit status 5" in err and "It printed nothing." in err
    assert err.index("process 2 of 3") < err.index("process 0 of 3 ended with exit status 6")


def test_a_hang_ends(tmp_path):
    status, _, err = run(tmp_path, leave_number(tmp_path) + "if i: time.sleep(1000)", options=("--timeout", "2"))
    assert status == 124 and "not done after 2 s" in err and "still run: 1, 2" in err
    assert not alive(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all(number, tmp_path):
    process = start(tmp_path, leave_number(tmp_path) + "time.sleep(1000)")
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("pid/*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err
    assert not alive(tmp_path)


def test_bad_arguments(tmp_path):
    command = [sys.executable, str(EXAMPLES / "launch_local.py")]
    for arguments, said in [
        (("--processes", "0", "x.py"), "0 is no positive integer"),
        (("--processes", "2", "x.py"), "there is no script x.py"),
    ]:
        ended = subprocess.run([*command, *arguments], cwd=tmp_path, text=True, capture_output=True, timeout=30, check=False)
        assert ended.returncode == 2 and said in ended.stderr
