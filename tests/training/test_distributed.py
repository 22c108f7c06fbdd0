"""Distributed training matches one process: the same steps and metrics, one set of files, and a common end."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT
from helpers import dataset_dicts as made
from helpers import distributed as worker
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin.experiment import run_folder
from accent_plugin.training import distributed
from accent_plugin.training.batches import BucketBatchSampler
from accent_plugin.training.state import TrainingState

ACCENTS = ("us", "england", "scotland")
NO_DROPOUT = "{hidden_dropout: 0.0, attention_dropout: 0.0, activation_dropout: 0.0, feat_proj_dropout: 0.0}"
# Long enough for the slowest machine; a test that waits for it has failed.
PATIENCE = 500

LENGTHS = st.lists(st.floats(0.5, 20.0), min_size=1, max_size=120)
PROCESSES = st.integers(1, 5)


# ------------------------------------------------------------------------------------------------------- batches


def drawn(lengths, rank=0, count=1, start=0, seed=3):
    sampler = BucketBatchSampler(lengths, 30.0, seed=seed, rank=rank, processes=count)
    sampler.set_epoch(2)
    sampler.start = start
    return [[index for index, _ in batch] for batch in sampler]


def windows(lengths, count, factor):
    """Clips of each step: `factor` batches from each process, and the remaining ones in the last step."""
    parts = [drawn(lengths, rank, count) for rank in range(count)]
    steps = -(-len(parts[0]) // factor)
    spans = [slice(step * factor, (step + 1) * factor) for step in range(steps)]
    return [sorted(index for part in parts for batch in part[span] for index in batch) for span in spans]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, PROCESSES)
def test_processes_share_the_plan_without_duplicates(lengths, count):
    plan = drawn(lengths)
    parts = [drawn(lengths, rank, count) for rank in range(count)]
    dealt = [parts[place % count][place // count] for place in range(len(plan))]
    assert dealt == plan
    assert sum(len(batch) for part in parts for batch in part) == len(lengths)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, PROCESSES)
def test_all_processes_have_equally_many_batches(lengths, count):
    samplers = [BucketBatchSampler(lengths, 30.0, rank=rank, processes=count) for rank in range(count)]
    assert {len(sampler) for sampler in samplers} == {len(list(sampler)) for sampler in samplers}
    assert len({len(sampler) for sampler in samplers}) == 1


@settings(max_examples=50, deadline=None)
@given(LENGTHS, PROCESSES, st.integers(1, 4))
def test_processes_take_the_place_of_accumulated_batches(lengths, count, factor):
    assert windows(lengths, count, factor) == windows(lengths, 1, count * factor)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, PROCESSES, st.data())
def test_a_resumed_epoch_skips_exactly_the_finished_batches(lengths, count, data):
    rank = data.draw(st.integers(0, count - 1))
    whole = drawn(lengths, rank, count)
    start = data.draw(st.integers(0, len(whole)))
    assert drawn(lengths, rank, count, start) == whole[start:]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 100), PROCESSES)
def test_weighted_draws_are_shared_as_well(lengths, seed, count):
    weights = np.linspace(1, 2, len(lengths))
    samplers = [
        BucketBatchSampler(lengths, 30.0, seed=seed, weights=weights, rank=rank, processes=count)
        for rank in range(count)
    ]
    assert sum(len(batch) for sampler in samplers for batch in sampler) == len(lengths)


# ---------------------------------------------------------------------------------------------------- one process


def test_one_process_needs_no_communication():
    assert (distributed.world_size(), distributed.rank(), distributed.is_main(), distributed.is_launched()) == (
        1,
        0,
        True,
        False,
    )
    assert distributed.all_reduce_sum([1, True, 0.5]) == [1.0, 1.0, 0.5]
    assert distributed.all_gather("own") == ["own"]
    assert distributed.broadcast_from_main(divmod, 7, 2) == (3, 1)


def position_of(monkeypatch, tmp_path, writers, step, readers, rank=0):
    """Step at which `readers` processes resume after each of `writers` processes finished `step` batches."""
    written, read = TrainingState(), TrainingState()
    monkeypatch.setattr(distributed, "world_size", lambda: writers)
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value] * writers)
    written.capture(step, {})
    written.save(tmp_path / "position.ckpt")
    monkeypatch.setattr(distributed, "world_size", lambda: readers)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    read.load(tmp_path / "position.ckpt", False)
    return read.step


@pytest.mark.parametrize(
    ("writers", "step", "readers", "expected"),
    [(1, 6, 1, 6), (2, 6, 2, 6), (2, 6, 1, 12), (1, 12, 2, 6), (4, 3, 2, 6), (1, 7, 2, 4)],
)
def test_another_number_of_processes_resumes_at_the_same_clip(monkeypatch, tmp_path, writers, step, readers, expected):
    # In the last case the epoch of seven batches is finished, also for two processes with four each.
    assert position_of(monkeypatch, tmp_path, writers, step, readers) == expected


# --------------------------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small DatasetDict of noise with three accents."""
    return made.save(tmp_path_factory.mktemp("corpus") / "data", **made.three_splits(ACCENTS, clients=(4, 2, 2)))


