"""Texts and images as conditions: of batches, of samples, and their absence."""

import numpy as np
import pytest
import runs
import tiny_text
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import conditions
from k_diffusion.data import training_data
from k_diffusion.data.captions import caption_of
from k_diffusion.data.training_data import make_training_data
from k_diffusion.encoders.text import TextEncoder, Texts, write_texts
from k_diffusion.training.step import batch_loss

MODEL = {"cross_cond_dim": 3, "mapping_cond_dim": 2, "cross_attn_depths": [False, True]}
TEXT = {"type": "transformers", "location": "nowhere", "max_length": 4, "prompts": ["a", "b"]}


def encode(texts):
    """Each text as its length: so many tokens of that number."""
    lengths = torch.tensor([len(text) for text in texts])
    padding = torch.arange(4) >= lengths[:, None]
    tokens = lengths[:, None, None].float().expand(-1, 4, 3).masked_fill(padding[..., None], 0)
    return Texts(tokens, padding, lengths[:, None].float().expand(-1, 2))


def config(**sections):
    return runs.tiny_config(**{"model": MODEL, "text": TEXT, **sections})


def super_resolution(**more):
    section = {"type": "downsampled", "factor": 4, **more}
    return runs.tiny_config(image_condition=section, dataset={"num_classes": 0})


# ---------------------------------------------------------------- texts


def test_a_text_is_told_as_the_model_can_hear_it():
    made = conditions.of_texts(config(), encode, ["aa", "a"])
    assert sorted(made) == ["cross_cond", "cross_cond_padding", "mapping_cond"]
    made = conditions.of_texts(config(model={"mapping_cond_dim": 2}), encode, ["aa"])
    assert sorted(made) == ["mapping_cond"]


def test_each_condition_is_left_out_by_its_own_rate():
    torch.manual_seed(0)
    n = 4000
    made = config(
        text={**TEXT, "dropout_rate": 0.25},
        image_condition={"type": "grayscale", "dropout_rate": 0.5},
    )
    batch = {
        "image": torch.zeros(n, 1, 1, 1),
        "unet_cond": torch.ones(n, 1, 1, 1),
        **conditions.of_texts(made, encode, ["aa"] * n),
    }
    left = conditions.dropped(batch, made)
    no_text = left["cross_cond_padding"].all(1)
    assert no_text.float().mean() == pytest.approx(0.25, abs=0.03)
    for name in "cross_cond", "mapping_cond":
        assert torch.equal(left[name].flatten(1).any(1), ~no_text)
    assert torch.equal(left["cross_cond"][~no_text], batch["cross_cond"][~no_text])
    no_image = ~left["unet_cond"].flatten(1).any(1)
    assert no_image.float().mean() == pytest.approx(0.5, abs=0.03)
    both = (no_text & no_image).float().mean()
    assert both == pytest.approx(0.125, abs=0.03)


def test_models_without_conditions_draw_as_before():
    state = torch.get_rng_state()
    assert conditions.dropped({"image": torch.zeros(2, 1, 1, 1)}, runs.tiny_config()) == {}
    assert torch.equal(state, torch.get_rng_state())


def test_the_absence_is_what_dropout_makes():
    made = config(dataset={"num_classes": 3})
    null = conditions.null(made, "--cfg-scale")
    assert null["class_cond"].tolist() == [3]
    batch = {"image": torch.zeros(1), **conditions.of_texts(made, encode, ["aa"])}
    for name, x in batch.items():
        if name != "image":
            assert torch.equal(conditions.without(name, x, torch.tensor([True])), null[name])


def test_guidance_needs_dropout():
    never = config(text={**TEXT, "dropout_rate": 0.0}, dataset={"num_classes": 0})
    with pytest.raises(ValueError, match=r"cfg needs .* but text\.dropout_rate was 0"):
        conditions.null(never, "cfg")
    assert list(conditions.null(super_resolution(dropout_rate=0.1), "cfg")) == ["unet_cond"]
    large = conditions.null(super_resolution(dropout_rate=0.1), "cfg", (16, 24))
    assert large["unet_cond"].shape == (1, 1, 16, 24)
    both = config(image_condition={"type": "grayscale"}, dataset={"num_classes": 0})
    assert "unet_cond" not in conditions.null(both, "cfg")  # which was always there
    classes = runs.tiny_config(dataset={"cond_dropout_rate": 0.0})
    with pytest.raises(ValueError, match=r"at times, but dataset\.cond_dropout_rate was 0$"):
        conditions.null(classes, "cfg")
    del classes["dataset"]["cond_dropout_rate"]
    assert list(conditions.null(classes, "cfg")) == ["class_cond"]
    told = config(dataset={"cond_dropout_rate": 0.0})  # the class stays, the text goes
    assert {"class_cond", "cross_cond"} & conditions.null(told, "cfg").keys() == {"cross_cond"}


