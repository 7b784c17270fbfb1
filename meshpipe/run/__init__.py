"""A recipe's run, from its first check to its exit status: the training loop, metrics, records.

It can be called: `meshpipe.run(config)` trains as `config` says (`run/function.py`).
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshpipe.config import Config
    from meshpipe.run.history import RunResult


class _Callable(ModuleType):
    """The package under whose name users expect a function."""

    def __call__(
        self, config: "Config", *, name: str = "run", show: bool = True, handle_signals: bool = False
    ) -> "RunResult":
        """Trains as `config` says and returns its result; raises where the command would exit.

        The arguments are those of `meshpipe.run.function.run`.
        """
        from meshpipe.run.function import run

        return run(config, name=name, show=show, handle_signals=handle_signals)


sys.modules[__name__].__class__ = _Callable
