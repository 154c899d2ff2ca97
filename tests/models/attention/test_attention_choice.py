"""Which attention backend is taken: by itself, by the environment, by a config; what is said."""

import logging
import sys
from types import ModuleType
from typing import get_args

import pytest
import runs
import torch
from attention_oracle import forget, formula, qkv

import k_diffusion as K
from k_diffusion.config import model_schema
from k_diffusion.models import attention
from k_diffusion.models.attention import (
    BACKENDS,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    Request,
    ShiftedWindowAttentionSpec,
    __main__,
    attend,
    choose_backend,
    flash,
    flex,
    natten,
    reasons,
)

GEOMETRIES = [
    GlobalAttentionSpec(16),
    NeighborhoodAttentionSpec(16, 3),
    ShiftedWindowAttentionSpec(16, 4),
]


@pytest.fixture(autouse=True)
def nothing_forced_or_remembered(monkeypatch):
    for name in (attention.ENV_VAR, "K_DIFFUSION_USE_FLASH_2", "CXX"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch):
    """Call it to have the choice see a GPU of an architecture and the packages of some names."""

    def machine(capability=9, packages=()):
        forget()
        monkeypatch.setattr(flash, "_capability", lambda: capability)
        version = next((p.split()[1] for p in packages if p.startswith("natten")), None)
        found = version and tuple(map(int, version.split(".")))
        monkeypatch.setattr(natten, "version", lambda: found)
        packages = [p.split()[0] for p in packages]
        for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute", "natten", "triton"):
            module = ModuleType(name) if name in packages else None
            if module is not None and name.startswith("flash_attn"):
                module.flash_attn_func = None
            monkeypatch.setitem(sys.modules, name, module)

    return machine


def on(device, geometry, dtype=torch.float32, h=64, w=64, **kw):
    return Request(geometry, h, w, device, dtype, **kw)


# ---------------------------------------------------------------- by itself


def test_plain_backends_are_chosen_on_the_cpu_and_the_choice_is_logged_once(caplog):
    requests = [on("cpu", geometry, h=8, w=12) for geometry in GEOMETRIES]
    with caplog.at_level(logging.DEBUG, logger="k_diffusion"):
        chosen = [choose_backend(request) for request in requests * 2]
    assert chosen == ["sdpa", "tiled", "sdpa"] * 2
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0] == (
        "GlobalAttentionSpec(d_head=16, backend=None) at 8 x 12 on cpu float32 with gradients: "
        "backend sdpa; flash4: needs a CUDA device, got cpu; flash3: needs a CUDA device, got cpu; "
        "flash2: needs a CUDA device, got cpu"
    )
    assert "with gradients: backend tiled; natten: natten is not installed (" in lines[1]
    assert lines[2].endswith("on cpu float32 with gradients: backend sdpa")


def test_on_the_cpu_no_slow_form_is_chosen_without_gradients(monkeypatch):
    monkeypatch.setattr(natten, "version", lambda: (0, 21))
    for dtype in (torch.float32, torch.bfloat16):
        request = on("cpu", NeighborhoodAttentionSpec(16, 3), dtype, needs_grad=False)
        assert choose_backend(request) == "tiled"
        assert reasons(request)["natten"] is None


ALL = ["flash_attn", "flash_attn_interface", "flash_attn.cute", "triton"]


@pytest.mark.parametrize(
    ("capability", "packages", "dtype", "d_head", "want"),
    [
        (9, ALL, torch.bfloat16, 64, "flash4"),
        (10, ALL, torch.float16, 128, "flash4"),
        (9, ALL, torch.bfloat16, 256, "flash3"),
        (10, ALL, torch.bfloat16, 256, "flash2"),
        (8, ALL, torch.bfloat16, 64, "flash2"),
        (12, ALL, torch.bfloat16, 64, "flash2"),
        (7, ALL, torch.float16, 64, "sdpa"),
        (9, ALL, torch.float32, 64, "sdpa"),
        (9, ALL, torch.bfloat16, 12, "sdpa"),
        (9, ALL, torch.bfloat16, 264, "sdpa"),
        (9, ["flash_attn", "flash_attn_interface"], torch.bfloat16, 64, "flash3"),
        (9, ["flash_attn"], torch.bfloat16, 64, "flash2"),
        (9, [], torch.bfloat16, 64, "sdpa"),
    ],
)
def test_global_attention_on_a_gpu(gpu, capability, packages, dtype, d_head, want):
    gpu(capability, packages)
    assert choose_backend(on("cuda", GlobalAttentionSpec(d_head), dtype)) == want
    transformed = on("cuda", GlobalAttentionSpec(d_head), dtype, transformed=True)
    assert choose_backend(transformed) == "sdpa"


