"""Wrong files in place of configs and checkpoints."""

import copy
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import runs
import torch
from safetensors.torch import save_file

import k_diffusion as K
from k_diffusion import checkpoints

from .table import Row

TEXTS = {
    "broken.json": '{"model": {',
    "empty.json": "",
    "comma.json": '{"model": {"a": 1,}}',
    "list.json": "[1, 2]",
    "number.json": "3",
    "null.json": "null",
    "nested.json": "[" * 100_000,
    "nested2.json": '{"a":' * 100_000,
    "twice.json": '{"model": {}, "model": {}}',
    "twice2.json": json.dumps(runs.TINY).replace('"lr": ', '"lr": 1, "lr": '),
    "overflow.json": json.dumps(runs.TINY).replace("0.002", "1e999"),
    "long.json": '{"model": ' + "9" * 5000 + "}",
    "text.pth": "these are no weights",
    "text.safetensors": "these are no weights",
    "html.pth": "<!DOCTYPE html><title>404</title>",
    "empty.pth": "",
    "empty.safetensors": "",
}


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made_by_a_checkpoint",)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def write(folder: Path) -> None:
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "latin.json").write_bytes('{"model": "Modèle"}'.encode("latin-1"))
    (folder / "utf16.json").write_bytes("{}".encode("utf-16"))
    (folder / "zeros.json").write_bytes(bytes(100))
    for name in "folder.json", "folder.pth", "folder.png", "folder.safetensors":
        (folder / name).mkdir()
    (folder / "folder_state.json").mkdir()
    (folder / "held_state.json").mkdir()
    for name in "pipe.json", "pipe.pth", "pipe.safetensors", "pipe.png":
        os.mkfifo(folder / name)

    config = runs.tiny_config()
    torch.manual_seed(0)
    model = K.config.make_model(config)
    weights = model.state_dict()
    whole: dict[str, Any] = {"config": config, "model": weights, "model_ema": weights}
    name = next(k for k, x in weights.items() if x.ndim == 2)
    nan = {**weights, name: torch.full_like(weights[name], float("nan"))}
    other = {k: torch.cat([x, x]) if x.ndim == 2 else x for k, x in weights.items()}
    for stem, state in {
        "a": whole,
        "nothing": {},
        "list": [1, 2],
        "tensor": torch.zeros(3),
        "diffusers": {"state_dict": weights, "global_step": 3},
        "no_tensors": {**whole, "model_ema": {}},
        "strings": {**whole, "model_ema": {"a": "b"}},
        "weights_list": {**whole, "model": [1, 2]},
        "config_text": {**whole, "config": "digits"},
        "config_empty": {**whole, "config": {}},
        "opt_text": {**whole, "opt": "adamw"},
        "no_groups": {**whole, "opt": {"state": {}}},
        "groups": {**whole, "opt": {"state": {}, "param_groups": [3]}},
        "sched": {**whole, "sched": {"gamma": 1}},
        "ema_sched": {**whole, "ema_sched": {"last_epoch": "now"}},
        "other": {**whole, "model": other, "model_ema": other},
        "nan": {**whole, "model": nan, "model_ema": nan},
        "expanded": {**whole, "model_ema": {"a": torch.zeros(1).expand(10**12)}},
        "evil": {**whole, "model_ema": Evil()},
        "custom": {**whole, "config": {**config, "dataset": {
            "num_classes": 10, "type": "custom", "location": "stranger.py",
            "get_dataset": "get_dataset", "config": {}}}},
        "piped": {**whole, "config": {**config, "dataset": {
            "type": "webdataset", "location": "pipe:touch made_by_a_checkpoint", "streaming": True,
            "num_classes": 0, "num_examples": 9}}},
    }.items():  # fmt: skip
        torch.save(state, folder / f"{stem}.pth")
    bytes_ = (folder / "a.pth").read_bytes()
    for n in 1, 100, len(bytes_) // 2, len(bytes_) - 1:
        (folder / f"cut_{'all_but_1' if n == len(bytes_) - 1 else n}.pth").write_bytes(bytes_[:n])
    os.rename(folder / f"cut_{len(bytes_) // 2}.pth", folder / "cut_half.pth")
    torch.save(whole, folder / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data.pkl", bytes(10**7))
    with zipfile.ZipFile(folder / "other_zip.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    _lie_about_sizes(folder / "a.pth", folder / "liar.pth")
    (folder / "stranger.py").write_text("open('made_by_a_checkpoint', 'w')")

    checkpoints.write_inference(folder / "a.safetensors", config, weights, "fp32")
    cut = (folder / "a.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(cut[:-10])
    metadata = {"config": json.dumps(config)}
    save_file(weights, folder / "no_config.safetensors")
    save_file(weights, folder / "bad_config.safetensors", {"config": "{"})
    save_file(nan, folder / "nan.safetensors", metadata)
    save_file(other, folder / "wider.safetensors", metadata)
    save_file({}, folder / "no_tensors.safetensors", metadata)
    custom = {**metadata, "config": json.dumps(torch.load(folder / "custom.pth")["config"])}
    save_file(weights, folder / "custom.safetensors", custom)
    for stem, data in {
        "huge_header": safetensors(b"{}", length=2**62),
        "long_header": safetensors(b"{}", length=99_000_000),
        "list_header": safetensors(b"[]"),
        "text_header": safetensors(b"hello"),
        "beyond": safetensors(json.dumps(
            {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()),
        "overlap": safetensors(json.dumps(
            {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode(), b"four"),
    }.items():  # fmt: skip
        (folder / f"{stem}.safetensors").write_bytes(data)
    rgb = copy.deepcopy(runs.TINY)
    rgb["model"]["input_channels"] = 3
    rgb = K.config.load_config(rgb)
    wide = K.config.make_model(rgb).state_dict()
    checkpoints.write_inference(folder / "other.safetensors", rgb, wide, "fp32")


def _lie_about_sizes(source: Path, target: Path) -> None:
    """A copy of a zip file, one of whose entries says that it has 4,000,000,000 bytes."""
    data = bytearray(source.read_bytes())
    at = data.rindex(b"PK\x01\x02")  # of the last entry in the directory at the end
    data[at + 20 : at + 28] = struct.pack("<II", 4_000_000_000, 4_000_000_000)
    target.write_bytes(data)


CONFIGS = {
    "broken.json": "broken.json is not JSON",
    "empty.json": "empty.json is not JSON",
    "comma.json": "comma.json is not JSON",
    "list.json": "must hold a JSON object, got list",
    "number.json": "must hold a JSON object, got int",
    "null.json": "must hold a JSON object, got NoneType",
    "nested.json": "nested.json nests too deep",
    "nested2.json": "nested2.json nests too deep",
    "twice.json": "twice.json: the key 'model' stands there twice",
    "twice2.json": "the key 'lr' stands there twice",
    "overflow.json": "numbers must be finite, got 1e999",
    "long.json": "is not JSON: .*digits",
    "latin.json": "latin.json is not UTF-8 text",
    "utf16.json": "utf16.json is not UTF-8 text",
    "zeros.json": "zeros.json is not JSON",
    "folder.json": "config file folder.json is a folder",
    "pipe.json": "config file pipe.json is no ordinary file",
    "gone.json": "no config file gone.json",
    "/dev/zero": "config file /dev/zero is no ordinary file",
    "no_config.safetensors": "no config in its metadata; pass a .json config",
    "bad_config.safetensors": "bad_config.safetensors is not JSON",
    "text.pth": "text.pth is damaged or no checkpoint: it isn't in torch.save's zip format",
}
TRAINED = {
    "text.pth": "text.pth is damaged or no checkpoint: it isn't in",
    "html.pth": "html.pth is damaged or no checkpoint",
    "empty.pth": "empty.pth is damaged or truncated",
    "cut_1.pth": "cut_1.pth is damaged or truncated",
    "cut_100.pth": "cut_100.pth is damaged or truncated",
    "cut_half.pth": "cut_half.pth is damaged or truncated",
    "cut_all_but_1.pth": "cut_all_but_1.pth is damaged or truncated",
    "folder.pth": "checkpoint folder.pth is a folder",
    "pipe.pth": "checkpoint pipe.pth is no ordinary file",
    "gone.pth": "no checkpoint gone.pth",
    "nothing.pth": r"nothing.pth is no training checkpoint: it has no \['config', 'model'\]",
    "list.pth": "list.pth is no training checkpoint",
    "tensor.pth": "tensor.pth is no training checkpoint",
    "diffusers.pth": r"it has no \['config', 'model'\] but state_dict, global_step",
    "no_tensors.pth": "no_tensors.pth is of another architecture.*missing",
    "strings.pth": r"strings.pth \(model_ema\) has no weights",
    "weights_list.pth": r"weights_list.pth \(model\) has no weights",
    "config_text.pth": "its 'config' is no dict",
    "opt_text.pth": "its 'opt' is no dict",
    "no_groups.pth": "its 'opt' has no 'param_groups'",
    "groups.pth": "'opt' has groups without params",
    "sched.pth": "its 'sched' has no 'last_epoch'",
    "ema_sched.pth": "its 'ema_sched' has no 'last_epoch'",
    "other.pth": "other.pth is of another architecture than the config's model; of another shape",
    "nan.pth": "nan.pth has NaN or infinite weights",
    "expanded.pth": "says that a has shape .*, but stores less of it",
    "evil.pth": r"evil.pth holds code \(\w+.mkdir\), which isn't run; ask .* \.safetensors",
    "old.pth": "old.pth is damaged or no checkpoint: it isn't in",
    "bomb.pth": "bomb.pth has compressed parts .*expand to 10,000,000",
    "other_zip.pth": "other_zip.pth is damaged or truncated",
    "liar.pth": "liar.pth (says that it holds .* bytes, but the file has|is damaged)",
}
SLIM = {
    "text.safetensors": "text.safetensors is not a complete safetensors file",
    "empty.safetensors": "empty.safetensors is not a complete safetensors file",
    "folder.safetensors": "checkpoint folder.safetensors is a folder",
    "pipe.safetensors": "checkpoint pipe.safetensors is no ordinary file",
    "gone.safetensors": "no checkpoint gone.safetensors",
    "cut.safetensors": "cut.safetensors is",
    "no_config.safetensors": "no config in its metadata",
    "bad_config.safetensors": "bad_config.safetensors is not JSON",
    "nan.safetensors": "nan.safetensors has NaN or infinite weights",
    "wider.safetensors": "wider.safetensors is of another architecture",
    "no_tensors.safetensors": "no_tensors.safetensors is of another architecture.*missing",
    "huge_header.safetensors": "its header would be 4,611,686,018,427,387,904 bytes long",
    "long_header.safetensors": "its header would be 99,000,000 bytes long",
    "list_header.safetensors": "its header isn't a JSON object",
    "text_header.safetensors": "its header isn't JSON",
    "beyond.safetensors": "beyond.safetensors is",
    "overlap.safetensors": "overlap.safetensors is",
}
ROWS = [
    *(Row("train", f"--config {name}", says) for name, says in CONFIGS.items()),
    *(Row("sample", f"--config {name}", says) for name, says in list(CONFIGS.items())[:6]),
    *(Row("k_diffusion.config", name, says) for name, says in list(CONFIGS.items())[:9]),
    *(Row("sample", f"--checkpoint {name}", says) for name, says in TRAINED.items()),
    *(Row("convert_for_inference", name, says) for name, says in TRAINED.items()),
    *(Row("train", f"--resume {name}", says) for name, says in TRAINED.items()),
    *(Row("sample", f"--checkpoint {name}", says) for name, says in SLIM.items()),
    *(
        Row("train", f"--resume-inference {name}", says)
        for name, says in SLIM.items()
        if "_config" not in name
    ),
    Row("sample", "--checkpoint config_empty.pth", "model: is required"),
    Row("convert_for_inference", "config_empty.pth", "model: is required"),
    Row("convert_for_inference", "a.safetensors -o b.safetensors", "is an inference checkpoint"),
    Row("convert_for_inference", "a.pth --config gone.json", "no config file gone.json"),
    Row("convert_for_inference", "a.pth --config twice.json", "'model' stands there twice"),
    Row("train", "--resume a.safetensors", "is an inference checkpoint"),
    Row("train", "--config piped.pth", "names the command pipe:touch .* --set dataset.location"),
    Row("train", "--config custom.pth", "names the Python file stranger.py .* --set dataset.loc"),
    Row("train", "--config custom.safetensors", "names the Python file stranger.py"),
    Row("train", "--dry-run --config custom.pth", "names the Python file stranger.py"),
]
