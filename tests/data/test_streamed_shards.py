import gzip
import itertools
import pickle
import sys
import tarfile

import numpy as np
import pytest
from runs import tiny_config
from test_archives import add, as_pixels, pixels, png, write_tar

from k_diffusion.config import load_config
from k_diffusion.data import stream, training_data

LABELS = [i % 4 for i in range(23)]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A folder with 23 images in two shards, and the images."""
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    images = pixels(23)
    for i, part in enumerate((slice(0, 12), slice(12, 23))):
        write_tar(tmp_path / f"s-{i:03}.tar", images[part], LABELS[part], part.start)
    return tmp_path, images


def made(location, **keys):
    section = {"type": "webdataset", "location": str(location), "streaming": True, **keys}
    section = {"num_classes": 4, "num_examples": 23, "shuffle_window": 5, **section}
    config = load_config({"model": tiny_config()["model"], "dataset": section})
    return training_data.make_training_data(config)


CAT = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"


@pytest.mark.parametrize(
    "location", ["{}", "{}/s-*.tar", "{}/s-{{000..001}}.tar", "file://{}/s-{{000..001}}.tar",
                 f'pipe:{sys.executable} -c "{CAT}" {{}}/s-{{{{000..001}}}}.tar']
)  # fmt: skip
def test_samples_are_those_of_the_shards(shards, location):
    folder, images = shards
    data = made(location.format(folder))
    assert (len(data), data.num_classes) == (23, 4)
    for i in (0, 3, 4, 22, 1, 13):  # on, and back
        item = data[i, 0]
        assert (item["class"], item["index"]) == (LABELS[i], i)
        assert np.array_equal(as_pixels(item), images[i])
    assert np.array_equal(as_pixels(pickle.loads(pickle.dumps(data))[9, 0]), images[9])


def test_compressed_shards(shards):
    folder, images = shards
    (folder / "g.tar.gz").write_bytes(gzip.compress((folder / "s-000.tar").read_bytes()))
    data = made(folder / "g.tar.gz", num_examples=12)
    assert np.array_equal(as_pixels(data[11, 0]), images[11])


def test_a_streamed_run_resumes_at_the_sample(shards):
    data = made(shards[0])

    def batches(start, n, workers=0):
        shares = stream.make_stream(data, 4, 3, start=start)
        loader = stream.make_loader(data, shares, workers, "fork")
        return [batch["index"].tolist() for batch in itertools.islice(iter(loader), n)]

    whole = batches(0, 23)  # four epochs
    flat = list(itertools.chain(*whole))
    assert sorted(flat) == sorted([*range(23)] * 4)
    assert [sorted(flat[i : i + 5]) for i in (0, 5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert batches(16, 6) == whole[4:10]
    assert batches(0, 8, workers=2) == whole[:8]
    shares = stream.make_stream(data, 4, 3)
    assert stream.make_loader(data, shares, 8, "fork").num_workers == 1


def test_every_fifth_sample_is_held_out(shards):
    folder, images = shards
    config = load_config(
        {
            "model": tiny_config()["model"],
            "dataset": {"type": "webdataset", "location": str(folder), "streaming": True,
                        "num_examples": 23, "num_classes": 0, "split": "train"},
        }
    )  # fmt: skip
    for split, places in (
        ("train", [i for i in range(23) if i % 5 != 4]),
        ("test", [4, 9, 14, 19]),
        ("all", range(23)),
    ):
        section = training_data.of_split(config["dataset"], split)
        data = training_data.make_training_data({**config, "dataset": section})
        assert len(data) == len(places)
        for i, place in enumerate(places):
            assert np.array_equal(as_pixels(data[i, 0]), images[place])


def test_captions_and_what_goes_with_no_image(shards):
    folder, images = shards
    with tarfile.open(folder / "c.tar", "w") as archive:
        add(archive, "a.json", b"{}")
        add(archive, "b.png", png(images[0]))
        add(archive, "b.txt", b"a  cat\n")
        add(archive, "c.seg.png", png(images[1]))
    config = load_config({"model": tiny_config()["model"], "dataset": {
        "type": "webdataset", "location": "c.tar", "streaming": True, "num_examples": 1,
        "num_classes": 0}})  # fmt: skip
    data = training_data.make_training_data({**config, "text": {"type": "clip"}})
    assert data[0, 0]["caption"] == data.caption(0) == "a cat"
    assert np.array_equal(as_pixels(data[0, 0]), images[0])
    found = made("c.tar", image_key="seg.png", num_examples=1, num_classes=0)
    assert np.array_equal(as_pixels(found[0, 0]), images[1])


def test_corrupt_images_and_wrong_labels(shards):
    folder, images = shards
    with tarfile.open(folder / "c.tar", "w") as archive:
        for i in range(4):
            add(archive, f"{i}.png", b"PNG" if i == 1 else png(images[i]))
            add(archive, f"{i}.cls", b"cat" if i == 3 else b"1")
    data = made("c.tar", num_examples=4)
    assert (data[1, 0]["index"], data[1, 0]["skipped"]) == (2, "1 of c.tar")
    with pytest.raises(ValueError, match=r"cls of 3 of c.tar must hold a class id, got b'cat'"):
        data[3, 0]


def test_shards_that_cannot_be_streamed(shards):
    folder, _ = shards
    (folder / "broken").write_bytes((folder / "s-000.tar").read_bytes()[:3000])
    wrong = [
        ({"num_examples": None}, "dataset.num_examples: .* don't say how many samples"),
        ({"num_classes": None}, "dataset.num_classes: .* how many classes they have, 0 for none"),
        ({"buckets": [[8, 8], [8, 16]]}, "dataset.buckets: the sizes of streamed images"),
        ({"image_key": "jpg"}, "no sample of .* has an image at 'jpg'"),
        ({"location": "none-{0..1}.tar"}, "no tar file at none-0.tar, none-1.tar"),
        ({"location": "pipe:exit 3"}, "webdataset can't read pipe:exit 3; it says: "),
    ]
    for keys, says in wrong:
        with pytest.raises(ValueError, match=says):
            made(**{"location": folder, **keys})
    with pytest.raises(ValueError, match=r"webdataset can't read broken; it says: "):
        made("broken", num_examples=12)
    with pytest.raises(ValueError, match="fewer than the 40 rows"):
        made(folder, num_examples=40)[39, 0]


def test_only_a_location_that_begins_as_a_command_is_one(shards):
    """Which is what `check_code` goes by."""
    folder, images = shards
    command = "pipe:touch ran;.tar"
    (folder / "d").mkdir()
    (folder / "d" / command).write_bytes((folder / "s-000.tar").read_bytes())
    (folder / command).write_bytes((folder / "s-000.tar").read_bytes())
    (folder / "s-000.tar").unlink()
    (folder / "s-001.tar").unlink()
    for location in ("d", ".", "*.tar"):
        data = made(location, num_examples=12)
        assert np.array_equal(as_pixels(data[3, 0]), images[3])
    for location in ("file://d::pipe:touch ran", "file://d::{p,q}ipe:touch ran"):
        with pytest.raises(ValueError, match="webdataset can't read"):
            made(location)
    assert not (folder / "ran").exists()


def test_a_missing_package_is_named(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r'needs webdataset; .* pip install "k-diffusion\[datas'):
        made(shards[0])
