"""How fast data come: finding, decoding, and augmenting batches beside image after image.

    python benchmarks/data.py [--rounds 9] [--write]

Pictures become tensors, are augmented by the law of arXiv:2206.00364, appendix F.2, at the
configs' probability of 0.12, with the same random numbers both ways. JPEGs of photographs' sizes
are decoded whole, and with `jpeg_draft`, for images of 256 x 256. A folder is found anew, and from
what was kept of it. Each way in turn, on one
thread; a time is the least CPU time of its rounds, so that other processes count little.
"""

import k_diffusion.common.cpu  # noqa: F401  before torch, which loads OpenMP

# isort: split
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from harness import bench
from PIL import Image

from k_diffusion.data.datasets import FolderOfImages
from k_diffusion.data.transforms import ImageTransform

PROBABILITY = 0.12
COLUMNS: bench.Columns = {
    "way": ("way", str),
    "ms": ("ms", bench.digits),
    "rate": ("images / s", bench.digits),
    "ratio": ("speed, the first = 1", bench.digits),
}
# Sides and channels of what is augmented, and images per batch.
CASES = {
    "MNIST": (28, 1, 64),
    "CIFAR-10": (32, 3, 64),
    "128 x 128": (128, 3, 32),
    "256 x 256": (256, 3, 16),
}

PHOTOGRAPHS = [(768, 1024), (1536, 2048)]


def pictures(n: int, side: int, channels: int) -> list[Image.Image]:
    """Pictures of noise, which cost as much as any."""
    shape = (n, side, side, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(p[..., 0] if channels == 1 else p) for p in pixels]


def least(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each way, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            if i:  # the first warms up
                times[name].append(time.thread_time() - start)
    return {name: min(found) for name, found in times.items()}


def rows(ways: Mapping[str, Callable[[], object]], n: int, rounds: int) -> list[bench.Row]:
    """A row for each way to make n images."""
    times = least(ways, rounds)
    first = next(iter(times.values()))
    return [
        {"way": name, "ms": 1e3 * s, "rate": n / s, "ratio": first / s} for name, s in times.items()
    ]


def augmentation(side: int, channels: int, n: int, rounds: int) -> list[bench.Row]:
    """Rows of a case."""
    images = pictures(n, side, channels)
    transform, later = (
        ImageTransform((side, side), channels, PROBABILITY, later=later) for later in (False, True)
    )

    def alone() -> None:
        for i, image in enumerate(images):
            torch.default_generator.manual_seed(i)
            transform(image)

    def together() -> None:
        found = []
        for i, image in enumerate(images):
            torch.default_generator.manual_seed(i)
            found.append(later(image))
        originals, numbers = zip(*found)
        later.augment.augment(originals, torch.stack(numbers))

    return rows({"one by one": alone, "together": together}, n, rounds)


def decoding(h: int, w: int, n: int, rounds: int) -> list[bench.Row]:
    """Rows of JPEGs of a size."""
    y, x = np.mgrid[:h, :w]
    smooth = (
        128 + 50 * np.sin(x / 37) * np.cos(y / 29) + np.random.default_rng(0).normal(0, 9, (h, w))
    )
    pixels = np.stack([smooth, smooth[::-1], smooth[:, ::-1]], -1).clip(0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(pixels).save(Path(folder, "0.jpg"), quality=90)
        ways = {}
        for name, draft in ("whole", False), ("draft", True):
            transform = ImageTransform((256, 256), 3, jpeg_draft=draft)
            data = FolderOfImages(folder, transform, mode=None)
            ways[name] = lambda data=data: [data[0] for _ in range(n)]
        return rows(ways, n, rounds)


def starting(files: int) -> list[bench.Row]:
    """Rows of finding so many files, a thousand in a folder, once each."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, K_DIFFUSION_CACHE=cache),
    ):
        for i in range(0, files, 1000):
            sub = Path(folder, f"{i // 1000:05}")
            sub.mkdir()
            for j in range(i, min(i + 1000, files)):
                os.close(os.open(f"{sub}/{j:08}.png", os.O_CREAT))
        time.sleep(3)  # until the folders count as settled
        times = {}
        for name in "first time", "second time":
            start = time.thread_time()
            FolderOfImages(folder)
            times[name] = time.thread_time() - start
    first = times["first time"]
    return [
        {"way": name, "ms": 1e3 * s, "rate": files / s, "ratio": first / s}
        for name, s in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    p = bench.parser(__doc__ or "")
    p.add_argument("--rounds", type=int, default=9, help="of each way (default: 9)")
    p.add_argument("--files", type=int, default=1_000_000, help="of a folder (default: a million)")
    args = bench.parse(p, argv)
    torch.set_num_threads(1)
    args.on = bench.describe(args.device)
    sections: dict[str, bench.Section] = {}
    cases = dict(list(CASES.items())[: 1 if args.quick else None])
    for name, (side, channels, n) in {} if args.no_run else cases.items():
        title = f"augmentation, {name}, {channels} channel{'s' * (channels > 1)}, batches of {n}"
        found = augmentation(side, channels, n, args.rounds)
        sections[title] = {"on": args.on, "rows": found}
        print(bench.text(title, sections[title], COLUMNS), flush=True)
    for h, w in [] if args.no_run or args.quick else PHOTOGRAPHS:
        title = f"JPEGs of {w:,} x {h:,} for images of 256 x 256"
        sections[title] = {"on": args.on, "rows": decoding(h, w, 4, args.rounds)}
        print(bench.text(title, sections[title], COLUMNS), flush=True)
    if not (args.no_run or args.quick):
        title = f"a folder of {args.files:,} images"
        sections[title] = {"on": args.on, "rows": starting(args.files)}
        print(bench.text(title, sections[title], COLUMNS), flush=True)
    bench.finish("data", "data.py", args, sections, COLUMNS)


if __name__ == "__main__":
    main()
