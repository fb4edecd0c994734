"""Which tokens are supervised, against examples worked out by hand.

The tokenizers are small (one token per character, plus the special tokens), their templates have the
forms of the named models: the same markers, the same trimming, the same places for system prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastlora.data.format import BadRow, Chat, Plain
from fastlora.data.mask import IGNORED, Encoder
from fastlora.errors import DataError

LLAMA31 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Mistral puts the system prompt into the last question, and refuses turns that do not alternate.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if system is defined and loop.revindex0 <= 1 %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% endif %}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3 shows thoughts only in the turns after the last question.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'] %}{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + said }}{% else %}{{ said }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The generation markers leave out the end of the turn, as several published templates do.
MARKED = QWEN.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
)
# Qwen2.5 opens a turn with the line break only where content or a call follows.
QWEN25 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}"
    "{{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\n' + m.content }}{%- endif %}"
    "{%- for call in m.tool_calls %}{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}"
    """{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{- call.arguments | tojson }}"""
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Llama 3.1 says nothing beside a call, and makes one call at a time.
LLAMA31_CALLS = LLAMA31.replace(
    "{{ '<|start_header_id|>' + m['role']",
    "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    """{{ '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}"""
    "{% else %}{{ '<|start_header_id|>' + m['role']",
).replace("{% endfor %}", "{% endif %}{% endfor %}")
# Qwen3 with calls: what thinks in the last round alone is laid out anew in every other.
QWEN3_CALLS = QWEN3.replace(
    "{{ said }}{% endif %}",
    "{{ said }}{% endif %}{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.name + '</tool_call>' }}"
    "{% endfor %}",
)
PLAIN_TEXT = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)

SPECIAL = {
    "llama31": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        LLAMA31,
    ),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"], MISTRAL),
    "qwen": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], QWEN),
    "qwen3": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], QWEN3),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], GEMMA),
    "marked": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], MARKED),
    "plain text": ("<s>", "</s>", [], PLAIN_TEXT),
    "qwen2.5 calls": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], QWEN25),
    "qwen3 calls": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], QWEN3_CALLS),
    "llama31 calls": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        LLAMA31_CALLS,
    ),
}

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]
# Written out by hand: [[ ]] around what the model is to say.
WORKED = {
    "llama31": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes?<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[4<|eot_id|>]]",
    "mistral": "<s>[INST] Hi[/INST][[ Yes?</s>]][INST] 2+2[/INST][[ 4</s>]]",
    "qwen": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes?<|im_end|>]]\n"
    "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n",
    "qwen3": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes?<|im_end|>]]\n"
    "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\n4<|im_end|>]]\n",
    "gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n[[Yes?<end_of_turn>]]\n"
    "<start_of_turn>user\n2+2<end_of_turn>\n<start_of_turn>model\n[[4<end_of_turn>]]\n",
    "marked": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes?<|im_end|>]]\n"
    "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n",
    "plain text": "### user:\nHi\n\n### assistant:\n[[Yes?]]\n\n### user:\n2+2\n\n### assistant:\n[[4</s>]]",
}


def tokenizer_like(name: str) -> PreTrainedTokenizerFast:
    bos, eos, more, template = SPECIAL[name]
    letters = [chr(code) for code in range(32, 127)] + ["\n", "\ue000", "\ue001", "é"]
    vocabulary = {
        token: place
        for place, token in enumerate(dict.fromkeys([bos, eos, "<unk>", *more, *letters]))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=more,
        chat_template=template,
    )


def marked(encoder: Encoder, example: Chat | Plain) -> str:
    """The tokens as text with [[ ]] around the supervised ones."""
    encoded = encoder.encode([encoder.render(example)])[0]
    text, inside = "", False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORED, token)
        if (label != IGNORED) is not inside:
            inside = not inside
            text += "[[" if inside else "]]"
        text += encoder.tokenizer.convert_ids_to_tokens(token)
    return text + ("]]" if inside else "")


