import sys

import pytest
import torch
from problems import normal
from torch import nn

from k_diffusion import sampling
from k_diffusion.common import hub
from k_diffusion.common.files import sha256
from k_diffusion.encoders import clip, make_encoder
from k_diffusion.guidance import GradientGuidedDenoiser, ThresholdedDenoiser


class TinyCLIP(nn.Module):
    """Sees 6 x 6 images through a random projection; texts are embedded by their length."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(108, 5)
        self.visual.image_size = 6
        with torch.no_grad():
            self.visual.weight.copy_(normal(0, 5, 108, std=108**-0.5))
            self.visual.bias.zero_()

    def encode_image(self, images):
        self.seen = images
        return self.visual(images.flatten(1))

    def encode_text(self, tokens):
        return torch.stack([normal(int(n), 5) for n in tokens])


def tiny():
    return clip.CLIPEncoder(TinyCLIP(), lambda texts: torch.tensor([len(t) for t in texts]))


def unit(*shape, seed=0):
    return nn.functional.normalize(normal(seed, *shape, dtype=torch.float64), dim=-1)


# --------------------------------------------------------------------------------------- the loss


def test_distance_is_half_the_squared_angle():
    angles = torch.tensor([0.0, 1e-6, 0.4, 1.5, 3.0, torch.pi], dtype=torch.float64)
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    y = torch.stack([angles.cos(), angles.sin()], -1)
    torch.testing.assert_close(clip.squared_spherical_distance(x, y), angles**2 / 2)


def test_distance_has_a_finite_gradient_at_both_ends():
    x = unit(3, 4)
    y = torch.stack([x[0], -x[1], x[2]]).requires_grad_()
    clip.squared_spherical_distance(x, y).sum().backward()
    assert y.grad.isfinite().all()


def test_gradient_of_the_distance():
    x, y = unit(3, 4), unit(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(clip.squared_spherical_distance, (x, y))


# ------------------------------------------------------------------------------------ the encoder


@pytest.mark.parametrize("size", [(6, 6), (24, 24), (5, 13)])
def test_images_are_resized_and_normalized(size):
    """A grey image stays one, whatever its size."""
    encoder = tiny()
    y = encoder.encode_images(torch.full((2, 3, *size), 0.2))
    want = (torch.tensor([0.6, 0.6, 0.6]) - encoder.mean.flatten()) / encoder.std.flatten()
    torch.testing.assert_close(encoder.model.seen, want[:, None, None].expand(2, 3, 6, 6))
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2))


def test_greyscale_images_are_seen_in_grey():
    grey, encoder = normal(0, 2, 1, 8, 8), tiny()
    torch.testing.assert_close(
        encoder.encode_images(grey), encoder.encode_images(grey.repeat(1, 3, 1, 1))
    )


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8)])
def test_other_images_are_errors(shape):
    with pytest.raises(ValueError, match="3 channels, or 1 for greyscale; got shape"):
        tiny().encode_images(torch.zeros(shape))


def test_texts_are_unit_vectors_without_gradients():
    y = tiny().encode_texts(["a", "bcd"])
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2))
    assert not y.requires_grad


def test_sampling_by_a_prompt_brings_images_nearer_to_it():
    loss = clip.prompt_loss(tiny(), "a digit")
    shrink = nn.Module()
    shrink.forward = lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2)
    sigmas = sampling.get_sigmas_karras(10, 0.02, 10)
    x = normal(3, 4, 3, 8, 8, std=10)
    plain = sampling.sample_dpmpp_2m(shrink, x, sigmas, disable=True)
    guided = GradientGuidedDenoiser(shrink, loss, 50.0)
    near = sampling.sample_dpmpp_2m(guided, x, sigmas, disable=True)
    assert (loss(near) < 0.7 * loss(plain)).all()


def trajectory(model, loss, scale):
    """The losses of the estimates, step by step, (steps, n)."""
    losses = []
    if scale:
        model = GradientGuidedDenoiser(model, loss, scale)
    measure = clip.PromptLoss(loss.encoder, loss.targets, loss.weights.tolist())
    x = normal(3, 4, 3, 32, 32, std=10)
    sampling.sample_dpmpp_2m(
        ThresholdedDenoiser(model),
        x,
        sampling.get_sigmas_karras(12, 0.02, 10),
        callback=lambda info: losses.append(measure(info["denoised"]).detach()),
        disable=True,
    )
    return torch.stack(losses)


def test_the_loss_falls_along_the_trajectory_of_a_real_architecture():
    """A small CLIP of open_clip's with random weights, with shifts and static thresholding."""
    model = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    vision = model.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    text = model.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    net = model.CLIP(16, vision, text, quick_gelu=True)
    encoder = clip.CLIPEncoder(net, lambda texts: torch.arange(8)[None]).freeze()
    assert (encoder.name, encoder.width, encoder.size) == ("clip", 16, (32, 32))
    loss = clip.prompt_loss(encoder, "anything", shift=1 / 14)
    shrink = nn.Module()
    shrink.forward = lambda x, sigma: x / (1 + 4 * sigma[:, None, None, None] ** 2)
    plain, guided = (trajectory(shrink, loss, scale) for scale in (0, 500))
    assert (guided[-1] < 0.95 * guided[0]).all()
    assert (guided[-1] < 0.95 * plain[-1]).all()
    assert (guided[6:].mean(1) < plain[6:].mean(1)).all()


