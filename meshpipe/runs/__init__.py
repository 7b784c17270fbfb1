"""A recipe's run, from its first check to its exit status: the training loop, metrics, records."""
