import pytest
from golden import normal

from k_diffusion import evaluation as E
from k_diffusion.evaluation import neighbors, registry

FEW = E.Options(subsets=10, subset_size=50, resamples=10)


def test_all_metrics_of_one_pair(monkeypatch):
    fake, real = normal(0, (60, 4)) + 0.2, normal(1, (70, 4))
    logits = normal(2, (60, 3))
    calls = []
    prdc = neighbors.prdc
    monkeypatch.setattr(registry, "prdc", lambda *args: calls.append(args) or prdc(*args))
    got = E.measure(list(E.METRICS), fake, real, FEW, logits)
    assert set(got) == set(E.METRICS)
    assert len(calls) == 1
    for name, estimate in got.items():
        assert estimate.low <= estimate.value <= estimate.high, name
        assert estimate.error >= 0
    assert got["fd"].value == pytest.approx(E.fid(fake, real).item(), rel=1e-5)
    assert got["kid"] == E.kid_subsets(fake, real, 10, 50)
    assert got["cmmd"].value == pytest.approx(E.cmmd(fake, real).item())
    assert got["recall"].value == E.prdc(fake, real).recall.mean().item()
    assert got["inception_score"].value == pytest.approx(E.inception_score(logits).item())
    assert got["fd_infinity"] == E.fd_infinity(fake, real)
    assert E.measure(["recall"], fake, real, FEW._replace(k=3))["recall"] != got["recall"]


def test_a_reference_of_statistics_alone():
    fake, real = normal(3, (60, 4)), normal(4, (70, 4))
    known = E.FeatureStatistics(4).update(real)
    got = E.measure(["fd", "fd_infinity"], fake, known, FEW)
    assert got["fd"].value == pytest.approx(E.fid(fake, real).item(), rel=1e-5)
    with pytest.raises(ValueError, match="kid needs features of real images"):
        E.measure(["kid"], fake, known, FEW)


@pytest.mark.parametrize(
    ("name", "n"),
    [("fd", 1), ("kid", 49), ("precision", 5), ("coverage", 5), ("cmmd", 1), ("fd_infinity", 19)],
)
def test_each_metric_says_what_it_needs(name, n):
    x = normal(5, (n, 4))
    with pytest.raises(
        ValueError, match=rf"{name} needs at least {n + 1} samples .*got {n}"
    ) as error:
        E.measure([name], x, normal(6, (50, 4)), FEW)
    assert "\n" not in str(error.value)
    E.measure([name], normal(7, (n + 1, 4)), normal(8, (n + 1, 4)), FEW)


def test_other_bad_input():
    x = normal(9, (30, 4))
    with pytest.raises(ValueError, match=r"unknown metric 'pid' \(did you mean"):
        E.measure(["pid"], x, x)
    with pytest.raises(ValueError, match="inception_score needs a classifier's logits"):
        E.measure(["inception_score"], x, x)
    with pytest.raises(ValueError, match="width 4 can't be compared"):
        E.measure(["fd"], x, x[:, :3])
