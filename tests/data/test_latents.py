"""Latents on disk: every format, draws by seed, statistics, and encoding on the fly."""

import json
import zipfile

import latents as tiny
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import k_diffusion as K
from k_diffusion.data.latent_sources import open_latents
from k_diffusion.data.latents import (
    Latents,
    LatentStatistics,
    LatentTransform,
    encoded,
    images_section,
    latent_noise,
)
from k_diffusion.data.training_data import TrainingData

MOMENTS = torch.cat([torch.randn(5, 2, 4, 4), torch.rand(5, 2, 4, 4) + 0.1], 1)
LABELS = [3, 0, 2, 1, 3]


def write_npy(folder):
    for i, moments in enumerate(MOMENTS):
        path = folder / f"{i // 3:05}" / f"img-mean-std-{i:08}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, moments.numpy())
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.npy"))
    labels = list(zip(names, LABELS))
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def zipped(folder, path, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as file:
        for part in sorted(folder.rglob("*.*")):
            file.write(part, part.relative_to(folder))


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_edm2s_and_repas_files_are_read(kind, tmp_path):
    write_npy(tmp_path / "vae-sd")
    path = tmp_path / "vae-sd"
    if kind == "zip":
        path = tmp_path / "latents.zip"
        zipped(tmp_path / "vae-sd", path)
    source = open_latents(path)
    assert (len(source), source.shape, source.num_classes, source.flips) == (5, (2, 4, 4), 4, False)
    assert all(torch.equal(source.moments(i), MOMENTS[i]) for i in range(5))
    assert [source.label(i) for i in range(5)] == LABELS
    assert source.statistics() is None
    assert source.info == {}


def write_lightning(folder):
    folder.mkdir()
    means = MOMENTS[:, :2]
    for k, rows in enumerate((slice(0, 3), slice(3, 5))):
        part = {"latents": means[rows], "latents_flip": means[rows].flip(3)}
        part["labels"] = torch.tensor(LABELS[rows])
        save_file(
            {k: v.contiguous() for k, v in part.items()}, folder / f"latents_rank00_{k}.safetensors"
        )
    stats = {"mean": means.mean((0, 2, 3), True), "std": means.std((0, 2, 3), keepdim=True)}
    torch.save(stats, folder / "latents_stats.pt")


def test_lightningdits_shards_are_read(tmp_path):
    write_lightning(tmp_path / "vavae")
    source = open_latents(tmp_path / "vavae")
    assert (len(source), source.shape, source.num_classes, source.flips) == (5, (2, 4, 4), 4, True)
    for i in range(5):
        mean, std = source.moments(i).chunk(2)
        assert torch.equal(mean, MOMENTS[i, :2])
        assert not std.any()
        assert torch.equal(source.moments(i, flip=True)[:2], MOMENTS[i, :2].flip(2))
    mean, std = source.statistics()
    torch.testing.assert_close(mean, MOMENTS[:, :2].mean((0, 2, 3)))
    torch.testing.assert_close(std, MOMENTS[:, :2].std((0, 2, 3)))


def test_large_shards_are_read_row_by_row(tmp_path, monkeypatch):
    import k_diffusion.data.latent_sources as module

    write_lightning(tmp_path / "vavae")
    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    source = Latents(tmp_path / "vavae", None).source
    assert torch.equal(source.moments(4)[:2], MOMENTS[4, :2])
    import pickle

    again = pickle.loads(pickle.dumps(source))  # as spawned workers get it
    assert torch.equal(again.moments(3, True), source.moments(3, True))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda p: None, "no latents at .*; encode_latents.py writes them"),
        (lambda p: p.mkdir(), "holds no latents: neither .safetensors nor a dataset.json"),
        (lambda p: p.write_bytes(b"no"), "is no zip of latents"),
        (lambda p: (write_npy(p.parent / "a"), zipped(p.parent / "a", p, zipfile.ZIP_DEFLATED)),
         "is compressed; latents are read from zips that are not"),
        (lambda p: zipped(p.parent, p), "has no .npy of latents"),
        (lambda p: (p.mkdir(), save_file({"x": torch.ones(1)}, p / "a.safetensors")),
         "has neither moments nor latents"),
        (lambda p: (p.mkdir(), save_file({"latents": torch.ones(3)}, p / "a.safetensors")),
         r"neither moments nor latents of \(n, c, h, w\)"),
        (lambda p: (p.mkdir(), (p / "a.safetensors").write_bytes(b"x" * 20)), "safetensors file"),
        (lambda p: (p.mkdir(), (p / "dataset.json").write_text('{"labels": [3]}'),
                    np.save(p / "a.npy", np.ones((4, 2, 2), np.float32))), "has no labels as EDM2"),
        (lambda p: (p.mkdir(), (p / "dataset.json").write_text("{}"),
                    np.save(p / "a.npy", np.ones((3, 2, 2), np.float32))), r"hold \(2 c, h, w\)"),
        (lambda p: (p.mkdir(), (p / "dataset.json").write_text("{}"),
                    np.save(p / "a.npy", np.array([{}]), allow_pickle=True)), "damaged or no .npy"),
    ],
)  # fmt: skip
def test_what_holds_no_latents_is_refused(write, says, tmp_path):
    write(tmp_path / "it")
    with pytest.raises(ValueError, match=says) as error:
        open_latents(tmp_path / "it")
    assert "\n" not in str(error.value)


