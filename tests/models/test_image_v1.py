"""The U-Net denoiser `image_v1`."""

import pytest
import torch
from golden import check_model, fill, normal

import k_diffusion as K
from k_diffusion.augmentation import KarrasAugmentWrapper
from k_diffusion.models.flops import flop_counter
from k_diffusion.models.image_v1 import ImageDenoiserModelV1

SIGMA = torch.tensor([0.05, 1.3])


def make(levels=2, **kw):
    """A small model, in eval mode, none of whose weights are 0."""
    args = {
        "c_in": 3,
        "feats_in": 16,
        "depths": [1, 2, 1][:levels],
        "channels": [8, 16, 24][:levels],
        "self_attn_depths": [False, True, False][:levels],
    }
    return fill(ImageDenoiserModelV1(**(args | kw))).eval()


def test_numbers_of_the_published_model():
    inner = ImageDenoiserModelV1(3, 64, [1, 2], [32, 64], [False, True], mapping_cond_dim=9)
    x = normal(11, (2, 3, 32, 32))
    check_model(
        "model_v1", KarrasAugmentWrapper(inner), x, SIGMA, aug_cond=normal(12, (2, 9)), tol=1e-4
    )


def test_starts_with_an_output_of_zero_and_passes_features_through():
    model = ImageDenoiserModelV1(3, 16, [1, 2], [8, 8], [False, True])
    x = normal(0, (2, 3, 8, 8))
    assert model(x, SIGMA).equal(torch.zeros(2, 3, 8, 8))
    features = normal(1, (2, 8, 8, 8))
    level = model.u_net.d_blocks[0]
    assert level(features, {"cond": normal(2, (2, 16))}).equal(features)


