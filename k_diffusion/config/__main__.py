"""Print the JSON Schema of a config file, or the config of a checkpoint with all its defaults."""

import argparse
import json

from ..common import options
from .load import load_config
from .schema import json_schema


@options.friendly_errors
def main() -> None:
    p = argparse.ArgumentParser(prog="python -m k_diffusion.config", description=__doc__)
    text = "an inference (.safetensors) or training (.pth) checkpoint, or a config file"
    p.add_argument("checkpoint", nargs="?", type=options.path, help=text)
    path = p.parse_args().checkpoint
    print(json.dumps(json_schema() if path is None else load_config(path), indent=2))


if __name__ == "__main__":
    main()
