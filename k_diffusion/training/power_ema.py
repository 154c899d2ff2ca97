"""Power-function averages of weights (EDM2, arXiv:2312.02696) as a run keeps them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoints import check_weights
from ..checkpoints.snapshots import gamma_of
from ..common.shards import load_whole
from .ema import ema_update


@dataclass
class _Profile:
    """An average. began: images that the run had seen before; images: its time t since then."""

    gamma: float
    model: nn.Module
    began: int
    images: int = 0


class PowerEMA:
    """Averages of a model's parameters by power-function profiles, in float32; buffers are copied.

    At time t, in images after the step, the decay is (1 - dt / t)^(gamma + 1), where dt are the
    images since the update before. Each average is then exactly the integral of its profile over
    the weights. The first decay is 0: initial weights never count. widths: sigma_rel of the
    profiles. samples: images that the run has seen. place: puts each average where it is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Sequence[float],
        samples: int = 0,
        place: Callable[[nn.Module], nn.Module] = lambda model: model,
    ):
        self.profiles = {
            w: _Profile(gamma_of(w), place(_in_float32(model)), samples) for w in widths
        }

    def update(self, model: nn.Module, samples: int) -> None:
        """Average the weights after a step. samples: images that the run has seen, it included."""
        for profile in self.profiles.values():
            t = samples - profile.began
            ema_update(model, profile.model, (profile.images / t) ** (profile.gamma + 1))
            profile.images = t

    def begin(self, samples: int) -> None:
        """Begin all averages anew."""
        for profile in self.profiles.values():
            profile.began, profile.images = samples, 0

    def state_dict(self) -> dict[float, dict[str, Any]]:
        """Of each width, what resuming and a snapshot need."""
        return {
            width: {
                "began": profile.began,
                "images": profile.images,
                "buffers": [name for name, _ in profile.model.named_buffers()],
                "weights": profile.model.state_dict(),
            }
            for width, profile in self.profiles.items()
        }

    def check_state_dict(self, state: Mapping[float, Mapping[str, Any]], source: object) -> None:
        """Raises CheckpointError unless the state's averages are of this model."""
        for width in self.profiles.keys() & state.keys():
            check_weights(self.profiles[width].model, state[width]["weights"], source)

    def load_state_dict(self, state: Mapping[float, Mapping[str, Any]], samples: int) -> None:
        """Go on with the averages of a `state_dict`; widths that it lacks begin now."""
        self.begin(samples)
        for width in self.profiles.keys() & state.keys():
            profile, saved = self.profiles[width], state[width]
            load_whole(profile.model, saved["weights"])
            profile.began, profile.images = int(saved["began"]), int(saved["images"])


def _in_float32(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for p in copied.parameters():
        if p.is_floating_point():
            p.data = p.data.to(torch.float32)
    return copied
