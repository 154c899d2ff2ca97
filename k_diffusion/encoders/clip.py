"""CLIP (arXiv:2103.00020): unit embeddings of images and texts, and a loss between them."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import hub
from ..common.files import PathLike, sha256
from ..common.text import need, unknown_name
from .base import Encoder
from .weights import given_file

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


def model_name(name: str) -> str:
    """One of the names in MODELS. Raises ValueError for any other."""
    if name not in MODELS:
        raise unknown_name("CLIP model", name, MODELS)
    return name


def load_clip(
    name: str = "ViT-B/16",
    device: torch.device | str = "cpu",
    pretrained: str | None = "openai",
) -> CLIPEncoder:
    """OpenAI's CLIP by one of the names in MODELS, frozen; its weights are downloaded once.

    pretrained: open_clip's tag of the weights, or the path of a file of them, which may be the one
    that OpenAI's package `clip` downloads; None for random ones. Raises ValueError for an unknown
    name or a file that has no such weights, ImportError without open_clip, OSError where the
    download fails.
    """
    what = f"the CLIP model {model_name(name)}"
    open_clip: Any = need("open_clip", what, '"k-diffusion[clip]"')
    logging.getLogger(__name__).debug("loading CLIP %s (%s)", MODELS[name], pretrained)
    tag = open_clip.get_pretrained_cfg(MODELS[name], pretrained or "")
    if tag.get("hf_hub"):
        repo, _, file = tag["hf_hub"].rpartition("/")
        file = file or "open_clip_model.safetensors"
        pretrained = str(hub.download_file(repo, file, f"the weights of {what}"))
    elif pretrained is not None and not tag:
        given_file(pretrained, what)
    openai = open_clip.get_pretrained_url(MODELS[name], "openai").split("/")[-2]
    scripted = not tag and pretrained is not None and sha256(Path(pretrained)) == openai
    try:
        model = open_clip.create_model(
            MODELS[name], pretrained=None if scripted else pretrained, device=device
        )
        if scripted:
            model.load_state_dict(_scripted_weights(str(pretrained)))
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{pretrained} has no weights of {what}: {error}") from error
    return CLIPEncoder(model, open_clip.get_tokenizer(MODELS[name])).freeze(device)


def _scripted_weights(path: str) -> dict[str, Tensor]:
    """The weights in OpenAI's own file, which is TorchScript and has three numbers among them."""
    state = torch.jit.load(path, map_location="cpu").state_dict()
    numbers = {"input_resolution", "context_length", "vocab_size"}
    return {key: value for key, value in state.items() if key not in numbers}


def make_clip(
    weights: PathLike | None = None,
    device: torch.device | str = "cpu",
    model: str = "ViT-L/14@336px",
) -> CLIPEncoder:
    """CLIP by one of the names in MODELS, that of CMMD by default, as an encoder of images.

    weights: a file of them; else OpenAI's are downloaded to the Hugging Face hub's cache. Raises as
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


class PromptLoss:
    """A weighted sum of images' distances to prompts, for `GradientGuidedDenoiser`.

    targets: (k, width), unit embeddings of texts or images. weights: k numbers; a negative one
    pushes away. shift: the largest random shift of the images before CLIP sees them, as a fraction
    of their sides, which keeps guidance from changing pixels that CLIP alone notices. All images
    get the same shift, a new one at each call; the sequence starts anew with every run of a
    sampler, so that an image depends on its seed alone, whatever its batch.
    """

    def __init__(
        self, encoder: CLIPEncoder, targets: Tensor, weights: Sequence[float], shift: float = 0.0
    ):
        if len(weights) != len(targets):
            raise ValueError(f"{len(targets)} prompts need as many weights, got {len(weights)}")
        if not 0 <= shift < 1:
            raise ValueError(f"shift is a fraction of the image, from 0 to below 1, got {shift}")
        self.encoder, self.targets, self.shift = encoder, targets, shift
        self.weights = torch.tensor(weights, device=targets.device)
        self.start_run()

    def start_run(self) -> None:
        """Start the sequence of shifts anew."""
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, images: Tensor) -> Tensor:
        """The loss (n,) of images (n, c, h, w) in [-1, 1]."""
        if self.shift:
            images = self.encoder.resized(images)
            offset = self.shift * (2 * torch.rand(2, generator=self.generator) - 1)
            images = shifted(images, *offset.tolist())
        embeddings = self.encoder.encode_images(images)
        distances = squared_spherical_distance(embeddings[:, None], self.targets)
        return (distances * self.weights).sum(1)


def shifted(images: Tensor, down: float, right: float) -> Tensor:
    """Images shifted by fractions of their sides, bilinearly; their borders are continued.

    images: (n, c, h, w).
    """
    theta = images.new_tensor([[1, 0, -2 * right], [0, 1, -2 * down]])
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def prompt_loss(
    encoder: CLIPEncoder,
    texts: str | Sequence[str] = (),
    weights: Sequence[float] | None = None,
    images: Sequence[Tensor] = (),
    shift: float = 0.0,
) -> PromptLoss:
    """The loss of images (n, c, h, w) against prompts, (n,).

    texts: one or several. images: prompts, too, each (c, h, w) in [-1, 1]. weights: of the texts,
    then of the images; 1 each by default. shift: see `PromptLoss`. Raises ValueError without any
    prompt, and for another number of weights.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts and not images:
        raise ValueError("guidance by CLIP needs a text or an image as its prompt")
    with torch.no_grad():
        targets = [encoder.encode_texts(texts)] if texts else []
        targets += [encoder(image[None]) for image in images]
    given = [1.0] * (len(texts) + len(images)) if weights is None else weights
    return PromptLoss(encoder, torch.cat(targets), given, shift)
