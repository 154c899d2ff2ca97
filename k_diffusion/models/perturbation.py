"""Transformers weakened on purpose, for guidance away from their estimates."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .conditioning import ConditionedModel


@dataclass(frozen=True)
class Perturbation:
    """Which blocks of a transformer to weaken in a forward pass.

    skip: blocks that pass their input on (skip-layer guidance). identity: blocks whose attention
    map is replaced by the identity, so that every token gets its own value (perturbed-attention
    guidance, arXiv 2403.17377). Both name blocks as `state_dict` does, "mid_level.3" or "blocks.3",
    or by a prefix all of those under it, "mid_level". The models take it as an argument of
    `forward`.
    """

    skip: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless the model has a transformer, and it has all that is named."""
        found = next((m for m in model.modules() if isinstance(m, ConditionedModel)), None)
        if found is None:
            raise ValueError(
                f"only image transformers can be perturbed, {type(model).__name__} has none; use "
                "an image_transformer_v1 or image_transformer_v2"
            )
        named = {n: m for n, m in found.named_modules() if getattr(m, "compile_unit", False)}
        with_attention = [n for n, m in named.items() if m.self_attn is not None]
        for what, entries, names in (
            ("blocks", self.skip, list(named)),
            ("blocks with attention", self.identity, with_attention),
        ):
            for entry in entries:
                if not any(_under(name, entry) for name in names):
                    raise ValueError(
                        f"{entry!r} names no {what} of the model; it has {', '.join(names)}"
                    )

    def skips(self, name: str) -> bool:
        """Whether a block passes its input on."""
        return any(_under(name, entry) for entry in self.skip)

    def unmixes(self, name: str) -> bool:
        """Whether a block's attention map is the identity."""
        return any(_under(name, entry) for entry in self.identity)


def _under(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    pos: torch.Tensor,
    cond: torch.Tensor,
    perturbation: Perturbation | None,
    name: str,
    **more: Any,
) -> torch.Tensor:
    """A transformer's blocks, one after the other. name: of their list in the model.

    x: (n, h, w, width). pos: (h, w, 2). cond: (n, cond_features). more: what else blocks take.
    """
    for i, block in enumerate(blocks):
        if perturbation is None:
            x = block(x, pos, cond, **more)
        elif not perturbation.skips(f"{name}.{i}"):
            x = block(x, pos, cond, perturbation.unmixes(f"{name}.{i}"), **more)
    return x
