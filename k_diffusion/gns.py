"""The gradient noise scale (arXiv:1812.06162): how large a batch is worth its cost.

With gradients of small batches, b, and of large ones, B, of independent samples
|G|² = (B |G_B|² - b |G_b|²) / (B - b) and tr S = (|G_b|² - |G_B|²) / (1 / b - 1 / B) are unbiased
estimates of the squared norm of the true gradient and of the variance of one sample's. Their ratio
tr S / |G|² is the noise scale, in samples. Single estimates are noisy and a mean of ratios is
biased, so both are smoothed apart and then divided.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


class GradientNoiseScale:
    """Smooths |G|² and tr S over steps, and divides them: the gradient noise scale.

    beta: the decay of both moving averages per step. eps: the least |G|² to divide by, as its
    estimates can be negative. Equations A.2 and A.3 of arXiv:1812.06162.
    """

    def __init__(self, beta: float = 0.9998, eps: float = 1e-8):
        self.beta = beta
        self.eps = eps
        self.ema_sq_norm = 0.0
        self.ema_var = 0.0
        self.beta_cumprod = 1.0
        self.gradient_noise_scale = 0.0

    def state_dict(self) -> dict[str, float]:
        """Everything that the next estimate depends on."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Restore a `state_dict`. Raises ValueError where a value is missing."""
        if missing := vars(self).keys() - state_dict.keys():
            raise ValueError(f"the state of the noise scale lacks {', '.join(sorted(missing))}")
        vars(self).update({key: float(state_dict[key]) for key in vars(self)})

    def update(
        self,
        sq_norm_small_batch: float,
        sq_norm_large_batch: float,
        n_small_batch: float,
        n_large_batch: float,
    ) -> float:
        """Take in the squared gradient norms of one step; returns the noise scale so far.

        Raises ValueError unless the small batch is smaller than the large one.
        """
        if not 0 < n_small_batch < n_large_batch:
            raise ValueError(
                f"the noise scale needs gradients of a small and of a larger batch, got batches of "
                f"{n_small_batch} and {n_large_batch}; accumulate gradients or add processes"
            )
        small, large = float(sq_norm_small_batch), float(sq_norm_large_batch)
        sq_norm = (n_large_batch * large - n_small_batch * small) / (n_large_batch - n_small_batch)
        var = (small - large) / (1 / n_small_batch - 1 / n_large_batch)
        self.ema_sq_norm = self.beta * self.ema_sq_norm + (1 - self.beta) * sq_norm
        self.ema_var = self.beta * self.ema_var + (1 - self.beta) * var
        self.beta_cumprod *= self.beta
        smooth_norm, smooth_var = self.get_stats()
        self.gradient_noise_scale = smooth_var / max(smooth_norm, self.eps)
        return self.gradient_noise_scale

    def get_gns(self) -> float:
        """The noise scale tr S / |G|², in samples; 0 before the first update."""
        return self.gradient_noise_scale

    def get_stats(self) -> tuple[float, float]:
        """The smoothed |G|² and tr S, corrected for their start at 0."""
        weight = 1 - self.beta_cumprod
        if weight == 0:
            return 0.0, 0.0
        return self.ema_sq_norm / weight, self.ema_var / weight


class DDPGradientStatsHook:
    """Squared norms of the gradients before and after DDP averages them, by a communication hook.

    The small batch is what one process sums up before it communicates: one batch or, under
    accumulation, the accumulated ones. ddp_module: a DistributedDataParallel without another hook.
    """

    def __init__(self, ddp_module: Any):
        self.small: list[torch.Tensor] = []
        self.large: list[torch.Tensor] = []
        ddp_module.register_comm_hook(ddp_module.process_group, self._hook)

    def _hook(self, group, bucket):  # DDP compares annotations, if there are any
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.small.append(_squared_norm(bucket.buffer()))

        def record(future: Any) -> torch.Tensor:
            averaged = future.value()
            averaged = averaged[0] if isinstance(averaged, list) else averaged
            self.large.append(_squared_norm(averaged))
            return averaged

        return allreduce_hook(group, bucket).then(record)

    def get_stats(self) -> tuple[float, float]:
        """The squared norms of the small batch, averaged over processes, and of the large one.

        Of the last backward passes since the previous call; all processes call it together. Raises
        ValueError where there was none.
        """
        if not self.small:
            raise ValueError(
                "there is no gradient since the last get_stats; call it once after each backward "
                "pass that communicates"
            )
        small, large = torch.stack(self.small).sum(), torch.stack(self.large).sum()
        self.small.clear()
        self.large.clear()
        torch.distributed.all_reduce(small)
        return float(small) / torch.distributed.get_world_size(), float(large)


class MicroBatchNorms:
    """Squared norms of the gradients of single backward passes, before they are summed up.

    Hooks on the parameters see each pass's own gradient, with and without accumulation and DDP, and
    need no memory of the gradient's size.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.norms: list[torch.Tensor] = []
        for p in parameters:
            if p.requires_grad:
                p.register_hook(lambda grad: self.norms.append(_squared_norm(grad)))

    def take(self) -> torch.Tensor:
        """The sum of the squared norms, (), of all passes since the last call.

        Raises ValueError where there were none: under FSDP no process has such a gradient.
        """
        if not self.norms:
            raise ValueError(
                "no gradient reached the model's parameters, so that the noise scale can't be "
                "measured; leave out --gns with sharded models"
            )
        total = torch.stack(self.norms).sum()
        self.norms.clear()
        return total


def _squared_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float32).square()
