"""The benchmarks of saving: they run, and survival notices what is lost."""

import importlib.util
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT

from k_diffusion.training import log


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


survival, saving = load("survival"), load("saving")


def test_a_small_state_is_saved_and_timed(tmp_path):
    text = saving.measure(saving.State(0.001, "cpu"), tmp_path, "cpu")
    numbers = re.search(
        r"of 0.00 GB from cpu: training stands still for ([\d.]+) s .* ([\d.]+) times", text
    )
    assert float(numbers[1]) < 60
    assert torch.load(tmp_path / "run_00000002.pth")["step"] == 2


@pytest.mark.slow
def test_a_run_survives_kills(tmp_path):
    """CI runs a form with two processes and two workers beside this one."""
    said = survival.survive(tmp_path, 2, 1, 0)
    assert said.startswith("survived 2 of 2 kills (")


# ------------------------------------------------------------------------- what it would notice


def test_a_start_elsewhere_is_noticed():
    assert not survival.check_start("", 4)
    assert survival.check_start("resumed from a_00000004.pth at step 4 (as ...)", 4)
    for said in "resumed from a_00000003.pth at step 3 (as ...)", "step 1, epoch 0, 0 s":
        with pytest.raises(survival.Lost, match="and (step )?4 had been announced"):
            survival.check_start(said, 4)
    assert not survival.check_start("step 1, epoch 0, 0 s", 0)


def write(folder, name, weight=1.0, loss=0.5):
    state = {"model": {"w": torch.tensor([weight])}, "step": 3, "elapsed": 1.0 + weight}
    (folder / name).mkdir(exist_ok=True)
    torch.save(state, folder / name / f"{name}_00000003.pth")
    row = [3, weight, loss, "", "", 0, loss, *[""] * (len(log.COLUMNS) - 7)]
    text = "\n".join(",".join(map(str, line)) for line in (log.COLUMNS, row))
    (folder / name / f"{name}_metrics.csv").write_text(text + "\n")


def test_another_end_is_noticed(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b")
    assert survival.differences(tmp_path, "a", "b", 3) == []
    write(tmp_path, "b", weight=1.0 + 2**-23, loss=0.25)
    assert survival.differences(tmp_path, "a", "b", 3) == ["model", "the CSV"]
    write(tmp_path, "b", weight=-0.0)
    write(tmp_path, "a", weight=0.0)
    assert survival.differences(tmp_path, "a", "b", 3) == ["model"]


def test_losses_end_with_a_code(tmp_path, monkeypatch):
    def survive(*args):
        raise survival.Lost("step 4")

    monkeypatch.setattr(survival, "survive", survive)
    monkeypatch.setattr("sys.argv", ["survival.py", "--kills", "1"])
    with pytest.raises(SystemExit) as left:
        survival.main()
    assert left.value.code == "lost: step 4"  # said on stderr, with code 1


def test_the_announced_step(tmp_path):
    assert survival.announced(tmp_path, "a") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a_state.json").write_text('{"latest_checkpoint": "runs/a_00000012.pth"}')
    assert survival.announced(tmp_path, "a") == 12
    shutil.rmtree(tmp_path)
    run = SimpleNamespace(process=SimpleNamespace(poll=lambda: 1, returncode=1), said=lambda: "no")
    with pytest.raises(survival.Lost, match="ended by itself with code 1:\nno"):
        survival.Run.trains(run)
