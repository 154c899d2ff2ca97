import os
import signal

import pytest
import torch

from k_diffusion.training.signals import StopSignal

LEAVE = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Alone:
    num_processes = 1


class Two:
    """The first of two processes; the other one's wish is `other`."""

    num_processes = 2
    device = torch.device("cpu")
    other = 0

    def gather(self, x):
        return torch.cat([x, torch.tensor([self.other])])


@pytest.fixture(autouse=True)
def hangup_counts():
    """SIGHUP isn't ignored, though the tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers():
    return [signal.getsignal(n) for n in (*LEAVE, signal.SIGUSR1)]


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", LEAVE)
def test_the_first_signal_is_a_wish_and_the_second_leaves(number, capfd):
    before = handlers()
    with StopSignal(launched=False) as stop:
        assert (stop.agreed(Alone()), stop.asked(), stop.exit_code) == (False, False, 0)
        send(number)
        assert (stop.agreed(Alone()), stop.asked(), stop.exit_code) == (True, True, 128 + number)
        assert f"{number.name}: saving after this step; press again" in capfd.readouterr().err
        with pytest.raises(SystemExit) as left:
            send(number)
    assert left.value.code == 128 + number
    assert handlers() == before


def test_a_second_signal_waits_for_the_save(capfd):
    done = []

    def run():
        with StopSignal(launched=False) as stop:
            send(signal.SIGTERM)
            with stop.saving():
                send(signal.SIGINT)
                send(signal.SIGINT)
                done.append("saved")
            done.append("went on")

    with pytest.raises(SystemExit) as left:
        run()
    assert done == ["saved"]
    assert left.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err.count("SIGINT: leaving as soon as this save is done") == 1


def test_a_first_signal_during_a_save_is_a_wish():
    with StopSignal(launched=False) as stop:
        with stop.saving():
            send(signal.SIGTERM)
        assert stop.agreed(Alone())


def test_launchers_may_repeat_a_signal():
    with StopSignal(launched=True) as stop:
        for _ in range(3):
            send(signal.SIGTERM)
        with stop.saving():
            send(signal.SIGTERM)
        assert (stop.agreed(Alone()), stop.exit_code) == (True, 143)


def test_sigusr1_saves_once_and_goes_on(capfd):
    with StopSignal() as stop:
        send(signal.SIGUSR1)
        assert (stop.agreed(Alone()), stop.save_agreed) == (False, True)
        assert (stop.agreed(Alone()), stop.save_agreed) == (False, False)
        assert stop.exit_code == 0
    assert "SIGUSR1: saving after this step\n" in capfd.readouterr().err


@pytest.mark.parametrize("torchrun", [False, True])
def test_nohup(torchrun, monkeypatch):
    """torchrun stops its processes on SIGHUP even under nohup, so there it counts."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert stop.asked() == torchrun
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_dead_terminal_is_no_error(monkeypatch):
    def write(*args):
        raise OSError(5, "Input/output error")

    with StopSignal() as stop:
        monkeypatch.setattr(os, "write", write)
        send(signal.SIGHUP)
        assert stop.asked()


def test_handlers_are_given_back():
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopSignal():
        raise ZeroDivisionError
    assert handlers() == before


def test_one_process_told_is_all_told_a_step_later():
    accelerator = Two()
    with StopSignal() as stop:
        assert not stop.agreed(accelerator)
        accelerator.other = signal.SIGTERM
        assert not stop.agreed(accelerator)
        accelerator.other = 0
        assert stop.agreed(accelerator)
        assert stop.exit_code == 143  # on all


def test_a_save_that_one_process_was_told_is_everybodys():
    with StopSignal() as stop:
        accelerator = Two()
        seen = []
        for other in 0, 1 << 8, 0, 0:
            accelerator.other = other
            if len(seen) == 2:
                send(signal.SIGUSR1)
            seen.append((stop.agreed(accelerator), stop.save_agreed))
        seen.append((stop.agreed(accelerator), stop.save_agreed))
        assert seen == [
            (False, False),
            (False, False),
            (False, True),
            (False, True),
            (False, False),
        ]
