"""What encode_latents.py does: a data set's images as latents on disk, and their statistics."""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from .. import conditions, distributed
from ..common import options
from ..common.files import check_writable, writable, write_atomically
from ..common.tensors import DTYPES
from ..common.untrusted import get_safetensors_metadata
from ..config import check_code, load_config
from ..data.latent_sources import INFO, open_latents, statistics_file
from ..data.latents import LatentStatistics
from ..encoders.autoencoder import Autoencoder
from ..encoders.text import TextEncoder, encode_texts, encoder_facts, pack_texts
from ..evaluation.reals import RealImages
from ..loading import make_autoencoder


def parse_args(description: str | None = None) -> argparse.Namespace:
    """The command line of encode_latents.py."""
    p = argparse.ArgumentParser(description=description, formatter_class=options.HelpFormatter)
    count: dict[str, Any] = {"type": options.positive, "metavar": "N"}
    add = p.add_argument
    text = "the config of a latent model, with its autoencoder and a data set of images"
    add("--config", type=options.path, metavar="FILE", help=text)
    text = "override a key of it, e.g. autoencoder.location=vae; repeatable"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--output", type=options.path, metavar="FOLDER", help="of the latents; it may hold a part")
    flag = argparse.BooleanOptionalAction
    add("--flips", action=flag, default=True, help="encode mirrored images, too")
    text = "store the captions, which a config with a section text does anyway"
    add("--captions", action="store_true", help=text)
    text = "of the stored moments"
    add("--dtype", choices=list(DTYPES), default="fp32", help=text)
    add("--per-element", action="store_true", help="statistics of each element, not per channel")
    add("--shard-size", default=10_000, **count, help="images in a file")
    add("--batch-size", default=64, **count, help="images encoded at a time")
    add("--num-workers", type=options.few, default=0, metavar="N", help="loading processes")
    add("--device", type=options.text, help="cpu, cuda, ...; else the best there is")
    text = "only measure latents that are there, EDM2's, say, and write the statistics beside them"
    add("--statistics", type=options.path, metavar="PATH", help=text)
    args = p.parse_args()
    if bool(args.statistics) == bool(args.config):
        p.error("pass --config FILE and --output FOLDER, or --statistics PATH")
    if args.config and not args.output:
        p.error("--config needs an --output FOLDER")
    return args


def run(args: argparse.Namespace) -> None:
    """Encodes or measures what the flags ask for.

    Raises ValueError, OSError or ImportError for what can't be done.
    """
    if args.statistics:
        source = open_latents(args.statistics)
        file = statistics_file(source.path)
        check_writable(file)
        found = measure(source.chunks(), args.per_element)
        text = json.dumps({"statistics": found}).encode()
        write_atomically(writable(file), lambda f: f.write(text))
        print(f"wrote {file}: {_brief(found)}")
        return
    device = distributed.check_device(args.device) if args.device else None
    accelerator = distributed.make_accelerator(cpu=args.device == "cpu")
    config = load_config(args.config, args.set, strict=True)
    check_code(args.config, config, args.set)
    if "autoencoder" not in config or config["dataset"]["type"] == "latents":
        raise ValueError(
            f"{args.config} needs an autoencoder section and a data set of images, got "
            f"{'an' if 'autoencoder' in config else 'no'} autoencoder and dataset.type "
            f"{config['dataset']['type']!r}"
        )
    check_writable(args.output / INFO)
    autoencoder = make_autoencoder(config, folders=[".", args.config.parent])
    fingerprint = autoencoder.fingerprint
    autoencoder.to(device or accelerator.device)
    model = config["model"]
    latents = model["input_channels"], *model["input_size"]
    c, h, w = autoencoder.image_shape(latents)
    with accelerator.local_main_process_first():  # one process downloads
        told: dict[str, Any] = {"text": {}} if args.captions else {}
        told |= {k: config[k] for k in conditions.KINDS if config.get(k) is not None}
        conditions.check_images(config, autoencoder)
        images = RealImages(config["dataset"], (h, w), c, args.config.parent, told)
        encoder = conditions.make_text_encoder(config, device or accelerator.device)
    section = {k: v for k, v in config["dataset"].items() if k != "cond_dropout_rate"}
    info = {
        "format": "k-diffusion latents 1",
        "autoencoder": {
            "location": config["autoencoder"]["location"],
            "fingerprint": fingerprint,
            "input_range": [autoencoder.low, autoencoder.high],
        },
        "dataset": section | {"num_classes": images.num_classes},
        "images": len(images),
        "image_shape": [c, h, w],
        "shape": latents,
        "num_classes": images.num_classes,
        "flips": args.flips,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
    }
    if "text" in told:
        info["captions"] = True
    if encoder is not None:
        which = {k: v for k, v in config["text"].items() if k in {"type", "location", "model"}}
        info["text"] = {**which, "fingerprint": encoder.fingerprint(), "length": encoder.max_length}
    if "image_condition" in told:
        kept = {k: v for k, v in told["image_condition"].items() if k != "dropout_rate"}
        info["image_condition"] = kept
    shards = Shards(args, autoencoder, images, info, encoder)
    error = None
    try:
        shards.encode(accelerator)
    except (ValueError, OSError) as caught:  # told to the others, who would wait
        error = caught
    distributed.end_together(accelerator, error)
    if accelerator.is_main_process:
        shards.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


