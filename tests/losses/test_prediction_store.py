"""A folder of tensors by key, which several processes write and read at once."""

import os
import subprocess
import sys
import uuid

import torch

from ctcd_trainer.losses.prediction_store import PredictionStore


def shards(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def entry(value, length=2, width=3):
    return {"logits": torch.full((length, width), float(value))}


def test_stores_in_one_folder_find_each_others_entries_while_both_are_open(tmp_path):
    first, second = (PredictionStore(tmp_path / "cache", {"model": "one"}) for _ in range(2))
    assert second.get([b"0" * 16, b"1" * 16]) == [None, None]
    first.add(b"0" * 16, entry(1.0))
    first.add(b"1" * 16, entry(2.0, length=0))
    first.add(b"2" * 16, entry(3.0, width=5))
    assert second.get([b"0" * 16]) == [None]
    first.flush()
    assert len(shards(tmp_path / "cache")) == 2  # two widths
    for store in (first, second, PredictionStore(tmp_path / "cache", {"model": "one"})):
        found = store.get([b"2" * 16, b"1" * 16, b"3" * 16, b"0" * 16])
        assert found[2] is None
        expected = entry(3.0, width=5), entry(2.0, length=0), entry(1.0)
        for own, other in zip((found[0], found[1], found[3]), expected, strict=True):
            assert own.keys() == other.keys()
            torch.testing.assert_close(own["logits"], other["logits"], rtol=0, atol=0)


def test_entries_are_written_when_they_take_much_memory_or_have_waited_long(tmp_path, monkeypatch):
    for limit in ("_FLUSH_BYTES", "_FLUSH_SECONDS"):
        store = PredictionStore(tmp_path / limit, {})
        store.add(b"0" * 16, entry(1.0))
        assert shards(tmp_path / limit) == []
        with monkeypatch.context() as patch:
            patch.setattr(f"ctcd_trainer.losses.prediction_store.{limit}", -1)
            store.add(b"1" * 16, entry(1.0))
        assert len(shards(tmp_path / limit)) == 1
        store.flush()
        assert len(shards(tmp_path / limit)) == 1


def write_many(folder, number, count, more=0):
    """Entries in files of ten each; then say so, and write large ones until somebody kills this process."""
    store = PredictionStore(folder, {"model": "one"})
    for index in range(count):
        store.add(f"{number}-{index:014d}".encode(), entry(index))
        if index % 10 == 9:
            store.flush()
    print("written", flush=True)
    for _ in range(more):
        store.add(f"{number}-{uuid.uuid4().hex[:14]}".encode(), entry(0.0, length=1000))
        store.flush()


def test_processes_write_at_once_and_one_that_is_killed_leaves_what_it_has_written(tmp_path):
    folder = str(tmp_path / "cache")
    code = "import sys, test_prediction_store as t; t.write_many(sys.argv[1], int(sys.argv[2]), 100, more=500)"
    environment = dict(os.environ)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, folder, str(number)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "written\n"
    for process in processes:
        process.kill()
        process.communicate(timeout=60)
    keys = [f"{number}-{index:014d}".encode() for number in range(2) for index in range(100)]
    found = PredictionStore(folder, {"model": "one"}).get(keys)
    for index, own in enumerate(found):
        torch.testing.assert_close(own["logits"], entry(index % 100)["logits"], rtol=0, atol=0)
