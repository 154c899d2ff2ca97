import hashlib
import itertools
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from runs import tiny_config

from k_diffusion import utils
from k_diffusion.config import load_config, make_model
from k_diffusion.data import datasets, stream, streamed, training_data, transforms
from k_diffusion.evaluation import reals


def section(kind, location="x", **more):
    return {"type": kind, "location": str(location), "num_classes": 0, **more}


def as_array(image):
    return np.asarray(image)


def images(n=3, size=(4, 6), channels=3, seed=0):
    shape = (n, *size, channels) if channels > 1 else (n, *size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_images(folder, pixels, start=0, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixel in enumerate(pixels, start):
        Image.fromarray(pixel).save(folder / f"{i}.{suffix}")


def test_digits():
    digits = datasets.make_dataset(section("digits", split="all"), as_array)
    assert len(digits) == 1797
    image, label = digits[0]
    assert (image.shape, image.dtype, label) == ((8, 8), np.uint8, 0)
    assert {digits[i][1] for i in range(50)} == set(range(10))
    values = np.stack([digits[i][0] for i in range(50)])
    assert (values.min(), values.max()) == (0, 255)
    assert len(np.unique(values)) == 17


def test_the_splits_of_the_digits():
    def items(split):
        made = datasets.make_dataset(section("digits", split=split), as_array)
        return [(made[i][0].tobytes(), made[i][1]) for i in range(len(made))]

    every, train, test = items("all"), items("train"), items("test")
    assert sorted(train + test) == sorted(every)
    assert not {image for image, _ in train} & {image for image, _ in test}  # and no copies
    counts = [np.bincount([label for _, label in part], minlength=10) for part in (every, test)]
    assert counts[1].tolist() == (counts[0] // 5).tolist()
    with pytest.raises(
        ValueError,
        match=r"unknown dataset.split 'valid'.*; there are all, train, test",
    ):
        items("valid")


# ------------------------------------------------------------------------- folders


def test_imagefolder_is_recursive_and_keeps_grey(tmp_path):
    pixels = images(3, channels=1)
    save_images(tmp_path / "a", pixels[:1])
    save_images(tmp_path / "a" / "b", pixels[1:], 1)
    folder = datasets.make_dataset(section("imagefolder", tmp_path), as_array)
    assert [folder[i][0].tolist() for i in range(3)] == pixels.tolist()


@pytest.mark.parametrize("kind", ["imagefolder", "imagefolder-class"])
def test_missing_and_empty_folders(tmp_path, kind):
    with pytest.raises(ValueError, match=r"no image folder at .*gone"):
        datasets.make_dataset(section(kind, tmp_path / "gone"), as_array)
    with pytest.raises(ValueError, match=str(tmp_path)):
        datasets.make_dataset(section(kind, tmp_path), as_array)


def test_imagefolder_class(tmp_path):
    pixels = images(4)
    save_images(tmp_path / "cat", pixels[:2])
    save_images(tmp_path / "dog", pixels[2:], 2)
    made = section("imagefolder-class", tmp_path, num_classes=2)
    folder = datasets.make_dataset(made, as_array)
    assert [folder[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert [folder[i][0].tolist() for i in range(4)] == pixels.tolist()
    with pytest.raises(ValueError, match=r"num_classes is 1, but .* has 2 subfolders"):
        datasets.make_dataset({**made, "num_classes": 1}, as_array)


@pytest.mark.parametrize("kind", ["imagefolder", "imagefolder-class"])
def test_the_splits_of_folders(tmp_path, kind):
    pixels = images(17)
    save_images(tmp_path / "cat", pixels[:6])
    save_images(tmp_path / "dog", pixels[6:])

    def levels(split):
        made = datasets.make_dataset(section(kind, tmp_path, split=split), as_array)
        assert kind == "imagefolder" or set(made.counts) == {"cat", "dog"}
        return [made[i][0].tobytes() for i in range(len(made))]

    every, train, test = levels("all"), levels("train"), levels("test")
    assert sorted(train + test) == sorted(every)
    assert len(test) == 3  # of 17, or of 6 and 11
    assert [x for x in every if x in train] == train
    for folder in tmp_path.iterdir():
        for path in sorted(folder.iterdir())[4:]:
            path.unlink()
    if kind == "imagefolder-class":
        with pytest.raises(ValueError, match="the split 'test' of the data set .* is empty"):
            levels("test")


def test_the_held_out_images_of_torchvisions_sets(tmp_path):
    pytest.importorskip("torchvision")
    pixels = images(5, (28, 28), 1)
    write_mnist(tmp_path, pixels, [3, 1, 4, 1, 5])
    mnist = datasets.make_dataset(section("mnist", tmp_path, split="test"), as_array)
    assert len(mnist) == 1
    with pytest.raises(ValueError, match="unknown dataset.split of mnist 'all'"):
        datasets.make_dataset(section("mnist", tmp_path, split="all"), as_array)


def test_classes_are_the_subfolders_with_images(tmp_path):
    save_images(tmp_path / "dog" / "big", images(1), 1)
    save_images(tmp_path / "dog", images(1))
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird/notes.txt").write_text("none yet")
    save_images(tmp_path / "cat", images(3))
    folder = datasets.make_dataset(section("imagefolder-class", tmp_path), as_array)
    assert [folder[i][1] for i in range(5)] == [0, 0, 0, 1, 1]
    assert [str(p.relative_to(tmp_path)) for p in folder.paths[3:]] == [
        "dog/0.png",
        "dog/big/1.png",
    ]
    assert folder.describe() == (
        "2 classes, with images: cat 3, dog 2\nskipped without images: bird"
    )


def test_the_number_of_classes_is_that_of_the_subfolders(tmp_path):
    for name in "ant", "bee", "cat":
        save_images(tmp_path / name, images(2))
    made = {"type": "imagefolder-class", "location": str(tmp_path)}
    config = load_config(
        {"model": tiny_config(model={"input_channels": 3})["model"], "dataset": made}
    )
    assert config["dataset"]["num_classes"] is None
    data = training_data.make_training_data(config)
    assert data.num_classes == 3
    assert data[5, 0]["class"] == 2
    assert data.describe().startswith("3 classes, with images: ant 2, bee 2, cat 2")
    with pytest.raises(ValueError, match=r"dataset.num_classes: .* --set dataset.num_classes=N"):
        make_model(config)
    unconditional = {**config, "dataset": {**config["dataset"], "num_classes": 0}}
    assert "class" not in training_data.make_training_data(unconditional)[0, 0]


@pytest.mark.parametrize("kind", ["imagefolder", "imagefolder-class"])
def test_corrupt_and_truncated_images_are_named(tmp_path, kind):
    save_images(tmp_path / "cat", images(3, size=(40, 40)), suffix="jpg")
    (tmp_path / "cat/0.jpg").write_bytes(b"no image")
    whole = (tmp_path / "cat/1.jpg").read_bytes()
    (tmp_path / "cat/1.jpg").write_bytes(whole[: len(whole) // 2])
    folder = datasets.make_dataset(section(kind, tmp_path), transforms.ImageTransform((8, 8), 3))
    for i in range(2):
        with pytest.raises(utils.CorruptImageError, match=f"cat/{i}.jpg"):
            folder[i]
    assert training_data.TrainingData(folder)[0, 0]["skipped"].count("cat/") == 2


# ------------------------------------------------------------------------- torchvision's


def write_mnist(root, pixels, labels):
    """The files as their authors describe them: big-endian sizes, then bytes."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in ("train", len(pixels)), ("t10k", 1):
        head = struct.pack(">4I", 0x803, count, *pixels.shape[1:])
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels[:count].tobytes())
        head = struct.pack(">2I", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels[:count]))


def test_mnist(tmp_path):
    pytest.importorskip("torchvision")
    pixels = images(5, (28, 28), 1)
    write_mnist(tmp_path, pixels, [3, 1, 4, 1, 5])
    mnist = datasets.make_dataset(section("mnist", tmp_path), as_array)
    assert [mnist[i][1] for i in range(5)] == [3, 1, 4, 1, 5]
    assert [mnist[i][0].tolist() for i in range(5)] == pixels.tolist()


def write_cifar10(root, pixels, labels, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        text = pickle.dumps(content)
        (folder / name).write_bytes(text)
        return name, hashlib.md5(text).hexdigest()

    batch = {"data": pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1), "labels": labels}
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch)])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )


def test_cifar10(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    pixels = images(4, (32, 32))
    write_cifar10(tmp_path, pixels, [9, 0, 2, 9], monkeypatch)
    cifar = datasets.make_dataset(section("cifar10", tmp_path), as_array)
    assert [cifar[i][1] for i in range(4)] == [9, 0, 2, 9]
    assert [cifar[i][0].tolist() for i in range(4)] == pixels.tolist()


@pytest.mark.parametrize("kind", ["mnist", "fashion-mnist", "cifar10"])
def test_a_download_that_fails_says_where_the_data_was_sought(tmp_path, kind, monkeypatch):
    pytest.importorskip("torchvision")

    def offline(*args, **kwargs):
        raise OSError("no\n  network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    message = f"^{kind} is not at .* and can't be downloaded to it: .*"
    with pytest.raises(ValueError, match=message) as error:
        datasets.make_dataset(section(kind, tmp_path / "data"), as_array)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------- Hugging Face's


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The library, offline, with its cache in the test's folder."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    library.disable_progress_bars()
    return library


def hf_section(location, **more):
    return section("huggingface", location, split="train", image_key="img", class_key="y") | more


def make_rows(hub, pixels, labels):
    features = hub.Features(
        {"img": hub.Image(), "y": hub.ClassLabel(10), "note": hub.Value("string")}
    )
    rows = {"img": [Image.fromarray(p) for p in pixels], "y": labels, "note": ["n"] * len(labels)}
    return hub.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("split", [False, True])
def test_a_saved_hugging_face_data_set(hub, tmp_path, split):
    pixels = images(3, channels=1)
    rows = make_rows(hub, pixels, [5, 0, 7])
    (hub.DatasetDict({"train": rows}) if split else rows).save_to_disk(str(tmp_path / "d"))
    made = datasets.make_dataset(hf_section(tmp_path / "d"), as_array)
    assert len(made) == 3
    items = [made[i] for i in range(3)]
    assert [item["y"] for item in items] == [5, 0, 7]
    assert [item["img"].tolist() for item in items] == pixels.tolist()  # grey stays grey
    assert pickle.loads(pickle.dumps(made))[1]["y"] == 0
    with pytest.raises(ValueError, match="no column 'image' of images; there are img among"):
        datasets.make_dataset(hf_section(tmp_path / "d", image_key="image"), as_array)
    if split:
        with pytest.raises(ValueError, match="has no split 'test'"):
            datasets.make_dataset(hf_section(tmp_path / "d", split="test"), as_array)


def test_a_folder_of_parquet_files(hub, tmp_path):
    pixels = images(3)
    (tmp_path / "d").mkdir()
    make_rows(hub, pixels, [5, 0, 7]).to_parquet(str(tmp_path / "d" / "train.parquet"))
    made = datasets.make_dataset(hf_section(tmp_path / "d"), as_array)
    assert [made[i]["y"] for i in range(3)] == [5, 0, 7]
    assert [made[i]["img"].tolist() for i in range(3)] == pixels.tolist()


def test_corrupt_images_of_a_hugging_face_data_set(hub, tmp_path):
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(13)
    png += struct.pack(">I", zlib.crc32(png[12:]))
    features = hub.Features({"img": hub.Image(), "y": hub.ClassLabel(10)})
    whole = {"bytes": None, "path": str(tmp_path / "i" / "0.png")}
    save_images(tmp_path / "i", images(1))
    rows = {"img": [{"bytes": png, "path": "bad.png"}, whole], "y": [1, 2]}
    hub.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "d"))
    transform = transforms.ImageTransform((4, 4), 3)
    made = datasets.make_dataset(hf_section(tmp_path / "d"), transform)
    training = training_data.TrainingData(made, 10, "img", "y")
    item = training[0, 0]
    assert item["skipped"] == "bad.png (row 0 of the data set)"
    assert item["class"] == 2
    with pytest.raises(utils.CorruptImageError, match=r"bad.png"):
        training_data.TrainingData(made, 10, "img", "y", strict=True)[0, 0]


@pytest.mark.parametrize("mode", [None, "L"])
def test_jpegs_of_hugging_face_rows_are_decoded_smaller(hub, tmp_path, mode, monkeypatch):
    pixels = np.add.outer(np.arange(96), np.arange(160)).astype(np.uint8) // 2 + 60
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "0.jpg", quality=95, exif=exif)
    content = (tmp_path / "0.jpg").read_bytes()
    stored = [
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(tmp_path / "0.jpg")},
        {"bytes": content[:300], "path": "bad.jpg"},
    ]
    rows = hub.Dataset.from_dict(
        {"img": stored}, features=hub.Features({"img": hub.Image(mode=mode)})
    )
    seen = []
    fitted = transforms.ImageTransform._fitted
    monkeypatch.setattr(
        transforms.ImageTransform,
        "_fitted",
        lambda self, image: seen.append((image.mode, image.size)) or fitted(self, image),
    )
    for streaming in False, True:
        draft, exact = (
            datasets.HuggingFace(
                streamed.StreamedRows(rows.to_iterable_dataset(), 3, 3) if streaming else rows,
                "img",
                transforms.ImageTransform((40, 24), 1, jpeg_draft=on),
            )
            for on in (True, False)
        )
        for i in range(2):
            made, whole = draft[i]["img"][0], exact[i]["img"][0]
            assert seen == [(mode or "RGB", (24, 40)), (mode or "RGB", (96, 160))]
            assert 0 < (made - whole).abs().max() < 0.05
            seen.clear()
        with pytest.raises(utils.CorruptImageError, match=r"^can't read the image bad.jpg .row 2"):
            draft[2]


# ------------------------------------------------------------------------- custom ones

CUSTOM = """
import torch
from PIL import Image

class Colours(torch.utils.data.Dataset):
    def __init__(self, n, transform):
        self.n, self.transform = n, transform
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return {"picture": self.transform(Image.new("RGB", (8, 8), (i, 2 * i, 0))), "kind": i % 2}

def get_dataset(config, transform):
    return Colours(config["n"], transform)
"""


def custom(tmp_path, **more):
    (tmp_path / "mine.py").write_text(CUSTOM)
    made = section("custom", "mine.py", get_dataset="get_dataset", config={"n": 12}) | more
    return datasets.make_dataset(made, transforms.ImageTransform((8, 8), 3), tmp_path)


def test_a_custom_data_set_reaches_spawned_workers(tmp_path):
    training = training_data.TrainingData(custom(tmp_path), 2, "picture", "kind")
    loaders = (stream.make_loader(training, stream.Stream(12, 5, 0), n, "spawn") for n in (0, 1))
    batches = [next(iter(loader)) for loader in loaders]
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    assert torch.equal(batches[0]["class"], batches[1]["class"])


def test_custom_data_sets_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no data set file .*other.py"):
        custom(tmp_path, location="other.py")
    with pytest.raises(ValueError, match=r"mine.py has no function 'nope'"):
        custom(tmp_path, get_dataset="nope")
    with pytest.raises(ValueError, match="'custom' is empty"):
        custom(tmp_path, config={"n": 0})


# ------------------------------------------------------------------------- the table


def test_no_data_to_train_on():
    with pytest.raises(ValueError, match=r"no data to train on: .* there are digits, imagefolder"):
        datasets.make_dataset(section("none"), as_array)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("digits", "sklearn.datasets"),
        ("mnist", "torchvision.datasets"),
        ("fashion-mnist", "torchvision.datasets"),
        ("cifar10", "torchvision.datasets"),
        ("huggingface", "datasets"),
    ],
)
def test_missing_packages(kind, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf'{module.split(".")[0]}; install it with: pip install "'
    ):
        datasets.make_dataset(hf_section(tmp_path) | {"type": kind}, as_array)


# ------------------------------------------------------------------------- transparency

HIDDEN = (255, 0, 0)  # beneath the transparent pixels


def transparent(mode):
    """Transparent on the left, of an arbitrary colour; blue (29 as grey) on the right."""
    image = Image.new("RGBA", (8, 8), (*HIDDEN, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 8))
    if mode == "tRNS":  # one colour of an RGB image is transparent
        image = image.convert("RGB")
        image.info["transparency"] = HIDDEN
    elif mode == "P":
        image = image.convert("RGB").quantize(2)
        image.info["transparency"] = image.getpixel((0, 0))
    elif mode == "LA":
        image = image.convert("LA")
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
@pytest.mark.parametrize(
    ("background", "level"), [("white", (255, 255, 255)), ("#008040", (0, 128, 64))]
)
def test_transparent_images_show_the_background(mode, background, level):
    transform = transforms.ImageTransform((8, 8), 3, background=background)
    image = transform(transparent(mode))[1]
    pixels = ((image + 1) * 127.5).round().int()
    assert pixels[:, 3, 0].tolist() == list(level)
    assert pixels[:, 3, 7].tolist() == ([29] * 3 if mode == "LA" else [0, 0, 255])


def test_half_transparency_is_blended_before_scaling():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 51))  # a fifth of black over white
    grey = transforms.ImageTransform((8, 8), 1)(image)[1]
    assert ((grey + 1) * 127.5).round().unique().tolist() == [204]


def test_models_with_alpha_keep_it_and_opaque_images_stay_bit_by_bit():
    image = transforms.ImageTransform((8, 8), 4)(transparent("RGBA"))[1]
    assert image[3, 0].tolist() == [-1] * 4 + [1] * 4
    pixels = images(1, size=(8, 8))[0]
    opaque = Image.fromarray(pixels).convert("RGBA")
    for channels, mode in (3, "RGB"), (1, "L"):
        transform = transforms.ImageTransform((8, 8), channels, background="red")
        plain = transform(Image.fromarray(pixels).convert(mode))[1]
        assert torch.equal(transform(opaque)[1], plain)


def test_files_and_columns_show_white(tmp_path):
    transparent("RGBA").save(tmp_path / "0.png")
    folder = utils.FolderOfImages(tmp_path)
    assert folder[0][0].getpixel((0, 0)) == (255, 255, 255)
    rows = {"image": [transparent("RGBA")]}
    (image,) = utils.hf_datasets_augs_helper(rows, lambda x: x, "image")["image"]
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_crops_and_flips_of_a_config_are_the_trainings_alone(tmp_path):
    save_images(tmp_path, images(1, size=(8, 24)))
    made = {"type": "imagefolder", "location": str(tmp_path)}
    model = tiny_config(model={"input_channels": 3})["model"]

    def drawn(**keys):
        config = load_config({"model": model, "dataset": {**made, **keys}})
        data = training_data.make_training_data(config)
        return [data[0, seed]["original"] for seed in range(20)], config["dataset"]

    (plain, *others), _ = drawn()
    assert all(torch.equal(plain, other) for other in others)
    flipped, _ = drawn(horizontal_flip=True)
    flips = [torch.equal(x, plain.flip(2)) for x in flipped]
    assert flips == [not torch.equal(x, plain) for x in flipped]
    assert 2 < sum(flips) < 18
    cropped, kept = drawn(random_crop=True)
    assert not any(torch.equal(x, y) for x, y in itertools.pairwise(cropped))
    assert torch.equal(reals.RealImages(kept, (8, 8), 3)[0]["image"], plain)


def test_the_background_of_a_config(tmp_path):
    transparent("RGBA").save(tmp_path / "0.png")
    made = {"type": "imagefolder", "location": str(tmp_path), "background": "black"}
    config = load_config({"model": tiny_config()["model"], "dataset": made})
    assert training_data.make_training_data(config)[0, 0]["original"][0, 0, 0] == -1
    with pytest.raises(ValueError, match=r"dataset.background: needs a colour .* got 'blakc'"):
        load_config({"model": config["model"], "dataset": {**made, "background": "blakc"}})
