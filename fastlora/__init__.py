"""fastlora: the fastest honest way to fine-tune a language model with LoRA/QLoRA on one GPU."""

__version__ = "0.1.0"
