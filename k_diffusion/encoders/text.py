"""Frozen text encoders: a vector for each token of a text, and one for all of it."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints import digest
from ..common import hub
from ..common.files import PathLike, writable
from ..common.text import need
from .base import Frozen
from .weights import given_file

_INSTALL = '"k-diffusion[text]"'
_NAME_IT = (
    "pass --text-encoder PATH, or text_encoder=PATH to K.load; to train or encode, pass --set "
    "text.location=PATH"
)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt")
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_OLDER_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin")


class Texts(NamedTuple):
    """What an encoder makes of n texts: tokens (n, t, width), padding (n, t), True where a token is
    none, and pooled (n, pooled_width)."""

    tokens: Tensor
    padding: Tensor
    pooled: Tensor


class TextEncoder(Frozen):
    """A frozen network from texts to `Texts` of `max_length` tokens, the last of which are padding.

    name: where it was loaded from. network: what it runs. encode: texts -> Texts, by the network.
    save: writes the files that it can be loaded from into a folder. Longer texts are cut off. A
    text without tokens is all padding, as the absence of a text is.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        encode: Callable[[list[str]], Texts],
        max_length: int,
        save: Callable[[Path], object],
    ):
        super().__init__(name)
        self.network, self.encode, self.max_length = network.eval(), encode, max_length
        self.save = save
        sample = self(["a"])
        self.width, self.pooled_width = sample.tokens.shape[2], sample.pooled.shape[1]

    @cached_property
    def _digest(self) -> str:
        return digest(self.state_dict())[:16]

    def fingerprint(self) -> str:
        """A digest of the weights as they are when first asked for, by which texts encoded
        beforehand name their encoder."""
        return self._digest

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Texts:
        """What becomes of n texts, on the network's device, in float32."""
        tokens, padding, pooled = self.encode(list(texts))
        return Texts(tokens.float().masked_fill(padding[..., None], 0), padding, pooled.float())


def load_transformers(
    location: PathLike, tokenizer: PathLike | None = None, max_length: int = 77
) -> TextEncoder:
    """A text encoder of the library transformers: CLIP's, T5's or another that it has as one.

    location: a folder that `save_pretrained` wrote, or a repository OWNER/NAME of the hub.
    tokenizer: that of its tokenizer, by default the same. pooled is the network's pooled output, or
    where it has none the mean of the tokens. No code of a repository is run. Raises ImportError
    without the library, ValueError where there is no such model or tokenizer, HubError, an OSError,
    where the hub has none or can't be reached.
    """
    library: Any = need("transformers", "a text encoder", _INSTALL)
    wanted = tokenizer or location
    folder = _folder(location, "text encoder", _WEIGHTS, _OLDER_WEIGHTS)
    words = _folder(wanted, "tokenizer") if tokenizer else folder
    config = _pretrained(library.AutoConfig, folder, f"no text encoder at {location}")
    make = (
        library.CLIPTextModel if config.model_type == "clip" else library.AutoModelForTextEncoding
    )
    network = _pretrained(make, folder, f"{location} is no text encoder")
    problem = f"no tokenizer at {wanted}; save one there, or set text.tokenizer to its path"
    if not any(path for name in _TOKENIZER_FILES for path in words.glob(name)):
        raise ValueError(problem)  # the library would make one without words
    tokens_of = _pretrained(library.AutoTokenizer, words, problem)
    if tokens_of.pad_token is None:
        raise ValueError(f"the tokenizer at {wanted} has no padding token; set its pad_token")
    places = getattr(config, "max_position_embeddings", None) or max_length
    if max_length > places:
        raise ValueError(
            f"text.max_length is {max_length}, but {location} has {places} places for tokens; set "
            f"it to {places} or less"
        )

    def encode(texts: list[str]) -> Texts:
        found = tokens_of(
            texts,
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(network.device)
        mask = found["attention_mask"]
        out = network(input_ids=found["input_ids"], attention_mask=mask)
        tokens, pooled = out.last_hidden_state, getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Texts(tokens, mask == 0, pooled)

    def save(folder: Path) -> None:
        network.save_pretrained(folder)
        tokens_of.save_pretrained(folder)

    return TextEncoder(str(location), network, encode, max_length, save).freeze()


def _folder(location: PathLike, what: str, *weights: Sequence[str]) -> Path:
    """A local folder, or one with the files that a repository of the hub has for `what`.

    weights: the names of files of weights, of which those that are there first are taken. Raises
    ValueError, HubError.
    """
    folder = Path(location)
    remedy = _NAME_IT if weights else "set text.tokenizer to the path of its folder"
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(location)):
        raise ValueError(
            f"no {what} at {location}: it is no folder, nor a repository OWNER/NAME of the hub; "
            f"{remedy}"
        )
    for names in weights or ((),):
        try:
            folder = hub.download(str(location), None, ["*.json", *_TOKENIZER_FILES, *names])
        except hub.HubError as error:
            raise hub.HubError(f"{error}; {remedy}") from None
        if any(path for name in names for path in folder.glob(name)):
            break
    return folder


