"""Runs of models that are told texts and images, from training to samples."""

import csv
import json

import numpy as np
import pytest
import runs
import tiny_text
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import conditions, distributed, generation
from k_diffusion.scripts import encode_captions
from k_diffusion.training.dry_run import footprint

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

DATA = """
from sklearn.datasets import load_digits
from PIL import Image

WORDS = "one two three".split()

def get_dataset(config, transform):
    images = load_digits().images[:12]
    return [(transform(Image.fromarray((x * 15).astype("uint8"))), 0, f"a {WORDS[i % 3]}")
            for i, x in enumerate(images)]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with texts by both ways and images at a quarter of their size."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "data.py").write_text(DATA)
    tiny_text.save(folder / "encoder")
    config = {
        **runs.TINY,
        "model": {**runs.TINY["model"], "cross_cond_dim": 12, "mapping_cond_dim": 12},
        "dataset": {"type": "custom", "location": "data.py"},
        "text": {"type": "transformers", "location": "encoder", "max_length": 4},
        "image_condition": {"type": "downsampled", "factor": 4, "dropout_rate": 0.1},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "STEPS", 2)
        train(folder, patch, "told")
    model = K.load(folder / "told_00000002.pth", text_encoder=folder / "encoder")
    with torch.no_grad():  # else what is told plays no part yet
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    K.save_pretrained(model, folder / "shared")
    return folder


def train(folder, patch, name, *more):
    words = ["--config", "config.json", "--name", name, "--seed", 0, "--end-step", 2]
    words += ["--batch-size", 4, "--num-workers", 0, "--sample-n", 2, "--log-every", 1, *more]
    runs.call("train", *words, folder=folder, monkeypatch=patch)


def losses(folder, name):
    with open(folder / f"{name}_metrics.csv", newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def test_captions_encoded_beforehand_train_alike(trained, monkeypatch):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(generation, "STEPS", 2)
    words = ["encode_captions", "--config", "config.json", "--output", "texts.safetensors"]
    monkeypatch.setattr("sys.argv", words)
    encode_captions.main()
    stored = conditions.StoredTexts("texts.safetensors")
    assert sorted(stored.places) == ["a one", "a three", "a two"]
    (trained / "encoder").rename(trained / "away")
    try:
        train(trained, monkeypatch, "stored", "--set", "text.precomputed=texts.safetensors")
    finally:
        (trained / "away").rename(trained / "encoder")
    tiny_text.save(trained / "another", seed=1)
    given = "--set", "text.precomputed=texts.safetensors", "--set"
    with pytest.raises(
        SystemExit, match=r"encoded by another text encoder .* than another \(\w+\)"
    ):
        train(trained, monkeypatch, "mixed", *given, "text.location=another")
    train(trained, monkeypatch, "moved", *given, f"text.location={trained / 'encoder'}")
    assert losses(trained, "stored") == losses(trained, "moved") == losses(trained, "told")
    assert len(losses(trained, "told")) == 2


def test_captions_of_a_hugging_face_data_set(trained, tmp_path, monkeypatch):
    """From parquet files, by a column of its own name; a row without one is known at once."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generation, "STEPS", 1)
    library.disable_progress_bars()

    def write(captions):
        pictures = [Image.fromarray(np.full((8, 8), 20 * i, np.uint8)) for i in range(8)]
        rows = {"image": pictures, "caption": captions}
        features = library.Features({"image": library.Image(), "caption": library.Value("string")})
        data = library.Dataset.from_dict(rows, features=features)
        data.to_parquet(trained / "rows/train.parquet")

    section = {"type": "huggingface", "location": "rows", "caption_key": "caption"}
    words = "--set", f"dataset={json.dumps(section)}"
    (trained / "rows").mkdir(exist_ok=True)
    captions = [f"a {word}" for word in ["one", "two", "three", "big"] * 2]
    seen = []
    of_texts = conditions.of_texts
    with monkeypatch.context() as patch:
        patch.setattr(conditions, "of_texts", lambda *args: seen.extend(args[2]) or of_texts(*args))
        write(captions)
        train(trained, monkeypatch, "columns", *words, "--batch-size", 8, "--end-step", 1)
    assert sorted(seen[:8]) == sorted(captions)
    write([*captions[:5], None, *captions[6:]])
    with pytest.raises(
        SystemExit, match="1 of 8 images have no caption at 'caption', such as row 5"
    ):
        train(trained, monkeypatch, "none", *words)
    assert not [*trained.glob("none*")]


def test_a_run_stays_with_its_text_encoder(trained, monkeypatch):
    tiny_text.save(trained / "second", seed=1)
    says = (
        r"told_00000002.pth was trained on the texts of another encoder \(fingerprint \w{16}\) "
        r"than second \(\w{16}\); pass the one that it was trained with, or another --name"
    )
    with pytest.raises(SystemExit, match=says):
        train(trained, monkeypatch, "told", "--set", "text.location=second", "--end-step", 3)


