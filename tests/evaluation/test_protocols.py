import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from problems import normal
from torch import nn

from k_diffusion.encoders import Encoder, make_encoder
from k_diffusion.encoders.inception import Inception
from k_diffusion.evaluation import protocols
from k_diffusion.evaluation.protocols import PROTOCOLS, get_protocol, metric_line


class StandIn(nn.Module):
    """The signature of stylegan2-ada-pytorch's TorchScript; it keeps what its layers see."""

    class Layers(nn.Module):
        def forward(self, x):
            self.seen = x
            rows = F.adaptive_avg_pool2d(x, (32, 64)).mean(1).flatten(1)
            return rows.view(-1, 2048, 1, 1)

    def __init__(self):
        super().__init__()
        self.layers = self.Layers()

    def forward(self, x, return_features=False):
        assert return_features
        self.inside = x
        return self.layers(F.interpolate((x - 128) / 128, (299, 299), mode="bilinear"))


class Recorder(Encoder):
    """Keeps the normalized images that reach its network."""

    def __init__(self, name, size, mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__(name, 3, size, mean, std)

    def network(self, x):
        self.seen = x
        return x.mean((2, 3)) + 2


def images(n=3, c=3, h=20, w=17, seed=0):
    """Samples that overshoot [-1, 1]."""
    return normal(seed, n, c, h, w, std=0.7)


def as_uint8(x):
    """(n, h, w, c), rounded as files are."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()


# --------------------------------------------------------- what reaches the network, tool by tool


def tools_inception(resize_inside):
    """clean-fid's own wrapper, around the stand-in."""
    module = pytest.importorskip("cleanfid.inception_torchscript")
    tool = module.InceptionV3W.__new__(module.InceptionV3W)
    nn.Module.__init__(tool)
    tool.base = StandIn()
    tool.layers = tool.base.layers
    tool.resize_inside = resize_inside
    return tool


@pytest.mark.parametrize("size", [(20, 17), (299, 299), (310, 400)])
def test_clean_fid_sees_the_same_pixels(size):
    tool = tools_inception(resize_inside=False)
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    x = images(2, 3, *size)
    arrays = np.stack([resize(image) for image in as_uint8(x)])
    want = tool(torch.from_numpy(arrays).movedim(-1, 1))
    encoder = Inception(StandIn())
    got = PROTOCOLS["clean-fid"].features(encoder, x)
    assert torch.equal(encoder.model.layers.seen, tool.layers.seen)
    assert torch.equal(got, want)


def test_edm_sees_the_same_pixels():
    """Its network resizes uint8 images itself."""
    tool, encoder = tools_inception(resize_inside=True), Inception(StandIn())
    x = images(2)
    levels = (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
    want = tool(levels.float())
    assert torch.equal(PROTOCOLS["edm"].features(encoder, x), want)
    assert torch.equal(encoder.model.inside, levels.float())


def test_the_published_metric_sees_the_same_pixels():
    x, encoder = images(2), Inception(StandIn())
    PROTOCOLS["k-diffusion"].features(encoder, x)
    large = F.interpolate(x, (299, 299), mode="bicubic", align_corners=False, antialias=True)
    want = ((127.5 * large + 127.5).clamp(0, 255) - 128) / 128
    torch.testing.assert_close(encoder.model.layers.seen, want, atol=2e-6, rtol=0)


def test_edm2_sees_the_same_pixels():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x, encoder = images(2), Recorder("dinov2", 224, mean, std)
    got = PROTOCOLS["edm2-dinov2"].features(encoder, x)
    levels = (x * 127.5 + 128).clip(0, 255).to(torch.uint8).float()
    large = F.interpolate(levels, (224, 224), mode="bicubic", antialias=True) / 255
    want = (large - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(encoder.seen, want)
    torch.testing.assert_close(got, want.mean((2, 3)) + 2)  # not of unit length


def test_cmmd_sees_the_same_pixels():
    x, encoder = images(2, h=20, w=27), Recorder("clip", 336)
    got = PROTOCOLS["cmmd"].features(encoder, x)
    for image, seen in zip(as_uint8(x), encoder.seen):
        want = Image.fromarray(image).crop((3, 0, 23, 20)).resize((336, 336), Image.BICUBIC)
        levels = (seen * 127.5 + 127.5).round().byte().movedim(0, -1).numpy()
        assert (levels == np.asarray(want)).all()
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2))


def test_published_features_of_other_encoders_are_scaled():
    x = images(2)
    for name in "clip", "dinov2":
        got = get_protocol(name).features(Recorder(name, 24), x)
        torch.testing.assert_close(got.norm(dim=1), torch.full((2,), 3**0.5))


# ---------------------------------------------------------------------------------- quantization


def test_roundings():
    x = torch.tensor([[-3.0, -1, 0, 1 / 255, 1, 1.7]])
    halves = 127.5 + 127.5 * x[0, 3]
    assert protocols.QUANTIZATIONS["float"](x)[0, 3] == halves
    assert protocols.QUANTIZATIONS["rounded"](x)[0].tolist() == [0, 0, 128, 128, 255, 255]
    assert protocols.QUANTIZATIONS["truncated"](x)[0].tolist() == [0, 0, 128, 128, 255, 255]
    one_and_a_half = torch.tensor([[2.5 / 127.5 - 1]])
    assert protocols.QUANTIZATIONS["rounded"](one_and_a_half).item() == 2  # half to even
    assert protocols.QUANTIZATIONS["truncated"](one_and_a_half).item() == 3


@pytest.mark.parametrize("name", ["rounded", "truncated"])
def test_images_from_files_keep_their_levels(name):
    levels = torch.arange(256.0)
    assert torch.equal(protocols.QUANTIZATIONS[name](levels / 127.5 - 1), levels)


# --------------------------------------------------------------------------------------- bad input


def test_every_row_names_what_there_is():
    for name, row in PROTOCOLS.items():
        assert row.name == name == get_protocol(name).name
        assert row.quantization in protocols.QUANTIZATIONS
        assert row.resizer in protocols.RESIZERS
        assert row.normalization in protocols.NORMALIZATIONS
        assert all(part in row.describe() for part in (name, row.encoder, row.tool))
    with pytest.raises(ValueError, match=r"unknown protocol .* \(did you mean 'clean-fid'"):
        get_protocol("clean_fid")


def test_another_encoder_is_an_error():
    with pytest.raises(ValueError, match=r"edm has the features of inception, got those of random"):
        PROTOCOLS["edm"].features(make_encoder("random"), images())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_images_that_are_none_are_errors(bad):
    x = images()
    if bad is None:
        x = (x.clamp(-1, 1) + 1) * 127.5  # pixels of 0 to 255
    else:
        x[1, 0, 3, 3] = bad
    with pytest.raises(ValueError, match=r"images in \[-1, 1\], got values from"):
        PROTOCOLS["random"].features(make_encoder("random"), x)


def test_features_that_are_none_are_errors():
    encoder = make_encoder("random")
    encoder.layers[0].bias[0] = float("nan")
    with pytest.raises(ValueError, match="features that aren't finite; check its weights"):
        PROTOCOLS["random"].features(encoder, images())
    encoder = make_encoder("random")
    encoder.width = 10
    with pytest.raises(ValueError, match=r"shape \(3, 64\), but 3 images have \(3, 10\)"):
        PROTOCOLS["random"].features(encoder, images())


def test_autocast_changes_no_feature():
    encoder, x = make_encoder("random"), images()
    want = PROTOCOLS["random"].features(encoder, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = PROTOCOLS["random"].features(encoder, x)
    assert torch.equal(got, want)
    assert not got.requires_grad


# ---------------------------------------------------------------------------------------- the line


def test_the_line():
    line = metric_line(
        "FID",
        "edm",
        3.2134,
        0.0412,
        n=50_000,
        n_reference=50_000,
        seeds=range(50_000),
        sampler="dpmpp_2m",
        evaluations=32,
        cfg_scale=1.5,
    )
    assert line == (
        "FID[edm] 3.21 ± 0.04 (n = 50,000, reference 50,000, seeds 0-49,999, dpmpp_2m 32 NFE, "
        "cfg 1.5)"
    )
    assert metric_line("accuracy", None, 0.98765, n=7, seeds=range(3, 4)) == (
        "accuracy 0.988 (n = 7, seed 3)"
    )
    assert metric_line("KID", "lite0", -1.234e-4, 2e-5, n=9, sampler="heun", notes=["forced"]) == (
        "KID[lite0] -0.00012 ± 0.00002 (n = 9, heun, forced)"
    )
    assert metric_line("FD", "random", 12345.6, n=1) == "FD[random] 12346 (n = 1)"
    assert metric_line("FD", "random", 0.0, n=1) == "FD[random] 0.00 (n = 1)"
    assert metric_line("FD", "random", float("nan"), n=1) == "FD[random] nan (n = 1)"
