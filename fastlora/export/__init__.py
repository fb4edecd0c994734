"""From an adapter to a model that others can load, checked against the adapter."""
