"""Config files: load, check, and make the things that they describe.

A config is a plain dict (checkpoints embed it); `schema` holds its typed models, defaults and
rules.
"""

from .base import ConfigError
from .load import check_code, code_of, load_config, parse_overrides
from .make import make_denoiser_wrapper, make_model, make_sample_density
from .model_schema import round_to_power_of_two

__all__ = [
    "ConfigError",
    "check_code",
    "code_of",
    "load_config",
    "make_denoiser_wrapper",
    "make_model",
    "make_sample_density",
    "parse_overrides",
    "round_to_power_of_two",
]
