"""Muon for hidden matrices with AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..common.shards import join_like, local, split_like, split_of, whole


def hidden_matrices(model: nn.Module) -> set[torch.Tensor]:
    """The weights of linear layers between a model's first and last, each side larger than 1.

    Embeddings, convolutions, biases and scales are none, nor the layers that a module's
    `outer_layers` names.
    """
    outer = {
        p
        for module in model.modules()
        for name, p in module.named_parameters()
        if name.startswith(tuple(f"{layer}." for layer in getattr(module, "outer_layers", ())))
    }
    weights: set[torch.Tensor] = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return {w for w in weights - outer if min(w.shape) > 1}


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon (arXiv:2502.16982) for some parameters and AdamW for the others.

    Muon's momentum is made orthogonal, in bfloat16, and scaled by 0.2 sqrt(max(rows, columns)), so
    that its steps have the size of AdamW's, whose learning rate and weight decay serve for both.
    groups: of the parameters, in which those of `matrices`, each (rows, columns), are Muon's.
    Raises ImportError where torch has no Muon.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        matrices: set[torch.Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"optimizer muon needs torch 2.9 or newer, this is {torch.__version__}; install it "
                'with: pip install "torch>=2.9"'
            )
        muon = torch.optim.Muon(
            _those(groups, lambda p: p in matrices),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(
            _those(groups, lambda p: p not in matrices),
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
        )
        self.parts = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both. closure: computes the loss anew, as of any optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon, adamw = self.parts
        # Loading a state makes new groups and a new state: they are handed on at each step.
        n = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:n], self.param_groups[n:]
        for part in self.parts:
            part.state = self.state
        if any(split_of(p) is not None for group in muon.param_groups for p in group["params"]):
            self._step_of_shards(muon.param_groups)
        else:
            muon.step()
        adamw.step()
        return loss

    def _step_of_shards(self, groups: Sequence[dict[str, Any]]) -> None:
        """Muon's step where each process has rows of every matrix, and of its momentum.

        They are put together to be made orthogonal, one matrix after the other, by all processes
        alike.
        """
        keys = "lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"
        for group in groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                rows = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = whole(join_like(rows, p))
                # what Muon does to zeros, without momentum and decay, is the change of the weights
                change = nn.Parameter(torch.zeros_like(update))
                change.grad = update
                options = {key: group[key] for key in keys}
                torch.optim.Muon(
                    [change], momentum=0.0, nesterov=False, weight_decay=0.0, **options
                ).step()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(local(split_like(change.detach(), p)))


def _those(
    groups: Sequence[dict[str, Any]], belongs: Callable[[torch.Tensor], bool]
) -> list[dict[str, Any]]:
    return [{**group, "params": [p for p in group["params"] if belongs(p)]} for group in groups]
