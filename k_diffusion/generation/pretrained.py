"""Models that one shares: images of them in a line, and folders and repositories with them.

model = K.load("digits_00000600.pth")
K.sample(model, n=16)[0].save("digit.png")
K.push_to_hub(model, "me/digits")
"""

import json
import math
import operator
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from .. import checkpoints, conditions, generation, sampling
from ..common import hub, numbers
from ..common.files import writable, write_atomically, write_folder
from ..common.images import PIL_MODES, from_pil_image, grid_columns, image_grid, to_pil_image
from ..common.modules import n_params
from ..common.tensors import DTYPES
from ..common.text import unknown_name
from ..encoders.autoencoder import Autoencoder
from ..evaluation import report
from ..guidance import CFGDenoiser
from ..loading import AUTOENCODER, CONFIG, TEXT_ENCODER, VAE, WEIGHTS, Loaded, Picture, load
from ..models.autoencoder import KLAutoencoder

GRID = "samples.png"

# Numbers of evaluate.py: its results.json or the rows of it; or numbers by their names.
Metrics: TypeAlias = str | Path | Sequence[Mapping[str, Any]] | Mapping[str, float]


def sample(
    model: nn.Module | str | Path,
    n: int = 16,
    classes: int | Sequence[int] | torch.Tensor | None = None,
    seed: int = 0,
    sampler: str = "dpmpp_2m",
    steps: int = 32,
    cfg_scale: float = 1.0,
    schedule: str = "karras",
    batch_size: int = 64,
    prompts: str | Sequence[str] = (),
    condition_images: Picture | Sequence[Picture] = (),
) -> list[Image.Image]:
    """Images of a model that `load` gave, as n 8-bit PIL images.

    model: what `load` returns, or guidance around it; or what `load` takes, to load it each time.
    classes: an id, or ids that the images have in turn, also as a tensor (m,) or an array; by
    default all of the model's. seed: image i has seed + i, whatever n and batch_size. sampler: a
    row of `sampling.SAMPLERS`. steps: from sigma_max down to 0. cfg_scale: strength of
    classifier-free guidance, away from all conditions that training left out; 1 for none. schedule:
    a row of `sampling.SCHEDULES`. prompts: texts that the images have in turn, of a model that
    takes texts; by default those of its config. condition_images: pictures or their files, in turn,
    of a model that takes images, such as small ones for super-resolution.

    Raises TypeError for a model without a config, ValueError for an unknown name, for classes that
    the model hasn't got, or images of other channels than pictures have; and what `load` raises.
    """
    numbers.count(n=n, seed=seed)
    numbers.count(1, batch_size=batch_size)
    if isinstance(model, str | Path):
        model = load(model)
    loaded = _loaded(model)
    if loaded.image_shape[0] not in PIL_MODES:
        raise ValueError(
            f"the model's images have {loaded.image_shape[0]} channels; pictures have "
            f"{', '.join(map(str, PIL_MODES))}; use generation.generate for tensors"
        )
    ids = range(loaded.num_classes) if classes is None else _class_ids(classes)
    device = next(iter(model.parameters()), torch.empty(0)).device
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(condition_images, str | Path | Image.Image):
        condition_images = [condition_images]
    given = loaded.given(prompts, condition_images, device)
    if cfg_scale != 1:
        absent = conditions.null(loaded.config, "cfg_scale")
        null: dict[str, Any] = {name: x.to(device) for name, x in absent.items()}
        model = CFGDenoiser(model, cfg_scale, **null)
    batches = generation.generate(
        model,
        loaded.shape,
        range(seed, seed + n),
        sampling.make_sigmas(schedule, steps, loaded.sigma_min, loaded.sigma_max),
        classes=[ids[i % len(ids)] for i in range(n)] if ids else None,
        num_classes=loaded.num_classes,
        sampler=sampler,
        batch_size=batch_size,
        device=device,
        given=given,
    )
    return [to_pil_image(image) for batch in batches for image in batch]


def _class_ids(classes: Any) -> list[int]:
    """Class ids from a whole number or some, as a sequence, an array or a tensor (m,)."""
    got = classes.tolist() if hasattr(classes, "tolist") else classes
    try:
        ids = [operator.index(i) for i in (got if isinstance(got, Iterable) else [got])]
    except TypeError:
        ids = []
    if not ids:
        raise ValueError(
            f"classes must be a class id, a whole number, or a sequence of them, got {classes!r}; "
            "leave it out for all classes"
        )
    return ids


def _loaded(model: nn.Module) -> Loaded:
    """The model that `load` gave, within its guidance."""
    found = (m for m in model.modules() if isinstance(m, Loaded))
    if (loaded := next(found, None)) is None:
        raise TypeError(
            f"needs a model of K.load, which knows its config, got {type(model).__name__}; use "
            "K.sampling.sample for other denoisers"
        )
    return loaded


