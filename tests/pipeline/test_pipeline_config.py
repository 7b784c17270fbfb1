"""Memory sizes as text, and rematerialisation per stage and per layer."""

import pytest

from meshpipe.pipeline.config import PipelineConfig, _as_text, parse_bytes
from meshpipe.pipeline.remat import remat_of_layers, remat_of_stages


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
    assert remat_of_stages("full", 3) == ("full", "full", "full")
    names = "none,dots_saveable,layer"
    assert remat_of_stages(names, 3) == ("none", "dots_saveable", "layer")
    assert remat_of_stages("auto", 3) is None
    with pytest.raises(ValueError, match=r"Got 3 names \(none,dots_saveable,layer\) for 1 stage\."):
        remat_of_stages(names, 1)


@pytest.mark.parametrize("remat", ["", "none,", "none,some", "auto,none", "none, full"])
def test_an_unknown_name_is_an_error(remat: str) -> None:
    with pytest.raises(ValueError, match="`remat` must be one of none, layer, full, everything_saveable"):
        PipelineConfig(remat=remat, memory_limit="1GB")


CLASSES = ["Embed", *["Block"] * 6, "Head"]


@pytest.mark.parametrize(
    ("remat", "policies"),
    [
        ("layer", "full full full full full full full full"),
        ("layers/2=full", "none none full none none none none none"),
        ("layers/1-3=full,layers/2=dots_saveable", "none full dots_saveable full none none none none"),
        ("layers/1-6:2=full", "none full none full none full none none"),
        ("Block=full,Head=nothing_saveable", "none full full full full full full nothing_saveable"),
        ("*=full,*e*=none,layers/0=full", "full full full full full full full none"),
    ],
)
def test_layers_have_policies(remat: str, policies: str) -> None:
    PipelineConfig(remat=remat)
    assert remat_of_stages(remat, 2) == ("layer", "layer")
    assert remat_of_layers(remat, CLASSES) == tuple(policies.split())


@pytest.mark.parametrize("remat", ["layers/8=full", "layers/6-8=full", "layers/3-2=full", "Blok=full"])
def test_a_policy_of_no_layer_is_an_error(remat: str) -> None:
    with pytest.raises(ValueError, match=r"layers/0 to layers/7, or those of a class \(Embed, Block, Head\)\. Got '"):
        remat_of_layers(remat, CLASSES)


@pytest.mark.parametrize("remat", ["layers/1=some", "layers/1=layer", "=full", "layers/1=full,none", "Block=full,"])
def test_a_policy_that_no_layer_can_have_is_an_error(remat: str) -> None:
    with pytest.raises(ValueError, match="must be LAYERS=POLICY"):
        PipelineConfig(remat=remat)


def test_a_dict_of_policies_is_told_how_to_be_written() -> None:
    assert _as_text({"Block": "full", "layers/2": "none"}) == " Write 'Block=full,layers/2=none'."
