"""CLIP (arXiv:2103.00020): unit embeddings of images and texts, and a loss between them."""

import logging
from collections.abc import Callable, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.files import PathLike
from ..common.text import need, unknown_name
from .base import Encoder
from .weights import given_file, unavailable

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


class CLIPEncoder(Encoder):
    """Embeds images and texts as unit vectors, (n, width), comparable with each other.

    model: has `encode_image(images)` and `encode_text(tokens)`, and optionally a `visual` with its
    `image_size`, `image_mean` and `image_std`. tokenize: texts -> tokens (n, ...).
    """

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], Tensor]):
        visual = getattr(model, "visual", None)
        size = getattr(visual, "image_size", 224)
        mean = getattr(visual, "image_mean", None) or (0.48145466, 0.4578275, 0.40821073)
        std = getattr(visual, "image_std", None) or (0.26862954, 0.26130258, 0.27577711)
        super().__init__("clip", 0, size if isinstance(size, int) else tuple(size), mean, std)
        self.model = model
        self.tokenize = tokenize
        with torch.no_grad():
            parameter = next(model.parameters())
            self.to(parameter)
            blank = parameter.new_zeros(1, 3, *(self.size or ()))
            self.width = self.network(blank).shape[1]

    def network(self, x: Tensor) -> Tensor:
        """The unit embeddings (n, width) of normalized images x (n, 3, h, w); differentiable."""
        return F.normalize(self.model.encode_image(x).float(), dim=-1)  # type: ignore[operator]

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

    pretrained: open_clip's tag of the weights, or the path of a file of them; None for random ones.
    Raises ValueError for an unknown name or a file that has no such weights, ImportError without
    open_clip, OSError where the download fails.
    """
    if name not in MODELS:
        raise unknown_name("CLIP model", name, MODELS)
    what = f"the CLIP model {name}"
    open_clip: Any = need("open_clip", what, '"k-diffusion[clip]"')
    logging.getLogger(__name__).debug("loading CLIP %s (%s)", MODELS[name], pretrained)
    is_tag = pretrained is None or pretrained in open_clip.list_pretrained_tags_by_model(
        MODELS[name]
    )
    if not is_tag:
        given_file(str(pretrained), what)
    try:
        model = open_clip.create_model(MODELS[name], pretrained=pretrained, device=device)
    except (OSError, RuntimeError, UnpicklingError) as error:
        if not is_tag:
            raise ValueError(f"{pretrained} has no weights of {what}: {error}") from error
        hub = f"the hub's {MODELS[name]} ({pretrained})"
        raise unavailable(what, error, hub, "the hub's cache ($HF_HOME)") from error
    return CLIPEncoder(model, open_clip.get_tokenizer(MODELS[name])).freeze(device)


def make_clip(
    weights: PathLike | None = None,
    device: torch.device | str = "cpu",
    model: str = "ViT-L/14@336px",
) -> CLIPEncoder:
    """CLIP by one of the names in MODELS, that of CMMD by default, as an encoder of images.

    weights: a file of them; else OpenAI's are downloaded by open_clip, to its cache. Raises as
    `load_clip` does.
    """
    return load_clip(model, device, "openai" if weights is None else str(weights))


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
