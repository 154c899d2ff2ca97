"""Load a config, check it against the schema, and say clearly what is wrong with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jsonmerge import merge
from pydantic import ValidationError

from ..checkpoints import read_checkpoint
from ..common.files import get_safetensors_metadata
from . import schema
from .base import ConfigError, unknown_type
from .model_schema import Model

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
    for key, section in overrides.items():
        # the keys of another type would not fit
        if isinstance(section, Mapping) and "type" in section and isinstance(raw.get(key), Mapping):
            raw = raw if raw[key].get("type") == section["type"] else {**raw, key: {}}
    typed = parse(merge(raw, dict(overrides)), strict=strict and not from_checkpoint)
    # sections of unknown types are not of the fields' types
    return typed.model_dump(warnings="none") | {"model": _dump_model(typed.model)}


def _dump_model(model: Model) -> dict[str, Any]:
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
    if path.suffix in {".pth", ".pt", ".ckpt"}:
        return read_checkpoint(path)["config"], True
    try:
        return _loads(path.read_text(), path), False
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}") from None


def _loads(text: str, name: object) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{name} must hold a JSON object, got {type(raw).__name__}")
    return raw


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["model.patch_size=[2,2]", "dataset.location=x"]` as a nested dict."""
    result: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is KEY.PATH=VALUE, got {text!r}")
        try:
            parsed: Any = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        for part in reversed(key.strip().split(".")):
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
        raise ConfigError("\n".join(_describe(e, raw) for e in error.errors())) from None


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
