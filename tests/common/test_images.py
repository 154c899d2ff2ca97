"""Images as cameras, scanners and strangers leave them."""

import os

import numpy as np
import pytest
from PIL import Image

from k_diffusion.common import images
from k_diffusion.common.images import CorruptImageError
from k_diffusion.data import datasets, training_data
from k_diffusion.data.transforms import ImageTransform

ORIENTATION = 0x0112
PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def test_images_are_upright(tmp_path):
    # what has to be done to the stored pixels for each orientation, as the standard says
    upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(np.transpose(a), 2),
        8: np.rot90,
    }
    for orientation, turn in upright.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
        got = images.open_image(tmp_path / "x.png", "L")
        assert np.array_equal(np.asarray(got), turn(PIXELS)), orientation
        with Image.open(tmp_path / "x.png") as stored:
            h, w = turn(PIXELS).shape
            _, plain, _ = ImageTransform((h, w), 1)(stored)  # of a data set that opens its images
        assert np.allclose(plain[0].numpy(), turn(PIXELS) / 127.5 - 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_alpha_is_composited_in_every_mode(mode):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        image = image.convert("P")
    elif mode in ("L", "RGB"):  # one colour is transparent
        image = image.convert(mode)
        image.info["transparency"] = 0 if mode == "L" else (0, 0, 0)
    else:
        image = image.convert(mode)
    got = images.convert_mode(image, "RGB", "#00ff00")
    assert got.getpixel((1, 0)) == (0, 255, 0)


def test_wide_pixels_are_scaled():
    wide = np.array([[0, 32896, 65535]])
    for image in (
        Image.fromarray(wide.astype(np.uint16)),
        Image.fromarray(wide.astype(np.int32)),
        Image.fromarray((wide / 65535).astype(np.float32)),
    ):
        assert np.asarray(images.convert_mode(image, "L")).tolist() == [[0, 128, 255]]
        want = wide / 65535 * 2 - 1
        assert np.abs(images.from_pil_image(image)[0].numpy() - want).max() < 1 / 255


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("F", (2, 2), -0.5), "floats from -0.5 to -0.5"),
        (Image.new("F", (2, 2), float("nan")), "floats from nan"),
        (Image.new("I", (2, 2), 65536), "32-bit integers from 65536"),
        (Image.new("LAB", (2, 2)), "LAB"),
    ],
    ids=["below", "nan", "large", "lab"],
)
def test_pixels_of_an_unknown_range_are_skipped_by_name(tmp_path, image, says):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    image.save(tmp_path / "b.tiff")
    folder = datasets.FolderOfImages(tmp_path, ImageTransform((3, 4), 1), mode=None)
    with pytest.raises(CorruptImageError, match=rf"b.tiff: its pixels are {says}"):
        folder[1]
    skipped = training_data.TrainingData(folder)[1, 0]["skipped"]
    assert skipped.startswith(f"{tmp_path / 'b.tiff'} (its pixels are")


def test_a_picture_bomb_is_skipped_with_its_size(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    Image.new("L", (40, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    folder = datasets.FolderOfImages(tmp_path, ImageTransform((3, 4), 1), mode=None)
    assert (
        "bomb.png (Image size (2000 pixels)" in training_data.TrainingData(folder)[1, 0]["skipped"]
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # large, but not twice the limit
    assert training_data.TrainingData(folder)[1, 0]["skipped"] == ""


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(CorruptImageError, match="no ordinary file"):
        images.open_image(tmp_path / "pipe.png")


def test_a_name_that_is_not_utf_8_can_be_printed(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(CorruptImageError) as error:
        images.open_image(path)
    assert str(error.value.filename).encode().endswith(b"\\xff.png")
    assert b"\\xff.png" in str(error.value).encode()


def test_a_missing_image_of_a_hugging_face_data_set_is_named():
    library = pytest.importorskip("datasets")
    rows = {"image": [Image.fromarray(PIXELS), None], "label": [0, 1]}
    features = library.Features({"image": library.Image(), "label": library.Value("int64")})
    made = library.Dataset.from_dict(rows, features)
    data = datasets.HuggingFace(made, "image", ImageTransform((3, 4), 1))
    with pytest.raises(CorruptImageError, match="row 1 of the data set: it has no image"):
        data[1]
    skipped = training_data.TrainingData(data, image_key="image")[1, 0]["skipped"]
    assert skipped == "row 1 of the data set (it has no image)"
    with pytest.raises(ValueError, match="'image' of row 1 of this batch is missing"):
        datasets.hf_datasets_augs_helper(made[:], lambda image: image, "image")
