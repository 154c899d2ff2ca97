"""What the models say of inputs that they can't take."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import vmap

from k_diffusion.models import (
    ImageDenoiserModelV1,
    ImageTransformerDenoiserModelV1,
    image_transformer_v2 as v2,
)
from k_diffusion.models.checks import check_classes


def hourglass():
    near = v2.LevelSpec(1, 16, 16, v2.NeighborhoodAttentionSpec(8, 3), 0.0)
    none = v2.LevelSpec(1, 16, 16, v2.NoAttentionSpec(), 0.0)
    top = v2.LevelSpec(1, 16, 16, v2.NeighborhoodAttentionSpec(8, 2), 0.0)
    mapping = v2.MappingSpec(1, 16, 16, 0.0)
    return v2.ImageTransformerDenoiserModelV2(
        [near, none, top], mapping, 3, 3, (1, 1), num_classes=11
    )


MODELS = {
    "image_transformer_v2": hourglass,
    "image_transformer_v1": lambda: ImageTransformerDenoiserModelV1(
        1, 64, 16, 3, 3, (2, 2), num_classes=11
    ),
    "image_v1": lambda: ImageDenoiserModelV1(3, 16, [1], [8], [False], num_classes=11),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


X, SIGMA, CLASSES = torch.zeros(2, 3, 16, 16), torch.ones(2), torch.tensor([0, 10])


def test_good_input_is_taken(model):
    assert model(X, SIGMA, class_cond=CLASSES).shape == X.shape
    assert model(X, SIGMA, class_cond=CLASSES.int()).shape == X.shape
    assert model(X[:0], SIGMA[:0], class_cond=CLASSES[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("x", "sigma", "classes", "message"),
    [
        (X[:, :2], SIGMA, CLASSES, "(n, 3, h, w) expected, got (2, 2, 16, 16)"),
        (X[0], SIGMA, CLASSES, "(n, 3, h, w) expected, got (3, 16, 16)"),
        (X[..., :15], SIGMA, CLASSES, "height and width must be multiples of"),
        (X, SIGMA[:, None], CLASSES, "sigma of shape (2,) expected, got (2, 1)"),
        (X, SIGMA[0], CLASSES, "sigma of shape (2,) expected, got ()"),
        (X, SIGMA, None, "needs class_cond of shape (2,); got None"),
        (X, SIGMA, CLASSES[:1], "class_cond of shape (2,) expected, got (1,)"),
        (X, SIGMA, CLASSES.float(), "class_cond must hold integers, got torch.float32"),
        (
            X,
            SIGMA,
            CLASSES + 1,
            "between 0 and 10, the last row of the table",
        ),
        (
            X,
            SIGMA,
            CLASSES - 1,
            "between 0 and 10, the last row of the table",
        ),
        (X.int(), SIGMA, CLASSES, "must hold floating point numbers, got torch.int32"),
        (X, SIGMA.long(), CLASSES, "sigma must hold floating point numbers, got torch.int64"),
    ],
)
def test_bad_input_is_named(model, x, sigma, classes, message):
    if message.startswith("height") and isinstance(model, ImageDenoiserModelV1):
        model = ImageDenoiserModelV1(3, 16, [1, 1], [8, 8], [False, False], num_classes=11)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(x, sigma, class_cond=classes)


def test_another_type_of_numbers_is_named_unless_something_converts_it(model):
    message = "torch.bfloat16, but the model of torch.float32; convert one of them"
    with pytest.raises(ValueError, match=message):
        model(X.bfloat16(), SIGMA, class_cond=CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        model(X.bfloat16(), SIGMA, class_cond=CLASSES)
    model.bfloat16()(X.bfloat16(), SIGMA, class_cond=CLASSES)


def test_conditions_of_another_width_are_named():
    model = ImageDenoiserModelV1(
        3,
        16,
        [1],
        [64],
        [True],
        cross_attn_depths=[True],
        mapping_cond_dim=5,
        unet_cond_dim=2,
        cross_cond_dim=7,
    )
    good = {
        "mapping_cond": torch.zeros(2, 5),
        "unet_cond": torch.zeros(2, 2, 16, 16),
        "cross_cond": torch.zeros(2, 4, 7),
    }
    assert model(X, SIGMA, **good).shape == X.shape
    for name, bad, message in (
        ("mapping_cond", torch.zeros(2, 4), "(2, 5) expected, got (2, 4)"),
        ("unet_cond", torch.zeros(2, 2, 8, 8), "(2, 2, 16, 16) expected, got (2, 2, 8, 8)"),
        ("cross_cond", torch.zeros(2, 4, 6), "(2, tokens, 7) expected, got (2, 4, 6)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name} of shape {message}")):
            model(X, SIGMA, **{**good, name: bad})
    with pytest.raises(ValueError, match=r"aug_cond of shape \(2, 9\) expected, got \(2, 8\)"):
        hourglass()(X, SIGMA, aug_cond=torch.zeros(2, 8), class_cond=CLASSES)


def test_a_window_larger_than_the_map_is_named_with_its_level():
    message = "level 2 of an image of 4 x 8: kernel_size 2 is larger than the 1 x 2 tokens"
    with pytest.raises(ValueError, match=message):
        hourglass()(X[:, :, :4, :8], SIGMA, class_cond=CLASSES)


def test_classes_are_not_read_where_they_have_no_values_or_that_would_cost():
    with FakeTensorMode():
        check_classes(torch.full((2,), 99), 10)
    check_classes(torch.full((2,), 99, device="meta"), 10)
    compiled = torch.compile(
        lambda c: check_classes(c, 10) or c + 1, fullgraph=True, backend="eager"
    )
    assert compiled(torch.tensor([99])).item() == 100
    seen = vmap(lambda c: check_classes(c, 10) or c + 1)(torch.tensor([[99]]))
    assert seen.item() == 100
