"""Packages that not every user needs."""

import importlib
from types import ModuleType


def need(module: str, what: str, install: str = '"k-diffusion[train]"') -> ModuleType:
    """Import a module, or raise an ImportError that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {module.split('.')[0]}; install it with: pip install {install}"
        ) from error
