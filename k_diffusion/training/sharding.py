"""--fsdp: a model, its averages and its optimizer's state split over the processes (FSDP2).

Accelerate splits the model into a shard on each process, block by block: a block's weights are
gathered when it runs, and let go afterwards. Optimizers and averages work on plain tensors, the
local shards: list operations on DTensors leak and are slow in PyTorch 2.12 and later.
"""

import argparse
import os
import warnings
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from ..common.options import UsageError
from ..common.shards import join_like, local, split_like
from ..common.text import need
from ..distributed import sharded
from ..models.compiling import blocks

# of --fsdp: gather weights again in the backward pass, or keep them from the forward pass on
WAYS = ("again", "keep")


def make_plugin(args: argparse.Namespace, config: Mapping[str, Any]) -> Any:
    """Accelerate's plugin of FSDP2, None without --fsdp.

    Weights are gathered in float32 and autocast rounds them, as without --fsdp: the numbers are the
    same. Raises UsageError for what doesn't go together, ImportError where Accelerate is too old.
    """
    if not args.fsdp:
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise UsageError(
                "Accelerate's configuration asks for FSDP, which train.py sets up itself: pass "
                "--fsdp, and choose no FSDP in `accelerate config`"
            )
        return None
    if args.gns:
        raise UsageError(
            "--gns compares the gradients of single batches, of which --fsdp leaves no process a "
            "whole one; leave one of them out"
        )
    if args.compile == "model":
        raise UsageError(
            "--fsdp gathers weights block by block, around what is compiled: pass --compile block"
        )
    if config["optimizer"]["type"] == "adam8bit":
        raise UsageError(
            "optimizer adam8bit rounds its state in parts of whole tensors, which --fsdp splits: "
            "choose adamw, sgd or muon"
        )
    accelerate = need("accelerate", "--fsdp")
    if not hasattr(accelerate.Accelerator, "is_fsdp2"):
        raise ImportError(
            f"--fsdp needs an Accelerate that knows FSDP2, this is {accelerate.__version__}; "
            'install it with: pip install "accelerate>=1.8"'
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # of what changes a model's output in place, which nothing here does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    return accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=args.fsdp != "keep",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[],  # once there is a model
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_offload=False,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,  # --checkpointing does it, within the blocks
    )


def check(accelerator: Any) -> None:
    """Raises UsageError where an accelerator can't shard, for its number of processes or dtype."""
    if not sharded(accelerator):
        raise UsageError(
            f"--fsdp splits a model over processes, and there is {accelerator.num_processes} on "
            f"{accelerator.device}; start several with torchrun, or leave it out"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UsageError(
            f"--fsdp has no gradient scale that all processes share, as "
            f"{accelerator.mixed_precision} needs; pass --mixed-precision bf16"
        )


def make_host_mesh() -> Any:
    """All processes as a mesh of CPUs, whose group, of gloo, is for saving alone.

    A thread can save through it while training goes on with the other group. All must call it.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    # one that is gone is seen at once; one whose disk is slow may take hours
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return DeviceMesh.from_group(group, "cpu")


def place(accelerator: Any, model: nn.Module) -> nn.Module:
    """A model that isn't trained, such as an average, on the device, or split over the processes.

    All processes must then run it together.
    """
    if not sharded(accelerator):
        return model.to(accelerator.device)
    from torch.distributed.fsdp import fully_shard

    for block in reversed(blocks(model)):
        fully_shard(block)
    # nothing stays gathered between two passes: its tensors are always the shards
    fully_shard(model, reshard_after_forward=True)
    return model


def prepare(accelerator: Any, model: nn.Module, opt: torch.optim.Optimizer) -> Any:
    """Accelerate's `prepare` of a model and its optimizer, which under --fsdp steps on shards."""
    if not sharded(accelerator):
        return accelerator.prepare(model, opt)
    names = {type(block).__name__ for block in blocks(model)}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)
    if accelerator.mixed_precision == "bf16":
        _autocast(model, accelerator.device)
    prepared = accelerator.prepare(model, opt)
    if accelerator.device.type == "cpu":  # torch 2.8's gloo sums up where it is to average
        from torch.distributed.fsdp import FSDPModule

        for module in prepared[0].modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    for group in opt.param_groups:
        group["params"] = [_shard_of(p) for p in group["params"]]
    return prepared


def _autocast(model: nn.Module, device: torch.device) -> None:
    """Run a model's forward in bfloat16, its output in float32, as `prepare` does without FSDP2."""
    from accelerate.utils import convert_outputs_to_fp32

    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        # a cache would keep the rounded weights of all blocks
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return forward(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(run)


def _shard_of(p: Any) -> nn.Parameter:
    shard = nn.Parameter(local(p))
    shard.shard_of = p  # type: ignore[attr-defined]
    return shard


def clip_grad_norm_(
    accelerator: Any, parameters: Iterable[torch.Tensor], opt: torch.optim.Optimizer, most: float
) -> torch.Tensor:
    """Clip the gradient of all parameters to the norm `most`; returns the norm before, ().

    Under --fsdp, the optimizer gets its shards of the gradient.
    """
    if not sharded(accelerator):
        return accelerator.clip_grad_norm_(parameters, most)
    shards = [p for group in opt.param_groups for p in group["params"]]
    for p in shards:
        p.data = local(p.shard_of)  # FSDP2 may have moved it
        p.grad = None if p.shard_of.grad is None else local(p.shard_of.grad)
        p.shard_of.grad = None
    norm = torch.nn.utils.get_total_norm([p.grad for p in shards if p.grad is not None])
    norm = accelerator.reduce(norm.square(), reduction="sum").sqrt()
    torch.nn.utils.clip_grads_with_norm_(shards, most, norm)
    return norm


# --------------------------------------------------------------------- the optimizer's state


def optimizer_state(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict, in which the state of shards is DTensors."""
    return _each(opt, opt.state_dict(), join_like)


def split_optimizer_state(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole state dict, as an optimizer of shards takes it: each process's part of it."""
    return _each(opt, state, lambda x, p: local(split_like(x, p)))


def _each(opt: torch.optim.Optimizer, state: dict[str, Any], function: Any) -> dict[str, Any]:
    params = [p for group in opt.param_groups for p in group["params"]]
    values = {
        i: {k: function(x, params[i]) if isinstance(x, torch.Tensor) else x for k, x in of.items()}
        for i, of in state["state"].items()
    }
    return {**state, "state": values}
