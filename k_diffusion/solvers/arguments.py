"""The help text of samplers: what they share is written here once and composed."""

import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from ..common import numbers

# Every sampler's arguments, whatever its method.
MODEL = "the denoiser, (x, sigma, **extra_args) -> the estimate of the clean sample, shaped as x; "
SHARED = {
    "model": MODEL + "sigma: (n,), the noise level of each sample.",
    "x": "(n, ...), noise of standard deviation sigmas[0], or a noisy sample to start from.",
    "sigmas": "(steps + 1,), the schedule: decreasing noise levels, usually ending in 0, as from "
    "`get_sigmas_karras`; a tensor of any float dtype and device, or a sequence of floats. Equal "
    "neighbours are a step of no length. Ascending ones run an ODE sampler backwards, from a "
    "sample to its noise.",
    "extra_args": "keyword arguments for the model, such as `class_cond`.",
    "callback": "called in each step, before x moves, with a dict: `x`, `i` (the step), `sigma`, "
    "`sigma_hat` (the noise level after churn), both 0-d, and `denoised`. What it raises ends the "
    "run and propagates.",
    "disable": "hides the progress bar; None hides it where there is no terminal.",
    "sigma_min": "the noise level to end at, positive.",
    "sigma_max": "the noise level of x, positive; below sigma_min the run goes backwards.",
    "eta": "the share of fresh noise: 1 is the method's SDE, 0 its ODE.",
    "s_noise": "a factor on all added noise.",
    "noise_sampler": "(sigma, sigma_next) -> unit Gaussian noise like x; by default torch's global "
    "generator, or a Brownian tree seeded by it. See `make_noise_sampler` for one seed per image.",
    "s_churn": "how much noise to add over the run, before its steps.",
    "s_tmin": "the lowest noise level at which noise is added.",
    "s_tmax": "the highest noise level at which noise is added.",
    "order": "the highest order; the first steps, which have no history, take lower ones.",
    "lower_order_final": "lower orders on the last steps to 0, as many as steps are left.",
}
RETURNS = "The sample at sigmas[-1], shaped as x."
RAISES = (
    "ValueError: if sigmas is no schedule (not 1-D, NaN, negative, rising and falling, or rising "
    "where noise is added), or the model returns another shape."
)


# What the numbers among samplers' options have to be; s_churn and s_tmax may be infinite.
RULES = {
    **dict.fromkeys(("eta", "s_noise", "rtol", "atol"), numbers.non_negative),
    **dict.fromkeys(("pcoeff", "icoeff", "dcoeff", "gamma"), numbers.finite),
    "h_init": numbers.positive,
}
FROM_0_TO_INFINITY = ("s_churn", "s_tmin", "s_tmax")


def check_option(name: str, value: Any) -> None:
    """Raises ValueError for a number that an option of samplers can't be."""
    if not isinstance(value, int | float):
        return
    if name in RULES:
        RULES[name](**{name: value})
    elif name in FROM_0_TO_INFINITY and not value >= 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")


def _entry(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", 92, initial_indent=" " * 4, subsequent_indent=" " * 8)


def compose(doc: str, parameters: Iterable[str], facts: str, aliases: Mapping[str, str]) -> str:
    """A sampler's help: its own docstring, what the table says of it, and every argument.

    doc: may end in a section `Args:` about the sampler's own arguments, which goes before SHARED.
    parameters: of the sampler, in order. aliases: the names by which an argument is also known.
    """
    head, _, own_text = inspect.cleandoc(doc).partition("\nArgs:\n")
    own: dict[str, str] = {}
    for line in textwrap.dedent(own_text).splitlines():
        if line and not line.startswith(" "):
            name, _, text = line.partition(": ")
            own[name] = text
        elif line:
            own[name] += " " + line.strip()
    texts = {**SHARED, **own, **{a: f"another name of {n}." for a, n in aliases.items()}}
    args = "\n".join(_entry(name, texts[name]) for name in parameters if name in texts)
    ends = [
        f"{title}:\n{textwrap.indent(textwrap.fill(t, 88), ' ' * 4)}"
        for title, t in (("Returns", RETURNS), ("Raises", RAISES))
    ]
    return "\n\n".join([head.rstrip(), facts, f"Args:\n{args}", *ends]) + "\n"
