"""All that resuming a run needs, as one object."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import utils
from .checkpoint import load_weights


@dataclass
class TrainState:
    """A training run at one moment.

    model, model_ema: the inner models, unwrapped. step: optimizer steps done. samples: images seen,
    by all processes. Random numbers are a function of (seed, step) and (seed, sample), so the seed
    is all there is to keep of them.
    """

    config: dict[str, Any]
    model: nn.Module
    model_ema: nn.Module
    opt: torch.optim.Optimizer
    sched: torch.optim.lr_scheduler.LRScheduler
    ema_sched: utils.EMAWarmup
    seed: int
    dataset_length: int
    step: int = 0
    samples: int = 0
    elapsed: float = 0.0
    ema_stats: dict[str, float] = field(default_factory=dict)
    demo_gen: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.demo_gen.manual_seed(self.seed)

    @property
    def epoch(self) -> int:
        """Whole passes over the data set."""
        return self.samples // self.dataset_length

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the published keys, and `samples` and `seed`."""
        return {
            "config": self.config,
            "model": self.model.state_dict(),
            "model_ema": self.model_ema.state_dict(),
            "opt": self.opt.state_dict(),
            "sched": self.sched.state_dict(),
            "ema_sched": self.ema_sched.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "gns_stats": None,
            "ema_stats": self.ema_stats,
            "demo_gen": self.demo_gen.get_state(),
            "elapsed": self.elapsed,
            "samples": self.samples,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any], source: object) -> None:
        """Take over a checkpoint read from `source`; one of older versions may lack keys.

        Raises CheckpointError, before anything is changed, if its weights don't fit the model.
        """
        load_weights(self.model, state["model"], source)
        load_weights(self.model_ema, state.get("model_ema", state["model"]), source)
        for name in ("opt", "sched", "ema_sched"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        self.step = int(state.get("step", 0))
        # older versions counted epochs alone
        self.samples = int(state.get("samples", state.get("epoch", 0) * self.dataset_length))
        self.seed = int(state.get("seed", self.seed))
        self.elapsed = float(state.get("elapsed", 0.0))
        self.ema_stats = dict(state.get("ema_stats") or {})
        if "demo_gen" in state:
            self.demo_gen.set_state(state["demo_gen"])

    def reset_ema(self) -> None:
        """Start the averaged weights anew from the current ones."""
        self.model_ema.load_state_dict(self.model.state_dict())
        self.ema_sched.last_epoch = 0
