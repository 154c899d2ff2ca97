import pytest
import torch

from k_diffusion.guidance import CFGPlusPlus


def test_cfg_plus_plus_goes_by_the_ratio_of_noise_levels():
    """Between 8 and 2 the middle is 4, not 5."""
    scale = CFGPlusPlus(0.6, [8.0, 2.0, 1.0, 0.0])
    got = scale(torch.tensor([4.5, 3.5, 1.5, 1.3])).tolist()
    assert got == pytest.approx([0.6 * 8 / 6, 0.6 * 2 / 1, 0.6 * 2 / 1, 0.6])
