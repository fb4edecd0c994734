"""From TOML and `--set` to a Recipe, or to one error that lists every problem with its key."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastlora.errors import RecipeError
from fastlora.recipe import library
from fastlora.recipe.schema import TEMPLATE_TYPES, Recipe, SourceSection

TomlTable = dict[str, Any]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read `path`, apply each `key=value` of `settings`, validate.

    File paths inside the file are taken from the file's own folder, those given in `settings` from
    the working directory.

    Raises UsageError: the file cannot be read. RecipeError: it is not TOML, or any key, type or value
    is wrong (all of them in one error).
    """
    try:
        table = tomllib.loads(library.read(path))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(str(path), [f"not readable as TOML: {error}"]) from None
    _anchor_paths(table, path.parent, _PATHS)
    problems = list(_apply_settings(table, settings))
    given = {setting.partition("=")[0].strip() for setting in settings}
    _anchor_paths(table, Path.cwd(), [key for key in _PATHS if _is_given(key, given)])
    problems += _remove_unknown_keys(table, Recipe, "")
    problems += _missing_sources(table)
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
            if _is_text(parts) and not isinstance(value, str | list | dict):
                value = text.strip()  # output.dir=2024-11-24 is a folder, not a date
            if key.strip() in ("data.sources", "data.eval_sources") and isinstance(value, str):
                value = [value]
            target[parts[-1]] = value


def _is_text(parts: Sequence[str]) -> bool:
    """Whether the key of a recipe takes a string, whatever it may hold."""
    schema: type[BaseModel] | None = Recipe
    annotation: Any = None
    for part in parts:
        field = schema.model_fields.get(part) if schema else None
        annotation = field.annotation if field else None
        schema = _section_of(annotation)
    return annotation in (str, str | None)


_SOURCES = ("data.sources", "data.eval_sources", "data.rehearsal.source")
_PATHS = ("model.name", "data.template", *_SOURCES, "eval.prompts")
_FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def _is_given(key: str, given: Collection[str]) -> bool:
    """Whether a setting gives it, itself or within a table of its own."""
    return key in given or key.rpartition(".")[0] in given


def _holder(table: TomlTable, key: str) -> tuple[TomlTable | None, str]:
    """The section that the dotted `key` lies in, if there is one, and its name there."""
    *sections, name = key.split(".")
    holder: Any = table
    for section in sections:
        holder = holder.get(section) if isinstance(holder, dict) else None
    return (holder if isinstance(holder, dict) else None), name


def _anchor_paths(table: TomlTable, folder: Path, keys: Sequence[str]) -> None:
    """Make paths that exist in `folder`, or that can only be paths, absolute; the rest are Hub ids or are
    reported later."""

    def anchored(value: Any) -> Any:
        if isinstance(value, list):
            return [anchored(item) for item in value]
        if isinstance(value, dict) and "path" in value:
            return value | {"path": anchored(value["path"])}
        # Not Path.exists(), which raises for names that are too long.
        if isinstance(value, str) and (os.path.exists(folder / value) or _is_path(value)):
            return os.path.abspath(folder / value)
        return value

    for key in keys:
        holder, name = _holder(table, key)
        if holder is None or not holder.get(name):
            continue
        if name == "prompts" and isinstance(holder[name], list):
            continue  # of texts
        if name != "template" or str(holder[name]).endswith(TEMPLATE_TYPES):
            holder[name] = anchored(holder[name])


def _is_path(name: str) -> bool:
    """Whether it can only be a path: it ends as data files do, or nearly, or no Hub id looks like it."""
    suffix = Path(name).suffix.lower()
    # Nearly, but not the two letters of a language, which end Hub ids.
    mistyped = len(suffix) > 3 and difflib.get_close_matches(suffix, _FILE_TYPES, cutoff=0.75)
    return suffix in _FILE_TYPES or bool(mistyped) or not _HUB_ID.fullmatch(name)


