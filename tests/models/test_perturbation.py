"""Skip-layer and perturbed-attention guidance of both transformers."""

import threading

import pytest
import torch
from golden import fill, normal
from torch import nn

import k_diffusion as K
from k_diffusion.guidance import AutoguidedDenoiser, CFGDenoiser, PerturbedDenoiser
from k_diffusion.models import compile_model
from k_diffusion.models.image_transformer_v1 import ImageTransformerDenoiserModelV1
from k_diffusion.models.image_transformer_v2 import (
    GlobalAttentionSpec,
    ImageTransformerDenoiserModelV2,
    LevelSpec,
    MappingSpec,
    NeighborhoodAttentionSpec,
    NoAttentionSpec,
    ShiftedWindowAttentionSpec,
)

SIGMA = torch.tensor([0.3, 2.0])
X = normal(1, (2, 3, 8, 8))
GLOBAL = GlobalAttentionSpec(8, "sdpa")
# A window that sees itself alone, so that the softmax of its one score is 1.
ALONE = NeighborhoodAttentionSpec(8, 1, "tiled")


def v2(attn=GLOBAL, classes=0):
    levels = [LevelSpec(2, 16, 24, attn, 0.0), LevelSpec(1, 16, 24, GLOBAL, 0.0)]
    mapping = MappingSpec(1, 16, 16, 0.0)
    model = ImageTransformerDenoiserModelV2(levels, mapping, 3, 3, (1, 1), num_classes=classes)
    return K.Denoiser(fill(model).eval(), sigma_data=0.5)


def v1():
    model = ImageTransformerDenoiserModelV1(3, 64, 64, 3, 3, (2, 2))
    return K.Denoiser(fill(model).eval(), sigma_data=0.5)


MODELS = {"v2": (v2, "mid_level", "down_levels.0.1"), "v1": (v1, "blocks", "blocks.1")}
both = pytest.mark.parametrize(("make", "level", "block"), MODELS.values(), ids=MODELS)


@both
def test_no_perturbation_is_the_identity(make, level, block):
    model = make()
    assert torch.equal(PerturbedDenoiser(model)(X, SIGMA), model(X, SIGMA))
    guided = AutoguidedDenoiser(model, PerturbedDenoiser(model), 7.0)
    torch.testing.assert_close(guided(X, SIGMA), model(X, SIGMA))


@both
def test_a_scale_of_one_is_the_model(make, level, block):
    model = make()
    guided = AutoguidedDenoiser(model, PerturbedDenoiser(model, identity=[level]), 1.0)
    torch.testing.assert_close(guided(X, SIGMA), model(X, SIGMA))


@both
def test_a_skipped_block_passes_its_input_on(make, level, block):
    """As a block whose output projections are 0 does."""
    model = make()
    got = PerturbedDenoiser(model, skip=[block])(X, SIGMA)
    assert (got - model(X, SIGMA)).abs().max() > 1e-3
    part = model.inner_model.get_submodule(block)
    nn.init.zeros_(part.self_attn.out_proj.weight)
    nn.init.zeros_(part.ff.down_proj.weight)
    torch.testing.assert_close(got, model(X, SIGMA))


@both
def test_identity_attention_mixes_no_tokens(make, level, block):
    """A patch of the output depends on that patch of the input alone; elsewhere on all of it."""
    model = make()
    everywhere = ["blocks"] if make is v1 else ["down_levels", "mid_level", "up_levels"]
    for identity, reach in ((everywhere, 4), ([], 64)):
        x = X.clone().requires_grad_()
        out = PerturbedDenoiser(model, identity=identity)(x, SIGMA)
        (grad,) = torch.autograd.grad(out[:, :, 2, 5].sum(), x)
        seen = grad.abs().sum(1) > 0
        assert seen.sum((1, 2)).tolist() == [reach, reach]
        assert seen[:, 2:4, 4:6].all()


def test_attention_to_oneself_alone_has_the_identity_for_a_map():
    model = v2(ALONE)
    got = PerturbedDenoiser(model, identity=["down_levels", "up_levels.0"])(X, SIGMA)
    torch.testing.assert_close(got, model(X, SIGMA))
    model = v1()
    x = X[..., :2, :2]  # a single token
    got = PerturbedDenoiser(model, identity=["blocks.0", "blocks.2"])(x, SIGMA)
    torch.testing.assert_close(got, model(x, SIGMA))


