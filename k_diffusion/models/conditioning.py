"""How both transformers are told the noise level, the augmentation, the class, and more."""

from collections.abc import Callable

import torch
from torch import nn

from ..augmentation import COND_DIM
from .checks import check_classes, check_shape
from .embeddings import FourierFeatures, Uncertainty
from .transformer import Linear, MappingNetwork, log_sigma, tag_module, tagged_param_groups


class ConditionedModel(nn.Module):
    """A model with a mapping network, which sums up its conditions for every adaptive norm."""

    takes_aug_cond = True
    # The first and last layers, whose matrices Muon leaves alone; models add theirs.
    outer_layers: tuple[str, ...] = ("time_in_proj", "aug_in_proj", "mapping_cond_in_proj")

    def add_conditioning(
        self,
        make_mapping: Callable[[], MappingNetwork],
        width: int,
        num_classes: int,
        mapping_cond_dim: int = 0,
    ) -> None:
        """Add the embeddings, then the mapping network.

        num_classes: rows of the table of class embeddings; 0 for none. A method and not the
        constructor, and a function to make the network: saved optimizer states go by the order of
        parameters, and initial weights by the order of their draws.
        """
        self.num_classes = num_classes
        self.mapping_cond_dim = mapping_cond_dim
        self.time_emb = FourierFeatures(1, width)
        self.time_in_proj = Linear(width, width, bias=False)
        self.aug_emb = FourierFeatures(COND_DIM, width)
        self.aug_in_proj = Linear(width, width, bias=False)
        self.class_emb = nn.Embedding(num_classes, width) if num_classes else None
        self.mapping_cond_in_proj = (
            Linear(mapping_cond_dim, width, bias=False) if mapping_cond_dim else None
        )
        self.mapping = tag_module(make_mapping(), "mapping")

    def add_uncertainty(self, wanted: bool) -> None:
        """Add the network of a learned loss weighting, if wanted; last, for the same reasons."""
        self.uncertainty = Uncertainty() if wanted else None

    def with_uncertainty(
        self, output: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's output, (n, ...), and u, (n,). sigma: (n,). Raises ValueError without u."""
        if self.uncertainty is None:
            raise ValueError("return_uncertainty needs a model built with learned_weighting=True")
        return output, self.uncertainty(sigma)

    def condition(
        self,
        sigma: torch.Tensor,
        aug_cond: torch.Tensor | None = None,
        class_cond: torch.Tensor | None = None,
        mapping_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mapping network's output, (n, width). sigma: (n,). The others: as in `forward`.

        aug_cond: (n, 9). class_cond: (n,). mapping_cond: (n, mapping_cond_dim). Raises ValueError
        for other shapes, and for conditions missing or not known to the model.
        """
        n, d = len(sigma), self.mapping_cond_dim
        check_shape("aug_cond", aug_cond, (n, COND_DIM), optional=True)
        check_shape("class_cond", class_cond, (n,), wanted=self.num_classes)
        check_classes(class_cond, self.num_classes)
        check_shape("mapping_cond", mapping_cond, (n, d), wanted=d)
        if aug_cond is None:
            aug_cond = sigma.new_zeros(n, COND_DIM)
        cond = self.time_in_proj(self.time_emb(log_sigma(sigma)[:, None] / 4))
        cond = cond + self.aug_in_proj(self.aug_emb(aug_cond))
        if self.class_emb is not None:
            cond = cond + self.class_emb(class_cond)
        if self.mapping_cond_in_proj is not None and mapping_cond is not None:
            cond = cond + self.mapping_cond_in_proj(mapping_cond.to(cond.dtype))
        return self.mapping(cond)

    def param_groups(
        self, base_lr: float = 5e-4, mapping_lr_scale: float = 1 / 3
    ) -> list[dict[str, object]]:
        """Optimizer groups: main with and without weight decay, then the mapping network's."""
        return tagged_param_groups(self, base_lr, mapping_lr_scale)


def with_image(x: torch.Tensor, unet_cond: torch.Tensor | None, channels: int) -> torch.Tensor:
    """A model's input with the image that it is conditioned on as further channels.

    x: (n, c, h, w). unet_cond: (n, channels, h, w), None where a model has 0 channels of it.
    Raises ValueError for another shape.
    """
    check_shape("unet_cond", unet_cond, (len(x), channels, *x.shape[2:]), wanted=channels)
    return x if unet_cond is None else torch.cat([x, unet_cond.to(x.dtype)], dim=1)
