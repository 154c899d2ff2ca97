"""Load a config, check it against the schema, and say clearly what is wrong with it."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jsonmerge import merge
from pydantic import ValidationError

from ..checkpoints import read_checkpoint
from ..common.files import check_readable
from ..common.options import UsageError
from ..common.untrusted import get_safetensors_metadata
from . import schema
from .base import ConfigError, unknown_type
from .model_schema import KLAutoencoderModel, Model


class OverrideError(ConfigError, UsageError):
    """An override that isn't KEY.PATH=VALUE: a wrong flag, and no wrong config."""


# The endings of training checkpoints and of inference checkpoints.
CHECKPOINTS = {".pth", ".pt", ".ckpt", ".safetensors"}

# ---------------------------------------------------------------- loading


def load_config(
    path_or_dict: str | Path | Mapping[str, Any] | IO[str],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    strict: bool = False,
) -> dict[str, Any]:
    """Load a config and fill in its defaults.

    path_or_dict: a .json file, an inference checkpoint (.safetensors), a training checkpoint
    (.pth), an open file or a dict. overrides: laid over it, as a dict or as `key.path=value` texts
    whose values are JSON or else strings; another `type` replaces its whole section. strict: of
    files but not of checkpoints, whether unknown keys and types are errors, as they are to the
    scripts. By default they are kept, with a warning that names the nearest valid one.
    Returns a plain dict.

    Raises ConfigError naming the path of a bad key or value and the nearest valid one.
    """
    raw, from_checkpoint = _read(path_or_dict)
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides)
    typed = parse(_overridden(raw, overrides), strict=strict and not from_checkpoint)
    # sections of unknown types are not of the fields' types
    sections = "autoencoder", "text", "image_condition"
    optional = {key for key in sections if getattr(typed, key) is None}
    dumped = typed.model_dump(warnings="none", exclude=optional)
    return dumped | {"model": _dump_model(typed.model)}


def _overridden(raw: Mapping[str, Any], overrides: Mapping[str, Any], path: str = "") -> Any:
    """A config with overrides laid over it; a section gets another `type` as a whole.

    Raises ConfigError for a key of what is no section.
    """
    out = dict(raw)
    for key, value in overrides.items():
        here, old = f"{path}.{key}" if path else str(key), raw.get(key)
        if not isinstance(value, Mapping) or old is None:
            out[key] = value
        elif not isinstance(old, Mapping):
            raise ConfigError(f"{here} is {old!r} and no section, so it has no key {_first(value)}")
        elif isinstance(value.get("type"), str) and value["type"] != old.get("type"):
            out[key] = dict(value)  # the keys of another type would not fit
        else:
            out[key] = _overridden(old, value, here)
    return out


def _first(section: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in section)


def code_of(dataset: Mapping[str, Any]) -> str | None:
    """What a `dataset` section has run to make the data: a Python file, a command, or nothing."""
    location = dataset.get("location")
    if dataset["type"] == "custom":
        return f"the Python file {location}"
    return f"the command {location}" if str(location).startswith("pipe:") else None