@pytest.fixture(scope="module")
def words(corpus, tiny_encoder):
    """Function: folder of a run -> a command line of five epochs with six steps of four clips each."""

    def make(folder, *more):
        return [
            "hparams/wav2vec2_base.yaml",
            *("--data_folder", str(corpus), "--prepared_folder", str(folder / "prepared")),
            *("--output_folder", str(folder / "out"), "--accents", f"[{', '.join(ACCENTS)}]"),
            *("--wav2vec2_hub", str(tiny_encoder("wav2vec2-group")), "--num_workers", "0", "--device", "cpu"),
            *("--precision", "fp32"),
            *("--number_of_epochs", "5", "--crop_seconds", "1.0", "--batch_seconds", "2.0", "--noprogressbar"),
            *("--lr_encoder", "0.001", "--lr_head", "0.01", "--early_stopping", "0", "--prepare_workers", "1"),
            *more,
        ]

    return make


NO_NOISE = ("--dropout", "0.0", "--config_overrides", NO_DROPOUT[:-1] + ", layerdrop: 0.0}")


def environment():
    added = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return {**os.environ, **added}


def start_torchrun(*arguments):
    """Start torchrun on this machine only."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes)


def finish(running):
    """Wait for a process; return its exit code and output."""
    try:
        out, err = running.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        # torchrun ends its own child processes.
        running.terminate()
        out, err = running.communicate()
        pytest.fail(f"still running after {PATIENCE} s:\n{err[-3000:]}")
    return SimpleNamespace(code=running.returncode, err=err, out=out)


def plan_file(folder, **plan):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"plan-{uuid.uuid4().hex[:8]}.json"
    path.write_text(json.dumps(plan, default=str), encoding="utf-8")
    return path


def torchrun(folder, *options, script=worker.__file__, **plan):
    """Run a plan in two processes."""
    running = start_torchrun("--standalone", "--nproc_per_node=2", *options, script, plan_file(folder, **plan))
    return finish(running)


@pytest.fixture(scope="module")
def alone():
    """Run a plan in this process."""

    def run(**plan):
        folder, path, hook = os.getcwd(), list(sys.path), sys.excepthook
        try:
            return worker.main(json.loads(json.dumps(plan, default=str)))
        finally:
            os.chdir(folder)
            sys.path[:], sys.excepthook = path, hook

    return run


@pytest.fixture(scope="module")
def together(tmp_path_factory, words):
    """Two processes, started once for most tests: small checks, then a run of the recipe without dropout."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "checks").mkdir()
    recipe = words(folder, *NO_NOISE, "--tensorboard", "True", "--ckpt_interval_minutes", "0")
    done = torchrun(folder, checks=folder / "checks", recipe=recipe, losses=folder / "losses.json")
    done.folder, done.words = folder, recipe
    return done


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def seen(together):
    """Results of the small checks in each of the two processes."""
    files = [together.folder / f"checks/{rank}.json" for rank in (0, 1)]
    assert all(file.is_file() for file in files), together.err[-3000:]
    return [read(file) for file in files]


