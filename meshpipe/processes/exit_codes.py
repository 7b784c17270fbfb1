"""The exit codes of a run and of every command; `docs/` and scripts rely on them."""

COMPLETED = 0
FAILED = 1
"""The run failed; its last lines say what, and what was saved."""
INVALID = 2
"""An invalid request, found before anything was compiled or written."""
INTERRUPTED = 130
"""What a shell reports of a process that SIGINT ended."""
