"""A run's folder: manifest, metrics, checkpoints, adapter. Every write is atomic."""
