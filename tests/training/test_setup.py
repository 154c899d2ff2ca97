"""What train.py says where something that it starts can't start."""

import argparse
from types import SimpleNamespace

import pytest
from torch import nn

from k_diffusion.training import setup

ARGS = argparse.Namespace(
    name="a", config="c.json", wandb_project="p", wandb_entity=None, wandb_group=None
)


class NoKey(Exception):
    pass


def test_a_folder_that_tensorboard_cannot_have_ends_no_resumed_run(tmp_path, capsys):
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    args = argparse.Namespace(
        **vars(ARGS) | {"wandb_project": None, "tensorboard": tmp_path / "file"},
        **{"no_tf32": False, "mixed_precision": "no", "fsdp": None},
    )
    state = SimpleNamespace(seed=1, model=nn.Linear(1, 1), config={}, step=0)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = setup.make_accelerator(args, {"model": {}})
    with pytest.raises(OSError, match=r"can't start \(can't make the folder of .* is a file\)"):
        setup.start_trackers(accelerator, args, state)
    state.step = 5
    setup.start_trackers(accelerator, args, state)
    assert capsys.readouterr().out.endswith("is a file); going on without it\n")
    assert accelerator.trackers == []


@pytest.mark.parametrize("broken_first", [True, False])
def test_a_tracker_that_cannot_start_is_a_sentence_and_leaves_a_resumed_run_the_others(
    broken_first, capsys
):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        """Logs to the file that `start` opens, here a list."""

        name = "works"
        requires_logging_directory = False
        tracker = None

        def start(self):
            self.writer = []

        def store_init_configuration(self, values):
            self.writer.append(values)

    class Broken(Tracker):
        name = "broken"

        def start(self):
            raise NoKey("api_key not configured (no-tty).\n  call wandb.login()")

    def make():
        trackers = [Broken(), Tracker()] if broken_first else [Tracker(), Broken()]
        return accelerate.Accelerator(cpu=True, log_with=trackers)

    state = SimpleNamespace(seed=1, model=nn.Linear(1, 1), config={}, step=0)
    with pytest.raises(OSError, match=r"can't start \(api_key not configured .*wandb login`") as e:
        setup.start_trackers(make(), ARGS, state)
    assert "\n" not in str(e.value)
    state.step, accelerator = 5, make()
    setup.start_trackers(accelerator, ARGS, state)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("call wandb.login()); going on without it")
    (works,) = accelerator.trackers
    assert works.name == "works"
    assert works.writer[0]["seed"] == 1
    assert len(works.writer) == 1
