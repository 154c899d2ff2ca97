"""How long a checkpoint holds training up, and how long it takes to write.

    python benchmarks/saving.py [--gigabytes 1] [--device cpu] [--folder FOLDER]

The state is that of a model of so many gigabytes: its weights, their average and AdamW's two
moments, four times as much. Three ways in turn: the copy to host memory alone, which is the least
it could be; written while training waits; and by train.py's saver, which holds training up for the
copy, and writes while steps of matrix products go on.
"""

import k_diffusion.common.cpu  # noqa: F401  before torch, which loads OpenMP

# isort: split
import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from k_diffusion.common.tensors import copy_to_host, nbytes
from k_diffusion.training import run_files, saving

TENSOR = 2**24  # of numbers: 64 MiB each in float32


class State:
    """What the saver saves: a run at a step."""

    def __init__(self, gigabytes: float, device: str):
        self.step, self.bad_at, self.trouble = 0, 0, 0
        whole, rest = divmod(int(gigabytes * 1e9 / 4), TENSOR)
        sizes = [TENSOR] * whole + [rest] * (rest > 0)
        self.parts = {
            part: {str(i): torch.rand(n, device=device) for i, n in enumerate(sizes)}
            for part in ("model", "model_ema", "exp_avg", "exp_avg_sq")
        }

    def state_dict(self) -> dict[str, Any]:
        return {"config": {}, "step": self.step, **self.parts}


def seconds(run: Any, device: str) -> float:
    """How long a call takes, the device's work included."""
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def measure(state: Any, folder: Path, device: str) -> str:
    """A summary of what saving costs."""
    x = torch.rand(256, 256, device=device)
    process = SimpleNamespace(is_main_process=True)
    name = str(folder / "run")

    def step() -> None:
        for _ in range(20):
            torch.mm(x, x)

    def steps(n: int) -> float:
        return statistics.median(seconds(step, device) for _ in range(n))

    copy = min(seconds(lambda: copy_to_host(state.state_dict()), device) for _ in range(2))
    state.step = 1
    waited = seconds(lambda: run_files.save_checkpoint(name, 1, state.state_dict()), device)
    alone = steps(200)
    with saving.Saver(process, name, state, print, print, every=10**9, minutes=10**9) as saver:
        saver.saved_step, state.step = 1, 2
        held = seconds(lambda: saver.save(state), device)
        started, during = time.perf_counter(), []
        while saver.writing is not None and not saver.writing.done():
            during.append(seconds(step, device))
        written = time.perf_counter() - started
    slower = statistics.mean(during) / alone if during else 1.0
    return (
        f"a checkpoint of {nbytes(state.state_dict()) / 1e9:.2f} GB from {device}: training stands "
        f"still for {held:.2f} s (the copy alone: {copy:.2f} s; writing while it waits: "
        f"{waited:.2f} s); it is written after {written:.2f} s more, during which a step of "
        f"{1e3 * alone:.1f} ms takes {slower:.2f} times as long on average"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--gigabytes", type=float, default=1.0, help="of weights (default: 1)")
    p.add_argument("--device", default="cpu", help="that trains (default: cpu)")
    p.add_argument("--folder", type=Path, help="to write to; else a temporary one")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(measure(State(args.gigabytes, args.device), Path(folder), args.device))


if __name__ == "__main__":
    main()
