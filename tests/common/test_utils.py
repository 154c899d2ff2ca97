import csv
import hashlib
import http.server
import pickle
import subprocess
import sys
import threading
import urllib.request
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from k_diffusion import utils
from k_diffusion.common import files


def test_import_is_light():
    code = (
        "import sys, k_diffusion.utils; heavy = {'torchvision', 'accelerate', 'datasets', 'wandb', "
        "'cleanfid', 'skimage', 'matplotlib', 'sklearn'}; sys.exit(heavy & {*sys.modules} or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_append_dims():
    assert utils.append_dims(torch.zeros(2), 4).shape == (2, 1, 1, 1)
    assert utils.append_dims(torch.zeros(()), 2).shape == (1, 1)
    assert utils.append_dims(torch.zeros(2, 3), 2).shape == (2, 3)
    assert utils.append_dims(np.zeros(2), 3).shape == (2, 1, 1)
    with pytest.raises(ValueError, match="3 dimensions, more than the 2"):
        utils.append_dims(torch.zeros(1, 1, 1), 2)


# ---------------------------------------------------------------- images


def noise_image(mode="RGB", size=(7, 5), seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), "uint8")
    return Image.fromarray(array.squeeze())


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_images_survive_the_round_trip(mode):
    image = noise_image(mode)
    x = utils.from_pil_image(image)
    assert x.dtype == torch.float32
    assert x.shape == (len(mode), 5, 7)
    for y in (x, x[None], x.double().requires_grad_()):
        back = utils.to_pil_image(y)
        assert back.mode == mode
        assert back.tobytes() == image.tobytes()


def test_image_values():
    image = Image.new("RGB", (1, 1), (0, 51, 255))
    expected = torch.tensor([-1, -0.6, 1])
    torch.testing.assert_close(utils.from_pil_image(image).flatten(), expected)
    bilevel = Image.new("1", (1, 1), 1)
    assert utils.from_pil_image(bilevel).tolist() == [[[1.0]]]
    deep = Image.fromarray(np.array([[0, 65535]], "uint16"))
    assert utils.from_pil_image(deep).tolist() == [[[-1.0, 1.0]]]
    palette = image.quantize(2)
    torch.testing.assert_close(utils.from_pil_image(palette).flatten(), expected)


def test_to_pil_image_rounds_and_clamps():
    levels = torch.tensor([-9.0, 0.4, 0.6, 127.4, 254.6, 300.0])
    image = utils.to_pil_image((levels / 127.5 - 1).reshape(1, 1, 6))
    assert list(image.tobytes()) == [0, 0, 1, 127, 255, 255]


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4), (5, 4, 4), (8, 8, 3)])
def test_to_pil_image_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"one image \(c, h, w\)"):
        utils.to_pil_image(torch.zeros(shape))


def test_hf_helper_keeps_labels_and_greyscale():
    batch = {"image": [noise_image("L"), noise_image("RGB")], "label": [3, 8]}
    out = utils.hf_datasets_augs_helper(batch, lambda image: image.mode, "image")
    assert out == {"image": ["RGB", "RGB"], "label": [3, 8]}
    kept = partial(utils.hf_datasets_augs_helper, transform=lambda image: image.mode, mode=None)
    assert kept(batch, image_key="image")["image"] == ["L", "RGB"]
    assert isinstance(batch["image"][0], Image.Image)
    with pytest.raises(ValueError, match=r"no column 'img'.* image, label"):
        kept(batch, image_key="img")


# ---------------------------------------------------------------- folders of images


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a/2.JPG", "a/1.webp", "c/d/e.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed=len(name)).save(path)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_of_images_is_recursive_and_sorted(folder):
    data = utils.FolderOfImages(folder)
    names = [path.relative_to(folder).as_posix() for path in data.paths]
    assert names == ["a/1.webp", "a/2.JPG", "b.png", "c/d/e.png"]
    assert len(data) == 4
    (image,) = data[2]
    assert image.tobytes() == noise_image(seed=len("b.png")).tobytes()


def test_folder_of_images_transforms_converts_and_pickles(folder):
    noise_image("L").save(folder / "b.png")
    for mode, channels in (("RGB", 3), ("L", 1), (None, 1)):
        data = utils.FolderOfImages(folder, utils.from_pil_image, mode=mode)
        (x,) = pickle.loads(pickle.dumps(data))[2]
        assert x.shape == (channels, 5, 7)


def test_a_corrupt_image_is_named(folder):
    whole = (folder / "b.png").read_bytes()
    data = utils.FolderOfImages(folder)
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        (folder / "b.png").write_bytes(content)
        with pytest.raises(utils.CorruptImageError, match=r"b\.png") as err:
            data[2]
        assert err.value.filename == str(folder / "b.png")
    assert data[1]


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no image folder at .*missing"):
        utils.FolderOfImages(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no images below .*\.png"):
        utils.FolderOfImages(tmp_path)


# ---------------------------------------------------------------- modules


def test_n_params():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    assert utils.n_params(model) == 3 * 4 + 4 + 4 + 4


def test_modes_are_restored_per_module():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model.train()
    model[1][0].eval()

    def modes():
        return [module.training for module in model.modules()]

    before = modes()
    with utils.eval_mode(model) as same:
        assert same is model
        assert not any(modes())
        with utils.train_mode(model):
            assert all(modes())
        assert not any(modes())
    assert modes() == before
    with pytest.raises(KeyError), utils.eval_mode(model):
        raise KeyError
    assert modes() == before

    @utils.eval_mode(model)
    def evaluated():
        return modes()

    assert not any(evaluated())
    assert modes() == before


def tf32_flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("flag", [False, True])
def test_tf32_mode(flag):
    before = tf32_flags()
    with utils.tf32_mode(cudnn=flag):
        assert tf32_flags() == (flag, before[1])
        with utils.tf32_mode(matmul=flag):
            assert tf32_flags() == (flag, flag)
    assert tf32_flags() == before
    with utils.tf32_mode():
        assert tf32_flags() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9"
)
def test_tf32_mode_beside_the_newer_switches():
    cudnn, matmul = tf32_flags()
    conv = torch.backends.cudnn.conv
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        conv.fp32_precision = "ieee"
        with utils.tf32_mode(cudnn=True, matmul=False):
            assert tf32_flags() == (True, False)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.backends.cuda.matmul.allow_tf32 = matmul


