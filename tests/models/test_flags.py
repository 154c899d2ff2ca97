"""The models' switches."""

import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import k_diffusion as K
from k_diffusion.models import flags, image_transformer_v2 as v2


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


class AttentionRuns(TorchDispatchMode):
    """Counts the runs of torch's attention kernel."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def test_attention_is_run_again_or_its_output_kept():
    mapping = v2.MappingSpec(1, 16, 16, 0.0)
    near = v2.LevelSpec(1, 32, 64, v2.NeighborhoodAttentionSpec(16, 3), 0.0)
    top = v2.LevelSpec(2, 32, 64, v2.GlobalAttentionSpec(16), 0.0)
    model = v2.ImageTransformerDenoiserModelV2([near, top], mapping, 3, 3, (1, 1))
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 3, 20, 20)

    def run(**options):
        model.zero_grad()
        with AttentionRuns() as runs, K.models.checkpointing(**options):
            model(x, torch.ones(2)).square().sum().backward()
        return runs.count, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    blocks = 1 + 2 + 1
    count, want = run(enable=False)
    assert count == blocks
    for keep_attention, again in ((False, blocks), (True, 0)):
        count, got = run(keep_attention=keep_attention)
        assert count == blocks + again
        torch.testing.assert_close(got, want)


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
