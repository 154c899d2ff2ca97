"""The sampling scripts' shared flags, through sample_clip_guided.py, in this process."""

import argparse
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import latents as tiny
import numpy as np
import pytest
import torch
from PIL import Image
from problems import normal
from torch import nn

from k_diffusion import checkpoints, config, guidance, loading, models
from k_diffusion.encoders import clip
from k_diffusion.encoders.autoencoder import find_autoencoder
from k_diffusion.scripts import guiding, sample

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]


def write_model(path, num_classes=0, channels=3, **sections):
    """A model of 8 x 8 images; as it begins, with an output of 0, it denoises N(0, 0.5^2)."""
    loaded = config.load_config(
        {
            **sections,
            "model": {
                "type": "image_transformer_v2",
                "input_channels": channels,
                "input_size": [8, 8],
                "patch_size": [4, 4],
                "depths": [1],
                "widths": [16],
                "d_ffs": [16],
                "self_attns": [{"type": "global", "d_head": 8}],
                "mapping_depth": 1,
                "mapping_width": 16,
                "mapping_d_ff": 16,
                "sigma_data": 0.5,
                "sigma_min": 0.02,
                "sigma_max": 10,
                "sigma_sample_density": {"type": "lognormal", "mean": 0, "std": 1},
            },
            "dataset": {"type": "imagefolder", "location": "x", "num_classes": num_classes},
        }
    )
    torch.manual_seed(0)
    model = config.make_model(loaded)
    checkpoints.write_inference(path, loaded, model.state_dict(), "fp32")
    return path


def write_latent_model(path, seed=0, **more):
    """A model of 2 x 8 x 8 latents of images of 16 x 16, and its autoencoder beside it."""
    name = f"autoencoder_{seed}.safetensors"
    tiny.write_autoencoder(path.with_name(name), seed)
    section = {"location": name, "mean": [0.0, 0.0], "std": [0.1, 0.1]}
    return write_model(path, channels=2, autoencoder=section, **more)


class TinyCLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Parameter(normal(0, 4 * 3 * 16, 5, std=0.1))

    def encode_image(self, images):
        return nn.functional.avg_pool2d(images, 28).flatten(1) @ self.projection

    def encode_text(self, tokens):
        return normal(int(tokens), 1, 5)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs sample_clip_guided.py with flags, where loading CLIP gives a stand-in."""
    spec = importlib.util.spec_from_file_location("script", ROOT / "sample_clip_guided.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encoder = clip.CLIPEncoder(TinyCLIP(), lambda texts: torch.tensor([len(t) for t in texts]))
    loads = []
    monkeypatch.setattr(
        clip, "load_clip", lambda name, device, _: (loads.append(name), encoder.to(device))[1]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("K_DIFFUSION_DEBUG", "1")

    def run(*flags):
        argv = ["sample_clip_guided.py", *map(str, flags), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", argv)
        module.main()

    run.module, run.encoder, run.loads = module, encoder, loads
    return run


def pixels(path):
    return torch.tensor(np.asarray(Image.open(path)), dtype=torch.float32)


def images(prefix, n):
    return torch.stack([pixels(f"{prefix}_{i:05}.png") for i in range(n)])


# ------------------------------------------------------------------------------------- the script


def test_published_flags_and_defaults(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "a cat", "--checkpoint", "m.safetensors", "-cgs", "3"])
    args = vars(script.module.parse_args())
    published = {
        "prompt": "a cat",
        "batch_size": 64,
        "checkpoint": Path("m.safetensors"),
        "clip_guidance_scale": 3.0,
        "clip_model": "ViT-B/16",
        "config": None,
        "n": 64,
        "prefix": "out",
        "steps": 100,
    }
    assert {name: args[name] for name in published} == published


def test_images_come_nearer_to_the_prompt_the_stronger_the_guidance(script, capsys):
    model = write_model(Path("m.safetensors"))
    flags = ("a digit", "--checkpoint", model, "-n", 3, "--steps", 6, "--seed", 4)
    losses = []
    for scale in (0, 1, 10):
        script(*flags, "-cgs", scale, "--prefix", f"s{scale}", "--clip-model", "ViT-L/14")
        x = images(f"s{scale}", 3).movedim(-1, 1) / 127.5 - 1
        losses.append(clip.prompt_loss(script.encoder, "a digit")(x))
    assert (losses[1] < losses[0]).all()
    assert (losses[2] < losses[1]).all()
    assert script.loads == ["ViT-L/14"] * 3
    assert "wrote s10_00000.png to s10_00002.png" in capsys.readouterr().out


def test_shifts_and_threshold_are_flags(script):
    model = write_model(Path("m.safetensors"))
    flags = ("a digit", "--checkpoint", model, "-n", 2, "--steps", 4, "--seed", 4, "-cgs", 50)
    made = {}
    for off in ("", "--no-shifts", "--no-threshold"):
        script(*flags, "--prefix", f"x{off}", *filter(None, [off]))
        made[off] = images(f"x{off}", 2)
    assert (made[""] - made["--no-shifts"]).abs().max() > 2
    assert (made[""] - made["--no-threshold"]).abs().max() > 2


def test_clip_sees_the_images_of_a_latent_model(script, capsys):
    """They come nearer to the prompt, and their latents, which have no range, aren't clamped."""
    model = write_latent_model(Path("m.safetensors"))
    flags = ("a digit", "--checkpoint", model, "-n", 3, "--steps", 6, "--seed", 4, "--no-shifts")
    losses = []
    for scale in (0, 3, 30):
        script(*flags, "-cgs", scale, "--prefix", f"s{scale}")
        made = images(f"s{scale}", 3)
        assert made.shape == (3, 16, 16)
        losses.append(clip.prompt_loss(script.encoder, "a digit")(made[:, None] / 127.5 - 1))
    assert (losses[1] < losses[0]).all()
    assert (losses[2] < losses[1]).all()
    assert "3 images of 16 x 16" in capsys.readouterr().out
    script(*flags, "-cgs", 30, "--no-threshold", "--prefix", "free")
    assert torch.equal(images("free", 3), made)


