"""Checkpoints of which each process writes its shards, in torch.distributed.checkpoint's format.

STEM.pth then has meta tensors, of shapes and types alone, in the place of those that are split. It
names the folder beside it that their shards lie in, STEM.dcp, and the size and the CRC-32 of each
file there. The folder is complete before STEM.pth appears: whoever reads STEM.pth finds all of it.
"""

import io
import operator
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from ..common.files import DiskFullError, check_space, sync_folder, temporary, why_full
from ..common.shards import empty_split_like
from ..common.tensors import map_named_tensors, nbytes
from ..common.untrusted import check_torch_stream

KEY = "shards"  # of what STEM.pth says of the folder
_METADATA = ".metadata"  # as torch.distributed.checkpoint calls it


def shard_folders(path: Path) -> list[Path]:
    """The folders of shards that belong to a checkpoint of this path, or belonged to one."""
    own = re.compile(re.escape(path.stem) + r"(\.\d+)?\.dcp")
    return [p for p in path.parent.glob("*.dcp") if own.fullmatch(p.name)]


def delete_shards(path: Path, but: str | None = None) -> None:
    """Delete all folders of shards of a checkpoint but the one of that name. Raises OSError."""
    for folder in shard_folders(path):
        if folder.name != but:
            part = temporary(folder)  # so that no name is ever of a part of it
            folder.rename(part)
            shutil.rmtree(part)


# ------------------------------------------------------------------------------ writing


