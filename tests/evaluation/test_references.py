import io
import pickle

import numpy as np
import pytest
import torch
from golden import normal

from k_diffusion.evaluation import FeatureStatistics, read_reference, write_samples
from k_diffusion.evaluation.references import (
    ReferenceFileError,
    ReferenceKey,
    find_statistics,
    keep_statistics,
    read_plain_pickle,
)

MU, SIGMA = np.arange(3.0), np.diag([1.0, 2.0, 3.0])


def same(statistics, n=None, protocol=""):
    assert (statistics.n, statistics.protocol) == (n, protocol)
    np.testing.assert_array_equal(statistics.mean.numpy(), MU)
    np.testing.assert_allclose(statistics.covariance.numpy(), SIGMA)


@pytest.mark.parametrize(
    "more", [{}, {"mu_s": MU, "sigma_s": SIGMA, "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}]
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_statistics_of_edm_adm_and_mar(tmp_path, more, dtype):
    path = tmp_path / "ref.npz"
    np.savez(path, mu=MU.astype(dtype), sigma=SIGMA.astype(dtype), **more)
    found = read_reference(path, protocol="edm")
    same(found.statistics, protocol="edm")
    assert found.features is None
    assert found.images == (path if more else None)


def test_our_own_statistics_say_their_n_and_protocol(tmp_path):
    path = tmp_path / "ref.npz"
    x = normal(0, (20, 3))
    FeatureStatistics(3, "edm").update(x).save(path)
    got = read_reference(path).statistics
    assert (got.n, got.protocol) == (20, "edm")
    with np.load(path) as file:  # as EDM reads it
        np.testing.assert_allclose(file["mu"], x.double().mean(0))
        np.testing.assert_allclose(file["sigma"], np.cov(x.double().numpy().T))
    with pytest.raises(ReferenceFileError, match="of the protocol edm, not of cmmd; make one for"):
        read_reference(path, protocol="cmmd")


@pytest.mark.parametrize("key", ["feats", "reps"])
def test_features_of_clean_fid_and_dgm_eval(tmp_path, key):
    # dgm-eval's other keys are pickled, and stay unread
    np.savez(tmp_path / "a.npz", **{key: np.ones((5, 3))}, hparams=np.array([{"a": 1}], object))
    found = read_reference(tmp_path / "a.npz")
    assert found.features.shape == (5, 3)
    assert found.statistics is None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_statistics_of_edm2(tmp_path, protocol):
    path = tmp_path / "ref.pkl"
    moments = {"mu": MU, "sigma": SIGMA}
    content = {
        "num_images": np.int64(50),
        "fid": moments,
        "fd_dinov2": {"mu": 2 * MU, "sigma": SIGMA},
    }
    path.write_bytes(pickle.dumps(content, protocol))
    same(read_reference(path, "fid", "edm").statistics, n=50, protocol="edm")
    assert read_reference(path, "fd_dinov2").statistics.mean[2] == 4
    for entry in None, "fd":
        with pytest.raises(ReferenceFileError, match="has statistics for fid, fd_dinov2, not for"):
            read_reference(path, entry)
    path.write_bytes(pickle.dumps({"fid": moments}, protocol))
    same(read_reference(path).statistics)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(path):
    path.touch()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (touch, "touch"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (exec, "builtins.exec"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, function, name):
    path, victim = tmp_path / "ref.pkl", tmp_path / "ran"
    args = (victim,) if function is touch else (f"open({str(victim)!r}, 'w')",)
    content = {"fid": {"mu": MU, "sigma": Call(function, *args)}}
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ReferenceFileError) as raised:
        read_reference(path, "fid")
    assert not victim.exists()
    text = str(raised.value)
    assert name in text
    assert "numpy arrays and plain values alone" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"cnumpy\ncompat.py3k.os.system\n(S'touch ran'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fload.__globals__\x93.",
        b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n}tR.",
        b"\x80\x04\x8c\x08builtins\x8c\x13set.__class__.__mro__\x93.",
        b"c_codecs\ndecode\n(S'x'\ntR.",
        b"\x80\x02Pid\n.",
    ],
)
def test_other_ways_to_code_are_refused(tmp_path, code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ref.pkl"
    path.write_bytes(code)
    with pytest.raises(ReferenceFileError, match="ref.pkl was not read"):
        read_plain_pickle(path)
    assert list(tmp_path.iterdir()) == [path]


def test_plain_values_are_read(tmp_path):
    path = tmp_path / "a.pkl"
    content = {
        "a": [1, 2.5, None, True, "x", b"y", 1j],
        "b": ({1, 2}, frozenset([3]), bytearray(b"z")),
    }
    for protocol in range(6):
        path.write_bytes(pickle.dumps(content, protocol))
        assert read_plain_pickle(path) == content
    arrays = [
        np.arange(6).reshape(2, 3).T,
        np.array(["ab"]),
        np.float32(2),
        np.zeros((0, 2), "i2"),
    ]
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(arrays, protocol))
        for got, want in zip(read_plain_pickle(path), arrays):
            np.testing.assert_array_equal(got, want)
            assert (got.dtype, got.shape) == (want.dtype, want.shape)