def save_pretrained(
    model: Loaded,
    folder: str | Path,
    metrics: Metrics | None = None,
    *,
    dtype: str = "fp32",
    samples: int = 16,
) -> None:
    """Write a folder that `load` reads: weights, encoders, config, a model card, samples.

    model: of `load`. metrics: for the card: the results.json of evaluate.py, its rows, or numbers
    by name. dtype: of the weights; fp32, fp16 or bf16. samples: images on the grid; 0 leaves it
    out, as do images that aren't pictures, texts without text.prompts and images as conditions.
    Files are model.safetensors, config.json, README.md and samples.png; an autoencoder is in
    autoencoder.safetensors, one of diffusers in the folder vae, a text encoder with its tokenizer
    in the folder text_encoder. Raises OSError, ValueError, and TypeError for another model, before
    it writes anything.
    """
    rows, samples = _checked(model, metrics, dtype, samples)
    _write(model, Path(folder), Path(folder).resolve().name, rows, dtype, samples)


def push_to_hub(
    model: Loaded,
    repo_id: str,
    metrics: Metrics | None = None,
    *,
    dtype: str = "fp32",
    samples: int = 16,
    private: bool = False,
    folder: str | Path | None = None,
) -> str:
    """Upload what `save_pretrained` writes to a repository of the Hugging Face hub.

    repo_id: OWNER/NAME, made if need be. private: a new repository is seen by its owner alone.
    folder: keeps the files there; others that lie there are not uploaded. The other arguments: as
    of `save_pretrained`. Returns the commit's address. Raises HubError where the hub refuses or
    can't be reached, before it samples.
    """
    rows, samples = _checked(model, metrics, dtype, samples)
    hub.make_repository(repo_id, private)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        files = _write(model, Path(place), repo_id, rows, dtype, samples)
        return hub.upload(Path(place), repo_id, files)


def _checked(
    model: Loaded, metrics: Metrics | None, dtype: str, samples: int
) -> tuple[Sequence[Mapping[str, Any]], int]:
    """The rows of metrics, and the number of samples that the grid will have, 0 for none.

    Raises what `save_pretrained` does; its text encoder, which may be missing, is loaded.
    """
    if not isinstance(model, Loaded):
        raise TypeError(
            f"needs a model of K.load, which knows its config, got {type(model).__name__}; pass "
            "what K.load returned, without guidance around it"
        )
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    numbers.count(samples=samples)
    rows = _rows(metrics)
    model.text_encoder()
    texts = model.config.get("text")
    told = model.config.get("image_condition") or (texts and not texts["prompts"])
    return rows, 0 if told or model.image_shape[0] not in PIL_MODES else samples


def _write(
    model: Loaded,
    folder: Path,
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    dtype: str,
    samples: int,
) -> list[str]:
    """Writes the files of `save_pretrained`, whose names it returns; the card calls it `name`.

    metrics, samples: as `_checked` has them.
    """
    path = writable(folder / WEIGHTS)
    config, files = _write_encoders(model, folder)
    files += [WEIGHTS, CONFIG, "README.md"]
    checkpoints.write_inference(path, config, model.inner_model.state_dict(), dtype)
    as_json = json.dumps(config, indent=2).encode()
    write_atomically(folder / CONFIG, lambda file: file.write(as_json))
    if samples:
        images = torch.stack([from_pil_image(image) for image in sample(model, samples)])
        labels = [i % model.num_classes for i in range(samples)] if model.num_classes else None
        columns = grid_columns(model.num_classes, samples, *model.image_shape[1:])
        grid = image_grid(images, columns, labels=labels)
        write_atomically(folder / GRID, lambda file: grid.save(file, "PNG"))
        files.append(GRID)
    card = model_card(model, name, metrics, GRID if samples else None)
    write_atomically(folder / "README.md", lambda file: file.write(card.encode()))
    return files