@pytest.fixture(scope="module")
def seen_alone(tmp_path_factory):
    """Results of the same checks in one process with twice as many batches per step."""
    folder = tmp_path_factory.mktemp("alone")
    worker.check_all(folder)
    return read(folder / "0.json")


@pytest.mark.parametrize("name", [name for name in worker.CHECKS if not worker.CHECKS[name].get("dropout")])
def test_gradients_are_those_of_one_process(seen, seen_alone, name):
    steps, expected = seen[0][name]["gradients"], seen_alone[name]["gradients"]
    assert steps == seen[1][name]["gradients"]
    assert len(steps) == len(expected)
    for step, wanted in zip(steps, expected, strict=True):
        assert step.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            np.testing.assert_allclose(step[parameter], gradient, atol=1e-6, err_msg=f"{name}: {parameter}")


def test_the_checks_have_unequal_and_empty_batches(seen):
    pairs = list(zip(*(part["plain"]["batches"] for part in seen), strict=True))
    assert any(len(first) != len(second) for first, second in pairs if second)
    assert any(not second for _, second in pairs)
    lost = zip(*(part["unreadable in longer windows"]["batches"] for part in seen), strict=True)
    assert any(not first for first, _ in lost)


def test_a_frozen_encoder_has_gradients_only_after_unfreezing(seen):
    has = ["wav2vec2.model.weight" in step for step in seen[0]["encoder held still"]["gradients"]]
    assert has[:3] == [False] * 3 and all(has[3:])


def test_a_step_without_clips_is_skipped(seen):
    assert seen[0]["nothing but unreadable"]["gradients"] == []


def test_dropout_differs_between_processes(seen):
    draws = [part["another dropout in each process"]["draw"] for part in seen]
    assert draws[0] != draws[1]


@pytest.mark.parametrize("name", ["plain", "unreadable"])
def test_validation_sees_every_clip_once(seen, seen_alone, name):
    assert seen[0][name]["ids"] == seen[1][name]["ids"] == seen_alone[name]["ids"]
    broken = worker.CHECKS[name].get("broken", ())
    assert seen[0][name]["ids"] == [f"c{number:02d}" for number in range(worker.CLIPS) if number not in broken]
    np.testing.assert_allclose(seen[0][name]["scores"], seen_alone[name]["scores"], atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "class weights", "unreadable"])
def test_figures_of_the_epochs_are_those_of_one_process(seen, seen_alone, name):
    rows, expected = seen[0][name]["logged"], seen_alone[name]["logged"]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["train_stats"]["loss"] == pytest.approx(wanted["train_stats"]["loss"], abs=1e-5)
        assert row["valid_stats"] == pytest.approx(wanted["valid_stats"], abs=1e-5)


def test_an_unreadable_clip_counts_once_over_all_processes(seen, seen_alone):
    counts = [[row["clips not read"] for row in part["unreadable"]["logged"]] for part in (seen[0], seen_alone)]
    # Two clips in training and two in validation.
    assert counts == [[4] * worker.EPOCHS] * 2


def test_too_many_unreadable_clips_are_an_error_in_the_first_process(seen, seen_alone):
    assert "4 of 15 clips cannot be read while training, more than max_unreadable_fraction (0.2)" in seen[0]["too many"]
    assert seen[1]["too many"] == "exit 2"
    assert "of 15 clips cannot be read while training" in seen_alone["too many"]


def test_processes_agree_on_sums_and_broadcast_values(seen):
    for part in seen:
        assert part["exchange"]["total"] == [2.0, 1.0]
        assert part["exchange"]["gather"] == [{"rank": 0}, {"rank": 1}]
        assert part["exchange"]["from_main"] == "by 0"


