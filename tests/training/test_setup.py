"""What train.py says where something that it starts can't start."""

import argparse
from types import SimpleNamespace

import pytest
from torch import nn

from k_diffusion.training import setup


def test_a_tracker_without_network_or_key_is_a_sentence_and_ends_no_resumed_run():
    class NoKey(Exception):
        pass

    def init_trackers(*args, **kwargs):
        raise NoKey("api_key not configured (no-tty).\n  call wandb.login()")

    said = []
    accelerator = SimpleNamespace(
        log_with=["wandb"], init_trackers=init_trackers, print=said.append
    )
    args = argparse.Namespace(
        name="a", config="c.json", wandb_project="p", wandb_entity=None, wandb_group=None
    )
    state = SimpleNamespace(seed=1, model=nn.Linear(1, 1), config={}, step=0)
    with pytest.raises(OSError, match=r"can't start \(api_key not configured .*wandb login`") as e:
        setup.start_trackers(accelerator, args, state)
    assert "\n" not in str(e.value)
    state.step = 5
    setup.start_trackers(accelerator, args, state)
    (line,) = said
    assert line.endswith("call wandb.login()); going on without it")
