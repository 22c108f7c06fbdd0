"""benchmarks/gpu.py: what it leaves behind when it is cut off, when it has no time, and when it comes to its end."""

import json
import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT

COMMAND = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny"]
OUT_OF_TIME = "not run: out of time"


def read(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]


def test_without_time_every_part_is_named(tmp_path):
    subprocess.run([*COMMAND, "--budget", "0", "--out", str(tmp_path)], check=True, capture_output=True)
    parts = read(tmp_path)
    assert {"tests", "memory", "training", "levers", "inference", "serving", "end_to_end"} <= parts.keys()
    assert {part["status"] for part in parts.values()} == {OUT_OF_TIME}
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert table.count(OUT_OF_TIME) == len(parts)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it needs process groups")
def test_killed_it_leaves_what_is_done_and_names_what_is_not(tmp_path):
    words = [*COMMAND, "--parts", "machine", "attention", "serving", "--out", str(tmp_path)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline().startswith("machine: done")
    while read(tmp_path)["attention"]["status"] != "cut off":
        time.sleep(0.05)
    running.kill()
    running.wait()
    parts = read(tmp_path)
    assert parts["machine"]["status"] == "done"
    assert any(row["what"] == "torch" for row in parts["machine"]["tables"]["machine"])
    assert parts["attention"]["status"] == "cut off" and parts["serving"]["status"] == OUT_OF_TIME
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| torch |" in table and f"\n{OUT_OF_TIME}\n" in table


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_stops_no_other(tmp_path):
    # A folder without speech: whatever needs clips fails.
    words = [*COMMAND, "--parts", "machine", "attention", "--clips", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    parts = read(tmp_path / "out")
    assert done.returncode == 1
    assert parts["machine"]["status"] == "failed in 1 of its rows" and parts["machine"]["tables"]["rates"]
    assert parts["attention"]["status"] == "failed with exit code 1" and "no audio" in parts["attention"]["stderr"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_part_has_a_result(tmp_path):
    done = subprocess.run([*COMMAND, "--budget", "20", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    for name, part in read(tmp_path).items():
        assert part["status"] == "done", (name, part)
        assert part["tables"], name
        for title, rows in part["tables"].items():
            assert rows and f"### {title}" in (tmp_path / "results.md").read_text(encoding="utf-8")