def test_held_out_images_are_told_theirs(tmp_path, monkeypatch):
    """A run that keeps images for validation: of digits at a quarter of their size."""
    config = {**runs.TINY, "image_condition": {"type": "downsampled", "factor": 4}}
    config["dataset"] = {"type": "digits", "split": "train"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(generation, "STEPS", 1)
    train(tmp_path, monkeypatch, "held")
    with open(tmp_path / "held_metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert 0 < float(rows[-1]["val_loss"]) < 10


def test_demo_grids_are_drawn(trained):
    assert Image.open(next(trained.glob("told_demo_*.png"))).size == (52, 2 * 50 + 2)


def sample(folder, monkeypatch, *words):
    runs.call(
        "sample", "--checkpoint", "shared/model.safetensors", "--device", "cpu", "--steps", 3,
        *words, folder=folder, monkeypatch=monkeypatch,
    )  # fmt: skip


def pixels(folder, name, n):
    return [np.asarray(Image.open(folder / f"{name}_{i:05}.png")).astype(int) for i in range(n)]


def test_sample_tells_prompts_and_images(trained, monkeypatch, capsys):
    small = np.array([[0, 255], [255, 0]], np.uint8)
    Image.fromarray(small).save(trained / "small.png")
    Image.fromarray(255 - small).save(trained / "other.png")
    told = "--prompt", "a one", "a two", "--condition-image", "small.png", "--seed", 1
    sample(trained, monkeypatch, *told, "-n", 3, "--prefix", "x")
    x = pixels(trained, "x", 3)
    sample(trained, monkeypatch, *told[:1], "a two", *told[3:], "-n", 2, "--prefix", "y")
    y = pixels(trained, "y", 2)
    assert abs(x[1] - y[1]).max() <= 1
    assert abs(x[0] - y[0]).max() > 1
    sample(trained, monkeypatch, *told[:4], "other.png", *told[5:], "-n", 1, "--prefix", "z")
    assert abs(pixels(trained, "z", 1)[0] - x[0]).max() > 1
    sample(trained, monkeypatch, *told, "-n", 1, "--cfg-scale", 3, "--prefix", "g")
    assert abs(pixels(trained, "g", 1)[0] - x[0]).max() > 1

    model = K.load(trained / "shared", text_encoder=trained / "encoder")
    images = K.sample(
        model, 3, seed=1, steps=3, prompts=["a one", "a two"],
        condition_images=trained / "small.png",
    )  # fmt: skip
    for image, want in zip(images, x):
        assert abs(np.asarray(image).astype(int) - want).max() <= 1
    (guided,) = K.sample(
        model, 1, seed=1, steps=3, prompts="a one", cfg_scale=3,
        condition_images=Image.fromarray(small),
    )  # fmt: skip
    assert abs(np.asarray(guided).astype(int) - pixels(trained, "g", 1)[0]).max() <= 1


def test_processes_tell_each_image_its_own(trained, monkeypatch):
    """The second of two processes samples image 1, with the second prompt."""
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).save(trained / "small.png")
    told = "--prompt", "a one", "a two", "--condition-image", "small.png", "--seed", 1, "-n", 2
    sample(trained, monkeypatch, *told, "--prefix", "alone")
    monkeypatch.setattr(distributed, "share", lambda accelerator, n: range(1, n, 2))
    sample(trained, monkeypatch, *told, "--prefix", "second")
    assert not (trained / "second_00000.png").exists()
    both = (np.asarray(Image.open(trained / f"{name}_00001.png")) for name in ("alone", "second"))
    assert abs(np.subtract(*(x.astype(int) for x in both))).max() <= 1


def test_an_inversion_knows_the_prompt(trained, monkeypatch, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(trained / "init.png")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(trained / "zero.png")
    words = "--init-image", "init.png", "--invert", "--prompt", "a two"
    words += "--condition-image", "zero.png", "-n", 1, "--sampler", "heun", "--prefix", "inverted"
    sample(trained, monkeypatch, *words)
    assert "reconstruction: root mean square error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "this model is told by texts: pass --prompt"),
        (("--prompt", "a"), r"told by images \(downsampled\): pass --condition"),
        (("--prompt", "a", "--text-encoder", "nowhere"), "no text encoder at nowhere"),
        (("--prompt", "a", "--condition-image", "none.png"), "can't read the image none.png"),
    ],
)
def test_what_is_missing_is_said(trained, monkeypatch, flags, said):
    with pytest.raises(SystemExit, match=said):
        sample(trained, monkeypatch, *flags, "-n", 1)


def test_a_dry_run_has_conditions(trained, monkeypatch, capsys):
    for mode in "full", "selective":
        monkeypatch.delitem(footprint.CHECKPOINTING, mode)
    train(trained, monkeypatch, "dry", "--dry-run")
    assert "neighborhood 3 x 3 and cross" in capsys.readouterr().err
