"""CLIP (arXiv:2103.00020): unit embeddings of images and texts, and a loss between them."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.text import need, unknown_name

# OpenAI's names and open_clip's: these weights were trained with the quick form of GELU.
MODELS = {
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
    "RN50x4": "RN50x4-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
    "RN50x64": "RN50x64-quickgelu",
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}


class CLIPEncoder(nn.Module):
    """Embeds images and texts as unit vectors, (n, d), comparable with each other.

    model: has `encode_image(images)` and `encode_text(tokens)`, and optionally a `visual` with its
    `image_size`, `image_mean` and `image_std`. tokenize: texts -> tokens (n, ...).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], Tensor]):
        super().__init__()
        self.model = model
        self.tokenize = tokenize
        visual = getattr(model, "visual", None)
        size = getattr(visual, "image_size", 224)
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        for name, default in (
            ("mean", (0.48145466, 0.4578275, 0.40821073)),
            ("std", (0.26862954, 0.26130258, 0.27577711)),
        ):
            values = getattr(visual, f"image_{name}", None) or default
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def encode_images(self, images: Tensor) -> Tensor:
        """The embeddings of images (n, c, h, w) in [-1, 1], c of 3 or 1; differentiable.

        Images of any size are resized, whole, to the model's. Raises ValueError for another c.
        """
        if images.ndim != 4 or images.shape[1] not in {1, 3}:
            raise ValueError(
                f"CLIP sees images (n, c, h, w) of 3 channels, or 1 for greyscale; got shape "
                f"{tuple(images.shape)}"
            )
        images = images.to(self.mean.dtype)
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        # greyscale becomes three channels here
        normalized = ((images + 1) / 2 - self.mean) / self.std
        return F.normalize(self.model.encode_image(normalized).float(), dim=-1)  # type: ignore[operator]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of texts."""
        tokens = self.tokenize(list(texts)).to(self.mean.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]


def load_clip(
    name: str = "ViT-B/16",
    device: torch.device | str = "cpu",
    pretrained: str | None = "openai",
) -> CLIPEncoder:
    """OpenAI's CLIP by one of the names in MODELS, frozen; its weights are downloaded once.

    pretrained: open_clip's tag of the weights, None for random ones. Raises ValueError for an
    unknown name, ImportError without open_clip.
    """
    if name not in MODELS:
        raise unknown_name("CLIP model", name, MODELS)
    open_clip: Any = need("open_clip", f"the CLIP model {name}", '"k-diffusion[clip]"')
    logging.getLogger(__name__).debug("loading CLIP %s (%s)", MODELS[name], pretrained)
    model = open_clip.create_model(MODELS[name], pretrained=pretrained, device=device)
    encoder = CLIPEncoder(model, open_clip.get_tokenizer(MODELS[name]))
    return encoder.to(device).eval().requires_grad_(False)


def squared_spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Half of the squared angle between unit vectors, (..., d) -> (...).

    x, y: (..., d). The angle is 2 atan2(|x - y|, |x + y|), exact and with a gradient near 0 and pi
    also.
    """
    chord, other = (torch.linalg.vector_norm(z, dim=-1) for z in (x - y, x + y))
    return 2 * torch.atan2(chord, other) ** 2


def prompt_loss(encoder: CLIPEncoder, prompt: str) -> Callable[[Tensor], Tensor]:
    """The loss of images (n, c, h, w) against a text, (n,): for `GradientGuidedDenoiser`."""
    target = encoder.encode_texts([prompt])
    return lambda images: squared_spherical_distance(encoder.encode_images(images), target)