def test_an_error_in_the_first_process_ends_the_others_without_a_message(seen):
    assert [part["exchange"]["end"] for part in seen] == ["said once", "exit 2"]


# ------------------------------------------------------------------------------------------------------ the recipe


@pytest.fixture(scope="module")
def single(tmp_path_factory, words, alone):
    """The same run by one process with two batches in each step."""
    folder = tmp_path_factory.mktemp("single")
    code = alone(
        recipe=words(folder, *NO_NOISE, "--grad_accumulation_factor", "2", "--ckpt_interval_minutes", "0"),
        losses=folder / "losses.json",
    )
    return SimpleNamespace(code=code, folder=folder)


@pytest.fixture(scope="module")
def finished(together):
    assert together.code == 0, together.err[-3000:]
    return together


def test_losses_of_the_first_steps_agree_with_one_process(finished, single):
    losses = [read(run.folder / "losses.json") for run in (finished, single)]
    assert len(losses[0]) == len(losses[1]) >= 20
    np.testing.assert_allclose(losses[0][:20], losses[1][:20], atol=1e-4)
    # The loss falls.
    assert np.ptp(losses[0][:20]) > 0.01


def test_the_history_agrees_with_one_process(finished, single):
    histories = [read(run.folder / "out/save/history.json") for run in (finished, single)]
    assert [row["epoch"] for row in histories[0]] == [1, 2, 3, 4, 5]
    for row, wanted in zip(*histories, strict=True):
        row.pop("peak_memory_bytes"), wanted.pop("peak_memory_bytes")
        assert row == pytest.approx(wanted, abs=1e-4)


def test_every_test_clip_is_predicted_once(finished):
    with open(finished.folder / "out/report/predictions.csv", newline="", encoding="utf-8") as file:
        ids = [row["ID"] for row in csv.DictReader(file)]
    with open(finished.folder / "prepared/test.csv", newline="", encoding="utf-8") as file:
        assert sorted(ids) == sorted(row["ID"] for row in csv.DictReader(file))
    assert len(ids) == len(set(ids)) == 12


def test_one_process_writes_the_files(finished):
    from accent_plugin.bundle.load import load_bundle

    out = finished.folder / "out"
    lines = (out / "train_log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == [f"epoch: {epoch}" for epoch in range(1, 6)]
    assert tuple(load_bundle(out / "bundle").config["labels"]) == ACCENTS
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert len(list(out.rglob("metrics.json"))) == 1


def test_data_are_prepared_once(finished):
    said = (finished.folder / "out/log.txt").read_text(encoding="utf-8")
    assert said.count(" - prepared ") == 1


def test_one_process_resumes_with_the_same_number_of_batches_per_step(finished, alone, tmp_path):
    before = read(finished.folder / "out/save/history.json")
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    again = [*finished.words, "--output_folder", str(tmp_path / "out"), "--grad_accumulation_factor", "2"]
    assert alone(recipe=again) == 0
    # The run was finished: it is only evaluated again.
    assert read(tmp_path / "out/save/history.json") == before


def test_one_process_cannot_resume_with_fewer_batches_per_step(finished, alone, tmp_path, capsys):
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    assert alone(recipe=[*finished.words, "--output_folder", str(tmp_path / "out")]) == 2
    assert "batches_per_step: 2 in the folder, 1 now" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_from_one_cache_like_one_process(words, alone, tmp_path):
    cached = ("--freeze_wav2vec2", "True", "--cache_features", "True", "--features_folder", str(tmp_path / "features"))
    cached += ("--pooling", "attentive", "--augment_copies", "2", "--dropout", "0.0", "--number_of_epochs", "3")
    two, one = tmp_path / "two", tmp_path / "one"
    done = torchrun(two, recipe=words(two, *cached))
    assert done.code == 0, done.err[-3000:]
    # Training and validation, by the first process.
    assert (two / "out/log.txt").read_text(encoding="utf-8").count("computing the features of") == 2
    assert alone(recipe=words(one, *cached, "--grad_accumulation_factor", "2")) == 0
    assert "computing the features of" not in (one / "out/log.txt").read_text(encoding="utf-8")
    for row, wanted in zip(*(read(folder / "out/save/history.json") for folder in (two, one)), strict=True):
        row.pop("peak_memory_bytes"), wanted.pop("peak_memory_bytes")
        assert row == pytest.approx(wanted, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (("--distributed_backend", "nccl"), "distributed_backend nccl needs GPUs: on CPUs, use gloo"),
        (("--device", "cuda:0"), "device is cuda:0, but each process uses its own GPU"),
        (("--method", "logistic_regression"), "method logistic_regression takes one process: start python train.py"),
    ],
    ids=["backend", "device", "method"],
)
def test_options_that_conflict_with_torchrun_are_reported_once(
    words, alone, tmp_path, monkeypatch, capsys, option, complaint
):
    said = []
    for rank in ("0", "1"):
        # The environment of torchrun; the processes stop before they join.
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert alone(recipe=words(tmp_path, *option)) == 2
        said.append(capsys.readouterr().err)
    assert said[0].startswith(f"[process 0] ConfigError: {complaint}")
    assert said[1] == ""