PART = {
    "moments": MOMENTS,
    "moments_flip": MOMENTS.flip(3),
    "labels": torch.tensor(LABELS),
    "captions": torch.zeros(5, dtype=torch.int64),
    "condition": MOMENTS[:, :2].contiguous(),
}
INFO = {"shards": ["a.safetensors", "b.safetensors"],
        "autoencoder": {"fingerprint": "f", "location": "ae", "input_range": [-1, 1]}}  # fmt: skip


@pytest.mark.parametrize("has", ["a", "b"])
@pytest.mark.parametrize("name", ["moments_flip", "labels", "captions", "condition"])
def test_all_files_of_a_folder_have_the_same(name, has, tmp_path):
    for which in "ab":
        kept = {k: x for k, x in PART.items() if which == has or k != name}
        save_file(kept, tmp_path / f"{which}.safetensors")
    lacks = "b" if has == "a" else "a"
    says = f"or none have {name}, but .*{has}.safetensors has them and {lacks}.safetensors hasn't"
    with pytest.raises(ValueError, match=says):
        open_latents(tmp_path)


@pytest.mark.parametrize("name", ["moments_flip", "labels", "captions", "condition"])
def test_each_image_of_a_file_has_one(name, tmp_path):
    save_file(PART, tmp_path / "a.safetensors")
    assert open_latents(tmp_path).label(3) == 1
    save_file({**PART, name: PART[name][:4].clone()}, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=f"{name} must be one for each of the 5 moments, .*b.safetensors .*4"
    ):
        open_latents(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{nope", r"latents.json is damaged: .*; delete it and call encode_latents.py again"),
        ("{}", "latents.json is damaged"),
        ("[]", "latents.json is damaged"),
        (json.dumps({**INFO, "shards": []}), "latents.json is damaged"),
        (json.dumps({**INFO, "autoencoder": {}}), "latents.json is damaged"),
        (json.dumps(INFO), "lacks b.safetensors, which its latents.json lists; copy the whole"),
    ],
)
def test_damaged_notes_and_missing_files_are_told(text, says, tmp_path):
    save_file(PART, tmp_path / "a.safetensors")
    (tmp_path / "latents.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        open_latents(tmp_path)


def test_latents_of_one_place_have_one_shape(tmp_path):
    save_file({"latents": torch.zeros(2, 2, 4, 4)}, tmp_path / "a.safetensors")
    save_file({"latents": torch.zeros(2, 2, 4, 2)}, tmp_path / "b.safetensors")
    says = r"has latents of \(2, 4, 2\), those before it of \(2, 4, 4\)"
    with pytest.raises(ValueError, match=f"b.safetensors {says}"):
        open_latents(tmp_path)
    write_npy(tmp_path / "npy")
    np.save(tmp_path / "npy/z.npy", np.zeros((4, 4, 2), np.float32))
    with pytest.raises(ValueError, match=f"z.npy of .*npy {says}"):
        list(open_latents(tmp_path / "npy").chunks())


def test_statistics_are_those_of_draws():
    """Exact over the noise: against many draws, and against the formula of a mixture."""
    found = LatentStatistics()
    for part in MOMENTS.split(2):
        found.update(part)
    mean, std = MOMENTS.double().chunk(2, 1)
    per_channel, per_element = found.result(), found.result(per_element=True)
    torch.testing.assert_close(per_channel["mean"], mean.mean((0, 2, 3)).tolist())
    variance = mean.var(0, correction=0) + std.square().mean(0)
    torch.testing.assert_close(
        torch.tensor(per_element["std"]).double(), variance.sqrt(), atol=1e-6, rtol=0
    )
    draws = mean + std * torch.randn(4000, *mean.shape)
    spread = draws.std((0, 1, 3, 4)).tolist()
    assert per_channel["std"] == pytest.approx(spread, rel=0.01)
    assert per_channel["images"] == 5


@pytest.mark.parametrize("elements", [False, True])
def test_items_are_drawn_by_their_seed_and_of_sigma_data(elements, tmp_path):
    write_npy(tmp_path / "it")
    known = LatentStatistics().update(MOMENTS).result(elements)
    transform = LatentTransform(known["mean"], known["std"], 0.5, 2)
    data = TrainingData(Latents(tmp_path / "it", transform), num_classes=4)
    item = data[2, 77]
    assert item["class"] == LABELS[2]
    assert torch.equal(item["image"], data[2, 77]["image"])
    assert not torch.equal(item["image"], data[2, 78]["image"])
    noise = latent_noise([77], (2, 4, 4))[0]
    mean, std = MOMENTS[2].chunk(2)
    shift, scale = (
        torch.tensor(known[k]).reshape(2, *(4, 4) if elements else (1, 1)) for k in ("mean", "std")
    )
    torch.testing.assert_close(item["image"], (mean + std * noise - shift) * 0.5 / scale)
    dims = (0,) if elements else (0, 2, 3)
    drawn = torch.stack([data[i % 5, i]["image"] for i in range(1500)])
    assert drawn.mean(dims).abs().max() < 0.1
    assert (drawn.std(dims) - 0.5).abs().max() < 0.08


def test_mirrored_latents_are_taken_as_often_as_asked(tmp_path):
    write_lightning(tmp_path / "it")
    plain = LatentTransform(0.0, 1.0, 1.0, 2)
    data = TrainingData(Latents(tmp_path / "it", plain, flip_prob=0.5))
    mirrored = [torch.equal(data[0, seed]["image"], MOMENTS[0, :2].flip(2)) for seed in range(200)]
    assert 70 < sum(mirrored) < 130
    never = TrainingData(Latents(tmp_path / "it", plain))
    assert all(torch.equal(never[0, seed]["image"], MOMENTS[0, :2]) for seed in range(20))
    write_npy(tmp_path / "npy")
    with pytest.raises(
        ValueError, match="no latents of mirrored images: set dataset.flip_prob to 0"
    ):
        Latents(tmp_path / "npy", plain, flip_prob=0.5)


def test_encoding_on_the_fly_gives_the_numbers_of_stored_latents(tmp_path):
    tiny.write_autoencoder(tmp_path / "ae.safetensors")
    coder = K.loading.load_autoencoder(tmp_path / "ae.safetensors").normalize(
        [0.1, -0.2], [1.5, 2.0], 0.5
    )
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    moments = coder.encode(images)
    (tmp_path / "it").mkdir()
    save_file({"moments": moments}, tmp_path / "it" / "a.safetensors")
    stored = TrainingData(
        Latents(tmp_path / "it", LatentTransform([0.1, -0.2], [1.5, 2.0], 0.5, 2))
    )
    seeds = torch.arange(100, 105)
    (batch,) = encoded([{"image": images, "seed": seeds, "class": seeds}], coder)
    want = torch.stack([stored[i, int(seed)]["image"] for i, seed in enumerate(seeds)])
    torch.testing.assert_close(batch["image"], want)
    assert batch["class"] is seeds


def test_foreign_latents_know_no_images(tmp_path):
    write_npy(tmp_path / "it")
    section = {"type": "latents", "location": str(tmp_path / "it")}
    with pytest.raises(ValueError, match="images of the latents at .* are not known; pass --data"):
        images_section(section)
    assert images_section({"type": "digits"}) == {"type": "digits"}
