"""sample.py's flags for editing an image."""

import re

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import checkpoints

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editing")
    config = runs.tiny_config()
    torch.manual_seed(0)
    model = K.config.make_model(config)
    for p in model.parameters():  # some begin at 0
        p.data += 0.05 * torch.randn_like(p)
    checkpoints.write_inference(folder / "a.safetensors", config, model.state_dict(), "fp32")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "image.png")
    Image.fromarray(rng.integers(0, 256, (16, 20), dtype=np.uint8)).save(folder / "large.png")
    for name, rows in ("empty", 0), ("half", 4), ("full", 8):
        mask = np.zeros((8, 8), np.uint8)
        mask[:rows] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def sample(files, monkeypatch):
    def run(*args):
        fixed = "--checkpoint", "a.safetensors", "-n", 3, "--seed", 1, "--steps", 5
        fixed += "--device", "cpu", "--class", 3, 7
        runs.call("sample", *fixed, *args, folder=files, monkeypatch=monkeypatch)
        return np.stack([pixels(files / f"out_{i:05}.png") for i in range(3)])

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_an_empty_mask_gives_the_image_and_a_full_one_plain_sampling(sample, files):
    image, plain = pixels(files / "image.png"), sample()
    init = "--init-image", "image.png"
    assert (sample(*init, "--mask", "empty.png") == image).all()
    assert (sample(*init, "--mask", "full.png") == plain).all()
    half = sample(*init, "--mask", "half.png")
    assert (half[:, 4:] == image[4:]).all()
    assert (half[:, :4] != image[:4]).any()


def test_correction_and_resampling_change_the_painted_part_alone(sample, files, capsys):
    flags = "--init-image", "image.png", "--mask", "half.png"
    half = sample(*flags)
    for more in ("--inpaint-correction", 0.1), ("--resample", 2, "--jump", 2), ("--strength", 0.4):
        other = sample(*flags, *more)
        assert (other[:, 4:] == half[:, 4:]).all()
        assert (other[:, :4] != half[:, :4]).any()


def test_less_strength_stays_nearer_to_the_image(sample, files, capsys):
    image = pixels(files / "image.png")
    near, far = (
        abs(sample("--init-image", "image.png", "--strength", s) - image).mean() for s in (0.2, 1)
    )
    assert near < 0.5 * far
    assert "scaled" not in capsys.readouterr().out
    sample("--init-image", "large.png")
    assert "large.png has 16 x 20 pixels: scaled and cropped to 8 x 8" in capsys.readouterr().out


def test_inversion_comes_back_and_tells_its_error(sample, files, capsys):
    image = pixels(files / "image.png")
    flags = "--init-image", "image.png", "--invert", "--steps", 40
    made = sample(*flags, "--init-class", 3)
    error = float(re.search(r"mean square error ([\d.]+) of", capsys.readouterr().out)[1])
    measured = np.sqrt(((made[0] - image) / 127.5 * ((made[0] - image) / 127.5)).mean())
    assert measured == pytest.approx(error, abs=0.01)
    assert error < 0.2
    assert (made[0] == made[2]).all()  # of class 3, too
    assert (made[0] != made[1]).any()
