"""Reference files: statistics, features and images of real data, of this package and other tools.

No code in a file runs: .npz files are read without pickle, and pickles by a reader that knows numpy
arrays and plain values alone.
"""

import hashlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.files import write_atomically
from ..common.images import to_levels
from ..common.text import did_you_mean
from .statistics import FeatureStatistics


class ReferenceFileError(ValueError):
    """A reference file that can't be used; says which and why."""


class Reference(NamedTuple):
    """What a file holds of real data; None where it doesn't.

    statistics: of features. features: (n, width). images: the path of an .npz with images (n, h, w,
    3), uint8, in arr_0. source: the file.
    """

    statistics: FeatureStatistics | None
    features: Tensor | None
    images: Path | None
    source: Path


# The features of other tools' .npz files: clean-fid's and dgm-eval's.
_FEATURES = ("feats", "reps")


def read_reference(path: Path, entry: str | None = None, protocol: str = "") -> Reference:
    """Read a reference: .npz of this package, EDM, ADM, MAR, clean-fid or dgm-eval, .pkl of EDM2.

    entry: the metric of a .pkl, "fid" or "fd_dinov2". protocol: how its features were made; other
    tools' files don't say. A file of this package does, and must say the same. Raises
    ReferenceFileError for a file that is missing, damaged, of another protocol, or of anything but
    arrays and plain values.
    """
    try:
        if path.suffix == ".pkl":
            moments = _entry(path, entry)
            found = Reference(_statistics(moments, protocol), None, None, path)
        else:
            found = _read_npz(path, protocol)
    except FileNotFoundError:
        raise ReferenceFileError(f"no reference file {path}") from None
    except ReferenceFileError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise ReferenceFileError(f"{path} is damaged or no reference file: {error}") from error
    return found


def _read_npz(path: Path, protocol: str) -> Reference:
    with np.load(path, allow_pickle=False) as file:
        statistics = _statistics(file, protocol) if {"mu", "sigma"} <= set(file.files) else None
        names = [name for name in _FEATURES if name in file.files]
        features = torch.from_numpy(file[names[0]]) if names else None
        images = path if "arr_0" in file.files else None
        if statistics is None and features is None and images is None:
            raise ReferenceFileError(
                f"{path} holds neither statistics (mu, sigma), nor features (feats, reps), nor "
                f"images (arr_0), but {', '.join(file.files) or 'nothing'}"
            )
    if features is not None and features.ndim != 2:
        raise ReferenceFileError(
            f"the features in {path} have shape {tuple(features.shape)}, not (n, d)"
        )
    return Reference(statistics, features, images, path)


def _statistics(moments: Any, protocol: str) -> FeatureStatistics:
    mean, covariance = (torch.from_numpy(np.array(moments[key])) for key in ("mu", "sigma"))
    n = int(moments["n"]) if "n" in moments else None
    said = str(moments["protocol"]) if "protocol" in moments else ""
    if said and protocol and said != protocol:
        raise ReferenceFileError(
            f"this reference is of the protocol {said}, not of {protocol}; make one for {protocol}"
        )
    return FeatureStatistics.from_moments(mean.squeeze(), covariance, n, said or protocol)


def _entry(path: Path, entry: str | None) -> dict[str, Any]:
    content = read_plain_pickle(path)
    if not isinstance(content, Mapping):
        raise ReferenceFileError(f"{path} holds no statistics, but a {type(content).__name__}")
    entries = {k: v for k, v in content.items() if isinstance(v, Mapping) and "mu" in v}
    if entry is None and len(entries) == 1:
        entry = next(iter(entries))
    if entry not in entries:
        raise ReferenceFileError(
            f"{path} has statistics for {', '.join(map(str, entries)) or 'nothing'}, not for "
            f"{entry}{did_you_mean(entry, map(str, entries))}; name one of them"
        )
    n = {} if "num_images" not in content else {"n": content["num_images"]}
    return {**entries[entry], **n}


