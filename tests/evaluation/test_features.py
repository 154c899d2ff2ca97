import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import k_diffusion as K
from k_diffusion.encoders.inception import Inception
from k_diffusion.evaluation import features


class Stand(nn.Module):
    name, width = "stand", 12

    def forward(self, images):
        self.seen = images
        return images.flatten(1)[:, :12]


@pytest.fixture
def made(monkeypatch):
    calls = []

    def make_encoder(name, weights=None, device="cpu", **options):
        calls.append((name, device, options))
        return Stand()

    monkeypatch.setattr(features, "make_encoder", make_encoder)
    return calls


def test_inception_sees_what_the_published_metric_sees(made):
    extractor = K.evaluation.InceptionV3FeatureExtractor(device="cpu")
    assert made == [("inception", "cpu", {})]
    x = torch.randn(2, 3, 32, 32) * 2
    extractor(x)
    want = F.interpolate(x, (299, 299), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.equal(extractor.encoder.seen, want)
    assert want.abs().max() == 1


@pytest.mark.parametrize(
    ("face", "name", "model"),
    [("DINOv2FeatureExtractor", "dinov2", "vitl14"), ("CLIPFeatureExtractor", "clip", "ViT-B/16")],
)
def test_features_of_norm_sqrt_width(made, face, name, model):
    extractor = getattr(K.evaluation, face)()
    assert made == [(name, "cpu", {"model": model})]
    x = torch.randn(5, 3, 4, 4)
    out = extractor(x)
    torch.testing.assert_close(out.norm(dim=1), torch.full((5,), math.sqrt(12)))
    torch.testing.assert_close(out / out.norm(dim=1)[:, None], F.normalize(x.flatten(1)[:, :12]))
    getattr(K.evaluation, face)("other", device="cpu")
    assert made[1] == (name, "cpu", {"model": "other"})


class Accelerator:
    num_processes = 1
    is_main_process = True

    def gather(self, x):
        return x


def test_computed_features():
    asked = []

    def sample(n):
        asked.append(n)
        return torch.full((max(n, 3), 2), float(len(asked)), requires_grad=True)  # or more than n

    out = features.compute_features(Accelerator(), sample, lambda x: 2 * x, 7, 3)
    assert asked == [3, 3, 1]
    assert out[:, 0].tolist() == [2, 2, 2, 4, 4, 4, 6]
    assert not out.requires_grad
    with pytest.raises(ValueError, match="at least the 3 images asked for, got 2"):
        features.compute_features(Accelerator(), lambda n: torch.zeros(2, 1), lambda x: x, 7, 3)


@pytest.mark.parametrize("size", [(299, 299), (20, 30)])
def test_inception_as_the_protocol_of_its_name_has_it(size, monkeypatch):
    class Pixels(nn.Module):
        """The pixels that Inception's layers get."""

        def layers(self, x):
            return F.adaptive_avg_pool2d(x, (27, 27)).flatten(1)[:, :2048].clone()

    encoder = Inception(Pixels()).freeze()
    monkeypatch.setattr(features, "make_encoder", lambda name, device: encoder)
    x = torch.randn(2, 3, *size)
    got = K.evaluation.InceptionV3FeatureExtractor()(x)
    if size == (299, 299):
        x = x.clamp(-1, 1)
    want = K.evaluation.PROTOCOLS["k-diffusion"].features(encoder, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
