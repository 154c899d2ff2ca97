"""How good samples are: metrics of features, and the protocols that make them comparable."""

from .features import (
    CLIPFeatureExtractor,
    DINOv2FeatureExtractor,
    InceptionV3FeatureExtractor,
    compute_features,
)
from .intervals import Estimate, bootstrap
from .metrics import (
    cmmd,
    fd_infinity,
    fid,
    frechet_distance,
    inception_score,
    kid,
    kid_subsets,
    polynomial_kernel,
    sqrtm_eig,
    squared_mmd,
)
from .neighbors import prdc
from .protocols import PROTOCOLS, Protocol, get_protocol
from .references import read_reference, write_samples
from .registry import METRICS, Options, measure
from .statistics import FeatureStatistics

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "CLIPFeatureExtractor",
    "DINOv2FeatureExtractor",
    "Estimate",
    "FeatureStatistics",
    "InceptionV3FeatureExtractor",
    "Options",
    "Protocol",
    "bootstrap",
    "cmmd",
    "compute_features",
    "fd_infinity",
    "fid",
    "frechet_distance",
    "get_protocol",
    "inception_score",
    "kid",
    "kid_subsets",
    "measure",
    "polynomial_kernel",
    "prdc",
    "read_reference",
    "sqrtm_eig",
    "squared_mmd",
    "write_samples",
]
