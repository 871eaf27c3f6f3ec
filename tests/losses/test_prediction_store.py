"""A folder of tensors by key, which several processes write and read at once."""

import multiprocessing
import os
import uuid

import pytest
import torch

from ctcd_trainer.losses.prediction_store import PredictionStore

FINGERPRINT = {"model": "one"}


def entry(value, length=2, width=3):
    return {"logits": torch.full((length, width), float(value))}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_stores_in_one_folder_find_each_others_entries_while_both_are_open(tmp_path):
    first, second = (PredictionStore(tmp_path / "cache", FINGERPRINT) for _ in range(2))
    assert second.get([b"0" * 16, b"1" * 16]) == [None, None]
    half = {"logits": torch.arange(6.0).view(2, 3).bfloat16(), "more": torch.arange(3)}
    entries = {b"0" * 16: entry(1.0), b"1" * 16: entry(2.0, length=0), b"2" * 16: entry(3.0, width=5), b"4" * 16: half}
    first.add(entries)
    second.add({b"0" * 16: entry(9.0)})  # the first one stays
    for store in (first, second, PredictionStore(tmp_path / "cache", FINGERPRINT)):
        assert store.get([b"3" * 16]) == [None]
        for own, expected in zip(store.get(list(entries)), entries.values(), strict=True):
            assert_same(own, expected)
        store.close()
    assert os.listdir(tmp_path / "cache") == ["predictions.sqlite"]
    assert_same(first.get([b"0" * 16])[0], entry(1.0))  # it opens the file again


def test_a_folder_of_another_fingerprint_is_refused_with_what_differs(tmp_path):
    PredictionStore(tmp_path, {"model": "one", "format": 1}).close()
    with pytest.raises(
        ValueError, match="another frozen teacher: `model` is 'one' there, 'two' here. Name another folder"
    ):
        PredictionStore(tmp_path, {"model": "two", "format": 1})
    PredictionStore(tmp_path, {"model": "one", "format": 1})


def test_a_folder_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "fingerprint.json").write_text("{}")
    with pytest.raises(ValueError, match="predictions of an older version of ctcd_trainer. Name another folder"):
        PredictionStore(tmp_path, FINGERPRINT)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "predictions.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match=r"damaged file predictions.sqlite \(file is not a database\). Name another"):
        PredictionStore(tmp_path, FINGERPRINT)


def test_a_file_that_is_cut_off_is_refused_at_the_latest_when_it_is_read(tmp_path):
    store = PredictionStore(tmp_path, FINGERPRINT)
    store.add({f"{index:016d}".encode(): entry(index, length=1000) for index in range(50)})
    store.close()
    path = tmp_path / "predictions.sqlite"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged file predictions.sqlite"):
        PredictionStore(tmp_path, FINGERPRINT).get([f"{index:016d}".encode() for index in range(50)])


def test_a_fork_opens_the_file_itself(tmp_path):
    store = PredictionStore(tmp_path, FINGERPRINT)
    store.add({b"0" * 16: entry(0.0)})
    child = os.fork()
    if child == 0:
        try:
            store.add({b"1" * 16: entry(1.0)})
            store.close()
        finally:
            os._exit(len(store._connections) - 1)  # the parent's is still there
    assert os.waitpid(child, 0)[1] == 0
    store.add({b"2" * 16: entry(2.0)})
    for index, own in enumerate(store.get([b"0" * 16, b"1" * 16, b"2" * 16])):
        assert_same(own, entry(index))


def write_many(folder, number, written):
    """Write entries in groups of ten; then say so, and write large ones until somebody kills this process."""
    store = PredictionStore(folder, FINGERPRINT)
    keys = [f"{number}-{index:014d}".encode() for index in range(100)]
    for start in range(0, 100, 10):
        store.add({key: entry(start + index) for index, key in enumerate(keys[start : start + 10])})
    written.set()
    while True:
        store.add({f"{number}-{uuid.uuid4().hex[:14]}".encode(): entry(0.0, length=1000)})


def test_processes_write_at_once_and_one_that_is_killed_leaves_what_it_has_written(tmp_path):
    forks = multiprocessing.get_context("fork")  # a new interpreter would import for seconds
    written = [forks.Event() for _ in range(2)]
    processes = [
        forks.Process(target=write_many, args=(tmp_path, number, event), daemon=True)
        for number, event in enumerate(written)
    ]
    for process in processes:
        process.start()
    assert all(event.wait(60) for event in written)
    for process in processes:
        process.kill()
        process.join()
    keys = [f"{number}-{index:014d}".encode() for number in range(2) for index in range(100)]
    found = PredictionStore(tmp_path, FINGERPRINT).get(keys)
    for index, own in enumerate(found):
        assert_same(own, entry(index % 100))