def test_weights_of_prompts_add_up():
    encoder, x = tiny(), normal(0, 3, 3, 6, 6)
    image = normal(1, 3, 6, 6)
    parts = [clip.prompt_loss(encoder, "a")(x), clip.prompt_loss(encoder, "bcd")(x)]
    parts.append(clip.prompt_loss(encoder, images=[image])(x))
    loss = clip.prompt_loss(encoder, ["a", "bcd"], [1.0, -0.5, 2.0], [image])
    torch.testing.assert_close(loss(x), parts[0] - 0.5 * parts[1] + 2 * parts[2])
    torch.testing.assert_close(
        clip.prompt_loss(encoder, images=[image])(image[None])[0].item(), 0.0
    )
    with pytest.raises(ValueError, match="2 prompts need as many weights, got 1"):
        clip.prompt_loss(encoder, ["a", "b"], [1.0])
    with pytest.raises(ValueError, match="needs a text or an image"):
        clip.prompt_loss(encoder)
    with pytest.raises(ValueError, match="from 0 to below 1, got 2"):
        clip.prompt_loss(encoder, "a", shift=2)


def test_images_are_shifted_by_fractions_of_their_sides():
    x = normal(0, 2, 3, 5, 8)
    torch.testing.assert_close(clip.shifted(x, 0.2, 0.25)[:, :, 1:, 2:], x[:, :, :-1, :-2])
    assert clip.shifted(x, 0.2, 0)[:, :, 0].sub(x[:, :, 0]).abs().max() < 1e-5  # continued
    half = clip.shifted(x, 0, 0.5 / 8)
    torch.testing.assert_close(half[..., 1:], (x[..., 1:] + x[..., :-1]) / 2)


def test_the_shifts_of_a_run_start_anew_and_are_bounded(monkeypatch):
    seen = []

    def record(images, down, right):
        seen.append((down, right))
        return images

    monkeypatch.setattr(clip, "shifted", record)
    loss = clip.prompt_loss(tiny(), "a digit", shift=1 / 14)
    guided = GradientGuidedDenoiser(nn.Identity(), loss)
    for _ in range(2):
        guided.start_run()
        for _ in range(50):
            loss(normal(0, 1, 3, 6, 6))
    assert seen[:50] == seen[50:]
    values = torch.tensor(seen)
    assert values.abs().max() <= 1 / 14
    assert len(values.unique()) == 100
    assert values.amax() > 0.9 / 14 > -0.9 / 14 > values.amin()


# ---------------------------------------------------------------------------------------- loading


@pytest.mark.slow
def test_a_real_architecture_takes_a_step_towards_a_prompt():
    """With random weights: half a step down the gradient lowers the loss of each image."""
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    encoder = clip.load_clip("ViT-B/32", pretrained=None)
    assert encoder.size == (224, 224)
    assert not any(p.requires_grad for p in encoder.parameters())
    loss = clip.prompt_loss(encoder, "a lighthouse")
    x = normal(0, 2, 3, 32, 32, std=0.3).requires_grad_()
    before = loss(x)
    (grad,) = torch.autograd.grad(before.sum(), x)
    assert (grad.flatten(1).norm(dim=1) > 0).all()
    step = 1e-3 / grad.flatten(1).norm(dim=1)[:, None, None, None]
    assert (loss(x - step * grad) < before).all()


def test_every_name_is_one_of_open_clips_with_openai_weights():
    open_clip = pytest.importorskip("open_clip")
    known = open_clip.list_pretrained()
    assert [name for name in clip.MODELS.values() if (name, "openai") not in known] == []


def test_weights_from_a_file_or_the_hub(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    given = []

    def create(name, pretrained, device):
        given.append((name, pretrained))
        if pretrained.endswith("other.pt"):
            raise RuntimeError("Missing keys")
        return TinyCLIP()

    def download(repo, file, what):
        return tmp_path / repo / file

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: None)
    monkeypatch.setattr(hub, "download_file", download)
    for name in "own.pt", "other.pt":
        (tmp_path / name).touch()
    own = make_encoder("clip", tmp_path / "own.pt")
    assert (own.width, own.name) == (5, "clip")
    clip.load_clip()
    stored = "timm/vit_base_patch16_clip_224.openai/open_clip_model.safetensors"
    assert given == [
        ("ViT-L-14-336-quickgelu", str(tmp_path / "own.pt")),
        ("ViT-B-16-quickgelu", str(tmp_path / stored)),
    ]
    with pytest.raises(ValueError, match=r"other.pt has no weights of the CLIP model ViT-B/16"):
        clip.load_clip(pretrained=str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"no weights of the CLIP model RN50 at .*gone.pt"):
        clip.load_clip("RN50", pretrained=str(tmp_path / "gone.pt"))


class Scripted(TinyCLIP):
    """As OpenAI's files hold CLIP."""

    def __init__(self):
        super().__init__()
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.visual(x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_openais_own_file(tmp_path, monkeypatch):
    """What its package `clip` has downloaded is TorchScript, read by its digest alone."""
    open_clip = pytest.importorskip("open_clip")
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.trace(Scripted(), torch.zeros(1, 108), check_trace=False).save(path)
    net = TinyCLIP()
    nn.init.zeros_(net.visual.weight)
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained, device: net)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: None)
    monkeypatch.setattr(
        open_clip, "get_pretrained_url", lambda *args: f"https://x.org/{sha256(path)}/ViT-B-16.pt"
    )
    clip.load_clip(pretrained=str(path))
    assert torch.equal(net.visual.weight, TinyCLIP().visual.weight)


def test_unknown_names_are_errors():
    with pytest.raises(
        ValueError, match="unknown CLIP model 'ViT-B/61' \\(did you mean 'ViT-B/16'"
    ):
        clip.load_clip("ViT-B/61")


def test_without_open_clip_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'pip install "k-diffusion\[clip\]"'):
        clip.load_clip()
