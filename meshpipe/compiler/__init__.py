"""Equal programs compiled once, copied to other submeshes, and kept for later runs."""
