"""Compiling models whole and block by block."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import k_diffusion as K
from k_diffusion.models import (
    ImageDenoiserModelV1,
    ImageTransformerDenoiserModelV1,
    compile_model,
    image_transformer_v2 as v2,
)

pytestmark = pytest.mark.slow

WINDOW = v2.ShiftedWindowAttentionSpec(8, 4)
NEAR = v2.NeighborhoodAttentionSpec(8, 3)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("K_DIFFUSION_USE_COMPILE", raising=False)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def hourglass(depth=1, attns=(WINDOW, NEAR)):
    levels = [v2.LevelSpec(depth, 16 * (i + 1), 16, attn, 0.0) for i, attn in enumerate(attns)]
    levels.append(v2.LevelSpec(depth, 32, 16, v2.GlobalAttentionSpec(8), 0.0))
    mapping = v2.MappingSpec(1, 16, 16, 0.0)
    return v2.ImageTransformerDenoiserModelV2(levels, mapping, 3, 3, (1, 1))


MODELS = {
    "image_transformer_v2": lambda: hourglass(attns=(WINDOW,)),
    "image_transformer_v1": lambda: ImageTransformerDenoiserModelV1(1, 64, 32, 3, 3, (2, 2)),
    "image_v1": lambda: ImageDenoiserModelV1(3, 16, [1, 1], [8, 64], [False, True]),
}


def filled(model):
    """A model in which nothing is zero, so that all of it counts."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=g) * 0.05
    return model


def gradients(model, n=2):
    x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model(x, torch.ones(n)).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("unit", ["model", "block"])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_has_the_same_gradients_and_names(name, unit):
    model = filled(MODELS[name]())
    want, names = gradients(model), list(model.state_dict())
    graphs = CompileCounterWithBackend("aot_eager")
    assert compile_model(model, unit, backend=graphs) is model
    for a, b in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    assert graphs.frame_count == 1 if unit == "model" else graphs.frame_count >= 1
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


def test_blocks_of_a_level_share_their_code_whatever_the_depth():
    counted = []
    for depth in (2, 6):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("eager")
        gradients(compile_model(hourglass(depth, (WINDOW,)), "block", backend=graphs))
        counted.append(graphs.frame_count)
    # the windows of every other block are shifted: two graphs; one for the other level
    assert counted == [3, 3]


def test_every_block_is_compiled_of_more_levels_than_torch_allows_by_itself():
    torch._dynamo.config.recompile_limit = 2
    model = hourglass(1, [NEAR, WINDOW])
    graphs = CompileCounterWithBackend("eager")
    compile_model(model, "block", backend=graphs)
    for n in (1, 2, 3):  # other batch sizes
        gradients(model, n)
    # a graph for a batch of 1 and one for all others; of the windows' level two each, since its
    # block on the way up is shifted
    assert counters["frames"]["ok"] == counters["frames"]["total"] == graphs.frame_count == 8


@pytest.mark.parametrize(
    ("unit", "keep_attention"), [("model", False), ("block", False), ("block", True)]
)
def test_checkpointing_works_in_compiled_code(unit, keep_attention):
    model = filled(hourglass(attns=(NEAR,)))
    want = gradients(model)
    compile_model(model, unit, backend="aot_eager")
    with K.models.checkpointing(keep_attention=keep_attention):
        got = gradients(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_compiling_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")

    def refuse(*args):
        raise AssertionError("compiled")

    gradients(compile_model(hourglass(), backend=refuse))
    gradients(compile_model(hourglass(), "block", backend=refuse))


def test_what_cannot_be_compiled_is_said():
    with pytest.raises(ValueError, match="one of model, block; got 'level'"):
        compile_model(hourglass(), "level")
    with pytest.raises(ValueError, match="Linear has no blocks to compile; compile it whole"):
        compile_model(torch.nn.Linear(1, 1), "block")