@pytest.mark.parametrize(
    ("packages", "k", "dtype", "want"),
    [
        (["natten 0.21", "triton"], 7, torch.bfloat16, "natten"),
        (["natten 0.20", "triton"], 8, torch.float32, "natten"),
        (["natten 0.17", "triton"], 7, torch.float16, "natten-0.17"),
        (["natten 0.17", "triton"], 8, torch.float16, "flex"),
        (["natten 0.17"], 7, torch.float64, "natten-unfused"),
        (["natten 0.15"], 7, torch.float32, "natten-unfused"),
        (["natten 0.15", "triton"], 7, torch.float32, "flex"),
        (["natten 0.21"], 7, torch.float64, "tiled"),
        (["natten 0.15"], 8, torch.float32, "tiled"),
        (["triton"], 7, torch.bfloat16, "flex"),
        (["triton"], 7, torch.float64, "tiled"),
        ([], 7, torch.bfloat16, "tiled"),
    ],
)
def test_neighborhood_attention_on_a_gpu(gpu, packages, k, dtype, want):
    gpu(9, packages)
    assert choose_backend(on("cuda", NeighborhoodAttentionSpec(64, k), dtype)) == want
    transformed = on("cuda", NeighborhoodAttentionSpec(64, k), dtype, transformed=True)
    assert choose_backend(transformed) == "tiled"


def test_small_grids_are_not_for_natten(gpu):
    gpu(9, ["natten 0.21", "triton"])
    geometry = NeighborhoodAttentionSpec(64, 7)
    sizes = {16: "tiled", 32: "flex", 64: "natten"}
    assert {n: choose_backend(on("cuda", geometry, h=n, w=n)) for n in sizes} == sizes
    forced = NeighborhoodAttentionSpec(64, 7, "natten")
    assert choose_backend(on("cuda", forced, h=16, w=16)) == "natten"


def test_small_grids_are_a_dense_tile_and_not_flex(gpu):
    gpu(9, ["triton"])
    geometry = NeighborhoodAttentionSpec(64, 7)
    assert choose_backend(on("cuda", geometry, h=16, w=31)) == "tiled"
    assert choose_backend(on("cuda", geometry, h=16, w=32)) == "flex"


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.name)
def test_other_devices_have_plain_pytorch(gpu, geometry):
    gpu(9, [*ALL, "natten 0.21"])
    can = [name for name, reason in reasons(on("mps", geometry)).items() if reason is None]
    assert set(can) <= {"sdpa", "tiled", "reference"}
    assert choose_backend(on("mps", geometry)) == can[0]


def test_flash_attention_2_can_be_turned_off_at_any_time(gpu, monkeypatch):
    gpu(8, ALL)
    request = on("cuda", GlobalAttentionSpec(64), torch.bfloat16)
    assert choose_backend(request) == "flash2"
    monkeypatch.setenv("K_DIFFUSION_USE_FLASH_2", "0")
    assert reasons(request)["flash2"] == "turned off by K_DIFFUSION_USE_FLASH_2"
    assert choose_backend(request) == "sdpa"
    monkeypatch.setenv(attention.ENV_VAR, "global=flash2")
    with pytest.raises(ValueError, match="run here: turned off by K_DIFFUSION_USE_FLASH_2; these"):
        choose_backend(request)
    monkeypatch.setenv("K_DIFFUSION_USE_FLASH_2", "1")
    assert choose_backend(request) == "flash2"


# ---------------------------------------------------------------- forced


