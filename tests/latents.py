"""A tiny autoencoder on disk, and a config of a model of its latents of digits."""

import copy
import json

import runs
import torch

import k_diffusion as K
from k_diffusion import checkpoints

AUTOENCODER = {
    "model": {
        "type": "kl_autoencoder",
        "input_channels": 1,
        "input_size": [8, 8],
        "latent_channels": 2,
        "channels": [8, 8],
        "depth": 1,
        "num_groups": 4,
    },
    "dataset": {"type": "digits"},
}


def write_autoencoder(path, seed=0):
    """A .safetensors with random weights, that can't be told from a trained one."""
    config = K.config.load_config(AUTOENCODER)
    torch.manual_seed(seed)
    weights = K.config.make_model(config).state_dict()
    checkpoints.write_inference(path, config, weights, "fp32")


def config(**sections):
    """A raw config; each section is laid over the tiny one, unless it has a type."""
    raw = copy.deepcopy(runs.TINY)
    raw["model"] |= {
        "input_channels": 2,
        "input_size": [4, 4],
        "patch_size": [1, 1],
        "depths": [1],
        "widths": [16],
        "self_attns": [{"type": "global", "d_head": 16}],
        "sigma_data": 0.5,
    }
    raw["autoencoder"] = {"location": "ae.safetensors"}
    for name, section in sections.items():
        raw[name] = section if "type" in section else {**raw[name], **section}
    return raw


def write(folder, **sections):
    """The autoencoder and the config, latent.json, in a folder."""
    write_autoencoder(folder / "ae.safetensors")
    (folder / "latent.json").write_text(json.dumps(config(**sections)))
