"""`K.sample`, and models that one shares: folders, cards, the hub (a stand-in)."""

import json
from pathlib import Path
from types import SimpleNamespace

import latents as tiny
import numpy as np
import pytest
import runs
import tiny_text
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import checkpoints, generation, guidance
from k_diffusion.common.hub import HubError
from k_diffusion.common.images import to_pil_image
from k_diffusion.encoders.text import TextEncoder, Texts
from k_diffusion.generation import pretrained


def make(config=None, **sections):
    config = config or runs.tiny_config(**sections)
    torch.manual_seed(0)
    model = K.config.make_model(config)
    for p in model.parameters():  # some begin at 0
        p.data += 0.05 * torch.randn_like(p)
    denoiser = K.config.make_denoiser_wrapper(config)(model)
    return K.loading.Loaded(denoiser.eval().requires_grad_(False), config)


@pytest.fixture(scope="module")
def model():
    return make()


def make_latent(folder, seed=0):
    """A model of latents, whose autoencoder's random weights are of the seed."""
    tiny.write_autoencoder(folder / "ae.safetensors", seed)
    model = make(K.config.load_config(tiny.config()))
    made = K.loading.make_autoencoder(model.config, folders=[folder])
    model.config["autoencoder"]["fingerprint"] = made.fingerprint
    model.denoiser.autoencoder = made
    return model


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


# ------------------------------------------------------------------------------------- sampling


def test_images_are_those_of_generate(model):
    images = K.sample(model, n=3, classes=[3, 7], seed=5, sampler="heun", steps=4)
    sigmas = K.sampling.get_sigmas_karras(4, 0.02, 40)
    options = {"classes": [3, 7, 3], "num_classes": 10, "sampler": "heun"}
    (want,) = generation.generate(model, (1, 8, 8), [5, 6, 7], sigmas, **options)
    assert all(isinstance(image, Image.Image) and image.mode == "L" for image in images)
    assert (pixels(images) == pixels(map(to_pil_image, want))).all()


def test_image_i_depends_on_seed_plus_i_alone(model):
    images = pixels(K.sample(model, n=4, classes=1, seed=3, steps=3))
    few = pixels(K.sample(model, n=2, classes=1, seed=5, steps=3, batch_size=1))
    assert abs(images[2:].astype(int) - few).max() <= 1
    assert (images[0] != images[1]).any()


def test_all_classes_in_turn_by_default(model):
    images = K.sample(model, n=12, steps=2)
    given = K.sample(model, n=12, classes=[*range(10)], steps=2)
    assert (pixels(images) == pixels(given)).all()


def test_guidance_and_schedule(model):
    options = {"n": 2, "classes": 4, "steps": 3}
    images = K.sample(model, **options, cfg_scale=3, schedule="exponential")
    null = torch.tensor([10])
    guided = guidance.CFGDenoiser(model, 3, class_cond=null)
    assert (pixels(images) == pixels(K.sample(guided, **options, schedule="exponential"))).all()
    assert (pixels(images) != pixels(K.sample(model, **options, schedule="exponential"))).any()


def test_an_unconditional_model_in_colour():
    model = make(model={"input_channels": 3}, dataset={"num_classes": 0})
    (image,) = K.sample(model, n=1, steps=2)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    with pytest.raises(ValueError, match="needs a class-conditional model"):
        K.sample(model, cfg_scale=2)
    with pytest.raises(ValueError, match="the model is unconditional"):
        K.sample(model, classes=3)


@pytest.mark.parametrize(
    "classes",
    [
        torch.tensor([3, 7]),
        np.array([3, 7]),
        (3, 7),
        range(3, 8, 4),
        [np.int64(3), torch.tensor(7)],
    ],
)
def test_classes_come_in_many_shapes(model, classes):
    given = K.sample(model, n=3, classes=[3, 7], steps=2)
    assert (pixels(K.sample(model, n=3, classes=classes, steps=2)) == pixels(given)).all()