def test_the_environment_forces_a_backend(monkeypatch, caplog):
    geometry, inputs = NeighborhoodAttentionSpec(8, 3), qkv(17, 17)
    want = attend(geometry, *inputs)
    monkeypatch.setenv(attention.ENV_VAR, " neighborhood = reference,global=sdpa, ")
    with caplog.at_level(logging.DEBUG, logger="k_diffusion"):
        got = attend(geometry, *inputs)
    assert "backend reference (forced by K_DIFFUSION_ATTENTION)" in caplog.text
    torch.testing.assert_close(got, want)
    assert choose_backend(on("cpu", GEOMETRIES[2])) == "sdpa"
    monkeypatch.delenv(attention.ENV_VAR)
    assert choose_backend(on("cpu", geometry)) == "tiled"


def test_a_config_forces_a_backend_and_the_environment_overrides_it(monkeypatch, caplog):
    request = on("cpu", GlobalAttentionSpec(16, "reference"))
    with caplog.at_level(logging.DEBUG, logger="k_diffusion"):
        assert choose_backend(request) == "reference"
    assert "backend reference (forced by the config)" in caplog.text
    monkeypatch.setenv(attention.ENV_VAR, "global=sdpa")
    assert choose_backend(request) == "sdpa"
    monkeypatch.setenv(attention.ENV_VAR, "global=auto")
    with caplog.at_level(logging.DEBUG, logger="k_diffusion"):
        caplog.clear()
        assert choose_backend(request) == "sdpa"
    assert "forced" not in caplog.text
    monkeypatch.setenv(attention.ENV_VAR, "neighborhood=reference")
    assert choose_backend(request) == "reference"


@pytest.mark.parametrize(
    "setting", ["neighborhood=fast", "tiled", "window=sdpa", "=tiled", "global=", "global=tiled"]
)
def test_an_unknown_backend_is_named_beside_those_there_are(monkeypatch, setting):
    monkeypatch.setenv(attention.ENV_VAR, f"global=sdpa,{setting}")
    with pytest.raises(ValueError) as error:
        attend(GlobalAttentionSpec(8), *qkv(4, 4))
    assert str(error.value) == (
        f"K_DIFFUSION_ATTENTION: no backend '{setting}'; there are "
        "global=flash4|flash3|flash2|sdpa|reference|auto; "
        "neighborhood=natten|natten-0.17|flex|natten-unfused|tiled|reference|auto; "
        "shifted-window=sdpa|reference|auto"
    )


def test_a_forced_backend_that_cannot_run_says_why_and_what_can(monkeypatch):
    reason = "global=flash2, which can't run here: needs a CUDA device, got cpu; "
    with pytest.raises(ValueError) as error:
        attend(GlobalAttentionSpec(8, "flash2"), *qkv(4, 4))
    assert str(error.value) == (
        f"the config asks for {reason}K_DIFFUSION_ATTENTION=global=auto overrides it; "
        "these can: sdpa, reference"
    )
    monkeypatch.setenv(attention.ENV_VAR, "global=auto")
    attend(GlobalAttentionSpec(8, "flash2"), *qkv(4, 4))
    monkeypatch.setenv(attention.ENV_VAR, "global=flash2")
    with pytest.raises(ValueError) as error:
        attend(GlobalAttentionSpec(8), *qkv(4, 4))
    text = f"K_DIFFUSION_ATTENTION asks for {reason}these can: sdpa, reference"
    assert str(error.value) == text


def test_a_backend_that_a_spec_misnames_is_named():
    message = "unknown neighborhood attention backend 'sdpa'; there are natten, natten-0.17, flex, "
    with pytest.raises(ValueError, match=message):
        attend(NeighborhoodAttentionSpec(8, 3, "sdpa"), *qkv(4, 4))


def test_what_forces_a_backend_is_checked_against_what_is_asked(gpu):
    """A kernel without a forward mode runs until a derivative is taken."""
    gpu(9, ["triton"])
    geometry = NeighborhoodAttentionSpec(64, 7, "flex")
    assert choose_backend(on("cuda", geometry, h=8, w=8)) == "flex"  # passed over if not forced
    with pytest.raises(ValueError, match="neighborhood=flex, .*: has no transforms of torch.func"):
        choose_backend(on("cuda", geometry, transformed=True))
    with pytest.raises(ValueError, match="neighborhood=flex, .*: has no backward on the CPU"):
        attend(geometry, *qkv(8, 8, e=64))


