"""Names of a package that are imported at their first use, so that the import of the package takes no time."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def importing(
    names: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package, whose `globals()` are `names`.

    `modules` has the module of each name; a submodule has its own name.
    """
    package = names["__name__"]

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(modules[name])
        value = names[name] = module if module.__name__ == f"{package}.{name}" else getattr(module, name)
        return value

    def all_names() -> list[str]:
        return sorted({*names, *modules})

    return get, all_names
