"""A tokenizer.json as the vocabulary of a GGUF file.

The conventions are llama.cpp's: model `gpt2` is byte-level BPE with its merges, and `pre` names the pattern that
splits the text first; model `llama` is SentencePiece's BPE, with scores in place of merges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import EngineError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits the text before BPE -> its name in llama.cpp.
PRE = {
    _LLAMA3: "llama-bpe",
    _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    _TEKKEN: "tekken",
    "ByteLevel": "gpt-2",
}


@dataclass(slots=True)
class Vocabulary:
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    """bos, eos, eot, unk, pad -> id."""
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = True
    chat_template: str | None = None

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, rows: int, stop_token_ids: list[int]) -> Vocabulary:
    """The tokenizer in `folder`, for an embedding of `rows` rows.

    Raises EngineError: one that llama.cpp has no name for.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        raise EngineError(f"{folder}: has no tokenizer.json, from which a GGUF vocabulary is made")
    document = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    vocabulary = _of_model(document, path)
    _lay_out(vocabulary, document, rows, path)
    special = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")
    }
    vocabulary.special = {name: number for name, number in special.items() if number is not None}
    if stop_token_ids and stop_token_ids[0] != tokenizer.eos_token_id:
        vocabulary.special["eot"] = stop_token_ids[0]
    encoded = tokenizer("a").input_ids
    vocabulary.add_bos = bool(encoded) and encoded[0] == tokenizer.bos_token_id
    vocabulary.add_eos = bool(encoded) and encoded[-1] == tokenizer.eos_token_id
    bare = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
    vocabulary.add_space_prefix = bare[0].startswith("▁")
    if isinstance(tokenizer.chat_template, str):
        vocabulary.chat_template = tokenizer.chat_template
    return vocabulary


def _of_model(document: dict[str, Any], path: Path) -> Vocabulary:
    model = document["model"]
    kind = model.get("type")
    if kind == "BPE" and model.get("byte_fallback"):
        return _sentencepiece(model)
    if kind == "BPE":
        pre = _pre(document.get("pre_tokenizer"), path)
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return Vocabulary("gpt2", pre, [], [], merges=merges)
    if kind == "WordLevel" and _is_characters(document):
        # Byte-level BPE that merges nothing. llama.cpp wants a merge: this one joins what is never two symbols.
        first = document["added_tokens"][0]["content"]
        return Vocabulary("gpt2", PRE["ByteLevel"], [], [], merges=[f"{first} {first}"])
    raise EngineError(
        f"{path}: a tokenizer of type {kind} has no counterpart here (byte-level BPE, SentencePiece BPE); "
        "use fastlora merge, and llama.cpp's own converter on its result"
    )


def _sentencepiece(model: dict[str, Any]) -> Vocabulary:
    """The earlier a merge, the higher the score of what it makes; SentencePiece looks at no other scores."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(left + right, number)
    scores = {token: -float(rank.get(token, len(rank))) for token in model["vocab"]}
    ordered = sorted(model["vocab"], key=lambda token: int(model["vocab"][token]))
    return Vocabulary("llama", "default", [], [], scores=[scores[token] for token in ordered])


def _pre(pre_tokenizer: dict[str, Any] | None, path: Path) -> str:
    parts = [pre_tokenizer or {}]
    if parts[0].get("type") == "Sequence":
        parts = parts[0]["pretokenizers"]
    patterns = [part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"]
    level = [part for part in parts if part.get("type") == "ByteLevel"]
    others = [part["type"] for part in parts if part.get("type") not in ("Split", "ByteLevel")]
    pattern = patterns[0] if len(patterns) == 1 else None
    if not patterns and level and level[0].get("use_regex", True):
        pattern = "ByteLevel"
    if pattern in PRE and level and not others and (patterns == [] or len(patterns) == 1):
        return PRE[pattern]
    raise EngineError(
        f"{path}: splits text in a way whose name in llama.cpp is not known here (known: "
        f"{', '.join(PRE.values())}); use fastlora merge, and llama.cpp's own converter on its result"
    )


def _is_characters(document: dict[str, Any]) -> bool:
    added = {token["content"] for token in document["added_tokens"]}
    rest = document["model"]["vocab"].keys() - added
    return bool(added) and all(len(token) == 1 and token.isascii() for token in rest)


def _lay_out(vocabulary: Vocabulary, document: dict[str, Any], rows: int, path: Path) -> None:
    """A token for each row of the embedding."""
    words = document["model"]["vocab"].items()
    if document["model"]["type"] == "WordLevel":
        words = [(_byte_level(token), number) for token, number in words]
    added = {token["id"]: token for token in document["added_tokens"]}
    by_id = {int(number): token for token, number in words}
    by_id |= {number: token["content"] for number, token in added.items()}
    unknown = document["model"].get("unk_token")
    if beyond := sorted(set(by_id) - set(range(rows))):
        raise EngineError(
            f"{path}: {len(beyond)} tokens, such as {by_id[beyond[0]]!r} ({beyond[0]}), are past the end of the "
            f"embedding ({rows} rows)"
        )
    for number in range(rows):
        token = by_id.get(number)
        kind = NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", UNUSED
        elif token == unknown:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
        elif vocabulary.model == "llama" and _is_byte(token):
            kind = BYTE
        vocabulary.tokens.append(token)
        vocabulary.types.append(kind)
    if vocabulary.scores:
        low = min(vocabulary.scores) - 1
        scores = dict(
            zip(sorted(document["model"]["vocab"].values()), vocabulary.scores, strict=True)
        )
        vocabulary.scores = [scores.get(number, low) for number in range(rows)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_level(token: str) -> str:
    """A character as byte-level BPE writes it: the printable ones are themselves."""
    from tokenizers.pre_tokenizers import ByteLevel

    if len(token) != 1:
        return token
    ((text, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)
    return str(text)