@pytest.mark.slow
def test_a_folder_in_use_is_reported_once(words, tmp_path):
    with run_folder.locked(tmp_path / "out"):
        done = torchrun(tmp_path, recipe=words(tmp_path))
    assert done.code != 0
    assert done.err.count("is in use by process") == 1
    assert OUR_TRACEBACK not in done.err


@pytest.mark.slow
def test_an_error_found_by_the_first_process_ends_all(words, tmp_path):
    done = torchrun(tmp_path, recipe=words(tmp_path, "--data_folder", str(tmp_path / "nowhere")))
    assert done.code != 0
    assert done.err.count("there is no folder") == 1
    assert OUR_TRACEBACK not in done.err
    # The other process ends before torchrun kills it.
    assert "exitcode  : -9" not in done.err


# ------------------------------------------------------------------------------------------------- ends and restarts

# Of torchrun there is one of its own at the end.
OUR_TRACEBACK = 'helpers/distributed.py", line'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("error", "[process 1] AccentPluginError: this process has a problem of its own"),
        ("exit", "exitcode  : 17"),
        ("kill", "exitcode  : -9"),
    ],
)
def test_a_dead_process_ends_the_others_and_its_error_is_printed(words, tmp_path, how, said):
    dies = {"rank": 1, "step": 3, "how": how, "marker": tmp_path / "died"}
    done = torchrun(tmp_path, recipe=words(tmp_path), dies=dies)
    assert done.code != 0
    assert said in done.err
    assert OUR_TRACEBACK not in done.err


@pytest.fixture(scope="module")
def noisy(tmp_path_factory, words):
    """An uninterrupted run of two processes with dropout and with checkpoints within the epochs."""
    folder = tmp_path_factory.mktemp("noisy")
    recipe = words(folder, *OFTEN)
    done = torchrun(folder, recipe=recipe, losses=folder / "losses.json")
    assert done.code == 0, done.err[-3000:]
    done.folder = folder
    return done


# Six steps an epoch: at the fourth and at the last.
OFTEN = ("--ckpt_interval_minutes", "0", "--ckpt_interval_steps", "4")


