"""Images, files, data sets, module modes; and the densities, EMA and learning-rate schedules."""

import csv
import functools
import hashlib
import os
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .densities import enable_stratified as enable_stratified
from .densities import enable_stratified_accelerate as enable_stratified_accelerate
from .densities import rand_cosine_interpolated as rand_cosine_interpolated
from .densities import rand_log_logistic as rand_log_logistic
from .densities import rand_log_normal as rand_log_normal
from .densities import rand_log_uniform as rand_log_uniform
from .densities import rand_split_log_normal as rand_split_log_normal
from .densities import rand_v_diffusion as rand_v_diffusion
from .densities import stratified_uniform as stratified_uniform
from .densities import stratified_with_settings as stratified_with_settings
from .ema import EMAWarmup as EMAWarmup
from .ema import ema_update as ema_update
from .ema import ema_update_dict as ema_update_dict
from .lr_schedules import ConstantLRWithWarmup as ConstantLRWithWarmup
from .lr_schedules import ExponentialLR as ExponentialLR
from .lr_schedules import InverseLR as InverseLR

PathLike = str | os.PathLike[str]

# ---------------------------------------------------------------- tensors and images

# The largest value of the PIL modes that become tensors as they are; others turn into RGB.
_PIL_MAX = {"L": 255, "LA": 255, "RGB": 255, "RGBA": 255, "I;16": 65535}
_PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """What numbers of some types are squared and summed in: at least float32."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32: squares of noise levels above 255 don't fit into float16, and sums of
    half precision lose too much."""
    return x.to(wide(x.dtype))


def append_dims(x: torch.Tensor, target_dims: int) -> torch.Tensor:
    """x with dimensions of size 1 appended until it has target_dims.

    Raises ValueError where x has more than that.
    """
    if x.ndim > target_dims:
        raise ValueError(f"x has {x.ndim} dimensions, more than the {target_dims} asked for")
    return x[(...,) + (None,) * (target_dims - x.ndim)]


def from_pil_image(x: Image.Image) -> torch.Tensor:
    """A PIL image as a float32 tensor (c, h, w) in [-1, 1]; greyscale has c = 1."""
    if x.mode == "1":
        x = x.convert("L")
    elif x.mode not in _PIL_MAX:
        x = x.convert("RGB")
    array = np.asarray(x).astype(np.float32)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array / _PIL_MAX[x.mode] * 2 - 1)


def to_pil_image(x: torch.Tensor) -> Image.Image:
    """A tensor in [-1, 1], (c, h, w) or (1, c, h, w), as an 8-bit PIL image.

    Values are clamped, then rounded to the nearest level. c is 1 (greyscale), 3 (RGB) or, with
    alpha, 2 or 4. Raises ValueError for other shapes.
    """
    image = x[0] if x.ndim == 4 and x.shape[0] == 1 else x
    if image.ndim != 3 or image.shape[0] not in _PIL_MODES:
        raise ValueError(
            f"to_pil_image needs one image (c, h, w) or (1, c, h, w) with c of "
            f"{', '.join(map(str, _PIL_MODES))}; got shape {tuple(x.shape)}"
        )
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array = levels.movedim(0, -1).cpu().numpy()
    return Image.fromarray(array[..., 0] if image.shape[0] == 1 else array)


def hf_datasets_augs_helper(
    examples: MutableMapping[str, Any],
    transform: Callable[[Image.Image], Any],
    image_key: str,
    mode: str | None = "RGB",
) -> dict[str, Any]:
    """Apply `transform` to the images of a Hugging Face batch; its other columns stay as they are.

    For `dataset.set_transform(functools.partial(...))`. mode: the PIL mode images are converted to
    first, None to leave them as they are stored. Raises ValueError for an unknown image_key.
    """
    if image_key not in examples:
        raise ValueError(f"no column {image_key!r} in the data set; it has {', '.join(examples)}")
    images = (image.convert(mode) if mode else image for image in examples[image_key])
    return {**examples, image_key: [transform(image) for image in images]}


# ---------------------------------------------------------------- modules


