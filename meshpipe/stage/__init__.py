"""One stage as compiled programs: traced, cut into forward and backward, rewritten, accumulated. Internal."""
