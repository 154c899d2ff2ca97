import itertools
import json
from collections import Counter

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import tiny_config

from k_diffusion.config import ConfigError, load_config
from k_diffusion.data import buckets, scan, stream, training_data
from k_diffusion.evaluation import reals

SIZES = [(8, 8), (8, 16), (16, 8)]
# (h, w) of the images, and how many there are of each.
STORED = {(20, 21): 9, (10, 25): 6, (40, 18): 3, (9, 17): 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("K_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    sizes = [size for size, n in STORED.items() for _ in range(n)]
    for i, j in enumerate(np.random.default_rng(0).permutation(len(sizes))):
        h, w = sizes[j]
        Image.new("RGB", (w, h), (10 * i, 0, 0)).save(folder / f"{i:02}.png")
    return folder


def made(folder, **keys):
    section = {"type": "imagefolder", "location": str(folder), "buckets": SIZES} | keys
    section["buckets"] = [list(size) for size in section["buckets"]]
    model = tiny_config(model={"input_channels": 3})["model"]
    config = load_config({"model": model, "dataset": section})
    return training_data.make_training_data(config), config


def test_the_nearest_ratio_is_that_by_a_factor():
    assert buckets.nearest((100, 100), SIZES) == 0
    assert buckets.nearest((100, 142), SIZES) == 1  # beyond the root of 2
    assert buckets.nearest((100, 141), SIZES) == 0
    assert buckets.nearest((3000, 100), SIZES) == 2
    assert buckets.nearest((2, 3), [(64, 96), (8, 12)]) == 0


def test_images_come_at_their_buckets_size(folder):
    data, config = made(folder)
    assert data.buckets.sizes == SIZES
    assert [len(group) for group in data.buckets.groups] == [9, 8, 3]
    assert data.describe() == "images by height x width: 8 x 8 9, 8 x 16 8, 16 x 8 3"
    for i in range(20):
        with Image.open(folder / f"{i:02}.png") as image:
            want = SIZES[buckets.nearest(image.size[::-1], SIZES)]
        item = data[i, 0]
        assert item["image"].shape == item["original"].shape == (3, *want)
        assert round((item["original"][0, 0, 0].item() + 1) * 127.5) == 10 * i
    assert reals.RealImages(config["dataset"], (8, 8), 3)[0]["image"].shape == (3, 8, 8)


def test_a_corrupt_image_is_stood_in_for_by_one_of_its_size(folder):
    data, _ = made(folder)
    group = data.buckets.groups[2].tolist()
    assert [data.buckets.after(i) for i in group] == [*group[1:], group[0]]
    (folder / f"{group[-1]:02}.png").write_bytes(b"no image")
    item = data[group[-1], 0]
    assert item["index"] == group[0]
    assert item["image"].shape == (3, 16, 8)
    again, _ = made(folder)  # its size isn't known any more
    assert again[group[-1], 0]["image"].shape == (3, 8, 8)


def batches(groups, n, batch_size, **kwargs):
    return list(itertools.islice(stream.BucketStream(groups, batch_size, 7, **kwargs), n))


GROUPS = [np.arange(0, 9), np.arange(9, 17), np.arange(17, 20)]


def group_of(draw):
    return next(i for i, group in enumerate(GROUPS) if draw[0] in group)


def test_a_batch_is_of_one_group_and_images_come_equally_often():
    found = batches(GROUPS, 200, 4)  # 40 epochs
    of = [{group_of(draw) for draw in batch} for batch in found]
    assert all(len(groups) == 1 for groups in of)
    assert Counter(i for (i,) in of) == {0: 90, 1: 80, 2: 30}
    counts = Counter(index for batch in found for index, _ in batch)
    assert set(counts.values()) == {40}
    assert len({seed for batch in found for _, seed in batch}) == 800
    (first,), (second,) = of[0], of[1]
    assert any(groups != {first} for groups in of[:10]), second
    orders = [[i for (i,) in of[k * 10 : k * 10 + 10]] for k in range(4)]
    assert len(set(map(tuple, orders))) > 1


def test_the_bucketed_stream_goes_on_from_any_batch_and_is_shared_out():
    whole = batches(GROUPS, 60, 4)
    for start in 1, 9, 10, 33:
        assert batches(GROUPS, 20, 4, start=4 * start) == whole[start : start + 20]
    shares = [batches(GROUPS, 60, 2, process=i, processes=2) for i in range(2)]
    assert [a + b for a, b in zip(*shares)] == whole
    with pytest.raises(ValueError, match="has 20 images, fewer than one batch of 21"):
        batches(GROUPS, 1, 21)


def test_groups_smaller_than_a_batch_take_part():
    counts = Counter(index for batch in batches(GROUPS, 80, 5) for index, _ in batch)
    assert set(counts.values()) == {20}


def test_workers_change_nothing_of_bucketed_batches(folder):
    data, _ = made(folder, horizontal_flip=True)

    def loaded(num_workers):
        shares = stream.make_stream(data, 4, 7)
        loader = stream.make_loader(data, shares, num_workers, "fork")
        return [batch["image"] for batch in itertools.islice(iter(loader), 8)]

    alone = loaded(0)
    assert {tuple(x.shape[2:]) for x in alone} == set(SIZES)
    assert all(torch.equal(a, b) for a, b in zip(alone, loaded(2), strict=True))


def test_sizes_of_many_images_are_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(scan, "_WORTH_KEEPING", 20)
    first, _ = made(folder)
    (kept,) = (cache / "sizes").iterdir()
    assert len(json.loads(kept.read_text().split("\n")[1])) == 20
    monkeypatch.setattr(scan.SizedFiles, "image_size", lambda *args: pytest.fail("read"))
    again, _ = made(folder)
    assert np.array_equal(first.buckets.which, again.buckets.which)


def test_kept_sizes_are_of_these_images(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(scan, "_WORTH_KEEPING", 1)

    def write(name, size):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for i in range(3):
            Image.new("L", size[::-1]).save(folder / f"{i}.png")

    def sizes(location):
        return made(location)[0].buckets.sizes

    # the same names below the same location, as seen from two folders
    write("p1/data/x", (20, 40))
    write("p2/data/x", (40, 20))
    for project, size in ("p1", (8, 16)), ("p2", (16, 8)), ("p1", (8, 16)):
        monkeypatch.chdir(tmp_path / project)
        assert sizes("data") == [size]
    assert sizes(tmp_path / "p1/data") == [(8, 16)]
    assert len(list((cache / "sizes").iterdir())) == 2
    # the same names, made anew
    write("p1/data/x", (40, 20))
    assert sizes("data") == [(16, 8)]


def test_a_size_that_could_not_be_read_is_read_again(folder, cache, monkeypatch):
    monkeypatch.setattr(scan, "_WORTH_KEEPING", 20)
    first, _ = made(folder)
    (kept,) = (cache / "sizes").iterdir()
    kept.unlink()
    read = scan.SizedFiles.image_size

    def fails_for_one(self, index):
        if index == first.buckets.groups[2][0]:
            raise OSError("no route to host")
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(scan.SizedFiles, "image_size", fails_for_one)
        assert [len(group) for group in made(folder)[0].buckets.groups] == [10, 8, 2]
    assert np.array_equal(made(folder)[0].buckets.which, first.buckets.which)


def test_sizes_that_the_model_cannot_take(folder):
    with pytest.raises(ConfigError, match=r"dataset.buckets\[1\]: the model can't .*\[8, 10\]"):
        made(folder, buckets=[(8, 8), (8, 10)])
    with pytest.raises(ConfigError, match=r"dataset.buckets: .*at least 1 item"):
        made(folder, buckets=[])


def test_a_run_of_several_sizes_resumes_exactly(folder, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    config = runs.TINY | {
        "model": {**runs.TINY["model"], "input_channels": 3},
        "dataset": {"type": "imagefolder", "location": str(folder), "buckets": SIZES},
    }
    (tmp_path / "c.json").write_text(json.dumps(config))

    def train(name, end):
        args = ["--config", "c.json", "--name", name, "--batch-size", 3, "--num-workers", 0]
        args += ["--seed", 1, "--end-step", end, "--demo-every", 999, "--evaluate-n", 0]
        runs.call("train", *args, folder=tmp_path, monkeypatch=monkeypatch)
        return runs.read(tmp_path / f"{name}_{end:08}.pth")

    whole = train("a", 6)
    train("b", 3)
    parts = train("b", 6)
    assert runs.differences(whole["model"], parts["model"]) == []
    assert whole["samples"] == parts["samples"] == 18
