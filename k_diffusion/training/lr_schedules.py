"""Learning-rate schedules with a warm-up. Step them once per optimizer step."""

import math
from typing import Any

from torch import optim
from torch.optim.lr_scheduler import LRScheduler

from ..common import numbers


class _WarmupLR(LRScheduler):
    """(1 - warmup^(k + 1)) max(min_lr, lr factor(k)) at step k, unless a subclass differs."""

    def __init__(
        self,
        optimizer: optim.Optimizer,
        warmup: float,
        min_lr: float,
        last_epoch: int,
    ):
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be at least 0 and below 1, got {warmup}")
        numbers.non_negative(min_lr=min_lr)
        self.warmup = warmup
        self.min_lr = min_lr
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        return 1.0

    def ramp(self, step: int) -> float:
        return 1 - self.warmup ** (step + 1)

    def decayed(self, lr: Any, step: int) -> Any:
        return max(self.min_lr, lr * self.factor(step))

    def get_lr(self) -> list[Any]:
        step = self.last_epoch
        return [self.ramp(step) * self.decayed(lr, step) for lr in self.base_lrs]


class InverseLR(_WarmupLR):
    """Inverse power decay: lr (1 + k / inv_gamma)^-power at step k, then warm-up.

    At k = inv_gamma the factor is 2^-power. warmup: 0 for none, 0.99 to reach 63% in 100 steps.
    min_lr bounds the decay, before the warm-up. `verbose` is accepted and has no effect. Raises
    ValueError unless inv_gamma > 0 and 0 <= warmup < 1.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        inv_gamma: float = 1.0,
        power: float = 1.0,
        warmup: float = 0.0,
        min_lr: float = 0.0,
        last_epoch: int = -1,
        verbose: bool = False,
    ):
        if not inv_gamma > 0:
            raise ValueError(f"inv_gamma must be positive, got {inv_gamma}")
        numbers.finite(power=power)
        self.inv_gamma = inv_gamma
        self.power = power
        super().__init__(optimizer, warmup, min_lr, last_epoch)

    def factor(self, step: int) -> float:
        return (1 + step / self.inv_gamma) ** -self.power


class ExponentialLR(_WarmupLR):
    """Exponential decay: the learning rate shrinks to `decay` times itself every `num_steps` steps.

    warmup, min_lr and verbose as in `InverseLR`. Raises ValueError unless num_steps > 0 and
    0 <= warmup < 1.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        num_steps: float,
        decay: float = 0.5,
        warmup: float = 0.0,
        min_lr: float = 0.0,
        last_epoch: int = -1,
        verbose: bool = False,
    ):
        if not num_steps > 0:
            raise ValueError(f"num_steps must be positive, got {num_steps}")
        numbers.non_negative(decay=decay)
        self.num_steps = num_steps
        self.decay = decay
        super().__init__(optimizer, warmup, min_lr, last_epoch)

    def factor(self, step: int) -> float:
        return self.decay ** (step / self.num_steps)


class ConstantLRWithWarmup(_WarmupLR):
    """A constant learning rate, after the warm-up of `InverseLR`. `verbose` has no effect."""

    def __init__(
        self,
        optimizer: optim.Optimizer,
        warmup: float = 0.0,
        last_epoch: int = -1,
        verbose: bool = False,
    ):
        super().__init__(optimizer, warmup, 0.0, last_epoch)


class _LinearWarmupLR(_WarmupLR):
    """min(1, (k + 1) / warmup_steps) times the decayed rate at step k.

    A rate below min_lr, as of a group of its own, doesn't decay.
    """

    def __init__(
        self, optimizer: optim.Optimizer, warmup_steps: int, min_lr: float, last_epoch: int
    ):
        numbers.non_negative(warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, 0.0, min_lr, last_epoch)

    def ramp(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup_steps))

    def end(self, lr: Any) -> Any:
        return min(self.min_lr, lr)

    def decayed(self, lr: Any, step: int) -> Any:
        return max(self.end(lr), lr * self.factor(step))


class CosineLR(_LinearWarmupLR):
    """Half a cosine from lr, at the end of a linear warm-up, to min_lr, at step `num_steps`.

    From there on the rate stays. warmup_steps: 0 for no warm-up. A rate below min_lr, as of a group
    of its own, doesn't decay. Raises ValueError unless num_steps > warmup_steps.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        num_steps: int,
        warmup_steps: int = 0,
        min_lr: float = 0.0,
        last_epoch: int = -1,
    ):
        if not num_steps > warmup_steps:
            raise ValueError(f"num_steps {num_steps} must be above warmup_steps {warmup_steps}")
        self.num_steps = num_steps
        super().__init__(optimizer, warmup_steps, min_lr, last_epoch)

    def factor(self, step: int) -> float:
        share = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        return (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2

    def decayed(self, lr: Any, step: int) -> Any:
        end = self.end(lr)
        return end + (lr - end) * self.factor(step)


class InverseSqrtLR(_LinearWarmupLR):
    """lr / sqrt(max(1, k / decay_start)) at step k, after a linear warm-up.

    The schedule of EDM2 (arXiv:2312.02696). warmup_steps: 0 for no warm-up. min_lr bounds the
    decay; a rate below it doesn't decay. Raises ValueError unless decay_start > 0.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        decay_start: float,
        warmup_steps: int = 0,
        min_lr: float = 0.0,
        last_epoch: int = -1,
    ):
        numbers.positive(decay_start=decay_start)
        self.decay_start = decay_start
        super().__init__(optimizer, warmup_steps, min_lr, last_epoch)

    def factor(self, step: int) -> float:
        return max(1.0, step / self.decay_start) ** -0.5
