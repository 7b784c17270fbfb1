"""The exit codes of a run and of every command; `docs/` and scripts rely on them.

A run that a signal stops ends with 128 + its number: 130, 143 or 129 (`processes/stop.py`).
"""

COMPLETED = 0
FAILED = 1
"""The run failed; its last lines name the error and the newest checkpoint."""
INVALID = 2
"""An invalid request, found before anything was compiled or written."""
INTERRUPTED = 130
"""The code that a shell reports for a process that SIGINT ended."""
