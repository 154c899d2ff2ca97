import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from runs import tiny_config

from k_diffusion import utils
from k_diffusion.config import load_config
from k_diffusion.data import archives, scan, stream, training_data
from k_diffusion.data.captions import caption_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("K_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_zip(path, images, labels, compression=zipfile.ZIP_STORED):
    """As EDM's dataset_tool.py does."""
    names = [f"{i // 2:05}/img{i:08}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, image in reversed(list(zip(names, images))):
            archive.writestr(name, png(image))
        pairs = labels and [[name, label] for name, label in zip(names, labels)]
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_tar(path, images, labels, first=0, mode="w"):
    with tarfile.open(path, mode) as archive:
        for i, image in enumerate(images):
            key = f"sub/{first + i:06}"
            if labels:
                add(archive, f"{key}.cls", str(labels[i]).encode())
            add(archive, f"{key}.png", png(image))
            add(archive, f"{key}.json", b"{}")


def made(kind, location, **more):
    config = load_config(
        {
            "model": tiny_config()["model"],
            "dataset": {"type": kind, "location": str(location), **more},
        }
    )
    return training_data.make_training_data(config)


def as_pixels(item):
    return ((item["original"][0] + 1) * 127.5).round().byte().numpy()


LABELS = [2, 0, 1, 2, 0, 2, 1]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_edms(tmp_path, compression):
    images = pixels(7)
    write_zip(tmp_path / "d.zip", images, LABELS, compression)
    data = made("zip", tmp_path / "d.zip")
    assert (len(data), data.num_classes) == (7, 3)
    for i in range(7):
        assert np.array_equal(as_pixels(data[i, 0]), images[i])
        assert data[i, 0]["class"] == LABELS[i]
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(as_pixels(again[6, 0]), images[6])
    assert "class" not in made("zip", tmp_path / "d.zip", num_classes=0)[0, 0]
    with pytest.raises(ValueError, match=r"num_classes is 2, but .*d.zip has classes up to 2"):
        made("zip", tmp_path / "d.zip", num_classes=2)


def test_a_zip_without_labels(tmp_path):
    write_zip(tmp_path / "d.zip", pixels(3), None)
    assert made("zip", tmp_path / "d.zip").num_classes == 0
    with pytest.raises(ValueError, match="no class id at 'class'"):
        made("zip", tmp_path / "d.zip", num_classes=3)


def test_shards_are_one_data_set(tmp_path):
    images = pixels(7)
    for i, part in enumerate((slice(0, 3), slice(3, 7))):
        write_tar(tmp_path / f"train-{i:03}.tar", images[part], LABELS[part], part.start)
    for location in (".", "train-{000..001}.tar", "train-*.tar"):
        data = made("webdataset", tmp_path / location if location != "." else tmp_path)
        assert (len(data), data.num_classes) == (7, 3)
        for i in range(7):
            assert np.array_equal(as_pixels(data[i, 0]), images[i])
            assert data[i, 0]["class"] == LABELS[i]
    one = made("webdataset", tmp_path / "train-001.tar", image_key="png", num_classes=4)
    assert np.array_equal(as_pixels(one[0, 0]), images[3])
    says = r"dataset.image_key: .* at 'jpg'; the endings in train-000.tar: cls, json, png$"
    with pytest.raises(ValueError, match=says):
        made("webdataset", tmp_path, image_key="jpg")
    write_tar(tmp_path / "none.tar", [], None)
    with pytest.raises(ValueError, match="the endings in none.tar: none$"):
        made("webdataset", tmp_path / "none.tar")


def test_captions_in_shards(tmp_path):
    image = png(pixels(1)[0])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.png", image)
        add(archive, "0.txt", b"a  cat\non a chair\n")
        add(archive, "1.png", image)
        add(archive, "2.png", image)
        add(archive, "2.txt", b"\xff")
    data = made("webdataset", tmp_path / "a.tar").data
    assert caption_of(data, data[0], 0, "txt") == "a cat on a chair"
    assert data.without_caption("txt") == ["1.png"]
    with pytest.raises(ValueError, match="item 1 of the data set has no caption at 'txt'"):
        caption_of(data, data[1], 1, "txt")
    with pytest.raises(ValueError, match=r"the caption of 2.png of .*a.tar is not UTF-8 text"):
        data[2]


def test_patterns_name_shards_in_order(tmp_path):
    for name in "a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar":
        (tmp_path / name).touch()

    def names(pattern):
        return [path.name for path in archives.shards(f"{tmp_path}/{pattern}")]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("?-{08..08}.tar") == ["a-08.tar", "b-08.tar"]
    assert names("b-08.tar") == ["b-08.tar"]
    with pytest.raises(ValueError, match="no tar file at .*a-11.tar"):
        names("a-{10..11}.tar")
    with pytest.raises(ValueError, match="no tar file at .*c-"):
        names("c-*.tar")


def test_names_of_samples():
    assert archives.sample_parts("a.b/c.d.PNG") == ("a.b/c", "d.png")
    assert archives.sample_parts("c") == ("c", "")


@pytest.mark.parametrize("kind", ["zip", "webdataset"])
def test_the_splits_and_the_resumed_stream_of_archives(tmp_path, kind):
    images, labels = pixels(12), [0, 1] * 6
    path = tmp_path / "d.archive"
    (write_zip if kind == "zip" else write_tar)(path, images, labels)
    parts = {split: made(kind, path, split=split) for split in ("all", "train", "test")}
    seen = {
        split: {as_pixels(data[i, 0]).tobytes() for i in range(len(data))}
        for split, data in parts.items()
    }
    assert len(seen["test"]) == 2
    assert seen["train"] | seen["test"] == seen["all"]
    assert not seen["train"] & seen["test"]
    assert parts["test"].num_classes == 2

    def batches(start, n):
        loader = stream.make_loader(parts["all"], stream.Stream(12, 4, 3, start))
        return [batch["image"] for batch, _ in zip(loader, range(n))]

    for a, b in zip(batches(0, 7)[3:], batches(12, 4), strict=True):
        assert torch.equal(a, b)


def test_tables_of_contents_are_kept_until_the_archive_changes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(scan, "_WORTH_KEEPING", 2)
    read, index = [], archives._tar_members
    monkeypatch.setattr(
        archives, "_tar_members", lambda path, *rest: read.append(path) or index(path, *rest)
    )
    write_tar(tmp_path / "0.tar", pixels(3), LABELS[:3])
    for _ in range(2):
        data = made("webdataset", tmp_path / "0.tar")
        assert [data[i, 0]["class"] for i in range(3)] == LABELS[:3]
    assert len(read) == 1
    write_tar(tmp_path / "0.tar", pixels(4), LABELS[:4])
    assert len(made("webdataset", tmp_path / "0.tar")) == 4
    assert len(read) == 2


@pytest.mark.parametrize("kind", ["zip", "webdataset"])
def test_corrupt_images_of_archives_are_skipped_and_named(tmp_path, kind):
    path = tmp_path / "d.archive"
    (write_zip if kind == "zip" else write_tar)(path, pixels(3), LABELS[:3])
    content = bytearray(path.read_bytes())
    data = made(kind, path)
    at = data.data.places[1][1].offset
    content[content.index(b"IDAT", at) + 8] ^= 255
    path.write_bytes(content)
    item = data[1, 0]
    assert item["index"] == 2
    assert "00000" in item["skipped"]
    assert str(path) in item["skipped"]
    path.write_bytes(content[:100])
    with pytest.raises(utils.CorruptImageError, match="the archive ends before it"):
        data.data[2]


def test_a_damaged_member_of_a_bucketed_zip_is_skipped_when_its_turn_comes(tmp_path):
    path = tmp_path / "d.zip"
    write_zip(path, pixels(3), LABELS[:3], zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("00000/img00000001.png")
    content = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    content[start : start + 8] = b"\xff" * 8  # no block of deflate
    path.write_bytes(content)
    data = made("zip", path, buckets=[[8, 8], [8, 16]])
    assert [len(group) for group in data.buckets.groups] == [3]
    assert data[1, 0]["index"] == 2
    path.write_bytes(content[: info.header_offset + 10])
    with pytest.raises(OSError, match="the archive ends before it"):
        data.data.image_size(1)


def test_archives_that_are_none(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"PK")
    write_tar(tmp_path / "x.tar.gz", pixels(1), None, mode="w:gz")
    wrong = {
        "zip": (tmp_path / "no.zip", "can't be read as a zip file"),
        "webdataset": (tmp_path / "x.tar.gz", "can't be read as an uncompressed tar file"),
    }
    for kind, (path, says) in wrong.items():
        with pytest.raises(ValueError, match=says):
            made(kind, path)
    write_tar(tmp_path / "c.tar", pixels(2), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"sub/000000.cls must hold a class id, got b'cat'"):
        made("webdataset", tmp_path / "c.tar")
    for labels, says in (([0.5, 1], "must be a class id"), ([[1, 0], 1], "must be a class id")):
        write_zip(tmp_path / "l.zip", pixels(2), labels)
        with pytest.raises(ValueError, match=says):
            made("zip", tmp_path / "l.zip")
    with zipfile.ZipFile(tmp_path / "j.zip", "w") as archive:
        archive.writestr("a.png", png(pixels(1)[0]))
        archive.writestr("dataset.json", "[]")
    with pytest.raises(ValueError, match="needs a key 'labels' with pairs"):
        made("zip", tmp_path / "j.zip")
