"""Several processes of one run: joining, stopping together, and ending when one fails."""
