"""All that resuming a run needs, as one object."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError, check_weights
from ..checkpoints.snapshots import Branch
from ..common.shards import load_whole, split_of
from .ema import EMAWarmup
from .noise_levels import LossByLevel
from .noise_scale import NoiseScale
from .power_ema import PowerEMA
from .sharding import optimizer_state, split_optimizer_state


@dataclass
class TrainState:
    """A training run at one moment.

    model, model_ema: the inner models, unwrapped. scaler: of the gradients, in fp16. step: steps
    done. samples: images seen, by all processes. losses: of the steps since the last row of the
    log. levels: these losses by noise level. noise_scale: of the gradient, under --gns. power_ema:
    averages of --power-ema. branch: as of `branch_of`. run: what else the numbers depend on, such
    as the batch size. bad_steps: how many of the last steps in a row were skipped; bad_at: the last
    step skipped; trouble: the first one, since a checkpoint before which none was; all 0 if none
    were. Random numbers are a function of (seed, step) and (seed, sample), so the seed is all there
    is to keep of them.
    """

    config: dict[str, Any]
    model: nn.Module
    model_ema: nn.Module
    opt: torch.optim.Optimizer
    sched: torch.optim.lr_scheduler.LRScheduler
    ema_sched: EMAWarmup
    seed: int
    dataset_length: int
    scaler: Any = None
    noise_scale: NoiseScale | None = None
    power_ema: PowerEMA | None = None
    branch: Branch = ()
    step: int = 0
    samples: int = 0
    elapsed: float = 0.0
    losses: list[float] = field(default_factory=list)
    ema_stats: dict[str, float] = field(default_factory=dict)
    demo_gen: torch.Generator = field(default_factory=torch.Generator)
    run: dict[str, Any] = field(default_factory=dict)
    bad_steps: int = 0
    bad_at: int = 0
    trouble: int = 0
    levels: LossByLevel = field(default_factory=LossByLevel)
    whole: bool = True

    def __post_init__(self) -> None:
        self.demo_gen.manual_seed(self.seed)

    @property
    def epoch(self) -> int:
        """Whole passes over the data set."""
        return self.samples // self.dataset_length

    @property
    def split(self) -> Any:
        """A DTensor of the model, None where each process has all of it."""
        parts = map(split_of, self.model.parameters())
        return next((p for p in parts if p is not None), None)

    def skipped(self, step: int) -> None:
        """Take note that a step was skipped, as its loss or gradient was NaN or infinite."""
        self.bad_steps, self.bad_at, self.trouble = self.bad_steps + 1, step, self.trouble or step

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around changes that belong together: until they are done, `whole` is False."""
        self.whole = False
        yield
        self.whole = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the published keys, then those added here."""
        return {
            "config": self.config,
            "model": self.model.state_dict(),
            "model_ema": self.model_ema.state_dict(),
            "opt": optimizer_state(self.opt),
            "sched": self.sched.state_dict(),
            "ema_sched": self.ema_sched.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "gns_stats": self.noise_scale and self.noise_scale.estimate.state_dict(),
            "ema_stats": self.ema_stats,
            "demo_gen": self.demo_gen.get_state(),
            "elapsed": self.elapsed,
            "samples": self.samples,
            "seed": self.seed,
            "losses": self.losses,
            "run": {**self.run, "seed": self.seed},
            "loss_by_level": self.levels.state_dict(),
            "bad_steps": (self.bad_steps, self.bad_at, self.trouble),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "power_ema": self.power_ema and self.power_ema.state_dict(),
            "branch": list(self.branch),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: object) -> None:
        """Take over a checkpoint read from `source`; one of older versions may lack keys.

        Hyperparameters are this run's config's, the checkpoint says how far they are. Raises
        CheckpointError, before anything is changed, if it doesn't fit the model.
        """
        averaged = state.get("model_ema", state["model"])
        check_weights(self.model, state["model"], source)
        check_weights(self.model_ema, averaged, source)
        power_ema = state.get("power_ema") or {}
        if self.power_ema is not None:
            self.power_ema.check_state_dict(power_ema, source)
        if "opt" in state:
            self._load_optimizer(state["opt"], source)
        load_whole(self.model, state["model"])
        load_whole(self.model_ema, averaged)
        if "sched" in state:
            self._load_sched(int(state["sched"]["last_epoch"]))
        if "ema_sched" in state:
            self.ema_sched.last_epoch = int(state["ema_sched"]["last_epoch"])
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.step = int(state.get("step", 0))
        # older versions counted epochs alone
        self.samples = int(state.get("samples", state.get("epoch", 0) * self.dataset_length))
        if self.power_ema is not None:
            self.power_ema.load_state_dict(power_ema, self.samples)
        self.branch = list(state.get("branch") or ())
        self.seed = int(state.get("seed", self.seed))
        self.elapsed = float(state.get("elapsed", 0.0))
        self.losses = list(state.get("losses", ()))
        self.ema_stats = dict(state.get("ema_stats") or {})
        if self.noise_scale is not None and state.get("gns_stats"):
            self.noise_scale.estimate.load_state_dict(state["gns_stats"])
        self.levels.load_state_dict(state.get("loss_by_level") or {})
        self.bad_steps, self.bad_at, self.trouble = state.get("bad_steps", (0, 0, 0))
        if "demo_gen" in state:
            self.demo_gen.set_state(state["demo_gen"])

    def _load_optimizer(self, saved: Mapping[str, Any], source: object) -> None:
        groups = self.opt.state_dict()["param_groups"]
        params = [p for group in self.opt.param_groups for p in group["params"]]
        sizes, saved_sizes = (
            [len(group["params"]) for group in g] for g in (groups, saved["param_groups"])
        )
        wrong = [
            key
            for i, values in saved["state"].items()
            for key, x in values.items()
            if isinstance(x, torch.Tensor) and x.ndim and x.shape != _shape(params[i])
        ]
        if sizes != saved_sizes or wrong:
            raise CheckpointError(
                f"the optimizer's state in {source} is not of this optimizer and model: parameters "
                f"per group {saved_sizes}, here {sizes}; convert it and pass --resume-inference to "
                "start from its weights alone"
            )
        own = split_optimizer_state(self.opt, {"state": saved["state"], "param_groups": groups})
        self.opt.load_state_dict(own)

    def _load_sched(self, steps: int) -> None:
        self.sched.last_epoch = steps
        rates = self.sched.get_lr()
        for group, rate in zip(self.opt.param_groups, rates):
            group["lr"] = rate
        self.sched.load_state_dict({"_step_count": steps + 1, "_last_lr": rates})

    def reset_ema(self) -> None:
        """Go on from the averaged weights, both with the model and with new averages of it."""
        self.model.load_state_dict(self.model_ema.state_dict())
        self.ema_sched.last_epoch = 0
        if self.power_ema is not None:
            self.power_ema.begin(self.samples)
        self.ema_stats = {}


def _shape(p: torch.Tensor) -> torch.Size:
    whole = split_of(p)
    return p.shape if whole is None else whole.shape