def encoder_like(name: str, **options: Any) -> Encoder:
    return Encoder(
        tokenizer_like(name), **{"template": "tokenizer", "supervise": "completion", **options}
    )


@pytest.mark.parametrize("name", WORKED)
def test_supervised_tokens_as_worked_out_by_hand(name: str) -> None:
    assert marked(encoder_like(name), Chat(CHAT)) == WORKED[name]


def test_a_template_that_closes_the_last_turn_with_one_token_more() -> None:
    """Phi-3's form: each turn ends with <|im_end|>, the conversation with EOS too."""
    encoder = encoder_like("qwen")
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    encoder = Encoder(encoder.tokenizer, template="tokenizer", supervise="completion")
    eos = encoder.tokenizer.eos_token
    assert marked(encoder, Chat(CHAT)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes?<|im_end|>]]\n"
        f"<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>\n{eos}]]"
    )


@pytest.mark.parametrize("name", WORKED)
def test_the_model_continues_where_the_generation_prompt_ends(name: str) -> None:
    """What is masked before the last answer is, token for token, the prompt at inference."""
    encoder = encoder_like(name)
    encoded = encoder.encode([encoder.render(Chat(CHAT))])[0]
    start = max(
        place for place, label in enumerate(encoded.labels) if label == IGNORED or place == 0
    )
    while (
        encoded.labels[start] == IGNORED and start and name in ("qwen", "qwen3", "gemma", "marked")
    ):
        start -= 1  # these write a line break after the last turn
    last = start
    while last and encoded.labels[last] != IGNORED:
        last -= 1
    if name not in ("qwen", "qwen3", "gemma", "marked"):
        last = start
    prompt = encoder.tokenizer.apply_chat_template(
        CHAT[:-1], add_generation_prompt=True, tokenize=False
    )
    assert (
        encoded.input_ids[: last + 1]
        == encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("name", WORKED)
def test_the_stop_token_is_supervised_and_known(name: str) -> None:
    encoder = encoder_like(name)
    encoded = encoder.encode([encoder.render(Chat(CHAT))])[0]
    supervised = [label for label in encoded.labels if label != IGNORED]
    assert supervised[-1] == encoder.stop_token_id
    wanted = "<end_of_turn>" if name == "gemma" else SPECIAL[name][1]
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_token_id) == wanted


def test_a_system_prompt_moved_to_the_last_question() -> None:
    chat = Chat([{"role": "system", "content": "Be short."}, *CHAT])
    assert marked(encoder_like("mistral"), chat) == (
        "<s>[INST] Hi[/INST] [[Yes?</s>]][INST] Be short.\n\n2+2[/INST][[ 4</s>]]"
    )


def test_thoughts_are_supervised() -> None:
    chat = Chat([CHAT[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes?"}])
    assert marked(encoder_like("qwen3"), chat) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[<think>\nhm\n</think>\n\nYes?<|im_end|>]]\n"
    )


def test_content_that_the_template_trims() -> None:
    chat = Chat([CHAT[0], {"role": "assistant", "content": "  Yes? \n"}])
    assert marked(encoder_like("gemma"), chat).endswith(
        "<start_of_turn>model\n[[Yes?<end_of_turn>]]\n"
    )


def test_answers_that_repeat_the_question_or_the_markers() -> None:
    chat = Chat(
        [{"role": "user", "content": "4"}, {"role": "assistant", "content": "4"}, CHAT[2], CHAT[3]]
    )
    assert marked(encoder_like("qwen"), chat).count("[[4<|im_end|>]]") == 2


def test_a_template_that_refuses_is_a_bad_row() -> None:
    chat = Chat([{"role": "system", "content": "x"}, *CHAT])
    with pytest.raises(BadRow, match="System role not supported"):
        encoder_like("gemma").render(chat)
    with pytest.raises(BadRow, match="roles must alternate"):
        encoder_like("mistral").render(Chat([CHAT[0], CHAT[0], CHAT[1]]))


def test_everything_supervised() -> None:
    text = marked(encoder_like("llama31", supervise="all"), Chat(CHAT))
    assert text == "[[" + WORKED["llama31"].replace("[[", "").replace("]]", "") + "]]"


def test_plain_text_and_pairs_end_with_eos() -> None:
    encoder = encoder_like("mistral", template="none")
    assert marked(encoder, Plain("abc")) == "[[abc</s>]]"
    assert marked(encoder, Plain(" yes", "Q: ok?\nA:")) == "Q: ok?\nA:[[ yes</s>]]"


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(GEMMA)
    encoder = encoder_like("llama31", template=str(path))
    assert "<start_of_turn>model" in encoder.render(Chat(CHAT)).text
    with pytest.raises(DataError, match="cannot be read"):
        encoder_like("llama31", template=str(tmp_path / "gone.jinja"))


def test_no_template_says_what_to_do() -> None:
    tokenizer = tokenizer_like("llama31")
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, template="tokenizer", supervise="completion")
    with pytest.raises(DataError, match=r"no chat template.*data\.template"):
        encoder.require_template()