@pytest.mark.parametrize("size", [(8, 16), (12, 8), (16, 16)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_any_size_that_divides(size, patch_size):
    model = make(patch_size=patch_size)
    x = normal(0, (2, 3, *size))
    y = model(x, SIGMA)
    assert y.shape == x.shape
    # no item of the batch sees another
    torch.testing.assert_close(model(x[1:], SIGMA[1:]), y[1:])


def test_sigma_of_zero_is_finite():
    model = make()
    x = normal(0, (2, 3, 8, 8)).requires_grad_()
    y = model(x, torch.zeros(2))
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


CONDITIONS = {
    "mapping_cond": ({"mapping_cond_dim": 5}, (2, 5)),
    "unet_cond": ({"unet_cond_dim": 2}, (2, 2, 8, 16)),
    "cross_cond": ({"cross_attn_depths": [True, True], "cross_cond_dim": 6}, (2, 4, 6)),
}


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_conditions_matter_to_their_own_item(name, patch_size):
    options, shape = CONDITIONS[name]
    model = make(patch_size=patch_size, **options)
    x, cond = normal(0, (2, 3, 8, 16)), normal(1, shape)
    y = model(x, SIGMA, **{name: cond})
    cond = torch.stack([cond[0], -cond[1]])
    z = model(x, SIGMA, **{name: cond})
    torch.testing.assert_close(z[0], y[0])
    assert (z[1] - y[1]).abs().mean() > 1e-6


def test_no_mapping_cond_means_zeros():
    model = make(mapping_cond_dim=5)
    x = normal(0, (2, 3, 8, 8))
    assert model(x, SIGMA).equal(model(x, SIGMA, mapping_cond=torch.zeros(2, 5)))


def test_padding_of_cross_cond_equals_leaving_the_tokens_out():
    model = make(cross_attn_depths=[False, True], cross_cond_dim=6)
    x, tokens = normal(0, (2, 3, 8, 8)), normal(1, (2, 4, 6))
    padding = torch.tensor([[0, 0, 1, 1]] * 2)
    y = model(x, SIGMA, cross_cond=tokens, cross_cond_padding=padding)
    torch.testing.assert_close(y, model(x, SIGMA, cross_cond=tokens[:, :2]))


def test_classes_through_the_config():
    config = K.config.load_config(
        {
            "model": {
                "type": "image_v1",
                "input_channels": 3,
                "input_size": [8, 8],
                "mapping_out": 16,
                "depths": [1, 1],
                "channels": [8, 8],
                "self_attn_depths": [False, False],
                "sigma_data": 0.5,
                "sigma_min": 0.01,
                "sigma_max": 80,
                "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2},
            },
            "dataset": {"type": "cifar10", "location": "data", "num_classes": 10},
        }
    )
    model = fill(K.config.make_model(config)).eval()
    x = normal(0, (1, 3, 8, 8)).expand(3, -1, -1, -1)
    sigma = torch.full((3,), 0.5)
    y = model(x, sigma, class_cond=torch.tensor([3, 3, 10]))
    assert y[0].equal(y[1])
    assert not y[0].allclose(y[2])
    with pytest.raises(ValueError, match=r"needs class_cond of shape \(3,\)"):
        model(x, sigma)
    names = {p: n for n, p in model.named_parameters()}
    groups = model.param_groups()
    assert [names[p] for p in groups[1]["params"] if "class" in names[p]] == [
        "inner_model.class_emb.weight"
    ]
    assert sum(len(g["params"]) for g in groups) == len(names)


def test_variance_is_the_mean_of_one_channel_more():
    model = make(patch_size=2, has_variance=True)
    x = normal(0, (2, 3, 8, 8))
    y, logvar = model(x, SIGMA, return_variance=True)
    assert logvar.shape == (2,)
    assert model(x, SIGMA).equal(y)

    # the variance's channel is the last: its bias moves the variance alone
    model.proj_out.bias.data[-1] += 1
    z, moved = model(x, SIGMA, return_variance=True)
    assert z.equal(y)
    torch.testing.assert_close(moved, logvar + 1)

    denoiser = K.layers.DenoiserWithVariance(model, sigma_data=0.5)
    assert denoiser.loss(x, normal(1, x.shape), SIGMA).shape == (2,)
    with pytest.raises(ValueError, match="has_variance=True"):
        make()(x, SIGMA, return_variance=True)


def test_dropout_is_off_in_eval_mode():
    model = make(dropout_rate=0.5)
    x = normal(0, (2, 3, 8, 8))
    torch.testing.assert_close(model(x, SIGMA), make()(x, SIGMA))
    model.train()
    assert not model(x, SIGMA).allclose(model(x, SIGMA))


@pytest.mark.parametrize(("skip_stages", "width", "multiple"), [(0, 8, 4), (1, 8, 2), (2, 16, 1)])
def test_skipped_stages(skip_stages, width, multiple):
    model = make(levels=3, skip_stages=skip_stages)
    assert model.proj_in.out_channels == width
    grown = make(levels=3)
    assert grown.set_skip_stages(skip_stages) is grown
    assert grown.state_dict().keys() == model.state_dict().keys()
    fill(grown)
    x = normal(0, (2, 3, multiple * 2, multiple * 3))
    y = model(x, SIGMA)
    torch.testing.assert_close(grown(x, SIGMA), y)
    y.sum().backward()
    trained = [block[1].main[2].weight.grad is not None for block in model.u_net.d_blocks]
    assert trained == [i >= skip_stages for i in range(3)]
    if multiple > 1:
        with pytest.raises(ValueError, match=f"multiples of {multiple} and {multiple}"):
            model(normal(0, (2, 3, multiple * 2, multiple * 3 + 1)), SIGMA)


def test_mapping_and_skips_start_orthogonal_and_a_seed_draws_what_is_published():
    torch.manual_seed(0)
    model = ImageDenoiserModelV1(
        3, 64, [1, 1], [32, 64], [False, True], mapping_cond_dim=9, has_variance=True
    )
    want = torch.tensor([0.603471, 0.9645329, 0.2936486])
    torch.testing.assert_close(torch.rand(3), want, atol=1e-6, rtol=0)
    weights = [
        p.detach().flatten(1)
        for name, p in model.named_parameters()
        if (name.startswith("mapping.") and p.ndim == 2) or name.endswith("skip.weight")
    ]
    assert len(weights) == 5
    for w in weights:
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)


def test_a_new_patch_size_keeps_the_rest():
    model = make().double()
    body = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("proj")}
    model.set_patch_size(2)
    assert all(v.equal(body[k]) for k, v in model.state_dict().items() if k in body)
    assert (model.proj_in.in_channels, model.proj_out.out_channels) == (12, 12)
    assert model(normal(0, (2, 3, 8, 8)).double(), SIGMA.double()).abs().max() == 0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        model.set_patch_size(0)


