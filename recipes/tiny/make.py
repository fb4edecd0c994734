"""Makes the embedded default from nothing: the base model in model/ and the data set cipher.jsonl.

    python recipes/tiny/make.py          (about 6 minutes on 2 CPU cores; same seed, same files on one machine)

The base is a 1.8 M parameter Llama over single characters that has learned five word games (copy, reverse,
double, upper, last). The data set teaches a sixth that it has never seen: the Caesar cipher with shift 3
(each letter is replaced by the one three places later, Suetonius, Divus Julius 56).
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

HERE = Path(__file__).parent
SEED = 20261124
STEPS, BATCH, PEAK_LR = 1500, 128, 2e-3
TRAIN_ROWS = 1200

GAMES = {
    "Copy": lambda word: word,
    "Reverse": lambda word: word[::-1],
    "Double": lambda word: "".join(letter * 2 for letter in word),
    "Upper": lambda word: word.upper(),
    "Last": lambda word: word[-1],
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def random_word(rng: random.Random) -> str:
    """A pronounceable word of 3 to 8 letters."""
    vowels, consonants = "aeiou", "bcdfghjklmnpqrstvwxyz"
    turn = rng.random() < 0.5
    letters = []
    for _ in range(rng.randint(3, 8)):
        letters.append(rng.choice(vowels if turn else consonants))
        turn = not turn if rng.random() < 0.85 else turn
    return "".join(letters)


def caesar(word: str, shift: int = 3) -> str:
    alphabet = string.ascii_lowercase
    return "".join(alphabet[(alphabet.index(letter) + shift) % 26] for letter in word)


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [
        "<|pad|>",
        "<|bos|>",
        "<|end|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|unk|>",
    ]
    characters = sorted(set(string.printable) - set("\x0b\x0c\r"))
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_dataset(path: Path) -> None:
    rng = random.Random(SEED)
    words: set[str] = set()
    while len(words) < TRAIN_ROWS:
        words.add(random_word(rng))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Cipher: {word}"},
                {"role": "assistant", "content": caesar(word)},
            ]
        }
        for word in sorted(words)
    ]
    rng.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    rng = random.Random(SEED + 1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.1
    )
    answer_starts = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for step in range(STEPS):
        texts = []
        for _ in range(BATCH):
            game, word = rng.choice(list(GAMES)), random_word(rng)
            turns = [
                {"role": "user", "content": f"{game}: {word}"},
                {"role": "assistant", "content": GAMES[game](word)},
            ]
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        answered = (batch["input_ids"] == answer_starts).cumsum(1).bool()
        supervised = (
            answered & batch["attention_mask"].bool() & (batch["input_ids"] != answer_starts)
        )
        labels = batch["input_ids"].masked_fill(~supervised, -100)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    make_dataset(HERE / "cipher.jsonl")
    make_model(HERE / "model")
