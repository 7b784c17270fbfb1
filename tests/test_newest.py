"""What is installed to try the newest releases: all that the project needs, none of it held back."""

import tomllib

from newest import ROOT, requirements, without_upper_bounds
from packaging.requirements import Requirement


def test_upper_bounds_are_left_out() -> None:
    given = ["jax>=0.10.0,<0.13", "mypy~=2.4", "tool", "other[extra] == 1.2", "last >= 3, != 3.1, < 4"]
    assert without_upper_bounds(given) == ["jax>=0.10.0", "mypy>=2.4", "tool", "other[extra]>=1.2", "last>=3"]


def test_every_dependency_is_there_and_takes_any_later_release() -> None:
    found = {requirement.name: requirement for requirement in map(Requirement, requirements())}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "pytest"} <= found.keys()
    assert all(requirement.specifier.contains("999") for requirement in found.values())


def test_what_follows_jax_closely_is_bounded_by_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["test"]])
    bounded = {requirement.name for requirement in asked if not requirement.specifier.contains("999")}
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= bounded