def test_texts_and_images_as_weighted_prompts(script):
    model = write_model(Path("m.safetensors"))
    Image.linear_gradient("L").resize((8, 8)).convert("RGB").save("prompt.png")
    flags = ("--checkpoint", model, "-n", 2, "--steps", 5, "--seed", 4, "-cgs", 5)

    def sampled(*prompts):
        script(*flags, "--prefix", "y", *prompts)
        return images("y", 2).movedim(-1, 1) / 127.5 - 1

    picture = ("--image-prompt", "prompt.png")
    loss = clip.prompt_loss(
        script.encoder, images=[pixels("prompt.png").movedim(-1, 0) / 127.5 - 1]
    )
    other = sampled("a digit")
    towards, away = (sampled("a digit", *picture, weight) for weight in (4, -4))
    assert (loss(towards) < loss(other)).all()
    assert (loss(other) < loss(away)).all()
    assert torch.equal(sampled(*picture, 0, "--add-prompt", "a digit", 1), other)


def test_image_i_of_a_seed_is_the_same_in_any_batch(script):
    model = write_model(Path("m.safetensors"))
    flags = ("a", "--checkpoint", model, "-n", 4, "--steps", 4, "--seed", 4, "-cgs", 20)
    for size in (1, 3, 64):
        script(*flags, "--batch-size", size, "--prefix", f"b{size}")
    assert (images("b1", 4) - images("b64", 4)).abs().max() <= 1
    assert (images("b3", 4) - images("b64", 4)).abs().max() <= 1
    assert (images("b64", 4)[0] - images("b64", 4)[1]).abs().max() > 50


def test_the_model_is_compiled_where_a_flag_says_so(script, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        models, "compile_model", lambda net, unit, **how: compiled.append((net, unit, how))
    )
    model = write_model(Path("m.safetensors"))
    flags = ("a", "--checkpoint", model, "-n", 3, "--batch-size", 2, "--steps", 2, "--seed", 4)
    script(*flags, "--compile", "--prefix", "whole")
    script(*flags, "--compile", "block", "--prefix", "blocks")
    script(*flags, "--prefix", "eager")
    assert [(unit, how) for _, unit, how in compiled] == [("model", {}), ("block", {})]
    assert all(isinstance(net, nn.Module) and hasattr(net, "param_groups") for net, *_ in compiled)
    assert (images("whole", 3) - images("eager", 3)).abs().max() <= 1


def test_cuda_graphs_are_of_a_whole_model_on_a_gpu(script, monkeypatch):
    made = []
    monkeypatch.setattr(models, "compile_model", lambda net, unit, **how: made.append((unit, how)))
    args = argparse.Namespace(compile="model", cuda_graphs=True)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    wrapped = nn.Module()
    wrapped.inner_model = nn.Identity()
    assert sample.ready(wrapped, args, torch.device("cuda")) is wrapped
    assert made == [("model", {"mode": "reduce-overhead"})]
    with pytest.raises(ValueError, match="--cuda-graphs needs a CUDA device, got cpu"):
        sample.ready(wrapped, args, torch.device("cpu"))


