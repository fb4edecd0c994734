"""What comes of an adapter: answers, and a model that others can load, checked against the adapter."""
