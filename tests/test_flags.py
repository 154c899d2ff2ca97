"""The models' switches."""

import threading

import pytest
import torch
from torch import nn

import k_diffusion as K
from k_diffusion.models import flags


def in_a_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_checkpointing_is_a_scope():
    assert not flags.get_checkpointing()
    with K.models.checkpointing():
        assert flags.get_checkpointing()
        with K.models.checkpointing(False):
            assert not K.models.get_checkpointing()
        assert flags.get_checkpointing()
    with pytest.raises(RuntimeError), K.models.checkpointing():
        raise RuntimeError
    assert not flags.get_checkpointing()


def test_checkpointing_works_off_the_main_thread_and_stays_there():
    with K.models.checkpointing():
        assert in_a_thread(flags.get_checkpointing) is False

    def run():
        with K.models.checkpointing():
            return flags.get_checkpointing()

    assert in_a_thread(run) is True
    assert not flags.get_checkpointing()


class Counted(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x.exp()


@pytest.mark.parametrize(("enable", "grad", "calls"), [(1, 1, 2), (0, 1, 1), (1, 0, 1)])
def test_blocks_are_recomputed_for_gradients_only(enable, grad, calls):
    block, x = Counted(), torch.zeros(2, requires_grad=True)
    with K.models.checkpointing(bool(enable)), torch.set_grad_enabled(bool(grad)):
        y = flags.checkpoint(block, x)
    if grad:
        y.sum().backward()
        assert x.grad.tolist() == [1, 1]
    assert block.calls == calls


SWITCHES = {
    "K_DIFFUSION_USE_COMPILE": (flags.get_use_compile, True),
    "K_DIFFUSION_USE_FLASH_2": (flags.get_use_flash_attention_2, True),
    "K_DIFFUSION_ROPE_PARITY": (flags.get_rope_parity, False),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_in_the_environment(monkeypatch, name):
    get, default = SWITCHES[name]
    monkeypatch.delenv(name, raising=False)
    assert get() is default
    for value, want in {"1": True, "0": False, " TRUE ": True, "off": False, "": default}.items():
        monkeypatch.setenv(name, value)
        assert get() is want
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ValueError, match=f"{name} must be 0 or 1, got 'maybe'"):
        get()
