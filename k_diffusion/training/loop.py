"""The loop that training scripts share: steps until the end or a signal, saved whatever ends it."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..common import options
from ..data import stream
from ..data.training_data import TrainingData
from . import log, page, setup, sharding
from .saving import Saver
from .signals import StopSignal
from .state import TrainState


def begin(
    args: argparse.Namespace, accelerator: Any, state: TrainState, data: TrainingData
) -> tuple[log.Log, Iterator[dict[str, Any]]]:
    """Start the trackers, say what is about to run, and return its log and its endless batches."""
    shares = stream.make_stream(
        data,
        args.batch_size,
        state.seed,
        start=state.samples,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    setup.start_trackers(accelerator, args, state)
    accelerator.print(setup.describe(args, state, accelerator, data))
    shown = page.make_page(args, accelerator, state)
    logger = log.Log(
        accelerator, args.name, state, args.end_step, args.log_every, args.max_bad_steps, shown
    )
    loader = stream.make_loader(data, shares, args.num_workers, args.start_method)
    return logger, stream.checked(loader, logger.skip)


def make_saver(
    args: argparse.Namespace, accelerator: Any, state: TrainState, logger: log.Log
) -> Saver:
    """The saver that the flags ask for; it tells the log, and where asked to a tracker."""

    def saved(path: Path) -> None:
        logger.say(f"saved {path}")
        if args.wandb_save_model:
            logger.attempt("wandb", lambda: setup.save_to_wandb(path))

    return Saver(
        accelerator,
        args.name,
        state,
        saved,
        logger.say,
        every=args.save_every,
        minutes=args.save_minutes,
        keep=args.keep,
        mesh=sharding.make_host_mesh() if args.save_sharded else None,
    )


def save(
    state: TrainState, logger: log.Log, saver: Saver, stop: StopSignal, together: bool = True
) -> None:
    """Save a run, unless it is lost, which raises NonFiniteLoss. together: as of `Log.read`."""
    logger.read(state, together)  # a lost run is an error here, and nothing to save
    with stop.saving():
        saver.save(state)


def run(
    accelerator: Any,
    state: TrainState,
    logger: log.Log,
    saver: Saver,
    stop: StopSignal,
    end: float,
    take_step: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    then: Callable[[], object],
) -> None:
    """Take steps until step `end` or a signal, log and save them, and close the log.

    take_step: one step, which returns the loss and the gradient's norm. then: what is done after
    each. All processes make the same calls, within the contexts of `stop` and `saver`. An error is
    raised when what was learned is saved.
    """
    begin = state.step
    try:
        while state.step < end and not stop.agreed(accelerator):
            loss, norm = take_step()
            logger.step(state, loss, norm)
            if saver.due(state) or state.step == end or stop.save_agreed:
                save(state, logger, saver, stop)
            then()
        if begin < state.step < end:
            save(state, logger, saver, stop)
    except log.NonFiniteLoss as error:  # of all processes
        saver.finish()
        logger.update_page("stopped: too many steps were skipped")
        distributed.end_together(accelerator, error)
    except Exception as error:  # of the data, say: what was learned is kept
        logger.update_page(f"stopped by an error ({type(error).__name__})")
        if state.whole and not distributed.sharded(accelerator):  # whose shards all must send
            # the main process may wait for this one on its device, and never come to save
            saver.main = saver.main or not options.lost_peer(error)
            save(state, logger, saver, stop, together=False)
            logger.say(f"stopped by an error ({type(error).__name__}) at step {state.step}")
        raise
    with stop.saving():
        saver.finish()
    logger.write(state)
    logger.plot()
    accelerator.wait_for_everyone()  # torchrun kills those that still save when one has left
    logger.close("stopped" if state.step < end else "finished")
