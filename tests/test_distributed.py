from types import SimpleNamespace

import psutil
import pytest

from k_diffusion import distributed
from k_diffusion.common import launcher
from k_diffusion.training import setup
from k_diffusion.training.args import parse_args

LAUNCHED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def under(monkeypatch):
    """Sets the environment and the parent's command line."""
    for name in (*distributed.LAUNCHED, *LAUNCHED):
        monkeypatch.delenv(name, raising=False)

    def set_parent(command, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        parent = SimpleNamespace(cmdline=command.split)
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))

    return set_parent


@pytest.mark.parametrize(
    "command",
    [
        "python accelerate launch --cpu --num_processes 2 train.py --config c.json",
        "python -m accelerate.commands.launch --cpu --num-processes=2 train.py",
        "accelerate-launch --cpu --num_processes 2 --num_machines 1 train.py",
    ],
)
def test_processes_that_accelerate_did_not_start(under, command):
    under(command, **LAUNCHED)
    assert distributed.processes_missing() == 2


def test_processes_that_are_there_or_not_ours(under):
    command = "accelerate launch --cpu --num_processes 2 train.py"
    under(command)
    assert distributed.processes_missing() == 0
    under(command.replace("--cpu", "--num_machines 2 --cpu"), **LAUNCHED)
    assert distributed.processes_missing() == 0
    under("bash train.sh", **LAUNCHED)
    assert distributed.processes_missing() == 0
    under(command, **LAUNCHED, WORLD_SIZE="2")
    assert distributed.processes_missing() == 0


def test_this_program_becomes_the_launcher_of_them(under, monkeypatch):
    commands = []

    def replace(program, words):
        commands.append(words[1:])
        raise SystemExit

    monkeypatch.setattr("os.execv", replace)
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "c.json"])
    under("accelerate launch --cpu --num_processes 3 train.py", **LAUNCHED)
    with pytest.raises(SystemExit):
        distributed.make_accelerator()
    run = [launcher.__file__, "--standalone", "--nproc-per-node=3"]
    assert commands == [[*run, "train.py", "--config", "c.json"]]


def test_seeds():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.make_accelerator(cpu=True)
    assert distributed.agree_on_seed(5) == 5
    assert distributed.agree_on_seed(0) == 0
    assert len({distributed.agree_on_seed(None) for _ in range(3)}) == 3
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("main", [True, False])
def test_an_error_of_one_process_ends_all_and_the_main_one_says_it(monkeypatch, main):
    accelerator = SimpleNamespace(is_main_process=main, num_processes=2)
    error = ValueError("busy")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [None, None])
    distributed.end_together(accelerator, None)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [None, error])
    with pytest.raises(ValueError if main else SystemExit) as left:
        distributed.end_together(accelerator, None if main else error)
    assert left.value is error if main else left.value.code == 1


@pytest.mark.parametrize("skip_stages", [0, 1])
def test_processes_do_not_wait_for_gradients_of_skipped_stages(skip_stages, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setattr("sys.argv", ["train.py", "--config", "c.json"])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = setup.make_accelerator(parse_args(), {"model": {"skip_stages": skip_stages}})
    assert accelerator.ddp_handler.find_unused_parameters == bool(skip_stages)
    AcceleratorState._reset_state(reset_partial_state=True)
