"""`K.load`: files, folders and repositories of the hub, whose network is a stand-in."""

import json
import shutil
from types import SimpleNamespace

import pytest
import runs
import torch
from problems import normal
from safetensors.torch import load_file, save_file

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.common.hub import HubError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in both kinds of checkpoint; the averaged weights are not the others."""
    folder = tmp_path_factory.mktemp("models")
    config = runs.tiny_config()
    torch.manual_seed(0)
    model = K.config.make_model(config)
    for p in model.parameters():  # some begin at 0
        p.data += 0.05 * torch.randn_like(p)
    weights = model.state_dict()
    checkpoints.write_inference(folder / "a.safetensors", config, weights, "fp32")
    zeros = {k: torch.zeros_like(v) for k, v in weights.items()}
    state = {"config": config, "model": zeros, "model_ema": weights}
    checkpoints.write_checkpoint(folder / "b.pth", state)
    return folder


@pytest.fixture
def hub(monkeypatch, folder, tmp_path):
    """A hub with repositories by their names, and the calls that it got."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "one").mkdir()
    shutil.copy(folder / "a.safetensors", tmp_path / "one")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/config.json").write_text("{}")
    calls = []

    def download(repo, **options):
        calls.append((repo, options))
        if repo not in ("me/one", "me/none"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nMore.")
        return str(tmp_path / repo.removeprefix("me/"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return SimpleNamespace(calls=calls, errors=huggingface_hub.errors, module=huggingface_hub)


def estimate(model):
    x, sigma = normal(0, 2, 1, 8, 8), torch.tensor([0.5, 3.0])
    return model(x, sigma, class_cond=torch.tensor([3, 10]))


def test_a_model_tells_how_to_sample_it(folder):
    model = K.load(folder / "a.safetensors")
    assert (model.sigma_min, model.sigma_max) == (0.02, 40)
    assert (model.num_classes, model.shape) == (10, (1, 8, 8))
    assert model.config == runs.tiny_config()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    plain, config = K.loading.load_denoiser(folder / "a.safetensors")
    assert config == model.config
    assert torch.equal(estimate(model), estimate(plain))


def test_a_training_checkpoint_gives_its_averaged_weights(folder):
    assert torch.equal(
        estimate(K.load(folder / "b.pth")), estimate(K.load(folder / "a.safetensors"))
    )


def test_device(folder):
    model = K.load(str(folder / "a.safetensors"), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_published_file_with_nothing_but_weights_and_a_config(folder, tmp_path):
    """No digest, half precision, a config without the defaults of this version."""
    weights = {k: v.half() for k, v in load_file(folder / "a.safetensors").items()}
    save_file(weights, tmp_path / "p.safetensors", metadata={"config": json.dumps(runs.TINY)})
    model = K.load(tmp_path / "p.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    want = estimate(K.load(folder / "a.safetensors"))
    torch.testing.assert_close(estimate(model), want, rtol=0, atol=2e-2)


def test_a_config_beside_weights_that_have_none(folder, tmp_path):
    save_file(load_file(folder / "a.safetensors"), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="has no config in its metadata"):
        K.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(runs.TINY))
    assert torch.equal(estimate(K.load(tmp_path)), estimate(K.load(folder / "a.safetensors")))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "w.safetensors has no config in its metadata; put a config.json beside it"),
        (
            '{"_class_name": "UNet2DModel", "act_fn": "silu"}',
            "of diffusers, UNet2DModel; .*make_dif",
        ),
        (
            '{"architectures": ["BertModel"], "model_type": "bert"}',
            "of transformers, BertModel, .*t",
        ),
        ('{"model_type": "bert"}', "of transformers, bert, which is no denoiser"),
        ('{"modle": {}}', "config.json, the config of w.safetensors: unknown key 'modle'"),
        ("{nope", "config.json is not JSON"),
    ],
)
def test_a_model_of_others(folder, tmp_path, config, says):
    save_file(load_file(folder / "a.safetensors"), tmp_path / "w.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    for source in tmp_path, tmp_path / "w.safetensors":
        with pytest.raises(ValueError, match=says):
            K.load(source)


def test_a_folder_of_others_with_weights_twice_or_not_at_all(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for names in [], ["a.safetensors", "a.fp16.safetensors"]:
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match="of a model of diffusers, UNet2DModel"):
            K.load(tmp_path)


def test_the_model_of_a_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="has no weights: no .safetensors file"):
        K.load(tmp_path)
    shutil.copy(folder / "b.pth", tmp_path / "b.pth")
    assert K.load(tmp_path).num_classes == 10
    shutil.copy(folder / "b.pth", tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"has 2 .pth files \(b.pth, c.pth\); name one: .*/FILE"):
        K.load(tmp_path)
    shutil.copy(folder / "a.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "other.safetensors").touch()
    assert K.load(tmp_path).num_classes == 10


def test_a_repository(hub, folder):
    model = K.load("me/one", revision="abc123", device="cpu")
    assert torch.equal(estimate(model), estimate(K.load(folder / "a.safetensors")))
    ((repo, options),) = hub.calls
    assert (repo, options["revision"]) == ("me/one", "abc123")
    assert options["allow_patterns"] == ["*.safetensors", "config.json"]


def test_a_file_of_a_repository(hub):
    assert K.load("me/one/a.safetensors").num_classes == 10
    names = ["a.safetensors", "config.json", "autoencoder.safetensors"]
    assert hub.calls[0][1]["allow_patterns"] == names
    with pytest.raises(FileNotFoundError, match="the repository me/one has no file sub/b.pth"):
        K.load("me/one/sub/b.pth")
    names = ["sub/b.pth", "sub/config.json", "sub/autoencoder.safetensors"]
    assert hub.calls[1][1]["allow_patterns"] == names


def test_a_repository_without_weights(hub):
    with pytest.raises(ValueError, match="me/none has no weights: no .safetensors file"):
        K.load("me/none")


def test_no_network_is_a_sentence(hub):
    said = "can't load me/x at revision v1, .* the hub can't be reached; connect to the network"
    with pytest.raises(HubError, match=said) as error:
        K.load("me/x", revision="v1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("RepositoryNotFoundError", 404, "has no such repository, or hides it"),
        ("GatedRepoError", 403, "terms to be accepted"),
        ("RevisionNotFoundError", 404, "no such revision"),
        ("HfHubHTTPError", 401, r"the hub refuses it \(Why\); log in"),
        ("HfHubHTTPError", 500, "the hub answers: Why; pass a local folder"),
        ("HFValidationError", None, "a repository is OWNER/NAME"),
        ("OfflineModeIsEnabled", None, "can't be reached"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(hub, monkeypatch, name, status, says):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    options = {"response": response} if status else {}

    def refuse(*args, **kwargs):
        raise getattr(hub.errors, name)("Why.\nA trace.", **options)

    monkeypatch.setattr(hub.module, "snapshot_download", refuse)
    with pytest.raises(HubError, match=says) as error:
        K.load("me/x")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_no_matter_of_the_hub(hub, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.module, "snapshot_download", fill)
    with pytest.raises(OSError, match="No space left") as error:
        K.load("me/x")
    assert not isinstance(error.value, HubError)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "k-diffusion\[hub\]"'):
        K.load("me/one")


@pytest.mark.parametrize("source", ["gone", "gone.pth", "runs/gone.pth", "/gone/a", "../gone/a"])
def test_what_is_neither_a_file_nor_a_repository(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder {source}"):
        K.load(source)


def test_a_revision_of_a_file_is_refused(folder):
    with pytest.raises(ValueError, match="a revision is of a repository of the hub"):
        K.load(folder / "a.safetensors", revision="main")