def assert_as_if_nothing_had_happened(folder, noisy):
    weights = [(run / "out/bundle/model.ckpt").read_bytes() for run in (folder, noisy.folder)]
    assert weights[0] == weights[1]
    histories = [read(run / "out/save/history.json") for run in (folder, noisy.folder)]
    for row in histories[0] + histories[1]:
        row.pop("peak_memory_bytes")
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_a_restart_by_torchrun_resumes_from_the_last_checkpoint(words, noisy, tmp_path):
    dies = {"rank": 1, "step": 17, "how": "kill", "marker": tmp_path / "died"}
    recipe = words(tmp_path, *OFTEN, "--overwrite", "True")
    done = torchrun(tmp_path, "--max-restarts=1", recipe=recipe, losses=tmp_path / "losses.json", dies=dies)
    assert done.code == 0, done.err[-3000:]
    # 16 of the 30 steps were before the last checkpoint.
    assert read(tmp_path / "losses.json") == read(noisy.folder / "losses.json")[16:]
    assert_as_if_nothing_had_happened(tmp_path, noisy)


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_all_and_the_next_start_resumes(words, noisy, tmp_path):
    dies = {"rank": 1, "step": 8, "how": "stop", "marker": tmp_path / "stopped"}
    done = torchrun(tmp_path, recipe=words(tmp_path, *OFTEN), dies=dies)
    assert done.code != 0
    assert [done.err.count(f"[process {rank}] stopped by SIGTERM") for rank in (0, 1)] == [1, 1]
    assert OUR_TRACEBACK not in done.err
    done = torchrun(tmp_path, recipe=words(tmp_path, *OFTEN), losses=tmp_path / "losses.json")
    assert done.code == 0, done.err[-3000:]
    losses, expected = read(tmp_path / "losses.json"), read(noisy.folder / "losses.json")
    # The run may have been some steps further when the signal arrived.
    assert 0 < len(losses) < 22 and losses == expected[-len(losses) :]
    assert_as_if_nothing_had_happened(tmp_path, noisy)


@pytest.mark.slow
def test_one_process_resumes_within_an_epoch_of_two(words, single, alone, tmp_path):
    dies = {"rank": 0, "step": 8, "how": "stop", "marker": tmp_path / "stopped"}
    assert torchrun(tmp_path, recipe=words(tmp_path, *NO_NOISE), dies=dies).code != 0
    again = words(tmp_path, *NO_NOISE, "--grad_accumulation_factor", "2")
    assert alone(recipe=again, losses=tmp_path / "losses.json") == 0
    losses = read(tmp_path / "losses.json")
    assert 0 < len(losses) < 22
    np.testing.assert_allclose(losses, read(single.folder / "losses.json")[-len(losses) :], atol=1e-4)
    rows = [[row["train_loss"] for row in read(run / "out/save/history.json")] for run in (tmp_path, single.folder)]
    assert rows[0] == pytest.approx(rows[1], abs=1e-4)


# -------------------------------------------------------------------------------------------------- two machines