# What pickled arrays name: numpy's own functions that build them, in its versions' modules.
_BUILDERS: Any = (
    ("multiarray", np.empty(0).__reduce__()[0]),
    ("multiarray", np.float64(0).__reduce__()[0]),
    ("numeric", np.empty(0).__reduce_ex__(5)[0]),
)
_NUMPY: dict[tuple[str, str], Any] = {
    (f"numpy.{core}.{module}", build.__name__): build
    for core in ("core", "_core")
    for module, build in _BUILDERS
}
_BUILTINS = {
    (module, t.__name__): t
    for module in ("builtins", "__builtin__")  # the latter in protocols before 3
    for t in (set, frozenset, complex, bytes, bytearray, slice, range)
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **_NUMPY,
    **_BUILTINS,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # protocols before 3 write bytes as text
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise ReferenceFileError(
                f"it asks for {module}.{name}; a reference may hold numpy arrays and plain values "
                "alone, so that reading it runs no code"
            ) from None


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of numpy arrays, builtin containers and plain values; nothing else in it runs.

    Raises ReferenceFileError for a pickle of anything else, or a damaged one.
    """
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to do
            raise ReferenceFileError(
                f"{path} was not read: {error or type(error).__name__}"
            ) from error


def write_samples(path: Path, batches: Iterable[Tensor], n: int) -> None:
    """Write samples as ADM's evaluator reads them: .npz with arr_0, uint8, (n, h, w, c).

    batches: of images (k, c, h, w) in [-1, 1], n in all; pixels are rounded, greyscale is written
    as RGB. One batch at a time is
    in memory. Raises ValueError for another number of images, other sizes, or NaN.
    """

    def write(file: Any) -> None:
        shape, count = None, 0
        with (
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            for images in batches:
                if images.shape[1] == 1:
                    images = images.expand(-1, 3, -1, -1)
                if shape is None:
                    shape = images.shape[1:]
                    array.write(_header((n, *shape[1:], shape[0])))
                if images.shape[1:] != shape:
                    raise ValueError(
                        f"samples of one file have one shape, got {tuple(images.shape[1:])} after "
                        f"{tuple(shape)}"
                    )
                if not images.isfinite().all():
                    raise ValueError("samples hold NaN or infinity; leave such images out")
                count += len(images)
                array.write(_pixels(images).tobytes())
        if count != n:
            raise ValueError(f"expected {n} samples for {path}, got {count}")

    write_atomically(path, write)


def _pixels(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(to_levels(images).permute(0, 2, 3, 1).cpu().numpy())


def _header(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    what = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, what)
    return out.getvalue()


class ReferenceKey(NamedTuple):
    """What statistics of real data depend on.

    data: the `dataset` section of a config, or what else names a data set. size: (h, w) of the
    images. n: of the images, evenly spaced. encoder: the fingerprint of its weights.
    """

    data: Mapping[str, Any]
    split: str
    size: tuple[int, int]
    protocol: str
    n: int
    encoder: str = ""

    def path(self, folder: Path) -> Path:
        """The file of this key in a cache folder: readable words, and a hash of all of the key."""
        text = json.dumps(self._asdict(), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        words = self.data.get("type", "data"), self.split, "x".join(map(str, self.size))
        name = re.sub(r"[^\w.-]+", "-", "_".join(map(str, [*words, self.protocol, self.n])))
        return folder / f"{name}_{digest}.npz"


def find_statistics(folder: Path, key: ReferenceKey) -> FeatureStatistics | None:
    """The statistics of a key in the cache folder; None where they aren't, or are damaged."""
    try:
        found = FeatureStatistics.load(key.path(folder))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found if (found.n, found.protocol) == (key.n, key.protocol) else None


def keep_statistics(folder: Path, key: ReferenceKey, statistics: FeatureStatistics) -> None:
    """Write the statistics of a key to the cache folder."""
    folder.mkdir(parents=True, exist_ok=True)
    statistics.save(key.path(folder))
