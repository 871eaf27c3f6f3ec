"""A log that only one process makes must not wait for the others."""

import json

from processes import run_program


def test_a_callback_may_log_on_the_main_process_alone(tmp_path):
    file = tmp_path / "logs.json"
    run_program("logging_callback.py", file, timeout=120)
    logs = json.loads(file.read_text())
    users = [log for log in logs if "own" in log]
    trainers = [log for log in logs if "loss" in log and "own" not in log]
    assert [log["own"] for log in users] == [1, 2, 3]
    assert all(log["loss"] == 1.5 and "teacher_hard_loss" not in log for log in users)
    assert len(trainers) == 3
    assert all(log["teacher_hard_loss"] > 0 for log in trainers)
