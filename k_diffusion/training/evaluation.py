"""FID and KID of a run's samples while it trains: what the --evaluate flags ask for."""

import argparse
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..conditions import Given
from ..data.latents import images_section
from ..data.training_data import of_split
from ..distributed import any_process, end_together
from ..encoders import inception
from ..encoders.autoencoder import Autoencoder
from ..evaluation.extraction import Eye, gather, see_share
from ..evaluation.protocols import get_protocol, metric_line
from ..evaluation.reals import RealImages, real_sets
from ..evaluation.registry import Options, label_of, measure
from ..generation import STEPS, sample_batches
from .args import Default
from .state import TrainState

# Those of the published training metric: DPM-Solver++(2M) of order 2 without noise.
SAMPLER = "dpmpp_2m_sde"
_SAMPLER_ARGS = {"eta": 0.0, "solver_type": "heun"}
_OPTIONS = Options(resamples=0)


def make_evaluator(
    accelerator: Any,
    args: argparse.Namespace,
    config: dict[str, Any],
    begin: int,
    end: float,
    autoencoder: Autoencoder | None = None,
) -> "Evaluator | None":
    """The evaluator of a run from step `begin` to step `end`; None where none is due.

    Without any --evaluate flag there is one only if Inception's weights are in the cache folder.
    Raises as Evaluator does.
    """
    every, n = args.evaluate_every, args.evaluate_n
    due = n > 0 and every > 0 and (begin // every + 1) * every <= end
    if not (args.evaluate_only or due):
        return None
    asked = args.evaluate_only or args.evaluate_weights or args.evaluate_split
    usual = isinstance(every, Default) and args.evaluate_with == "inception"
    if usual and not asked and not inception.cached().is_file():
        accelerator.print(
            "no FID will be measured: Inception's weights are not in the cache folder; "
            "--evaluate-every STEPS gets them, --evaluate-with lite0 needs none of them"
        )
        return None
    return Evaluator(accelerator, args, config, args.config.parent, autoencoder)


class Evaluator:
    """Measures the averaged model against real images, the same ones each time.

    Makes the encoder and reads the real images, so that what is missing ends a run before it
    starts. All processes make the same calls. Raises ValueError, OSError or ImportError where there
    are no weights or too few images.
    """

    def __init__(
        self,
        accelerator: Any,
        args: argparse.Namespace,
        config: dict[str, Any],
        folder: Path,
        autoencoder: Autoencoder | None = None,
    ):
        self.accelerator, self.config = accelerator, config
        self.n: int = args.evaluate_n
        self.only: bool = args.evaluate_only
        protocol = get_protocol(args.evaluate_with)
        models = {"clip": args.clip_model, "dinov2": args.dinov2_model}
        model_name = models.get(args.evaluate_with)
        if model_name is not None and protocol.options.get("model", "vitl14") != model_name:
            name = f"{protocol.name}:{model_name}"
            protocol = replace(protocol, name=name, options={"model": model_name})
        with accelerator.local_main_process_first():  # one process downloads
            encoder = protocol.make_encoder(args.evaluate_weights, accelerator.device)
        self.eyes = {protocol.name: Eye(protocol, encoder)}
        section: Mapping[str, Any] = config["dataset"]
        if args.evaluate_split is not None:
            if "split" not in section:
                raise ValueError(
                    f"--evaluate-split: a data set of type {section['type']} has no splits"
                )
            if (section["split"], args.evaluate_split) == ("all", "test"):
                raise ValueError(
                    "--evaluate-split test: the run trains on split all, the held-out images among "
                    "it; pass --set dataset.split=train"
                )
            section = of_split(section, args.evaluate_split)
        model = config["model"]
        shape = model["input_channels"], *model["input_size"]
        c, h, w = shape if autoencoder is None else autoencoder.image_shape(shape)
        reals = RealImages(images_section(section), (h, w), c, folder)
        if min(self.n, len(reals)) < 2:
            raise ValueError(
                f"an evaluation needs at least 2 samples and 2 real images, got --evaluate-n "
                f"{self.n} and {len(reals)} images"
            )
        self.n_reals = min(self.n, len(reals))
        self.reals = real_sets(accelerator, reals, self.eyes, self.n_reals)

    def evaluate(
        self,
        denoiser: nn.Module,
        state: TrainState,
        say: Callable[[str], object],
        stop: Callable[[], bool],
        given: Given | None = None,
    ) -> dict[str, Any]:
        """Measure the averaged model: columns of the run's CSV; {} on all but the main process.

        say: told each metric in a line. stop: asked after each sampling step, whether to give up;
        then SamplingStopped is raised, on all processes. given: as of `sample_batches`. Samples
        that can't be measured, as NaN, are said and end no run, unless that is all it was to do:
        then ValueError is raised.
        """
        seeds = range(state.seed, state.seed + self.n)
        batches = sample_batches(
            self.accelerator,
            denoiser,
            self.config,
            seeds,
            sampler=SAMPLER,
            sampler_args=_SAMPLER_ARGS,
            stop=stop,
            given=given,
        )
        share, error = None, None
        try:
            share = see_share(self.accelerator, batches, self.n, self.eyes)
        except ValueError as caught:  # of samples that aren't finite: training goes on
            error = caught
            deque(batches, maxlen=0)  # after each of which all processes agree
        if self.only:
            end_together(self.accelerator, error)
        if any_process(self.accelerator, error is not None):
            say(f"not evaluated: {error or 'another process failed'}")
            return {}
        assert share is not None
        seen = gather(self.accelerator, share)
        found: dict[str, Any] = {}
        if seen is None or self.reals is None:
            return found
        for name, eye in self.eyes.items():
            formula = eye.protocol.formula
            try:
                estimates = measure(
                    ("cmmd",) if formula == "cmmd" else ("fd", "kid"),
                    seen.features[name],
                    self.reals[name],
                    _OPTIONS._replace(subset_size=min(1000, self.n, self.n_reals)),
                    formula=formula,
                )
            except ValueError as error:  # the samples of a run that explodes may be NaN
                if self.only:
                    raise
                say(f"not evaluated: {error}")
                continue
            for metric, estimate in estimates.items():
                say(
                    metric_line(
                        label_of(metric, eye.protocol.encoder),
                        name,
                        estimate.value,
                        n=self.n,
                        n_reference=self.n_reals,
                        seeds=seeds,
                        sampler=SAMPLER,
                        evaluations=STEPS,
                        notes=[f"step {state.step}"],
                    )
                )
                found["fid" if metric == "fd" else metric] = estimate.value
            found |= {"protocol": name, "evaluate_n": self.n}
        return found
