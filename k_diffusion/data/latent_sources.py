"""Latents on disk: an autoencoder's moments of images, in the formats that are read.

Written by encode_latents.py, as safetensors in a folder, or by others: EDM2's and REPA's .npy of
means and deviations in a zip or a folder with dataset.json, LightningDiT's safetensors.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints import read_torch
from ..common.files import PathLike
from ..common.untrusted import get_safetensors_metadata
from ..encoders.autoencoder import Statistic
from ..encoders.text import unpack_texts

INFO = "latents.json"
_STATISTICS = "statistics.json"
_IN_MEMORY = 2**28  # bytes
_CHUNK = 256
# What a file of latents may have for each of its images.
_ROWS = {"labels", "captions"} | {
    f"{name}{ending}" for name in ("moments", "latents", "condition") for ending in ("", "_flip")
}
_ANEW = "delete the wrong file and write it anew: call encode_latents.py again"


class LatentSource:
    """Moments by their index, whoever wrote them; the kinds below read them.

    shape: (c, h, w) of latents. flips: whether there are moments of mirrored images. num_classes: 0
    without labels. captions: whether there are texts of the images. conditioned: whether there are
    the latents of an image beside each. info: what encode_latents.py noted of them, else {}.
    """

    shape: tuple[int, ...] = ()
    flips = captions = conditioned = False
    num_classes = 0
    nbytes = 0

    def __init__(self, path: Path):
        self.path = path
        self.info: dict[str, Any] = {}
        self._handles: dict[Any, Any] = {}
        self._process = os.getpid()

    @property
    def in_memory(self) -> bool:
        """Whether all of it is kept in memory."""
        return 0 < self.nbytes <= _IN_MEMORY

    def __len__(self) -> int:
        raise NotImplementedError

    def moments(self, index: int, flip: bool = False) -> Tensor:
        """(2 c, h, w) in float32, means, then standard deviations, as the encoder gave them."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """The class id; 0 without labels."""
        raise NotImplementedError

    def caption(self, index: int) -> str:
        """The caption of an image, where there are captions."""
        raise NotImplementedError

    def texts(self) -> Iterator[str]:
        """All captions, each at least once, where there are captions."""
        raise NotImplementedError

    def check_captions(self) -> None:
        """Raises ValueError where there are no captions."""
        if not self.captions:
            raise ValueError(
                f"the latents at {self.path} have no captions; encode the images anew with a "
                "config that has a section text, or leave it out"
            )

    def condition(self, index: int, flip: bool = False) -> Tensor:
        """The mean of the raw latents of the image beside it, (c, h, w) in float32."""
        raise NotImplementedError

    def statistics(self) -> tuple[Statistic, Statistic] | None:
        """The mean and standard deviation of the raw latents, if they were written."""
        for file in statistics_file(self.path), self.path / INFO:
            if file.is_file():
                try:
                    found = json.loads(file.read_text(encoding="utf-8"))["statistics"]
                    return found["mean"], found["std"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"{file} has no statistics; write them anew: python encode_latents.py "
                        f"--statistics {self.path}"
                    ) from None
        return None

    def _take_shape(self, shape: tuple[int, ...], name: object) -> None:
        """Takes the shape of the latents `name`. Raises ValueError unless it is the others'."""
        if self.shape not in {(), shape}:
            raise ValueError(
                f"{name} has latents of {shape}, those before it of {self.shape}; latents at one "
                "place have one shape"
            )
        self.shape = shape

    def chunks(self) -> Iterator[Tensor]:
        """All moments, mirrored ones too, (n, 2 c, h, w) at a time."""
        for flip in (False, True) if self.flips else (False,):
            for start in range(0, len(self), _CHUNK):
                stop = min(start + _CHUNK, len(self))
                yield torch.stack([self.moments(i, flip) for i in range(start, stop)])

    def _handle(self, key: Any, make: Any) -> Any:
        """A file that this process has opened: another's handle must not be shared."""
        if self._process != os.getpid():
            self._handles, self._process = {}, os.getpid()
        if key not in self._handles:
            self._handles[key] = make()
        return self._handles[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": {}}


def _read_info(file: Path) -> dict[str, Any]:
    """What encode_latents.py noted of a folder. Raises ValueError for what it hasn't written."""
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        noted = {"fingerprint", "location", "input_range"} <= info["autoencoder"].keys()
        if noted and info["shards"] and all(isinstance(name, str) for name in info["shards"]):
            return info
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"{file} is damaged: it doesn't tell the autoencoder and the files of latents; delete it "
        "and call encode_latents.py again"
    )


