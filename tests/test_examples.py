"""The examples run as they stand, and do what they say."""

import json
import re
import runpy
import sys

import latents
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


def run_here(name, *args, folder, monkeypatch):
    """Run an example in this process, which has imported what it needs."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_examples_are_short():
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == [
        "guide_by_a_loss.py",
        "inpaint.py",
        "sample_stable_diffusion.py",
        "text_conditional_toy.py",
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


def test_inpaint(tmp_path, monkeypatch):
    config = runs.tiny_config()
    model = K.config.make_model(config)
    checkpoints.write_inference(tmp_path / "a.safetensors", config, model.state_dict(), "fp32")
    levels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "image.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    args = "a.safetensors", "image.png", "mask.png", "--class", 3, "-n", 1, "--steps", 3
    run_here("inpaint.py", *args, folder=tmp_path, monkeypatch=monkeypatch)
    grid = np.asarray(Image.open(tmp_path / "painted.png"))
    given, painted = grid[2:50:6, 2:50:6], grid[52:100:6, 2:50:6]
    assert (given == levels).all()
    assert (painted[:, :4] == levels[:, :4]).all()
    assert (painted[:, 4:] != levels[:, 4:]).any()


def test_latent_models_are_painted_and_guided_as_pictures(tmp_path, monkeypatch, capsys):
    raw = latents.config(autoencoder={"mean": [0.0, 0.0], "std": [1.0, 1.0]})
    config = K.config.load_config(raw)
    torch.manual_seed(0)
    model = K.config.make_model(config)
    latents.write_autoencoder(tmp_path / "ae.safetensors")
    checkpoints.write_inference(tmp_path / "a.safetensors", config, model.state_dict(), "fp32")
    mask = Image.new("L", (8, 8))
    mask.putpixel((5, 0), 255)  # one pixel, and so the latent above it
    mask.save(tmp_path / "mask.png")
    Image.new("L", (8, 8), 99).save(tmp_path / "image.png")
    args = "a.safetensors", "image.png", "mask.png", "-n", 1, "--steps", 3
    run_here("inpaint.py", *args, folder=tmp_path, monkeypatch=monkeypatch)
    grid = np.asarray(Image.open(tmp_path / "painted.png"))
    assert grid.shape == (2 * 50 + 2, 50 + 2)
    given, painted = grid[2:50:6, 2:50:6], grid[52:100:6, 2:50:6]
    assert (given == 99).all()
    assert np.argwhere(painted != 99).tolist() == [[0, 5]]

    losses = []
    for scale in 0, 20:
        args = "a.safetensors", "--scale", scale, "-n", 4, "--steps", 5
        run_here("guide_by_a_loss.py", *args, folder=tmp_path, monkeypatch=monkeypatch)
        losses.append(float(re.search(r"mean loss ([\d.]+)", capsys.readouterr().out)[1]))
    assert losses[1] < 0.9 * losses[0]
    assert Image.open(tmp_path / "guided.png").size == (2 * 50 + 2, 2 * 50 + 2)


def test_text_conditional_toy(tmp_path, monkeypatch, capsys):
    args = "green top", "red left", "--steps", 2
    run_here("text_conditional_toy.py", *args, folder=tmp_path, monkeypatch=monkeypatch)
    assert re.search(r"mean error \d\.\d", capsys.readouterr().out)
    assert Image.open(tmp_path / "toy.png").mode == "RGB"


@pytest.mark.filterwarnings("ignore")  # theirs about configs
def test_sample_stable_diffusion(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from tiny_diffusers import diffusers, text_unet

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path, model_max_length=8)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1}
    text = transformers.CLIPTextConfig(
        vocab_size=6, num_attention_heads=2, max_position_embeddings=8, eos_token_id=1, **sizes
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=text_unet(),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "tiny")
    args = "tiny", "a b", "-n", 2, "--steps", 2, "--seed", 3
    run_here("sample_stable_diffusion.py", *args, folder=tmp_path, monkeypatch=monkeypatch)
    grid = Image.open(tmp_path / "samples.png")
    assert grid.mode == "RGB"
    first, second = (np.asarray(grid.crop((2, y, 50, y + 48))) for y in (2, 52))
    assert first.std() > 1
    assert (first != second).any()
