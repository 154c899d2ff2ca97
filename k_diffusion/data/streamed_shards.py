"""Tar shards of WebDataset that are read while they are fetched, and resume at the sample."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ..common.text import need
from .archives import (
    caption_text,
    class_id,
    image_endings,
    is_url,
    sample_parts,
    shards,
    transformed,
)
from .scan import count_in, falls_in
from .streamed import StreamedRows


class ShardSamples:
    """The samples of shards that have an image, in their order: an iterable that pickles.

    location: URLs, and what else the package `webdataset` opens, with braces for numbers, or files
    as of `shards`. keys: the endings of a sample's image, class id and caption. split: "test" is
    every fifth sample, "train" the others. Raises ValueError where shards can't be read.
    """

    def __init__(self, location: str, keys: Sequence[str], split: str = "all"):
        self.location, self.keys, self.split = location, keys, split

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Names of samples, with what these have by `keys`."""
        wds, braces = (
            need(module, "streaming of tar shards", '"k-diffusion[datasets]"')
            for module in ("webdataset", "braceexpand")  # of which the first needs the second
        )
        image, *others = self.keys
        endings = image_endings(image)
        wanted = {*endings, *others}
        if is_url(self.location):
            # the package's own list also splits at "::", behind which a command could hide
            urls = list(braces.braceexpand(self.location))
        else:
            # "./" tells a file that is named like a command from one
            urls = [os.path.join(".", path) for path in shards(self.location)]
        samples = wds.tariterators.tarfile_samples(
            ({"url": url} for url in urls),
            select_files=lambda name: sample_parts(name)[1] in wanted,
        )
        found = 0
        try:
            for sample in samples:
                content = next((sample[e] for e in endings if e in sample), None)
                if content is None:
                    continue
                found += 1
                if falls_in(found, self.split):
                    parts = {image: content, **{k: sample[k] for k in others if k in sample}}
                    yield f"{sample['__key__']} of {sample['__url__'].removeprefix('./')}", parts
        except Exception as error:  # of programs that fetch, of the network, of tarfile
            said = " ".join(str(error.args[0] if error.args else error).split())
            raise ValueError(
                f"dataset.location: webdataset can't read {self.location}; it says: {said}"
            ) from error
        if not found:
            raise ValueError(
                f"dataset.image_key: no sample of {self.location} has an image at {image!r}"
            )


class StreamedShards(Dataset[dict[str, Any]]):
    """The images of streamed shards: items as those of `ArchivedImages`.

    data: rows of `ShardSamples`. keys: the same as theirs.
    """

    def __init__(
        self, data: StreamedRows, transform: Callable[[Image.Image], Any], keys: Sequence[str]
    ):
        self.data, self.transform, self.keys = data, transform, keys

    @property
    def window(self) -> int:
        """How many samples are shuffled together."""
        return self.data.window

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, parts = self.data[index]
        image_key, class_key, caption_key = self.keys
        item = {image_key: transformed(parts[image_key], name, self.transform)}
        if class_key in parts:
            item[class_key] = class_id(parts[class_key], f"{class_key} of {name}")
        if caption_key in parts:
            item[caption_key] = caption_text(parts[caption_key], name)
        return item


def streamed_shards(
    section: Mapping[str, Any], transform: Callable[[Image.Image], Any]
) -> StreamedShards:
    """The data set of a config's section of type webdataset, with `streaming`."""
    for key, what in (
        ("num_examples", "samples they have"),
        ("num_classes", "classes they have, 0 for none"),
    ):
        if section[key] is None:
            raise ValueError(f"dataset.{key}: streamed shards don't say how many {what}; set it")
    if section.get("buckets"):
        raise ValueError(
            "dataset.buckets: the sizes of streamed images aren't known before they are read; "
            "leave it out, or download the shards and leave out streaming"
        )
    keys = section["image_key"], section["class_key"], section["caption_key"]
    samples = ShardSamples(section["location"], keys, section["split"])
    length = count_in(section["num_examples"], section["split"])
    return StreamedShards(StreamedRows(samples, length, section["shuffle_window"]), transform, keys)
