"""Sets of sampled images: a folder of them, or an .npz as ADM's evaluator reads it."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.images import PIL_MODES, convert_mode, from_pil_image, open_image
from ..data.datasets import FolderOfImages


class SampleImages:
    """Images of one size, in the order of their names or of the file.

    path: a folder with its subfolders, or an .npz with arr_0, uint8, (n, h, w, c). shape: (c, h,
    w), c of 3, or of 1 where the first image is greyscale. Raises ValueError where there are none.
    """

    def __init__(self, path: Path):
        self.path = path
        self._array: np.ndarray | None = None
        self._folder: FolderOfImages | None = None
        if path.suffix == ".npz":
            self._array = _read_array(path)
            h, w, c = self._array.shape[1:]
            self.shape: tuple[int, ...] = (c, h, w)
        else:
            self._folder = FolderOfImages(path, mode=None)
            first = from_pil_image(open_image(self._folder.paths[0], None))
            self.shape = (1 if len(first) < 3 else 3, *first.shape[1:])

    def __len__(self) -> int:
        return len(self._array) if self._array is not None else len(self._folder)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, (c, h, w) in [-1, 1]. Raises ValueError for one of another size."""
        if self._array is not None:
            levels = torch.from_numpy(self._array[index]).movedim(-1, 0)
            return levels.float() / 127.5 - 1
        assert self._folder is not None
        path = self._folder.paths[index]
        picture = open_image(path, None)
        if self.shape[0] == 1 and len(from_pil_image(picture)) > 2:
            raise ValueError(
                f"samples of one set are all greyscale or all RGB: {path} is RGB, the first image "
                "is greyscale; convert them before"
            )
        image = from_pil_image(convert_mode(picture, PIL_MODES[self.shape[0]]))
        if image.shape != self.shape:
            raise ValueError(
                f"samples of one set have one size: {path} has {tuple(image.shape[1:])}, the first "
                f"image {self.shape[1:]}; resize them before"
            )
        return image

    def batches(
        self, indices: Sequence[int], batch_size: int, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """The images of the indices, (k, c, h, w), in their order."""
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            yield torch.stack([self[i] for i in part]).to(device)

    def digest(self) -> str:
        """A SHA-256 that changes with the images: of the .npz, or of the files' names and dates."""
        digest = hashlib.sha256()
        if self._array is not None:
            digest.update(np.ascontiguousarray(self._array).tobytes())
            return digest.hexdigest()
        assert self._folder is not None
        for path in self._folder.paths:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def _read_array(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["arr_0"]
    except FileNotFoundError:
        raise ValueError(f"no samples at {path}; check the path") from None
    except Exception as error:  # zip, header and pickle errors of numpy
        raise ValueError(
            f"{path} holds no samples as ADM's .npz, arr_0, has them: {error}"
        ) from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in {1, 3} or not len(array):
        raise ValueError(
            f"{path}: samples are uint8 of shape (n, h, w, 3), got {array.dtype} of {array.shape}"
        )
    return array
