"""train_autoencoder.py: the loss against formulas, exact resumption, what the weights become."""

import json
import sys
import types
from urllib.error import URLError

import pytest
import runs
import torch
from latents import AUTOENCODER as TINY
from torch import nn
from torch.distributions import Normal, kl_divergence

import k_diffusion as K
from k_diffusion.training.autoencoder import AutoencoderLoss, reconstructions

pytest.importorskip("accelerate")


class Given(nn.Module):
    def __init__(self, *out):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.ones(1)), out

    def forward(self, images):
        return self.out


def test_loss_is_reconstruction_and_kl():
    torch.manual_seed(0)
    images, made = torch.randn(2, 3, 1, 8, 8).unbind()
    mean, log_variance = torch.randn(2, 3, 2, 4, 4).unbind()
    found = AutoencoderLoss(Given(made, mean, log_variance), kl_weight=0.5).loss(images)
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    want = (images - made).abs().mean((1, 2, 3)) + 0.5 * kl.sum((1, 2, 3)) / 64
    torch.testing.assert_close(found, want)


def test_lpips_is_added_where_its_package_is(monkeypatch):
    class LPIPS(nn.Module):
        def __init__(self, net):
            super().__init__()

        def forward(self, a, b):
            assert a.shape[1] == b.shape[1] == 3
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    images, zero = torch.randn(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    inner = Given(zero, zero, zero)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    found = AutoencoderLoss(inner, 0.0, 2.0).loss(images)
    want = images.abs().mean((1, 2, 3)) + 2 * images.square().mean((1, 2, 3))
    torch.testing.assert_close(found, want)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="lpips_weight needs lpips; .* pip install lpips"):
        AutoencoderLoss(inner, 0.0, 2.0)


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("PytorchStreamReader\n failed")]
)
def test_lpips_without_its_weights_is_told(error, monkeypatch):
    pytest.importorskip("torchvision")

    def fail(net):
        raise error

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=fail))
    monkeypatch.setenv("TORCH_HOME", "there")
    says = r"VGG-16's weights.* put https:.*vgg16-\w+.pth at there.hub.checkpoints.vgg16-\w+.pth,"
    with pytest.raises(OSError, match=says):
        AutoencoderLoss(Given(None), 0.0, 2.0)


def test_lpips_needs_sides_of_16():
    raw = {**TINY, "model": {**TINY["model"], "lpips_weight": 1}}
    says = r"model.lpips_weight: .* sides are at least 16, got input_size \[8, 8\]; set it to 0"
    with pytest.raises(K.config.ConfigError, match=says):
        K.config.load_config(raw)
    raw["model"]["input_size"] = [16, 16]
    assert K.config.load_config(raw)["model"]["lpips_weight"] == 1


def train(folder, monkeypatch, *flags):
    (folder / "tiny.json").write_text(json.dumps(TINY))
    words = ["--config", "tiny.json", "--name", "ae", "--seed", 0, "--batch-size", 8]
    words += ["--num-workers", 0, "--sample-n", 4, *flags]
    runs.call("train_autoencoder", *words, folder=folder, monkeypatch=monkeypatch)


def test_a_run_resumes_exactly_and_its_weights_load(tmp_path, monkeypatch, capsys):
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    train(once, monkeypatch, "--end-step", 3)
    assert "reconstructions: PSNR" in capsys.readouterr().out
    assert (once / "ae_demo_00000003.png").exists()
    train(twice, monkeypatch, "--end-step", 2)
    train(twice, monkeypatch, "--end-step", 3)
    a, b = (runs.read(folder / "ae_00000003.pth") for folder in (once, twice))
    for state in (a, b):
        state.pop("elapsed")
    assert not runs.differences(a, b)

    made = K.loading.load_autoencoder(once / "ae_00000003.pth")
    images = torch.rand(2, 1, 8, 8)
    assert made.image_shape(made.sample(made.encode(images)).shape[1:]) == (1, 8, 8)
    weights = made.network.state_dict()
    assert not runs.differences(dict(weights), dict(a["model_ema"]))
    runs.call("convert_for_inference", "ae_00000003.pth", "--dtype", "fp32", folder=once,
              monkeypatch=monkeypatch)  # fmt: skip
    again = K.loading.load_autoencoder(once / "ae_00000003.safetensors")
    assert again.fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="a kl_autoencoder is no denoiser; train it with"):
        K.load(once / "ae_00000003.pth")


def test_reconstructions_stand_below_their_images():
    class Half(nn.Module):
        def encode(self, images):
            return images / 2, None

        def decode(self, latents):
            return latents

    class Plain:
        device, autocast = "cpu", torch.no_grad

    data = [{"original": torch.full((1, 48, 48), i / 8)} for i in range(8)]
    network = Half()

    class Data(list):
        def __getitem__(self, draw):
            return super().__getitem__(draw[0])

    picture, psnr = reconstructions(Plain(), network, Data(data), 8)
    squares = sum((i / 16) ** 2 for i in range(8)) / 8
    assert psnr == pytest.approx(10 * torch.tensor(4 / squares).log10().item(), abs=1e-3)
    columns = picture.width // 50
    level = lambda row, column: picture.getpixel((column * 50 + 25, row * 50 + 25))  # noqa: E731
    for i in range(columns):
        assert level(0, i) == pytest.approx((i / 8 + 1) * 127.5, abs=1)
        assert level(1, i) == pytest.approx((i / 16 + 1) * 127.5, abs=1)


def test_denoisers_and_their_flags_are_refused(tmp_path, monkeypatch, capsys):
    model = f"model={json.dumps(runs.TINY['model'])}"
    with pytest.raises(SystemExit, match="trains a kl_autoencoder, got image_transformer_v2"):
        train(tmp_path, monkeypatch, "--set", model)
    with pytest.raises(SystemExit):
        train(tmp_path, monkeypatch, "--gns")
    assert "--gns is of train.py, not of this script" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dry-run", "--end-step=1"])
def test_an_autoencoder_is_no_model_for_train(flag, tmp_path, monkeypatch):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    words = "--config", "tiny.json", "--num-workers=0", flag
    with pytest.raises(SystemExit, match=r"is no denoiser; train it with train_autoencoder.py"):
        runs.call("train", *words, folder=tmp_path, monkeypatch=monkeypatch)
    assert not list(tmp_path.glob("model*"))