def test_a_grid_of_a_class_conditional_model(script):
    model = write_model(Path("m.safetensors"), num_classes=3)
    script(
        *("a", "--checkpoint", model, "-n", 6, "--steps", 2, "--grid", "new/grid.png"),
        *("--cfg-scale", 2, "--cfg-interval", 0.1, 5, "--sampler", "euler", "--churn", 3),
        *("--size", "8x12", "--dtype", "bf16"),
    )
    width, height = Image.open("new/grid.png").size
    assert width / height == pytest.approx(2 * 12 / (3 * 8), rel=0.1)


def test_errors_are_sentences_and_come_before_the_work(script, monkeypatch, capsys):
    monkeypatch.setenv("K_DIFFUSION_DEBUG", "0")
    model = write_model(Path("m.safetensors"))
    Path("file").touch()
    for flags, message in [
        (("--sampler", "dpmpp_2m", "--churn", "1"), "takes no --churn; these do: .*euler"),
        (("--sampler", "dpmpp_2n"), r"unknown sampler 'dpmpp_2n' \(did you mean"),
        (("--grid", "file/grid.png"), "can't make the folder"),
        (("--cfg-scale", "2"), "needs a class-conditional model"),
        (("--cfg-interval", "1", "2"), "needs a --cfg-scale"),
        (("--cfg-rule", "apg"), "--cfg-rule needs a --cfg-scale"),
        (("--cuda-graphs",), "--cuda-graphs needs --compile"),
        (("--cuda-graphs", "--compile", "block"), "--cuda-graphs needs --compile"),
        (("--add-prompt", "b", "much"), "a prompt's weight must be a number, got 'much'"),
        (("--image-prompt", "file", "1"), "can't read the image file"),
    ]:
        with pytest.raises(SystemExit) as leaving:
            script("a", "--checkpoint", model, "-n", 2, "--steps", 2, *flags)
        assert re.search(message, f"{leaving.value.code} {capsys.readouterr().err}")
    with pytest.raises(SystemExit, match="nothing to guide by: pass a text, or --image-prompt"):
        script("--checkpoint", model)
    assert list(Path().glob("*.png")) == []


def test_list_samplers(script, capsys):
    with pytest.raises(SystemExit) as leaving:
        script("--list-samplers")
    assert leaving.value.code == 0
    assert "dpmpp_2m" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- guidance


def build(model_config, **flags):
    class Flags:
        cfg_scale, cfg_interval, autoguidance, autoguidance_scale = 1.0, None, None, 2.0
        cfg_rule, skip_layers, identity_attention, perturbed_scale = "linear", [], [], 2.0

    for name, value in flags.items():
        setattr(Flags, name, value)
    denoiser = flags.get("denoiser", nn.Identity())
    return sample.make_guidance(denoiser, model_config, Flags, torch.device("cpu"))


def test_guidance_by_flags(tmp_path):
    weak = write_model(tmp_path / "weak.safetensors", num_classes=3)
    loaded = config.load_config(weak)
    assert isinstance(build(loaded), nn.Identity)
    assert isinstance(build(loaded, cfg_scale=2.0), guidance.CFGDenoiser)
    guided = build(loaded, cfg_scale=3.0, cfg_interval=(0.1, 5.0), autoguidance=weak)
    assert isinstance(guided, guidance.IntervalDenoiser)
    assert (guided.sigma_min, guided.sigma_max) == (0.1, 5.0)
    assert (guided.guided.scale, guided.guided.uncond["class_cond"].tolist()) == (3.0, [3])
    assert isinstance(guided.guided.model, guidance.AutoguidedDenoiser)
    assert guided.guided.model.scale == 2.0


def test_rules_and_perturbations_by_flags(tmp_path):
    denoiser, loaded = loading.load_denoiser(write_model(tmp_path / "m.safetensors", 3))
    guided = build(loaded, cfg_scale=2.0, cfg_rule="cfg-zero-star").combine
    assert isinstance(guided, guidance.CFGZeroStar)
    assert guided.sigma_data == 0.5
    flags = {"skip_layers": ["mid_level.0"], "identity_attention": ["mid_level"]}
    guided = build(loaded, denoiser=denoiser, perturbed_scale=3.0, **flags)
    assert guided.scale == 3.0
    assert guided.model is guided.weak.model is denoiser
    assert guided.weak.perturbation.skip == ("mid_level.0",)
    assert guided.weak.perturbation.identity == ("mid_level",)
    with pytest.raises(ValueError, match="'mid' names no blocks"):
        build(loaded, denoiser=denoiser, skip_layers=["mid"])