def check_code(source: str | Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raises ConfigError before code runs that only a checkpoint names.

    source: where the config comes from. A custom data set's file of a checkpoint's config, or a
    command of streamed shards, has to be named again by an override.
    """
    code = code_of(config["dataset"])
    named = "location" in parse_overrides(overrides).get("dataset", {})
    if code and Path(source).suffix in CHECKPOINTS and not named:
        raise ConfigError(
            f"{source} names {code} to make its data set; a checkpoint's code isn't run unless you "
            "name it: --set dataset.location=..."
        )


def _dump_model(model: Model | KLAutoencoderModel) -> dict[str, Any]:
    """The section, without what is left open in a density, which is filled in from the rest of the
    model when it is made, and in attention, whose backend is chosen when it runs."""
    section = model.model_dump(warnings="none")
    if isinstance(density := section.get("sigma_sample_density"), dict):
        section["sigma_sample_density"] = _given(density)
    if isinstance(attns := section.get("self_attns"), list):
        section["self_attns"] = [_given(a) if isinstance(a, dict) else a for a in attns]
    return section


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _read(source: str | Path | Mapping[str, Any] | IO[str]) -> tuple[dict[str, Any], bool]:
    """The raw config, and whether it comes out of a checkpoint."""
    if isinstance(source, Mapping):
        return dict(source), False
    if not isinstance(source, str | Path):
        return _loads(source.read(), getattr(source, "name", "the open file")), False
    path = Path(source)
    if path.suffix == ".safetensors":
        metadata = get_safetensors_metadata(path)
        if "config" not in metadata:
            raise ConfigError(f"{path} has no config in its metadata; pass a .json config")
        return _loads(metadata["config"], path), True
    if path.suffix in CHECKPOINTS:
        return read_checkpoint(path, only=())["config"], True
    try:
        check_readable(path, "config file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at {error.start}") from None
    except OSError as error:
        raise ConfigError(str(error)) from None
    return _loads(text, path), False


def _loads(text: str, name: object) -> dict[str, Any]:
    try:
        raw = _json(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name} nests too deep; a config has about four levels") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{name} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _json(text: str) -> Any:
    """JSON, in which a key stands once and numbers are finite. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
        if twice:
            raise ConfigError(f"the key {twice[0]!r} stands there twice; leave one of them")
        return dict(pairs)

    def constant(name: str) -> Any:
        raise ConfigError(f"numbers must be finite, got {name}; leave out a bound that isn't one")

    def number(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else constant(digits)

    return json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=number)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["model.patch_size=[2,2]", "dataset.location=x"]` as a nested dict. Raises OverrideError."""
    result: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            raise OverrideError(f"an override is KEY.PATH=VALUE, got {text!r}")
        try:
            parsed: Any = _json(value)
        except ConfigError as error:
            raise OverrideError(f"{text!r}: {error}") from None
        except ValueError:
            parsed = value
        except RecursionError:
            raise OverrideError(f"the value of {key} nests too deep") from None
        for part in reversed(keys):
            parsed = {part: parsed}
        result = merge(result, parsed)
    return result


# ---------------------------------------------------------------- checking


def parse(raw: Mapping[str, Any], strict: bool = False) -> schema.Config:
    """The typed config. strict: as of `load_config`. Raises ConfigError."""
    raw = dict(raw)
    model = raw.get("model")
    model_type = model.get("type") if isinstance(model, Mapping) else None
    for key, defaults in schema.TRAINING_DEFAULTS.get(str(model_type), {}).items():
        section = raw.get(key, {})
        if (
            isinstance(section, Mapping)
            and section.get("type", defaults["type"]) == defaults["type"]
        ):
            raw[key] = merge(defaults, dict(section))
    try:
        return schema.Config.model_validate(_with_types(raw), context={"strict": strict})
    except ValidationError as error:
        # of a key that may be this or that, what is wrong with it as this
        lines: dict[str, str] = {}
        for line in (_describe(e, raw) for e in error.errors()):
            lines.setdefault(line.split(": ")[0], line)
        raise ConfigError("; ".join(lines.values())) from None


def _with_types(raw: dict[str, Any]) -> dict[str, Any]:
    """A section other than the model that doesn't say its type has the default one."""
    for key, default in schema.DEFAULT_TYPES.items():
        section = raw.get(key)
        if isinstance(section, Mapping) and "type" not in section:
            raw[key] = {"type": default, **section}
    return raw


def _describe(error: Any, raw: Any) -> str:
    """One pydantic error as `path: what is wrong`."""
    path, at = "", raw
    for part in error["loc"]:
        if isinstance(at, Mapping) and part in at:
            path, at = f"{path}.{part}" if path else str(part), at[part]
        elif isinstance(part, int) and isinstance(at, list) and part < len(at):
            path, at = f"{path}[{part}]", at[part]
        elif error["type"] == "missing" and part == error["loc"][-1]:
            path = f"{path}.{part}" if path else str(part)
        # any other part is the name of a row of a union, which isn't in the file
    context = error.get("ctx", {})
    if error["type"] == "union_tag_invalid":
        return f"{path}.type: {unknown_type(context)}"
    if error["type"] == "union_tag_not_found":
        return f"{path}: needs a 'type'"
    if error["type"] == "missing":
        return f"{path}: is required"
    path = ".".join(filter(None, [path, context.get("where", "")]))
    if error["type"] in {"unknown_key", "rule"}:
        return f"{path}: {error['msg']}" if path else error["msg"]
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"{path}: {message}, got {error['input']!r}"
