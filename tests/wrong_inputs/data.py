"""Wrong data sets."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .table import Row

GOOD = """
import numpy as np
from PIL import Image

class Data:
    def __init__(self, transform):
        self.transform = transform
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return self.transform(Image.fromarray(np.zeros((8, 8), np.uint8))), 0

"""
# What the file holds, and what is said about it.
CUSTOM = {
    "syntax": ("def get_dataset(:\n", "line 1 of .*syntax.py: SyntaxError"),
    "import": ("import nosuchmodule\n", "line 1 of .*import.py: ModuleNotFoundError: .*nosuchmod"),
    "raises": ("\n1 / 0\n", "line 2 of .*raises.py: ZeroDivisionError"),
    "exits": ("import sys\nsys.exit(3)\n", "line 2 of .*exits.py: SystemExit: 3"),
    "nothing": ("", "nothing.py has no function 'get_dataset'"),
    "number": ("get_dataset = 3\n", "number.py has no function 'get_dataset'"),
    "none": ("def get_dataset(config, transform): return None\n",
             "must return a data set with __len__ and __getitem__, got NoneType"),
    "no_arguments": ("def get_dataset(): return []\n",
                     "no_arguments.py in get_dataset.*: TypeError: .*argument"),
    "generator": ("def get_dataset(config, transform): yield 3\n", "got generator"),
    "fails": ("def get_dataset(config, transform):\n    return config['size']\n",
              "line 2 of .*fails.py in get_dataset.*: KeyError: 'size'"),
    "quits": ("def get_dataset(config, transform): exit()\n", "in get_dataset.*SystemExit"),
    "empty": ("def get_dataset(config, transform): return []\n", "data set 'custom' is empty"),
    "items": (GOOD + "def get_dataset(config, transform): return [None] * 40\n",
              "item 0 of the data set has no image that `transform` was applied to at 0"),
    "uint8": ("import torch\ndef get_dataset(config, transform):\n"
              "    return [(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)] * 40\n",
              "item 0 of the data set has no image that `transform` was applied to"),
    "raw": ("import numpy as np\ndef get_dataset(config, transform):\n"
            "    return [(np.zeros((3, 8, 8)), 0)] * 40\n", "has no image that `transform`"),
    "item": (GOOD + "Data.__getitem__ = lambda self, i: {}['x']\n"
             "def get_dataset(config, transform): return Data(transform)\n",
             "line 13 of .*item.py in item 0: KeyError: 'x'"),
    "unlabelled": (GOOD + "Data.__getitem__ = lambda self, i: "
                   "(self.transform(Image.new('L', (8, 8))),)\n"
                   "def get_dataset(config, transform): return Data(transform)\n",
                   "item 0 of the data set has no class id at 1"),
}  # fmt: skip


def write(folder: Path) -> None:
    for stem, (text, _) in CUSTOM.items():
        (folder / f"{stem}.py").write_text(text)
    (folder / "latin.py").write_bytes(b"name = '\xe9'\n")
    (folder / "no_images").mkdir()
    (folder / "no_images/notes.txt").write_text("none yet")
    pictures = folder / "broken_images/one"
    pictures.mkdir(parents=True)
    for i in range(6):
        (pictures / f"{i}.png").write_bytes(b"no image")
    floats = folder / "float_images/one"
    floats.mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.full((8, 8), 1e4, np.float32)).save(floats / f"{i}.tiff")
    for name in "hf_empty", "hf_json":
        (folder / name).mkdir()
    (folder / "hf_json/dataset_info.json").write_text("{")


def dataset(says: str, **section: object) -> Row:
    pairs = [f"--set=dataset.{key}={json.dumps(value)}" for key, value in section.items()]
    return Row("train", pairs, says)


ROWS = [
    *(
        dataset(says, type="custom", location=f"{stem}.py", num_classes=10)
        for stem, (_, says) in CUSTOM.items()
    ),
    dataset("no data set file .*gone.py; dataset.location", type="custom", location="gone.py"),
    dataset("no data set file .*no_images", type="custom", location="no_images"),
    dataset("text.pth is not a Python file", type="custom", location="text.pth"),
    dataset("latin.py: SyntaxError", type="custom", location="latin.py"),
    dataset("get_dataset: .*got 3", type="custom", location="items.py", get_dataset=3),
    dataset("has no function 'make'", type="custom", location="items.py", get_dataset="make"),
    dataset("dataset.config: .*got 3", type="custom", location="items.py", config=3),
    dataset("dataset.location: is required", type="custom"),
    *(
        row
        for kind in ("imagefolder", "imagefolder-class")
        for row in (
            dataset("dataset.location: is required", type=kind),
            dataset("no image folder at gone", type=kind, location="gone"),
            dataset("no image folder at tiny.json", type=kind, location="tiny.json"),
            dataset("no_images", type=kind, location="no_images"),
            dataset("can't read the image .*png", type=kind, location="broken_images"),
            dataset("pixels are floats from 10000 to 10000", type=kind, location="float_images"),
            dataset("dataset.location: .*got 3", type=kind, location=3),
        )
    ),
    dataset("unknown key 'random_crops' .did you mean 'random_crop'", random_crops=True),
    dataset(r"dataset.buckets\[1\]: the model can't take this size: input_size \[8, 9\] does not",
            type="imagefolder", location="x", buckets=[[8, 8], [8, 9]]),
    dataset(r"buckets\[0\]: the model can't take this size: .*attns\[0\]: kernel_size 3 is larger "
            "than the 8 x 2", type="imagefolder", location="x", buckets=[[16, 4]]),
    Row("train", "", r"dataset.buckets\[1\]: .*: image_condition.factor 8 must divide \[12, 8\]",
        config={"image_condition": {"type": "downsampled", "factor": 8}, "dataset": {
            "type": "imagefolder", "location": "x", "buckets": [[8, 8], [12, 8]]}}),
    dataset("dataset.buckets: .*got 3", type="imagefolder", location="x", buckets=3),
    dataset("dataset: unknown key 'buckets'", buckets=[[8, 8]]),
    dataset("dataset.random_crop: .*got 0.5", random_crop=0.5),
    dataset("dataset.horizontal_flip: .*got 'x'", horizontal_flip="x"),
    dataset("dataset: unknown key 'jpeg_draft'", jpeg_draft=True),
    *(
        row
        for kind in ("zip", "webdataset")
        for row in (
            dataset("dataset.location: is required", type=kind),
            dataset("dataset.location: no (archive|tar file) at gone", type=kind, location="gone"),
            dataset("tiny.json can't be read as an? .*file .*; fetch", type=kind,
                    location="tiny.json"),
            dataset("dataset.split: .*got 'valid'", type=kind, location="x", split="valid"),
        )
    ),
    dataset("no archive at no_images", type="zip", location="no_images"),
    dataset("no tar file at no_images", type="webdataset", location="no_images"),
    dataset("read at their places in files, and s3://a/b.tar is none", type="webdataset",
            location="s3://a/b.tar"),
    dataset("dataset.num_examples: streamed shards don't say how many samples they have",
            type="webdataset", location="s3://a/b.tar", streaming=True),
    dataset("no tar file at a-0.tar, a-1.tar", type="webdataset", location="a-{0..1}.tar"),
    dataset("mnist is not at tiny.json", type="mnist", location="tiny.json"),
    dataset("cifar10 is not at tiny.json", type="cifar10", location="tiny.json"),
    dataset("Hugging Face data set hf_empty can't be loaded", type="huggingface",
            location="hf_empty"),
    dataset("Hugging Face data set hf_json can't be loaded", type="huggingface",
            location="hf_json"),
    dataset("dataset.location: is required", type="huggingface"),
    dataset("Hugging Face data set hf_empty can't be loaded", type="huggingface",
            location="hf_empty", streaming=True),
    dataset("dataset.shuffle_window: .*got 0", type="huggingface", location="x", shuffle_window=0),
    dataset("dataset.split: .*got 'most'", type="mnist", location="x", split="most"),
]  # fmt: skip
