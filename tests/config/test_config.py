"""Configs: defaults, errors, overrides, where they are read from, and what is made of them."""

import io
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import save_file

import k_diffusion as K
from k_diffusion.config import ConfigError, load_config, parse_overrides, round_to_power_of_two
from k_diffusion.denoisers import sigmoid_weighting
from k_diffusion.models.image_v1 import ImageDenoiserModelV1

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))

V2 = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [32, 32],
        "patch_size": [4, 4],
        "depths": [2, 2],
        "widths": [128, 256],
        "sigma_sample_density": {"type": "cosine-interpolated"},
    }
}
V1 = {
    "model": {
        "type": "image_v1",
        "input_channels": 3,
        "input_size": [8, 8],
        "mapping_out": 16,
        "depths": [1, 1],
        "channels": [8, 8],
        "self_attn_depths": [False, False],
        "sigma_sample_density": {"type": "loguniform"},
    }
}
T1 = {
    "model": {
        "type": "image_transformer_v1",
        "input_channels": 3,
        "input_size": 8,
        "patch_size": 2,
        "width": 128,
        "depth": 1,
        "sigma_sample_density": {"type": "loglogistic"},
    }
}


def v2(**model):
    return {"model": V2["model"] | model}


def neighborhood(**keys):
    return {"type": "neighborhood", **keys}


# ---------------------------------------------------------------- defaults


def test_defaults_of_image_transformer_v2():
    config = load_config(v2(d_ffs=[None, 500]))
    model = config["model"]
    assert model["d_ffs"] == [384, 500]
    assert model["self_attns"] == [
        {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
        {"type": "global", "d_head": 64},
    ]
    assert model["dropout_rate"] == [0.0, 0.0]
    assert (model["mapping_width"], model["mapping_d_ff"]) == (256, 768)
    assert (model["sigma_data"], model["sigma_min"], model["sigma_max"]) == (1, 0.01, 80)
    assert config["dataset"]["type"] == "imagefolder"
    assert config["optimizer"] == {
        "type": "adamw",
        "lr": 5e-4,
        "betas": [0.9, 0.99],
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    }
    assert config["lr_sched"] == {"type": "constant", "warmup": 0.0}
    assert config["ema_sched"]["max_value"] == 0.9999


def test_training_defaults_follow_the_model_unless_another_type_is_chosen():
    config = load_config(V1)
    assert config["optimizer"]["betas"] == [0.95, 0.999]
    assert config["lr_sched"] == {"type": "constant", "warmup": 0.0}
    config = load_config(V1, {"optimizer": {"type": "sgd"}, "lr_sched": {"type": "constant"}})
    assert config["optimizer"]["lr"] == 5e-4
    assert config["lr_sched"]["warmup"] == 0
    assert load_config(V1, {"optimizer": {"lr": 1e-3}})["optimizer"]["betas"] == [0.95, 0.999]


def test_one_number_is_a_square():
    model = load_config(T1)["model"]
    assert (model["input_size"], model["patch_size"]) == ([8, 8], [2, 2])
    assert model["d_ff"] == round_to_power_of_two(128 * 8 / 3, tol=0.05)


@pytest.mark.parametrize(
    ("x", "want"), [(341.3, 352), (1365.3, 1408), (512, 512), (7.1, 7), (2730.7, 2816)]
)
def test_rounding_stays_within_its_tolerance(x, want):
    assert round_to_power_of_two(x, tol=0.05) == want
    assert abs(want - x) <= 0.05 * x


def test_a_dropout_rate_may_be_an_int():
    for config in (v2(dropout_rate=0), {"model": T1["model"] | {"dropout_rate": 0}}):
        model = K.config.make_model(load_config(config))
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0}


@pytest.mark.parametrize("config", [V1, V2, T1, *CONFIGS], ids=lambda c: getattr(c, "stem", ""))
def test_a_loaded_config_loads_to_itself(config):
    once = load_config(config)
    assert load_config(once) == once
    assert load_config(json.loads(json.dumps(once))) == once


# ---------------------------------------------------------------- errors, word for word

