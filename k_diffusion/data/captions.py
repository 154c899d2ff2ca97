"""What belongs to an image of a data set besides its class: a caption, and another image."""

from pathlib import Path
from typing import Any

import torch

from ..common.images import open_image
from .datasets import FolderOfImages
from .latents import Latents
from .transforms import ImageTransform

REMEDY = "set dataset.caption_key, or leave out the section text"


def check_captions(data: Any, key: int | str, remedy: str = REMEDY) -> None:
    """Raises ValueError, with the remedy, where images have no caption, as far as the data set
    knows it without reading them. key: as of `caption_of`."""
    missing = data.without_caption(str(key)) if hasattr(data, "without_caption") else []
    if missing:
        raise ValueError(
            f"{len(missing):,} of {len(data):,} images have no caption at {key!r}, such as "
            f"{missing[0]}; {remedy}"
        )


def caption_at(data: Any, index: int, key: int | str, remedy: str = REMEDY) -> str:
    """As `caption_of`, but no image in a file is read for it."""
    item = None if hasattr(data, "paths") else data[index]
    return caption_of(data, item, index, key, remedy)


def caption_of(data: Any, item: Any, index: int, key: int | str, remedy: str = REMEDY) -> str:
    """The caption of an item of a data set.

    key: where the item holds it; of images in files, the ending of the text file beside each.
    Raises ValueError, with the remedy, where there is none.
    """
    paths = getattr(data, "paths", None)
    if paths is not None:
        file = Path(paths[index]).with_suffix(f".{str(key).removeprefix('.')}")
        try:
            return " ".join(file.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError:
            raise ValueError(f"{paths[index]} has no caption: no file {file}; {remedy}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption {file} is not UTF-8 text: {error.reason}") from None
    try:
        caption = item[key]
    except (KeyError, IndexError, TypeError):
        caption = None
    if not isinstance(caption, str):
        raise ValueError(f"item {index} of the data set has no caption at {key!r}; {remedy}")
    return caption


class PairedLatents:
    """The latents of an image for each of those on disk, mirrored where these are.

    Raises ValueError where encode_latents.py wrote none.
    """

    def __init__(self, data: Latents):
        if not data.source.conditioned:
            raise ValueError(
                f"the latents at {data.source.path} have none of images to be told; encode anew "
                "with a config that has this section image_condition"
            )
        self.data = data

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean = self.data.source.condition(index, self.data.draw_flip())
        return self.data.transform(torch.cat([mean, mean]), torch.zeros_like(mean))


class PairedImages:
    """An image for each of a folder's: of the same path in another folder, whatever its ending.

    transform: the same as the images', so that with the same random numbers it augments them alike.
    Raises ValueError for data that doesn't come from files, and for images without a partner.
    """

    def __init__(self, data: Any, folder: str | Path, transform: ImageTransform):
        if not hasattr(data, "paths"):
            raise ValueError(
                "image_condition paired needs a data set of image files: imagefolder or "
                "imagefolder-class"
            )
        root = Path(folder)
        found = {
            path.relative_to(root).with_suffix(""): path
            for path in root.rglob("*")
            if path.suffix.lower() in FolderOfImages.IMG_EXTENSIONS
        }
        names = [Path(path).relative_to(data.root).with_suffix("") for path in data.paths]
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(names)} images have no partner in {root} "
                f"(image_condition.location), such as {missing[0]}"
            )
        self.paths, self.transform = [found[name] for name in names], transform

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.transform(open_image(self.paths[index], None))
