"""PEFT's layers with our ops as their forward, a kind of layer a file."""
