"""Muon for hidden matrices with AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..common.shards import join_like, local, split_like, whole

# Of Newton-Schulz's iteration: a x + b x^3 + c x^5 brings each singular value near 1 in 5 steps.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
# So many numbers are made orthogonal at once at most, beyond which more at once win nothing.
NUMBERS_AT_ONCE = 2**25


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


@torch.no_grad()
def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Each matrix with its singular values brought near 1, U S V^T to about U V^T.

    x: (n, rows, columns). Newton-Schulz's iteration of Muon (arXiv:2502.16982), in float32 on CPUs,
    most of which have no fast products in bfloat16, and in bfloat16 elsewhere.
    """
    dtype, tall = x.dtype, x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the products are then of the shorter side
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (arXiv:2502.16982) for some parameters and AdamW for the others.

    Muon's momentum is made orthogonal and scaled by 0.2 sqrt(max(rows, columns)), so that its steps
    have the size of AdamW's, whose learning rate and weight decay serve for both. These are the
    steps of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, but for all matrices of a shape
    at once.

    groups: of the parameters, in which those of `matrices`, each (rows, columns), are Muon's.
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
        self.adamw = torch.optim.AdamW(
            _those(groups, lambda p: p not in matrices),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        muon = _those(groups, lambda p: p in matrices)
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
        }
        super().__init__([*({**options, **group} for group in muon), *self.adamw.param_groups], {})
        self.matrix_groups = len(muon)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both. closure: computes the loss anew, as of any optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups[: self.matrix_groups]:
            self._muon_step(group)
        # Loading a state makes new groups and a new state: they are handed on at each step.
        self.adamw.param_groups = self.param_groups[self.matrix_groups :]
        self.adamw.state = self.state
        self.adamw.step()
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        """A step of the matrices of a group, of which each process may have some rows alone.

        They are put together to be made orthogonal, by all processes alike.
        """
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        momenta = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        if group["nesterov"]:
            momenta = list(torch._foreach_lerp(grads, momenta, group["momentum"]))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        joined = [join_like(x, p) for x, p in zip(momenta, params)]
        for same in _of_one_shape(joined):
            rows, columns = joined[same[0]].shape
            updates = orthogonalize(torch.stack([whole(joined[i]) for i in same]))
            own = [local(split_like(x, params[i])) for i, x in zip(same, updates)]
            rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            torch._foreach_add_([params[i] for i in same], own, alpha=-rate)


def _of_one_shape(matrices: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """The places of matrices, (rows, columns) each, by their shapes, NUMBERS_AT_ONCE at most."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(matrices):
        by_shape.setdefault(x.shape, []).append(i)
    for shape, places in by_shape.items():
        number = max(1, NUMBERS_AT_ONCE // shape.numel())
        for start in range(0, len(places), number):
            yield places[start : start + number]


def _those(
    groups: Sequence[dict[str, Any]], belongs: Callable[[torch.Tensor], bool]
) -> list[dict[str, Any]]:
    return [{**group, "params": [p for p in group["params"] if belongs(p)]} for group in groups]
