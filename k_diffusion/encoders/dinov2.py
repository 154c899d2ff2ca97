"""DINOv2 (arXiv:2304.07193): the class token's features, as the authors' hub code computes them."""

from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import hub
from ..common.files import PathLike
from ..common.text import need, unknown_name
from .base import Encoder
from .weights import given_file

# The hub's names and timm's, without registers.
MODELS = {
    "vits14": "vit_small_patch14_dinov2.lvd142m",
    "vitb14": "vit_base_patch14_dinov2.lvd142m",
    "vitl14": "vit_large_patch14_dinov2.lvd142m",
    "vitg14": "vit_giant_patch14_dinov2.lvd142m",
}
_TRAINED_AT = 518


class DINOv2(Encoder):
    """A vision transformer of DINOv2 on images of 224 x 224, with patches of 14.

    model: timm's, for that size.
    """

    def __init__(self, name: str, model: nn.Module):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        super().__init__(name, model.num_features, 224, mean, std)  # type: ignore[arg-type]
        self.model = model

    def network(self, x: Tensor) -> Tensor:
        """The class token (n, width) of normalized images x (n, 3, 224, 224)."""
        return self.model(x)


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings for a grid of side x side patches, as the hub's model computes them.

    positions: (1, 1 + s * s, d), that of the class token first; so is the result, (1, 1 + side *
    side, d). The hub enlarges by (side + 0.1) / s, without antialiasing; timm uses the sizes alone,
    with it.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).movedim(3, 1)
    factor = (side + 0.1) / old
    grid = F.interpolate(grid.float(), scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).mT.to(positions.dtype)], 1)


def make_dinov2(
    model: str = "vitl14", weights: PathLike | None = None, device: torch.device | str = "cpu"
) -> DINOv2:
    """DINOv2 by one of the names in MODELS; ViT-L/14 is that of the FD_DINOv2.

    weights: a file of the authors' or timm's weights; else timm's are downloaded to the Hugging
    Face hub's cache (1.2 GB for ViT-L/14). Raises ValueError for an unknown name or another model's
    weights, ImportError without timm, OSError where the download fails.
    """
    if model not in MODELS:
        raise unknown_name("DINOv2 model", model, MODELS)
    name = "dinov2" if model == "vitl14" else f"dinov2-{model}"
    timm: Any = need("timm", f"the encoder {name}", '"k-diffusion[eval]"')
    if weights is None:
        repo = timm.get_pretrained_cfg(MODELS[model]).hf_hub_id
        path = hub.download_file(repo, "model.safetensors", f"the weights of the encoder {name}")
    else:
        path = given_file(weights, name)
    try:
        trained = timm.create_model(
            MODELS[model],
            pretrained=True,
            num_classes=0,
            img_size=_TRAINED_AT,
            pretrained_cfg_overlay={"file": str(path)},
        )
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{path} has no weights of {name}: {error}") from error
    state = trained.state_dict()
    state["pos_embed"] = resample_positions(state["pos_embed"], 224 // 14)
    vit = timm.create_model(MODELS[model], pretrained=False, num_classes=0, img_size=224)
    vit.load_state_dict(state)
    return DINOv2(name, vit).freeze(device)
