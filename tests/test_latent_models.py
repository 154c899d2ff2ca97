"""Models of latents, from training to pictures: they decode by themselves, everywhere."""

import json
import shutil

import latents as tiny
import numpy as np
import pytest
import runs
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import generation
from k_diffusion.data.latent_sources import open_latents

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

TRAIN = "--config latent.json --seed 0 --batch-size 8 --num-workers 0 --sample-n 2 --end-step 1"


def call(script, line, folder, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "STEPS", 1)
        runs.call(script, *line.split(), *more, folder=folder, monkeypatch=patch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with latents of the digits, and a model that was trained on them for a step."""
    folder = tmp_path_factory.mktemp("latent")
    tiny.write(folder)
    call("encode_latents", "--config latent.json --output stored --no-flips", folder)
    call("train", f"{TRAIN} --name stored", folder, *STORED)
    return folder


NOTHING = torch.zeros(4, 1)
STORED = ["--set=dataset.type=latents", "--set=dataset.location=stored"]


@pytest.fixture
def folder(made, tmp_path):
    """The same folder, for a test to write into."""
    return shutil.copytree(made, tmp_path / "it")


def read(path):
    return torch.load(path, weights_only=True)


def test_the_checkpoint_tells_how_to_decode(made):
    config = read(made / "stored_00000001.pth")["config"]
    mean, std = open_latents(made / "stored").statistics()
    section = config["autoencoder"]
    assert (section["mean"], section["std"]) == (mean, std)
    assert section["fingerprint"] == K.loading.load_autoencoder(made / "ae.safetensors").fingerprint
    assert config["dataset"]["num_classes"] == 10  # as many as the labels have


def test_training_on_the_fly_is_training_on_stored_latents(folder):
    call("train", f"{TRAIN} --name fly", folder)
    stored, fly = (read(folder / f"{name}_00000001.pth") for name in ("stored", "fly"))
    for a, b in zip(stored["model"].values(), fly["model"].values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    sections = stored["config"]["autoencoder"], fly["config"]["autoencoder"]
    for key in ("mean", "std"):
        assert sections[0][key] == pytest.approx(sections[1][key], abs=1e-5)


def test_a_run_stays_with_its_autoencoder(folder):
    tiny.write_autoencoder(folder / "ae.safetensors", seed=1)
    says = (
        r"stored_00000001.pth was trained on the latents of another autoencoder \(fingerprint \w+"
    )
    with pytest.raises(SystemExit, match=rf"{says}\) than ae.safetensors \(\w+\); pass the one"):
        call("train", f"{TRAIN} --name stored", folder)


def test_demo_grids_are_pictures(made):
    with Image.open(made / "stored_demo_00000001.png") as grid:
        assert grid.mode == "L"
        assert grid.size == (48 + 4, 2 * 50 + 2)  # two images of 8 x 8, enlarged


def test_load_and_sample(made):
    model = K.load(made / "stored_00000001.pth")  # the autoencoder lies beside it
    assert (model.shape, model.image_shape) == ((2, 4, 4), (1, 8, 8))
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(model.decode(x), model.autoencoder.decode(x))
    images = K.sample(model, n=3, steps=2, seed=5)
    assert [image.size for image in images] == [(8, 8)] * 3
    sigmas = K.sampling.get_sigmas_karras(2, model.sigma_min, model.sigma_max)
    noise = K.sampling.randn_per_seed([5], model.shape) * sigmas[0]
    cond = {"class_cond": torch.tensor([0])}
    latents = K.sampling.sample(model, noise, sigmas, "dpmpp_2m", [5], extra_args=cond)
    assert torch.equal(
        K.common.images.from_pil_image(images[0]),
        K.common.images.from_pil_image(K.common.images.to_pil_image(model.decode(latents)[0])),
    )
    guided = K.guidance.CFGDenoiser(model, 2.0, class_cond=torch.tensor([10]))
    assert K.sample(guided, n=1, steps=1)[0].size == (8, 8)


def test_sample_py_decodes_and_edits(folder, capsys):
    flags = "--checkpoint stored_00000001.pth -n 2 --steps 2 --device cpu --seed 0"
    call("sample", f"{flags} --cfg-scale 2 --prefix a", folder)
    assert "2 images of 8 x 8" in capsys.readouterr().out
    call("sample", f"{flags} --size 16x8 --grid b.png", folder)
    assert "the model was trained on 8 x 8" in capsys.readouterr().out
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 3, 3))
    mask.save(folder / "mask.png")
    call("sample", f"{flags} --prefix c --init-image a_00000.png --mask mask.png", folder)
    call("sample", f"{flags} --prefix d --init-image a_00000.png --invert", folder)
    assert "of latents of standard deviation 0.5" in capsys.readouterr().out
    before, after = (np.asarray(Image.open(folder / f"{i}_00000.png")) for i in "ac")
    painted = np.asarray(mask) > 0
    assert (after[~painted] == before[~painted]).all()
    assert (after[painted] != before[painted]).any()
    Image.new("L", (8, 8)).save(folder / "mask.png")
    call("sample", f"{flags} --prefix e --init-image a_00000.png --mask mask.png", folder)
    assert (np.asarray(Image.open(folder / "e_00001.png")) == before).all()
    with pytest.raises(SystemExit, match="whose sides are multiples of 2"):
        call("sample", f"{flags} --size 7", folder)


def test_the_unmasked_latents_and_pixels_are_the_images(folder):
    from argparse import Namespace

    from k_diffusion.scripts import editing

    model = K.load(folder / "stored_00000001.pth")
    Image.new("L", (8, 8), 99).save(folder / "image.png")
    mask = Image.new("L", (8, 8))
    mask.putpixel((3, 0), 255)  # one pixel, and so the latent above it
    mask.save(folder / "mask.png")
    args = Namespace(
        init_image=folder / "image.png", mask=folder / "mask.png", strength=None, invert=False,
        inpaint_correction=0.0, resample=1, jump=None,
    )  # fmt: skip
    sigmas = torch.tensor([1.0, 0.0])
    edit = editing.prepare(
        args, model, model.config, model.shape, sigmas, [0], torch.device("cpu"), print
    )
    assert edit.denoiser.mask.nonzero().tolist() == [[0, 0, 0, 1]]
    done = edit.finish(torch.full((1, 1, 8, 8), 7.0))
    assert (done == 7).nonzero().tolist() == [[0, 0, 0, 3]]
    whole = K.editing.read_image(folder / "image.png", (1, 8, 8))
    moments = model.autoencoder.encode(whole)
    latents = model.autoencoder.sample(moments, noise=torch.zeros(1, 2, 4, 4))
    torch.testing.assert_close(edit.denoiser.image, latents)
    assert torch.equal(done[done != 7], whole[done != 7])


def test_evaluate_compares_images_and_tells_latents_apart(folder, capsys):
    flags = "--checkpoint stored_00000001.pth -n 12 --steps 1 --device cpu --protocol random"
    call("evaluate", f"{flags} --resamples 0 --likelihood 2 --n-reference 40", folder)
    said = capsys.readouterr().out
    assert "bits/dim of latents" in said
    rows = json.loads((folder / "evaluation" / "results.json").read_text())
    assert {row["key"] for row in rows} == {"fd", "latent_bits_per_dim"}


def test_the_likelihood_of_latents_is_their_densitys():
    """Of a model that knows its normal data exactly, whatever the autoencoder."""
    from types import SimpleNamespace

    from k_diffusion.evaluation.likelihood import real_likelihood

    class Same(torch.nn.Module):
        image_channels, latent_channels, factor = 1, 1, 1

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def moments(self, images):
            return torch.cat([images, torch.zeros_like(images)], 1)

    class Normal(torch.nn.Module):
        def __init__(self, std):
            super().__init__()
            self.std = std
            self.autoencoder = K.encoders.autoencoder.Autoencoder(Same(), scale=2.0)

        def forward(self, x, sigma, unet_cond=0.0, mapping_cond=NOTHING):
            s = sigma[:, None, None, None] ** 2
            mean = unet_cond + mapping_cond[..., None, None]
            return mean + (x - mean) * self.std**2 / (self.std**2 + s)

    images = torch.randn(4, 1, 2, 2)
    items = {"image": images, "class": torch.zeros(4), "caption": ["", "a", "aa", "aaa"]}
    reals = SimpleNamespace(
        spaced=lambda n: range(n), items=lambda *_: [dict(items)], section={"type": "digits"}
    )
    one = SimpleNamespace(
        is_main_process=True, num_processes=1, process_index=0, device=torch.device("cpu")
    )
    config = {
        "model": {"sigma_min": 1e-3, "sigma_max": 80.0, "sigma_data": 2.0},
        "dataset": {"num_classes": 0},
    }
    bits = real_likelihood(one, Normal(2.0), config, reals, 4)
    law = torch.distributions.Normal(0.0, 2.0)
    want = -law.log_prob(2 * images).flatten(1).mean(1) / torch.tensor(2.0).log()
    torch.testing.assert_close(bits, want, atol=0.01, rtol=0)

    # of a model that is told the image itself and its caption, by which it is wrong
    config["image_condition"] = {"type": "grayscale"}
    config["model"] |= {"mapping_cond_dim": 1, "sigma_max": 4000.0}  # a mean of 9 is none there
    config["dataset"]["type"] = "latents"

    def encode(texts):
        return None, None, torch.tensor([[float(len(text))] for text in texts])

    bits = real_likelihood(one, Normal(2.0), config, reals, 4, encode=encode)
    want = -law.log_prob(torch.arange(4.0)) / torch.tensor(2.0).log()
    torch.testing.assert_close(bits, want, atol=0.01, rtol=0)


def test_the_shared_folder_and_the_slim_file(folder):
    call("convert_for_inference", "stored_00000001.pth --output-folder shared --samples 2", folder)
    card = (folder / "shared" / "README.md").read_text()
    assert "| latents | 2 x 4 x 4 |" in card
    (folder / "ae.safetensors").rename(folder / "moved.safetensors")
    model = K.load(folder / "shared")  # it came along
    assert model.autoencoder is not None
    assert K.sample(model, n=1, steps=1)[0].size == (8, 8)
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at ae.safetensors .*--autoencod"):
        K.load(folder / "stored_00000001.pth")
    K.load(folder / "stored_00000001.pth", autoencoder=folder / "moved.safetensors")
    line = "stored_00000001.pth --output-folder again --samples 0"
    with pytest.raises(SystemExit, match="no autoencoder at ae.safetensors"):
        call("convert_for_inference", line, folder)
    assert not (folder / "again").exists()
    call("convert_for_inference", f"{line} --autoencoder moved.safetensors", folder)
    assert K.load(folder / "again").autoencoder is not None
    tiny.write_autoencoder(folder / "ae.safetensors", seed=1)
    says = (
        r"is another autoencoder \(fingerprint \w+\) than that of the model \(\w+\); pass the one"
    )
    with pytest.raises(ValueError, match=says):
        K.load(folder / "stored_00000001.pth")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set=model.input_channels=3"],
         r"latents of .* have shape \(2, 4, 4\), but the model's are \(3, 4, 4\)"),
        ([*STORED, "--set=model.input_size=[8,8]"],
         r"latents at stored have shape \(2, 4, 4\), but the model's are \(2, 8, 8\)"),
        ([*STORED, "--set=autoencoder.location=other.safetensors"],
         r"of another autoencoder \(fingerprint \w+, ae.safetensors\) than other.safetensors"),
        ([*STORED, "--set=autoencoder.input_range=[0,1]"],
         r"of pixels in \[-1.0, 1.0\], but autoencoder.input_range is \[0.0, 1.0\]"),
        (["--set=dataset.type=latents", "--set=dataset.location=bare"],
         "latents at bare have no statistics; measure them: python encode_latents.py --statistics"),
        ([*STORED, "--set=dataset.flip_prob=0.5"], "no latents of mirrored images"),
        ([*STORED, "--set=dataset.horizontal_flip=true"],
         "dataset.horizontal_flip: latents are .* cropped already; .* set flip_prob"),
        ([*STORED, "--set=dataset.random_crop=true"], "dataset.random_crop: latents are"),
        ([*STORED, "--set=model.augment_prob=0.1"], "latents can't be augmented: set it to 0"),
        (["--set=autoencoder.location=gone"], "no autoencoder at gone"),
        (["--set=autoencoder.location=latent.json"], "damaged or no checkpoint"),
        (["--set=autoencoder.tile=7"], "autoencoder.tile must be a multiple of 2"),
        (["--set=autoencoder.mean=1"], "mean and std are given together"),
        (["--set=autoencoder.input_range=[1,0]"], r"must be \[low, high\] with low < high"),
        (["--set=autoencoder=null", *STORED], "a data set of latents needs one"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused(flags, says, folder):
    if "bare" in flags[-1]:
        (folder / "bare").mkdir()
        moments = torch.ones(20, 4, 4, 4)
        from safetensors.torch import save_file

        save_file({"moments": moments}, folder / "bare" / "a.safetensors")
    tiny.write_autoencoder(folder / "other.safetensors", seed=1)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit, match=says) as ended:
        call("train", f"{TRAIN} --name new", folder, *flags)
    assert "\n" not in str(ended.value)
    assert sorted(folder.rglob("*")) == before