@pytest.mark.parametrize("index", range(3))
def test_a_gradient_of_any_input_is_asked_for(monkeypatch, index):
    monkeypatch.setenv(attention.ENV_VAR, "neighborhood=flex")
    inputs = qkv(8, 8, e=16, grad=False)
    inputs[index].requires_grad_()
    with pytest.raises(ValueError, match="has no backward on the CPU"):
        attend(NeighborhoodAttentionSpec(16, 7), *inputs)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.name)
def test_transforms_choose_what_torch_can_look_into(monkeypatch, geometry, transform):
    q, k, v = qkv(8, 8, e=16, dtype=torch.float64, grad=False)
    got = transform(lambda q: attend(geometry, q, k, v), q)
    torch.testing.assert_close(got, transform(lambda q: formula(geometry, q, k, v), q))
    if geometry.name == "neighborhood":
        monkeypatch.setenv(attention.ENV_VAR, "neighborhood=flex")
        inputs = [x.float() for x in (q, k, v)]
        with pytest.raises(ValueError, match="run here: has (no transforms|no backward)"):
            transform(lambda q: attend(geometry, q, *inputs[1:]), inputs[0])


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("literal", "geometry"),
    [
        (model_schema.GlobalBackend, "global"),
        (model_schema.NeighborhoodBackend, "neighborhood"),
        (model_schema.WindowBackend, "shifted-window"),
    ],
)
def test_configs_know_the_backends_there_are(literal, geometry):
    assert get_args(literal) == tuple(BACKENDS[geometry])


def v2(*attns):
    return {
        "type": "image_transformer_v2",
        "input_channels": 1,
        "input_size": [16, 16],
        "patch_size": [1, 1],
        "depths": [2] * len(attns),
        "widths": [32] * len(attns),
        "self_attns": list(attns),
    }


def geometries(config):
    config = config | {"sigma_sample_density": {"type": "cosine-interpolated"}}
    model = K.config.make_model(K.config.load_config({"model": config}))
    return [m.geometry for m in model.modules() if hasattr(m, "geometry")]


def test_a_config_forces_a_backend_a_level():
    found = geometries(
        v2(
            {"type": "neighborhood", "d_head": 16, "kernel_size": 3, "backend": "reference"},
            {"type": "shifted-window", "d_head": 16, "window_size": 4, "backend": "reference"},
            {"type": "global", "d_head": 16},
        )
    )
    assert {(g.name, g.backend) for g in found} == {
        ("neighborhood", "reference"),
        ("shifted-window", "reference"),
        ("global", None),
    }
    windows = [g for g in found if g.name == "shifted-window"]
    assert {g.shift for g in windows} == {0, 2}


def test_a_config_forces_the_backend_of_image_transformer_v1():
    config = {
        "type": "image_transformer_v1",
        "input_channels": 1,
        "input_size": [8, 8],
        "patch_size": [2, 2],
        "width": 64,
        "depth": 2,
        "attn_backend": "reference",
    }
    assert geometries(config) == [GlobalAttentionSpec(64, "reference")] * 2
    del config["attn_backend"]
    assert geometries(config) == [GlobalAttentionSpec(64)] * 2


def test_a_config_that_misnames_a_backend_is_told_those_there_are():
    config = v2({"type": "shifted-window", "window_size": 4, "d_head": 16, "backend": "tiled"})
    message = r"self_attns\[0\].*backend.*'sdpa' or 'reference', got 'tiled'"
    with pytest.raises(ValueError, match=message):
        K.config.load_config({"model": config})


# ---------------------------------------------------------------- the table


def rows_of(text):
    return [line.split(maxsplit=3) for line in text.splitlines() if line]