def _write_encoders(model: Loaded, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Writes the encoders of a model; the config that names them there, and their files."""
    config: dict[str, Any] = dict(model.config)
    files: list[str] = []
    if (coder := model.autoencoder) is not None:
        place, network = _place(coder), coder.network
        if place == AUTOENCODER:
            _write_autoencoder(coder, folder / AUTOENCODER)
            files = [AUTOENCODER]
        elif place == VAE:
            written = write_folder(folder / VAE, network.save_pretrained)
            files = [f"{VAE}/{name}" for name in written]
        # a path of this machine is of no use to others, and none of their business
        location = place or Path(config["autoencoder"]["location"]).name
        config["autoencoder"] = {**config["autoencoder"], "location": location}
    if (encoder := model.text_encoder()) is not None:
        written = write_folder(folder / TEXT_ENCODER, encoder.save)
        section = {**config["text"], "location": TEXT_ENCODER, "precomputed": None}
        if section["type"] == "open_clip":
            section["location"] += f"/{written[0]}"
        else:
            section["tokenizer"] = None
        config["text"] = section
        files += [f"{TEXT_ENCODER}/{name}" for name in written]
    return config, files


def _place(autoencoder: Autoencoder) -> str | None:
    """The file or folder that an autoencoder is written to; None for one of another class."""
    if isinstance(autoencoder.network, KLAutoencoder):
        return AUTOENCODER
    return VAE if hasattr(autoencoder.network, "save_pretrained") else None


def _write_autoencoder(autoencoder: Autoencoder, path: Path) -> None:
    weights = autoencoder.network.state_dict()
    if autoencoder.config is not None:
        checkpoints.write_inference(path, autoencoder.config, weights, "fp32")
    else:  # its weights tell its architecture
        write_atomically(path, lambda file: file.write(save(weights)))


def _rows(metrics: Metrics | None) -> Sequence[Mapping[str, Any]]:
    """Metrics as rows of evaluate.py's results. Raises ValueError."""
    if metrics is None:
        return []
    source = "metrics"
    rows: Any = metrics
    if isinstance(metrics, str | Path):
        source = str(metrics)
        try:
            rows = json.loads(Path(metrics).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{source} is not JSON: {error}; pass a results.json") from None
    if isinstance(rows, Mapping):
        rows = [{"metric": name, "value": value} for name, value in rows.items()]
    if not isinstance(rows, Sequence):
        raise ValueError(f"{source} must be a list of rows, got {rows!r}; pass a results.json")
    for row in rows:
        if not (isinstance(row, Mapping) and "metric" in row and "value" in row):
            raise ValueError(f"{source}: a row needs 'metric' and 'value', got {row!r}")
        if not isinstance(row["value"], int | float | None):
            raise ValueError(f"{source}: {row['metric']} must be a number, got {row['value']!r}")
    return [row for row in rows if row["value"] is not None and math.isfinite(row["value"])]


def model_card(
    model: Loaded,
    name: str,
    metrics: Sequence[Mapping[str, Any]] = (),
    picture: str | None = None,
) -> str:
    """The hub's page of a model, Markdown after a YAML header, from its config and metrics.

    name: what `load` takes. metrics: rows of evaluate.py's results.json. picture: a file beside it.
    """
    config, data = model.config["model"], model.config["dataset"]["type"]
    texts = model.config.get("text")
    images = model.config.get("image_condition")
    told = texts or images
    kind = "Class-conditional" if model.num_classes else "Conditional" if told else "Unconditional"
    given = f", prompts={json.dumps(texts['prompts'][:2] or ['...'])}" if texts else ""
    given += ', condition_images=["photo.png"]' if images else ""
    task = "text-to-image" if texts else "unconditional-image-generation"
    task = "image-to-image" if images else task
    header: dict[str, Any] = {
        "library_name": "k-diffusion",
        "pipeline_tag": task,
        "tags": ["k-diffusion", "diffusion", config["type"]],
    }
    if metrics:
        measured = [
            {"type": str(row["metric"]).lower(), "name": report.name_of(dict(row))}
            | {"value": row["value"]}
            for row in metrics
        ]
        result = {"task": {"type": task}, "dataset": {"name": data, "type": data}}
        index = [{"name": name, "results": [result | {"metrics": measured}]}]
        header["model-index"] = index
    c, h, w = model.image_shape
    latents, needs = {}, ""
    if (coder := model.autoencoder) is not None:
        which = _place(coder)
        if which is None:
            needs = ', autoencoder="PATH"'
            which = f"not among the files, fingerprint {coder.fingerprint}"
        latents = {"latents": " x ".join(map(str, model.shape)), "autoencoder": which}
    facts = {
        "images": f"{h} x {w} pixels, {c} channel{'s' if c > 1 else ''}, in [-1, 1]",
        **latents,
        "classes": str(model.num_classes or "none"),
        "texts": f"{texts['type']}, {TEXT_ENCODER}" if texts else "none",
        "data set": data,
        "network": f"{config['type']}, {n_params(model.inner_model):,} parameters",
        "noise levels": f"{model.sigma_min:g} to {model.sigma_max:g}",
        "standard deviation of the data": f"{config['sigma_data']:g}",
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),  # JSON is YAML
        "---",
        "",
        f"# {Path(name).name}",
        "",
        *([f"![samples]({picture})", ""] if picture else []),
        f"{kind} diffusion model after Karras et al. (2022), trained with k-diffusion.",
        "",
        "```python",
        "import k_diffusion as K",
        "",
        f"model = K.load({json.dumps(name)}{needs})",
        f"images = K.sample(model, n=16, seed=0{given})  # PIL images",
        "```",
        "",
        *_table([("", ""), *facts.items()]),
    ]
    if metrics:
        rows = [
            (report.name_of(dict(row)), report.number(dict(row)), str(row.get("line", "")))
            for row in metrics
        ]
        lines += ["", "## Evaluation", "", *_table([("metric", "value", "protocol"), *rows])]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table of Markdown; the first row is its head."""
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