def test_no_eos_is_refused() -> None:
    tokenizer = tokenizer_like("llama31")
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        Encoder(tokenizer, template="tokenizer", supervise="completion")


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def asking(content: str, *calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
    ]


ANSWERED = [{"role": "tool", "content": "no"}, {"role": "assistant", "content": "No."}]
CALLS = {
    ("qwen2.5 calls", ""): "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
    '[[<tool_call>\n{"name": "look", "arguments": {"at": "Rome"}}\n</tool_call><|im_end|>]]\n',
    ("qwen2.5 calls", "Let me see."): "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
    '[[Let me see.\n<tool_call>\n{"name": "look", "arguments": {"at": "Rome"}}\n</tool_call><|im_end|>]]\n',
    (
        "llama31 calls",
        "",
    ): "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nRain?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '[[{"name": "look", "parameters": {"at": "Rome"}}<|eot_id|>]]',
}
CALLS["llama31 calls", "Let me see."] = CALLS["llama31 calls", ""]
AFTER = {
    "qwen2.5 calls": "<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n[[No.<|im_end|>]]\n",
    "llama31 calls": "<|start_header_id|>tool<|end_header_id|>\n\nno<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[No.<|eot_id|>]]",
}


@pytest.mark.parametrize(("name", "content"), CALLS)
def test_tool_calls_are_supervised(name: str, content: str) -> None:
    encoder = encoder_like(name)
    turns = asking(content, call("look", at="Rome"))
    assert marked(encoder, Chat(turns)) == CALLS[name, content]
    assert marked(encoder, Chat([*turns, *ANSWERED])) == CALLS[name, content] + AFTER[name]


def test_several_calls_in_one_turn_are_supervised() -> None:
    chat = Chat(asking("", call("look"), {"name": "listen", "arguments": {}}))
    assert marked(encoder_like("qwen2.5 calls"), chat).endswith(
        '[[<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "listen", "arguments": {}}\n</tool_call><|im_end|>]]\n'
    )
    with pytest.raises(BadRow, match="one call"):
        encoder_like("llama31 calls").render(chat)


def test_calls_in_turns_that_are_laid_out_anew() -> None:
    turns = [*asking("", {"name": "look", "arguments": {}}), *ANSWERED, *CHAT[:2]]
    assert marked(encoder_like("qwen3 calls"), Chat(turns)) == (
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n[[<tool_call>look</tool_call><|im_end|>]]\n"
        "<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n[[No.<|im_end|>]]\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nYes?<|im_end|>]]\n"
    )


@pytest.mark.parametrize("content", ["", "Let me see."])
@pytest.mark.parametrize("name", ["llama31", "qwen"])
def test_a_template_that_drops_a_call_is_a_bad_row(name: str, content: str) -> None:
    with pytest.raises(BadRow, match=r"drops tool call 1 of message 2.*data\.template"):
        encoder_like(name).render(Chat([*asking(content, call("look")), *ANSWERED]))


