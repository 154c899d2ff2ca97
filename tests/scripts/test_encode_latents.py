"""encode_latents.py: what it writes, goes on with, refuses."""

import json
import shutil
from types import SimpleNamespace

import latents as tiny
import numpy as np
import pytest
import runs
import tiny_text
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import generation
from k_diffusion.data.latent_sources import open_latents
from k_diffusion.encoders.text import StoredTexts, TextEncoder, load_transformers
from k_diffusion.evaluation.reals import RealImages
from k_diffusion.scripts import encode_captions

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


@pytest.fixture
def encode(tmp_path, monkeypatch):
    tiny.write(tmp_path, dataset={"split": "test"})

    def call(*flags, output="out"):
        words = ["--config", "latent.json", "--output", output, "--shard-size", 150, *flags]
        runs.call("encode_latents", *words, folder=tmp_path, monkeypatch=monkeypatch)
        return open_latents(tmp_path / output)

    return call


def test_latents_of_a_data_set(encode, tmp_path, capsys):
    source = encode()
    assert "wrote out: mean " in capsys.readouterr().out
    raw = tiny.config()["dataset"] | {"split": "test"}
    section = K.config.load_config(tiny.config(dataset=raw))["dataset"]
    images, classes = RealImages(section, (8, 8), 1).load(10_000)
    coder = K.loading.load_autoencoder(tmp_path / "ae.safetensors")
    moments, flipped = coder.encode(images), coder.encode(images.flip(3))
    assert len(source) == len(images) == 355
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["latents.json", *(f"latents_0000{k}.safetensors" for k in range(3))]
    found = torch.stack([source.moments(i) for i in range(355)])
    torch.testing.assert_close(found, moments)
    torch.testing.assert_close(torch.stack([source.moments(i, True) for i in range(355)]), flipped)
    assert [source.label(i) for i in range(355)] == classes.tolist()
    info = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert info["autoencoder"] == {
        "location": "ae.safetensors",
        "fingerprint": coder.fingerprint,
        "input_range": [-1.0, 1.0],
    }
    assert (info["image_shape"], info["shape"], info["num_classes"]) == ([1, 8, 8], [2, 4, 4], 10)
    assert info["dataset"]["type"] == "digits"
    means, deviations = torch.cat([moments, flipped]).double().chunk(2, 1)
    mean, std = source.statistics()
    assert mean == pytest.approx(means.mean((0, 2, 3)).tolist(), abs=1e-6)
    squares = (means**2 + deviations**2).mean((0, 2, 3))
    assert std == pytest.approx((squares - means.mean((0, 2, 3)) ** 2).sqrt().tolist(), rel=1e-5)


def test_it_goes_on_where_it_was_stopped(encode, tmp_path, capsys):
    encode("--no-flips")
    folder = tmp_path / "out"
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    first, second, third = sorted(folder.glob("*.safetensors"))
    kept = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:1000])  # cut off
    third.unlink()
    (folder / "latents.json").unlink()
    with pytest.raises(ValueError, match=r"is not encoded to its end|complete safetensors file"):
        open_latents(folder)
    capsys.readouterr()
    source = encode("--no-flips")
    assert "3 files, 1 of them done" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    assert first.stat().st_mtime_ns == kept
    assert not source.flips


def test_processes_share_the_files(encode, tmp_path, monkeypatch):
    from k_diffusion.scripts import encode_latents

    written = []
    made = encode_latents.Shards._encode
    monkeypatch.setattr(
        encode_latents.Shards, "_encode", lambda *args: written.append(args[1]) or made(*args)
    )
    share = encode_latents.distributed.share
    for process in (1, 0):  # the other one's files are there when the main one comes
        one = SimpleNamespace(process_index=process, num_processes=2)
        monkeypatch.setattr(
            encode_latents.distributed, "share", lambda _, n, one=one: share(one, n)
        )
        if process:
            monkeypatch.setattr(encode_latents.Shards, "finish", lambda self: None)
            with pytest.raises(ValueError, match="is not encoded to its end"):
                encode("--no-flips")
            monkeypatch.undo()
            monkeypatch.setattr(
                encode_latents.Shards,
                "_encode",
                lambda *args: written.append(args[1]) or made(*args),
            )
    encode("--no-flips")
    assert sorted(written) == [0, 1, 2]
    assert written[0] == 1


