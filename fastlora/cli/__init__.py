"""The command line: thin Click commands, one file each. What is heavy is imported inside them."""