def two_agents(folder, *more, **plan):
    """Start two torchrun agents with one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-id={uuid.uuid4().hex}")
    plan = plan_file(folder, **plan)
    options = ("--nnodes=2", "--nproc-per-node=1", "--local-addr=localhost", *meet, *more, worker.__file__, plan)
    agents = [start_torchrun(*options) for _ in range(2)]
    try:
        return [finish(agent) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait()


@pytest.mark.slow
def test_two_agents_take_the_same_steps_as_one_process(words, single, tmp_path):
    recipe = words(tmp_path, *NO_NOISE, "--ckpt_interval_minutes", "0")
    for agent in two_agents(tmp_path, recipe=recipe, losses=tmp_path / "losses.json"):
        assert agent.code == 0, agent.err[-3000:]
    losses = [read(folder / "losses.json") for folder in (tmp_path, single.folder)]
    np.testing.assert_allclose(losses[0][:20], losses[1][:20], atol=1e-4)
    assert len((tmp_path / "out/train_log.txt").read_text(encoding="utf-8").splitlines()) == 5
    assert len(list((tmp_path / "out").rglob("metrics.json"))) == 1


@pytest.mark.slow
def test_two_agents_resume_after_a_restart(words, single, tmp_path):
    # Only the agent of the dead process counts a restart: the other agent has the process that obeys --overwrite.
    dies = {"rank": 1, "step": 17, "how": "kill", "marker": tmp_path / "died"}
    recipe = words(tmp_path, *NO_NOISE, *OFTEN, "--overwrite", "True")
    for agent in two_agents(tmp_path, "--max-restarts=2", recipe=recipe, losses=tmp_path / "losses.json", dies=dies):
        assert agent.code == 0, agent.err[-3000:]
    losses = [read(folder / "losses.json") for folder in (tmp_path, single.folder)]
    np.testing.assert_allclose(losses[0], losses[1][16:], atol=1e-4)


@pytest.mark.slow
def test_a_process_that_dies_ends_both_agents(words, tmp_path):
    dies = {"rank": 1, "step": 3, "how": "error", "marker": tmp_path / "died"}
    agents = two_agents(tmp_path, recipe=words(tmp_path), dies=dies)
    assert all(agent.code != 0 for agent in agents)
    said = "[process 1] AccentPluginError: this process has a problem of its own"
    assert [said in agent.err for agent in agents].count(True) == 1
    assert ["another process has ended, see its error" in agent.err for agent in agents].count(True) == 1


# --------------------------------------------------------------------------------------------- choices of the YAML

# Name -> encoder and hyperparameters; one epoch of each.
CHOICES = {
    "layerdrop": ("wav2vec2-group", "--config_overrides", "{layerdrop: 0.5}", "--grad_accumulation_factor", "2"),
    "layers": ("wav2vec2-group", "--weighted_layers", "[1, 2]"),
    "moonshine": ("moonshine", "--pooling", "attentive_statistics"),
    "adapters": ("wav2vec2-layer", "--lora_rank", "2"),
    "whitening": ("wav2vec2-group", "--freeze_wav2vec2", "True", "--whitening_passes", "1"),
    "accumulated": (
        "wavlm-group",
        "--grad_accumulation_factor",
        "2",
        "--freeze_encoder_steps",
        "2",
        "--augment",
        "True",
    ),
    "workers": ("wav2vec2-group", "--num_workers", "1", "--balance", "sampler", "--test_speeds", "[0.9, 1.0]"),
    "masks": ("wav2vec2-group", "--config_overrides", "{mask_time_prob: 0.5}", "--precision", "bf16"),
}
# And those that train more than once, or not at all.
WAYS = {
    "folds": ("--n_folds", "3", "--balance", "none"),
    "seeds": ("--seeds", "1,2"),
    "split": ("--split", "both", "--n_folds", "3", "--balance", "none", "--test_degradations", "True"),
    "outsiders": ("--accents", "[us, england]", "--out_of_set", "[scotland]"),
}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, words, tiny_encoder):
    folder = tmp_path_factory.mktemp("chosen")
    lines = {
        name: words(folder / name, "--wav2vec2_hub", str(tiny_encoder(encoder)), *more, "--number_of_epochs", "1")
        for name, (encoder, *more) in CHOICES.items()
    }
    lines |= {name: words(folder / name, "--number_of_epochs", "1", *more) for name, more in WAYS.items()}
    lines["again"] = [*lines["moonshine"], "--test_only", "True"]
    done = torchrun(folder, recipes=list(lines.values()))
    done.folder = folder
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_hyperparameters_work_with_several_processes(chosen, name):
    assert chosen.code == 0, chosen.err[-3000:]
    metrics = read(chosen.folder / name / "out/report/metrics.json")
    assert metrics["clip"]["accuracy"]["n"] == 6 and metrics["data"]["clips"] == 12


@pytest.mark.slow
def test_folds_seeds_and_both_splits_are_written_once_by_several_processes(chosen):
    assert chosen.code == 0, chosen.err[-3000:]
    assert read(chosen.folder / "folds/out/report/metrics.json")["data"]["clips"] == 48
    assert len(read(chosen.folder / "seeds/out/summary.json")["clip"]["accuracy"]["values"]) == 2
    assert (chosen.folder / "split/out/leak.md").is_file()
    assert "out_of_set" in read(chosen.folder / "outsiders/out/report/metrics.json")