def n_params(module: nn.Module) -> int:
    """The number of parameters of a module, trainable or not."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def train_mode(model: nn.Module, mode: bool = True) -> Iterator[nn.Module]:
    """Put a model into training (or, with mode False, evaluation) mode, then restore every module.

    Also a decorator.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.train(mode)
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode, then restore the mode of every module. Also a decorator."""
    with train_mode(model, False):
        yield model


@contextmanager
def tf32_mode(cudnn: bool | None = None, matmul: bool | None = None) -> Iterator[None]:
    """Allow or forbid TF32 on CUDA in convolutions and matrix products; None leaves one alone."""
    with ExitStack() as stack:
        if cudnn is not None:
            stack.enter_context(_tf32(torch.backends.cudnn, ("conv", "rnn"), cudnn))
        if matmul is not None:
            stack.enter_context(_tf32(torch.backends.cuda.matmul, (), matmul))
        yield


@contextmanager
def _tf32(backend: Any, ops: Sequence[str], allow: bool) -> Iterator[None]:
    try:
        saved = [(backend, "allow_tf32", backend.allow_tf32)]
    except RuntimeError:
        # The caller has used PyTorch's newer switches, and then the old one can't be read.
        switches = [getattr(backend, op) for op in ops] or [backend]
        saved = [(switch, "fp32_precision", switch.fp32_precision) for switch in switches]
    backend.allow_tf32 = allow
    try:
        yield
    finally:
        for switch, name, value in saved:
            setattr(switch, name, value)


# ---------------------------------------------------------------- files


def download_file(path: PathLike, url: str, digest: str | None = None) -> PathLike:
    """Download `url` to `path` unless it is there already, and return `path`.

    digest: the SHA-256 of the file in hexadecimal; a file at `path` that hasn't got it is replaced.
    The file appears under its name only once it is complete and has the digest. Raises OSError
    where it isn't, leaving nothing behind.
    """
    path = Path(path)
    if path.exists() and (digest is None or _sha256(path) == digest.lower()):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url) as response:
            size = response.headers.get("Content-Length")
            total = None if size is None else int(size)
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as progress:
                while chunk := response.read(1 << 20):
                    progress.update(file.write(chunk))
            if total is not None and file.tell() != total:
                raise OSError(f"{url}: got {file.tell()} of {total} bytes; try again")
        if digest is not None and (got := _sha256(part)) != digest.lower():
            raise OSError(f"{url} has SHA-256 {got}, not {digest.lower()}")
        # mkstemp makes files private; a download is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def get_safetensors_metadata(path: PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, {} where it has none; no weights are read.

    Raises ValueError for a file that is truncated or no safetensors file.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return file.metadata() or {}
    except SafetensorError as err:
        raise ValueError(f"{path} is not a complete safetensors file ({err})") from err


class CSVLogger:
    """Appends rows to a CSV file and flushes each, so that a killed run loses none.

    An existing file with the same columns is continued. One with other columns is kept under the
    name `NAME.1.csv` (the first free number), with a warning, and a new one is started.
    """

    def __init__(self, filename: PathLike, columns: Sequence[str]):
        self.filename = Path(filename)
        self.columns = list(columns)
        if self._existing_columns() not in ([], self.columns):
            kept = self._free_name()
            self.filename.rename(kept)
            warnings.warn(
                f"{self.filename} has other columns than this run; it was kept as {kept}",
                stacklevel=2,
            )
        self.filename.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.filename.open("a+", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        if not self._existing_columns():
            self._write(self.columns)
        elif not self.filename.read_bytes().endswith(b"\n"):
            # A row cut off in the middle must not swallow the next one.
            self._write([])

    def _existing_columns(self) -> list[str]:
        if not self.filename.exists():
            return []
        with self.filename.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _free_name(self) -> Path:
        n = 1
        while (path := self.filename.with_suffix(f".{n}{self.filename.suffix}")).exists():
            n += 1
        return path

    def _write(self, row: Sequence[Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def write(self, *args: Any) -> None:
        """Write one row, one value per column. Raises ValueError for another number of values."""
        if len(args) != len(self.columns):
            raise ValueError(
                f"{self.filename} has {len(self.columns)} columns "
                f"({', '.join(self.columns)}), got {len(args)} values"
            )
        self._write(args)


# ---------------------------------------------------------------- data sets


class CorruptImageError(OSError):
    """An image file that can't be decoded; `filename` is its path."""

    def __str__(self) -> str:
        return str(self.args[0])  # an OSError with a filename would tell of errno instead


class FolderOfImages(Dataset[tuple[Any]]):
    """The images in a folder and its subfolders, sorted by path; items are 1-tuples.

    transform: a function of the PIL image (default: none). mode: the PIL mode images are converted
    to first, None to leave them as they are stored. Raises ValueError for a missing folder or one
    without images, `CorruptImageError` with the path when an image can't be read.
    """

    IMG_EXTENSIONS = frozenset(
        (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    )

    def __init__(
        self,
        root: PathLike,
        transform: Callable[[Image.Image], Any] | None = None,
        mode: str | None = "RGB",
    ):
        self.root = Path(root)
        self.transform = transform
        self.mode = mode
        if not self.root.is_dir():
            raise ValueError(f"no image folder at {self.root}; check the data set's location")
        self.paths = sorted(
            path for path in self.root.rglob("*") if path.suffix.lower() in self.IMG_EXTENSIONS
        )
        if not self.paths:
            extensions = " ".join(sorted(self.IMG_EXTENSIONS))
            raise ValueError(f"no images below {self.root}; it needs files ending in {extensions}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(root={str(self.root)!r}, len={len(self)})"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int) -> tuple[Any]:
        image = open_image(self.paths[key], self.mode)
        return (image if self.transform is None else self.transform(image),)


def open_image(path: PathLike, mode: str | None = "RGB") -> Image.Image:
    """A decoded image, in PIL mode `mode` (None: as stored). Raises `CorruptImageError`."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy() if mode is None else image.convert(mode)
    except Exception as err:  # PIL's decoders raise many kinds
        error = CorruptImageError(f"can't read the image {path}: {err}")
        error.filename = os.fspath(path)
        raise error from err
