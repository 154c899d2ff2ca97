"""Images that latent models are told: as means of their latents, on the fly and on disk."""

import json
import shutil

import latents as tiny
import numpy as np
import pytest
import runs
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import conditions, generation
from k_diffusion.data.latent_sources import open_latents
from k_diffusion.data.latents import latent_noise
from k_diffusion.data.training_data import make_training_data
from k_diffusion.encoders.autoencoder import Autoencoder
from k_diffusion.evaluation.reals import RealImages, ToldImages
from k_diffusion.models.autoencoder import KLAutoencoder

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

SECTION = {"type": "downsampled", "factor": 2, "dropout_rate": 0.5}
STORED = ["--set=dataset.type=latents", "--set=dataset.location=stored"]


def colours():
    torch.manual_seed(0)
    made = Autoencoder(KLAutoencoder(3, 2, [8, 8], 1, num_groups=4))
    return made.normalize([0.5, -1.0], [2.0, 3.0], 0.5)


def raw_mean(coder, images):
    return coder.encode(images).chunk(2, 1)[0]


def test_an_image_is_told_as_the_mean_of_its_latents():
    coder, images = colours(), torch.rand(2, 3, 8, 8) * 2 - 1
    for section in {"type": "downsampled", "factor": 2}, {"type": "paired", "channels": 3}:
        got = conditions.of_images(section, images, coder)["unet_cond"]
        seen = conditions.of_images(section, images)["unet_cond"]
        mean = raw_mean(coder, seen) - torch.tensor([0.5, -1.0])[:, None, None]
        scale = 0.5 / torch.tensor([2.0, 3.0])[:, None, None]
        torch.testing.assert_close(got, mean * scale)


@pytest.mark.parametrize("section", [{"type": "grayscale"}, {"type": "paired", "channels": 1}])
def test_one_channel_is_repeated_for_an_autoencoder_of_colours(section):
    coder, grey = colours(), torch.rand(2, 1, 8, 8) * 2 - 1
    got = conditions.of_images(section, grey, coder)["unet_cond"]
    assert torch.equal(got, conditions.as_told(grey.repeat(1, 3, 1, 1), coder))
    config = {"model": {"input_channels": 2, "input_size": [4, 4]}, "image_condition": section}
    picture = Image.fromarray(((grey[0, 0] + 1) * 127.5).round().byte().numpy())
    read = conditions.read_image_condition(config, picture, (8, 8), autoencoder=coder)
    torch.testing.assert_close(read, got[:1], atol=0.05, rtol=0)


