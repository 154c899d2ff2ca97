"""evaluate.py: checkpoints, or images, against real images; sweeps; a report."""

import argparse
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import distributed
from ...checkpoints.runs import find_checkpoint, folder_of
from ...common.files import check_writable, writable, write_atomically
from ...common.images import grid_columns, image_grid
from ...common.text import aligned
from ...conditions import make_text_encoder
from ...encoders.autoencoder import find_autoencoder
from ...encoders.digits import MAX_IMAGES, Recognizer
from ...evaluation import report
from ...evaluation.extraction import Eye, Seen, look_at
from ...evaluation.intervals import Estimate, bootstrap, with_error
from ...evaluation.likelihood import real_likelihood
from ...evaluation.nearest import nearest, nearest_page
from ...evaluation.neighbors import PRDC
from ...evaluation.protocols import get_protocol, metric_line
from ...evaluation.references import write_samples
from ...evaluation.registry import Options, label_of
from .. import sample
from . import inputs
from .args import RECOGNITION, parse_args
from .counter import Counter
from .references import Reference, References

__all__ = ["parse_args", "run"]

_GRID = 64  # images of the grid in the report
_WAIT = timedelta(hours=12)  # of the other processes, while the main one computes metrics


def run(args: argparse.Namespace) -> None:
    """Measures what the flags ask for and writes the report.

    Raises ValueError, OSError or ImportError for what can't be done, before anything is sampled.
    """
    device = distributed.check_device(args.device) if args.device else None
    accelerator = distributed.make_accelerator(cpu=args.device == "cpu", timeout=_WAIT)
    device = device or accelerator.device
    if args.checkpoint and not args.ema_width:  # one for all processes, though the run may go on
        args.checkpoint = distributed.broadcast([find_checkpoint(p) for p in args.checkpoint])
        args.sources = [(path, None) for path in args.checkpoint]
    evaluation = Evaluation(args, accelerator, device)
    for path, width in args.sources:
        evaluation.measure(path, width)
    evaluation.finish()
    accelerator.end_training()


