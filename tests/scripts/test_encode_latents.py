"""encode_latents.py: what it writes, goes on with, refuses."""

import json
from types import SimpleNamespace

import latents as tiny
import pytest
import runs
import torch

import k_diffusion as K
from k_diffusion.data.latents import open_latents
from k_diffusion.evaluation.reals import RealImages

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
