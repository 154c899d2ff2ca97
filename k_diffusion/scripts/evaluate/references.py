"""The real images, or the reference file, as the protocols see them."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...common.files import cache_folder, sha256
from ...distributed import share
from ...evaluation.extraction import Eye, look_at
from ...evaluation.images import SampleImages
from ...evaluation.intervals import Estimate
from ...evaluation.reals import RealImages, real_sets
from ...evaluation.references import read_reference
from ...evaluation.registry import METRICS, FeatureSet, Options, measure
from ...evaluation.statistics import FeatureStatistics
from .inputs import Against

_ENTRIES = {"edm": "fid", "edm2-dinov2": "fd_dinov2"}  # of EDM2's reference files


class Reference(NamedTuple):
    """What one protocol compares with: statistics, features (n, width), or both.

    note: what to say with every number.
    """

    statistics: FeatureStatistics | None
    features: Tensor | None
    note: str = ""

    def measure(
        self,
        names: Sequence[str],
        fake: Tensor,
        options: Options,
        log_probs: Tensor | None,
        formula: str,
    ) -> dict[str, tuple[Estimate, int | None]]:
        """Metrics by name, each with the n of the reference.

        fake: (n, width). log_probs: (n, classes), for the inception score.
        """
        out: dict[str, tuple[Estimate, int | None]] = {}
        rest = [name for name in names if not self._by_statistics(name)]
        some = [name for name in names if name not in rest]
        for real, group in (self.statistics, some), (self.features, rest):
            if real is None or not group:
                continue
            found = measure(group, fake, real, options, log_probs, formula)  # neighbours once
            n = real.n if isinstance(real, FeatureStatistics) else len(real)
            out |= {k: (v, None if METRICS[k].logits else n) for k, v in found.items()}
        return {name: out[name] for name in names}

    def _by_statistics(self, name: str) -> bool:
        """Whether a metric takes the statistics, where they do or are all there is."""
        return self.statistics is not None and (METRICS[name].statistics or self.features is None)


class References:
    """References by protocol, read when first needed, and the same for all samples.

    All processes make the same calls; the main one has the results.
    """

    def __init__(
        self,
        accelerator: Any,
        args: argparse.Namespace,
        against: Against,
        n: int | None,
        eyes: Mapping[str, Eye],
        metrics: Sequence[str],
        numbers: Options,
    ):
        self.accelerator, self.args, self.against, self.n = accelerator, args, against, n
        self.eyes, self.metrics = eyes, metrics
        self.whole = not all(METRICS[name].statistics or METRICS[name].logits for name in metrics)
        self.read_already: dict[str, Reference] | None = None
        self.pools: dict[str, Tensor | None] = {}  # of `features`
        reals, file = against.reals, against.file
        key = {
            "data": reals.key() if reals is not None else sha256(file) if file else None,
            "n": n,
            "numbers": numbers,
            "force": args.force,
            "encoders": {name: eye.encoder.fingerprint() for name, eye in eyes.items()},
        }
        text = json.dumps(key, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self) -> dict[str, Reference]:
        """The references by protocol; {} on all processes but the main one.

        Raises ValueError for a file of another protocol or width, or one that has too little for
        the metrics.
        """
        if self.read_already is not None:
            return self.read_already
        reals, file = self.against.reals, self.against.file
        if reals is None:
            assert file is not None
            found = {name: self._from_file(file, name) for name in self.eyes}
        elif self.n is not None:
            sets = self._sets(reals, self.eyes, self.n, features=self.whole)
            found = {
                name: Reference(x, None) if isinstance(x, FeatureStatistics) else Reference(None, x)
                for name, x in sets.items()
            }
        self.read_already = found if self.accelerator.is_main_process else {}
        return self.read_already

    def features(self, reals: RealImages, name: str) -> Tensor | None:
        """The features (n, width) of all images of a set, which is always the same one for a name.

        None on all but the main process.
        """
        if name not in self.pools:
            sets = self._sets(reals, {name: self.eyes[name]}, len(reals), features=True)
            self.pools[name] = sets.get(name)  # type: ignore[assignment]
        return self.pools[name]

    def _sets(
        self, reals: RealImages, eyes: Mapping[str, Eye], n: int, *, features: bool
    ) -> dict[str, FeatureSet]:
        sets = real_sets(
            self.accelerator,
            reals,
            eyes,
            n,
            cache=self.args.cache or cache_folder() / "references",
            features=features,
            batch_size=self.args.batch_size,
            num_workers=self.args.num_workers,
        )
        return sets or {}

    def _from_file(self, path: Path, protocol: str) -> Reference:
        said = "" if self.args.force else protocol
        reference = read_reference(path, _ENTRIES.get(protocol), said)
        eye = self.eyes[protocol]
        statistics, features, note = reference.statistics, reference.features, ""
        if statistics is not None:
            other = statistics.protocol
            # read_reference gives a file that doesn't say its protocol the one that was asked for
            if other and other != protocol:
                note = f"reference of {other}, forced"
            statistics.protocol = protocol
        if reference.images is not None and (statistics is None or self.whole):
            images = SampleImages(reference.images)
            mine = share(self.accelerator, len(images))
            batches = images.batches(mine, self.args.batch_size, eye.encoder.mean.device)
            seen = look_at(self.accelerator, batches, len(images), {protocol: eye})
            features = None if seen is None else seen.features[protocol]
        if statistics is not None and statistics.width != eye.encoder.width:
            raise ValueError(
                f"{path} has statistics of width {statistics.width}, but the protocol {protocol} "
                f"has {eye.encoder.width} features; it is of another encoder"
            )
        if self.whole and reference.features is None and reference.images is None:
            lacking = [name for name in self.metrics if not METRICS[name].statistics]
            raise ValueError(
                f"{lacking[0]} needs features of real images, and {path} has their mean and "
                "covariance alone; pass the images as --data"
            )
        return Reference(statistics, features, note)