class ShardedLatents(LatentSource):
    """Safetensors in a folder, with `moments` or, without deviations, LightningDiT's `latents`."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.files = sorted(path.glob("*.safetensors"))
        if (path / INFO).is_file():
            self.info = _read_info(path / INFO)
            self.files = [path / name for name in self.info["shards"]]
        elif any("plan" in get_safetensors_metadata(file) for file in self.files[:1]):
            raise ValueError(
                f"{path} is not encoded to its end: it has no {INFO}; call encode_latents.py again"
            )
        if missing := [file.name for file in self.files if not file.is_file()]:
            raise ValueError(
                f"{path} lacks {missing[0]}, which its {INFO} lists; copy the whole folder, or "
                "call encode_latents.py again"
            )
        self.starts, labels, names = [0], [], set[str]()
        for file in self.files:
            get_safetensors_metadata(file)  # raises for a damaged one
            with safe_open(os.fspath(file), "pt") as opened:
                shapes = {n: opened.get_slice(n).get_shape() for n in _ROWS & {*opened.keys()}}
                self.name = next((n for n in ("moments", "latents") if n in shapes), "")
                if len(shapes.get(self.name, ())) != 4:
                    raise ValueError(
                        f"{file} has neither moments nor latents of (n, c, h, w); name another "
                        "folder"
                    )
                n, channels, h, w = shapes[self.name]
                self._check_rows(file, shapes, names or set(shapes))
                names = set(shapes)
                if "labels" in names:
                    labels.append(opened.get_tensor("labels").flatten())
            self._take_shape((channels // 2 if self.name == "moments" else channels, h, w), file)
            self.starts.append(self.starts[-1] + n)
            self.nbytes += file.stat().st_size
        self.flips = f"{self.name}_flip" in names
        self.captions, self.conditioned = "captions" in names, "condition" in names
        self.labels = torch.cat(labels) if labels else torch.zeros(len(self), dtype=torch.int64)
        known = int(self.labels.max()) + 1 if labels else 0
        self.num_classes = self.info.get("num_classes", known)

    def _check_rows(self, file: Path, shapes: dict[str, list[int]], wanted: set[str]) -> None:
        """Raises ValueError unless a file has what is wanted, for each of its images."""
        if odd := sorted(wanted ^ shapes.keys()):
            has, lacks = self.files[0], file
            has, lacks = (has, lacks) if odd[0] in wanted else (lacks, has)
            raise ValueError(
                f"all files of a folder or none have {odd[0]}, but {has} has them and {lacks.name} "
                f"hasn't; {_ANEW}"
            )
        n = shapes[self.name][0]
        for name, shape in shapes.items():
            if shape[:1] != [n] or (name == "labels" and math.prod(shape) != n):
                raise ValueError(
                    f"{name} must be one for each of the {n} {self.name}, but those of {file} have "
                    f"shape {tuple(shape)}; {_ANEW}"
                )

    def __len__(self) -> int:
        return self.starts[-1]

    def moments(self, index: int, flip: bool = False) -> Tensor:
        row = self._row(self.name, index, flip)
        return torch.cat([row, torch.zeros_like(row)]) if self.name == "latents" else row

    def _row(self, name: str, index: int, flip: bool) -> Tensor:
        shard, place = self._place(index)
        name += "_flip" if flip else ""
        rows = self._handle((shard, name), lambda: self._open(shard, name))
        return rows[place : place + 1][0].float()

    def _place(self, index: int) -> tuple[int, int]:
        """The file that an item is in, and its place there."""
        shard = int(np.searchsorted(self.starts, index, "right")) - 1
        return shard, index - self.starts[shard]

    def _file(self, shard: int) -> Any:
        return self._handle(shard, lambda: safe_open(os.fspath(self.files[shard]), "pt"))

    def _open(self, shard: int, name: str) -> Any:
        small = self.in_memory
        return self._file(shard).get_tensor(name) if small else self._file(shard).get_slice(name)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def caption(self, index: int) -> str:
        shard, place = self._place(index)
        texts, places = self._handle((shard, "captions"), lambda: self._texts(shard))
        return texts[int(places[place])]

    def texts(self) -> Iterator[str]:
        for shard in range(len(self.files)):
            yield from self._texts(shard)[0]

    def _texts(self, shard: int) -> tuple[list[str], Tensor]:
        """The texts of a file, each once, and which of them each of its images has."""
        file = self._file(shard)
        return unpack_texts(file.get_tensor("texts")), file.get_tensor("captions")

    def condition(self, index: int, flip: bool = False) -> Tensor:
        return self._row("condition", index, flip)

    def statistics(self) -> tuple[Statistic, Statistic] | None:
        theirs = self.path / "latents_stats.pt"
        found = super().statistics()
        if found is not None or not theirs.is_file():
            return found
        try:
            mean, std = (read_torch(theirs)[key].float().squeeze(0) for key in ("mean", "std"))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{theirs} has no mean and std; write them anew") from None
        if mean.numel() == std.numel() == self.shape[0]:
            mean, std = mean.flatten(), std.flatten()
        return mean, std


class NumpyLatents(LatentSource):
    """EDM2's and REPA's: .npy of means and deviations, in a zip or a folder, with dataset.json."""

    def __init__(self, path: Path):
        super().__init__(path)
        if path.is_dir():
            names = [p.relative_to(path).as_posix() for p in path.rglob("*.npy")]
        else:
            try:
                with zipfile.ZipFile(path) as file:
                    names = [name for name in file.namelist() if name.endswith(".npy")]
                    sizes = [info.compress_type for info in file.infolist()]
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path} is no zip of latents: {error}") from None
            if any(sizes):
                raise ValueError(f"{path} is compressed; latents are read from zips that are not")
        self.names = sorted(names)
        if not self.names:
            raise ValueError(f"{path} has no .npy of latents; encode images with encode_latents.py")
        self.labels = self._labels()
        known = [label for label in self.labels.values() if label is not None]
        self.num_classes = max(known) + 1 if known else 0
        self.moments(0)

    def _labels(self) -> dict[str, Any]:
        try:
            given = json.loads(self._bytes("dataset.json"))["labels"]
            return {name: int(label) for name, label in given or ()}
        except (KeyError, FileNotFoundError):
            return {}
        except (ValueError, TypeError):
            raise ValueError(f"dataset.json of {self.path} has no labels as EDM2's has") from None

    def _bytes(self, name: str) -> bytes:
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        return self._handle("zip", lambda: zipfile.ZipFile(self.path)).read(name)

    def __len__(self) -> int:
        return len(self.names)

    def moments(self, index: int, flip: bool = False) -> Tensor:
        name = self.names[index]
        try:
            array = np.load(io.BytesIO(self._bytes(name)), allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{name} of {self.path} is damaged or no .npy: {error}") from None
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
        if array.ndim != 3 or len(array) % 2 or array.dtype.kind != "f":
            raise ValueError(
                f"{name} of {self.path} must hold (2 c, h, w) floats, means and deviations, got "
                f"{array.dtype} of {array.shape}"
            )
        self._take_shape((len(array) // 2, *array.shape[1:]), f"{name} of {self.path}")
        return torch.from_numpy(array.astype(np.float32))

    def label(self, index: int) -> int:
        label = self.labels.get(self.names[index])
        if label is None and self.labels:
            raise ValueError(f"dataset.json of {self.path} has no label of {self.names[index]}")
        return label or 0


def open_latents(path: PathLike) -> LatentSource:
    """The latents at a path, in any of the formats that are read. Raises ValueError."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no latents at {path} (dataset.location); encode_latents.py writes them")
    if path.is_dir() and any(path.glob("*.safetensors")):
        return ShardedLatents(path)
    if path.is_dir() and not (path / "dataset.json").is_file():
        raise ValueError(
            f"the folder {path} holds no latents: neither .safetensors nor a dataset.json"
        )
    return NumpyLatents(path)


def statistics_file(path: Path) -> Path:
    """The file that `--statistics` writes for the latents at a path."""
    return path / _STATISTICS if path.is_dir() else path.with_name(f"{path.name}.{_STATISTICS}")