class Evaluation:
    """The encoders, the real images and the results of one call of the script."""

    def __init__(self, args: argparse.Namespace, accelerator: Any, device: torch.device):
        self.args, self.accelerator, self.device = args, accelerator, device
        self.folder: Path = args.output_dir
        check_writable(self.folder / "results.json")  # made when there is something to write
        self.protocols = {name: get_protocol(name) for name in args.protocol}
        self.metrics = [name for name in args.metrics if name != RECOGNITION]
        self.options = Options(
            k=args.k, subset_size=args.kid_size, resamples=args.resamples, seed=args.seed
        )
        self.rows: list[report.Row] = []
        if accelerator.is_main_process:
            self.rows = report.read_results(self.folder)
        path, width = args.sources[0]
        self.source = inputs.load_source(args, path, width, device)
        inputs.check_alike(args, self.source)
        self.against = inputs.find_data(args, self.source)
        usual = max(protocol.n for protocol in self.protocols.values())
        self.n: int = args.n or (len(self.source.images) if self.source.images else usual)
        limit = self.against.limit
        self.n_reals = None if limit is None else min(args.n_reference or limit, limit)
        self._check()
        with accelerator.local_main_process_first():  # one process downloads
            self.eyes = {
                name: Eye(protocol, protocol.make_encoder(args.weights, device))
                for name, protocol in self.protocols.items()
                if self.metrics or args.nearest
            }
        inputs.check_eyes(self.eyes, self.metrics)
        self.recognizer: Recognizer | None = None
        if RECOGNITION in args.metrics:
            self.recognizer = Recognizer(*self.against.images().load(MAX_IMAGES))
        self.references = References(
            accelerator, args, self.against, self.n_reals, self.eyes, self.metrics, self.options
        )

    def _check(self) -> None:
        known = self.n, self.n_reals, self.protocols, self.metrics, self.options
        inputs.check(self.args, self.source, self.against, *known)
        self.told = inputs.find_told(self.args, self.source, self.against, self.n)

    # --------------------------------------------------------------------------- measuring

    def measure(self, path: Path, width: float | None = None) -> None:
        """Measure a checkpoint under all settings, or a set of images; each is saved when done.

        width: of an average over the run that `path` names, in place of a checkpoint.
        """
        if (path, width) != (self.source.path, self.source.width):
            self.source = inputs.load_source(self.args, path, width, self.device)
            self._check()
        if self.args.likelihood:
            self._likelihood()
        for setting in self.args.settings:
            self._setting(setting)

    def _settings(self, setting: argparse.Namespace) -> dict[str, Any]:
        """What the numbers depend on, as the report lists it."""
        images = self.source.images is not None
        given = {} if images else {key: getattr(setting, key) for key in self.args.choices}
        return {
            **self.source.settings,
            **{k: _plain(v) for k, v in given.items() if v is not None},
            **self.told.digests(setting),
            "data": self.against.name,
            f"{'samples' if images else 'checkpoint'}_sha256": self.source.digest[:16],
        }

    def _names(self) -> list[tuple[str, str | None]]:
        """(metric, protocol) of each row that a setting gives."""
        names: list[tuple[str, str | None]] = [(m, p) for p in self.protocols for m in self.metrics]
        return names + [(RECOGNITION, None)] * (RECOGNITION in self.args.metrics)

    def _done(
        self, settings: dict[str, Any], names: Sequence[tuple[str, str | None]], n: int
    ) -> bool:
        """Whether the report has all these rows, on all processes as the main one sees it."""
        have = {(row["key"], row["protocol"]) for row in self.rows if self._same(row, settings, n)}
        return distributed.broadcast(set(names) <= have)

    def _same(self, row: report.Row, settings: dict[str, Any], n: int) -> bool:
        """Whether a row is of these samples, compared with these images in this way."""
        against = self.references.digest
        return (row["settings"], row["n"], row.get("against")) == (settings, n, against)

    def _add(self, rows: list[report.Row]) -> None:
        """Put rows into the report, each in place of an older one of the same."""
        for new in rows:
            self.rows = [
                row
                for row in self.rows
                if (row["key"], row["protocol"]) != (new["key"], new["protocol"])
                or not self._same(row, new["settings"], new["n"])
            ]
            self.rows.append(new)

    def _setting(self, setting: argparse.Namespace) -> None:
        settings = self._settings(setting)
        say = self.accelerator.print
        names = self._names()
        wanted = bool(names) and not self._done(settings, names, self.n)
        if names and not wanted:
            say(f"done before: {_line(settings)}")
        if not wanted and not self.args.nearest and not self.args.write_samples:
            return
        references = self.references.read()  # refuses what can't be, before anything is sampled
        with Counter() as counter:
            seen = look_at(
                self.accelerator,
                self._batches(setting, counter),
                self.n,
                self.eyes,
                recognizer=self.recognizer,
                classes=self.source.classes(setting, self.n),
                classify="inception_score" in self.metrics,
                keep=self.n if self.args.write_samples else _GRID,
            )
        name = inputs.digest(settings)[:8]
        page = self._write_nearest(seen, f"nearest_{name}.png") if self.args.nearest else None
        if seen is None:
            return
        if wanted:
            self._add(self._rows(seen, references, setting, settings, counter))
        grid = self._write_grid(seen.images(_GRID), f"samples_{name}.png", setting)
        for row in self.rows:
            if row["settings"] == settings:
                row["grid"] = grid
                row["nearest"] = page or row.get("nearest")
        if self.args.write_samples:
            path = writable(self.folder / f"samples_{name}.npz")
            write_samples(path, (part / 127.5 - 1 for part in seen.first.split(256)), self.n)
            say(f"wrote {path}")
        self._save()

    def _batches(self, setting: argparse.Namespace, counter: Counter) -> Iterator[Tensor]:
        """This process's share of the images."""
        if self.source.images is not None:
            mine = distributed.share(self.accelerator, self.n)
            yield from self.source.images.batches(mine, setting.batch_size, self.device)
            return
        denoiser, config = self.source.checkpoint()
        guided = sample.make_guidance(denoiser, config, setting, self.device)
        changes = {"n": self.n, "checkpoint": self.source.path} | self.told.flags(setting)
        setting = argparse.Namespace(**vars(setting) | changes)
        drawn = sample.draw(self.accelerator, guided, config, setting, setting.seed, self.device)
        counter.watch(guided)
        for images in drawn.batches:
            counter.batches += 1
            yield images

    def _rows(
        self,
        seen: Seen,
        references: dict[str, Reference],
        setting: argparse.Namespace,
        settings: dict[str, Any],
        counter: Counter,
    ) -> list[report.Row]:
        """The metrics of a set of samples."""
        rows = []
        how = self._how(setting, counter)
        for name, eye in self.eyes.items():
            reference = references[name]
            fakes, log_probs = seen.features[name], seen.log_probs.get(name)
            formula = eye.protocol.formula
            found = reference.measure(self.metrics, fakes, self.options, log_probs, formula)
            for metric, (estimate, n) in found.items():
                label = label_of(metric, eye.protocol.encoder)
                notes = [*self._notes(metric, formula), *filter(None, [reference.note])]
                rows.append(self._row(metric, label, name, estimate, n, settings, how, notes))
        if seen.hits is not None:
            hits, n = seen.hits.double(), min(MAX_IMAGES, len(self.against.images()))
            estimate = bootstrap(lambda i: hits[i].mean(), [len(hits)], self.options.resamples)
            rows.append(self._row(RECOGNITION, RECOGNITION, None, estimate, n, settings, how))
        return rows

    def _notes(self, metric: str, formula: str) -> list[str]:
        """What a metric depends on besides its protocol."""
        if metric == "kid" and formula != "published":
            return [f"{self.options.subsets} subsets of {self.options.subset_size:,}"]
        return [f"k = {self.options.k}"] if metric in PRDC._fields else []

    def _how(self, setting: argparse.Namespace, counter: Counter) -> dict[str, Any]:
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
            "against": self.references.digest,
            "line": line,
        }

    def _likelihood(self) -> None:
        """Bits per dimension of real images: held-out ones, unless --split says otherwise."""
        denoiser, config = self.source.checkpoint()
        reals = self.against.held_out(self.args.split, config)
        n = self.args.likelihood
        if n > len(reals):
            raise ValueError(f"--likelihood {n}: the data set has {len(reals)} held-out images")
        split = reals.section.get("split")
        settings = {
            **self.source.settings,
            "seed": self.args.seed,
            "data": self.against.name,
            "split": split,
            "checkpoint_sha256": self.source.digest[:16],
        }
        # of a latent model the density's, which no number of images may be compared with
        latent = find_autoencoder(denoiser) is not None
        key, label = ("bits_per_dim", "bits/dim")
        if latent:
            key, label = f"latent_{key}", f"{label} of latents"
        if self._done(settings, [(key, None)], n):
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
            device=self.device,
            encode=make_text_encoder(
                config, self.device, self.args.text_encoder, [folder_of(self.source.path), "."]
            ),
        )
        if bits is None:
            return
        error = float(bits.std()) / n**0.5 if n > 1 else float("nan")
        estimate = with_error(float(bits.mean()), error)
        notes = [f"split {split}"] if split else []
        if split == "test" and config["dataset"].get("split") == "all":
            notes.append("trained on split all")
        row = self._row(key, label, None, estimate, None, settings, {}, notes, n)
        self._add([row])
        self._save()

    # ----------------------------------------------------------------------------- results

    def _write_grid(self, images: Tensor, name: str, setting: argparse.Namespace) -> str:
        classes = len(set(self.source.classes(setting, self.n) or ()))
        picture = image_grid(images, grid_columns(classes, len(images), *images.shape[2:]))
        path = writable(self.folder / name)
        write_atomically(path, lambda file: picture.save(file, format="png"))
        return name

    def _write_nearest(self, seen: Seen | None, file: str) -> str | None:
        """Samples beside the training images that are nearest in the first protocol's features."""
        reals = self.against.trained_on()
        name = next(iter(self.eyes))
        pool = self.references.features(reals, name)
        if seen is None or pool is None:
            return None
        samples = seen.images(16)
        distances, indices = nearest(seen.features[name][: len(samples)], pool, self.args.nearest)
        neighbours = torch.stack([reals[int(i)]["image"] for i in indices.flatten()])
        page = nearest_page(samples, neighbours.unflatten(0, indices.shape), distances)
        path = writable(self.folder / file)
        write_atomically(path, lambda f: page.save(f, format="png"))
        self.accelerator.print(f"wrote {path}")
        return file

    def _save(self) -> None:
        title = f"Evaluation of {self.source.path.name}"
        if len(self.args.checkpoint) > 1:
            title = f"Evaluation of {len(self.args.checkpoint)} checkpoints"
        writable(self.folder / "results.json")
        report.write_results(self.folder, self.rows, title)

    def finish(self) -> None:
        """The table of all results, on the terminal."""
        if not self.accelerator.is_main_process or not self.rows:
            return
        heads, lines = report.columns(self.rows)
        table = [tuple(heads), *(tuple(of + numbers) for of, numbers in lines)]
        print("\n".join(aligned(table)))
        print(f"wrote {self.folder / 'index.html'}, results.csv and results.json")


def _plain(value: Any) -> Any:
    """A flag's value as JSON has it."""
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def _line(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items() if not k.endswith("sha256"))
