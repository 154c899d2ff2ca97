"""The kernels of other packages, by stand-ins with their signatures, layouts and arithmetic."""

import importlib.metadata
import itertools
import sys
from types import ModuleType

import pytest
import torch
from attention_oracle import assert_same, forget, qkv

from k_diffusion.models import attention
from k_diffusion.models.attention import (
    BACKENDS,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    Request,
    attend,
    choose_backend,
    flash,
    flex,
    natten,
)


@pytest.fixture(autouse=True)
def nothing_forced_or_remembered(monkeypatch):
    for name in (attention.ENV_VAR, "K_DIFFUSION_USE_FLASH_2"):
        monkeypatch.delenv(name, raising=False)
    forget()
    imported = set(sys.modules)
    yield
    forget()
    for name in {"flash_attn", "natten"} - imported:
        sys.modules.pop(name, None)


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in into sys.modules under each name: a module's functions and values by name."""

    def put(modules, natten_version=None):
        def version(name):
            if name == "natten" and natten_version is not None:
                return natten_version
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
        forget()

    return put


# ---------------------------------------------------------------- FlashAttention


def flash_formula(q, k, v, softmax_scale):
    """(n, tokens, heads, e) in float16 or bfloat16; the output and the scores' log-sum-exp."""
    assert q.ndim == 4
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("nqhe,nkhe->nhqk", q.float(), k.float()) * scale
    out = torch.einsum("nhqk,nkhe->nqhe", scores.softmax(-1), v.float()).to(q.dtype)
    return out.contiguous(), scores.logsumexp(-1)


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert dropout_p == 0
    assert not causal
    return flash_formula(q, k, v, softmax_scale)[0]


def flash_attn_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert not causal
    return flash_formula(q, k, v, softmax_scale)[0]


def flash_attn_3_of_before(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
):
    assert not causal
    return flash_formula(q, k, v, softmax_scale)


def flash_attn_4(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
):  # fmt: skip
    assert not causal
    return flash_formula(q, k, v, softmax_scale)


FLASH = [
    ("flash2", {"flash_attn": flash_attn_2}),
    ("flash3", {"flash_attn_interface": flash_attn_3}),
    ("flash3", {"flash_attn_interface": flash_attn_3_of_before}),
    ("flash4", {"flash_attn": flash_attn_2, "flash_attn.cute": flash_attn_4}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "modules"), FLASH, ids=["2", "3", "3-before", "4"])
def test_flash_attention(install, monkeypatch, name, modules, dtype):
    install({module: {"flash_attn_func": function} for module, function in modules.items()})
    monkeypatch.setattr(flash, "_capability", lambda: 9)
    inputs = qkv(7, 5, e=24, dtype=dtype)
    geometry = GlobalAttentionSpec(24)
    assert choose_backend(Request(geometry, 7, 5, "cuda", dtype)) == name
    run = BACKENDS["global"][name].run
    assert_same(run, geometry, inputs, 3 * torch.finfo(dtype).eps)
    # q, k and v as a layer's projection gives them
    views = torch.stack([x.detach() for x in inputs], dim=3).unbind(3)
    torch.testing.assert_close(run(*views, geometry), run(*inputs, geometry))


def test_flash_attention_4_alone_is_not_flash_attention_2(install, monkeypatch):
    """It installs the package flash_attn.cute, and so an empty flash_attn."""
    install({"flash_attn": {}, "flash_attn.cute": {"flash_attn_func": flash_attn_4}})
    for capability, name in (8, "sdpa"), (9, "flash4"):
        monkeypatch.setattr(flash, "_capability", lambda major=capability: major)
        forget()
        assert (
            choose_backend(Request(GlobalAttentionSpec(64), 7, 5, "cuda", torch.bfloat16)) == name
        )
    reason = flash.why_not_flash2(Request(GlobalAttentionSpec(64), 7, 5, "cuda", torch.bfloat16))
    assert reason == "flash_attn is not installed (pip install flash-attn --no-build-isolation)"


# ---------------------------------------------------------------- NATTEN