def test_stored_texts_have_the_prompts_from_the_start(tmp_path):
    path = tmp_path / "texts.safetensors"
    encoder = TextEncoder("nowhere", torch.nn.Linear(1, 1), encode, 4, print)
    write_texts(path, encoder, ["a", "aa"])
    made = config(text={**TEXT, "precomputed": str(path), "prompts": ["aa"]})
    assert conditions.make_training_encoder(made)(["a"]).pooled[0].tolist() == [1, 1]
    made["text"]["prompts"] = ["aa", "b"]
    with pytest.raises(ValueError, match=r"has no text 'b' among its 2; write it anew"):
        conditions.make_training_encoder(made)


def test_stored_texts_have_the_captions_of_files_from_the_start(tmp_path, monkeypatch):
    data = make_training_data(paired_config(tmp_path))
    path = tmp_path / "texts.safetensors"
    encoder = TextEncoder("nowhere", torch.nn.Linear(1, 1), encode, 4, print)
    made = config(text={**TEXT, "precomputed": str(path), "prompts": []})
    write_texts(path, encoder, [f"number {i}" for i in range(5)])
    conditions.make_training_encoder(made, data=data)
    write_texts(path, encoder, [f"number {i}" for i in range(3)])
    says = "has no text 'number 3' and 1 others among its 3; write it anew"
    with pytest.raises(ValueError, match=says):
        conditions.make_training_encoder(made, data=data)
    monkeypatch.setattr(training_data, "_READ_AT_ONCE", 3)  # 0, 1 and 3
    with pytest.raises(ValueError, match="has no text 'number 3' among its 3"):
        conditions.make_training_encoder(made, data=data)


def test_samples_have_prompts_in_turn():
    seen = []
    given = conditions.given(config(), encode)
    assert given([0, 3, 4])["mapping_cond"][:, 0].tolist() == [1, 1, 1]
    given = conditions.given(config(), encode, ["a", "aaa"])
    assert given([0, 3, 4])["mapping_cond"][:, 0].tolist() == [1, 3, 1]
    many = conditions.given(
        config(), lambda texts: seen.append(list(texts)) or encode(texts), "abc"
    )
    assert seen == []  # there may be more than memory holds
    assert many([1, 4, 2])["mapping_cond"].shape == (3, 2)
    assert seen == [["b", "c"]]
    assert conditions.given(runs.tiny_config(), None) is None
    with pytest.raises(ValueError, match="told by texts: .*, or prompts="):
        conditions.given(config(text={**TEXT, "prompts": []}), encode)
    with pytest.raises(ValueError, match="takes no texts"):
        conditions.given(runs.tiny_config(), None, ["a"])
    with pytest.raises(ValueError, match="takes no images"):
        conditions.given(config(), encode, images=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"told by images \(downsampled\): .* condition_images="):
        conditions.given(super_resolution(), None)


def test_widths_are_the_encoders(tmp_path):
    where = tiny_text.save(tmp_path)
    made = config(text={**TEXT, "location": where})
    with pytest.raises(ValueError, match=r"cross_cond_dim is 3, but the tokens .* set it to 12"):
        conditions.make_text_encoder(made)
    pooled = config(model={"mapping_cond_dim": 2}, text={**TEXT, "location": where})
    with pytest.raises(ValueError, match=r"model\.mapping_cond_dim is 2, but the pooled vectors"):
        conditions.make_text_encoder(pooled)
    elsewhere = config(model={"cross_cond_dim": 12})
    assert conditions.make_text_encoder(elsewhere, location=where).width == 12
    with pytest.raises(ValueError, match=r"text\.location is missing: the folder of the text"):
        conditions.make_text_encoder(config(text={**TEXT, "location": None}))


def test_the_config_knows_what_goes_together():
    with pytest.raises(K.config.ConfigError, match=r"^text: needs a model\.cross_cond_dim or"):
        runs.tiny_config(text=TEXT)
    with pytest.raises(K.config.ConfigError, match=r"image_condition\.factor: 3 must divide"):
        runs.tiny_config(image_condition={"type": "downsampled", "factor": 3})
    with pytest.raises(K.config.ConfigError, match="is 2, but image_condition has 1 channels"):
        runs.tiny_config(model={"unet_cond_dim": 2}, image_condition={"type": "grayscale"})
    strict = {**runs.TINY, "model": {**runs.TINY["model"], **MODEL}}
    strict["text"] = {"type": "transformers"}
    with pytest.raises(K.config.ConfigError, match=r"text\.location: is required: the folder of a"):
        K.config.load_config(strict, strict=True)
    assert super_resolution()["model"]["unet_cond_dim"] == 1
    assert "text" not in runs.tiny_config()


