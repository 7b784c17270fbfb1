"""Compiles equal programs once, copies them to other submeshes, and caches them for later runs."""
