"""Tensors split over processes, of which each holds a shard: DTensors, and what stands for them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .tensors import map_tensors


def local(x: torch.Tensor) -> torch.Tensor:
    """This process's shard of x: (...), in the same memory; x itself where it isn't split."""
    return x.detach().to_local() if hasattr(x, "to_local") else x  # type: ignore[attr-defined]


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of x: (...), put together from the shards of all processes, which must all call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def split_of(p: torch.Tensor) -> Any:
    """The DTensor that p: (...) is or, as a parameter of an optimizer, stands for; else None."""
    return p if hasattr(p, "full_tensor") else getattr(p, "shard_of", None)


def split_like(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """x, which each process has, as a DTensor where p is one of this shape, else x itself.

    x, p: (...). An x that is split already is taken to be split as p is.
    """
    like = split_of(p)
    if like is None or x.shape != like.shape or hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def join_like(shard: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The DTensor of shards that are of the shape of p's, else the shard itself.

    shard, p: (...).
    """
    like = split_of(p)
    if like is None or shard.shape != local(p).shape:
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def empty_split_like(x: torch.Tensor, like: Any) -> torch.Tensor:
    """A tensor of x's shape (...) and type, split as the DTensor `like` is; on the CPU if None."""
    if like is None:
        return torch.empty(x.shape, dtype=x.dtype)
    import torch.distributed.tensor as distributed

    place = {"device_mesh": like.device_mesh, "placements": like.placements}
    return distributed.empty(x.shape, dtype=x.dtype, **place)


def load_whole(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights (...), whole or split as the model is, by their names, into a model."""
    own = model.state_dict()
    model.load_state_dict({k: split_like(x, own[k]) for k, x in weights.items()})


def gather_to_host(state: Any, keep: bool) -> Any:
    """A nest of dicts, lists and tuples, copied to the host one whole tensor after the other.

    keep: whether this process gets them; else it only sends its shards, and has None in their
    place. All processes must call it.
    """

    def copied(x: torch.Tensor) -> Any:
        full = whole(x.detach())
        return full.to("cpu", copy=True) if keep else None

    return map_tensors(copied, state)


def copy_to_host_mesh(state: Any, mesh: Any) -> Any:
    """A copy on the host of a nest of dicts, lists and tuples, whose DTensors stay split.

    mesh: of the same processes' CPUs. No process waits for another.
    """
    from torch.distributed.tensor import DTensor

    def copied(x: torch.Tensor) -> torch.Tensor:
        host = local(x.detach()).to("cpu", copy=True)
        like = split_of(x)
        if like is None:
            return host
        return DTensor.from_local(
            host, mesh, like.placements, shape=x.shape, stride=x.stride(), run_check=False
        )

    return map_tensors(copied, state)