def _missing_sources(table: TomlTable) -> Iterator[str]:
    """Paths that neither exist nor end as data files do: to look them up on the Hub takes half a minute."""
    for key in _SOURCES:
        holder, name = _holder(table, key)
        sources = holder.get(name) if holder else None
        if isinstance(sources, str | dict):
            sources = [sources]
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            path = source.get("path") if isinstance(source, dict) else source
            if not isinstance(path, str) or not os.path.isabs(path) or os.path.exists(path):
                continue
            folder, file_name = os.path.split(path)
            if file_name.lower().endswith(_FILE_TYPES):
                continue  # reading it says what is wrong
            beside = [file.name for file in Path(folder).glob("*") if file.suffix in _FILE_TYPES]
            near = difflib.get_close_matches(file_name, beside, n=1)
            hint = f"did you mean {near[0]}?" if near else f"data files: {', '.join(_FILE_TYPES)}"
            yield f"{key}[{index}]: {path}: no such file; {hint}"


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
        elif f"data.{prefix.removeprefix('data.')}{key}" in _SOURCES:
            for index, item in enumerate(value if isinstance(value, list) else [value]):
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
    "lora_rank": "lora.rank",
    "lora_target": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "max_seq_length": "model.seq_len_tokens",
    "max_length": "model.seq_len_tokens",
    "max_seq_len": "model.seq_len_tokens",
    "cutoff_len": "model.seq_len_tokens",
    "sequence_len": "model.seq_len_tokens",
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
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
    "warmup_steps": "train.warmup_fraction",
    "lr_scheduler_type": "train.scheduler",
    "optim": "train.optimizer",
    "logging_steps": "train.log_every_steps",
    "evals_per_epoch": "train.eval_every_steps",
    "saves_per_epoch": "train.save_every_steps",
    "save_total_limit": "train.keep_checkpoints",
    "load_best_model_at_end": "train.keep_best",
    "random_state": "train.seed",
    "resume_from_checkpoint": "fastlora run --resume",
    "gradient_checkpointing": "train.checkpointing",
    "use_gradient_checkpointing": "train.checkpointing",
    "val_set_size": "data.eval_split",
    "val_size": "data.eval_split",
    "datasets": "data.sources",
    "dataset": "data.sources",
    "dataset_path": "data.sources",
    "type": "format",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.supervise",
    "train_on_responses_only": "data.supervise",
    "assistant_only_loss": "data.supervise",
    "completion_only_loss": "data.supervise",
    "output_dir": "output.dir",
    "wandb_project": "output.report_to",
    "exact_match_rows": "eval.rows",
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
    lines: dict[str, str] = {}  # by key, since a union reports each of its branches
    given: dict[str, str] = {}
    for item in error.errors():
        # Union branches (str, list[...], ...) add their own path elements: keep those that are keys.
        parts = [p for p in item["loc"] if not (isinstance(p, str) and re.search(r"[\[(-]", p))]
        key = ""
        for part in parts:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        key = re.sub(r"\.(literal|str|int|float|list)$", "", key)
        if item["type"] == "value_error":
            prefix = f"{key}." if key else ""
            lines |= {prefix + line: "" for line in str(item["ctx"]["error"]).splitlines()}
            continue
        message = _in_users_words(key, item)
        if key not in lines:
            lines[key] = message
        elif message not in lines[key]:
            lines[key] += " or " + message.removeprefix("input should be ")
        if item["type"] != "missing":
            given[key] = f", got {_as_typed(item['input'])}"
    for key, line in lines.items():
        # A list with a wrong item is also no string, where both are allowed.
        if not any(other.startswith(f"{key}[") for other in lines):
            yield f"{key}: {line}{given.get(key, '')}" if line else key


def _in_users_words(key: str, item: ErrorDetails) -> str:
    match item["type"]:
        case "missing":
            return "missing; this key must be given"
        case "model_type" if key.endswith("]"):
            return 'input should be a string or a table with path = "..."'
        case "model_type":
            return f"is a section; write [{key}], and its keys below"
        case "string_type" if not isinstance(item["input"], list | dict):
            return "input should be a string, in quotes"
    message = item["msg"].replace("a valid dictionary", "a table")
    return message[0].lower() + message[1:]


def _as_typed(value: Any) -> str:
    """As TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str | list | dict) else str(value)
