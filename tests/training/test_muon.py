"""Muon for hidden matrices with AdamW for the rest."""

import copy
import json

import pytest
import runs
import torch

import k_diffusion as K
from k_diffusion.training import muon, optim

SECTION = {"type": "muon", "lr": 1e-3, "weight_decay": 0.1}


def make(**section):
    torch.manual_seed(0)
    config = runs.tiny_config(optimizer=SECTION | section)
    model = K.config.make_model(config)
    for p in model.parameters():
        p.data.normal_(std=0.1)
    return model, config


def draw_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_hidden_matrices():
    model, _ = make()
    hidden = muon.hidden_matrices(model)
    names = {n for n, p in model.named_parameters() if p in hidden}
    block = {f"{part}.weight" for part in ("norm.linear", "qkv_proj", "out_proj")}
    assert {n.split("self_attn.")[1] for n in names if "self_attn." in n} == block
    assert {"merges.0.proj.weight", "mapping.blocks.0.up_proj.weight"} <= names
    first_and_last = "patch_in", "patch_out", "time_in", "aug_in", "class_emb"
    assert not [n for n in names if n.startswith(first_and_last)]
    assert all(p.ndim == 2 for p in hidden)


def test_first_and_last_layers_exist():
    for model in ("image_transformer_v1", "image_transformer_v2", "image_v1"):
        config = K.config.load_config(small(model))
        inner = K.config.make_model(config)
        for module in inner.modules():
            for name in getattr(module, "outer_layers", ()):
                *parents, last = name.split(".")
                assert hasattr(module.get_submodule(".".join(parents)), last), name
        assert muon.hidden_matrices(inner)


def small(name):
    model = {"type": name, "input_channels": 1, "input_size": 8, "patch_size": 2}
    model["sigma_sample_density"] = {"type": "lognormal", "mean": 0.0, "std": 1.0}
    if name == "image_v1":
        sizes = {"mapping_out": 16, "depths": [1], "channels": [32], "self_attn_depths": [True]}
    elif name == "image_transformer_v1":
        sizes = {"width": 64, "depth": 1}
    else:
        sizes = {"widths": [64], "depths": [1]}
    return {"model": model | sizes, "dataset": {"type": "none", "num_classes": 2}}


def test_a_step_is_of_adamw_for_the_rest_and_of_adamws_size_for_matrices():
    model, config = make(weight_decay=0.0)
    before = copy.deepcopy(model)
    opt, adamw = (
        optim.make_optimizer(c, m)
        for c, m in ((config, model), (runs.tiny_config(optimizer={"lr": 1e-3} | NO_DECAY), before))
    )
    hidden = muon.hidden_matrices(model)
    names = {n for n, p in model.named_parameters() if p in hidden}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    draw_gradients(model, 1)
    draw_gradients(before, 1)
    opt.step()
    adamw.step()
    rates = {p: group["lr"] for group in opt.param_groups for p in group["params"]}
    for (name, p), other in zip(model.named_parameters(), before.parameters()):
        if name not in names:
            torch.testing.assert_close(p, other, msg=name)
            continue
        # an orthogonal matrix U V^T, whose singular values Newton-Schulz brings near 1
        step = (start[name] - p.detach()) / (rates[p] * 0.2 * max(p.shape) ** 0.5)
        values = torch.linalg.svdvals(step)
        assert values.max() < 1.4, name
        assert 0.7 < values.median() < 1.3, name
        momentum = torch.linalg.svd(p.grad, full_matrices=False)
        nearest = momentum.U @ momentum.Vh
        assert torch.nn.functional.cosine_similarity(step.flatten(), nearest.flatten(), 0) > 0.9


NO_DECAY = {"type": "adamw", "weight_decay": 0.0}


def test_its_state_loads_and_goes_on_bitwise():
    model, config = make()
    opt = optim.make_optimizer(config, model)
    for seed in range(2):
        draw_gradients(model, seed)
        opt.step()
    other = copy.deepcopy(model)
    again = optim.make_optimizer(config, other)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, optimizer in ((model, opt), (other, again)):
        for group in optimizer.param_groups:  # as a schedule does
            group["lr"] *= 0.5
        draw_gradients(each, 2)
        optimizer.step()
    assert runs.differences(dict(model.state_dict()), dict(other.state_dict())) == []
    assert runs.differences(opt.state_dict()["state"], again.state_dict()["state"]) == []
    assert len(opt.state) == len(list(model.parameters()))


def test_weight_decay_is_decoupled_and_of_matrices_alone():
    model, config = make()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = optim.make_optimizer(config, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    rates = {p: g["lr"] * g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] * (1 - rates[p]))
        assert bool(rates[p]) == (p in muon.hidden_matrices(model) or name in DECAYED)


DECAYED = {"patch_in.proj.weight", "patch_out.proj.weight"}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("numbers", [1, 2**25])
def test_its_steps_are_those_of_torch(nesterov, numbers, monkeypatch):
    """Which makes them orthogonal in bfloat16, one after the other."""
    monkeypatch.setattr(muon, "NUMBERS_AT_ONCE", numbers)
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 4), (4, 6), (6, 4), (5, 5)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov}
    opts = (
        muon.MuonWithAdamW([{"params": ours}], set(ours), **options),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options),
    )
    for _ in range(3):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for params, opt in zip((ours, theirs), opts):
            for p, grad in zip(params, grads):
                p.grad = grad.clone()
            opt.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01)
        assert (a - 1).abs().max() > 0.1
        torch.testing.assert_close(
            opts[0].state[a]["momentum_buffer"], opts[1].state[b]["momentum_buffer"]
        )


def test_a_run_with_muon_resumes_bitwise(tmp_path, monkeypatch):
    monkeypatch.setattr("k_diffusion.generation.STEPS", 1)
    (tmp_path / "tiny.json").write_text(json.dumps(runs.TINY))
    fast = "--seed", 1, "--batch-size", 4, "--sample-n", 1, "--num-workers", 0
    for name, ends in (("whole", (3,)), ("parts", (2, 3))):
        for end in ends:
            words = "--config", "tiny.json", "--set", "optimizer.type=muon", "--name", name, *fast
            runs.call("train", *words, "--end-step", end, folder=tmp_path, monkeypatch=monkeypatch)
    states = [runs.read(tmp_path / f"{name}_00000003.pth") for name in ("whole", "parts")]
    assert [state.pop("elapsed") > 0 for state in states] == [True, True]
    assert runs.differences(*states) == []