@pytest.mark.parametrize("one", [3, np.int64(3), torch.tensor(3)])
def test_one_class(model, one):
    given = K.sample(model, n=1, classes=[3], steps=1)
    assert (pixels(K.sample(model, n=1, classes=one, steps=1)) == pixels(given)).all()


@pytest.mark.parametrize("classes", [3.0, "3", [], torch.tensor([3.0]), [[3]], {}, object()])
def test_what_are_no_classes(model, classes):
    with pytest.raises(ValueError, match=r"classes must be a class id, .* got .*; leave it out"):
        K.sample(model, n=1, classes=classes)


@pytest.mark.parametrize(
    "wrong", [{"n": -2}, {"n": 1.0}, {"seed": 1.5}, {"batch_size": 0}, {"batch_size": "4"}]
)
def test_numbers_of_images(model, wrong):
    with pytest.raises(ValueError, match=r"(n|seed|batch_size) must be a whole number, at least"):
        K.sample(model, **wrong)
    assert K.sample(model, n=0) == []


def test_what_is_neither_text_nor_picture(model):
    with pytest.raises(TypeError, match="prompts must be texts, got int"):
        K.sample(model, prompts=["a", 3])
    with pytest.raises(TypeError, match="must be pictures of PIL or their files, got Tensor"):
        K.sample(model, condition_images=torch.zeros(1, 1, 2, 2))


def test_a_path_is_loaded(model, tmp_path):
    K.save_pretrained(model, tmp_path, samples=0)
    images = K.sample(str(tmp_path), n=2, steps=2)
    assert (pixels(images) == pixels(K.sample(model, n=2, steps=2))).all()
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        K.sample(tmp_path / "gone.pth")


def test_what_cannot_be_sampled(model):
    with pytest.raises(ValueError, match="class 10 is out of range"):
        K.sample(model, classes=10)
    with pytest.raises(ValueError, match="unknown sampler 'dpmpp_2n'"):
        K.sample(model, sampler="dpmpp_2n")
    with pytest.raises(TypeError, match="needs a model of K.load"):
        K.sample(model.denoiser)
    with pytest.raises(ValueError, match="images have 5 channels"):
        K.sample(make(model={"input_channels": 5}))


# -------------------------------------------------------------------------------------- folders

ROW = {
    "metric": "FD",
    "protocol": "lite0",
    "value": 12.345,
    "error": 0.25,
    "line": "FD[lite0] 12.3 | n 500",
}


def test_a_folder_is_the_model(model, tmp_path):
    K.save_pretrained(model, tmp_path / "new/digits", [ROW, ROW | {"value": None}], samples=3)
    names = sorted(path.name for path in (tmp_path / "new/digits").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "samples.png"]
    again = K.load(tmp_path / "new/digits")
    assert again.config == model.config
    assert json.loads((tmp_path / "new/digits/config.json").read_text()) == model.config
    assert runs.differences(dict(again.state_dict()), dict(model.state_dict())) == []
    assert Image.open(tmp_path / "new/digits/samples.png").width > 48
    card = (tmp_path / "new/digits/README.md").read_text()
    assert "# digits\n\n![samples](samples.png)" in card
    assert 'model = K.load("digits")' in card
    assert "| FD[lite0] | 12.3 ± 0.2 | FD[lite0] 12.3 \\| n 500 |" in card
    assert card.count("FD[lite0] |") == 1
    assert str(tmp_path) not in card


def test_the_cards_header_is_what_the_hub_reads(model):
    cards = pytest.importorskip("huggingface_hub").ModelCard
    card = cards(pretrained.model_card(model, "me/digits", [ROW]))
    data = card.data.to_dict()
    assert data["library_name"] == "k-diffusion"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("FD[lite0]", 12.345)
    assert result.dataset_type == "digits"
    assert "samples" not in card.text


