"""Memory sizes as text, and rematerialisation per stage."""

import pytest

from meshpipe.pipeline.config import PipelineConfig, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("1500000", 1_500_000),
        ("800MB", 800_000_000),
        ("12GiB", 12 * 2**30),
        ("1.5 kb", 1500),
        (" 0.5KIB ", 512),
        (".25TiB", 2**38),
        ("7B", 7),
    ],
)
def test_sizes_are_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "0", "0.1", "-1GB", "1e9", "12 G", "12 GiBs", "1.GB", "nan", "1,000"])
def test_other_texts_are_not_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="A memory limit must be a number of bytes above 0"):
        parse_bytes(text)


def test_one_name_is_for_all_stages_and_several_are_for_one_each() -> None:
    assert PipelineConfig(remat="full").remat_of_stages(3) == ("full", "full", "full")
    names = "none,dots_saveable,full"
    assert PipelineConfig(remat=names).remat_of_stages(3) == ("none", "dots_saveable", "full")
    assert PipelineConfig(remat="auto", memory_limit="1GB").remat_of_stages(3) is None
    with pytest.raises(ValueError, match=r"Got 3 names \(none,dots_saveable,full\) for 1 stage\."):
        PipelineConfig(remat=names).remat_of_stages(1)


@pytest.mark.parametrize("remat", ["", "none,", "none,some", "auto,none", "none, full"])
def test_an_unknown_name_is_an_error(remat: str) -> None:
    with pytest.raises(ValueError, match="`remat` must be one of none, full, everything_saveable"):
        PipelineConfig(remat=remat, memory_limit="1GB")
