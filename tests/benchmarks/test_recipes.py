"""The race of recipes: their configs load, it runs, and its tables say what was measured."""

import importlib.util
import re
import sys
from argparse import Namespace

import pytest
from runs import ROOT

from k_diffusion.distributed import make_accelerator


@pytest.fixture(scope="module")
def recipes():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "benchmarks/recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


def test_all_configs_load_and_differ(recipes):
    for path in recipes.DATA.values():
        made = {
            name: recipes.make_config(path, recipe, 1000, ["optimizer.lr=0.002"])
            for name, recipe in recipes.RECIPES.items()
        }
        rates = {name: config["optimizer"]["lr"] for name, config in made.items()}
        assert rates.pop("tuned") == 0.005
        assert set(rates.values()) == {0.002}
        assert {config["dataset"]["split"] for config in made.values()} == {"train"}
        assert made["cosine"]["lr_sched"]["num_steps"] == 1000
        assert made["cosine"]["lr_sched"]["warmup_steps"] == 50
        assert made["inverse-sqrt"]["lr_sched"]["decay_start"] == 200
        texts = {name: str(config) for name, config in made.items()}
        assert texts["power average"] == texts["adamw"]  # other weights of it are sampled
        assert len(set(texts.values())) == len(made) - 1


def test_the_table_marks_what_cannot_be_told_from_the_best(recipes):
    results = {
        "muon": recipes.Result(1000, [1.0, 1.2, 1.4], [0.96, 0.97, 0.98]),
        "adamw": recipes.Result(1200, [1.3, 1.5, 1.7], [0.90, 0.90, 0.90]),
        "cosine": recipes.Result(1200, [3.0, 3.0, 3.0], [0.97, 0.97, 0.97]),
    }
    lines = recipes.table(results, "lite0").splitlines()
    assert lines[0] == "| recipe | steps | FD[lite0] | read as their class, % |"
    assert [line.split(" | ", 1)[1] for line in lines[2:]] == [
        "1,000 | **1.2 ± 0.12** | **97.0 ± 0.58** |",
        "1,200 | **1.5 ± 0.12** | 90.0 ± 0 |",
        "1,200 | 3 ± 0 | **97.0 ± 0** |",
    ]
    one = {name: recipes.Result(1, [float(i)], [0.5]) for i, name in enumerate(results)}
    assert "| 1 | **0** | **50.0** |" in recipes.table(one, "random")


@pytest.mark.slow
def test_a_short_race(recipes, capsys):
    args = Namespace(
        recipes=["power average", "x-prediction"],
        seconds=0.05,
        seeds=2,
        n=40,
        steps=2,
        batch_size=4,
        set=["model.widths=[32,32]", "model.depths=[1,1]"],
    )
    section = recipes.race(args, make_accelerator(cpu=True), recipes.DATA["digits"], "random")
    assert re.search(r"^\| x-prediction: .* \| [\d,]+ \| .* ± .* \| .* ± .* \|$", section, re.M)
    assert "0.05 s of training each, batches of 4, 40 samples in 2 steps" in section
    assert (
        len(
            re.findall(
                r"^(?:power average|x-prediction), seed [01]: ", capsys.readouterr().out, re.M
            )
        )
        == 4
    )