@pytest.mark.parametrize(
    ("sections", "task", "call"),
    [
        ({}, "unconditional-image-generation", "seed=0)"),
        (
            {
                "model": {"mapping_cond_dim": 12},
                "text": {"type": "transformers", "location": "t5", "prompts": ["a", "b", "c"]},
            },
            "text-to-image",
            'seed=0, prompts=["a", "b"])',
        ),
        (
            {"image_condition": {"type": "downsampled", "factor": 2}},
            "image-to-image",
            'seed=0, condition_images=["photo.png"])',
        ),
    ],
)
def test_the_card_says_how_to_sample_each_kind(sections, task, call):
    card = pretrained.model_card(make(**sections), "me/x")
    assert f'pipeline_tag: "{task}"\n' in card
    assert f"K.sample(model, n=16, {call}" in card
    assert 'K.load("me/x")' in card
    assert "autoencoder" not in card


def test_the_card_of_a_latent_model_tells_of_its_autoencoder(tmp_path):
    model = make_latent(tmp_path)
    size = sum(p.numel() for p in model.inner_model.parameters())
    card = pretrained.model_card(model, "me/x")
    assert f"| image_transformer_v2, {size:,} parameters |" in card  # the autoencoder's apart
    assert "| autoencoder | autoencoder.safetensors |" in card
    assert 'K.load("me/x")' in card
    coder = model.autoencoder
    coder.network = NotOurs(coder.network)  # of a class that nobody can load
    card = pretrained.model_card(model, "me/x")
    says = f"not among the files, fingerprint {coder.fingerprint}"
    assert f"| autoencoder | {says} |" in card
    assert 'K.load("me/x", autoencoder="PATH")' in card
    model.config["autoencoder"]["location"] = str(tmp_path / "own.pt")
    K.save_pretrained(model, tmp_path / "new", samples=0)
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["autoencoder"]["location"] == "own.pt"


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_the_text_encoder_is_found_before_anything_is_written(hub, tmp_path, monkeypatch):
    tiny_text.save(tmp_path / "encoder")
    section = {"type": "transformers", "location": "gone", "max_length": 4, "prompts": ["a one"]}
    model = make(model={"mapping_cond_dim": 12}, text=section)
    with pytest.raises(ValueError, match="no text encoder at gone"):
        K.push_to_hub(model, "me/x", folder=tmp_path / "new")
    assert hub.repositories == []
    weights = model.inner_model.state_dict()
    state = {"config": dict(model.config), "model": weights, "model_ema": weights}
    checkpoints.write_checkpoint(tmp_path / "a.pth", state)

    def convert(*args):
        words = "a.pth", "--output-folder", "new", "--samples", 1, *args
        runs.call("convert_for_inference", *words, folder=tmp_path, monkeypatch=monkeypatch)

    with pytest.raises(SystemExit, match="no text encoder at gone"):
        convert()
    assert not (tmp_path / "new").exists()
    convert("--text-encoder", "encoder")
    assert (tmp_path / "new/samples.png").exists()


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_folder_is_whole_wherever_it_goes(hub, tmp_path, monkeypatch):
    """With an autoencoder of diffusers and a text encoder whose tokenizer is elsewhere."""
    tiny_diffusers = pytest.importorskip("tiny_diffusers")
    far = tmp_path / "far"
    tiny_diffusers.autoencoder(in_channels=1, out_channels=1).save_pretrained(far / "coder")
    tiny_text.save(far / "encoder", tokenizer=False)
    tiny_text.save(far / "tokens")
    config = tiny.config(
        autoencoder={"location": str(far / "coder"), "mean": 0.1, "std": 2.0},
        model={"input_channels": 4, "mapping_cond_dim": 12},
        text={
            "type": "transformers",
            "location": str(far / "encoder"),
            "tokenizer": str(far / "tokens"),
            "max_length": 4,
            "prompts": ["a one"],
            "precomputed": str(far / "texts.safetensors"),
        },
    )
    model = make(K.config.load_config(config))
    model.denoiser.autoencoder = K.loading.make_autoencoder(model.config)
    model.config["autoencoder"]["fingerprint"] = model.autoencoder.fingerprint
    model.config["text"]["fingerprint"] = model.text_encoder().fingerprint()
    want = pixels(K.sample(model, n=2, steps=2))
    K.push_to_hub(model, "me/x", samples=1, folder=tmp_path / "new")
    far.rename(tmp_path / "gone")
    ((_, files),) = hub.folders
    assert {"vae/config.json", "text_encoder/config.json"} < files.keys()
    assert "text_encoder/tokenizer.json" in files
    assert not any(str(tmp_path).encode() in data for data in files.values())
    assert b'K.load("me/x")' in files["README.md"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = K.load("../new")
    monkeypatch.chdir(tmp_path)  # the text encoder is read later than the rest
    assert (pixels(K.sample(again, n=2, steps=2)) == want).all()
    K.save_pretrained(again, "new", samples=0)  # over the files that it was read from
    words = "--checkpoint", "../new/model.safetensors", "-n", 1, "--steps", 1, "--device", "cpu"
    runs.call("sample", *words, folder=tmp_path / "elsewhere", monkeypatch=monkeypatch)
    sent = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, revision, allow_patterns, **options):
        asked.append((revision, allow_patterns))
        return str(tmp_path / "new")

    monkeypatch.setattr(sent, "snapshot_download", download)
    assert K.load("me/x").text_encoder().width == 12
    # of the commit that the weights are of
    assert asked[0][0] is None
    assert asked[1] == ("new", ["vae/*", "text_encoder/*"])
    (tmp_path / "new/text_encoder").rename(tmp_path / "missing")
    says = r"no text encoder at text_encoder: .* --text-encoder PATH, or text_encoder=PATH to K.lo"
    with pytest.raises(ValueError, match=says):
        K.load("new").text_encoder()


