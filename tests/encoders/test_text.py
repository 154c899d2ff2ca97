"""Frozen text encoders, of transformers and open_clip, and texts encoded beforehand."""

import json

import pytest
import tiny_text
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from k_diffusion.common import hub
from k_diffusion.encoders import text

pytestmark = pytest.mark.filterwarnings("ignore")  # those libraries' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_text.save(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder):
    return text.load_transformers(folder, max_length=6)


def test_tokens_are_the_networks_and_padding_is_none(encoder):
    made = encoder(["a three", "a", ""])
    assert made.tokens.shape == (3, 6, 12)
    assert made.pooled.shape == (3, 12)
    assert (encoder.width, encoder.pooled_width) == (12, 12)
    assert (~made.padding).sum(1).tolist() == [2, 1, 0]
    assert not made.tokens[made.padding].any()
    want = encoder.network(input_ids=torch.tensor([[2, 6]]))
    torch.testing.assert_close(made.tokens[0, :2], want.last_hidden_state[0])
    torch.testing.assert_close(made.pooled[:1], want.pooler_output)


def test_it_is_frozen_and_cuts_off_long_texts(encoder):
    assert not encoder.train().training
    assert not any(p.requires_grad for p in encoder.parameters())
    made = encoder(["a three and one big two small"])
    assert not made.padding.any()
    assert not made.tokens.requires_grad


def test_loading_leaves_torch_as_it_was(folder):
    """transformers replaces torch.linspace meanwhile."""
    torch.utils._device._device_constructors.cache_clear()  # as in a new process
    text.load_transformers(folder, max_length=6)
    with torch.device("meta"):
        assert torch.linspace(0, 1, 3).is_meta


