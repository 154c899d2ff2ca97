"""Axial rotary embeddings."""

import math

import pytest
import torch

from k_diffusion.models import axial_rope, rope
from k_diffusion.models.image_transformer_v2 import apply_rotary_emb, apply_rotary_emb_
from k_diffusion.models.rope import AxialRoPE, bounding_box, centers, make_axial_pos, make_grid


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- rotation


def test_pairs_turn_as_complex_numbers_and_the_rest_passes_through():
    x, theta = torch.randn(2, 5, 10), torch.randn(5, 3)
    y = apply_rotary_emb(x, theta)
    z = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones(5, 3), theta)
    torch.testing.assert_close(y, torch.cat([z.real, z.imag, x[..., 6:]], dim=-1))


def test_rotation_preserves_norms_and_conj_undoes_it():
    x, theta = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    y = apply_rotary_emb(x, theta)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(apply_rotary_emb(y, theta, conj=True), x)
    torch.testing.assert_close(apply_rotary_emb(x, -theta, True), y)


def test_scores_depend_on_the_relative_position_alone():
    emb = AxialRoPE(16, 2).double()
    q, k = torch.randn(2, 2, 32, dtype=torch.float64)
    pos = torch.tensor([[0.3, -0.2], [0.1, 0.6]], dtype=torch.float64)

    def score(p):
        a, b = apply_rotary_emb(q, emb(p[0])), apply_rotary_emb(k, emb(p[1]))
        return (a * b).sum(-1)

    moved = score(pos + torch.tensor([1.7, -0.9]))
    torch.testing.assert_close(moved, score(pos))
    assert not score(pos * 2).allclose(score(pos))


def test_in_place_rotation_is_the_same_and_differentiable():
    x, theta = torch.randn(3, 8), torch.randn(3, 2)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, buffer = apply_rotary_emb(a, theta), b * 1
    got = apply_rotary_emb_(buffer, theta)
    assert got is buffer
    torch.testing.assert_close(got, want)
    grad = torch.randn(3, 8)
    want.backward(grad)
    got.backward(grad)
    torch.testing.assert_close(b.grad, a.grad)


def test_gradients_by_differences():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(apply_rotary_emb, (x, theta))


def test_low_precision_keeps_the_angles():
    x, theta = torch.randn(64, 8).bfloat16(), 31 * torch.rand(64, 4)
    y = apply_rotary_emb(x, theta)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, apply_rotary_emb(x.float(), theta).bfloat16())


def test_too_many_angles_are_an_error():
    for rotate in (apply_rotary_emb, apply_rotary_emb_):
        with pytest.raises(ValueError, match="5 angles rotate 10 features, but x has only 8"):
            rotate(torch.randn(2, 8), torch.randn(2, 5))


# ---------------------------------------------------------------- angles


def test_frequencies_are_spaced_evenly_in_the_logarithm_and_dealt_to_the_heads():
    emb = AxialRoPE(32, 3)
    freqs = emb.freqs.T.flatten()
    assert emb.freqs.shape == (3, 8)
    assert freqs[0].item() == pytest.approx(math.pi)
    torch.testing.assert_close(freqs[1:] / freqs[:-1], torch.full((23,), 10 ** (1 / 24)))
    assert list(dict(emb.named_buffers())) == ["freqs"]
    assert not list(emb.parameters())


def test_one_half_of_the_angles_turns_with_y_and_the_other_with_x():
    emb = AxialRoPE(16, 2)
    pos = torch.tensor([[[0.5, 0.0], [0.0, -2.0]]])
    theta = emb(pos)
    assert theta.shape == (1, 2, 2, 8)
    torch.testing.assert_close(theta[0, 0], torch.cat([0.5 * emb.freqs, 0 * emb.freqs], -1))
    torch.testing.assert_close(theta[0, 1], torch.cat([0 * emb.freqs, -2 * emb.freqs], -1))


# ---------------------------------------------------------------- positions


def test_the_longer_side_spans_minus_one_to_one():
    assert bounding_box(4, 4) == (-1, 1, -1, 1)
    assert bounding_box(2, 4) == (-0.5, 0.5, -1, 1)
    assert bounding_box(4, 2) == (-1, 1, -0.5, 0.5)
    # pixels twice as high as wide make a square of 2 x 4 of them
    assert bounding_box(2, 4, pixel_aspect_ratio=2.0) == (-1, 1, -1, 1)


def test_positions_are_the_centres_of_pixels():
    torch.testing.assert_close(centers(-1, 1, 4), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    pos = make_axial_pos(2, 4).view(2, 4, 2)
    torch.testing.assert_close(pos[1, 0], torch.tensor([0.25, -0.75]))
    torch.testing.assert_close(pos, -pos.flip(0, 1))
    corners = make_axial_pos(2, 4, align_corners=True, dtype=torch.float64).view(2, 4, 2)
    torch.testing.assert_close(corners[1, 0], torch.tensor([0.5, -1.0], dtype=torch.float64))


def test_a_grid_runs_row_by_row():
    grid = make_grid(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0, 7.0]))
    assert grid.tolist() == [[1, 5], [1, 6], [1, 7], [2, 5], [2, 6], [2, 7]]


def test_the_published_module_has_the_same_functions():
    for name in ("bounding_box", "centers", "make_axial_pos", "make_grid"):
        assert getattr(axial_rope, name) is getattr(rope, name)