def test_weights_of_open_clip_come_along(tmp_path, monkeypatch):
    lengths = torch.nn.Linear(1, 12)

    def load(model, location):
        def encode(texts):
            x = lengths(torch.tensor([[float(len(text))] for text in texts]))
            return Texts(x[:, None].expand(-1, 77, -1), torch.zeros(len(x), 77).bool(), x)

        copy = lambda folder: (folder / "w.pt").write_bytes(Path(location).read_bytes())  # noqa: E731
        return TextEncoder("open_clip", lengths, encode, 77, copy)

    monkeypatch.setattr(K.conditions, "load_open_clip", load)
    (tmp_path / "w.pt").write_bytes(b"weights")
    section = {"type": "open_clip", "location": str(tmp_path / "w.pt"), "prompts": ["a"]}
    K.save_pretrained(make(model={"mapping_cond_dim": 12}, text=section), tmp_path / "new")
    assert (tmp_path / "new/text_encoder/w.pt").read_bytes() == b"weights"
    again = K.load(tmp_path / "new")
    assert again.config["text"]["location"] == "text_encoder/w.pt"
    assert again.text_encoder().width == 12


class NotOurs(torch.nn.Module):
    """An autoencoder of another class."""

    def __init__(self, network):
        super().__init__()
        self.network, self.factor = network, network.factor


def test_half_precision_and_no_grid(model, tmp_path):
    K.save_pretrained(model, tmp_path, {"FID": 2}, dtype="fp16", samples=0)
    weights = checkpoints.read_weights(tmp_path / "model.safetensors")
    assert torch.float16 in {x.dtype for x in weights.values()}
    assert not (tmp_path / "samples.png").exists()
    assert "| FID | 2 |" in (tmp_path / "README.md").read_text()


