"""LoRA kernels for any PEFT model. Works without fastlora; imports nothing from it."""
