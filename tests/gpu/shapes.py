"""Random checkpoints of true shapes: speed, memory and numerics do not depend on the values.

python shapes.py make FOLDER {small,1b,8b-nf4}   prints the checkpoint's folder, made in FOLDER
python shapes.py data FILE ROWS CHARACTERS       conversations to train it on
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def make(folder: Path, size: str) -> Path:
    from fastlora.bench.suites import bundled, load_suite
    from fastlora.bench.weights import random_checkpoint
    from fastlora.recipe.schema import ModelSection

    suites = {"1b": "llama32-1b", "8b-nf4": "llama31-8b"}
    shape = SMALL if size == "small" else load_suite(bundled()[suites[size]]).shape
    model = ModelSection(
        name=size, quantization="nf4" if size.endswith("-nf4") else "none", dtype="bfloat16"
    )
    return random_checkpoint(shape, model, folder)


def data(target: Path, rows: int, characters: int) -> None:
    """Answers of random words, about `characters` long."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(500)
    ]
    with target.open("w") as file:
        for _ in range(rows):
            answer = " ".join(rng.choices(words, k=characters // 5))[:characters]
            turns = [
                {"role": "user", "content": "Say something."},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        print(json.dumps(str(make(Path(sys.argv[2]), sys.argv[3]))))
    else:
        data(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
