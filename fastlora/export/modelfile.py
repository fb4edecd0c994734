"""An Ollama Modelfile for a GGUF file: template, stop tokens and context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Families whose own templates do more than lay turns out (a default system message, dates, tools), in Ollama's terms.
# Found by what their templates write.
_CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
_LLAMA3 = (
    "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_MISTRAL = (
    '{{- range .Messages }}{{ if eq .Role "assistant" }}{{ .Content }}</s>{{ else }}[INST] {{ .Content }}[/INST]'
    "{{ end }}{{ end }}"
)
_FAMILIES = {"<|im_start|>": _CHATML, "<|start_header_id|>": _LLAMA3, "[INST]": _MISTRAL}


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, stops: list[str], context: int) -> str:
    """The text of a Modelfile for the GGUF file beside it. `context`: tokens."""
    lines = [f"FROM ./{file}"]
    template = ollama_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append(
            "# The chat template has no plain counterpart; Ollama takes the one inside the GGUF file if it knows it."
        )
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Derived from the tokenizer's own template where that only lays turns out, and checked on a conversation;
    else that of its family; None where neither is known."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return "{{ .Prompt }}" if template is None else None
    derived = _derive(tokenizer)
    if derived is not None:
        return derived
    return next((known for mark, known in _FAMILIES.items() if mark in template), None)


def _derive(tokenizer: PreTrainedTokenizerBase) -> str | None:
    bos = tokenizer.bos_token or ""

    def laid_out(*turns: str, answer: bool = False) -> str:
        """Turns `s1`, `u1`, `a1` by their first letter's role; their text is `{turn}`."""
        roles = {"s": "system", "u": "user", "a": "assistant"}
        messages: list[dict[str, Any]] = [
            {"role": roles[turn[0]], "content": f"@{turn}@"} for turn in turns
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        return str(text).removeprefix(bos)  # the runner adds it

    try:
        before_user, _, opened = laid_out("u1", answer=True).partition("@u1@")
        talk = laid_out("u1", "a1", "u2")
        between = talk.partition("@u1@")[2].partition("@a1@")[0]
        after_answer = talk.partition("@a1@")[2].partition("@u2@")[0].removesuffix(before_user)
        before_system, _, rest = laid_out("s1", "u1").partition("@s1@")
        after_system = rest.partition("@u1@")[0].removesuffix(before_user)
        whole = laid_out("s1", "u1", "a1", "u2", "a2", "u3", answer=True)
    except Exception:  # a template may raise anything about roles that it does not know
        return None
    if opened != between or "{{" in whole:
        return None

    def user(turn: str) -> str:
        return f"{before_user}@{turn}@"

    def assistant(turn: str) -> str:
        return f"{opened}@{turn}@{after_answer}"

    system = f"{before_system}@s1@{after_system}"
    again = system + user("u1") + assistant("a1") + user("u2") + assistant("a2") + user("u3")
    if again + opened != whole or user("u1") + opened != laid_out("u1", answer=True):
        return None
    return (
        '{{- range .Messages }}{{ if eq .Role "system" }}'
        f"{before_system}{{{{ .Content }}}}{after_system}"
        f'{{{{ else if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{opened}{{{{ .Content }}}}{after_answer}'
        f"{{{{ end }}}}{{{{ end }}}}{opened}"
    )
