"""What may be asked of trackers and the profiler."""

from dataclasses import replace

import pytest
import tiny_recipes

from meshpipe.errors import ArgumentError
from meshpipe.observe.config import ObserveConfig


def test_a_window_is_a_range_of_steps() -> None:
    window = ObserveConfig(profile_steps="10:13").profile_window
    assert window is not None
    assert list(window) == [10, 11, 12]


@pytest.mark.parametrize("text", ["10", "13:10", "10:10", "0:3", "a:b", "-1:3", "1:2:3", "", "1:99999999999"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="`profile_steps` must be FIRST:END"):
        ObserveConfig(profile_steps=text)


@pytest.mark.parametrize(
    ("observe", "phrase"),
    [
        ({"track": ("tensorboard",)}, "`track` tensorboard needs a folder"),
        ({"profile_steps": "1:2"}, "`profile_steps` needs a folder"),
    ],
)
def test_files_need_a_folder(observe: dict[str, object], phrase: str) -> None:
    with pytest.raises(ArgumentError, match=phrase):
        replace(tiny_recipes.single(), observe=ObserveConfig(**observe))
    replace(tiny_recipes.single(), observe=ObserveConfig(**observe), run_dir="run")


def test_folders_need_something_to_write() -> None:
    for name in ("track_dir", "profile_dir"):
        with pytest.raises(ArgumentError, match=f"`{name}` is for"):
            ObserveConfig(**{name: "folder"})


def test_a_repeated_tracker_is_one() -> None:
    assert ObserveConfig(track=("wandb", "tensorboard", "wandb")).track == ("wandb", "tensorboard")