def test_half_precision_and_statistics_per_element(encode):
    exact, half = encode("--no-flips"), encode("--dtype", "fp16", "--per-element", output="half")
    assert half.statistics()[0][1][3][3] != half.statistics()[0][1][0][0]
    torch.testing.assert_close(half.moments(3), exact.moments(3), atol=2e-3, rtol=1e-3)


def test_statistics_of_latents_that_are_there(encode, tmp_path, monkeypatch):
    source = encode("--no-flips")
    mean, _ = source.statistics()
    words = "--statistics", "out", "--per-element"
    runs.call("encode_latents", *words, folder=tmp_path, monkeypatch=monkeypatch)
    means = torch.tensor(source.statistics()[0]).mean((1, 2))
    assert means.tolist() == pytest.approx(mean, abs=1e-6)
    encode("--no-flips")
    assert (tmp_path / "out/statistics.json").exists()  # of the same latents
    for path in (tmp_path / "out").glob("latents*"):
        path.unlink()
    tiny.write_autoencoder(tmp_path / "ae.safetensors", seed=1)
    other = encode("--no-flips")
    assert other.statistics() == tuple(other.info["statistics"][key] for key in ("mean", "std"))


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ("autoencoder", [], r"latents of another autoencoder \(fingerprint \w{16}\) than this one"),
        (None, ["--no-flips"], "another data set or other flags; choose another --output"),
        (None, ["--set=dataset.split=all"], "another data set or other flags"),
    ],
)
def test_a_folder_holds_one_kind_of_latents(change, flags, says, encode, tmp_path):
    encode()
    if change:
        tiny.write_autoencoder(tmp_path / "ae.safetensors", seed=1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit, match=says):
        encode(*flags)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_wrong_configs_are_refused(encode, tmp_path, monkeypatch, capsys):
    (tmp_path / "pixels.json").write_text(json.dumps(runs.TINY))
    for name, says in (("pixels.json", "needs an autoencoder section"), ("gone.json", "no config")):
        with pytest.raises(SystemExit, match=says):
            runs.call("encode_latents", "--config", name, "--output", "out", folder=tmp_path,
                      monkeypatch=monkeypatch)  # fmt: skip
    with pytest.raises(SystemExit):
        runs.call("encode_latents", folder=tmp_path, monkeypatch=monkeypatch)
    assert "or --statistics PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- captions

WORDS = ["one", "two", "three"]
PLAIN = "--set=text=null", "--set=model.cross_cond_dim=0", "--set=model.mapping_cond_dim=0"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder with encoded captions of eleven images beside their latents, and its config."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "images").mkdir()
    for i in range(11):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i:02}.png")
        (folder / f"images/{i:02}.txt").write_text(f"a {WORDS[i % 3]}")
    tiny_text.save(folder / "encoder")
    tiny.write(
        folder,
        model={"cross_cond_dim": 12, "mapping_cond_dim": 12},
        dataset={"type": "imagefolder", "location": "images"},
        text={"type": "transformers", "location": "encoder", "max_length": 4},
    )
    with pytest.MonkeyPatch.context() as patch:
        call(folder, patch, "stored", "--no-flips")
    return folder


def call(folder, monkeypatch, output, *flags):
    words = ["--config", "latent.json", "--output", output, "--shard-size", 4, *flags]
    runs.call("encode_latents", *words, folder=folder, monkeypatch=monkeypatch)


def train(folder, patch, name, *more):
    patch.setattr(generation, "STEPS", 1)
    words = ["--config", "latent.json", "--name", name, "--seed", 0, "--end-step", 1]
    words += ["--batch-size", 4, "--num-workers", 0, "--sample-n", 2, *more]
    runs.call("train", *words, folder=folder, monkeypatch=patch)
    return torch.load(folder / f"{name}_00000001.pth", weights_only=True)


STORED = ["--set=dataset.type=latents", "--set=dataset.location=stored"]


def test_captions_are_stored_with_what_their_encoder_makes_of_them(told):
    source = open_latents(told / "stored")
    encoder = load_transformers(told / "encoder", max_length=4)
    texts = [f"a {WORDS[i % 3]}" for i in range(11)]
    assert [source.caption(i) for i in range(11)] == texts
    stored = StoredTexts(told / "stored")
    for got, want in zip(stored(texts), encoder(texts)):
        torch.testing.assert_close(got, want)
    assert source.info["text"] == {
        "type": "transformers",
        "location": "encoder",
        "fingerprint": encoder.fingerprint(),
        "length": 4,
    }
    assert stored.fingerprint == encoder.fingerprint()


