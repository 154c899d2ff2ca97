"""evaluate.py: checkpoints, or images, against real images; sweeps; a report."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import distributed
from ...common.files import writable, write_atomically
from ...common.images import grid_columns, image_grid
from ...common.text import aligned
from ...encoders.digits import MAX_IMAGES, Recognizer
from ...encoders.weights import cache_folder
from ...evaluation import report
from ...evaluation.extraction import Eye, Seen, look_at
from ...evaluation.images import SampleImages
from ...evaluation.intervals import Estimate, bootstrap, with_error
from ...evaluation.likelihood import real_likelihood
from ...evaluation.nearest import nearest, nearest_page
from ...evaluation.protocols import get_protocol, metric_line
from ...evaluation.reals import real_sets
from ...evaluation.references import read_reference, write_samples
from ...evaluation.registry import METRICS, FeatureSet, Options, label_of, measure
from .. import sample
from . import inputs
from .args import RECOGNITION, parse_args

__all__ = ["parse_args", "run"]

_GRID = 64  # images of the grid in the report
_ENTRIES = {"edm": "fid", "edm2-dinov2": "fd_dinov2"}  # of EDM2's reference files


def run(args: argparse.Namespace) -> None:
    """Measures what the flags ask for and writes the report.

    Raises ValueError, OSError or ImportError for what can't be done, before anything is sampled.
    """
    device = distributed.check_device(args.device) if args.device else None
    accelerator = distributed.make_accelerator(cpu=args.device == "cpu")
    device = device or accelerator.device
    evaluation = Evaluation(args, accelerator, device)
    for source in [args.samples] if args.samples else args.checkpoint:
        evaluation.measure(source)
    evaluation.finish()
    accelerator.end_training()


class Evaluation:
    """The encoders, the real images and the results of one call of the script."""

    def __init__(self, args: argparse.Namespace, accelerator: Any, device: torch.device):
        self.args, self.accelerator, self.device = args, accelerator, device
        self.folder: Path = args.output_dir
        writable(self.folder / "results.json")
        self.protocols = {name: get_protocol(name) for name in args.protocol}
        self.metrics = [name for name in args.metrics if name != RECOGNITION]
        self.options = Options(
            k=args.k, subset_size=args.kid_size, resamples=args.resamples, seed=args.seed
        )
        self.rows = distributed.broadcast(
            report.read_results(self.folder) if accelerator.is_main_process else None
        )
        self.source = inputs.load_source(args, args.samples or args.checkpoint[0], device)
        self.against = inputs.find_data(args, self.source)
        usual = max(protocol.n for protocol in self.protocols.values())
        self.n: int = args.n or (len(self.source.images) if self.source.images else usual)
        limit = self.against.limit
        self.n_reals = None if limit is None else min(args.n_reference or limit, limit)
        self._check()
        self.eyes = {
            name: Eye(protocol, protocol.make_encoder(args.weights, device))
            for name, protocol in (self.protocols.items() if self.metrics or args.nearest else ())
        }
        self.recognizer: Recognizer | None = None
        if RECOGNITION in args.metrics and self.against.reals is not None:
            self.recognizer = Recognizer(*self.against.reals.load(MAX_IMAGES))
        self.references: dict[str, tuple[FeatureSet, str]] | None = None

    def _check(self) -> None:
        known = self.n, self.n_reals, self.protocols, self.metrics, self.options
        inputs.check(self.args, self.source, self.against, *known)

    # --------------------------------------------------------------------------- measuring

    def measure(self, path: Path) -> None:
        """Measure a checkpoint under all settings, or a set of images; each is saved when done."""
        if path != self.source.path:
            before = self.source.shape(self.args)
            self.source = inputs.load_source(self.args, path, self.device)
            if (shape := self.source.shape(self.args)) != before:
                raise ValueError(
                    f"{path} has images of {shape}, the checkpoints before it of {before}; "
                    "evaluate them apart"
                )
            self._check()
        if self.args.likelihood:
            self._likelihood()
        for setting in self.args.settings:
            self._setting(setting)

    def _settings(self, setting: argparse.Namespace) -> dict[str, Any]:
        """What the numbers depend on, as the report lists it."""
        if self.source.images is not None:
            return {"samples": str(self.source.path), "samples_sha256": self.source.digest[:16]}
        given = {key: getattr(setting, key) for key in self.args.choices}
        return {
            "checkpoint": str(self.source.path),
            **self.source.step,
            **{k: _plain(v) for k, v in given.items() if v is not None},
            "checkpoint_sha256": self.source.digest[:16],
        }

    def _names(self) -> list[tuple[str, str | None]]:
        """(metric, protocol) of each row that a setting gives."""
        names: list[tuple[str, str | None]] = [(m, p) for p in self.protocols for m in self.metrics]
        return names + [(RECOGNITION, None)] * (RECOGNITION in self.args.metrics)

    def _done(
        self, settings: dict[str, Any], names: Sequence[tuple[str, str | None]], n: int
    ) -> bool:
        against = self._compared()
        have = {
            (row["key"], row["protocol"])
            for row in self.rows
            if row["settings"] == settings and row["n"] == n and row.get("against") == against
        }
        return set(names) <= have

    def _compared(self) -> str:
        """What rows of one report are compared with, and how, as a short digest."""
        reals, file = self.against
        key = {"file": str(file)} if reals is None else reals.key()
        text = json.dumps([key, self.n_reals, self.options], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _setting(self, setting: argparse.Namespace) -> None:
        settings = self._settings(setting)
        say = self.accelerator.print
        names = self._names()
        wanted = bool(names) and not self._done(settings, names, self.n)
        if names and not wanted:
            say(f"done before: {_line(settings)}")
        if not wanted and not self.args.nearest and not self.args.write_samples:
            return
        classes = self.source.classes(setting, self.n)
        with Counter() as counter:
            seen = look_at(
                self.accelerator,
                self._batches(setting, counter),
                self.n,
                self.eyes,
                recognizer=self.recognizer,
                classes=classes,
                classify="inception_score" in self.metrics,
                keep=self.n if self.args.write_samples else max(_GRID, 16),
            )
        self._read_references()
        if seen is None:
            return
        if wanted:
            self.rows += self._rows(seen, setting, settings, counter)
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        grid = self._write_grid(seen.first[:_GRID], f"samples_{name}.png", setting)
        for row in self.rows:
            if row["settings"] == settings:
                row["grid"] = grid
        if self.args.write_samples:
            path = self.folder / f"samples_{name}.npz"
            write_samples(path, [seen.first], self.n)
            say(f"wrote {path}")
        if self.args.nearest:
            self._write_nearest(seen)
        self._save()

    def _batches(self, setting: argparse.Namespace, counter: "Counter") -> Iterator[Tensor]:
        """This process's share of the images."""
        mine = range(self.accelerator.process_index, self.n, self.accelerator.num_processes)
        if self.source.images is not None:
            yield from self.source.images.batches(mine, setting.batch_size, self.device)
            return
        denoiser, config = self.source.checkpoint()
        guided = sample.make_guidance(denoiser, config, setting, self.device)
        setting.n = self.n
        drawn = sample.draw(self.accelerator, guided, config, setting, setting.seed, self.device)
        counter.watch(guided)
        for images in drawn.batches:
            counter.batches += 1
            yield images

    def _read_references(self) -> None:
        """The real images' features, once, on the main process."""
        if self.references is not None or not self.eyes:
            return
        reals, file = self.against
        if reals is None:
            assert file is not None
            self.references = {name: self._from_file(file, name) for name in self.eyes}
            return
        # only some metrics are content with statistics
        whole = bool(self.args.nearest) or not all(METRICS[m].statistics for m in self.metrics)
        assert self.n_reals is not None
        sets = real_sets(
            self.accelerator,
            reals,
            self.eyes,
            self.n_reals,
            cache=self.args.cache or cache_folder() / "references",
            features=whole,
            batch_size=self.args.batch_size,
            num_workers=self.args.num_workers,
        )
        self.references = {name: (found, "") for name, found in (sets or {}).items()}

    def _from_file(self, path: Path, protocol: str) -> tuple[FeatureSet, str]:
        """A reference file's features or statistics, and what to say with every number."""
        said = "" if self.args.force else protocol
        reference = read_reference(path, _ENTRIES.get(protocol), said)
        note = ""
        if reference.statistics is not None:
            other = reference.statistics.protocol
            if other and other != protocol:
                note = f"reference of {other}, forced"
                reference.statistics.protocol = protocol
            return reference.statistics, note
        if reference.features is not None:
            return reference.features, note
        images = SampleImages(path)
        seen = look_at(
            self.accelerator,
            images.batches(range(len(images)), self.args.batch_size, self.device),
            len(images),
            {protocol: self.eyes[protocol]},
        )
        assert seen is not None
        return seen.features[protocol], note

    def _rows(
        self, seen: Seen, setting: argparse.Namespace, settings: dict[str, Any], counter: "Counter"
    ) -> list[report.Row]:
        """The metrics of a set of samples."""
        rows = []
        how = self._how(setting, counter)
        assert self.references is not None
        for name, eye in self.eyes.items():
            real, note = self.references[name]
            count = real.n if hasattr(real, "n") else len(real)
            logits = seen.log_probs.get(name)
            found = measure(
                self.metrics, seen.features[name], real, self.options, logits, eye.protocol.formula
            )
            for metric, estimate in found.items():
                label = label_of(metric, eye.protocol.encoder)
                notes = [note] if note else []
                rows.append(self._row(metric, label, name, estimate, count, settings, how, notes))
        if seen.hits is not None:
            hits = seen.hits.double()
            estimate = bootstrap(lambda i: hits[i].mean(), [len(hits)], self.options.resamples)
            rows.append(
                self._row(RECOGNITION, RECOGNITION, None, estimate, self.n_reals, settings, how)
            )
        return rows

    def _how(self, setting: argparse.Namespace, counter: "Counter") -> dict[str, Any]:
        if self.source.images is not None:
            return {}
        return {
            "seeds": range(setting.seed, setting.seed + self.n),
            "sampler": setting.sampler,
            "evaluations": counter.per_image,
            "cfg_scale": setting.cfg_scale if setting.cfg_scale != 1 else None,
        }

    def _row(
        self,
        key: str,
        label: str,
        protocol: str | None,
        estimate: Estimate,
        n_reference: int | None,
        settings: dict[str, Any],
        how: dict[str, Any],
        notes: Sequence[str] = (),
        n: int | None = None,
    ) -> report.Row:
        value, error, low, high = (report.clean(x) for x in estimate)
        if value is None:
            raise ValueError(f"{label} of {self.source.path} is not a number")
        line = metric_line(
            label,
            protocol,
            value,
            error,
            n=n or self.n,
            n_reference=n_reference,
            notes=notes,
            **how,
        )
        self.accelerator.print(line)
        return {
            "key": key,
            "metric": label,
            "protocol": protocol,
            "value": value,
            "error": error,
            "low": low,
            "high": high,
            "n": n or self.n,
            "n_reference": n_reference,
            "settings": settings,
            "against": self._compared(),
            "line": line,
        }

    def _likelihood(self) -> None:
        """Bits per dimension of real images."""
        reals = self.against.images()
        denoiser, config = self.source.checkpoint()
        n = self.args.likelihood
        settings = {
            "checkpoint": str(self.source.path),
            **self.source.step,
            "seed": self.args.seed,
            "checkpoint_sha256": self.source.digest[:16],
        }
        if self._done(settings, [("bits_per_dim", None)], n):
            self.accelerator.print(f"done before: bits per dimension, {_line(settings)}")
            return
        bits = real_likelihood(
            self.accelerator,
            denoiser,
            config,
            reals,
            n,
            seed=self.args.seed,
            batch_size=self.args.batch_size,
        )
        if bits is None:
            return
        error = float(bits.std()) / n**0.5 if n > 1 else float("nan")
        estimate = with_error(float(bits.mean()), error)
        notes = [f"split {reals.section['split']}"] if "split" in reals.section else []
        label = "bits/dim"
        self.rows.append(
            self._row("bits_per_dim", label, None, estimate, None, settings, {}, notes, n)
        )
        self._save()

    # ----------------------------------------------------------------------------- results

    def _write_grid(self, images: Tensor, name: str, setting: argparse.Namespace) -> str:
        classes = len(set(self.source.classes(setting, self.n) or ()))
        picture = image_grid(images, grid_columns(classes, len(images), *images.shape[2:]))
        write_atomically(self.folder / name, lambda file: picture.save(file, format="png"))
        return name

    def _write_nearest(self, seen: Seen) -> None:
        """Samples beside the images that are nearest in the features of the first protocol."""
        reals = self.against.images()
        assert self.references is not None
        name = next(iter(self.eyes))
        pool, _ = self.references[name]
        assert isinstance(pool, Tensor)
        count = min(16, len(seen.first))
        distances, indices = nearest(seen.features[name][:count], pool, self.args.nearest)
        places = reals.spaced(len(pool))
        neighbours = [reals[places[int(i)]]["image"] for i in indices.flatten()]
        page = nearest_page(
            seen.first[:count], torch.stack(neighbours).unflatten(0, indices.shape), distances
        )
        path = self.folder / "nearest.png"
        write_atomically(path, lambda file: page.save(file, format="png"))
        self.accelerator.print(f"wrote {path}")

    def _save(self) -> None:
        title = f"Evaluation of {self.source.path.name}"
        if len(self.args.checkpoint) > 1:
            title = f"Evaluation of {len(self.args.checkpoint)} checkpoints"
        report.write_results(self.folder, self.rows, title)

    def finish(self) -> None:
        """The table of all results, on the terminal."""
        if not self.accelerator.is_main_process or not self.rows:
            return
        heads, lines = report.columns(self.rows)
        table = [tuple(heads), *(tuple(of + numbers) for of, numbers in lines)]
        print("\n".join(aligned(table)))
        print(f"wrote {self.folder / 'index.html'}, results.csv and results.json")


class Counter:
    """Counts a model's evaluations while it is watched."""

    def __init__(self) -> None:
        self.calls = self.batches = 0
        self._handle: Any = None

    def watch(self, model: nn.Module) -> None:
        """Count the calls of the model from now on."""
        self._handle = model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    @property
    def per_image(self) -> int | None:
        """Evaluations for one image."""
        return round(self.calls / self.batches) if self.batches else None

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._handle is not None:
            self._handle.remove()


def _plain(value: Any) -> Any:
    """A flag's value as JSON has it."""
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def _line(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items() if not k.endswith("sha256"))
