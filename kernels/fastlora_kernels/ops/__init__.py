"""One module per op. Shapes: T tokens, K inputs, N outputs, R rank."""
