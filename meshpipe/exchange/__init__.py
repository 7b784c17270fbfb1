"""Exchange of weights with others: import to checkpoints, export from them."""
