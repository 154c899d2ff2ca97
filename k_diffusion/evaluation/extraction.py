"""Features of images that come batch by batch, on several processes, under several protocols."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..common.images import to_levels
from ..encoders import Encoder
from ..encoders.digits import Recognizer
from .protocols import Protocol


class Eye(NamedTuple):
    """A protocol with the encoder that it sees images by."""

    protocol: Protocol
    encoder: Encoder


class Seen(NamedTuple):
    """What is kept of a set of n images, in their order, on the CPU.

    features: (n, width) by the protocol's name. log_probs: (n, classes) of an encoder's classifier,
    by the protocol's name. hits: (n,), 1 where an image was read as its class, else 0; None without
    a recognizer. first: (k, c, h, w), the first images, rounded to uint8.
    """

    features: dict[str, Tensor]
    log_probs: dict[str, Tensor]
    hits: Tensor | None
    first: Tensor

    def images(self, n: int) -> Tensor:
        """The first n images that are kept, (n, c, h, w) in [-1, 1]."""
        return self.first[:n] / 127.5 - 1


class Share(NamedTuple):
    """What one process has seen of a set of n images: lists of batches, to be gathered."""

    n: int
    keep: int
    features: dict[str, list[Tensor]]
    log_probs: dict[str, list[Tensor]]
    hits: list[Tensor]
    first: list[Tensor]


@torch.no_grad()
def see_share(
    accelerator: Any,
    batches: Iterable[Tensor],
    n: int,
    eyes: Mapping[str, Eye],
    *,
    recognizer: Recognizer | None = None,
    classes: Sequence[int] | None = None,
    classify: bool = False,
    keep: int = 0,
) -> Share:
    """Features of this process's share of n images, under all protocols; each image is let go.

    batches: (k, c, h, w) in [-1, 1], images i = process, process + processes, ... of the set, in
    order. eyes: by the protocol's name. classes: one id for each of the n images, for
    `recognizer`. classify: also the log-probabilities of the encoders that have a classifier. keep:
    how many of the n images to return. Raises ValueError where a share has another number of
    images.
    """
    if n < accelerator.num_processes:
        raise ValueError(f"{n} images are too few for {accelerator.num_processes} processes")
    mine = distributed.share(accelerator, n)
    my_classes = None if classes is None else torch.tensor([classes[i] for i in mine])
    keep = min(keep, n)
    kept = len(distributed.share(accelerator, keep))
    classifiers = [name for name, eye in eyes.items() if hasattr(eye.encoder, "log_probs")]
    log_probs: dict[str, list[Tensor]] = {name: [] for name in classifiers if classify}
    share = Share(n, keep, {name: [] for name in eyes}, log_probs, [], [])
    seen = 0
    for images in batches:
        for name, (protocol, encoder) in eyes.items():
            share.features[name].append(protocol.features(encoder, images))
            if name in share.log_probs:
                pixels = protocol.pixels(images, encoder.size).to(encoder.mean)
                share.log_probs[name].append(encoder.log_probs(pixels))  # type: ignore[operator]
        if recognizer is not None and my_classes is not None:
            asked = my_classes[seen : seen + len(images)].to(images.device)
            share.hits.append((recognizer.classify(images) == asked).float())
        share.first.append(to_levels(images[: max(0, kept - seen)]))
        seen += len(images)
    if seen != len(mine):
        raise ValueError(f"this process was to see {len(mine)} of {n} images, got {seen}")
    return share


def gather(accelerator: Any, share: Share) -> Seen | None:
    """The shares of all processes together, in order, on the main one, None on the others."""

    def rows(parts: list[Tensor], n: int = share.n) -> Any:
        everyone = distributed.gather_shares(
            accelerator, torch.cat(parts).to(accelerator.device), n
        )
        return None if everyone is None else everyone.cpu()

    seen = Seen(
        {name: rows(parts) for name, parts in share.features.items()},
        {name: rows(parts) for name, parts in share.log_probs.items()},
        rows(share.hits) if share.hits else None,
        rows(share.first, share.keep),
    )
    return seen if accelerator.is_main_process else None


def look_at(
    accelerator: Any, batches: Iterable[Tensor], n: int, eyes: Mapping[str, Eye], **options: Any
) -> Seen | None:
    """`see_share` and `gather`: what all processes see of n images, on the main one.

    batches: (k, c, h, w) in [-1, 1], this process's share.
    """
    share, error = None, None
    try:
        share = see_share(accelerator, batches, n, eyes, **options)
    except (ValueError, OSError) as caught:  # told to the others, who would wait
        error = caught
    if distributed.any_process(accelerator, share is None):
        raise error or ValueError("another process failed; it says why")
    assert share is not None
    return gather(accelerator, share)
