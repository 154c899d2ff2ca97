"""What every typed section of a config shares."""

import warnings
from typing import Annotated, Any

from PIL import ImageColor
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ..common.text import did_you_mean


class ConfigError(ValueError):
    """A config that breaks a rule; says where, what it got and what would do."""


class Section(BaseModel):
    """A part of the config in which unknown keys are an error, or with lenient=True a warning."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

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
        if info.context and info.context.get("lenient"):
            warnings.warn(f"ignored in {cls.__name__}: {text}", stacklevel=2)
            return {key: value for key, value in data.items() if key in known}
        raise PydanticCustomError("unknown_key", "{text}", {"text": text})


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


Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Size = Annotated[list[Positive], Field(min_length=2, max_length=2), BeforeValidator(_pair)]
Colour = Annotated[str, AfterValidator(_colour)]
