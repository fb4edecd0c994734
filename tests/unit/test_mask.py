"""Which tokens are supervised, against examples worked out by hand.

The tokenizers are small (one token per character, plus the special tokens), their templates have the
forms of the named models: the same markers, the same trimming, the same places for system prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
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