def neighbors(h, w, kernel_size):
    """The window of each token, one key at a time, (h, w, k * k), of tokens by number."""
    k, rows = kernel_size, []
    for i, j in itertools.product(range(h), range(w)):
        top = min(max(i - k // 2, 0), h - k)
        left = min(max(j - k // 2, 0), w - k)
        window = itertools.product(range(top, top + k), range(left, left + k))
        rows.append([y * w + x for y, x in window])
    return torch.tensor(rows).view(h, w, k * k)


def heads_first_scores(q, k, kernel_size):
    """(n, heads, h, w, e) to (n, heads, h, w, k * k)."""
    near = neighbors(*q.shape[2:4], kernel_size)
    return torch.einsum("nghwe,nghwke->nghwk", q, k.flatten(2, 3)[:, :, near])


def heads_first_sum(attn, v, kernel_size):
    near = neighbors(*v.shape[2:4], kernel_size)
    return torch.einsum("nghwk,nghwke->nghwe", attn, v.flatten(2, 3)[:, :, near])


def check_natten(q, kernel_size, dilation, heads_last):
    h, w = q.shape[1:3] if heads_last else q.shape[2:4]
    assert isinstance(kernel_size, int)
    assert dilation == 1
    assert kernel_size <= min(h, w)
    assert q.shape[-1] % 8 == 0


def fused_natten(q, k, v, kernel_size, dilation, scale):
    check_natten(q, kernel_size, dilation, heads_last=True)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.movedim(3, 1) for x in (q, k, v))
    attn = (heads_first_scores(q, k, kernel_size) * scale).softmax(-1)
    return heads_first_sum(attn, v, kernel_size).movedim(1, 3)


def na2d_0_21(
    query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
    additional_keys=None, additional_values=None, attention_kwargs=None, backend=None,
    q_tile_shape=None, kv_tile_shape=None, return_lse=False,
):  # fmt: skip
    assert stride == 1
    return fused_natten(query, key, value, kernel_size, dilation, scale)


def na2d_0_17(
    query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None,
    additional_keys=None, additional_values=None,
):  # fmt: skip
    assert rpb is None
    assert kernel_size % 2
    return fused_natten(query, key, value, kernel_size, dilation, scale)


def na2d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None):
    check_natten(query, kernel_size, dilation, heads_last=False)
    return heads_first_scores(query, key, kernel_size)


def na2d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False):
    assert attn.shape[-1] == kernel_size**2
    check_natten(value, kernel_size, dilation, heads_last=False)
    return heads_first_sum(attn, value, kernel_size)


def natten2dqk(query, key, kernel_size, dilation):
    return na2d_qk(query, key, kernel_size, dilation)


def natten2dav(attn, value, kernel_size, dilation):
    return na2d_av(attn, value, kernel_size, dilation)


def deprecated(*args):
    raise AssertionError("the deprecated function, which warns at every call")


NATTEN = {
    "0.21.7+torch2110cu130": {"natten": {"na2d": na2d_0_21, "HAS_LIBNATTEN": True}},
    "0.20.0.dev0": {"natten": {"na2d": na2d_0_21, "HAS_LIBNATTEN": True}},
    "0.17.5+torch260cu124": {
        "natten": {},
        "natten.functional": {"na2d": na2d_0_17, "na2d_qk": na2d_qk, "na2d_av": na2d_av},
    },
    "0.17.1": {
        "natten": {},
        "natten.functional": {
            "na2d": na2d_0_17,
            "na2d_qk": na2d_qk,
            "na2d_av": na2d_av,
            "natten2dqk": deprecated,
            "natten2dav": deprecated,
        },
    },
    "0.15.1": {
        "natten": {},
        "natten.functional": {"natten2dqk": natten2dqk, "natten2dav": natten2dav},
    },
}
FORMS = [
    ("0.21.7+torch2110cu130", "natten"),
    ("0.20.0.dev0", "natten"),
    ("0.17.5+torch260cu124", "natten-0.17"),
    ("0.17.5+torch260cu124", "natten-unfused"),
    ("0.17.1", "natten-unfused"),
    ("0.15.1", "natten-unfused"),
]


@pytest.mark.parametrize(("version", "name"), FORMS)
def test_natten(install, version, name):
    install(NATTEN[version], version)
    assert natten.version() == tuple(map(int, version.split(".")[:2]))
    run = BACKENDS["neighborhood"][name].run
    for k, size in ((3, (7, 9)), (7, (7, 12)), (5, (11, 5)), (4, (9, 6))):
        geometry = NeighborhoodAttentionSpec(16, k)
        if k % 2 or name == "natten":
            assert_same(run, geometry, qkv(*size, e=16), 1e-5)
        else:
            request = Request(geometry, *size, "cuda", torch.float32)
            reason = BACKENDS["neighborhood"][name].why_not(request)
            assert reason == "needs an odd kernel_size above 1, got 4"


@pytest.mark.parametrize(("version", "name"), [FORMS[0], FORMS[4]])
def test_natten_forced_on_the_cpu(install, monkeypatch, version, name):
    install(NATTEN[version], version)
    geometry = NeighborhoodAttentionSpec(16, 3)
    inputs = qkv(8, 9, e=16, grad=False)
    monkeypatch.setenv(attention.ENV_VAR, f"neighborhood={name}")
    assert_same(lambda q, k, v, g: attend(g, q, k, v), geometry, inputs, 1e-5)


def test_natten_without_its_kernels_is_passed_over(install, monkeypatch):
    install({"natten": {"na2d": na2d_0_21, "HAS_LIBNATTEN": False}}, "0.21.7")
    monkeypatch.setattr(flex, "_COMPILERS", {"cuda": lambda: None})
    request = Request(NeighborhoodAttentionSpec(64, 7), 64, 64, "cuda", torch.bfloat16)
    assert choose_backend(request) == "flex"
    passed_over = BACKENDS["neighborhood"]["natten"].passed_over(request)
    assert passed_over.endswith("this natten was built without its CUDA kernels, libnatten")
    monkeypatch.setenv(attention.ENV_VAR, "neighborhood=natten")
    assert choose_backend(request) == "natten"


# ---------------------------------------------------------------- why not

TRANSFORMED = "has no transforms of torch.func and no forward mode"
FLASH_REASONS = [
    ("flash2", {"device": "cpu"}, "needs a CUDA device, got cpu"),
    ("flash2", {"transformed": True}, TRANSFORMED),
    ("flash2", {"dtype": torch.float32}, "needs float16 or bfloat16, got float32"),
    ("flash2", {"d_head": 12}, "needs d_head to be a multiple of 8, at most 256, got 12"),
    ("flash2", {"d_head": 264}, "needs d_head to be a multiple of 8, at most 256, got 264"),
    ("flash2", {"capability": 7}, "needs an Ampere GPU or a later one"),
    ("flash2", {}, "flash_attn is not installed (pip install flash-attn --no-build-isolation)"),
    ("flash3", {"dtype": torch.float64}, "needs float16 or bfloat16, got float64"),
    ("flash3", {"capability": 10}, "needs a Hopper GPU"),
    ("flash3", {}, "flash_attn_interface is not installed (the hopper folder of "
                   "flash-attention's repository)"),
    ("flash4", {"d_head": 136}, "needs d_head to be a multiple of 8, at most 128, got 136"),
    ("flash4", {"capability": 8}, "needs a Hopper or Blackwell GPU"),
    ("flash4", {}, "flash_attn.cute is not installed (pip install flash-attn-4)"),
]  # fmt: skip
NATTEN_REASONS = [
    ("natten", None, {}, 'natten is not installed (pip install "k-diffusion[natten]")'),
    ("natten", "0.17.5", {}, "needs natten >= 0.20, got 0.17"),
    ("natten", "0.21", {"k": 1}, "needs kernel_size >= 2"),
    ("natten", "0.21", {"d_head": 30}, "needs d_head to be a multiple of 8, got 30"),
    ("natten", "0.21", {"device": "cpu"}, "has no backward on the CPU"),
    ("natten", "0.21", {"device": "mps"}, "needs a CPU or CUDA device, got mps"),
    ("natten", "0.21", {"transformed": True}, TRANSFORMED),
    ("natten", "0.21", {"dtype": torch.float64},
     "needs float32, float16 or bfloat16, got float64"),
    ("natten", "1.0", {}, None),
    ("natten-0.17", "0.21", {}, "needs natten 0.17 to 0.19, got 0.21"),
    ("natten-0.17", "0.15", {}, "needs natten 0.17 to 0.19, got 0.15"),
    ("natten-0.17", "0.17", {"dtype": torch.float64},
     "needs float32, float16 or bfloat16, got float64"),
    ("natten-0.17", "0.17", {"device": "cpu"}, "needs a CUDA device, got cpu"),
    ("natten-0.17", "0.17", {"k": 6}, "needs an odd kernel_size above 1, got 6"),
    ("natten-0.17", "0.17", {"d_head": 30}, "needs d_head to be a multiple of 8, got 30"),
    ("natten-0.17", "0.17", {}, None),
    ("natten-unfused", "0.21", {}, "needs natten 0.14 to 0.19, got 0.21"),
    ("natten-unfused", "0.15", {"k": 1}, "needs an odd kernel_size above 1, got 1"),
    ("natten-unfused", "0.15", {"device": "mps"}, "needs a CPU or CUDA device, got mps"),
    ("natten-unfused", "0.15", {"transformed": True}, TRANSFORMED),
    ("natten-unfused", "0.15", {"dtype": torch.float64, "device": "cpu"}, None),
]  # fmt: skip
FLEX_REASONS = [
    ({"device": "mps"}, "needs a CPU or CUDA device, got mps"),
    ({"device": "cpu"}, "has no backward on the CPU"),
    ({"transformed": True}, TRANSFORMED),
    ({"dtype": torch.float64}, "needs float32, float16 or bfloat16, got float64"),
    ({"d_head": 24}, "needs d_head to be a power of 2 of at least 16, got 24"),
    ({"d_head": 8}, "needs d_head to be a power of 2 of at least 16, got 8"),
    ({}, "triton is not installed (pip install triton)"),
]


def asked(geometry, what):
    """A request on a GPU in bfloat16, but for `what`."""
    asked = {"device": "cuda", "dtype": torch.bfloat16, "needs_grad": True, "transformed": False}
    asked |= {name: value for name, value in what.items() if name in asked}
    return Request(geometry, 64, 64, **asked)


@pytest.mark.parametrize(("name", "what", "reason"), FLASH_REASONS)
def test_why_flash_attention_cannot_run(monkeypatch, name, what, reason):
    what = {"capability": 9, "d_head": 64} | what
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(flash, "_capability", lambda: what["capability"])
    geometry = GlobalAttentionSpec(what["d_head"])
    assert BACKENDS["global"][name].why_not(asked(geometry, what)) == reason


@pytest.mark.parametrize(("name", "version", "what", "reason"), NATTEN_REASONS)
def test_why_natten_cannot_run(install, name, version, what, reason):
    install({"natten": {}}, version)
    what = {"d_head": 64, "k": 7} | what
    geometry = NeighborhoodAttentionSpec(what["d_head"], what["k"])
    assert BACKENDS["neighborhood"][name].why_not(asked(geometry, what)) == reason


@pytest.mark.parametrize(("what", "reason"), FLEX_REASONS)
def test_why_flex_cannot_run(monkeypatch, what, reason):
    monkeypatch.setitem(sys.modules, "triton", None)
    geometry = NeighborhoodAttentionSpec(what.get("d_head", 64), 7)
    assert flex.why_not_flex(asked(geometry, what)) == reason


def test_flex_needs_a_compiler_on_the_cpu(monkeypatch):
    request = asked(NeighborhoodAttentionSpec(64, 7), {"device": "cpu", "needs_grad": False})
    monkeypatch.setenv("CXX", sys.executable)
    assert flex.why_not_flex(request) is None
    forget()
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = "torch.compile needs a C++ compiler, and there is no no-such-compiler"
    assert flex.why_not_flex(request) == message


def test_a_package_that_is_broken_is_not_chosen(tmp_path, monkeypatch):
    """Kernels that were built for another torch fail as they are imported."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(
        "raise OSError('flash.so: undefined symbol: _ZN3c10\\nmore')"
    )
    (tmp_path / "natten.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flash, "_capability", lambda: 8)
    monkeypatch.setattr(natten, "version", lambda: (0, 21))
    request = asked(GlobalAttentionSpec(64), {})
    assert choose_backend(request) == "sdpa"
    assert BACKENDS["global"]["flash2"].why_not(request) == (
        "flash_attn can't be imported: flash.so: undefined symbol: _ZN3c10"
    )
    assert natten.why_not_natten(asked(NeighborhoodAttentionSpec(64, 7), {})) == (
        "natten can't be imported: No module named 'no_such_dependency'"
    )


def test_what_the_choice_imports(tmp_path, monkeypatch):
    """Nothing where no custom kernel can run, and each package once where one can."""
    counter = "import pathlib\npath = pathlib.Path(__file__ + '.count')\n"
    counter += "path.write_text((path.read_text() if path.exists() else '') + 'x')\n"
    counter += "flash_attn_func = None\n"
    for name in ("flash_attn", "natten"):
        (tmp_path / f"{name}.py").write_text(counter)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(natten, "version", lambda: (0, 21))
    monkeypatch.setattr(flash, "_capability", lambda: 8)
    for geometry in (GlobalAttentionSpec(64), NeighborhoodAttentionSpec(64, 7)):
        for grad in (True, False):
            choose_backend(asked(geometry, {"device": "cpu", "needs_grad": grad}))
        choose_backend(asked(geometry, {"dtype": torch.float64}))
    assert not list(tmp_path.glob("*.count"))
    for grad in (True, False):
        what = {"needs_grad": grad}
        assert choose_backend(asked(GlobalAttentionSpec(64), what)) == "flash2"
        assert choose_backend(asked(NeighborhoodAttentionSpec(64, 7), what)) == "natten"
    for name in ("flash_attn", "natten"):
        assert (tmp_path / f"{name}.py.count").read_text() == "x"