# ---------------------------------------------------------------- images


def test_downsampled_keeps_low_frequencies():
    """Constants and slow waves stay; what is finer than the small image goes."""
    place = torch.arange(32) + 0.5
    slow = torch.cos(torch.pi * place / 32).expand(1, 1, 32, 32)
    fast = torch.cos(torch.pi * place).expand(1, 1, 32, 32)
    section = {"type": "downsampled", "factor": 4}
    inside = (..., slice(4, -4))
    got = conditions.of_images(section, slow + fast)["unet_cond"]
    torch.testing.assert_close(got[inside], slow[inside], atol=0.02, rtol=0)
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(conditions.of_images(section, flat)["unet_cond"], flat)


def test_grayscale_is_pils():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    colour, grey = (
        torch.from_numpy(np.asarray(x) / 127.5 - 1.0) for x in (image, image.convert("L"))
    )
    got = conditions.of_images({"type": "grayscale"}, colour.movedim(-1, 0)[None])["unet_cond"]
    torch.testing.assert_close(got[0, 0], grey, atol=1 / 127, rtol=0)


def test_a_picture_for_super_resolution_is_small_or_whole():
    made, said = super_resolution(), []
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    got = conditions.read_image_condition(made, whole, (8, 8), said.append)
    images = torch.from_numpy(np.asarray(whole) / np.float32(127.5) - 1)[None, None]
    torch.testing.assert_close(
        got, conditions.of_images(made["image_condition"], images)["unet_cond"]
    )
    small = Image.new("L", (2, 2), 255)
    got = conditions.read_image_condition(made, small, (8, 8), said.append)
    torch.testing.assert_close(got, torch.ones(1, 1, 8, 8))
    assert not said
    conditions.read_image_condition(made, Image.new("L", (9, 8)), (8, 8), said.append)
    assert said == ["the image has 8 x 9 pixels: scaled and cropped to 8 x 8"]


# ---------------------------------------------------------------- data


def folder_of(tmp_path, n=5):
    """Images with captions beside them, and their negatives in another folder."""
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        for name, x, ending in (("images", pixels, "png"), ("negatives", 255 - pixels, "bmp")):
            path = tmp_path / name / "below" / f"{i}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(path)
        (tmp_path / f"images/below/{i}.txt").write_text(f"number\n{i}\n", encoding="utf-8")
    return tmp_path / "images"


def paired_config(tmp_path, **model):
    return config(
        model={**MODEL, **model},
        dataset={"type": "imagefolder", "location": str(folder_of(tmp_path))},
        image_condition={
            "type": "paired", "location": str(tmp_path / "negatives"), "channels": 1
        },
    )  # fmt: skip


