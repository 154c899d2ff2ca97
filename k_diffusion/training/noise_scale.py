"""--gns: the gradient noise scale of a training run, from its micro-batches."""

import argparse
from typing import Any

import torch
from torch import nn

from ..common.options import UsageError
from ..gns import GradientNoiseScale, MicroBatchNorms


def make_noise_scale(
    args: argparse.Namespace, accelerator: Any, model: nn.Module
) -> "NoiseScale | None":
    """What measures the noise scale of a run, None without --gns.

    model: the inner model, after `prepare`. Raises UsageError where a step is a single batch, which
    has nothing to be compared with.
    """
    if not args.gns:
        return None
    if args.grad_accum_steps * accelerator.num_processes < 2:
        raise UsageError(
            "--gns compares the gradients of a step's batches, and a step has one; pass "
            "--grad-accum-steps 2 with half the --batch-size, or start several processes"
        )
    return NoiseScale(model)


class NoiseScale:
    """Takes each micro-batch of each process as the small batch, and the step as the large one.

    Norms stay on the device until `read`, so that no step waits for it.
    """

    def __init__(self, model: nn.Module):
        self.estimate = GradientNoiseScale()
        self.micro_batches = MicroBatchNorms(model.parameters())
        self.pending: list[tuple[torch.Tensor, float, float]] = []

    def step(self, norm: torch.Tensor, accumulate: int, seen: int, processes: int, scale: float):
        """Take in a step whose backward passes are done.

        norm: (), of the whole step's gradient, unscaled and before clipping. accumulate: passes of
        this process, each of whose losses was divided by it. seen: images of the step, over all
        processes. scale: the factor of fp16's losses.
        """
        # g / accumulate is what a pass adds, so the mean of |g|² has a factor of accumulate
        small = self.micro_batches.take() * (accumulate / scale**2)
        self.pending.append(
            (torch.stack([small, norm.square()]), seen / processes / accumulate, seen)
        )

    def read(self, accelerator: Any, together: bool = True) -> None:
        """Bring the norms from the device into the estimate.

        together: averaged over all processes, which must all call this. Steps that overflowed, in
        fp16, are left out.
        """
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        norms = torch.stack([norms for norms, *_ in pending])
        if together:
            norms = accelerator.reduce(norms, reduction="mean")
        for (small, large), (_, n_small, n_large) in zip(norms.tolist(), pending):
            if small + large < float("inf"):
                self.estimate.update(small, large, n_small, n_large)
