"""The table of samplers, and how a few lines become one."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..common.text import unknown_name
from ..schedules import Sigmas
from .arguments import check_option, compose
from .context import Args, Callback, Model


class Sampler(Protocol):
    """A public sampler. Options are its method's own; its signature and help list them.

    x: (n, ...). Returns the sample, of the same shape.
    """

    __name__: str

    def __call__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Sigmas,
        extra_args: Args = None,
        callback: Callback = None,
        disable: bool | None = None,
        *args: Any,
        **options: Any,
    ) -> Tensor: ...


@dataclass(frozen=True)
class SamplerInfo:
    """A row of SAMPLERS.

    order: of convergence, without noise. evaluations: of the model, per step. paper: its source.
    noise: where its noise comes from, a row of NOISE_SOURCES, or "" if it takes none. stochastic:
    whether it adds noise by default. takes_sigmas: called with a schedule, rather than with
    sigma_min, sigma_max and its own number of evaluations or tolerance. flow: whether x and sigmas
    are those of a rectified flow, times from 1 to 0. aliases: other names of its arguments.
    body: the method, (run, **options) -> sample, with `run` as `sampling.Run`; None if it has its
    own loop.
    """

    name: str
    function: Callable[..., Any]
    order: int
    evaluations: int
    paper: str
    noise: str = ""
    stochastic: bool = False
    takes_sigmas: bool = True
    flow: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    body: Callable[..., Any] | None = None

    @property
    def facts(self) -> str:
        """A sentence for the help."""
        plural = "s" if self.evaluations > 1 else ""
        return (
            f"Order {self.order}, {self.evaluations} model evaluation{plural} per step. "
            f"Source: {self.paper}."
        )


SAMPLERS: dict[str, SamplerInfo] = {}
# Those of rectified flows in their own parametrisation: x = (1 - t) data + t noise.
FLOW_SAMPLERS: dict[str, SamplerInfo] = {}

KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD
SHARED_PARAMETERS = [
    p.replace(kind=KEYWORD)
    for p in list(inspect.signature(Sampler.__call__).parameters.values())[1:7]
]


def own_names(info: SamplerInfo, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under the sampler's own names. Raises ValueError for one given under both."""
    out = {key: value for key, value in options.items() if key not in info.aliases}
    for alias, own in info.aliases.items():
        if (value := options.get(alias)) is not None:
            if own in out:
                raise ValueError(f"{alias} is another name of {own} in {info.name}; pass one alone")
            out[own] = value
    return out


def sampler(run: Callable[..., Any], **row: Any) -> Callable[[Callable[..., Any]], Sampler]:
    """Makes a public sampler of a method, and a row of SAMPLERS.

    The method takes the run and its own options. The sampler takes what all samplers do, and then
    those options: model, x, sigmas, extra_args, callback, disable, ...; its help has a text for
    each. It runs without gradients. run: makes the run of the shared arguments. row: the fields of
    `SamplerInfo` by name.
    """

    def register(body: Callable[..., Any]) -> Sampler:
        name = body.__name__.removeprefix("sample_")
        aliases: Mapping[str, str] = row.get("aliases", {})
        signature = inspect.signature(body)
        own = list(signature.parameters.values())
        names = tuple(signature.parameters)

        @functools.wraps(body)
        def checked(*args: Any, **options: Any) -> Any:
            if not torch.compiler.is_compiling():  # which torch 2.8 can't do with these checks
                for option, value in (*zip(names, args), *options.items()):
                    check_option(option, value)
            return body(*args, **options)

        public: Any = checked
        public.__signature__ = signature
        del public.__wrapped__  # tools that unwrap would find the method's own help
        if row.get("takes_sigmas", True):

            @functools.wraps(body)
            def call(
                model: Model,
                x: Tensor,
                sigmas: Sigmas,
                extra_args: Args = None,
                callback: Callback = None,
                disable: bool | None = None,
                *args: Any,
                **options: Any,
            ) -> Any:
                options = own_names(info, options) if aliases else options
                return checked(
                    run(model, x, sigmas, extra_args, callback, disable), *args, **options
                )

            own = [*SHARED_PARAMETERS, *own[1:]]
            own += [inspect.Parameter(a, KEYWORD, default=None) for a in aliases]
            public = call
            del public.__wrapped__  # tools that unwrap would find the method's parameters
            public.__signature__ = signature.replace(parameters=own)
        function: Any = torch.no_grad()(public)
        info = SamplerInfo(name, function, body=None if public is checked else checked, **row)
        doc = compose(body.__doc__ or "", [p.name for p in own], info.facts, aliases)
        function.__doc__ = public.__doc__ = doc  # the second for tools that unwrap
        (FLOW_SAMPLERS if info.flow else SAMPLERS)[name] = info
        return function

    return register


def get_sampler(name: str) -> SamplerInfo:
    """The row of SAMPLERS called `name`, such as "euler". Else a ValueError with the nearest."""
    if name.removeprefix("sample_") not in SAMPLERS:
        raise unknown_name("sampler", name, sorted(SAMPLERS))
    return SAMPLERS[name.removeprefix("sample_")]