@pytest.mark.parametrize(
    ("other", "key"), [({"num_classes": 2}, "num_classes"), ({"channels": 1}, "input_channels")]
)
def test_a_weaker_model_of_something_else_is_an_error(tmp_path, other, key):
    loaded = config.load_config(write_model(tmp_path / "m.safetensors", num_classes=3))
    weak = write_model(tmp_path / "weak.safetensors", **{"num_classes": 3, **other})
    with pytest.raises(ValueError, match=f"weak.safetensors has {key}"):
        build(loaded, autoguidance=weak)


def test_a_weaker_model_of_other_latents_is_an_error(tmp_path):
    denoiser, loaded = loading.load_denoiser(write_latent_model(tmp_path / "m.safetensors"))
    weak = write_latent_model(tmp_path / "weak.safetensors")
    guided = build(loaded, denoiser=denoiser, autoguidance=weak)
    assert isinstance(guided, guidance.AutoguidedDenoiser)
    other = write_latent_model(tmp_path / "other.safetensors", seed=1)
    prints = [
        loading.load_autoencoder(tmp_path / f"autoencoder_{i}.safetensors").fingerprint
        for i in (1, 0)
    ]
    says = "other.safetensors has the autoencoder {}, but the model it is to guide {}; both must"
    with pytest.raises(ValueError, match=says.format(*prints)):
        build(loaded, denoiser=denoiser, autoguidance=other)


def stub_weak(monkeypatch, denoiser, config):
    monkeypatch.setattr(guiding, "load_denoiser", lambda *args, **kwargs: (denoiser, config))


def test_a_weaker_model_of_latents_in_other_units_is_an_error(tmp_path, monkeypatch):
    denoiser, loaded = loading.load_denoiser(write_latent_model(tmp_path / "m.safetensors"))
    weak, _ = loading.load_denoiser(tmp_path / "m.safetensors")
    stub_weak(monkeypatch, weak, loaded)
    coder = find_autoencoder(weak)
    coder.normalize([0.0, 1e-5], [0.10001, 0.1], 0.5)  # measured anew
    build(loaded, denoiser=denoiser, autoguidance="weak")
    for other in (
        ([0.0, 0.02], [0.1, 0.1], 0.5),
        ([0.0, 0.0], [0.1, 0.2], 0.5),
        ([0.0, 0.0], [0.1, 0.1], 1.0),
        (0.0, torch.full((2, 8, 8), 0.2), 0.5),
    ):
        coder.normalize(*other)
        with pytest.raises(ValueError, match=r"^weak has its latents in other units \(autoencoder"):
            build(loaded, denoiser=denoiser, autoguidance="weak")


def test_a_weaker_model_of_another_text_encoder_is_an_error(tmp_path, monkeypatch):
    denoiser, loaded = loading.load_denoiser(write_model(tmp_path / "m.safetensors"))
    told = {**loaded, "text": {"fingerprint": "1"}}
    for text in (None, {"fingerprint": None}, {"fingerprint": "1"}):
        stub_weak(monkeypatch, denoiser, {**loaded, "text": text})
        build(told, autoguidance="weak")
    stub_weak(monkeypatch, denoiser, {**loaded, "text": {"fingerprint": "2"}})
    with pytest.raises(ValueError, match=r"^weak has the text encoder 2, but the .* to guide 1;"):
        build(told, autoguidance="weak")


class ClassAsLevel(nn.Module):
    """Denoises to the image whose pixels are all class / 10."""

    def forward(self, x, sigma, class_cond):
        return torch.ones_like(x) * class_cond[:, None, None, None] / 10


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_image_i_has_its_class_on_whichever_process(script, monkeypatch, processes):
    loaded = config.load_config(write_model(Path("m.safetensors"), num_classes=10))
    monkeypatch.setattr(sample, "load_denoiser", lambda *args: (ClassAsLevel(), loaded))
    monkeypatch.setattr(sample.distributed, "agree_on_seed", lambda seed: seed)
    flags = ["--checkpoint", "m.safetensors", "-n", "7", "--steps", "2", "--seed", "4"]
    flags += ["--class", "3", "9", "0", "--device", "cpu"]
    for index in range(processes):
        accelerator = SimpleNamespace(
            process_index=index,
            num_processes=processes,
            is_main_process=index == 0,
            print=lambda text: None,
            end_training=lambda: None,
        )
        monkeypatch.setattr(
            "k_diffusion.distributed.make_accelerator",
            lambda accelerator=accelerator, **kw: accelerator,
        )
        parser = argparse.ArgumentParser()
        sample.add_arguments(parser, sampler="euler", steps=2)
        sample.run(parser.parse_args(flags))
    got = images("out", 7)[:, 0, 0, 0] / 127.5 - 1
    want = torch.tensor([3, 9, 0, 3, 9, 0, 3]) / 10
    torch.testing.assert_close(got, want, rtol=0, atol=1 / 127)