def test_a_failed_setter_leaves_the_model_as_it_was():
    model = make()
    x = normal(0, (2, 3, 8, 8))
    y = model(x, SIGMA)
    with pytest.raises(ValueError, match="number of levels, 2; got 2"):
        model.set_skip_stages(2)
    assert model(x, SIGMA).equal(y)


def test_checkpointing_changes_no_gradient():
    def gradients(enable):
        model = make(cross_attn_depths=[False, True], cross_cond_dim=6, dropout_rate=0.2).train()
        torch.manual_seed(0)
        with K.models.checkpointing(enable):
            y = model(normal(0, (2, 3, 8, 8)), SIGMA, cross_cond=normal(1, (2, 4, 6)))
        y.square().sum().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model, x = make(), normal(0, (2, 3, 8, 8))
    want = model(x, SIGMA)
    with torch.autocast("cpu", dtype):
        y = model(x, SIGMA)
    torch.testing.assert_close(y.float(), want, atol=0.01, rtol=0.05)
    y = model.to(dtype)(x.to(dtype), SIGMA)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), want, atol=0.01, rtol=0.05)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (2, 1, 8, 8)}, r"input of shape \(n, 3, h, w\) expected, got \(2, 1, 8, 8\)"),
        ({"x": (3, 8, 8)}, r"input of shape .* got \(3, 8, 8\)"),
        ({"x": (2, 3, 8, 9)}, "multiples of 2 and 2 .* got 8 x 9; the next larger valid .* 8 x 10"),
        ({"sigma": (1,)}, r"sigma of shape \(2,\) expected, got \(1,\)"),
        ({"sigma": (2, 1, 1, 1)}, r"sigma of shape \(2,\) expected, got \(2, 1, 1, 1\)"),
        ({"mapping_cond": (2, 9)}, r"mapping_cond of shape \(2, 5\) expected, got \(2, 9\)"),
        ({"unet_cond": (2, 2, 8, 4)}, r"unet_cond of shape \(2, 2, 8, 8\) expected"),
        ({"unet_cond": None}, r"needs unet_cond of shape \(2, 2, 8, 8\)"),
        ({"cross_cond": (2, 4, 7)}, r"cross_cond of shape \(2, tokens, 6\) expected"),
        ({"cross_cond": None}, r"needs cross_cond of shape \(2, tokens, 6\)"),
        ({"class_cond": (2,)}, "takes no class_cond"),
    ],
)
def test_wrong_shapes_are_named(shapes, message):
    model = make(
        mapping_cond_dim=5, unet_cond_dim=2, cross_attn_depths=[False, True], cross_cond_dim=6
    )
    shapes = {"x": (2, 3, 8, 8), "sigma": (2,), "unet_cond": (2, 2, 8, 8)} | shapes
    shapes = {"cross_cond": (2, 4, 6)} | shapes
    with pytest.raises(ValueError, match=message):
        model(
            **{
                {"x": "input"}.get(k, k): None if shape is None else torch.ones(shape)
                for k, shape in shapes.items()
            }
        )


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="one entry per level; they have 2, 3, 2, 2"):
        ImageDenoiserModelV1(3, 16, [1, 1], [8, 8, 8], [False, False], [False, False])
    with pytest.raises(ValueError, match=r"got depths \[1, 0\]"):
        ImageDenoiserModelV1(3, 16, [1, 0], [8, 8], [False, False])
    with pytest.raises(ValueError, match="set cross_cond_dim"):
        ImageDenoiserModelV1(3, 16, [1, 1], [8, 8], [False, False], [False, True])
    with pytest.raises(ValueError, match="number of levels, 2; got 2"):
        make(skip_stages=2)


def test_multiply_accumulates_are_counted():
    model = ImageDenoiserModelV1(3, 16, [1], [8], [False])
    with flop_counter() as counter:
        model(torch.zeros(2, 3, 4, 4), SIGMA)
    mapping = 2 * 16 * 16 * (2 + 4)  # its two layers, and one for each of four norms
    convolutions = 2 * 16 * (3 * 8 + 4 * 72 * 8 + 8 * 3)
    assert counter.flops == mapping + convolutions
