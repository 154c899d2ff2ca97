#!/usr/bin/env python3
"""Write a sampler, and measure its order where the exact answer is known.

    python examples/write_your_own_sampler.py

A sampler is a function of a denoiser, noise and noise levels. This one is Ralston's method for the
probability flow ODE dx/dsigma = (x - D(x; sigma)) / sigma: second order, with a second look at two
thirds of the step. CONTRIBUTING.md says how one becomes part of the library.
"""

from itertools import pairwise

import torch

import k_diffusion as K

STD = 0.5  # of the data: x ~ N(0, STD^2)


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of Gaussian data, E[data | x]: what a perfect model would learn."""
    sigma = K.utils.append_dims(sigma, x.ndim)
    return x * STD**2 / (STD**2 + sigma**2)


@torch.no_grad()
def sample_ralston(model, x, sigmas, extra_args=None):
    """x: (n, ...), noise of standard deviation sigmas[0]. sigmas: (steps + 1,), decreasing."""
    ones, extra_args = x.new_ones(len(x)), extra_args or {}

    def slope(x, sigma):
        return K.sampling.to_d(x, sigma, model(x, sigma * ones, **extra_args))

    for sigma, sigma_next in pairwise(sigmas):
        d, dt = slope(x, sigma), sigma_next - sigma
        d_2 = slope(x + d * dt * 2 / 3, sigma + dt * 2 / 3)
        x = x + (d + 3 * d_2) / 4 * dt
    return x


if __name__ == "__main__":
    noise = 10 * torch.randn(64, 2, dtype=torch.float64)
    exact = noise * ((STD**2 + 0.1**2) / (STD**2 + 10**2)) ** 0.5
    print("steps  Euler    Ralston  (errors: twice the steps, a half and a quarter of them)")
    for steps in 16, 32, 64, 128:
        sigmas = K.sampling.get_sigmas_karras(steps + 1, 0.1, 10.0).double()[:-1]  # without 0
        samplers = K.sampling.sample_euler, sample_ralston
        errors = [(sample(denoise, noise, sigmas) - exact).std() for sample in samplers]
        print(f"{steps:5}  {errors[0]:.1e}  {errors[1]:.1e}")
