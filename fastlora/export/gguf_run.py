"""From a run to a folder with a GGUF file and a Modelfile, behind the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.export.gated import (
    gate,
    notes_of,
    open_plan,
    peak_rss_gib,
    reference_of,
    target_of,
)
from fastlora.rundir.store import RunDir, whole_folder

if TYPE_CHECKING:
    from fastlora.export.gguf_read import GgufModel
    from fastlora.export.gguf_write import Entry
    from fastlora.export.plan import Part, Plan


def gguf_run(run: RunDir, quant: str) -> dict[str, Any]:
    """Write RUN/gguf-QUANT: the file, read back, dequantized and compared, and an Ollama Modelfile.

    Report: file; quant; types, how many tensors have each; what `Reference.compare` measures.

    Raises GateError: it does not agree with the adapter. EngineError: a model or tokenizer that is not served.
    """
    from collections import Counter

    from transformers import AutoTokenizer

    from fastlora.export.gguf_read import GgufModel
    from fastlora.export.gguf_write import entries, larger_types, total_bytes, write_gguf
    from fastlora.export.merge import check_room
    from fastlora.export.modelfile import modelfile
    from fastlora.export.parity import LIMITS, problems, streamed
    from fastlora.export.rounding import wrong_weights
    from fastlora.export.vocabulary import read_vocabulary

    plan = open_plan(run)
    config = plan.model.config
    stops = run.manifest["stop_token_ids"]
    planned = entries(plan, quant)
    vocabulary = read_vocabulary(run.adapter, config.vocab_size, stops)
    reference = reference_of(run, plan)
    name = Path(run.manifest["recipe"]["model"]["name"]).name
    with whole_folder(target_of(run, "gguf", quant)) as folder:
        check_room(folder, total_bytes(planned))
        path = folder / f"{name}-{quant}.gguf"
        made = write_gguf(plan, path, quant, vocabulary, name)
        read = GgufModel(path)
        report = reference.compare(streamed(read.empty_model(plan.model), read.weight))
        found = [*wrong_weights(plan, _written(plan, made, read)), *problems(report, LIMITS[quant])]
        gate(folder, target_of(run, "gguf", quant), found, f"{quant} GGUF file")
        tokenizer = AutoTokenizer.from_pretrained(str(run.adapter))
        trained = run.manifest["recipe"]["model"]["seq_len_tokens"]
        context = min(config.max_position_embeddings, max(2048, trained))
        stop_texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in stops]
        (folder / "Modelfile").write_text(
            modelfile(path.name, tokenizer, stop_texts, context), encoding="utf-8"
        )
    types = Counter(entry.type.name for entry in made)
    larger = larger_types(made, quant, config.num_hidden_layers)
    return {
        "file": path.name, "quant": quant, "types": dict(types), **report, **notes_of(plan, larger),
        "peak_rss_gib": peak_rss_gib(),
    }  # fmt: skip


def _written(
    plan: Plan, made: list[Entry], read: GgufModel
) -> Iterator[tuple[Part, str, Callable[[], Any]]]:
    for entry in made:
        part = plan.of_parameter[entry.parameter]
        yield part, entry.type.name, partial(_rows, plan, part, read, entry.parameter)


def _rows(plan: Plan, part: Part, read: GgufModel, parameter: str) -> Iterator[Any]:
    from fastlora.export.stream import row_blocks

    dense = read.weight(parameter)
    whole = part.edit is not None and part.edit.needs_all_rows
    blocks = [(0, len(dense))] if whole else row_blocks(plan.shape(part))
    return (dense[start:stop] for start, stop in blocks)
