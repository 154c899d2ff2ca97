"""Dropout on what attention gives, alone."""

import pytest
import torch
from golden import fill, normal

from k_diffusion.models import image_transformer_v1 as v1, image_transformer_v2 as v2
from k_diffusion.models.rope import make_axial_pos


def block_v2(dropout):
    return v2.SelfAttentionBlock(32, v2.GlobalAttentionSpec(16), 16, dropout)


def block_v1(dropout):
    return v1.SelfAttentionBlock(64, dropout=dropout)


@pytest.mark.parametrize(("make", "width", "cond"), [(block_v2, 32, 16), (block_v1, 64, 64)])
def test_dropout_of_attention(make, width, cond):
    x, cond = normal(0, (2, 4, 4, width)), normal(1, (2, cond))
    pos = make_axial_pos(4, 4).view(4, 4, 2)
    plain = fill(make(0.0))(x, pos, cond)
    block = fill(make(1.0))
    assert torch.equal(block.train()(x, pos, cond), x)  # all of it is dropped
    torch.testing.assert_close(block.eval()(x, pos, cond), plain)
    # half of it: the mean over many draws is the whole
    block = fill(make(0.5)).train()
    torch.manual_seed(0)
    draws = torch.stack([block(x, pos, cond) - x for _ in range(100)])
    error = draws.std(0) / 10
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - (plain - x)).abs() < 6 * error).all()
