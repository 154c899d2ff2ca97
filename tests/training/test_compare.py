import json

import pytest
from PIL import Image
from test_page import FACTS, Titles, row, write

from k_diffusion.training import compare, run_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run in a folder of its own, and a flat one with a checkpoint, that differ."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    config = {"model": {"type": "x", "depths": [1, 2]}, "optimizer": {"lr": 1e-3}}
    facts = {**FACTS, "config": config, "run": {"batch_size": 4, "seed": 3}}
    (tmp_path / "own/model_run.json").write_text(json.dumps(facts))
    write("own/model", [row(10), row(20, val_loss=0.5), row(30, fid=5.0, protocol="edm")])
    Image.new("L", (30, 30), 9).save("own/model_demo_00000030.png")
    config = {"model": {"type": "x", "depths": [2, 2], "new": None}, "optimizer": {"lr": 1e-3}}
    state = {"config": config, "model": {}, "run": {"batch_size": 4, "seed": 4}}
    run_files.save_checkpoint("flat", 20, state)
    write("flat", [row(10), row(20, fid=6.0, kid=0.5, protocol="lite0")])
    return tmp_path


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["compare", *args])
    compare.main()


def test_the_table_and_what_differs(folder, monkeypatch, capsys):
    call(monkeypatch, "own", "flat_00000020.pth", "own/model")
    blocks = capsys.readouterr().out.split("\n\n")
    heads, *lines = (line.split() for line in blocks[0].splitlines())
    assert heads[:3] == ["run", "step", "images"]
    assert [line[:4] for line in lines] == [
        ["own", "30", "of", "100"],
        ["flat_00000020.pth", "20", "80", "0"],
        ["own/model", "30", "of", "100"],
    ]
    assert [line.split() for line in blocks[1].splitlines()] == [
        ["setting", "own", "flat_00000020.pth", "own/model"],
        ["seed", "3", "4", "3"],
        ["model.depths", "[1,", "2]", "[2,", "2]", "[1,", "2]"],
        ["model.new", "null"],
    ]
    assert blocks[2] == "wrote compare.html\n"


def test_the_page_overlays_runs(folder, monkeypatch):
    call(monkeypatch, "own", "flat", "--by", "images", "-o", "pages/x.html")
    text = (folder / "pages/x.html").read_text()
    found = Titles(text.replace(" by images", " by step"))
    assert found.titles == [
        "Loss: moving average", "Loss: held-out images", "Gradient norm, before clipping",
        "FD [edm]", "FD [lite0]", "KID [lite0]", "Images per second", "Learning rate",
    ]  # fmt: skip
    assert found.pictures == [("step 30", True)]
    loss = text.split("<svg")[1]
    assert loss.count("<polyline") == 2
    assert 'data-scale="40 120 ' in loss  # images: 10 to 30 steps of 4


def test_a_run_of_the_published_package(folder, monkeypatch, capsys):
    """Its CSV has the first five columns."""
    text = "step,time,loss,fid,kid\n25,10.0,0.5,,\n50,20.0,0.4,9.5,0.25\n"
    (folder / "old_metrics.csv").write_text(text)
    call(monkeypatch, "old", "own")
    heads, old, _ = capsys.readouterr().out.splitlines()[:3]
    assert old.split() == ["old", "50", "00:20", "9.5", "at", "50", "0.25", "at", "50"]
    assert heads.split()[:5] == ["run", "step", "time", "FD,", "best"]
    titles = Titles((folder / "compare.html").read_text()).titles
    assert {"FD", "FD [edm]", "KID"} <= set(titles)


def test_a_csv_of_another_program(folder, monkeypatch):
    (folder / "junk_metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        SystemExit, match="junk_metrics.csv is no run's log: it has no column 'step'"
    ):
        call(monkeypatch, "junk", "own")


def test_what_is_no_run(folder, monkeypatch):
    with pytest.raises(SystemExit, match="missing is no run: there is no missing_metrics.csv"):
        call(monkeypatch, "own", "missing")
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "own", "-o", "x.txt")
    assert left.value.code == 2


def test_a_run_without_a_config(folder, capsys):
    (folder / "flat_00000020.pth").write_bytes(b"broken")
    run = compare.read_run(folder / "flat")
    assert (run.settings, run.end_step, len(run.rows)) == ({}, None, 2)
    assert "flat can't be read" in capsys.readouterr().out