def _pretrained(kind: Any, folder: Path, problem: str) -> Any:
    """`kind.from_pretrained` of a local folder; what it raises becomes a sentence."""
    # The library replaces torch.linspace while it loads. torch lists its constructors, of tensors
    # on a default device, at their first use: not then, or linspace would stay on the CPU for good.
    with torch.device("meta"):
        torch.empty(0)
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        said = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{problem} (transformers says: {said})") from error


def load_open_clip(model: str, location: PathLike) -> TextEncoder:
    """The text half of a model of open_clip, from a file of its weights.

    model: open_clip's name of the architecture, one whose text half is open_clip's own. Tokens are
    those after the last layer norm; pooled is the text's embedding. Raises ImportError without the
    library, ValueError for another name or file.
    """
    library: Any = need("open_clip", "a text encoder of open_clip", '"k-diffusion[clip]"')
    try:
        file = given_file(location, f"the text encoder {model}")
    except ValueError as error:
        raise ValueError(f"{error}; {_NAME_IT}") from None
    if model not in library.list_models():
        raise ValueError(f"open_clip has no model {model!r}; see open_clip.list_models()")
    try:
        network = library.create_model(model, pretrained=str(location))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{location} has no weights of {model}: {error}") from error
    tokenize = library.get_tokenizer(model)
    last_norm = getattr(getattr(network, "text", network), "ln_final", None)
    if last_norm is None:
        raise ValueError(f"the text half of {model} isn't open_clip's own; take type transformers")
    network.visual = None  # images aren't read

    def encode(texts: list[str]) -> Texts:
        ids = tokenize(texts).to(next(network.parameters()).device)
        seen: list[Tensor] = []
        hook = last_norm.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            pooled = network.encode_text(ids)
        finally:
            hook.remove()
        # a text ends with the token of the largest id
        places = torch.arange(ids.shape[1], device=ids.device)
        return Texts(seen[0], places > ids.argmax(1, keepdim=True), pooled)

    def save(folder: Path) -> None:
        shutil.copyfile(file, folder / file.name)

    return TextEncoder(str(location), network, encode, tokenize.context_length, save).freeze()


# ---------------------------------------------------------------- texts encoded beforehand


def encode_texts(
    encoder: TextEncoder, texts: Iterable[str], batch_size: int = 64
) -> dict[str, Tensor]:
    """Texts, each once, and what an encoder makes of them, as the tensors of a file.

    `tokens` that aren't padding, one text after the other; `starts`, where each begins; `pooled`;
    and `texts` as JSON.
    """
    unique = list(dict.fromkeys(texts))
    if not unique:
        raise ValueError("there are no texts to encode")
    tokens, pooled, lengths = [], [], []
    for first in range(0, len(unique), batch_size):
        made = encoder(unique[first : first + batch_size])
        tokens.append(made.tokens[~made.padding].cpu())
        pooled.append(made.pooled.cpu())
        lengths.append((~made.padding).sum(1).cpu())
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(lengths).cumsum(0)])
    stored = {"tokens": torch.cat(tokens), "pooled": torch.cat(pooled), "starts": starts}
    return {**stored, "texts": pack_texts(unique)}


