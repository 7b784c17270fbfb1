"""Batches resume exactly, and windows hold the promised text."""

import json
import pickle
import threading

import numpy as np
import pytest
from waiting import LONG

from meshpipe.data import (
    BatchIterator,
    LabelledWindows,
    PackageWindowsConfig,
    PackedWindows,
    TextFilesConfig,
    batches,
    example_batch,
)


class Numbers:
    """Each example is its own index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"number": np.asarray(index, np.int32)}

    def __repr__(self) -> str:
        return f"Numbers({self.size})"


def take(iterator: BatchIterator, count: int) -> list[int]:
    return [number for _ in range(count) for number in next(iterator)["number"].tolist()]


def text(string: str) -> np.ndarray:
    return np.frombuffer(string.encode(), np.uint8)


def test_the_seed_decides_the_order_and_every_epoch_has_its_own():
    numbers = take(batches(Numbers(10), 4, seed=3), 5)
    assert numbers == take(batches(Numbers(10), 4, seed=3), 5)
    assert numbers != take(batches(Numbers(10), 4, seed=4), 5)
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]


def test_without_shuffling_the_order_is_the_source_s():
    assert [b["number"].tolist() for b in batches(Numbers(10), 4, shuffle=False, epochs=1)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


@pytest.mark.parametrize("consumed", [0, 1, 2, 7])
def test_a_restored_position_continues_with_the_next_batch(consumed: int):
    whole = take(batches(Numbers(10), 4), 12)
    first = batches(Numbers(10), 4)
    take(first, consumed)  # by now more than these has been prefetched
    state = json.loads(json.dumps(first.get_state()))
    second = batches(Numbers(10), 4)
    take(second, 3)
    second.set_state(state)
    assert second.get_state() == state
    assert take(second, 12 - consumed) == whole[4 * consumed :]


def test_a_position_fits_another_batch_size():
    whole = take(batches(Numbers(10), 4), 6)
    first, second = batches(Numbers(10), 4), batches(Numbers(10), 3)
    take(first, 3)
    second.set_state(first.get_state())
    assert take(second, 4) == whole[12:]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (batches(Numbers(11), 4), "source"),
        (batches(Numbers(10), 4, seed=1), "seed"),
        (batches(Numbers(10), 4, shuffle=False), "shuffle"),
    ],
)
def test_a_position_of_other_data_or_another_order_is_refused(other: BatchIterator, name: str):
    with pytest.raises(ValueError, match=rf"only for the same data and order. Got {name} "):
        other.set_state(batches(Numbers(10), 4).get_state())


def test_finite_epochs_end_also_after_a_resume():
    iterator = batches(Numbers(10), 4, epochs=2)
    assert len(take(iterator, 5)) == 20
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.set_state({**iterator.get_state(), "examples": 12})
    assert len(list(iterator)) == 2


def test_the_examples_after_the_last_full_batch_are_a_smaller_one_if_they_are_kept():
    def every(size: int, batch_size: int) -> list[list[int]]:
        iterator = batches(Numbers(size), batch_size, shuffle=False, epochs=1, drop_remainder=False)
        return [batch["number"].tolist() for batch in iterator]

    assert every(10, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert every(8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert every(3, 4) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="at least one example"):
        every(0, 4)


def test_rows_of_other_processes_are_left_out_of_full_batches_alone():
    iterator = batches(Numbers(10), 4, shuffle=False, epochs=1, drop_remainder=False)
    iterator.read_only([2, 3])
    assert [batch["number"].tolist() for batch in iterator] == [[0, 0, 2, 3], [0, 0, 6, 7], [8, 9]]
    assert iterator.get_state()["examples"] == 10


@pytest.mark.parametrize("batch_size", [0, 4])
def test_a_batch_must_fit_the_data(batch_size: int):
    with pytest.raises(ValueError, match="at least"):
        batches(Numbers(3), batch_size)


def test_an_example_batch_has_the_shapes_of_batches():
    source = LabelledWindows([text("abcdef"), text("ghijk")], 2)
    example, batch = example_batch(source, 3), next(batches(source, 3))
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}
    with pytest.raises(ValueError, match="at least one example"):
        example_batch(Numbers(0), 3)


def test_labels_alternate_and_have_equally_many_windows():
    source = LabelledWindows([text("abcdef"), text("ghijk")], 2)
    windows = [(bytes(source[i]["inputs"].astype(np.uint8)), int(source[i]["labels"])) for i in range(len(source))]
    assert windows == [(b"ab", 0), (b"gh", 1), (b"cd", 0), (b"ij", 1)]


def test_packed_windows_count_every_byte_but_the_first_of_each_file_once():
    source = PackedWindows([text("abc"), text("d"), text("efghi")], 4)
    first, second = source[0], source[1]
    assert len(source) == 2
    assert bytes(first["inputs"].astype(np.uint8)) == b"abcd"
    assert bytes(first["targets"].astype(np.uint8)) == b"bcde"
    assert first["segment_ids"].tolist() == [0, 0, 0, 1]
    assert first["weights"].tolist() == [1, 1, 0, 0]
    assert bytes(second["targets"].astype(np.uint8)) == b"fghi"
    assert second["weights"].tolist() == [1, 1, 1, 1]


def test_only_the_last_packed_window_is_padded():
    source = PackedWindows([text("abcdef")], 4)
    last = source[len(source) - 1]
    assert last["inputs"].tolist() == [ord("e"), ord("f"), 0, 0]
    assert last["weights"].tolist() == [1, 0, 0, 0]
    assert last["segment_ids"].tolist() == [0, 0, 1, 1]


def test_unigram_entropy():
    assert PackedWindows([text("aabb")], 2).unigram_entropy() == pytest.approx(np.log(2))


@pytest.mark.parametrize("config", [PackageWindowsConfig(), TextFilesConfig()])
def test_package_source_is_there_and_the_same_each_time(config: PackageWindowsConfig | TextFilesConfig):
    train, held_out = config.train_source(), config.eval_source()
    assert len(train) > 10_000
    assert len(held_out) > 1_000
    assert repr(train) == repr(config.train_source()) == repr(pickle.loads(pickle.dumps(train)))
    assert repr(train) != repr(held_out)
    assert train[5]["inputs"].shape == (128,)


def test_no_training_window_of_package_source_is_held_out():
    config = PackageWindowsConfig(packages=("email", "json"), sequence_length=64)
    train, held_out = config.train_source(), config.eval_source()
    seen = {train[i]["inputs"].tobytes() for i in range(len(train))}
    shared = sum(held_out[i]["inputs"].tobytes() in seen for i in range(len(held_out)))
    assert shared < 0.02 * len(held_out)


def test_a_folder_s_files_are_split_whole_and_hidden_and_binary_ones_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(30):
        (tmp_path / "sub" / f"{i}.txt").write_text(chr(65 + i) * 20)
    (tmp_path / ".hidden").write_text("?" * 20)
    (tmp_path / "binary").write_bytes(b"!\0!" * 20)
    (tmp_path / "empty").touch()
    config = TextFilesConfig(path=str(tmp_path), sequence_length=8)
    sides = [
        {int(b) for i in range(len(s)) for b in s[i]["inputs"]} - {0}
        for s in (config.train_source(), config.eval_source())
    ]
    assert sides[0] | sides[1] == set(range(65, 95))
    assert not sides[0] & sides[1]
    assert len(sides[1]) < len(sides[0])


def test_a_single_file_is_mapped_and_its_last_tenth_held_out(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    config = TextFilesConfig(path=str(path), sequence_length=10)
    assert set(config.train_source()[0]["inputs"]) == {ord("a")}
    assert set(config.eval_source()[0]["inputs"]) == {ord("b")}
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "text")
    moved = TextFilesConfig(path=str(tmp_path / "folder"), sequence_length=10)
    assert repr(moved.eval_source()) == repr(PackedWindows([text("b" * 100)], 10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: TextFilesConfig(path=str(tmp / "none")).train_source(), "which is neither"),
        (lambda tmp: TextFilesConfig(path=str(tmp)).train_source(), "at least one window of text. Got 0 bytes"),
        (lambda tmp: TextFilesConfig(path=__file__, sequence_length=10**6).eval_source(), "in the held-out part"),
        (lambda tmp: TextFilesConfig(sequence_length=0), "`sequence_length` must be at least 1"),
        (lambda tmp: PackageWindowsConfig(packages=()), "at least one package"),
        (lambda tmp: PackageWindowsConfig(packages=("no_such",)).train_source(), "Got 'no_such'"),
        (lambda tmp: PackageWindowsConfig(packages=("sys",)).train_source(), "Got 'sys'"),
        (lambda tmp: PackageWindowsConfig(sequence_length=10**6).train_source(), "package 'asyncio', with windows of"),
    ],
)
def test_invalid_data_is_refused(tmp_path, make, message: str):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_only_the_wanted_rows_are_read_and_the_position_is_that_of_all() -> None:
    read: list[int] = []

    class Watched(Numbers):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            read.append(index)
            return super().__getitem__(index)

    whole, part = batches(Numbers(20), 4, 3), batches(Watched(20), 4, 3)
    expected = [next(whole) for _ in range(6)]
    part.read_only([1, 2])
    read.clear()
    found = [next(part) for _ in range(3)]
    for all_rows, some_rows in zip(expected[:3], found, strict=True):
        for name, values in all_rows.items():
            np.testing.assert_array_equal(some_rows[name][[1, 2]], values[[1, 2]])
            assert not some_rows[name][[0, 3]].any()
    part.read_only([])
    assert not any(value.any() for value in next(part).values())
    part.read_only(range(4))
    np.testing.assert_array_equal(next(part)["number"], expected[4]["number"])


class Lists:
    """Examples as tokenisers and JSON give them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"tokens": [10 * index + k for k in range(4)], "pair": (index, -index), "label": index}


def test_lists_in_examples_are_rows_of_a_batch() -> None:
    source, size = Lists(), 4  # as many rows as elements, so that no shape tells what was mixed up
    batch, example = next(batches(source, size, shuffle=False)), example_batch(source, size)
    assert batch["tokens"].tolist() == [[10 * i + k for k in range(4)] for i in range(4)]
    assert batch["pair"].tolist() == [[i, -i] for i in range(4)]
    assert batch["label"].tolist() == [0, 1, 2, 3]
    assert {n: (v.shape, v.dtype) for n, v in batch.items()} == {n: (v.shape, v.dtype) for n, v in example.items()}
    part = batches(source, size, shuffle=False)
    part.read_only([1])
    assert next(part)["tokens"].tolist() == [[0] * 4, [10, 11, 12, 13], [0] * 4, [0] * 4]


def test_threads_that_read_ahead_end_when_their_reader_is_closed() -> None:
    def reading() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}

    before = reading()
    iterator = batches(Numbers(64), 4)
    next(iterator)
    iterator.read_only([0])  # begins anew
    next(iterator)
    started = reading() - before
    assert started
    iterator.close()
    iterator.close()  # nothing is left to do
    for thread in started:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in started)