ERRORS = [
    (
        v2(self_attns=[{"type": "global"}, neighborhood(kernal_size=7)]),
        "model.self_attns[1]: unknown key 'kernal_size' (did you mean 'kernel_size'?)",
    ),
    (V2 | {"modle": {}}, "unknown key 'modle' (did you mean 'model'?)"),
    (v2(zzz=1), "model: unknown key 'zzz'"),
    (v2(depths=[2, "a"]), "model.depths[1]: input should be a valid integer, got 'a'"),
    (v2(sigma_data="x"), "model.sigma_data: input should be a valid number, got 'x'"),
    (v2(input_channels=True), "model.input_channels: input should be a valid integer, got True"),
    (v2(input_channels=0), "model.input_channels: input should be greater than 0, got 0"),
    (
        v2(type="image_transformer_v3"),
        "model.type: unknown type 'image_transformer_v3' (did you mean 'image_transformer_v2'?); "
        "there are: image_v1, image_transformer_v1, image_transformer_v2, kl_autoencoder",
    ),
    (
        v2(self_attns=[{"type": "neighbourhood"}, {"type": "global"}]),
        "model.self_attns[0].type: unknown type 'neighbourhood' (did you mean 'neighborhood'?); "
        "there are: global, neighborhood, shifted-window, none",
    ),
    (
        V2 | {"optimizer": {"type": "adam"}},
        "optimizer.type: unknown type 'adam' (did you mean 'adamw'?); "
        "there are: adamw, adam8bit, sgd, muon",
    ),
    ({"model": {}}, "model: needs a 'type'"),
    ({}, "model: is required"),
    (V2 | {"dataset": {"type": "imagefolder"}}, "dataset.location: is required"),
    (
        V2 | {"dataset": {"type": "digits", "split": "valid"}},
        "dataset.split: input should be 'all', 'train' or 'test', got 'valid'",
    ),
    (
        v2(input_size=[30, 33]),
        "model: input_size [30, 33] does not divide by [8, 8] (patch_size [4, 4] x 2 for each "
        "level above the first); sizes that do: [24, 32], [32, 40]",
    ),
    (
        v2(self_attns=[{"type": "shifted-window", "window_size": 3}, {"type": "none"}]),
        "model.self_attns[0]: window_size 3 does not divide the 8 x 8 tokens of this "
        "level; window sizes that do: [2, 4, 8]",
    ),
    (
        v2(self_attns=[{"type": "global", "d_head": 48}, {"type": "none"}]),
        "model.self_attns[0]: width 128 is not a multiple of d_head 48; "
        "values of d_head that divide it: [8, 16, 32, 64, 128]",
    ),
    (
        v2(self_attns=[{"type": "none"}, {"type": "global", "d_head": 4}]),
        "model.self_attns[1]: d_head must be a multiple of 8, for axial RoPE, got 4",
    ),
    (v2(sigma_min=80), "model: sigma_min 80.0 must be below sigma_max 80.0"),
    (
        v2(depths=[1, 1, 1]),
        "model: one entry per level: depths has 3, widths has 2, d_ffs has 2, self_attns has 3, "
        "dropout_rate has 3",
    ),
    (v2(has_variance=True), "model: has_variance needs a model with a variance head: image_v1"),
    (
        {"model": T1["model"] | {"width": 100}},
        "model: width 100 is not a multiple of d_head 64; values of d_head that divide it: none",
    ),
    (
        v2(zzz=1) | {"optimizer": {"lr": 0}},
        "model: unknown key 'zzz'; optimizer.lr: input should be greater than 0, got 0",
    ),
]


