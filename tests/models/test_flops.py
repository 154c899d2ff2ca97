"""Counts of multiply-accumulates."""

import threading

import pytest
import torch
from test_image_transformer_v2 import hourglass

from k_diffusion.models import flops, image_transformer_v2 as v2
from k_diffusion.models.flops import FlopCounter, flop_counter
from k_diffusion.models.transformer import Linear, LinearGEGLU


def count(function):
    with flop_counter() as counter:
        function()
    return counter.flops


def test_layers_are_counted():
    x = torch.zeros(5, 7, 3)
    assert count(lambda: Linear(3, 4)(x)) == 35 * 3 * 4
    assert count(lambda: LinearGEGLU(3, 4)(x)) == 35 * 3 * 8


@pytest.mark.parametrize(
    ("geometry", "keys"),
    [
        (v2.GlobalAttentionSpec(8), 16 * 8),
        (v2.NeighborhoodAttentionSpec(8, 3), 9),
        (v2.ShiftedWindowAttentionSpec(8, 4), 16),
    ],
)
def test_attention_counts_the_keys_that_a_query_sees(geometry, keys):
    shape = torch.Size((2, 16, 8, 3, 8))
    queries = 2 * 16 * 8 * 3
    assert count(lambda: geometry.record_flops(shape)) == queries * keys * (8 + 8)


def test_counters_nest_and_can_be_off():
    x, layer = torch.zeros(1, 3), Linear(3, 4)
    with flop_counter() as outer:
        layer(x)
        with flop_counter() as inner:
            layer(x)
        with flop_counter(enable=False) as off:
            layer(x)
    layer(x)
    assert [outer.flops, inner.flops, off.flops] == [12, 12, 0]
    counter = FlopCounter()
    counter.op(flops.op_linear, (2, 3), (4, 3))
    assert counter.flops == 24


def test_counters_work_off_the_main_thread_and_see_their_own():
    counts = {}

    def run(n):
        counts[n] = count(lambda: Linear(3, 4)(torch.zeros(n, 3)))

    with flop_counter() as main:
        threads = [threading.Thread(target=run, args=(n,)) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counts == {1: 12, 2: 24, 3: 36}
    assert main.flops == 0


NA = v2.NeighborhoodAttentionSpec(64, 7)
GLOBAL = v2.GlobalAttentionSpec(64)


@pytest.mark.parametrize(
    ("depths", "widths", "attns", "size", "params", "macs"),
    [
        ([2, 2, 16], [384, 768, 1536], [NA, NA, GLOBAL], 256, 557.4e6, 197.6e9),
        (
            [2, 2, 2, 2, 2],
            [128, 256, 384, 768, 1024],
            [NA, NA, NA, GLOBAL, GLOBAL],
            1024,
            85.1e6,
            206.1e9,
        ),
    ],
)
def test_published_architectures(depths, widths, attns, size, params, macs):
    classes = 1000 if size == 256 else 0
    with torch.device("meta"):
        model = hourglass(depths, widths, attns, patch=4, mapping=(2, 256, 768), classes=classes)
        x, sigma = torch.empty(1, 3, size, size), torch.empty(1)
        cond = {"class_cond": torch.empty(1, dtype=torch.long)} if classes else {}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=1e-3)
    with torch.no_grad():
        assert count(lambda: model(x, sigma, **cond)) == pytest.approx(macs, rel=1e-3)