def write_shards(path: Path, state: Mapping[str, Any], group: Any) -> dict[str, Any] | None:
    """Write the shards of a state's DTensors; returns what is to be written to `path`.

    group: of all processes, on CPUs, which must all call it; the first one gets the result, and the
    others None. An older folder of the same checkpoint stays as it is. Raises OSError on the first
    process, whichever failed, DiskFullError where the disk is full.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    split: dict[str, torch.Tensor] = {}

    def take(name: str, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(x, "full_tensor"):
            return x
        split[name] = x
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    rest = map_named_tensors(take, dict(state))
    main = dist.get_rank(group) == 0
    folder, part = path.with_suffix(".dcp"), temporary(path.with_suffix(".dcp"))
    error: Exception | None = None
    try:
        if main:
            try:
                check_space(folder, nbytes(split))
                part.mkdir()
            except OSError as caught:
                error = caught
        begun = [(part.name, error)]
        dist.broadcast_object_list(begun, src=0, group=group)
        part, error = path.with_name(begun[0][0]), begun[0][1]
        if error is None:
            try:
                dcp.save(split, storage_writer=dcp.FileSystemWriter(part), process_group=group)
            except dcp.CheckpointException as caught:  # of all processes
                error = _as_oserror(folder, next(iter(caught.failures.values()))[0])
        if error is not None:
            if main:
                raise error
            return None
        files = _list_files(part, group)
        if files is None:
            return None
        sync_folder(part)
        part.rename(folder := _free(path))
        sync_folder(path.parent)
    finally:
        if main:
            shutil.rmtree(part, ignore_errors=True)
    return {**rest, KEY: {"folder": folder.name, "files": files}}


def _list_files(part: Path, group: Any) -> dict[str, tuple[int, int]] | None:
    """The size and the CRC-32 of each file, on the first process; each reads what it wrote."""
    import torch.distributed as dist

    rank = dist.get_rank(group)
    found: Any
    try:
        names = list(part.glob(f"__{rank}_*"))
        names += [part / _METADATA] if rank == 0 else []
        found = {p.name: _checksum(p) for p in names}
    except OSError as error:
        found = error
    everyone: Any = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(found, everyone, dst=0, group=group)
    if rank:
        return None
    for found in everyone:
        if isinstance(found, OSError):
            raise found
    return {name: facts for found in everyone for name, facts in found.items()}


def _as_oserror(folder: Path, error: BaseException) -> OSError:
    reason = why_full(error)
    if reason:
        return DiskFullError(
            f"can't write {folder}: {reason}; make space, or choose another folder"
        )
    said = " ".join(str(error).split()) or type(error).__name__
    return OSError(f"can't write {folder}: {said}")


def _free(path: Path) -> Path:
    """STEM.dcp, or STEM.2.dcp and so on where an older checkpoint of this path has that."""
    n, folder = 1, path.with_suffix(".dcp")
    while folder.exists():
        n, folder = n + 1, path.with_suffix(f".{n + 1}.dcp")
    return folder


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


# ------------------------------------------------------------------------------ reading


def fill(
    path: Path, state: dict[str, Any], like: Any = None, only: Collection[str] | None = None
) -> dict[str, Any]:
    """What `path` holds, with its tensors read from their shards; the state itself if it has none.

    like, only: as of `read_checkpoint`. Each process reads and verifies the files that its parts
    are in, without the others. Raises ValueError or OSError for shards that are missing, damaged or
    not those that were written with it.
    """
    shapes: dict[str, torch.Tensor] = {}

    def find(name: str, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta:
            shapes[name] = x
        return x

    map_named_tensors(find, state)
    if not shapes:
        return state
    folder, files = _check(path, state.get(KEY))
    if nbytes(shapes) > sum(size for size, _ in files.values()):
        raise ValueError(f"{path} says that it holds more than the files of {folder.name} do")
    wanted = [name for name in shapes if only is None or name.split("/")[0] in only]
    split = {name: empty_split_like(shapes[name], like) for name in wanted}
    if split:
        _load(folder, files, split)
    rest = {key: value for key, value in state.items() if key != KEY}
    return map_named_tensors(lambda name, x: split.get(name, x), rest)


def _check(path: Path, stored: Any) -> tuple[Path, dict[str, tuple[int, int]]]:
    """The folder of shards, and its files, of what a checkpoint says."""
    try:
        folder = stored["folder"]
        files = {name: (int(size), int(crc)) for name, (size, crc) in stored["files"].items()}
        if not all(name == Path(name).name not in ("", "..") for name in (*files, folder)):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ValueError(
            f"{path} is no training checkpoint: it has shapes of tensors and doesn't say where "
            "their shards are"
        ) from None
    if not (found := path.parent / folder).is_dir():
        raise FileNotFoundError(
            f"{path} has its weights in the folder {folder}, which isn't beside it; keep the two "
            "together"
        )
    return found, files


def _load(folder: Path, files: Mapping[str, tuple[int, int]], split: dict[str, Any]) -> None:
    """Fill tensors, by their names, with what a folder has of them."""
    import torch.distributed.checkpoint as dcp

    verified: set[str] = set()

    def verify(name: str) -> None:
        if name in verified:
            return
        path = folder / name
        if name not in files or not path.is_file() or _checksum(path) != files[name]:
            raise ValueError(
                f"{path} is missing, damaged or truncated: it isn't the file that was written"
            )
        verified.add(name)

    class Reader(dcp.FileSystemReader):
        """torch's, but it verifies files, and unpickles nothing that runs code."""

        def _slice_file(self, file: Any, sinfo: Any) -> Any:
            file.seek(sinfo.offset)
            part = io.BytesIO(file.read(sinfo.length))
            check_torch_stream(part, file.name)
            part.seek(0)
            return part

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

        def read_data(self, plan: Any, planner: Any) -> Any:
            for item in plan.items:
                verify(self.storage_data[item.storage_index].relative_path)
            return super().read_data(plan, planner)

    verify(_METADATA)
    metadata = _read_metadata(folder / _METADATA)
    stored = metadata.state_dict_metadata
    for name, x in split.items():
        if getattr(stored.get(name), "size", None) != x.shape:
            raise ValueError(f"{folder} has no tensor {name} of shape {tuple(x.shape)}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
            dcp.load(split, storage_reader=Reader(folder), no_dist=True)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, ValueError | OSError | MemoryError):
            raise cause from None
        reason = str(cause).split("\n")[0] or type(cause).__name__
        raise ValueError(f"{folder} is damaged: {reason}") from None


class _Unpickler(pickle.Unpickler):
    """Of the metadata of torch.distributed.checkpoint alone: names, shapes, types, places."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):  # of the machine that wrote it
            return PurePath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return operator.getitem  # members of enums, as Python 3.11.0 to 3.11.3 write them
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise ValueError(f"it holds code ({module}.{name}), which isn't run")


_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


def _read_metadata(path: Path) -> Any:
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata.state_dict_metadata, dict):
            raise ValueError("it names no tensors")
        return metadata
    except Exception as error:  # of whatever kind, of a damaged pickle
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} can't be read: {reason}") from None
