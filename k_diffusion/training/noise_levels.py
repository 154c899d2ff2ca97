"""The training loss by noise level: its mean over the steps of a row of the log."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

Density = Callable[..., torch.Tensor]

# The same for all runs, so that they can be compared: two ranges for each decade.
EDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
RANGES = [
    f"below {EDGES[0]:g}",
    *(f"{low:g} to {high:g}" for low, high in pairwise(EDGES)),
    f"above {EDGES[-1]:g}",
]
COLUMNS = [f"loss_sigma_{text.replace(' ', '_')}" for text in RANGES]


class LossByLevel:
    """Sums losses over the ranges of sigma between EDGES.

    The sums of a batch stay on the device until `read`, so that no step waits for it. They are then
    added in the order of the steps, in float64, whenever that is: a resumed run has the same.
    """

    def __init__(self) -> None:
        self.sums = [0.0] * len(RANGES)
        self.counts = [0.0] * len(RANGES)
        self.pending: list[torch.Tensor] = []
        self.sigma: torch.Tensor | None = None

    def watch(self, density: Density) -> Density:
        """The density itself, whose last draw is kept for `add`."""

        def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.sigma = density(*args, **kwargs)
            return self.sigma

        return draw

    def add(self, loss: torch.Tensor) -> None:
        """Take in a batch at the noise levels that were drawn last. loss: (n,), of its images."""
        if self.sigma is None:
            return
        sigma, self.sigma = self.sigma, None
        place = torch.bucketize(sigma, torch.tensor(EDGES, device=sigma.device))
        # a product of matrices adds in one order on any device
        of = torch.nn.functional.one_hot(place, len(RANGES)).T.to(loss.device, torch.float32)
        self.pending.append(torch.stack([of @ loss.detach().float(), of.sum(1)]))

    def read(self, accelerator: Any, together: bool = True) -> None:
        """Bring the sums from the device. together: over all processes, which must all call this.

        Batches with a loss that is NaN or infinite are left out.
        """
        if not self.pending:
            return
        pending, self.pending = torch.stack(self.pending), []
        if together:
            pending = accelerator.reduce(pending, reduction="mean")
        for sums, counts in pending.tolist():
            if sum(sums) - sum(sums) == 0:
                self.sums = [a + b for a, b in zip(self.sums, sums)]
                self.counts = [a + b for a, b in zip(self.counts, counts)]

    def take(self) -> dict[str, Any]:
        """The means since the last call, "" for a range without noise levels, by COLUMNS."""
        means = [a / n if n else "" for a, n in zip(self.sums, self.counts)]
        self.sums, self.counts = [0.0] * len(RANGES), [0.0] * len(RANGES)
        return dict(zip(COLUMNS, means))

    def state_dict(self) -> dict[str, list[float]]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over what was read before; of other ranges, nothing."""
        if len(state.get("sums", ())) == len(state.get("counts", ())) == len(RANGES):
            self.sums, self.counts = list(state["sums"]), list(state["counts"])