def test_captions_beside_files_and_paired_images(tmp_path):
    made = paired_config(tmp_path, augment_prob=1.0)
    data = make_training_data(made)
    item = data[3, 7]
    assert item["caption"] == "number 3"
    torch.testing.assert_close(item["paired_original"], -item["original"])
    torch.testing.assert_close(item["paired_image"], -item["image"], atol=1e-5, rtol=0)
    assert not torch.allclose(item["image"], item["original"])

    (tmp_path / "images/below/3.txt").unlink()
    with pytest.raises(ValueError, match=r"^1 of 5 images have no caption at 'txt', such as .*3"):
        make_training_data(made)
    with pytest.raises(ValueError, match=r"3\.png has no caption: no file .*3\.txt; set data"):
        data[3, 0]
    (tmp_path / "images/below/3.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        data[3, 0]
    (tmp_path / "negatives/below/2.bmp").unlink()
    with pytest.raises(ValueError, match=r"1 of 5 images have no partner in .* such as below.2"):
        make_training_data(made)
    made["dataset"] = {**made["dataset"], "type": "digits", "split": "all"}
    with pytest.raises(ValueError, match="paired needs a data set of image files"):
        make_training_data(made)


def test_captions_of_items():
    assert caption_of([], {"text": "a cat"}, 0, "text") == "a cat"
    assert caption_of([], (0, 1, "a cat"), 0, 2) == "a cat"
    for item in ({}, {"text": None}, {"text": 3}):
        with pytest.raises(ValueError, match="item 8 of the data set has no caption at 'text'"):
            caption_of([], item, 8, "text")


def test_conditions_of_data(tmp_path):
    """As a run's samples have them: item i for image i, not augmented; prompts before captions."""
    made = paired_config(tmp_path, augment_prob=1.0)
    data = make_training_data(made)
    given = conditions.of_data(data, {**made, "text": {**made["text"], "prompts": []}}, encode)
    got = given([1, 5])
    torch.testing.assert_close(got["unet_cond"][0], -data[1, 0]["original"])
    torch.testing.assert_close(got["unet_cond"][1], -data[0, 0]["original"])
    assert got["mapping_cond"][:, 0].tolist() == [len("number 1")] * 2
    assert conditions.of_data(data, made, encode)([0])["mapping_cond"][:, 0].tolist() == [1]
    assert conditions.of_data(data, runs.tiny_config(), None) is None


@pytest.mark.parametrize("kind", ["downsampled", "paired"])
def test_samples_have_conditions_of_their_size_where_training_has_several(tmp_path, kind):
    made = paired_config(tmp_path)
    tall = Image.new("L", (4, 16), 255)
    tall.save(tmp_path / "images/below/1.png")
    tall.save(tmp_path / "negatives/below/1.bmp")
    made["dataset"]["buckets"] = [[8, 8], [16, 4]]
    if kind == "downsampled":
        made["image_condition"] = {"type": "downsampled", "factor": 2}
    data = make_training_data(made)
    for prompts in [], ["a"]:
        given = conditions.of_data(data, {**made, "text": {**TEXT, "prompts": prompts}}, encode)
        got = given([0, 1, 2])
        assert got["unet_cond"].shape == (3, 1, 8, 8)
        torch.testing.assert_close(got["unet_cond"][1], torch.ones(1, 8, 8))
    assert data[1, 0]["image"].shape == (1, 16, 4)  # as before


def test_batches_get_their_condition():
    made = super_resolution()
    images = torch.randn(2, 1, 8, 8)
    (batch,) = conditions.conditioned([{"image": images}], made, None)
    want = conditions.of_images(made["image_condition"], images)["unet_cond"]
    assert torch.equal(batch["unet_cond"], want)
    blank = conditions.blank(made, 2)
    assert blank["unet_cond"].shape == want.shape
    (batch,) = conditions.conditioned([{"image": images, "caption": ["a", "b"]}], config(), encode)
    shapes = {k: x.shape for k, x in batch.items() if k not in {"image", "caption"}}
    assert shapes == {k: x.shape for k, x in conditions.blank(config(), 2).items()}


V1 = {"type": "image_transformer_v1", "patch_size": [2, 2], "width": 64, "depth": 1}
UNET = {
    "type": "image_v1", "mapping_out": 16, "depths": [1, 1], "channels": [8, 8],
    "self_attn_depths": [False, False], "cross_attn_depths": [False, True],
}  # fmt: skip
TOLD = {"cross_cond_dim": 3, "mapping_cond_dim": 2}


@pytest.mark.parametrize("model", [MODEL, {**UNET, **TOLD}, V1], ids=["v2", "u-net", "v1"])
def test_every_model_trains_with_its_conditions(model):
    """The gradient reaches what is told, and guidance goes away from its absence."""
    of = {k: runs.TINY["model"][k] for k in ("input_channels", "input_size")}
    of["sigma_sample_density"] = runs.TINY["model"]["sigma_sample_density"]
    sections = {"model": of | model if "type" in model else model}
    sections["image_condition"] = {"type": "downsampled", "factor": 2, "dropout_rate": 0.5}
    if "mapping_cond_dim" in model:
        sections["text"] = {**TEXT, "dropout_rate": 0.5}
    made = runs.tiny_config(**sections, dataset={"num_classes": 0})
    torch.manual_seed(0)
    net = K.config.make_model(made)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    denoiser = K.config.make_denoiser_wrapper(made)(net)
    density = K.config.make_sample_density(made["model"])
    batch = {"image": torch.randn(4, 1, 8, 8), "caption": ["a", "aa", "aaa", ""]}
    encoder = encode if "text" in made else None
    (batch,) = conditions.conditioned([batch], made, encoder)
    given = {k: batch[k] for k in conditions.blank(made, 4)}
    for x in given.values():
        if x.is_floating_point():
            x.requires_grad_()
    batch_loss(denoiser, batch, density, made, torch.device("cpu")).mean().backward()
    for name, x in given.items():
        assert not x.is_floating_point() or x.grad.any(), name
    x, sigma = torch.randn(4, 1, 8, 8), torch.ones(4)
    guided = K.guidance.CFGDenoiser(denoiser, 2.0, **conditions.null(made, "guidance"))
    with torch.no_grad():
        assert (guided(x, sigma, **given) - denoiser(x, sigma, **given)).abs().max() > 1e-4