def test_a_latent_model_of_texts_trains_by_stored_captions(told, monkeypatch):
    """As by encoding images and captions in each step; the encoder is asked for the prompts."""
    fly = train(told, monkeypatch, "fly")
    asked = []
    forward = TextEncoder.forward
    monkeypatch.setattr(
        TextEncoder, "forward", lambda self, texts: asked.extend(texts) or forward(self, texts)
    )
    stored = train(told, monkeypatch, "stored", *STORED, '--set=text.prompts=["two and one"]')
    assert set(asked) == {"a", "two and one"}  # "a" tells the widths
    for a, b in zip(fly["model"].values(), stored["model"].values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    prints = [state["config"]["text"]["fingerprint"] for state in (fly, stored)]
    assert prints == [StoredTexts(told / "stored").fingerprint] * 2

    model = K.load(told / "stored_00000001.pth", text_encoder=told / "encoder")
    assert K.sample(model, n=1, steps=1, prompts="a three")[0].size == (8, 8)
    tiny_text.save(told / "other", seed=1)
    model = K.load(told / "stored_00000001.pth", text_encoder=told / "other")
    with pytest.raises(ValueError, match=r"other is another text encoder .*\w{16}\) than that of"):
        K.sample(model, n=1, steps=1, prompts="a three")


def test_stored_captions_alone_need_no_encoder(told, tmp_path, monkeypatch):
    folder = shutil.copytree(told, tmp_path / "it")
    shutil.rmtree(folder / "encoder")
    state = train(folder, monkeypatch, "bare", *STORED, "--set=text.precomputed=stored")
    assert state["config"]["text"]["fingerprint"] == StoredTexts(folder / "stored").fingerprint
    assert {*open_latents(folder / "stored").texts()} == {f"a {word}" for word in WORDS}


def test_another_encoder_can_take_the_captions(told, monkeypatch):
    tiny_text.save(told / "other", seed=1)
    other = "--set=text.location=other"
    says = (
        r"at stored are encoded by another text encoder \(fingerprint \w{16}\) than other \(\w{16}"
    )
    with pytest.raises(SystemExit, match=says):
        train(told, monkeypatch, "new", *STORED, other)
    says = r"max_length is 3, but the texts of stored have 4 tokens; set it to 4"
    with pytest.raises(SystemExit, match=says):
        train(told, monkeypatch, "new", *STORED, "--set=text.max_length=3")
    with pytest.raises(SystemExit, match=r"latents of another text encoder \(fingerprint \w{16}"):
        call(told, monkeypatch, "stored", "--no-flips", other)
    monkeypatch.chdir(told)
    words = ["encode_captions", "--config", "latent.json", *STORED, other, "--output"]
    monkeypatch.setattr("sys.argv", [*words, "others.safetensors"])
    encode_captions.main()
    assert sorted(StoredTexts("others.safetensors").places) == ["a one", "a three", "a two"]
    more = "--set=text.precomputed=others.safetensors"
    train(told, monkeypatch, "new", *STORED, other, more)


def test_captions_can_be_stored_for_a_later_encoder(told, tmp_path, monkeypatch):
    folder = shutil.copytree(told, tmp_path / "it")
    call(folder, monkeypatch, "plain", *PLAIN)
    says = "latents at plain have no captions; encode the images anew with a config that has"
    with pytest.raises(SystemExit, match=says):
        train(folder, monkeypatch, "later", STORED[0], "--set=dataset.location=plain")
    call(folder, monkeypatch, "texts", *PLAIN, "--captions")
    assert open_latents(folder / "texts").caption(4) == "a two"
    train(folder, monkeypatch, "later", STORED[0], "--set=dataset.location=texts")


def test_an_image_without_a_caption_ends_the_encoding(told, tmp_path, monkeypatch):
    folder = shutil.copytree(told, tmp_path / "it")
    (folder / "images" / "07.txt").unlink()
    says = r"1 of 11 images have no caption at 'txt', such as images/07\.png; set dataset\.caption_"
    with pytest.raises(SystemExit, match=rf"{says}key, or leave out the section text$"):
        call(folder, monkeypatch, "new")
    with pytest.raises(SystemExit, match=rf"{says}key, or leave out --captions$"):
        call(folder, monkeypatch, "new", "--captions", *PLAIN)
    assert not (folder / "new").exists()