# ---------------------------------------------------------------- files


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.bin"
    path.write_bytes(bytes(range(256)) * 100)
    return path


URL = "https://a.example/file"


@pytest.fixture
def serve(source, monkeypatch):
    """Downloads get the file `source`."""

    def open_url(url):
        assert url == URL
        return urllib.request.urlopen(source.as_uri())

    monkeypatch.setattr(files, "_opener", lambda: SimpleNamespace(open=open_url))


def test_download_file(tmp_path, source, serve):
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    target = tmp_path / "deep" / "target.bin"
    assert utils.download_file(target, URL, digest.upper()) == target
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode == source.stat().st_mode

    source.unlink()  # what is there already is not downloaded again
    utils.download_file(str(target), URL)
    utils.download_file(target, URL, digest)


def test_a_download_without_a_digest_tells_it(tmp_path, source, serve):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.warns(UserWarning, match=f"unchecked; pass digest='{digest}'"):
        utils.download_file(tmp_path / "target.bin", URL)


def test_downloads_are_not_led_away_from_https():
    follow = files._HttpsRedirects().redirect_request
    request = urllib.request.Request(URL)
    assert follow(request, None, 302, "Found", {}, "https://b.example/x").full_url.endswith("/x")
    for url in "http://b.example/x", "file:///etc/hosts", "ftp://b.example/x":
        with pytest.raises(ValueError, match="by https alone"):
            follow(request, None, 302, "Found", {}, url)


def test_download_replaces_a_broken_file(tmp_path, source, serve):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    target = tmp_path / "target.bin"
    target.write_bytes(b"half")
    utils.download_file(target, URL, digest)
    assert target.read_bytes() == source.read_bytes()
    assert (tmp_path / "target.bin.wrong").read_bytes() == b"half"


def test_a_download_with_another_digest_is_kept_aside(tmp_path, source, serve):
    target = tmp_path / "out" / "target.bin"
    aside = target.with_name("target.bin.wrong")
    with pytest.raises(OSError, match=r"has SHA-256 .*, not 0000.*kept as .*target.bin.wrong"):
        utils.download_file(target, URL, "0" * 64)
    assert list(target.parent.iterdir()) == [aside]
    assert aside.read_bytes() == source.read_bytes()
    target.write_bytes(b"mine")
    with pytest.raises(OSError, match="has SHA-256"):
        utils.download_file(target, URL, "0" * 64)
    assert target.read_bytes() == b"mine"
    assert set(target.parent.iterdir()) == {target, aside}


def test_a_download_cut_off_is_an_error(tmp_path, monkeypatch):
    class CutOff(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), CutOff) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        target = tmp_path / "out" / "target.bin"
        address = f"http://127.0.0.1:{server.server_port}/"
        opened = partial(urllib.request.urlopen, address)
        monkeypatch.setattr(files, "_opener", lambda: SimpleNamespace(open=lambda url: opened()))
        with pytest.raises(OSError, match="got 9 of 100 bytes"):
            utils.download_file(target, URL)
        thread.join()
    assert list(target.parent.iterdir()) == []


def test_safetensors_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path, metadata={"config": '{"x": 1}'})
    assert utils.get_safetensors_metadata(path) == {"config": '{"x": 1}'}
    content = path.read_bytes()
    for broken in (content[:-1], content[:20], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a complete"):
            utils.get_safetensors_metadata(path)
    save_file({"a": torch.zeros(1)}, path)
    assert utils.get_safetensors_metadata(str(path)) == {}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_csv_logger_continues_its_file(tmp_path):
    path = tmp_path / "logs" / "metrics.csv"
    logger = utils.CSVLogger(path, ["step", "loss"])
    logger.write(1, 0.5)
    assert rows(path) == [["step", "loss"], ["1", "0.5"]]  # on disk at once
    utils.CSVLogger(path, ("step", "loss")).write(2, "a,b")
    assert rows(path) == [["step", "loss"], ["1", "0.5"], ["2", "a,b"]]
    with pytest.raises(ValueError, match=r"2 columns \(step, loss\), got 3 values"):
        logger.write(1, 2, 3)


def test_csv_logger_keeps_a_file_with_other_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    for n, columns in enumerate((["a"], ["a", "b"], ["c"])):
        if n:
            with pytest.warns(UserWarning, match=rf"it was kept as .*metrics\.{n}\.csv"):
                logger = utils.CSVLogger(path, columns)
        else:
            logger = utils.CSVLogger(path, columns)
        logger.write(*columns)
    assert rows(path) == [["c"], ["c"]]
    assert rows(tmp_path / "metrics.1.csv") == [["a"], ["a"]]
    assert rows(tmp_path / "metrics.2.csv") == [["a", "b"], ["a", "b"]]


def test_csv_logger_after_a_row_was_cut_off(tmp_path):
    path = tmp_path / "metrics.csv"
    for content, kept in ((b"", []), (b"a,b\r\n1,2\r\n3", [["1", "2"], ["3"]]), (b"a,b", [])):
        path.write_bytes(content)
        utils.CSVLogger(path, ["a", "b"]).write(5, 6)
        assert rows(path) == [["a", "b"], *kept, ["5", "6"]]
