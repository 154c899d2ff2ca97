"""Several processes: the Accelerator, their number, a seed for all, and their shares in order."""

import math
import os
import re
import secrets
import sys
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .common import launcher
from .common.options import UsageError
from .common.text import need

_Error = TypeVar("_Error", bound=Exception)
_Item = TypeVar("_Item")

# What torchrun and the usual kinds of mpirun tell each of their processes.
LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def make_accelerator(
    find_unused_parameters: bool = False,
    timeout: timedelta | None = None,
    fsdp_plugin: Any = None,
    **options: Any,
) -> Any:
    """The Accelerator of this process; on the CPU where there is nothing faster.

    find_unused_parameters: of DDP, for models not all of whose weights get a gradient. timeout: how
    long processes wait for each other; None for the backend's. fsdp_plugin: Accelerate's, to split
    a model over several processes. options: the Accelerator's arguments. Raises ImportError without
    accelerate.
    """
    need("accelerate", "this script")
    from accelerate import (
        Accelerator,
        DistributedDataParallelKwargs,
        DistributedType,
        InitProcessGroupKwargs,
        PartialState,
    )

    if processes := processes_missing():
        run = [launcher.__file__, "--standalone", f"--nproc-per-node={processes}"]
        os.execv(sys.executable, [sys.executable, *run, *sys.argv])
    # without it, Accelerate takes the processes of torchrun for single ones where there's no GPU
    on_cpu = options.pop("cpu", False) or not torch.accelerator.is_available()
    ddp = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    handlers = [ddp] if timeout is None else [ddp, InitProcessGroupKwargs(timeout=timeout)]
    if not on_cpu:
        options["fsdp_plugin"] = fsdp_plugin
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=handlers, **options)
    if on_cpu and fsdp_plugin is not None and accelerator.num_processes > 1:
        # Accelerate does so on accelerators alone, and would leave the model whole without a word
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = fsdp_plugin
    return accelerator


def sharded(accelerator: Any) -> bool:
    """Whether models are split over the processes, which then must run them together."""
    return getattr(accelerator, "is_fsdp2", False)


def check_device(name: str) -> torch.device:
    """The device of that name. Raises UsageError where this machine or PyTorch hasn't got it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ["cpu"]
        if torch.accelerator.is_available():
            found.append(str(torch.accelerator.current_accelerator()))
        raise UsageError(
            f"--device {name}: this machine, or its PyTorch, has no such device; there are "
            f"{', '.join(found)}"
        ) from error
    return device


def processes_missing() -> int:
    """N under `accelerate launch --cpu --num_processes N`, which leaves starting them to mpirun.

    Without mpirun it starts a single process and tells it nothing of N, but prepares an address for
    the N to meet. 0 anywhere else.
    """
    meeting = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if not meeting or any(name in os.environ for name in LAUNCHED):
        return 0
    import psutil  # comes with accelerate

    parent = psutil.Process().parent()
    words = " ".join(parent.cmdline()) if parent else ""
    asked = re.search(r"\blaunch .*?--num[_-]processes[ =](\d+)", words)
    machines = re.search(r"\blaunch .*?--num[_-]machines[ =](\d+)", words)
    return int(asked[1]) if asked and (not machines or machines[1] == "1") else 0


def agree_on_seed(seed: int | None) -> int:
    """The given seed, or a new one, the same on all processes."""
    return broadcast(secrets.randbits(31) if seed is None else seed)


def broadcast(value: Any) -> Any:
    """The main process's value, on all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def any_process(accelerator: Any, wish: bool) -> bool:
    """Whether it is True on any process. All must call it."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.gather(torch.tensor([int(wish)], device=accelerator.device)).any())


def gather_items(items: list[_Item]) -> list[_Item]:
    """The items of all processes, in their order, on each of them. All must call it."""
    from accelerate.utils import gather_object

    return list(gather_object(items))


def first_error(error: _Error | None) -> _Error | None:
    """The error of the first process that has one, on all of them.

    error: of this process, or None. All must call it.
    """
    return next((e for e in gather_items([error]) if e is not None), None)


def end_together(accelerator: Any, error: Exception | None) -> None:
    """Raise an error that any process has on the main one, and end the others without a word.

    error: of this process, or None. All must call it.
    """
    first = first_error(error) if accelerator.num_processes > 1 else error
    if first is not None and accelerator.is_main_process:
        raise first
    if first is not None:
        sys.exit(1)


def share(accelerator: Any, n: int) -> range:
    """Which of n rows are this process's; `gather_shares` puts them back in order."""
    return range(accelerator.process_index, n, accelerator.num_processes)


def gather_shares(accelerator: Any, mine: torch.Tensor, n: int) -> torch.Tensor | None:
    """Put rows i, i + processes, ... of each process i back in order, on the main process.

    mine: (k, ...), the rows of this process.
    """
    processes = accelerator.num_processes
    if processes == 1:
        return mine
    # every process sends as many rows: the last of a short share is padding
    most = math.ceil(n / processes)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    everyone = accelerator.gather(padded)
    if not accelerator.is_main_process:
        return None
    return everyone.unflatten(0, (processes, most)).transpose(0, 1).flatten(0, 1)[:n]