def test_the_autoencoder_that_came_along_goes_before_the_working_directorys(tmp_path, monkeypatch):
    for seed, name in enumerate(["here", "there"]):
        K.save_pretrained(make_latent(tmp_path, seed), tmp_path / name, samples=0)
    monkeypatch.chdir(tmp_path / "here")
    own, other = K.load("."), K.load("../there")
    assert own.autoencoder.fingerprint != other.autoencoder.fingerprint
    config = own.config | {"autoencoder": own.config["autoencoder"] | {"fingerprint": None}}
    train = K.loading.make_autoencoder(config, folders=[".", tmp_path / "there"])
    assert train.fingerprint == own.autoencoder.fingerprint
    (tmp_path / "there/autoencoder.safetensors").unlink()
    with pytest.raises(ValueError, match="is another autoencoder"):
        K.load("../there")
    (tmp_path / "here/autoencoder.safetensors").unlink()
    says = r"--autoencoder PATH, .* to train or encode, pass --set autoencoder.location=PATH"
    with pytest.raises(FileNotFoundError, match=says):
        K.load("../there")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "m.json is not JSON"),
        ("3", "m.json must be a list of rows, got 3"),
        ("[1]", "m.json: a row needs 'metric' and 'value', got 1"),
        ('{"FID": "low"}', "m.json: FID must be a number, got 'low'"),
    ],
)
def test_metrics_that_are_none(model, tmp_path, text, says):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        K.save_pretrained(model, tmp_path / "new", tmp_path / "m.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"samples": -1}, "samples must be a whole number, at least 0, got -1"),
        ({"samples": 2.5}, "samples must be a whole number"),
    ],
)
def test_wrong_choices_write_nothing(model, tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        K.save_pretrained(model, tmp_path / "new", **wrong)
    with pytest.raises(TypeError, match="needs a model of K.load, .* got Denoiser"):
        K.save_pretrained(model.denoiser, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------ hub


@pytest.fixture
def hub(monkeypatch):
    """What is sent to the hub, instead of sending it."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    sent = SimpleNamespace(repositories=[], folders=[])

    class Api:
        def create_repo(self, repo, **options):
            if repo == "you/x":
                raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required.")
            sent.repositories.append((repo, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
            files = [path for path in folder_path.rglob("*") if path.is_file()]
            names = [path.relative_to(folder_path).as_posix() for path in files]
            names = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)
            sent.folders.append((repo_id, {n: (folder_path / n).read_bytes() for n in names}))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return sent


def test_pushing_makes_the_repository_and_uploads_the_folder(hub, model, tmp_path):
    url = K.push_to_hub(model, "me/digits", samples=1, private=True)
    assert url == "https://hub/me/digits/commit/1"
    assert hub.repositories == [("me/digits", {"private": True, "exist_ok": True})]
    ((repo, files),) = hub.folders
    assert repo == "me/digits"
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "samples.png"}
    assert 'K.load("me/digits")' in files["README.md"].decode()
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    assert K.load(tmp_path).config == model.config


def test_who_may_not_push_learns_it_before_the_work(hub, model, monkeypatch):
    monkeypatch.setattr(pretrained, "sample", None)
    with pytest.raises(HubError, match=r"can't push to you/x: the hub refuses it .* log in"):
        K.push_to_hub(model, "you/x")
    assert hub.folders == []


def test_the_conversion_script_shares_a_model(hub, model, tmp_path, monkeypatch, capsys):
    weights = model.inner_model.state_dict()
    state = {"config": dict(model.config), "model": weights, "model_ema": weights}
    checkpoints.write_checkpoint(tmp_path / "a.pth", state)
    (tmp_path / "results.json").write_text(json.dumps([ROW]))

    def convert(*args):
        runs.call("convert_for_inference", *args, folder=tmp_path, monkeypatch=monkeypatch)

    convert("a.pth", "--output-folder", "new", "--metrics", "results.json", "--samples", 1)
    assert "FD[lite0]" in (tmp_path / "new/README.md").read_text()
    assert K.load(tmp_path / "new").num_classes == 10
    assert hub.folders == []
    # into the folder of the run, whose own files nobody asked to publish
    convert("a.pth", "--push-to-hub", "me/a", "--output-folder", ".", "--samples", 0)
    assert hub.folders[0][1].keys() == {"README.md", "config.json", "model.safetensors"}
    assert (tmp_path / "README.md").read_bytes() == hub.folders[0][1]["README.md"]
    assert "pushed https://hub/me/a/commit/1" in capsys.readouterr().out
    assert not (tmp_path / "a.safetensors").exists()
