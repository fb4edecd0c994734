"""From TOML and `--set` to a Recipe, or to one error that lists every problem with its key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fastlora.errors import RecipeError
from fastlora.recipe.schema import Recipe, SourceSection

TomlTable = dict[str, Any]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read `path`, apply each `key=value` of `settings`, validate.

    File paths inside the file are taken from the file's own folder, those given in `settings` from
    the working directory.

    Raises RecipeError: the file cannot be read or is not TOML, or any key, type or value is wrong
    (all of them in one error).
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(str(path), ["no such file"]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(str(path), [f"not readable as TOML: {error}"]) from None
    _anchor_paths(table, path.parent)
    problems = list(_apply_settings(table, settings))
    problems += _remove_unknown_keys(table, Recipe, "")
    recipe = None
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        problems += explain(error)
    if problems or recipe is None:
        raise RecipeError(path.name, problems)
    return recipe


def parse_value(text: str) -> Any:
    """A `--set` value is a TOML value; what is not TOML is taken as a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# Two ways to say one thing: --set of the one puts the file's other aside.
_ALTERNATIVES = (
    ("train.epochs", "train.steps"),
    ("train.accumulation", "train.effective_batch"),
    ("data.eval_split", "data.eval_sources"),
)


def _apply_settings(table: TomlTable, settings: Sequence[str]) -> Iterator[str]:
    keys = {setting.partition("=")[0].strip() for setting in settings}
    for pair in _ALTERNATIVES:
        for given, other in (pair, pair[::-1]):
            section, _, name = other.partition(".")
            if given in keys and other not in keys and isinstance(table.get(section), dict):
                table[section].pop(name, None)
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            yield f"--set {setting}: write it as section.key=value"
            continue
        target = table
        for part in parts[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                yield f"--set {setting}: {part} is not a section"
                break
        else:
            value = parse_value(text.strip())
            if key.strip() in ("data.sources", "data.eval_sources") and isinstance(value, str):
                value = [value]
            target[parts[-1]] = value


def _anchor_paths(table: TomlTable, folder: Path) -> None:
    """Make paths that exist beside the recipe absolute; the rest are Hub ids or are reported later."""

    def anchored(name: Any) -> Any:
        if isinstance(name, str) and name and not Path(name).is_absolute():
            beside = folder / name
            if beside.exists() or _is_file_name(name):
                return str(beside.absolute())
        return name

    model, data = table.get("model"), table.get("data")
    if isinstance(model, dict) and "name" in model:
        model["name"] = anchored(model["name"])
    if not isinstance(data, dict):
        return
    if str(data.get("template", "")).endswith((".jinja", ".j2")):
        data["template"] = anchored(data["template"])
    for key in ("sources", "eval_sources"):
        if not isinstance(data.get(key), list):
            continue
        for index, source in enumerate(data[key]):
            if isinstance(source, str):
                data[key][index] = anchored(source)
            elif isinstance(source, dict) and "path" in source:
                source["path"] = anchored(source["path"])


def _is_file_name(name: str) -> bool:
    return Path(name).suffix.lower() in {".jsonl", ".json", ".csv", ".parquet"}


def _remove_unknown_keys(table: TomlTable, schema: type[BaseModel], prefix: str) -> list[str]:
    """Report and drop unknown keys, so that the checks of the known ones still run."""
    problems: list[str] = []
    for key in list(table):
        field = schema.model_fields.get(key)
        if field is None:
            del table[key]
            problems.append(f"{prefix}{key}: unknown key; {_did_you_mean(prefix, key, schema)}")
            continue
        value, section = table[key], _section_of(field.annotation)
        if section is not None and isinstance(value, dict):
            problems += _remove_unknown_keys(value, section, f"{prefix}{key}.")
        elif key in ("sources", "eval_sources") and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    problems += _remove_unknown_keys(
                        item, SourceSection, f"{prefix}{key}[{index}]."
                    )
    return problems


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


# What users of other trainers type, where the letters alone do not lead to our name.
_ALIASES = {
    "learning_rate": "train.lr",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "max_seq_length": "model.seq_len_tokens",
    "max_length": "model.seq_len_tokens",
    "sequence_len": "model.seq_len_tokens",
    "base_model": "model.name",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "warmup_ratio": "train.warmup_fraction",
    "gradient_checkpointing": "train.checkpointing",
    "val_set_size": "data.eval_split",
    "datasets": "data.sources",
    "output_dir": "output.dir",
}


def _all_keys(schema: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        yield prefix + name
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")


def _did_you_mean(prefix: str, key: str, schema: type[BaseModel]) -> str:
    if key in _ALIASES:
        return f"did you mean {_ALIASES[key]}?"
    near = difflib.get_close_matches(key, list(schema.model_fields), n=1, cutoff=0.6)
    if not near and key.startswith("learning_r"):
        return "did you mean train.lr?"
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = {full.rpartition(".")[2]: full for full in _all_keys()}
    near = difflib.get_close_matches(key, list(elsewhere), n=1, cutoff=0.75)
    if near:
        return f"did you mean {elsewhere[near[0]]}?"
    return "known here: " + ", ".join(schema.model_fields)


def explain(error: ValidationError) -> Iterator[str]:
    """A line for each thing that is wrong, with its key."""
    seen: set[str] = set()
    for item in error.errors():
        # Union branches (str, list[...], ...) add their own path elements: keep those that are keys.
        parts = [p for p in item["loc"] if not (isinstance(p, str) and re.search(r"[\[(-]", p))]
        key = ""
        for part in parts:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        key = re.sub(r"\.(literal|str|int|float|list)$", "", key)
        if item["type"] == "value_error":
            prefix = f"{key}." if key else ""
            lines = [prefix + line for line in str(item["ctx"]["error"]).splitlines()]
        elif item["type"] == "missing":
            lines = [f"{key}: missing; this key must be given"]
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines = [f"{key}: {message}, got {item['input']!r}"]
        for line in lines:
            if line not in seen:
                seen.add(line)
                yield line
