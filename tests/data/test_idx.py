import gzip
import pickle
import struct
import sys

import numpy as np
import pytest
from runs import tiny_config

from k_diffusion.config import load_config
from k_diffusion.data import datasets

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 6), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2]


def section(root, kind="fashion-mnist", **more):
    return {"type": kind, "location": str(root), "num_classes": 10, "split": "train", **more}


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_part(root, part, pixels, labels, suffix=""):
    """The files as their authors describe them: big-endian sizes, then bytes."""
    root.mkdir(exist_ok=True)
    head = struct.pack(">4I", 0x803, *pixels.shape)
    write(root / f"{part}-images-idx3-ubyte{suffix}", head + pixels.tobytes())
    head = struct.pack(">2I", 0x801, len(labels))
    write(root / f"{part}-labels-idx1-ubyte{suffix}", head + bytes(labels))


def items(made):
    return [(made[i][0].tolist(), made[i][1]) for i in range(len(made))]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["mnist", "fashion-mnist"])
def test_idx_folders(tmp_path, suffix, kind, monkeypatch):
    """Without torchvision."""
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    write_part(tmp_path / "d", "train", PIXELS[:5], LABELS[:5], suffix)
    write_part(tmp_path / "d", "t10k", PIXELS[5:], LABELS[5:], suffix)
    train, test = (
        datasets.make_dataset(section(tmp_path / "d", kind, split=split), np.asarray)
        for split in ("train", "test")
    )
    assert items(train) == [(p.tolist(), c) for p, c in zip(PIXELS[:5], LABELS)]
    assert items(test) == [(p.tolist(), c) for p, c in zip(PIXELS[5:], LABELS[5:])]
    assert items(pickle.loads(pickle.dumps(test))) == items(test)
    with pytest.raises(ValueError, match="unknown dataset.split of IDX files 'all'; there are"):
        datasets.make_dataset(section(tmp_path / "d", kind, split="all"), np.asarray)


def test_broken_idx_files(tmp_path):
    def fails(match):
        with pytest.raises(ValueError, match=match):
            datasets.make_dataset(section(tmp_path), np.asarray)

    write_part(tmp_path, "train", PIXELS, LABELS[:-1])
    fails(r"train-labels-idx1-ubyte has 6 labels for 7 images")
    images = tmp_path / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    fails(r"should have 168 bytes after its header, of shape 7 x 4 x 6, but has 167")
    images.write_bytes(whole[:9])
    fails(r"but has 0")
    images.write_bytes(b"<html>")
    fails(r"train-images-idx3-ubyte is no such IDX file: it starts with 0x3c68746d, not 0x00000803")
    images.write_bytes(b"")
    fails("no such IDX file")
    images.unlink()
    write(images.with_suffix(".gz"), whole)
    images.with_suffix(".gz").write_bytes(images.with_suffix(".gz").read_bytes()[:-9])
    fails(r"train-images-idx3-ubyte.gz is not a whole .gz file")
    images.with_suffix(".gz").unlink()
    write_part(tmp_path, "t10k", PIXELS, LABELS)
    fails(r"has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz; .* all four IDX files")


def test_splits_in_configs():
    def split(kind, **more):
        config = tiny_config(dataset={"type": kind, "location": "x", **more})
        return load_config(config)["dataset"]["split"]

    assert split("fashion-mnist") == split("mnist") == split("cifar10") == "train"
    assert split("imagefolder") == split("imagefolder-class") == split("digits") == "all"
    assert split("mnist", split="test") == "test"
    with pytest.raises(ValueError, match=r"dataset.split: .*'valid'"):
        split("imagefolder", split="valid")