def test_without_a_pooled_output_it_is_the_mean(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_text.save(tmp_path)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    (tmp_path / "model.safetensors").unlink()
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    made = text.load_transformers(tmp_path, max_length=5)(["a three", "and"])
    assert made.tokens.shape == (2, 5, 8)
    torch.testing.assert_close(made.pooled[0], made.tokens[0, :2].mean(0))
    torch.testing.assert_close(made.pooled[1], made.tokens[1, 0])


def test_clips_text_half(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_text.save(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    of_text = {"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config={**sizes, **heads, **of_text},
        vision_config={**sizes, **heads, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    (tmp_path / "model.safetensors").unlink()
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    made = text.load_transformers(tmp_path, max_length=5)(["a three"])
    assert made.tokens.shape == (1, 5, 8)


def test_open_clip(tmp_path):
    library = pytest.importorskip("open_clip")
    half = {"layers": 1, "width": 16, "head_width": 8}
    tiny = {
        "embed_dim": 8,
        "vision_cfg": {**half, "image_size": 8, "patch_size": 4},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(tiny))
    library.add_model_config(tmp_path / "tiny-test.json")
    torch.manual_seed(0)
    model = library.create_model("tiny-test", pretrained=None)
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    encoder = text.load_open_clip("tiny-test", path)
    made = encoder(["a photo of a cat", "a"])
    assert made.tokens.shape == (2, 77, 16)
    assert (~made.padding).sum(1).tolist() == [7, 3]  # with start and end
    tokens = library.get_tokenizer("tiny-test")(["a photo of a cat", "a"])
    torch.testing.assert_close(made.pooled, model.eval().encode_text(tokens))
    ends = made.tokens[[0, 1], [6, 2]]
    torch.testing.assert_close(ends @ model.text_projection, made.pooled)
    with pytest.raises(ValueError, match="has no model 'RN51'"):
        text.load_open_clip("RN51", path)
    (tmp_path / "copy").mkdir()
    encoder.save(tmp_path / "copy")
    again = text.load_open_clip("tiny-test", tmp_path / "copy/weights.pt")
    assert again.fingerprint() == encoder.fingerprint()
    says = "no weights of the text encoder tiny-test .* --text-encoder PATH, or text_encoder=PATH"
    with pytest.raises(ValueError, match=says):
        text.load_open_clip("tiny-test", tmp_path / "none.pt")
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no weights of tiny-test"):
        text.load_open_clip("tiny-test", path)


def test_what_is_missing_is_said(tmp_path, folder):
    with pytest.raises(ValueError, match="no text encoder at .*nowhere"):
        text.load_transformers(tmp_path / "nowhere")
    tiny_text.save(tmp_path / "bare", tokenizer=False)
    with pytest.raises(ValueError, match=r"no tokenizer at .*bare; save one there, or set text\."):
        text.load_transformers(tmp_path / "bare")
    assert text.load_transformers(tmp_path / "bare", folder, max_length=4).max_length == 4
    tiny_text.save(tmp_path / "unpadded", pad=False)
    with pytest.raises(ValueError, match="unpadded has no padding token"):
        text.load_transformers(tmp_path / "unpadded", max_length=4)
    with pytest.raises(ValueError, match="max_length is 77, but .* has 16 places"):
        text.load_transformers(folder)


def test_a_repository_of_the_hub_is_a_folder_of_its_cache(folder, tmp_path, monkeypatch):
    """Safetensors, or where there are none what torch wrote; without a network, one sentence."""
    library = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, revision, allow_patterns, ignore_patterns):
        asked.append((repo, allow_patterns))
        if repo == "owner/gone":
            raise library.errors.LocalEntryNotFoundError("no network")
        return tmp_path if repo == "owner/older" else folder

    monkeypatch.setattr(library, "snapshot_download", download)
    assert text.load_transformers("owner/encoder", max_length=4).width == 12
    tiny_text.save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    torch.save(load_file(tmp_path / "away"), tmp_path / "pytorch_model.bin")
    assert text.load_transformers("owner/older", "owner/words", max_length=4).width == 12
    assert [repo for repo, _ in asked] == ["owner/encoder", *["owner/older"] * 2, "owner/words"]
    assert [sorted(n for n in names if "model" in n) for _, names in asked] == [
        ["*.model", "model-*.safetensors", "model.safetensors"],
        ["*.model", "model-*.safetensors", "model.safetensors"],
        ["*.model", "pytorch_model-*.bin", "pytorch_model.bin"],
        ["*.model"],
    ]
    for where in (("owner/gone",), (folder, "owner/gone")):
        with pytest.raises(hub.HubError, match="^can't load owner/gone, .* can't be reached;"):
            text.load_transformers(*where)
    for wrong in "nosuch", "../nosuch", tmp_path / "away":
        with pytest.raises(ValueError, match="^no text encoder at .*: it is no folder, nor a repo"):
            text.load_transformers(wrong)
        with pytest.raises(ValueError, match="^no tokenizer at .*: it is no folder, nor a repo"):
            text.load_transformers(folder, wrong)


def test_stored_texts_are_the_encoders(tmp_path, encoder):
    path = tmp_path / "made" / "captions.safetensors"
    texts = ["a three", "and", "a three", "", "one two\n\u00e4"]
    assert text.write_texts(path, encoder, texts, batch_size=2) == 4
    stored = text.StoredTexts(path)
    assert (stored.width, stored.pooled_width, stored.max_length) == (12, 12, 6)
    assert stored.fingerprint == encoder.fingerprint()
    for got, want in zip(stored(texts[::-1]), encoder(texts[::-1])):
        torch.testing.assert_close(got, want)
    with safe_open(path, "pt") as file:  # as older versions wrote it
        facts = {k: v for k, v in file.metadata().items() if k != "location"}
    save_file(load_file(path), tmp_path / "old", facts)
    assert text.StoredTexts(tmp_path / "old").location is None
    with pytest.raises(ValueError, match="captions.safetensors has no text 'b' among its 4;"):
        stored(["b"])
    with pytest.raises(ValueError, match="no weights of encoded texts"):
        text.StoredTexts(tmp_path / "none.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="other.safetensors holds no encoded texts"):
        text.StoredTexts(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no texts to encode"):
        text.write_texts(path, encoder, [])
