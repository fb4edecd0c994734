"""Training: TRL's SFTTrainer, the same on every engine, with nothing left to a default."""
