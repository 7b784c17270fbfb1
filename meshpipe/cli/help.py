"""The help of a command with a recipe: the common flags, or all of them in groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_args, get_origin

import tyro

from meshpipe.cli.flags import Flag, fields_of

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
COMMON = (
    "steps",
    "batch-size",
    "learning-rate",
    "seed",
    "mesh.pipeline",
    "mesh.data",
    "mesh.tensor",
    "sharding",
    "schedule",
    "num-microbatches",
    "remat",
    "init-from",
    "run-dir",
    "resume",
    "checkpoint-every",
    "eval-every",
    "track",
)
"""The flags that `--help` shows, besides those of the command itself."""
GROUPS: Mapping[str, str] = {
    "sharding": "mesh",
    "run-dir": "outputs",
    "metrics": "outputs",
    "measure-every": "outputs",
    "trace": "outputs",
    "compile-cache": "outputs",
    "eval-every": "evaluation",
    "eval-batches": "evaluation",
}
"""The group of fields of the config itself; others are in `training`."""
PART_GROUPS: Mapping[str, str] = {"": "training", "observe": "outputs"}
ORDER = ("training", "optimizer", "evaluation", "mesh", "pipeline", "model", "lora", "data", "outputs", "checkpoint")


def common_page(flags: Sequence[Flag], command: str) -> type:
    """The common flags and those of the command itself, as a dataclass whose help tyro prints."""
    by_name = {flag.name: flag for flag in flags}
    groups = {"common": [by_name[name] for name in COMMON if name in by_name]}
    own = [flag for flag in flags if flag.part == command]
    if own and command != "processes":
        groups = {command: own, **groups}
    return _page(groups)


def whole_page(flags: Sequence[Flag]) -> type:
    """All flags in groups, as a dataclass whose help tyro prints."""
    groups: dict[str, list[Flag]] = {name: [] for name in ORDER}
    for flag in sorted(flags, key=lambda flag: flag.part == "observe"):  # --run-dir before what goes into it
        default = PART_GROUPS.get(flag.part, flag.part)
        groups.setdefault(default if flag.part else GROUPS.get(flag.name, default), []).append(flag)
    return _page({name: members for name, members in groups.items() if members})


def page_of(kind: type) -> type:
    """A dataclass with the flags of another, whose help tyro prints. tyro keeps the line breaks of docstrings that are
    indented; here each paragraph is one line.
    """
    defaults = {each.name: each for each in fields(kind)}
    own: list[tuple[str, Any, Any]] = []
    for name, hint, text in fields_of(kind):
        default = defaults[name]
        shown = tyro.conf.arg(help=text, help_behavior_hint="" if default.default == () else None)
        value: Any = field(default=default.default, default_factory=default.default_factory)
        part, *others = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if is_dataclass(part) and isinstance(part, type):
            page = page_of(part)
            own.append((name, Annotated[page, *others] if others else page, field(default_factory=page)))
        else:
            own.append((name, Annotated[hint, shown], value))
    page = make_dataclass(kind.__name__, own, kw_only=True)
    page.__doc__ = kind.__doc__
    return page


def _page(groups: Mapping[str, Iterable[Flag]]) -> type:
    """A dataclass of these flags, which is never made."""
    show_all = Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(name="help-all", help="Show all flags, in groups.", help_behavior_hint=""),
    ]
    sections: list[tuple[str, Any, Any]] = [("help_all", show_all, False)]
    for name, members in groups.items():
        kind = make_dataclass(name, [_field(index, flag) for index, flag in enumerate(members)])
        kind.__doc__ = ""
        sections.append((name, Annotated[kind, tyro.conf.OmitArgPrefixes], field(default_factory=kind)))
    return make_dataclass("Help", sections)


def _field(index: int, flag: Flag) -> tuple[str, Any, Any]:
    shown = tyro.conf.arg(name=flag.name, help=flag.text)
    return f"flag{index}", Annotated[flag.hint, shown], field(default_factory=lambda: flag.default)