@pytest.mark.parametrize(("config", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_errors_name_the_path_and_what_would_do(config, message):
    with pytest.raises(ConfigError) as error:
        load_config(config, strict=True)
    assert str(error.value) == message


def test_unknown_keys_and_types_are_kept_with_a_warning_that_names_the_nearest():
    foreign = {"type": "image_transformer_v3", "zzz": [1]}
    with pytest.warns(UserWarning, match="kept as it is: .*did you mean 'image_transformer_v2'"):
        model = load_config({"model": foreign})["model"]
    assert model.items() >= (foreign | {"sigma_data": 1.0, "loss_config": "karras"}).items()
    with pytest.raises(ConfigError, match=r"model\.type: unknown type 'image_transformer_v3'"):
        K.config.make_model({"model": foreign})
    with pytest.warns(UserWarning, match="unknown key 'widht' .did you mean 'widths'"):
        config = load_config(v2(widht=3) | {"mine": {"a": 1}})
    assert (config["model"]["widht"], config["mine"]) == (3, {"a": 1})
    with pytest.warns(UserWarning, match="unknown type 'wds'"):
        dataset = load_config(V2 | {"dataset": {"type": "wds", "shards": 2}})["dataset"]
    assert (dataset["shards"], dataset["num_classes"]) == (2, 0)


def test_what_a_library_call_may_leave_out():
    """Of V2 a size, attention and blocks, of the other sections all; the scripts want a size."""
    small = {k: v for k, v in V2["model"].items() if k != "input_size"}
    model = small | {"self_attns": [], "depths": [0, 1], "mapping_depth": 0}
    config = load_config({"model": model, "dataset": {"location": "x"}})
    assert config["dataset"]["type"] == "imagefolder"
    y = K.config.make_model(config).eval()(torch.zeros(1, 3, 56, 56), torch.ones(1))
    assert y.shape == (1, 3, 56, 56)
    with pytest.raises(ConfigError, match=r"model\.input_size: is required"):
        load_config({"model": model}, strict=True)
    with pytest.raises(
        ConfigError, match=r"model\.input_size: is required, as its sigma_sample_de"
    ):
        K.config.make_sample_density(config["model"])
    density = {"type": "lognormal", "mean": 0.0, "std": 1.0}
    assert K.config.make_sample_density({"sigma_sample_density": density})([4]).shape == (4,)
    wrap = K.config.make_denoiser_wrapper({"model": {"sigma_data": 0.5, "mine": 1}})
    assert wrap(torch.nn.Identity()).sigma_data == 0.5


def test_sgd_decays_weights_as_the_other_optimizers():
    assert load_config(V2 | {"optimizer": {"type": "sgd"}})["optimizer"]["weight_decay"] == 1e-4


def test_a_kernel_larger_than_the_map_is_found_when_the_model_is_made():
    config = load_config(v2(self_attns=[neighborhood(kernel_size=9), {"type": "global"}]))
    with pytest.raises(ConfigError) as error:
        K.config.make_model(config)
    assert str(error.value) == (
        "model.self_attns[0]: kernel_size 9 is larger than the 8 x 8 tokens of this level; "
        "use at most 8, a larger image or global attention"
    )


# ---------------------------------------------------------------- overrides


def test_overrides_are_json_or_else_strings():
    assert parse_overrides(
        ["model.patch_size=[2,2]", "dataset.location=x=y", "model.sigma_max=1e2", "a.b.c=null"]
    ) == {
        "model": {"patch_size": [2, 2], "sigma_max": 100.0},
        "dataset": {"location": "x=y"},
        "a": {"b": {"c": None}},
    }
    for text in ("model.patch_size", "=3"):
        with pytest.raises(ConfigError, match=f"an override is KEY.PATH=VALUE, got '{text}'"):
            parse_overrides([text])


def test_an_override_of_a_type_replaces_its_section():
    config = V2 | {"lr_sched": {"type": "exponential", "num_steps": 5, "warmup": 0.5}}
    assert load_config(config, ["lr_sched.type=constant"])["lr_sched"]["warmup"] == 0
    same = load_config(config, ["lr_sched.type=exponential", "lr_sched.decay=0.25"])["lr_sched"]
    assert (same["num_steps"], same["decay"], same["warmup"]) == (5, 0.25, 0.5)


def test_overrides_are_laid_over_the_config_and_checked():
    config = load_config(V2, ["model.widths=[64,192]", "optimizer.lr=0.1"])
    assert config["model"]["widths"] == [64, 192]
    assert config["optimizer"]["lr"] == 0.1
    assert load_config(V2, {"optimizer": {"lr": 0.1}})["optimizer"] == config["optimizer"]
    assert V2["model"]["widths"] == [128, 256]
    with pytest.raises(ConfigError, match=r"unknown key 'width' .did you mean 'widths'"):
        load_config(V2, ["model.width=[64,64]"], strict=True)


# ---------------------------------------------------------------- where configs come from


def test_paths_files_and_dicts_are_alike(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V2))
    want = load_config(V2)
    assert load_config(path) == load_config(str(path)) == want
    with open(path) as file:
        assert load_config(file) == want
    assert load_config(io.StringIO(json.dumps(V2))) == want


def test_what_is_not_a_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no config file .*nothing\.json"):
        load_config(tmp_path / "nothing.json")
    path = tmp_path / "bad.json"
    path.write_text('{"model": ')
    with pytest.raises(ConfigError, match=r"bad\.json is not JSON: .*line 1"):
        load_config(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"bad\.json must hold a JSON object, got list"):
        load_config(path)
    with pytest.raises(ConfigError, match="the open file is not JSON"):
        load_config(io.StringIO("{"))


def test_unknown_keys_of_a_checkpoint_only_warn_scripts_too(tmp_path):
    path = tmp_path / "model.safetensors"
    old = v2(zzz=1) | {"gone": 2}
    save_file({"x": torch.zeros(1)}, path, metadata={"config": json.dumps(old)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(path, strict=True)
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert config.pop("gone") == 2
    assert config["model"].pop("zzz") == 1
    assert config == load_config(V2)
    assert any("unknown key 'zzz'" in t for t in texts)
    assert any("unknown key 'gone'" in t for t in texts)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"model\.safetensors has no config in its metadata"):
        load_config(path)


# ---------------------------------------------------------------- what is made


def test_the_shipped_schema_is_current():
    code, text = runs.run(sys.executable, "-m", "k_diffusion.config", folder=ROOT)
    assert code == 0, text
    shipped = ROOT / "k_diffusion" / "config" / "schema.json"
    assert json.loads(shipped.read_text()) == json.loads(text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_runs(path):
    assert json.loads(path.read_text())["$schema"] == "../k_diffusion/config/schema.json"
    config = load_config(path, strict=True)
    section = config["model"]
    with torch.device("meta"), torch.no_grad():
        model = K.config.make_model(config)
        x = torch.empty(2, section["input_channels"], *section["input_size"])
        if section["type"] == "kl_autoencoder":
            assert model(x)[0].shape == x.shape
            return
        classes = torch.zeros(2, dtype=torch.long)
        cond = {"class_cond": classes} if config["dataset"]["num_classes"] else {}
        if section["unet_cond_dim"]:
            cond["unet_cond"] = torch.empty(2, section["unet_cond_dim"], *section["input_size"])
        model = K.config.make_denoiser_wrapper(config)(model)
        y = model(x, torch.empty(2), aug_cond=torch.empty(2, 9), **cond)
    assert y.shape == x.shape
    sigma = K.config.make_sample_density(config["model"])([1000])
    assert sigma.shape == (1000,)
    assert (sigma > 0).all()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "Denoiser"),
        ({"loss_config": "simple"}, "SimpleLossDenoiser"),
        ({"has_variance": True}, "DenoiserWithVariance"),
        ({"has_variance": True, "variance_weighting": True}, "DenoiserWithVariance"),
        ({"prediction": "x", "noise_scale": 2.0}, "XPredictionDenoiser"),
    ],
)
def test_the_denoiser_of_a_config(change, name):
    config = load_config({"model": V1["model"] | change | {"sigma_data": 0.3}})
    denoiser = K.config.make_denoiser_wrapper(config)(torch.nn.Identity())
    assert type(denoiser) is getattr(K.denoisers, name)
    assert denoiser.sigma_data == 0.3
    assert getattr(denoiser, "weighted", False) == change.get("variance_weighting", False)


