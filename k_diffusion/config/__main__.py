"""`python -m k_diffusion.config`: print the JSON Schema of a config file."""

import json

from .schema import json_schema

print(json.dumps(json_schema(), indent=2))
