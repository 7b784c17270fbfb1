"""Names of rematerialisation: what forward stores for backward, of whole stages and of single layers."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence

import jax

from meshpipe.errors import ArgumentError

CHECKPOINT_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)
"""The members of `jax.checkpoint_policies` that need no arguments."""
REMAT_POLICIES = ("none", "layer", "full", *CHECKPOINT_POLICIES)
"""What a stage may have. `layer` recomputes its layers one at a time."""
LAYER_POLICIES = ("none", "full", *(name for name in CHECKPOINT_POLICIES if name != "everything_saveable"))
"""What a layer may have in a stage with `layer`."""

_NUMBERS = re.compile(r"layers/(\d+)(?:-(\d+))?(?::([1-9]\d*))?")


def checkpoint_policy(remat: str) -> Callable[..., bool] | None:
    """What `jax.checkpoint` saves of a stage or a layer; None where none is around it."""
    name = "nothing_saveable" if remat == "full" else remat
    return getattr(jax.checkpoint_policies, name) if name in CHECKPOINT_POLICIES else None


def check_remat(text: str) -> None:
    """Raises `ValueError` for a text that names no rematerialisation."""
    if "=" in text:
        _entries(text)
        return
    unknown = [name for name in text.split(",") if name not in REMAT_POLICIES]
    if unknown and text != "auto":
        raise ArgumentError(
            f"`remat` must be one of {', '.join(REMAT_POLICIES)}, several of them with commas between, one per "
            f"stage, policies of layers such as layers/1-8=full, or auto. Got {unknown[0]!r}.{_nearest(unknown[0])}"
        )


def remat_of_stages(text: str, num_stages: int) -> tuple[str, ...] | None:
    """The rematerialisation of every stage, `layer` where layers have policies of their own; None for `auto`.

    Raises `ValueError` when the number of names is neither 1 nor the number of stages.
    """
    if "=" in text:
        return ("layer",) * num_stages
    names = tuple(text.split(","))
    if names == ("auto",):
        return None
    if len(names) not in (1, num_stages):
        raise ArgumentError(
            f"`remat` must be one name for all stages, or one for each. Got {len(names)} names ({text}) for "
            f"{num_stages} {'stage' if num_stages == 1 else 'stages'}."
        )
    return names if len(names) == num_stages else names * num_stages


def remat_of_layers(text: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """The policy of every layer in a stage with `layer`: `full` unless the text has policies of layers.

    Raises `ValueError` when a policy is for layers that are not there.
    """
    if "=" not in text:
        return ("full",) * len(class_names)
    policies = ["none"] * len(class_names)
    for selector, policy in _entries(text):
        chosen = _selected(selector, class_names)
        if not chosen:
            kinds = ", ".join(dict.fromkeys(class_names))
            raise ArgumentError(
                f"A policy in `remat` must be for layers of the model: layers/0 to layers/{len(class_names) - 1}, or "
                f"those of a class ({kinds}). Got {selector!r}."
            )
        for layer in chosen:
            policies[layer] = policy
    return tuple(policies)


def _nearest(name: str) -> str:
    """A sentence with the rematerialisation that was probably meant; empty if none is near."""
    near = difflib.get_close_matches(name, (*REMAT_POLICIES, "auto"), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _entries(text: str) -> list[tuple[str, str]]:
    """Selectors of layers with their policies."""
    entries = []
    for entry in text.split(","):
        selector, _, policy = entry.partition("=")
        if not selector or policy not in LAYER_POLICIES:
            raise ArgumentError(
                "A policy of layers in `remat` must be LAYERS=POLICY: LAYERS is e.g. layers/3, layers/1-8, "
                f"layers/1-8:2 (every second) or a class, and POLICY one of {', '.join(LAYER_POLICIES)}. Got {entry!r}."
            )
        entries.append((selector, policy))
    return entries


def _selected(selector: str, class_names: Sequence[str]) -> list[int]:
    """The layers that a selector is for; none of them if it reaches beyond the last."""
    numbers = _NUMBERS.fullmatch(selector)
    if numbers is None:
        return [i for i, name in enumerate(class_names) if fnmatch.fnmatchcase(name, selector)]
    first, last, step = (int(text) if text else None for text in numbers.groups())
    assert first is not None
    layers = range(first, (first if last is None else last) + 1, step or 1)
    return list(layers) if layers and layers[-1] < len(class_names) else []
