"""The loss on images that a run doesn't train on, at the same noise levels and noise each time."""

import argparse
from typing import Any

import torch
from torch import nn

from ..common.seeds import derive_seed
from ..conditions import Encode, of_batch
from ..data.training_data import as_stored, make_training_data, of_split
from ..densities import enable_stratified
from ..distributed import any_process
from ..encoders.autoencoder import Autoencoder
from .latent import batches_of_latents, data_shape
from .noise_levels import Density
from .step import batch_loss

_BYTES = 1 << 28  # of images that each process keeps


def make_validation(
    accelerator: Any,
    args: argparse.Namespace,
    config: dict[str, Any],
    encode: Encode | None = None,
    autoencoder: Autoencoder | None = None,
) -> "Validation | None":
    """The validation of a run whose `dataset.split` is "train"; None for others.

    Held-out images that can't be read are no reason not to train: it says so and returns None, on
    all processes. encode: of captions, see `conditions.make_training_encoder`.
    """
    if not args.validate_every or config["dataset"].get("split") != "train":
        return None
    made, error = None, None
    try:
        made = Validation(accelerator, args, config, encode, autoencoder)
    except (ValueError, OSError, ImportError) as caught:
        error = caught
    if any_process(accelerator, error is not None):
        accelerator.print(f"no validation loss: {error or 'another process failed'}")
        return None
    return made


class Validation:
    """Measures a denoiser on at most `--validate-n` held-out images, spread over the test split.

    Reads them at once, and keeps this process's share. All processes have as many batches. Raises
    ValueError, OSError or ImportError where they can't be read or are too few.
    """

    def __init__(
        self,
        accelerator: Any,
        args: argparse.Namespace,
        config: dict[str, Any],
        encode: Encode | None = None,
        autoencoder: Autoencoder | None = None,
    ):
        self.accelerator, self.config = accelerator, config
        held_out = {
            **config,
            "model": {**config["model"], "augment_prob": 0.0},
            "dataset": of_split(as_stored(config["dataset"]), "test"),
        }
        shape = data_shape(config, autoencoder)
        data = make_training_data(held_out, args.config.parent, strict=True, shape=shape)
        processes = accelerator.num_processes
        size = data[0, 0]["image"].nbytes
        n = min(len(data), args.validate_n, processes * max(1, _BYTES // size))
        batch = min(args.batch_size, n // processes)
        if not batch:
            raise ValueError(f"{n} held-out images are fewer than {processes} processes")
        self.batches_of_all = n // batch // processes * processes
        n = batch * self.batches_of_all
        self.n = n
        self.places = range(accelerator.process_index, self.batches_of_all, processes)
        collate = torch.utils.data.default_collate
        self.batches: list[dict[str, Any]] = []
        for j in self.places:
            # data sets are often sorted by class
            indices = [(j * batch + i) * len(data) // n for i in range(batch)]
            items = data.__getitems__([(index, 0) for index in indices])
            made = collate([{**item, "original": 0} for item in items])
            made |= of_batch(made, config, encode, autoencoder)
            self.batches += batches_of_latents(iter([made]), autoencoder, config)

    @torch.no_grad()
    def loss(self, denoiser: nn.Module, density: Density) -> float:
        """The mean training loss of the held-out images. All processes call it together.

        denoiser: in evaluation mode; called in the accelerator's precision. Noise levels are
        stratified over all images.
        """
        losses = []
        with torch.random.fork_rng(devices=[]), self.accelerator.autocast():
            for j, batch in zip(self.places, self.batches):
                torch.manual_seed(derive_seed(0, 3, j))
                with enable_stratified(j, self.batches_of_all):
                    device = self.accelerator.device
                    losses.append(batch_loss(denoiser, batch, density, self.config, device).mean())
        return float(self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
