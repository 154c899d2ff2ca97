"""Exponential moving averages of weights and of scalars, and the warm-up of their decay."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..common import numbers
from ..common.shards import local

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
Values = TypeVar("Values", bound=dict[str, Any])


class EMAWarmup:
    """The decay of an EMA whose memory grows with training: 1 - (1 + k / inv_gamma)^-power.

    k counts the calls of `step` since `start_at`; before `start_at` the decay is min_value (0
    makes the average a copy). Power 1 gives the arithmetic mean of all steps; power 2/3 reaches
    0.999 at 31.6K steps and 0.9999 at 1M. The result is kept between min_value and max_value.
    """

    def __init__(
        self,
        inv_gamma: float = 1.0,
        power: float = 1.0,
        min_value: float = 0.0,
        max_value: float = 1.0,
        start_at: int = 0,
        last_epoch: int = 0,
    ):
        if not inv_gamma > 0:
            raise ValueError(f"inv_gamma must be positive, got {inv_gamma}")
        numbers.finite(power=power)
        if not 0 <= min_value <= max_value <= 1:
            raise ValueError(
                f"a decay needs 0 <= min_value <= max_value <= 1, got {min_value} and {max_value}"
            )
        self.inv_gamma = inv_gamma
        self.power = power
        self.min_value = min_value
        self.max_value = max_value
        self.start_at = start_at
        self.last_epoch = last_epoch

    def state_dict(self) -> dict[str, Any]:
        """Everything the decay depends on."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. Raises ValueError where a value is missing."""
        missing = vars(self).keys() - state_dict.keys()
        if missing:
            raise ValueError(f"EMA warm-up state lacks {', '.join(sorted(missing))}")
        vars(self).update({key: state_dict[key] for key in vars(self)})

    def get_value(self) -> float:
        """The decay of the next `ema_update`."""
        step = self.last_epoch - self.start_at
        if step < 0:
            return self.min_value
        value = 1 - (1 + step / self.inv_gamma) ** -self.power
        return min(self.max_value, max(self.min_value, value))

    def step(self) -> None:
        self.last_epoch += 1


@torch.no_grad()
def ema_update(model: nn.Module, averaged_model: nn.Module, decay: float) -> None:
    """averaged = decay averaged + (1 - decay) model, in place, for parameters; buffers are copied.

    The models must have the same parameters and buffers, of the same shapes; devices and dtypes
    may differ; of models split over processes, each averages its shards. Raises ValueError where
    they don't match (unwrap a DDP or compiled model first).
    """
    decay = float(decay)
    numbers.share(decay=decay)
    weight = 1 - decay
    pairs = _pairs("parameters", model.named_parameters(), averaged_model.named_parameters())
    for averaged, current in _by_kind(pairs):
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:
            torch._foreach_copy_(averaged, current)
    pairs = _pairs("buffers", model.named_buffers(), averaged_model.named_buffers())
    for averaged, current in _by_kind(pairs):
        torch._foreach_copy_(averaged, current)


def _pairs(
    what: str,
    current: Iterable[tuple[str, torch.Tensor]],
    averaged: Iterable[tuple[str, torch.Tensor]],
) -> Pairs:
    """(averaged, current) tensors by name."""
    new, old = dict(current), dict(averaged)
    wrong = sorted(new.keys() ^ old.keys())
    wrong += sorted(k for k in new.keys() & old.keys() if new[k].shape != old[k].shape)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the model and its average differ in their {what}: {', '.join(wrong[:3])}{more}; "
            "unwrap a DDP or compiled model first, and make the average by copy.deepcopy(model)"
        )
    return [(local(old[k]), local(new[k])) for k in old]


def _by_kind(pairs: Pairs) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Lists of one device and dtype each: the foreach kernels are fast on these alone. Tensors that
    have to be converted come one by one, so that no second model is in memory."""
    groups: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]]
    groups = defaultdict(lambda: ([], []))
    others = []
    for averaged, current in pairs:
        kind = averaged.device, averaged.dtype
        if kind != (current.device, current.dtype):
            others.append((averaged, current))
            continue
        groups[kind][0].append(averaged)
        groups[kind][1].append(current)
    yield from groups.values()
    for averaged, current in others:
        yield [averaged], [current.to(averaged)]


def ema_update_dict(values: Values, updates: Mapping[str, Any], decay: float) -> Values:
    """Update a dict of moving averages in place and return it; a new key starts at its value.

    Averages that are tensors are changed in place too.
    """
    numbers.share(decay=decay)
    for key, value in updates.items():
        if key in values:
            values[key] *= decay
            values[key] += (1 - decay) * value
        else:
            values[key] = value
    return values
