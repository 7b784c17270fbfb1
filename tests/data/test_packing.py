"""Packed windows hold every pair of a token and its target once, never across documents."""

import numpy as np
import pytest

from meshpipe.data.packing import Following, Packer, Segment, Whole, Window, read_record, write_record

DTYPES = [np.dtype("<u2"), np.dtype("<u4")]


def documents(lengths: list[int], seed: int = 0) -> list[Segment]:
    rng = np.random.default_rng(seed)
    return [
        Segment(np.full(n, i * 1000, np.int32) + np.arange(n, dtype=np.int32), rng.random(n) < 0.5)
        for i, n in enumerate(lengths)
    ]


def pack(packer: Packer, segments: list[Segment]) -> list[Window]:
    return [window for segment in segments for window in packer.add(segment)] + list(packer.finish())


def pairs(windows: list[Window], length: int, dtype: np.dtype = DTYPES[1]) -> list[tuple[int, int, float]]:
    """Input, target and weight of every position that is no padding, by documents and places."""
    found = []
    for window in windows:
        example = read_record(write_record(window, dtype), dtype, length)
        assert {name: (field.shape, str(field.dtype)) for name, field in example.items()} == {
            name: ((length,), "float32" if name == "weights" else "int32")
            for name in ("inputs", "targets", "segment_ids", "positions", "weights")
        }
        used = sum(segment.pairs for segment in window)
        assert used <= length
        assert not example["weights"][used:].any()
        runs = np.flatnonzero(np.diff(example["segment_ids"], prepend=-1))
        assert (example["positions"][runs] == 0).all()
        np.testing.assert_array_equal(np.diff(example["positions"])[np.diff(example["segment_ids"]) == 0], 1)
        assert len(runs) == len(window) + (used < length)
        found += list(zip(*(example[name][:used].tolist() for name in ("inputs", "targets", "weights")), strict=True))
    return sorted(found)


def expected(segments: list[Segment]) -> list[tuple[int, int, float]]:
    return sorted(
        pair
        for one in segments
        for pair in zip(one.tokens[:-1].tolist(), one.tokens[1:].tolist(), one.learned[1:].tolist(), strict=True)
    )


@pytest.mark.parametrize("packer", [Following, Whole])
@pytest.mark.parametrize("seed", range(3))
def test_every_pair_is_in_one_window(packer: type, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(2, 40, 200).tolist()
    segments = documents(lengths, seed)
    windows = pack(packer(16), segments)
    assert pairs(windows, 16) == expected(segments)


def test_documents_that_follow_each_other_leave_no_place_empty_but_at_the_end() -> None:
    windows = pack(Following(8), documents([5, 3, 20, 2]))
    assert [sum(segment.pairs for segment in window) for window in windows] == [8, 8, 8, 2]


def test_a_document_is_cut_only_if_it_is_longer_than_a_window() -> None:
    lengths = np.random.default_rng(7).integers(2, 18, 500).tolist()
    windows = pack(Whole(16), documents([*lengths, 40]))
    found = sorted(len(segment.tokens) for window in windows for segment in window)
    assert found == sorted([*lengths, 17, 17, 8])
    used = sum(segment.pairs for window in windows for segment in window)
    assert used / (16 * len(windows)) > 0.95


def test_few_windows_wait_for_what_fits() -> None:
    packer, given = Whole(10, open_windows=4), []
    for document in documents([8] * 20):
        given += packer.add(document)
    assert len(given) == 16
    assert len(list(packer.finish())) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_record_has_bits_only_where_some_targets_do_not_count(dtype: np.dtype) -> None:
    tokens = np.array([3, 1, 4, 1, 5], np.int32)
    every = Segment(tokens, np.array([False, True, True, True, True]))  # the first is no target
    some = Segment(tokens, np.array([True, False, False, True, True]))
    for segment, size, weights in ((Segment(tokens), 0, [1] * 4), (every, 0, [1] * 4), (some, 1, [0, 0, 1, 1])):
        record = write_record([segment], dtype)
        assert len(record) == 8 + 5 * dtype.itemsize + size
        example = read_record(record, dtype, 6)
        assert example["weights"].tolist() == [*weights, 0, 0]
        assert example["inputs"].tolist() == [3, 1, 4, 1, 0, 0]
        assert example["targets"].tolist() == [1, 4, 1, 5, 0, 0]
        assert example["segment_ids"].tolist() == [0, 0, 0, 0, 1, 1]
        assert example["positions"].tolist() == [0, 1, 2, 3, 0, 1]
