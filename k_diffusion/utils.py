"""The published names of `k_diffusion.utils`, which live in other modules.

For programs that use them; nothing in this package imports from here.
"""

from .common.files import CSVLogger, download_file
from .common.images import CorruptImageError, from_pil_image, open_image, to_pil_image
from .common.modules import eval_mode, n_params, tf32_mode, train_mode
from .common.tensors import append_dims
from .common.untrusted import get_safetensors_metadata
from .data.datasets import FolderOfImages, hf_datasets_augs_helper
from .densities import (
    enable_stratified,
    enable_stratified_accelerate,
    rand_cosine_interpolated,
    rand_log_logistic,
    rand_log_normal,
    rand_log_uniform,
    rand_split_log_normal,
    rand_v_diffusion,
    stratified_uniform,
    stratified_with_settings,
)
from .training.ema import EMAWarmup, ema_update, ema_update_dict
from .training.lr_schedules import ConstantLRWithWarmup, ExponentialLR, InverseLR

__all__ = [
    "CSVLogger",
    "ConstantLRWithWarmup",
    "CorruptImageError",
    "EMAWarmup",
    "ExponentialLR",
    "FolderOfImages",
    "InverseLR",
    "append_dims",
    "download_file",
    "ema_update",
    "ema_update_dict",
    "enable_stratified",
    "enable_stratified_accelerate",
    "eval_mode",
    "from_pil_image",
    "get_safetensors_metadata",
    "hf_datasets_augs_helper",
    "n_params",
    "open_image",
    "rand_cosine_interpolated",
    "rand_log_logistic",
    "rand_log_normal",
    "rand_log_uniform",
    "rand_split_log_normal",
    "rand_v_diffusion",
    "stratified_uniform",
    "stratified_with_settings",
    "tf32_mode",
    "to_pil_image",
    "train_mode",
]
