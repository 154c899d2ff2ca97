import json
import re
from html.parser import HTMLParser

import pytest
import runs
from PIL import Image

from k_diffusion.common.files import CSVLogger
from k_diffusion.training import page
from k_diffusion.training.curves import COLUMNS

FACTS = {
    "name": "a",
    "end_step": 100,
    "command": "python train.py --name 'a b'",
    "working directory": "/w",
    "parameters": 12345,
    "run": {"batch_size": 4, "processes": 1, "seed": 3},
    "machine": {"device": "cpu"},
    "config": {"model": {"type": "</script><b>"}},
}


def write(name, rows):
    log = CSVLogger(f"{name}_metrics.csv", COLUMNS)
    for row in rows:
        log.write(*(row.get(column, "") for column in COLUMNS))
    log.file.close()


def row(step, **values):
    base = {"step": step, "time": step * 0.5, "loss": 1 / step, "loss_avg": 2 / step, "epoch": 0}
    return {**base, "samples": 4 * step, "lr": 1e-3, "grad_norm": 0.1, **values}


class Titles(HTMLParser):
    """The titles of a page's charts and its pictures' alternative texts; that tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.titles, self.pictures = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "svg":
            self.titles.append(attributes["aria-label"].removesuffix(" by step"))
        if tag == "img":
            self.pictures.append((attributes["alt"], "shown" in attributes["class"]))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_of_all_there_is(tmp_path):
    name = str(tmp_path / "a[1]")
    write(
        name,
        [
            row(10),
            row(20, val_loss=0.5, gns=40.0, **{"loss_sigma_1_to_3": 0.2}),
            row(30, fid=9.0, protocol="edm", evaluate_n=5),
            row(40, fid=7.0, protocol="edm", evaluate_n=5),
            row(50, fid=3.0, kid=0.25, protocol="lite0", evaluate_n=5),
        ],
    )
    for step, side in (10, 8), (50, 1500), (20, 600):
        Image.new("L", (side, side), step).save(f"{name}_demo_{step:08}.png")
    text = page.render(name, FACTS)
    found = Titles(text)
    assert found.titles == [
        "Loss", "Loss by noise level sigma", "Gradient norm, before clipping",
        "Gradient noise scale, in images", "FD [edm]", "FD [lite0]", "KID [lite0]",
        "Images per second", "Learning rate",
    ]  # fmt: skip
    assert found.pictures == [("step 10", False), ("step 20", False), ("step 50", True)]
    assert len(text) < 100_000  # the large grid became smaller
    assert "</script><b>" not in text.split("<h2>Config")[1]
    assert "http" not in text  # self-contained
    assert "python train.py --name &#x27;a b&#x27;" in text


def test_the_summary():
    rows = [{k: str(v) for k, v in row(step).items()} for step in (10, 20, 30)]
    rows[1] |= {"fid": "2.5", "protocol": "edm"}
    rows[2] |= {"fid": "4.5", "protocol": "edm", "val_loss": "0.5"}
    found = page.summary(rows, 100)
    assert found == {
        "step": "30 of 100", "images": "120", "epoch": "0", "time": "00:15", "images/s": "8",
        "left": "00:35", "loss": "0.06667", "held-out loss": "0.5", "FD [edm], best": "2.5 at 20",
    }  # fmt: skip
    assert "left" not in page.summary(rows)
    assert page.summary([]) == {}


def test_rates_pass_over_a_clock_that_stands_and_rows_of_older_versions():
    rows = [
        {"step": "1", "time": "1", "samples": ""},
        {"step": "2", "time": "2", "samples": "10"},
        {"step": "3", "time": "2", "samples": "20"},
        {"step": "4", "time": "4", "samples": "60"},
    ]
    assert page.points(rows, page.RATE) == ([4.0], [20.0])


def test_the_command_that_goes_on_leaves_out_what_goes_back():
    words = ["train.py", "--resume", "a b.pth", "--name", "a", "--resume=x", "--seed", "1"]
    words += [
        "--resume-inf",
        "x.safetensors",
        "--reset-ema",
        "--evaluate-only",
        "--evaluate-n",
        "5",
    ]
    wanted = ["train.py", "--name", "a", "--seed", "1", "--evaluate-n", "5"]
    assert page.resuming(words) == wanted == page.resuming(wanted)


def test_means_of_a_long_curve():
    rows = [{"step": str(i), "loss": str(i % 2)} for i in range(1000)]
    xs, ys = page.points(rows, "loss", means=True)
    assert (len(xs), xs[0], set(ys)) == (100, 4.5, {0.5})


def test_it_is_written_once_a_minute_or_in_a_hundredth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]

    def render(name, facts, status):
        now[0] += 2
        return status

    monkeypatch.setattr(page, "render", render)
    shown = page.Page(str(tmp_path / "new/a"), FACTS, clock=lambda: now[0])

    def updated():
        before = now[0]
        shown.update()
        return now[0] > before

    shown.update("stopped by an error")  # in the first step, which leaves nothing
    assert list(tmp_path.iterdir()) == []
    assert updated()
    assert json.loads((tmp_path / "new/a_run.json").read_text()) == FACTS
    now[0] += 199
    assert not updated()
    now[0] += 1
    assert updated()
    shown.update("finished")
    assert (tmp_path / "new/index.html").read_text() == "finished"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a_run.json", "index.html"]


# ------------------------------------------------------------------- a run in a folder of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two calls of train.py, the second of which resumes the first."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.json").write_text(json.dumps(runs.TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k_diffusion.generation.STEPS", 1)
        for end in 2, 3:
            runs.call(
                *("train", "--config", "tiny.json", "--set", "dataset.split=train"),
                *("--output-dir", "own", "--end-step", end, "--seed", 1, "--batch-size", 6),
                *("--sample-n", 2, "--num-workers", 0, "--log-every", 1, "--validate-every", 2),
                *("--validate-n", 20, "--power-ema", 0.1),
                folder=folder,
                monkeypatch=patch,
            )
    return folder


def test_all_its_files_are_there(folder):
    assert {p.name for p in folder.iterdir()} == {"tiny.json", "own"}
    assert {p.name for p in (folder / "own").iterdir()} == {
        f"model_{rest}"
        for rest in (
            *("00000002.pth", "00000003.pth", "demo_00000002.png", "demo_00000003.png"),
            *("00000002_ema0.1.safetensors", "00000003_ema0.1.safetensors"),
            *("state.json", "metrics.csv", "loss.png", "run.json"),
        )
    } | {"index.html"}


def test_its_page_and_facts(folder):
    text = (folder / "own/index.html").read_text()
    found = Titles(text)
    assert {"Loss", "Loss by noise level sigma", "Images per second"} <= set(found.titles)
    assert [alt for alt, _ in found.pictures] == ["step 2", "step 3"]
    assert re.search(r"<p>finished, updated <time datetime=\S+>", text)
    assert "step<b>3 of 3</b>" in text
    facts = json.loads((folder / "own/model_run.json").read_text())
    assert facts["run"]["batch_size"] == 6
    assert facts["config"]["dataset"]["split"] == "train"
    rows = page.read_rows(folder / "own/model_metrics.csv")
    assert [row["samples"] for row in rows] == ["6", "12", "18"]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, True]


def test_it_is_sampled_and_averaged_by_its_folder(folder, monkeypatch, capsys):
    flags = "-n", 1, "--steps", 1, "--device", "cpu", "--grid", "x.png"
    runs.call("sample", "--checkpoint", "own", *flags, folder=folder, monkeypatch=monkeypatch)
    assert "from own/model_00000003.pth" in capsys.readouterr().out
    assert (folder / "x.png").exists()
    output = "-o", "slim.safetensors"
    runs.call("convert_for_inference", "own", *output, folder=folder, monkeypatch=monkeypatch)
    from k_diffusion.checkpoints.snapshots import find_snapshots

    for path in folder / "own", folder / "own/model":
        assert [s.step for s in find_snapshots(path)] == [2, 3]
    for name in "x.png", "slim.safetensors":
        (folder / name).unlink()


def test_another_run_is_refused(folder, monkeypatch, capsys):
    args = "train", "--config", "tiny.json", "--output-dir", "own"
    for name, said in ("b", "holds another run, model"), ("x/b", "pass a --name without one"):
        with pytest.raises(SystemExit) as left:
            runs.call(*args, "--name", name, folder=folder, monkeypatch=monkeypatch)
        assert left.value.code == 2
        assert said in capsys.readouterr().err
