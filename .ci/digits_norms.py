"""Short runs of the digits example in one process, whose start would take longer than a run: API MODEL NORM DEVICES on each line of stdin.

A norm that has no axis to reduce in a model must be refused, and every other run must leave its plot.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / ".ci" / "out"
sys.path.insert(0, str(ROOT / "examples"))

import jax  # noqa: E402
from train_digits import main  # noqa: E402


def run(api: str, model: str, norm: str, devices: str) -> None:
    plot = OUT / "digits.png"
    plot.unlink(missing_ok=True)
    arguments = ["--quick", "--no-baseline", "--api", api, "--model", model, "--norm", norm, "--devices", devices]
    arguments += ["--plot", str(plot), "--checkpoint", str(OUT / "digits-checkpoint")]
    print("train_digits.py", *arguments, flush=True)
    if model == "mlp" and norm.endswith("instance_norm"):
        check_refused(norm, arguments)
        return
    main(arguments)
    if not plot.stat().st_size:
        raise RuntimeError(f"{plot} is empty")


def check_refused(norm: str, arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as e:
        print(e)
        if f"error: --norm {norm} reduces" in str(e):
            return
    raise RuntimeError("accepted a norm that has no axis to reduce, or refused it with another message")


if __name__ == "__main__":
    runs = [line.split() for line in sys.stdin.read().splitlines()]
    jax.config.update("jax_num_cpu_devices", max(int(devices) for *_, devices in runs))
    jax.devices()  # before the example asks for fewer of them
    for arguments in runs:
        run(*arguments)