def test_files_that_are_no_references(tmp_path):
    with pytest.raises(ReferenceFileError, match=r"no reference file .*none\.npz"):
        read_reference(tmp_path / "none.npz")
    with pytest.raises(ReferenceFileError, match=r"no reference file .*none\.pkl"):
        read_reference(tmp_path / "none.pkl")
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ReferenceFileError, match="is damaged or no reference file"):
        read_reference(path)
    np.savez(path, weights=MU)
    with pytest.raises(ReferenceFileError, match="nor images .*, but weights"):
        read_reference(path)
    np.savez(path, mu=MU, sigma=np.array([Call(print, "x")], object))
    with pytest.raises(
        ReferenceFileError, match="damaged or no reference file.*allow_pickle=False"
    ):
        read_reference(path)
    np.savez(path, mu=MU, sigma=SIGMA[:2])
    with pytest.raises(ReferenceFileError, match=r"got shapes \(3,\) and \(2, 3\)"):
        read_reference(path)
    pickled = tmp_path / "a.pkl"
    pickled.write_bytes(pickle.dumps([1]))
    with pytest.raises(ReferenceFileError, match="holds no statistics, but a list"):
        read_reference(pickled)
    pickled.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}})[:-20])
    with pytest.raises(ReferenceFileError, match="was not read"):
        read_reference(pickled)


# ------------------------------------------------------------------------------- samples


def test_samples_as_adm_reads_them(tmp_path):
    path = tmp_path / "samples.npz"
    images = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0]).repeat(3, 2, 1)[None].repeat(5, 1, 1, 1)
    images[:, 1] = -0.5
    write_samples(path, images.split(2), 5)
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        array = file["arr_0"]
    assert (array.shape, array.dtype) == ((5, 2, 5, 3), np.uint8)
    assert array[4, 1, :, 0].tolist() == [0, 0, 128, 255, 255]  # rounded, not truncated
    assert (array[..., 1] == 64).all()
    found = read_reference(path)
    assert found.images == path


def test_samples_that_do_not_fit(tmp_path):
    images = torch.zeros(4, 3, 2, 2)
    cases = {
        "expected 5 samples .*, got 4": ([images], 5),
        "one shape, got \\(3, 4, 4\\) after \\(3, 2, 2\\)": ([images, torch.zeros(1, 3, 4, 4)], 5),
        "NaN": ([images / 0], 4),
    }
    for match, (batches, n) in cases.items():
        with pytest.raises(ValueError, match=match):
            write_samples(tmp_path / "a.npz", batches, n)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- cache


def test_statistics_are_kept_by_their_key(tmp_path):
    key = ReferenceKey({"type": "digits"}, "train", (8, 8), "random", 20)
    folder = tmp_path / "cache"
    assert find_statistics(folder, key) is None
    statistics = FeatureStatistics(3, "random").update(normal(1, (20, 3)))
    keep_statistics(folder, key, statistics)
    assert torch.equal(find_statistics(folder, key).mean, statistics.mean)
    (path,) = folder.iterdir()
    assert path.name.startswith("digits_train_8x8_random_20_")
    keep_statistics(folder, key, FeatureStatistics(3, "random").update(normal(1, (19, 3))))
    assert find_statistics(folder, key) is None  # of another n
    path.write_bytes(path.read_bytes()[:100])  # damaged
    assert find_statistics(folder, key) is None


def test_everything_counts_in_the_key(tmp_path):
    key = ReferenceKey({"type": "imagefolder", "location": "a"}, "train", (8, 8), "edm", 20)
    others = [
        key._replace(data={"type": "imagefolder", "location": "b"}),
        key._replace(split="test"),
        key._replace(size=(8, 16)),
        key._replace(protocol="clean-fid"),
        key._replace(n=21),
    ]
    paths = {k.path(tmp_path) for k in [key, *others]}
    assert len(paths) == 6
    turned = key._replace(data={"location": "a", "type": "imagefolder"})
    assert turned.path(tmp_path) == key.path(tmp_path)


def test_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="expected"):
        write_samples(tmp_path / "a.npz", [], 3)
    assert not (tmp_path / "a.npz").exists()
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros(1))
    (tmp_path / "b.npz").write_bytes(buffer.getvalue())
    assert read_reference(tmp_path / "b.npz").images