def test_the_sigmoid_weighting_of_a_config():
    change = {"loss_weighting": "sigmoid", "loss_bias": 1.5, "sigma_data": 0.3}
    config = load_config({"model": V1["model"] | change})
    weighting = K.config.make_denoiser_wrapper(config)(torch.nn.Identity()).weighting
    sigma = torch.tensor([0.1, 1.0, 10.0])
    torch.testing.assert_close(weighting(sigma), sigmoid_weighting(1.5, 0.3)(sigma))


def test_a_bias_without_the_sigmoid_weighting():
    config = {"model": V1["model"] | {"loss_bias": 1.5}}
    with pytest.raises(K.config.ConfigError, match=r"^model.loss_bias: has an effect with loss_w"):
        load_config(config, strict=True)
    with pytest.warns(UserWarning, match="loss_bias has an effect with loss_weighting 'sigmoid'"):
        assert load_config(config)["model"]["loss_bias"] == 1.5


def test_x_prediction_takes_no_other_loss():
    for change in ({"loss_weighting": "snr"}, {"loss_config": "simple"}, {"has_variance": True}):
        with pytest.raises(K.config.ConfigError, match="prediction 'x' has a loss of its own"):
            load_config({"model": V1["model"] | change | {"prediction": "x"}})


def test_the_logit_normal_density_of_a_noise_scale():
    """ln sigma ~ N(0.8 + ln s, 0.8^2)."""
    section = {"sigma_sample_density": {"type": "logit-normal"}, "noise_scale": 2.0}
    density = K.config.make_sample_density(section)
    assert density.keywords == {"loc": pytest.approx(0.8 + math.log(2)), "scale": 0.8}
    t = 2 / (2 + density([20_000], dtype=torch.float64))
    assert torch.logit(t).mean().item() == pytest.approx(-0.8, abs=0.03)
    assert torch.logit(t).std().item() == pytest.approx(0.8, abs=0.03)


def test_a_density_takes_its_open_ends_from_the_model():
    torch.manual_seed(0)
    model = V1["model"] | {"sigma_min": 0.5, "sigma_max": 2.0, "sigma_data": 0.25}
    sigma = K.config.make_sample_density(load_config({"model": model})["model"])([10_000])
    assert 0.5 <= sigma.min() < 0.501
    assert 1.99 < sigma.max() <= 2
    model["sigma_sample_density"] = {"type": "loglogistic"}
    sigma = K.config.make_sample_density(load_config({"model": model})["model"])([10_000])
    assert sigma.log().median().item() == pytest.approx(math.log(0.25), abs=0.03)


def test_the_u_net_is_wrapped_for_augmentation_unless_told_not_to():
    wrapped = K.config.make_model(load_config(V1))
    assert isinstance(wrapped.inner_model, ImageDenoiserModelV1)
    assert wrapped.inner_model.mapping_cond_dim == 9
    plain = K.config.make_model(load_config({"model": V1["model"] | {"augment_wrapper": False}}))
    assert plain.mapping_cond_dim == 0
