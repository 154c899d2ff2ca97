import pytest
import torch

from k_diffusion.evaluation.nearest import nearest, nearest_page


def test_nearest_are_those_of_all_distances(monkeypatch):
    monkeypatch.setattr("k_diffusion.evaluation.nearest._ROWS", 7)
    torch.manual_seed(0)
    x, pool = torch.randn(5, 3), torch.randn(40, 3)
    distances, indices = nearest(x, pool, 4)
    expected = torch.cdist(x.double(), pool.double()).sort(1)
    assert torch.equal(indices, expected.indices[:, :4])
    assert torch.allclose(distances, expected.values[:, :4])


def test_a_copy_is_at_0():
    pool = torch.randn(6, 3)
    distances, indices = nearest(pool[4:5], pool)
    assert indices.item() == 4
    assert distances.item() == pytest.approx(0, abs=1e-6)


def test_too_many_neighbours():
    with pytest.raises(ValueError, match="3 nearest of 2 images"):
        nearest(torch.zeros(1, 3), torch.zeros(2, 3), 3)


def test_page_has_a_row_for_each_sample():
    page = nearest_page(
        torch.zeros(3, 1, 8, 8), torch.zeros(3, 2, 1, 8, 8), torch.tensor([[0.5, 1.0]] * 3)
    )
    assert page.width == 3 * 50 + 2
