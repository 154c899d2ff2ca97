"""What samplers cost beside the model: time per step with a model that does nothing, and Brownian
noise side by side with torchsde's.

Medians of several runs in turn, after a warm-up. Time is the whole of a step: the loop, the
coefficients, the arithmetic on x, noise where there is any; not the progress bar.

    python benchmarks/sampler_overhead.py [--device cpu] [--shape 1 4 32 32] [--steps 50]

With --against FOLDER, times of the samplers in FOLDER/k_diffusion, an unpacked wheel of the
published package, say, stand beside ours: the best of runs in turn, in processes of their own.
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
import json
import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torchsde
from harness import bench
from torchsde._brownian import brownian_interval

import k_diffusion as K


def in_turn(runs: dict[str, bench.Run], device: torch.device, repeats: int) -> dict[str, float]:
    """The median seconds of so many runs each."""
    return bench.in_turn(runs, device, rounds=(repeats, repeats), shortest=0.0)


def samplers(x: torch.Tensor, steps: int, repeats: int) -> None:
    """Prints each sampler's time per step, and as many Euler steps' time."""

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x * 0.5

    sigmas = K.sampling.get_sigmas_karras(steps, 0.03, 15.0)
    noise = torch.randn_like(x)
    print(f"{'sampler':<24} {'us per step':>10} {'x euler':>8} {'with its own noise':>19}")
    without: dict[str, bench.Run] = {}
    with_own: dict[str, bench.Run] = {}
    for name, info in sorted(K.sampling.SAMPLERS.items(), key=lambda item: item[0] != "euler"):
        if not info.takes_sigmas:
            continue
        run = partial(K.sampling.sample, model, x, sigmas, name, disable=True)
        options: dict[str, object] = {"noise_sampler": lambda *_: noise} if info.noise else {}
        if name == "restart":
            options["restarts"] = ()
        without[name] = partial(run, **options)
        if info.stochastic:
            with_own[name] = run
    times = in_turn(without, x.device, repeats)
    own = in_turn(with_own, x.device, max(repeats // 4, 1))
    for name, time in times.items():
        print(
            f"{name:<24} {time / steps * 1e6:>10.0f} {time / times['euler']:>8.2f} "
            + (f"{own[name] / steps * 1e6:>19.0f}" if name in own else "")
        )


def brownian(x: torch.Tensor, steps: int, repeats: int) -> None:
    """Prints draws and time of a run's noise, from torchsde's tree and from ours."""
    sigmas = K.sampling.get_sigmas_karras(steps, 0.03, 15.0)[:-1].tolist()
    draws = {"theirs": 0, "ours": 0}
    their_randn, our_normal = brownian_interval._randn, K.noise.BatchedBrownianTree._normal

    def counted_randn(*args):
        draws["theirs"] += 1
        return their_randn(*args)

    def counted_normal(self, **spawn):
        draws["ours"] += 1
        return our_normal(self, **spawn)

    def theirs() -> list[torch.Tensor]:
        tree = torchsde.BrownianTree(sigmas[-1], torch.zeros_like(x), sigmas[0], entropy=5)
        return [tree(b, a) for a, b in pairwise(sigmas)]

    def ours() -> list[torch.Tensor]:
        tree = K.noise.BatchedBrownianTree(x, sigmas[-1], sigmas[0], seed=5)
        return [tree(b, a) for a, b in pairwise(sigmas)]

    brownian_interval._randn = counted_randn
    K.noise.BatchedBrownianTree._normal = counted_normal  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs about float32 ends
            error = max((a - b).abs().max().item() for a, b in zip(theirs(), ours()))
    finally:
        brownian_interval._randn = their_randn
        K.noise.BatchedBrownianTree._normal = our_normal  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = in_turn({"theirs": theirs, "ours": ours}, x.device, repeats)
    print(f"\nBrownian noise of {steps - 1} steps, largest difference {error:.1e}")
    for who, name in (("theirs", "torchsde"), ("ours", "k_diffusion")):
        print(f"{name:<12} {draws[who]:>5} draws {times[who] * 1e3:>9.1f} ms")
    print(
        f"ratio        {draws['ours'] / draws['theirs']:>5.2f}       "
        f"{times['ours'] / times['theirs']:>9.2f}"
    )


def against(folder: Path, shape: list[int], steps: int, repeats: int) -> None:
    """Prints each published sampler's time per step, theirs and ours."""
    here = Path(__file__).parent
    script = here / "harness" / "step_times.py"
    flags = ["--shape", *map(str, shape), "--steps", str(steps), "--repeats", str(repeats)]
    rounds = [
        [
            json.loads(subprocess.check_output([sys.executable, script, of, *flags]))
            for of in (folder, here.parent)
        ]
        for _ in range(2)
    ]
    print(f"{'us per step':<24} {'theirs':>10} {'ours':>10} {'ratio':>8}")
    for name in rounds[0][0]:
        theirs, ours = (min(times[i][name] for times in rounds) for i in (0, 1))
        print(f"{name:<24} {theirs:>10.0f} {ours:>10.0f} {ours / theirs:>8.2f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split(":")[0])
    p.add_argument("--device", default="cpu")
    p.add_argument("--shape", type=int, nargs="+", default=[1, 4, 32, 32])
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--against", type=Path, metavar="FOLDER", help="of another k_diffusion")
    args = p.parse_args()
    if args.against:
        return against(args.against, args.shape, args.steps, args.repeats)
    torch.set_num_threads(1)
    x = torch.randn(args.shape, device=args.device)
    shape = " x ".join(map(str, args.shape))
    on = bench.describe(x.device)
    print(f"{on}, {shape}, {x.dtype}, {args.steps} steps, median of {args.repeats}\n")
    samplers(x, args.steps, args.repeats)
    brownian(x, args.steps, args.repeats)


if __name__ == "__main__":
    main()
