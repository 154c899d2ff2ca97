"""The metrics by name: what each needs, and all that are asked for in one call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..common.text import unknown_name
from . import metrics
from .intervals import Estimate, bootstrap
from .neighbors import PRDC, prdc
from .statistics import FeatureStatistics, check_alike, check_features

FeatureSet = Tensor | FeatureStatistics


class Options(NamedTuple):
    """How metrics are computed.

    k: of precision, recall, density and coverage. subsets, subset_size: of KID. resamples: of the
    bootstrap, 0 for no intervals. seed: of everything drawn.
    """

    k: int = 5
    subsets: int = 100
    subset_size: int = 1000
    resamples: int = 100
    seed: int = 0


class Metric(NamedTuple):
    """A row of METRICS.

    run: (fakes, reals, options) -> estimate; rows that take logits get (logits, None, options).
    least: samples that it needs of each set, by the options. usual: the n of published numbers.
    statistics: whether the reals may be statistics. logits: whether it takes these alone. lower:
    whether lower is better.
    """

    label: str
    run: Callable[..., Estimate]
    least: Callable[[Options], int]
    usual: int
    paper: str
    statistics: bool = False
    logits: bool = False
    lower: bool = True


def _two_sets(metric: Callable[[Tensor, Any], Tensor]) -> Callable[..., Estimate]:
    """A metric of two sets with its bootstrap; statistics, and nothing drawn from them, will do."""

    def run(fake: Tensor, real: FeatureSet, o: Options) -> Estimate:
        if isinstance(real, FeatureStatistics):
            return bootstrap(lambda i: metric(fake[i], real), [len(fake)], o.resamples, o.seed)
        sizes = [len(fake), len(real)]
        return bootstrap(lambda i, j: metric(fake[i], real[j]), sizes, o.resamples, o.seed)

    return run


def _kid(fake: Tensor, real: Tensor, o: Options) -> Estimate:
    return metrics.kid_subsets(fake, real, o.subsets, o.subset_size, o.seed)


def _fd_infinity(fake: Tensor, real: FeatureSet, o: Options) -> Estimate:
    return metrics.fd_infinity(fake, real, seed=o.seed)


def _inception_score(logits: Tensor, _: None, o: Options) -> Estimate:
    score = lambda i: metrics.inception_score(logits[i])  # noqa: E731
    return bootstrap(score, [len(logits)], o.resamples, o.seed)


def _of_scores(field: str) -> Callable[..., Estimate]:
    """The mean of one number per sample, whose resamples take no new neighbours."""

    def run(scores: PRDC, _: None, o: Options) -> Estimate:
        values = getattr(scores, field)
        return bootstrap(lambda i: values[i].mean(), [len(values)], o.resamples, o.seed)

    return run


def _neighbors(field: str, paper: str) -> Metric:
    return Metric(field, _of_scores(field), lambda o: o.k + 1, 10000, paper, lower=False)


METRICS = {
    "fd": Metric(
        "FD",
        _two_sets(metrics.frechet_distance),
        lambda o: 2,
        50000,
        "arXiv:1706.08500",
        statistics=True,
    ),
    "fd_infinity": Metric(
        "FD∞", _fd_infinity, lambda o: 20, 50000, "arXiv:1911.07023", statistics=True
    ),
    "kid": Metric("KID", _kid, lambda o: o.subset_size, 50000, "arXiv:1801.01401"),
    "cmmd": Metric("CMMD", _two_sets(metrics.cmmd), lambda o: 2, 30000, "arXiv:2401.09603"),
    "precision": _neighbors("precision", "arXiv:1904.06991"),
    "recall": _neighbors("recall", "arXiv:1904.06991"),
    "density": _neighbors("density", "arXiv:2002.09797"),
    "coverage": _neighbors("coverage", "arXiv:2002.09797"),
    "inception_score": Metric(
        "IS", _inception_score, lambda o: 2, 50000, "arXiv:1606.03498", logits=True, lower=False
    ),
}


def get_metric(name: str) -> Metric:
    """A row of METRICS. Raises ValueError, with the nearest names, for an unknown one."""
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]


def label_of(name: str, encoder: str) -> str:
    """What a metric is called with the features of an encoder: the Fréchet distance of Inception's
    is the FID."""
    return "FID" if (name, encoder) == ("fd", "inception") else get_metric(name).label


def check_n(names: Sequence[str], n_fake: int, n_real: int | None, options: Options) -> None:
    """Raises ValueError for a metric that needs more samples; before any is drawn, say.

    n_real: None where the reals are statistics.
    """
    for name in names:
        metric = get_metric(name)
        least = metric.least(options)
        sets = [n_fake] if metric.logits or n_real is None else [n_fake, n_real]
        if min(sets) < least:
            raise ValueError(
                f"{name} needs at least {least} samples of each set, got {min(sets)}; draw more or "
                "leave it out"
            )


def measure(
    names: Sequence[str],
    fake: Tensor,
    real: FeatureSet,
    options: Options = Options(),  # noqa: B008
    logits: Tensor | None = None,
    formula: str = "frechet",
) -> dict[str, Estimate]:
    """Metrics by name of one set of features against another, each with its interval.

    fake: (n, d). real: (m, d), or its statistics, which do for rows that say so. logits: (n,
    classes), for the inception score. formula: of a protocol; "published" takes KID from all
    samples in parts of at most 5,000. Neighbours are looked up once for all metrics of them. Raises
    ValueError for unknown names, too few samples, features that don't match, or a metric that needs
    what isn't given.
    """
    check_alike(fake, real)
    check_features("fakes", fake)
    known = isinstance(real, FeatureStatistics)
    check_n(names, len(fake), None if known else len(real), options)  # type: ignore[arg-type]
    out, scores = {}, None
    for name in names:
        metric = METRICS[name]
        if metric.logits:
            if logits is None:
                raise ValueError(f"{name} needs a classifier's logits, which this encoder hasn't")
            out[name] = metric.run(logits, None, options)
        elif known and not metric.statistics:
            raise ValueError(
                f"{name} needs features of real images, and this reference has their mean and "
                "covariance alone; give the images"
            )
        elif name in PRDC._fields:
            scores = scores or prdc(fake, real, options.k)  # type: ignore[arg-type]
            out[name] = metric.run(scores, None, options)
        elif name == "kid" and formula == "published":
            out[name] = _two_sets(metrics.kid)(fake, real, options)
        else:
            out[name] = metric.run(fake, real, options)
    return out