class Shards:
    """The files of a folder of latents, each written whole; those that are there are kept.

    Raises ValueError where the folder holds those of another autoencoder or other settings.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        autoencoder: Autoencoder,
        images: RealImages,
        info: dict[str, Any],
        encoder: TextEncoder | None = None,
    ):
        self.args, self.autoencoder, self.images, self.info = args, autoencoder, images, info
        self.encoder = encoder
        self.folder: Path = args.output
        self.count = math.ceil(len(images) / args.shard_size)
        key = images.key()  # of the data set, its files' dates among it
        self.plan = json.dumps({**info, "images_key": key}, sort_keys=True, default=str)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._check(path)

    def _path(self, k: int) -> Path:
        return self.folder / f"latents_{k:05}.safetensors"

    def _check(self, path: Path) -> bool:
        """Whether a file is whole. Raises ValueError for one of another plan."""
        try:
            metadata = get_safetensors_metadata(path)
        except ValueError:  # damaged: written anew
            return False
        if metadata.get("plan") == self.plan:
            return True
        plan = json.loads(metadata.get("plan", "{}"))
        for key, what in ("autoencoder", "autoencoder"), ("text", "text encoder"):
            theirs, ours = (x.get(key, {}).get("fingerprint") for x in (plan, self.info))
            if theirs and ours and theirs != ours:
                raise ValueError(
                    f"{path} holds latents of another {what} (fingerprint {theirs}) than this one "
                    f"({ours}); choose another --output"
                )
        raise ValueError(
            f"{path} holds latents of another data set or other flags; choose another --output"
        )

    def encode(self, accelerator: Any) -> None:
        """Write this process's share of the files."""
        todo = [
            k
            for k in distributed.share(accelerator, self.count)
            if not (self._path(k).exists() and self._check(self._path(k)))
        ]
        if todo and self.folder.is_dir():  # what --statistics measured of the files before
            statistics_file(self.folder).unlink(missing_ok=True)
        sizes = [len(self._rows(k)) for k in todo]
        if accelerator.is_main_process:
            kept = self.count - len(todo) if accelerator.num_processes == 1 else 0
            done = f", {kept} of them done" if kept else ""
            print(f"{len(self.images):,} images in {self.count} files{done}")
        hidden = None if accelerator.is_main_process else True
        with tqdm(total=sum(sizes), desc="encoding", unit="image", disable=hidden) as bar:
            for k in todo:
                facts = {"plan": self.plan, **(encoder_facts(self.encoder) if self.encoder else {})}
                data = save(self._encode(k, bar), facts)
                write_atomically(writable(self._path(k)), partial(_write, data), len(data))

    def _rows(self, k: int) -> range:
        size = self.args.shard_size
        return range(k * size, min((k + 1) * size, len(self.images)))

    @torch.no_grad()
    def _encode(self, k: int, bar: Any) -> dict[str, Tensor]:
        device, dtype = self.autoencoder.shift.device, DTYPES[self.args.dtype]
        parts: dict[str, list[Tensor]] = defaultdict(list)
        captions: list[str] = []
        batch, workers = self.args.batch_size, self.args.num_workers
        section = self.info.get("image_condition")
        for items in self.images.items(self._rows(k), batch, workers):
            images = items["image"].to(device)
            told = items.get("paired_original", images).to(device)
            for ending in ("", "_flip")[: 1 + self.args.flips]:
                x, y = (z.flip(3) if ending else z for z in (images, told))
                parts[f"moments{ending}"].append(self.autoencoder.encode(x).to("cpu", dtype))
                if section is not None:
                    y = conditions.of_images(section, y)["unet_cond"]
                    mean = conditions.moments_of(y, self.autoencoder).chunk(2, 1)[0]
                    parts[f"condition{ending}"].append(mean.to("cpu", dtype))
            parts["labels"].append(items["class"].long())
            captions += items.get("caption", [])
            bar.update(len(images))
        found = {name: torch.cat(tensors) for name, tensors in parts.items()}
        if bad := [name for name, x in found.items() if not x.isfinite().all()]:
            raise ValueError(
                f"the {bad[0]} of {self._path(k)} aren't finite in {self.args.dtype}; choose "
                "another --dtype, or an autoencoder that fits the images"
            )
        return found | (self._texts(captions) if captions else {})

    def _texts(self, captions: list[str]) -> dict[str, Tensor]:
        """The captions of a file, each once, which of them its images have, and their encoding."""
        places = {text: i for i, text in enumerate(dict.fromkeys(captions))}
        found = {"captions": torch.tensor([places[text] for text in captions])}
        if self.encoder is None:
            return {**found, "texts": pack_texts([*places])}
        return {**found, **encode_texts(self.encoder, places, self.args.batch_size)}

    def finish(self) -> None:
        """Measure all latents, and write what is known of them: from now on they can be read."""
        info = {**self.info, "shards": [self._path(k).name for k in range(self.count)]}
        shown = tqdm(self._chunks(), desc="statistics", unit="part", disable=None)
        info["statistics"] = measure(shown, self.args.per_element)
        text = json.dumps(info, indent=2).encode()
        write_atomically(self.folder / INFO, lambda f: f.write(text))
        print(f"wrote {self.folder}: {_brief(info['statistics'])}")

    def _chunks(self) -> Iterator[Tensor]:
        for k in range(self.count):
            stored = load_file(self._path(k))
            for name in ("moments", "moments_flip")[: 1 + self.args.flips]:
                yield from stored[name].split(256)


def _write(data: bytes, file: Any) -> None:
    file.write(data)


def measure(chunks: Iterable[Tensor], per_element: bool) -> dict[str, Any]:
    """The statistics of moments. chunks: of (n, 2 c, h, w)."""
    statistics = LatentStatistics()
    for moments in chunks:
        statistics.update(moments)
    return statistics.result(per_element)


def _brief(found: dict[str, Any]) -> str:
    """Statistics in a line, per channel."""
    mean, std = (torch.tensor(found[key]) for key in ("mean", "std"))
    if mean.ndim == 3:
        mean, std = mean.mean((1, 2)), std.square().mean((1, 2)).sqrt()
    shown = (" ".join(f"{x:.4g}" for x in values.tolist()) for values in (mean, std))
    return "mean {}, standard deviation {} of the channels".format(*shown)