def test_real_images_are_told_as_their_latents_though_training_had_stored_ones():
    section = {"type": "digits", "split": "all", "num_classes": 10, "background": "white"}
    reals = RealImages({**section, "image_key": 0, "class_key": 1}, (8, 8), 3)
    coder, of = colours(), {"type": "grayscale"}
    config = {"image_condition": of, "dataset": {"type": "latents"}}
    told = ToldImages(reals, [5, 0, 9], config, coder)
    images = torch.stack([reals[i]["image"] for i in (9, 5)])
    assert len(told) == 3
    torch.testing.assert_close(told[[2, 0]], conditions.of_images(of, images, coder)["unet_cond"])


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Digits at half their size: a model trained for a step on the fly, and latents on disk."""
    folder = tmp_path_factory.mktemp("told")
    tiny.write(folder, dataset={"split": "test"}, image_condition=SECTION)
    with pytest.MonkeyPatch.context() as patch:
        encode(folder, patch, "stored", "--no-flips")
        train(folder, patch, "fly")
    return folder


def encode(folder, monkeypatch, output, *flags):
    words = ["--config", "latent.json", "--output", output, *flags]
    runs.call("encode_latents", *words, folder=folder, monkeypatch=monkeypatch)


def train(folder, monkeypatch, name, *more):
    with monkeypatch.context() as patch:
        patch.setattr(generation, "STEPS", 1)
        words = ["--config", "latent.json", "--name", name, "--seed", 0, "--end-step", 1]
        words += ["--batch-size", 8, "--num-workers", 0, "--sample-n", 2, *more]
        runs.call("train", *words, folder=folder, monkeypatch=patch)
    return torch.load(folder / f"{name}_00000001.pth", weights_only=True)


def test_stored_ones_train_as_those_on_the_fly(made, monkeypatch):
    fly = torch.load(made / "fly_00000001.pth", weights_only=True)
    assert fly["config"]["model"]["unet_cond_dim"] == 2  # the latents' channels
    stored = train(made, monkeypatch, "disk", *STORED)
    for a, b in zip(fly["model"].values(), stored["model"].values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert open_latents(made / "stored").info["image_condition"] == {
        "type": "downsampled",
        "factor": 2,
    }


def test_samples_are_told_pictures(made, monkeypatch, capsys):
    model = K.load(made / "fly_00000001.pth")
    with torch.no_grad():  # else what is told plays no part yet
        for p in model.inner_model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    K.save_pretrained(model, made / "shared")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8)
    for name, x in ("a", pixels), ("b", 255 - pixels):
        Image.fromarray(x).save(made / f"{name}.png")
    x = torch.from_numpy(pixels / np.float32(127.5) - 1)[None, None]
    large = torch.nn.functional.interpolate(x, (8, 8), mode="bicubic")
    want = conditions.as_told(large, model.autoencoder)
    torch.testing.assert_close(model.given(images=[made / "a.png"])([0])["unet_cond"], want)

    words = "--checkpoint shared/model.safetensors -n 3 --steps 2 --device cpu --seed 1 --class 3"
    words = [*words.split(), "--condition-image", "a.png", "b.png"]

    def sample(prefix, *more):
        words_ = [*words, "--prefix", prefix, *more]
        runs.call("sample", *words_, folder=made, monkeypatch=monkeypatch)
        return [np.asarray(Image.open(made / f"{prefix}_{i:05}.png")).astype(int) for i in range(3)]

    plain = sample("plain")
    pictures = [made / "a.png", made / "b.png"]
    images = K.sample(model, 3, classes=3, seed=1, steps=2, condition_images=pictures)
    for image, same in zip(images, plain):
        assert abs(np.asarray(image).astype(int) - same).max() <= 1
    (other,) = K.sample(model, 1, classes=3, seed=1, steps=2, condition_images=pictures[1])
    assert abs(np.asarray(other).astype(int) - plain[0]).max() > 1
    guided = sample("large", "--cfg-scale", 2, "--size", "16x8")
    assert guided[0].shape == (16, 8)
    assert "a.png has 4 x 4 pixels: scaled and cropped to 16 x 8" in capsys.readouterr().out


def test_latents_and_what_they_are_told_are_mirrored_together(made, monkeypatch, tmp_path):
    folder = shutil.copytree(made, tmp_path / "it")
    encode(folder, monkeypatch, "both", "--set=dataset.split=test")
    monkeypatch.chdir(folder)
    config = K.config.load_config(json.loads((folder / "latent.json").read_text()))
    config["dataset"] = {
        **config["dataset"], "type": "latents", "location": "both", "flip_prob": 0.5,
        "num_classes": None,
    }  # fmt: skip
    config["autoencoder"] |= {"mean": [0.0, 0.0], "std": [0.5, 0.5]}  # the raw ones
    data = make_training_data(config)
    source = data.data.source
    seen = set()
    for seed in range(20):
        item = data[3, seed]
        told = item["paired_image"]
        (flip,) = [f for f in (False, True) if torch.equal(source.condition(3, f), told)]
        noise = latent_noise([seed], (2, 4, 4))[0]
        mean, std = source.moments(3, flip).chunk(2)
        torch.testing.assert_close(item["image"], mean + std * noise)
        seen.add(flip)
    assert seen == {False, True}
    coder = K.loading.load_autoencoder("ae.safetensors")
    section = {**K.config.load_config(tiny.config())["dataset"], "split": "test"}
    image = RealImages(section, (8, 8), 1)[3]["image"][None]
    for flip in False, True:
        told = conditions.of_images(SECTION, image.flip(3) if flip else image)["unet_cond"]
        torch.testing.assert_close(source.condition(3, flip), raw_mean(coder, told)[0])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set=image_condition.factor=3"],
         r"image_condition\.factor: 3 must divide the sides of the images, 8 x 8"),
        (["--set=image_condition.type=paired", "--set=image_condition.location=."],
         r"image_condition\.channels is 3, but \S*ae\.safetensors takes images of 1; set it to 1"),
        (["--set=model.unet_cond_dim=1"], "is 1, but image_condition has 2 channels"),
        ([*STORED, "--set=image_condition.factor=4"],
         r"images of image_condition \{.*'factor': 2\}, but the config's is \{.*'factor': 4\}"),
        ([STORED[0], "--set=dataset.location=plain"],
         "latents at plain have none of images to be told; encode anew with a config that has"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(flags, says, made, monkeypatch):
    if flags[-1].endswith("plain") and not (made / "plain").exists():
        encode(made, monkeypatch, "plain", "--set=image_condition=null", "--no-flips")
    with pytest.raises(SystemExit, match=says) as ended:
        train(made, monkeypatch, "new", *flags)
    assert "\n" not in str(ended.value)
