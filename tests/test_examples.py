"""The examples run as they stand, and do what they say."""

import re
import sys

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import checkpoints

EXAMPLES = runs.ROOT / "examples"


def run(name, *args, folder):
    code, text = runs.run(sys.executable, EXAMPLES / name, *args, folder=folder)
    assert code == 0, text
    return text


def test_examples_are_short():
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == [
        "guide_by_a_loss.py",
        "train_on_your_folder.py",
        "write_your_own_sampler.py",
    ]
    for name in names:
        assert (EXAMPLES / name).read_text().count("\n") < 60


def test_train_on_your_folder(tmp_path):
    for i in range(32):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"cats/{i}.png")
    args = "cats", "--size", 16, "--steps", 2, "--width", 64
    text = run("train_on_your_folder.py", *args, folder=tmp_path)
    assert re.search(r"step 0: loss \d", text)
    assert Image.open(tmp_path / "samples.png").size == (4 * 50 + 2, 4 * 50 + 2)


def test_write_your_own_sampler(tmp_path):
    text = run("write_your_own_sampler.py", folder=tmp_path)
    rows = [list(map(float, line.split())) for line in text.splitlines()[1:]]
    errors = torch.tensor(rows, dtype=torch.float64)
    assert errors[:, 0].tolist() == [16, 32, 64, 128]
    orders = (errors[-2, 1:] / errors[-1, 1:]).log2()
    assert orders.tolist() == pytest.approx([1, 2], abs=0.15)


def test_guide_by_a_loss(tmp_path):
    config = runs.tiny_config()
    torch.manual_seed(0)
    model = K.config.make_model(config)
    checkpoints.write_inference(tmp_path / "a.safetensors", config, model.state_dict(), "fp32")
    losses = []
    for scale in 0, 20:
        args = "a.safetensors", "--scale", scale, "-n", 4, "--steps", 5
        text = run("guide_by_a_loss.py", *args, folder=tmp_path)
        losses.append(float(re.search(r"mean loss ([\d.]+)", text)[1]))
    assert losses[1] < 0.5 * losses[0]
    assert (tmp_path / "guided.png").exists()