def test_prefixes_name_whole_parts_of_a_name():
    """down_levels.0 isn't a prefix of down_levels.01, nor mid of mid_level."""
    model = v2()
    whole, one, other = (
        PerturbedDenoiser(model, identity=[name])(X, SIGMA)
        for name in ("down_levels.0", "down_levels.0.0", "down_levels.0.1")
    )
    pair = PerturbedDenoiser(model, identity=("down_levels.0.1", "down_levels.0.0"))(X, SIGMA)
    assert torch.equal(whole, pair)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("window", [None, NeighborhoodAttentionSpec, ShiftedWindowAttentionSpec])
def test_no_backend_computes_an_attention_that_is_replaced(backend, window, monkeypatch):
    """What it then gives can't depend on the backend."""
    backend = "tiled" if window is NeighborhoodAttentionSpec and backend == "sdpa" else backend
    attn = (
        window(8, 4 if window is ShiftedWindowAttentionSpec else 3, backend=backend)
        if window
        else GLOBAL
    )
    model = v2(attn)
    calls = []
    monkeypatch.setattr(
        "k_diffusion.models.image_transformer_v2.grid_attention",
        lambda geometry, q, k, v: calls.append(geometry) or v.flatten(-2),
    )
    PerturbedDenoiser(model, identity=["down_levels", "up_levels"])(X, SIGMA)
    assert calls == [GLOBAL]


def test_it_goes_with_classes_and_classifier_free_guidance():
    model = v2(classes=4)
    classes, none = torch.tensor([1, 2]), torch.tensor([3])
    perturbed = PerturbedDenoiser(model, skip=["mid_level"])
    pushed = AutoguidedDenoiser(model, perturbed, 2.0)
    got = CFGDenoiser(pushed, 3.0, class_cond=none)(X, SIGMA, class_cond=classes)
    both = [
        2 * model(X, SIGMA, class_cond=c) - perturbed(X, SIGMA, class_cond=c)
        for c in (none.expand(2), classes)
    ]
    torch.testing.assert_close(got, torch.lerp(*both, 3.0))


def test_other_threads_and_later_calls_see_the_model_as_it_is():
    model = v2()
    want, inside, results = model(X, SIGMA), threading.Event(), []
    done = threading.Event()

    def wait(*_):
        inside.set()
        assert done.wait(60)

    weak = PerturbedDenoiser(model, skip=["down_levels"], identity=["mid_level"])
    expected = weak(X, SIGMA)
    hook = model.inner_model.patch_in.register_forward_hook(
        lambda *_: wait() if threading.current_thread() is thread else None
    )
    thread = threading.Thread(target=lambda: results.append(weak(X, SIGMA)))
    thread.start()
    assert inside.wait(60)
    assert torch.equal(model(X, SIGMA), want)  # in the middle of the other's pass
    done.set()
    thread.join()
    hook.remove()
    assert torch.equal(results[0], expected)
    assert torch.equal(model(X, SIGMA), want)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["model", "block"])
def test_compiled_models_have_it_too(unit, monkeypatch):
    monkeypatch.delenv("K_DIFFUSION_USE_COMPILE", raising=False)
    torch._dynamo.reset()
    model = v2()
    weak = PerturbedDenoiser(model, skip=["down_levels.0.1"], identity=["mid_level"])
    want = [m(X, SIGMA) for m in (model, weak)]
    compile_model(model.inner_model, unit, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            for m, y in zip((model, weak), want):
                torch.testing.assert_close(m(X, SIGMA), y)
    torch._dynamo.reset()


def test_checkpointing_recomputes_the_same():
    model = v2()
    weak, grads = PerturbedDenoiser(model, identity=["mid_level"]), []
    for enable in (False, True):
        model.zero_grad()
        with K.models.checkpointing(enable):
            weak(X, SIGMA).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"skip": ["mid"]}, "'mid' names no blocks of the model; it has down_levels.0.0"),
        ({"skip": ["down_levels.0.2"]}, "names no blocks"),
        ({"identity": ["down_levels"]}, "names no blocks with attention"),
        ({"identity": ["inner_model.mid_level"]}, "it has mid_level.0$"),
    ],
)
def test_unknown_names_are_errors(names, match):
    with pytest.raises(ValueError, match=match):
        PerturbedDenoiser(v2(NoAttentionSpec()), **names)


def test_other_models_are_an_error():
    with pytest.raises(ValueError, match="only image transformers can be perturbed, Linear has"):
        PerturbedDenoiser(nn.Linear(2, 2))
