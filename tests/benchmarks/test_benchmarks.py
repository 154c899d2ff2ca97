"""The benchmarks of speed: what they measure is what they say, and all of them run."""

import importlib.util
import itertools
import json
import sys
import time

import pytest
import torch
from runs import ROOT, TINY, tiny_config

import k_diffusion as K
from k_diffusion.models import attention
from k_diffusion.models.attention import NeighborhoodAttentionSpec
from k_diffusion.training.step import batch_loss

BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


def load(name):
    """A script as a module, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(benchmarks_importable):
    return importlib.import_module("harness.bench")


@pytest.fixture(scope="module")
def straightforward(benchmarks_importable):
    return importlib.import_module("harness.plain_step")


# ---------------------------------------------------------------- the harness


def test_peak_memory_of_a_known_case(bench):
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB

    def peak(run):
        return bench.peak_memory(run, CPU) / x.nbytes

    def run():
        a = x * 2  # 1
        b = a.exp()  # 2: a, and b, which the backward pass needs
        c = b + 1  # 3: the peak
        del a, c
        return b[:8].sum().item()

    assert peak(run) == pytest.approx(3, rel=1e-3)
    kept = []
    assert peak(lambda: kept.append(x.detach() * 2)) == pytest.approx(1, rel=1e-3)
    # what is freed leaves room
    assert peak(lambda: (kept.clear(), kept.append(x.detach() * 2))) == pytest.approx(0, abs=1e-3)
    assert peak(lambda: kept.append(kept.pop().clone())) == pytest.approx(1, rel=1e-3)


def test_runs_are_measured_in_turn(bench, monkeypatch):
    order, now = [], iter(x / 2 for x in itertools.count())
    monkeypatch.setattr(time, "perf_counter", now.__next__)
    runs = {name: (lambda name=name: order.append(name)) for name in "AB"}
    assert bench.in_turn(runs, CPU, budget=0, rounds=(3, 9)) == {"A": 0.5, "B": 0.5}
    assert "".join(order) == "AABB" + "AB" * 3
    order.clear()
    bench.in_turn(runs, CPU, budget=1e9, rounds=(1, 4))
    assert "".join(order) == "AABB" + "AB" * 4
    order.clear()
    now = iter(range(0, 1000, 2))  # long runs warm up once
    monkeypatch.setattr(time, "perf_counter", now.__next__)
    assert bench.in_turn(runs, CPU, budget=0, rounds=(1, 9)) == {"A": 2, "B": 2}
    assert "".join(order) == "ABAB"


def test_short_runs_are_repeated_after_one_that_is_not_timed(bench, monkeypatch):
    calls = itertools.count()
    clock = iter(x / 64 for x in range(1000))
    monkeypatch.setattr(time, "perf_counter", clock.__next__)
    times = bench.in_turn({"A": lambda: next(calls)}, CPU, 0, rounds=(1, 1), shortest=5 / 64)
    assert next(calls) == 2 + 1 + 5
    assert times["A"] == 1 / 64 / 5


def test_table(bench):
    columns = {"a": ("name", str), "b": ("ms", bench.digits), "c": ("not there", str)}
    rows = [{"a": "x", "b": 1234.5}, {"a": "long", "b": 0.012345, "bold": True}, {"a": "y"}]
    assert bench.table(columns, rows).splitlines() == [
        "| name     |         ms |",
        "|----------|-----------:|",
        "| x        |      1,234 |",
        "| **long** | **0.0123** |",
        "| y        |          - |",
    ]
    assert [bench.digits(x) for x in (999.4, 999.6, 1.0)] == ["999", "1,000", "1"]
    assert [bench.percent(x) for x in (0.0543, 0.0999, 0.5, 1.2)] == ["5.4%", "10%", "50%", "120%"]


def test_results_are_merged_and_written_to_the_page(bench, tmp_path):
    columns = {"a": ("ms", bench.digits)}
    old = {"on": "a machine", "rows": [{"a": 1 / 3}], "notes": ["Old."]}
    bench.save("x", "cpu", {"one": old, "two": old}, tmp_path)
    new = {"on": "another", "rows": [{"a": 2.0}]}
    bench.save("x", "cpu", {"two": new}, tmp_path)
    assert json.loads((tmp_path / "x_cpu.json").read_text()) == {
        "one": {"on": "a machine", "rows": [{"a": 0.3333}], "notes": ["Old."]},
        "two": {"on": "another", "rows": [{"a": 2.0}]},
    }
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- x cpu: benchmarks/x.py -->\n?\n<!-- end of x cpu -->\nAfter\n")
    for _ in range(2):  # the second time changes nothing
        bench.write("x", "cpu", "x.py", columns, tmp_path, page)
        text = page.read_text()
        assert text.startswith("Before\n<!-- x cpu: benchmarks/x.py -->\n**one**, on a machine\n")
        assert text.endswith("|   2 |\n<!-- end of x cpu -->\nAfter\n")
        assert "\n| 0.333 |\n\nOld.\n\n**two**, on another\n" in text
    with pytest.raises(SystemExit, match="no results of x on cuda"):
        bench.write("x", "cuda", "x.py", columns, tmp_path, page)


def test_the_page_has_a_place_for_every_table(bench):
    text = bench.PAGE.read_text()
    scripts = {"attention": "attention", "train_step": "train_step", "sample": "sample"}
    for name, script in {**scripts, "profile": "train_step"}.items():
        for device in ("cpu", "cuda"):
            assert text.count(f"<!-- {name} {device}: benchmarks/{script}.py -->\n") == 1
            assert text.count(f"<!-- end of {name} {device} -->\n") == 1


def test_scaling_is_modelled_by_shards_and_rings(monkeypatch):
    """DDP holds the gradients twice, FSDP2 a part of all and what it gathered."""
    scaling = load("scaling")
    assert scaling.sent(100, 4, None) == scaling.sent(100, 4, "keep") == 150
    assert scaling.sent(100, 4, "again") == 225
    monkeypatch.setattr(scaling, "hourglass", lambda *args: tiny_config())
    monkeypatch.setattr(scaling, "gathered", lambda inner, way: {"again": 5, "keep": 7}[way])
    one, ddp, again, keep = scaling.rows("1x, 256²", (1, 4), images=2)
    assert ddp["states"] - one["states"] == 4 * one["parameters"]
    assert [again["states"], keep["states"]] == [one["states"] // 4 + n for n in (5, 7)]
    assert len({row["off"] - row["states"] for row in (one, ddp, again, keep)}) == 1
    assert one["send"] is None
    assert again["send"] == pytest.approx(1.5 * ddp["send"])
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert text.count("<!-- steps: benchmarks/scaling.py -->\n| widths, images") == 1
    assert text.count("<!-- two processes: benchmarks/scaling.py -->\n|") == 1


def test_two_processes_are_measured_beside_one(monkeypatch):
    scaling, made = load("scaling"), []

    def run(folder, processes, way, steps):
        assert {path.name for path in folder.iterdir()} == {"config.json", "data.py"}
        made.append((processes, way))
        return 0.5 * processes, 1000 + 10 * len(made)

    monkeypatch.setattr(scaling, "run", run)
    monkeypatch.setattr(scaling, "gathered", lambda inner, way: {"again": 5, "keep": 7}[way])
    one, ddp, again, keep = scaling.measured(tiny_config(), 3)
    assert made == [(1, None), (2, None), (2, "again"), (2, "keep")]
    assert [row["images"] for row in (one, ddp)] == [4, 4]  # 2 images in 0.5 s, 4 in 1 s
    assert [row["more"] for row in (one, ddp, again)] == [0, 10, 20]
    # DDP's buckets are the gradients once more; FSDP2 has half of all and what it gathered
    assert one["modelled"] == 0
    assert keep["modelled"] - again["modelled"] == 2
    states = 2 * (5 - again["modelled"])  # weights, gradients, moments, averages, and what is small
    assert states == pytest.approx(5 * ddp["modelled"], rel=0.01)


# ---------------------------------------------------------------- the straightforward form


ATTNS = {
    "neighborhood": {"type": "neighborhood", "d_head": 8, "kernel_size": 3},
    "brute force": {"type": "neighborhood", "d_head": 8, "kernel_size": 3},
    "windows": {"type": "shifted-window", "d_head": 8, "window_size": 4},
}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(config, model, batch):
    denoiser = K.config.make_denoiser_wrapper(config)(model)
    density = K.config.make_sample_density(config["model"])
    torch.manual_seed(0)
    model.zero_grad()
    loss = batch_loss(denoiser, batch, density, config, CPU).mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ATTNS)
@pytest.mark.usefixtures("float64")
def test_the_straightforward_form_is_the_same_computation(straightforward, kind):
    cases = importlib.import_module("harness.cases")
    attns = [ATTNS[kind], TINY["model"]["self_attns"][1]]
    config = tiny_config(model={"input_size": [40, 40], "depths": [2, 1], "self_attns": attns})
    model, batch = cases.inner_model(config, CPU), cases.batch_of(config, 3)
    assert all(p.any() for p in model.parameters())
    ours = gradients(config, model, batch)
    with straightforward.plain(brute_force=kind == "brute force"):
        plain = gradients(config, model, batch)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item())
    # it isn't the same because nothing was replaced, and is in place no longer
    assert any(not torch.equal(a, b) for a, b in zip(ours, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(config, model, batch)))


def test_brute_force_runs_the_reference(straightforward, monkeypatch):
    q = torch.randn(1, 32, 32, 1, 8)
    geometry = NeighborhoodAttentionSpec(8, 3)
    calls = []
    rows = attention.BACKENDS["neighborhood"]
    reference = rows["reference"].run

    def counted(*args):
        calls.append(args)
        return reference(*args)

    monkeypatch.setitem(rows, "reference", attention.Backend(counted))
    for brute_force in (True, False):
        with straightforward.plain(brute_force):
            attention.attend(geometry, q, q, q)
    assert len(calls) == 1


def test_the_plain_optimizer_and_average_are_the_packages(straightforward):
    cases = importlib.import_module("harness.cases")
    train_step = load("train_step")
    config = tiny_config()
    weights = []
    for way in ("straightforward", "eager"):
        trainee = train_step.Trainee(config, 2, CPU, "fp32")
        step = trainee.step(train_step.WAYS[way])
        for i in range(3):
            torch.manual_seed(i)
            step()
        weights.append([*trainee.inner.parameters(), *trainee.averaged.parameters()])
    start = cases.inner_model(config, CPU).parameters()
    assert all(not torch.equal(a, b) for a, b in zip(start, weights[0]))
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_ways_train_the_same_weights(monkeypatch):
    train_step = load("train_step")
    monkeypatch.setattr(K.models, "compile_model", lambda model, unit: model)
    trainee = train_step.Trainee(tiny_config(), 2, CPU, "fp32")
    before = [p.clone() for p in trainee.inner.parameters()]
    trainee.step(train_step.WAYS["compiled"])()
    assert all(not torch.equal(a, b) for a, b in zip(before, trainee.inner.parameters()))


def test_rows_that_run_out_of_memory_are_left_out(capsys):
    def refuse():
        raise torch.OutOfMemoryError("too large")

    assert list(load("train_step").first({"a": refuse, "b": lambda: None}, CPU)) == ["b"]
    assert capsys.readouterr().out == "a: out of memory\n"


def test_rows_of_a_case():
    train_step, cases = load("train_step"), importlib.import_module("harness.cases")
    flowers, windows, _, digits = cases.CASES["cpu"]
    assert train_step.ways_of(flowers, []) == list(train_step.WAYS)
    assert set(train_step.ways_of(windows, [])) == set(train_step.WAYS) - {"brute-force"}
    left_out = {"compiled", "by-block"}
    assert set(train_step.ways_of(digits, [])) == set(train_step.WAYS) - left_out
    assert train_step.ways_of(digits, ["compiled"]) == ["compiled"]
    for case in [case for found in cases.CASES.values() for case in found]:
        assert case.load()["model"]["input_size"] == list(case.size)
        assert set(case.leave_out) <= set(train_step.WAYS)


def test_masks_that_are_kept_count_as_memory():
    script = load("attention")
    near, dtype = NeighborhoodAttentionSpec(64, 7), torch.float32
    inputs = script.inputs((1, 32, 2), CPU, dtype)
    can = script.candidates(near, (1, 32, 2), CPU, dtype, True)
    kept = {name: script.kept(run, *inputs) for name, run in can.items()}
    tiles = 16 * (64 * 14**2 * 4 + (64 + 14**2) * 8) + 32**2 * 8
    assert kept == {"brute force": 32**4 * 4, "tiled": tiles, "reference": 0}


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name", "options", "sections"),
    [
        ("attention", "attention", ["--geometry", "shifted-window", "--geometry", "global"], 2),
        ("train_step", "train_step", [], 1),
        ("train_step", "profile", ["--profile"], 1),
        ("sample", "sample", ["--steps", "2"], 1),
        ("fid", "fid", [], 1),
        ("data", "data", ["--rounds", "1"], 1),
    ],
)
def test_scripts_run(script, name, options, sections, tmp_path, capsys):
    args = ["--device", "cpu", "--quick", "--results", str(tmp_path), *options]
    load(script).main(args)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / f"{name}_cpu.json").read_text())
    assert len(result) == sections
    for key, section in result.items():
        assert f"**{key}**, on " in said
        assert section["rows"]
        assert all(row[k] > 0 for row in section["rows"] for k in row if k in ("ms", "mib", "both"))
    if name == "profile":
        (section,) = result.values()
        *parts, total = section["rows"]
        assert len(parts) == 7
        assert sum(row["share"] for row in parts) == pytest.approx(total["share"], rel=1e-2)
        assert all(row["eager"] > 0 and row["straightforward"] > 0 for row in parts)


def test_quick_runs_leave_the_results_alone(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "save", lambda *args: pytest.fail("saved"))
    load("sample").main(["--device", "cpu", "--quick", "--steps", "1"])
    assert "images / s" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(capsys):
    script = load("train_step")
    with pytest.raises(SystemExit, match="flower is no config file and none of 'flowers'"):
        script.main(["--device", "cpu", "--config", "flower"])
    for args, message in {
        ("--device", "meta"): "cpu and cuda alone, got meta",
        ("--rows", "eager,fast"): "no row fast; there are straightforward, ",
    }.items():
        with pytest.raises(SystemExit):
            script.main(args)
        assert message in capsys.readouterr().err


def test_labels_of_the_figure_keep_their_order_and_a_gap():
    convergence = load("convergence")

    assert convergence.spread([3.0, 1.0], 0.5) == [3.0, 1.0]
    moved = convergence.spread([1.0, 1.0, 0.9, -5.0], 0.5)
    assert all(a - b >= 0.5 - 1e-12 for a, b in itertools.pairwise(moved))
    assert sum(moved[:3]) == pytest.approx(2.9)
    assert moved[3] == -5
    rows = {"a": [2.0, 1.0], "b": [3.0, 4.0], "c": [2.0, 1.0]}
    assert convergence.merge_equal(rows) == {"b": [3.0, 4.0], "a = c": [2.0, 1.0]}


def test_derivations_agree_where_they_are_the_same(benchmarks_importable, monkeypatch):
    """ER-SDE-Solver-1 is exact on both sides; what differs goes down with the steps."""
    pytest.importorskip("diffusers")
    applications = load("applications")
    monkeypatch.setattr(applications, "STEPS", [20, 60])
    monkeypatch.setattr(applications, "EXACT", 40)
    digits = applications.digits_denoiser()
    few = applications.problems.Mixture(
        torch.full((40,), 1 / 40, dtype=torch.float64),
        digits.means[:40].view(40, 1, 8, 8),
        digits.stds[:40],
    )
    monkeypatch.setattr(applications, "digits_denoiser", lambda: few)
    rows = applications.rows(2)
    assert max(relative for relative, _ in rows.pop(next(iter(rows)))) < 1e-12
    for name, ((coarse, less), (fine, more)) in rows.items():
        assert 0 < fine < coarse, name
        assert more > less, name


def test_psnr_of_one_level_of_255_is_48_db(benchmarks_importable):
    applications = load("applications")
    x = torch.ones(2, 1, 8, 8)
    relative, psnr = applications.relative(x * (1 + 2 / 255), x)
    assert relative == pytest.approx(2 / 255, rel=1e-4)
    assert psnr == pytest.approx(48.13, abs=0.01)


def test_the_table_beside_the_pipeline_of_diffusers(benchmarks_importable, tmp_path, capsys):
    pytest.importorskip("diffusers")
    load("pipeline").main(["--device", "cpu", "--quick", "--results", str(tmp_path)])
    (section,) = json.loads((tmp_path / "pipeline_cpu.json").read_text()).values()
    assert [row["network"] for row in section["rows"]] == ["eager", "computes nothing"]
    for row in section["rows"]:
        assert row["apart"] <= 1
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"], rel=1e-3)
    assert "16 x 16, batch of 4, 2 steps of DDIM" in capsys.readouterr().out


def test_the_pipeline_of_diffusers_draws_the_same_images():
    pytest.importorskip("diffusers")
    pipeline = load("pipeline")
    both = pipeline.Both(pipeline.make_unet(16, 8), 16, batch=2, steps=3, device="cpu")
    assert both.difference() <= 1
    pixels = [image.getextrema() for image in both.ours()]
    assert all(high - low > 30 for image in pixels for low, high in image)
