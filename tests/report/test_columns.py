"""Tables fit the terminal, and never break a name or a number."""

import io

import pytest
from rich.console import Console

from meshpipe.report.tables import make_table


def lines(table: object, width: int) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width, soft_wrap=True).print(table)
    return output.getvalue().splitlines()


def table():
    made = make_table("stage", "kinds", "parameters", "bytes on a device", right=("parameters",), wrap=("kinds",))
    made.add_row(0, "Embed, 8 DecoderBlock", "1,750,138,880", "7 GB")
    made.add_row(1, "7 DecoderBlock, LanguageModelHead", "1,547,759,616", "6.19 GB")
    made.add_row(2, rest="does not fit: too few layers for so many stages")
    return made


def test_with_room_every_row_is_a_line() -> None:
    assert lines(table(), 100) == [
        "stage   kinds                                  parameters   bytes on a device",
        "0       Embed, 8 DecoderBlock               1,750,138,880   7 GB",
        "1       7 DecoderBlock, LanguageModelHead   1,547,759,616   6.19 GB",
        "2       does not fit: too few layers for so many stages",
    ]


def test_with_less_room_headers_and_texts_break_between_words() -> None:
    assert lines(table(), 48) == [
        "stage  kinds                 parameters  bytes",
        "                                         on a",
        "                                         device",
        "0      Embed, 8           1,750,138,880  7 GB",
        "       DecoderBlock",
        "1      7 DecoderBlock,    1,547,759,616  6.19 GB",
        "       LanguageModelHead",
        "2      does not fit: too few layers for so many",
        "       stages",
    ]


@pytest.mark.parametrize("width", range(20, 100, 3))
def test_nothing_is_cut_in_any_width(width: int) -> None:
    found = lines(table(), width)
    words = {word for line in found for word in line.split()}
    assert {"1,750,138,880", "DecoderBlock", "LanguageModelHead", "parameters", "stages"} <= words
    least = max(len("stage LanguageModelHead"), len("stage 1,547,759,616"), 6 + 20)
    assert max(map(len, found)) <= max(width, least)


def test_columns_for_which_there_is_no_room_come_below_with_the_first_again() -> None:
    made = make_table("rank", "parameters", "gradients", "optimizer", right=("parameters", "gradients", "optimizer"))
    made.add_row(0, "5.25 GB", "3.5 GB", "7 GB", style="bold")
    assert lines(made, 30) == [
        "rank   parameters   gradients",
        "0         5.25 GB      3.5 GB",
        "",
        "rank   optimizer",
        "0           7 GB",
    ]


def test_every_part_has_all_columns_that_name_a_row() -> None:
    made = make_table("stage", "program", "time", "temporaries", right=("time", "temporaries"), keys=2)
    made.add_row(0, "forward", "0.8 us", "2 MB")
    made.add_row(0, "backward", "1.8 us", "3 MB")
    assert lines(made, 26) == [
        "stage   program      time",
        "0       forward    0.8 us",
        "0       backward   1.8 us",
        "",
        "stage program  temporaries",
        "0     forward         2 MB",
        "0     backward        3 MB",
    ]
