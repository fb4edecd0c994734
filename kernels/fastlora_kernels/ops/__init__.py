"""One module per op. Shapes: T tokens, K inputs, N outputs, R rank, F the width of an MLP."""
