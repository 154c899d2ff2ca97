"""Attention within torch.compile: whole graphs, few of them, the same numbers."""

import pytest
import torch
from attention_oracle import assert_same, formula, qkv
from golden import fill, normal

from k_diffusion.models import attention
from k_diffusion.models.attention import (
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    ShiftedWindowAttentionSpec,
    attend,
    flex,
    neighborhood,
)
from k_diffusion.models.image_transformer_v1 import ImageTransformerDenoiserModelV1
from k_diffusion.models.image_transformer_v2 import (
    ImageTransformerDenoiserModelV2,
    LevelSpec,
    MappingSpec,
)

BATCHES = (1, 2, 3, 5, 8)
CASES = {
    "global": (GlobalAttentionSpec(16), (5, 6)),
    "global-reference": (GlobalAttentionSpec(16, "reference"), (5, 6)),
    "windows": (ShiftedWindowAttentionSpec(16, 4, shift=2), (8, 12)),
    "neighborhood-dense": (NeighborhoodAttentionSpec(16, 3), (7, 11)),
    "neighborhood-tiles": (NeighborhoodAttentionSpec(16, 5), (18, 21)),
    "neighborhood-bands": (NeighborhoodAttentionSpec(16, 6), (19, 14)),
    "neighborhood-reference": (NeighborhoodAttentionSpec(16, 3, "reference"), (7, 11)),
}


@pytest.fixture(autouse=True)
def a_fresh_compiler(monkeypatch):
    monkeypatch.delenv(attention.ENV_VAR, raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(function, backend):
    """The compiled function and the list of the graphs that it is compiled to."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return torch.compile(function, fullgraph=True, backend=compiler), graphs


@pytest.mark.parametrize("case", CASES)
def test_attention_is_one_graph_forward_and_backward(monkeypatch, case):
    if case == "neighborhood-bands":
        monkeypatch.setattr(neighborhood, "_MAX_TOKENS_IN_ONE_PLAN", 0)
    geometry, size = CASES[case]
    compiled, graphs = counted(lambda q, k, v, geometry: attend(geometry, q, k, v), "aot_eager")
    for n in (2, 3, 9) if case == "neighborhood-tiles" else (2, 2):
        assert_same(compiled, geometry, qkv(*size, n=n, e=16), 1e-5)
    # one for 2 samples, one for any number
    assert len(graphs) == (2 if case == "neighborhood-tiles" else 1)
    with torch.no_grad():
        got = compiled(*qkv(*size, e=16), geometry)
    torch.testing.assert_close(got, formula(geometry, *qkv(*size, e=16, grad=False)))


def test_large_grids_are_compiled_row_by_row(monkeypatch):
    """Above 256 x 256 tokens no mask of all tiles is a constant of the graph."""
    geometry, size = NeighborhoodAttentionSpec(16, 3), (40, 24)
    sizes = {}
    for limit in (neighborhood._MAX_TOKENS_IN_ONE_PLAN, 40 * 24 - 1):
        monkeypatch.setattr(neighborhood, "_MAX_TOKENS_IN_ONE_PLAN", limit)
        torch._dynamo.reset()
        compiled, graphs = counted(lambda q, k, v, geometry: attend(geometry, q, k, v), "eager")
        assert_same(compiled, geometry, qkv(*size, n=1, e=16), 1e-5)
        constants = [*graphs[0].buffers(), *graphs[0].parameters()]
        sizes[limit] = max(x.numel() for x in constants if x.is_floating_point())
    whole, rows = sizes.values()
    assert rows <= whole / 9  # ten rows of tiles


# ---------------------------------------------------------------- whole models


def hourglass():
    """A level of each geometry; test_image_transformer_v2.py compiles shifts and gradients."""
    attns = [
        ShiftedWindowAttentionSpec(16, 4),
        NeighborhoodAttentionSpec(16, 3),
        GlobalAttentionSpec(16),
    ]
    levels = [LevelSpec(1, 32, 48, attn, 0.0) for attn in attns]
    return ImageTransformerDenoiserModelV2(levels, MappingSpec(1, 16, 32, 0.0), 3, 3, (1, 1))


def plain_transformer():
    return ImageTransformerDenoiserModelV1(1, 64, 96, 3, 3, (8, 8))


MODELS = {"image_transformer_v2": (hourglass, 20), "image_transformer_v1": (plain_transformer, 16)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_are_one_graph_that_batch_sizes_share(name):
    make, size = MODELS[name]
    model = fill(make()).eval()
    compiled, graphs = counted(model, "eager")
    for n in BATCHES:
        args = normal(n, (n, 3, size, size)), torch.linspace(0.1, 2, n)
        torch.testing.assert_close(compiled(*args), model(*args), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2  # for one sample, and for any other number
    assert not torch._dynamo.utils.counters["graph_break"]


# ---------------------------------------------------------------- FlexAttention

NO_COMPILER = flex._why_no_cpp()
needs_a_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=f"{NO_COMPILER}")


@needs_a_compiler
def test_flex_is_the_formula_for_any_batch():
    geometry = NeighborhoodAttentionSpec(16, 6)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for n in (2, 3, 5):
            assert_same(flex.flex, geometry, qkv(17, 35, n=n, e=16, grad=False), 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@needs_a_compiler
def test_flex_within_compiled_code(monkeypatch):
    monkeypatch.setenv(attention.ENV_VAR, "neighborhood=flex")
    geometry = NeighborhoodAttentionSpec(32, 7)

    @torch.compile(fullgraph=True)
    def run(q, k, v, geometry):
        return attend(geometry, q, k, v)

    inputs = qkv(19, 23, n=2, e=32, dtype=torch.bfloat16, grad=False)
    with torch.no_grad():
        assert_same(run, geometry, inputs, 3 * torch.finfo(torch.bfloat16).eps)


def test_flex_is_compiled_for_more_shapes_than_torch_allows(monkeypatch):
    """Past its limit torch runs a function uncompiled, which here would be on N x N scores."""
    graphs = []

    def compile_(function, **options):
        def compiler(graph, inputs):
            graphs.append(graph)
            return graph.forward

        # what is compiled is the limit's matter: a function that is as simple as can be
        def sum_of(q, k, v, **kwargs):
            return q + k + v

        return torch._dynamo.optimize(compiler, nopython=options["fullgraph"], dynamic=False)(
            sum_of
        )

    monkeypatch.setattr(torch, "compile", compile_)
    flex._compiled.cache_clear()
    run = flex._compiled()
    limit = torch._dynamo.config.recompile_limit
    try:
        for tokens in range(2, 2 * limit + 2):
            run(*[torch.zeros(2, 1, tokens, 4)] * 3)
    finally:
        flex._compiled.cache_clear()
    assert len(graphs) == 2 * limit
    assert torch._dynamo.config.recompile_limit == limit
