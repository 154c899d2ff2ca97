"""From a data set to an endless, resumable stream of batches.

The stream is a function of (seed, position): sample t is entry t mod N of the permutation of epoch
t div N, and its augmentation draws from a generator seeded by (seed, t). So a run that resumes at
position t goes on as if it had never stopped, whatever the number of workers.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ..common import memory
from ..common.seeds import derive_seed
from .training_data import TrainingData


class Stream(Sampler[list[tuple[int, int]]]):
    """Endless batches of (index, seed), this process's share of the global stream from `start` on.

    Consecutive global batches of batch_size * processes samples; each process takes its slice.
    window: samples are shuffled within so many that follow each other; None: all of an epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
        window: int | None = None,
    ):
        if length < batch_size * processes:
            raise ValueError(
                f"the data set has {length} images, fewer than one batch of {batch_size}"
                + (f" on each of {processes} processes" if processes > 1 else "")
                + f"; pass --batch-size {max(1, length // processes)} or less"
            )
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.process, self.processes = process, processes
        self.window = window or length

    def _order(self, epoch: int) -> torch.Tensor:
        """The order of an epoch: windows of consecutive samples one by one, each shuffled."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
        starts = range(0, self.length, self.window)
        sizes = [min(self.window, self.length - start) for start in starts]
        shuffled = [torch.randperm(size, generator=generator) for size in sizes]
        return torch.cat([start + order for start, order in zip(starts, shuffled)])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        at = self.start + self.process * self.batch_size
        while True:
            batch = []
            for t in range(at, at + self.batch_size):
                if t // self.length != epoch:
                    epoch = t // self.length
                    order = self._order(epoch)
                batch.append((int(order[t % self.length]), derive_seed(self.seed, 1, t)))
            yield batch
            at += self.batch_size * self.processes


class BucketStream(Stream):
    """As `Stream`, with all images of a global batch from one of several groups of indices.

    Each group goes through permutations of its own; which group a batch is of is shuffled by epoch,
    and each group has as many batches as fit its images. Batch j is again a function of (seed, j).
    """

    def __init__(self, groups: Sequence[np.ndarray], batch_size: int, *args: Any, **kwargs: Any):
        super().__init__(sum(map(len, groups)), batch_size, *args, **kwargs)
        self.groups = groups

    def _before(self, epoch: int) -> list[int]:
        """How many batches of each group come before an epoch."""
        together = self.batch_size * self.processes
        return [epoch * len(group) // together for group in self.groups]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        together = self.batch_size * self.processes
        at = self.start // together
        epoch = at * together // self.length
        while sum(self._before(epoch + 1)) <= at:
            epoch += 1
        skip = at - sum(self._before(epoch))
        orders: dict[tuple[int, int], torch.Tensor] = {}
        while True:
            done, then = self._before(epoch), self._before(epoch + 1)
            turns = torch.tensor(
                [i for i, (a, b) in enumerate(zip(done, then)) for _ in range(b - a)]
            )
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 3, epoch))
            for group in turns[torch.randperm(len(turns), generator=generator)].tolist():
                first = done[group] * together + self.process * self.batch_size
                done[group] += 1
                if skip:
                    skip -= 1
                    continue
                t = at * together + self.process * self.batch_size
                yield [
                    (self._index(group, first + i, orders), derive_seed(self.seed, 1, t + i))
                    for i in range(self.batch_size)
                ]
                at += 1
            epoch += 1

    def _index(self, group: int, at: int, orders: dict[tuple[int, int], torch.Tensor]) -> int:
        """Of a group's endless permutations, kept in orders, the image at a place."""
        images = self.groups[group]
        key = group, at // len(images)
        if key not in orders:
            for old in [old for old in orders if old[0] == group and old[1] < key[1] - 1]:
                del orders[old]
            seed = derive_seed(self.seed, 4, key[1], group + 1)
            generator = torch.Generator().manual_seed(seed)
            orders[key] = torch.randperm(len(images), generator=generator)
        return int(images[orders[key][at % len(images)]])


def make_stream(data: TrainingData, *args: Any, **kwargs: Any) -> Stream:
    """The stream over a data set, by its buckets if it has any; the rest is as of `Stream`."""
    if data.buckets is not None:
        return BucketStream(data.buckets.groups, *args, **kwargs)
    kwargs["window"] = getattr(data.data, "window", None)
    return Stream(len(data), *args, **kwargs)


# What is sent to the process group, by Ctrl-C say, is for the main process, which still needs data.
_SIGNALS = {
    n for s in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if (n := getattr(signal, s, None))
}


class _Loader(DataLoader[dict[str, Any]]):
    """A DataLoader whose workers start with signals blocked, until they have left the group.

    A killed worker is an error where the next batch is waited for, after seconds, and nowhere else.
    """

    def __iter__(self) -> Any:
        if not self.num_workers or os.name != "posix":
            return super().__iter__()
        resource_tracker.ensure_running()  # it would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        children = signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # torch's handler raises wherever the main thread is, in the middle of a step, too;
            # another loader of this process may have set it before
            if _is_torchs(signal.getsignal(signal.SIGCHLD)):
                default = _is_torchs(children)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL if default else children)


def _is_torchs(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).startswith("torch.utils.data")


def _own_session(worker: int) -> None:
    if os.name == "posix":
        os.setsid()
        while waiting := signal.sigpending() & _SIGNALS:
            signal.sigwait(waiting)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def make_loader(
    data: TrainingData, stream: Stream, num_workers: int = 0, start_method: str = "spawn"
) -> DataLoader[dict[str, Any]]:
    """A DataLoader over the stream.

    Small data sets held in memory have no workers where nothing is done with their items, else no
    more than there are cores beside those of training processes: a worker takes seconds of one to
    start. Those that are streamed have one, as each would fetch all rows.
    """
    if getattr(data.data, "in_memory", False):
        mine = memory.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        beside = max(0, mine - 1) if getattr(data.transform, "works", False) else 0
        num_workers = min(num_workers, beside)
    if getattr(data.data, "window", None):
        num_workers = min(num_workers, 1)
    return _Loader(
        data,
        batch_sampler=stream,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=_own_session,
        pin_memory=torch.cuda.is_available(),
    )


def checked(
    batches: Iterable[dict[str, Any]], report: Callable[[dict[str, Any], float], object]
) -> Iterator[dict[str, Any]]:
    """The batches, each first shown to `report`, with the seconds that it was waited for."""
    try:
        started = time.monotonic()
        for batch in batches:
            report(batch, time.monotonic() - started)
            yield batch
            started = time.monotonic()
    except (ValueError, OSError) as error:
        # a worker's error has its traceback as text; what it says comes last
        said = re.findall(r"^[\w.]+Error: (.*)", str(error), re.MULTILINE)
        if said and str(error).startswith("Caught "):
            raise type(error)(said[-1]) from error
        raise
    except RuntimeError as error:
        # torch has no class for it
        if not re.match(r"DataLoader worker .*(exited|killed)", str(error)):
            raise
        cause = str(error).split("\n")[0]
        raise ChildProcessError(
            f"a loading process was killed, for want of memory perhaps ({cause}); pass a smaller "
            "--num-workers"
        ) from error