def encoder_facts(encoder: TextEncoder) -> dict[str, str]:
    """The metadata of a file of `encode_texts`: the encoder's location, fingerprint and length."""
    facts = {"location": encoder.name, "fingerprint": encoder.fingerprint()}
    return {**facts, "max_length": str(encoder.max_length)}


def write_texts(
    path: Path, encoder: TextEncoder, texts: Iterable[str], batch_size: int = 64
) -> int:
    """Encode texts into a file (.safetensors) for `StoredTexts`. Returns how many there are."""
    stored = encode_texts(encoder, texts, batch_size)
    save_file(stored, writable(path), metadata=encoder_facts(encoder))
    return len(stored["pooled"])


def pack_texts(texts: Sequence[str]) -> Tensor:
    """Texts as the bytes of JSON, for a file of tensors."""
    return torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)


def unpack_texts(packed: Tensor) -> list[str]:
    """The texts that `pack_texts` was given. packed: (bytes,)."""
    return json.loads(packed.numpy().tobytes())


class StoredTexts:
    """Texts encoded beforehand, to be called as a TextEncoder is; read as they are needed.

    path: a file of `write_texts`, or a folder of latents that encode_latents.py wrote with them.
    Raises ValueError for one without encoded texts; a call does for a text that isn't among them.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors")) or [self.path]
        self.places: dict[str, tuple[int, int]] = {}
        self._parts: list[tuple[Any, ...]] = []
        for file in files:
            given_file(file, "encoded texts")
            try:
                opened = safe_open(str(file), "pt")
                facts = opened.metadata() or {}
                names = unpack_texts(opened.get_tensor("texts"))
                tokens, pooled = (opened.get_slice(name) for name in ("tokens", "pooled"))
                self._add(names, opened.get_tensor("starts"), tokens, pooled)
                self.fingerprint, self.max_length = facts["fingerprint"], int(facts["max_length"])
                self.location = facts.get("location")
                self.width, self.pooled_width = (x.get_shape()[1] for x in (tokens, pooled))
            except (SafetensorError, KeyError, ValueError) as error:
                raise ValueError(f"{file} holds no encoded texts: {error}") from error

    def _add(self, names: Sequence[str], *part: Any) -> None:
        self.places |= {text: (len(self._parts), i) for i, text in enumerate(names)}
        self._parts.append(part)

    def add(self, encoder: TextEncoder, texts: Sequence[str]) -> None:
        """Encode further texts by their encoder, and keep them in memory."""
        if new := [text for text in texts if text not in self.places]:
            made = encode_texts(encoder, new)
            unique = unpack_texts(made["texts"])
            self._add(unique, made["starts"], made["tokens"], made["pooled"])

    def check(self, texts: Iterable[str]) -> None:
        """Raises ValueError where texts are not among these."""
        missing = [*dict.fromkeys(text for text in texts if text not in self.places)]
        if missing:
            more = f" and {len(missing) - 1:,} others" if missing[1:] else ""
            raise ValueError(
                f"{self.path} has no text {missing[0]!r}{more} among its {len(self.places):,}; "
                "write it anew with python -m k_diffusion.scripts.encode_captions"
            )

    def __call__(self, texts: Sequence[str]) -> Texts:
        self.check(texts)
        tokens = torch.zeros(len(texts), self.max_length, self.width)
        padding = torch.ones(len(texts), self.max_length, dtype=torch.bool)
        pooled = torch.empty(len(texts), self.pooled_width)
        for i, text in enumerate(texts):
            part, place = self.places[text]
            starts, all_tokens, all_pooled = self._parts[part]
            start, end = starts[place : place + 2].tolist()
            tokens[i, : end - start] = all_tokens[start:end]
            padding[i, : end - start] = False
            pooled[i] = all_pooled[place : place + 1][0]
        return Texts(tokens, padding, pooled)