@pytest.mark.slow
def test_the_table_of_a_command(monkeypatch, tmp_path):
    monkeypatch.delenv(attention.ENV_VAR, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    command = sys.executable, "-m", "k_diffusion.models.attention", "--device", "cpu"
    code, text = runs.run(*command, folder=tmp_path)
    assert code == 0, text
    title, header, *rows = rows_of(text)
    assert " ".join(title).startswith("cpu, fp32, 64 x 64 tokens, d_head 64, training")
    assert header[:2] == ["geometry", "backend"]
    assert [tuple(row[:2]) for row in rows] == [(g, b) for g in BACKENDS for b in BACKENDS[g]]
    assert [row[1] for row in rows if row[2:] == ["chosen"]] == ["sdpa", "tiled", "sdpa"]
    assert ["global", "flash2", "no", "needs a CUDA device, got cpu"] in rows
    assert ["neighborhood", "reference", "yes"] in rows

    _, text = runs.run(*command, folder=tmp_path, **{attention.ENV_VAR: "global=flash2"})
    # what is forced and can't run is said below the table of what can
    *table, last = text.strip().split("\n")
    assert last.startswith("K_DIFFUSION_ATTENTION asks for global=flash2, which can't run here")
    assert [row[1] for row in rows_of("\n".join(table)) if row[2:] == ["chosen"]] == [
        "tiled",
        "sdpa",
    ]


def test_the_table_of_a_gpu(gpu):
    gpu(8, ["flash_attn", "triton"])
    requests = [on("cuda", g, torch.bfloat16) for g in GEOMETRIES]
    rows = rows_of(__main__.table(requests))
    assert ["global", "flash2", "chosen"] in rows
    assert ["global", "flash3", "no", "needs a Hopper GPU"] in rows
    assert ["global", "sdpa", "yes"] in rows
    assert ["neighborhood", "flex", "chosen"] in rows
    natten_row = next(row for row in rows if row[:2] == ["neighborhood", "natten"])
    assert natten_row[2:] == ["no", 'natten is not installed (pip install "k-diffusion[natten]")']


def test_the_tables_arguments(monkeypatch, capsys):
    monkeypatch.setattr(flex, "_COMPILERS", {"cpu": lambda: None})
    __main__.main(["--device=cpu", "--inference", "--dtype=bf16", "--tokens=16", "--d-head=24"])
    out = capsys.readouterr().out
    assert out.startswith("cpu, bf16, 16 x 16 tokens, d_head 24, inference; K_DIFFUSION_ATTENTION")
    assert "needs d_head to be a power of 2 of at least 16, got 24" in out
    __main__.main(["--device=cpu", "--inference", "--tokens=16", "--d-head=32"])
    row = next(r for r in rows_of(capsys.readouterr().out) if r[1] == "flex")
    assert row[2:] == ["yes", "not chosen by itself on cpu"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            ["--kernel-size=65"],
            1,
            "kernel_size 65 is larger than the 64 x 64 tokens of this level; use at most 64",
        ),
        (["--tokens=60"], 1, "window_size 8 does not divide the 60 x 60 tokens"),
        (["--tokens=0"], 2, "argument --tokens: must be at least 1, got 0"),
        (["--dtype=fp64"], 2, "argument --dtype: invalid choice: 'fp64'"),
        (["--device=tpu"], 2, "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_the_tables_wrong_arguments(capsys, args, code, message):
    with pytest.raises(SystemExit) as error:
        __main__.main(args)
    assert error.value.code == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
@pytest.mark.parametrize(
    "geometry", [GlobalAttentionSpec(64), NeighborhoodAttentionSpec(64, 7)], ids=lambda g: g.name
)
def test_cuda_kernels_are_for_cuda_alone(gpu, geometry, device):
    """Of a dtype and a head that they take, with everything installed."""
    gpu(9, [*ALL, "natten 0.21"])
    assert choose_backend(on("cuda", geometry, torch.bfloat16)) in ("flash4", "natten")
    found = reasons(on(device, geometry, torch.bfloat16))
    for name in {"flash4", "flash3", "flash2"} & found.keys():
        assert found[name] == f"needs a CUDA device, got {device}"
    chosen = choose_backend(on(device, geometry, torch.bfloat16))
    assert chosen == {"global": "sdpa", "neighborhood": "tiled"}[geometry.name]
