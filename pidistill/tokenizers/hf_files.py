"""Read what a model folder says about its tokenizer: the vocabulary, the tokens that end a turn, and the padding token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pidistill.errors import InputError, one_line
from pidistill.jsonl import read_object


@dataclass(frozen=True)
class TokenizerFiles:
    """Hold the tokenizer's files of one model folder."""

    folder: Path
    tokenizer: Tokenizer
    config: dict[str, Any]  # tokenizer_config.json; empty where there is none
    names: dict[str, str]  # `bos_token`, `eos_token`, ... as strings

    @cached_property
    def generation(self) -> dict[str, Any]:
        return read_json(self.folder / "generation_config.json")

    def find_stop_ids(self, stop_tokens: Sequence[str] | None) -> frozenset[int]:
        """Return the ids that end an assistant turn: those of ``stop_tokens``, or those that the files name."""
        if stop_tokens is not None:
            return frozenset(self.id_of(token, "tokenizer.stop_tokens") for token in stop_tokens)
        model = read_json(self.folder / "config.json")
        nested = model.get("text_config")  # of models that also read images
        stored = _eos_ids(self.generation) or _eos_ids(model) or _eos_ids(nested if isinstance(nested, dict) else {})
        named = [self.id_of(self.names["eos_token"], "eos_token of tokenizer_config.json")] if "eos_token" in self.names else []
        if not stored and not named:
            raise InputError(f"{self.folder} names no end-of-sequence token; set tokenizer.stop_tokens to what ends a turn")
        for i in stored:
            if self.tokenizer.id_to_token(i) is None:
                raise InputError(
                    f"eos_token_id {i} in {self.folder} is not an id of its tokenizer.json; set tokenizer.stop_tokens"
                )
        return frozenset([*stored, *named])

    def find_pad_id(self, stop_ids: frozenset[int]) -> int:
        """Return the model's padding token; a stop token where it has none, because no position looks at padding."""
        if "pad_token" in self.names:
            return self.id_of(self.names["pad_token"], "pad_token of tokenizer_config.json")
        stored = self.generation.get("pad_token_id")
        return min(stop_ids) if stored is None else stored

    def id_of(self, token: str, where: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"{where} is {token!r}, which tokenizer.json does not have")
        return found


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the files of ``folder``; refuse a folder without tokenizer.json."""
    tokenizer = _load_tokenizer(folder)
    config = read_json(folder / "tokenizer_config.json")
    return TokenizerFiles(folder, tokenizer, config, _named_tokens(read_json(folder / "special_tokens_map.json") | config))


def _load_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "it is no folder"
        raise InputError(f"{folder} has no tokenizer.json ({held or 'it is empty'}); check tokenizer.path")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file} is not a tokenizer ({one_line(error, 160)}); copy or download it again") from error
    tokenizer.no_truncation()  # the file may ask for either, and both would change prompts silently
    tokenizer.no_padding()
    return tokenizer


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is no file."""
    return read_object(file, "check tokenizer.path") if file.is_file() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token, eos_token, ... as strings; the files write them as strings or as {"content": ...}."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in named.items()}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def _eos_ids(config: Mapping[str, Any]) -> list[int]:
    """Return the ids under ``eos_token_id``, which the files write as one or as a list."""
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    for i in ids:
        if not isinstance(i, int) or not 0 <= i < 1 << 31:
            raise InputError(f"eos_token_id {i!r} in the model's folder is not a token's id; set tokenizer.stop_tokens")
    return ids