def test_a_template_that_knows_one_call_drops_the_others_aloud() -> None:
    tokenizer = tokenizer_like("qwen2.5 calls")
    tokenizer.chat_template = QWEN25.replace("in m.tool_calls %}", "in m.tool_calls[:1] %}")
    encoder = Encoder(tokenizer, template="tokenizer", supervise="completion")
    encoder.render(Chat(asking("", call("look"))))
    with pytest.raises(BadRow, match="drops tool call 2 of message 2"):
        encoder.render(Chat(asking("", call("look"), call("listen"))))


@pytest.mark.parametrize("name", WORKED)
def test_given_turns_are_not_supervised(name: str) -> None:
    first, _, rest = WORKED[name].partition("]]")
    worked = first.replace("[[", "") + rest
    assert marked(encoder_like(name), Chat(CHAT, given=frozenset({1}))) == worked
    last_given = marked(encoder_like(name), Chat(CHAT, given=frozenset({3})))
    assert last_given.count("[[") == 1
    assert last_given.startswith(first)


def test_white_space_that_ends_an_answer_which_nothing_closes() -> None:
    chat = Chat([CHAT[0], {"role": "assistant", "content": "Yes? \n"}])
    assert marked(encoder_like("plain text"), chat).endswith("[[Yes? \n</s>]]")


def byte_level(*, trim_offsets: bool) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", *letters, "ĠĠ", "Ġb"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "Ġ"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_tokens_of_spaces_alone_are_supervised(trim_offsets: bool) -> None:
    encoder = Encoder(
        byte_level(trim_offsets=trim_offsets), template="none", supervise="completion"
    )
    assert marked(encoder, Plain("a    b\n  c  ")) == "<s>[[aĠĠĠĠbĊĠĠcĠĠ</s>]]"
    assert marked(encoder, Plain("   x", "Q:  ")) == "<s>Q:ĠĠ[[ĠĠĠx</s>]]"
    assert marked(encoder, Plain("x")) == "<s>[[x</s>]]"


def test_half_a_surrogate_pair_is_a_bad_row() -> None:
    chat = Chat([CHAT[0], {"role": "assistant", "content": "x \ud83d y"}])
    for example in (Plain("x \ud83d y"), chat):
        with pytest.raises(BadRow, match=r"'\\ud83d', half of a surrogate pair"):
            encoder_like("qwen").render(example)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"{{ m", "chat.jinja: line 1: unexpected end of template"),
        (b"{{ 1 // 0 }}", "fails on one plain question.*modulo by zero"),
        (b"{{ messages[0].content }}", "drops what the assistant says"),
        (b"\xff\xfe{", "not UTF-8 at byte 0"),
    ],
)
def test_a_broken_template_is_one_error(template: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(template)
    with pytest.raises(DataError, match=rf"data\.template: .*{message}"):
        encoder_like("llama31", template=str(path)).require_template()


def test_a_template_may_fail_in_any_way_on_one_row() -> None:
    tokenizer = tokenizer_like("qwen")
    tokenizer.chat_template = "{{ 4 // (messages[0]['content'] | length - 3) }}" + QWEN
    encoder = Encoder(tokenizer, template="tokenizer", supervise="completion")
    with pytest.raises(BadRow, match="modulo by zero"):
        encoder.render(Chat([{"role": "user", "content": "abc"}, CHAT[1]]))


def test_a_template_that_wants_a_system_prompt() -> None:
    tokenizer = tokenizer_like("qwen")
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('needs system') }}{% endif %}"
        + QWEN
    )
    encoder = Encoder(tokenizer, template="tokenizer", supervise="completion")
    encoder.require_template()
    chat = Chat([{"role": "system", "content": "x"}, *CHAT])
    assert marked(encoder, chat) == "<|im_start|>system\nx<|im_end|>\n" + WORKED["qwen"]
