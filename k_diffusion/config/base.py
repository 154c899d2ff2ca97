"""What every typed section of a config shares."""

import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from PIL import ImageColor
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ..common.text import did_you_mean


class ConfigError(ValueError):
    """A config that breaks a rule; says where, what it got and what would do."""


class Section(BaseModel):
    """A part of the config; unknown keys are kept with a warning or, if strict, an error."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        # editors hold config files against the schema, and those are read strictly
        json_schema_extra={"additionalProperties": False},
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        known = [name for field in cls.model_fields.items() for name in _names(*field)]
        unknown = [key for key in data if key not in known]
        if not unknown:
            return data
        text = "; ".join(f"unknown key {k!r}{did_you_mean(k, known)}" for k in unknown)
        if is_strict(info):
            raise PydanticCustomError("unknown_key", "{text}", {"text": text})
        warnings.warn(f"without effect in {cls.__name__}: {text}", stacklevel=2)
        return data


def is_strict(info: ValidationInfo) -> bool:
    """Whether a config file is read for a script, to which every part of it must mean something."""
    return bool(info.context and info.context.get("strict"))


def keep_unknown(foreign: Callable[..., Section]) -> WrapValidator:
    """Of a union told apart by `type`: a section of an unknown type is kept with a warning.

    foreign: makes such a section out of its keys. If strict, an unknown type is an error.
    """

    def validate(value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            first = error.errors()[0]
            unknown = first["type"] == "union_tag_invalid" and not first["loc"]
            if is_strict(info) or not unknown or not isinstance(value, Mapping):
                raise
        warnings.warn(f"kept as it is: {unknown_type(first['ctx'])}", stacklevel=2)
        return foreign(**value)

    return WrapValidator(validate)


def unknown_type(context: Mapping[str, Any]) -> str:
    """What is wrong with a `type`. context: of pydantic's error."""
    valid = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
    near = did_you_mean(context["tag"], valid)
    return f"unknown type {context['tag']!r}{near}; there are: {', '.join(valid)}"


def _names(name: str, field: FieldInfo) -> list[str]:
    """The names that a key goes by."""
    if isinstance(field.validation_alias, AliasChoices):
        return [str(choice) for choice in field.validation_alias.choices]
    return [field.alias or name]


def fail(text: str, where: str = "") -> PydanticCustomError:
    """To raise where a rule between keys is broken; `where` is the path within the section."""
    return PydanticCustomError("rule", "{text}", {"text": text, "where": where})


def _pair(value: Any) -> Any:
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


def _colour(text: str) -> str:
    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise fail(f"needs a colour such as 'white' or '#ff8000', got {text!r}") from None
    return text


# Beyond the bounds nothing is made, and counting what it would take would itself take for ever.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Depth = Annotated[int, Field(ge=0, le=1000)]
PositiveDepth = Annotated[int, Field(gt=0, le=1000)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
LogLevel = Annotated[float, Field(ge=-80, le=80)]  # float32 ends at e^88
Size = Annotated[list[Positive], Field(min_length=2, max_length=2), BeforeValidator(_pair)]
Colour = Annotated[str, AfterValidator(_colour)]
