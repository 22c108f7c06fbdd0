"""Whole runs that are killed, told to end, or find their checkpoints damaged: they end as if nothing had happened."""

import csv
import json
import os
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import dataset_dicts as made
from helpers.kills import Lives

from accent_plugin.training import checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

ACCENTS = ("us", "england", "scotland")
SEED = 20_24
# Of an epoch, with the corpus and the batches below: 36 clips, four in a batch, two batches in a step.
BATCHES, STEPS = 9, 5
OFTEN = ("--ckpt_interval_steps", "1")
RANDOM = "{hidden_dropout: 0.1, attention_dropout: 0.1, feat_proj_dropout: 0.1, layerdrop: 0.3, mask_time_prob: 0.2, \
mask_time_length: 4, apply_spec_augment: true}"

TRAIN = {"at": "accent_plugin.training.brain:AccentBrain.fit_batch"}
VALID = {"at": "accent_plugin.training.brain:AccentBrain.evaluate_batch", "stage": "VALID"}
TEST = {"at": "accent_plugin.training.brain:AccentBrain.evaluate_batch", "stage": "TEST"}
EPOCH_END = {"at": "accent_plugin.training.brain:AccentBrain.on_stage_end", "stage": "VALID"}
PREPARE = {"at": "accent_plugin.audio.codecs:write"}


@pytest.fixture(scope="module")
def lives(tiny_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lives")
    tables = made.three_splits(ACCENTS, clients=(6, 2, 2))
    rows = [row for table in tables.values() for row in table]
    for number, row in enumerate(rows):
        row["audio"]["bytes"] = made.encode(made.noise(1.0 + 0.1 * (7 * number % 10), seed=number))
    words = [
        "hparams/wav2vec2_base.yaml",
        *("--data_folder", str(made.save(folder / "data", **tables)), "--prepared_folder", str(folder / "prepared")),
        *("--accents", f"[{', '.join(ACCENTS)}]", "--wav2vec2_hub", str(tiny_encoder("wav2vec2-group"))),
        *("--device", "cpu", "--noprogressbar", "--num_workers", "0", "--prepare_workers", "1"),
        # Given, as two runs that are compared must not depend on how fast the machine was; this is the fast one.
        *("--precision", "bf16"),
        *("--config_overrides", RANDOM, "--dropout", "0.2", "--augment", "True", "--crop_seconds", "1.3"),
        *("--batch_seconds", "5.3", "--max_seconds", "5", "--grad_accumulation_factor", "2"),
        *("--lr_encoder", "0.001", "--lr_head", "0.01", "--selection", "loss"),
        *("--number_of_epochs", "6", "--early_stopping", "2"),
    ]
    started = Lives(words, folder)
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(lives, tmp_path_factory):
    """The run that nobody interrupts, and what happened in it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    life = lives.live(out, *OFTEN, count=True)
    assert life.code == 0, life.err[-3000:]
    return SimpleNamespace(out=out, state=state_of(out), life=life)


# What a run has come to


def saved(out):
    """Checkpoints from the oldest to the newest, each with its CKPT.yaml."""
    found = [(yaml.safe_load((path / "CKPT.yaml").read_text()), path) for path in (out / "save").glob("CKPT*")]
    return sorted(found, key=lambda one: one[0]["unixtime"])


def place(out):
    """Where the newest checkpoint is: the epoch that its counter is in, whether that is done, and batches of it."""
    meta, path = saved(out)[-1]
    counter = yaml.safe_load((path / "counter.ckpt").read_text())
    step = torch.load(path / "position.ckpt", weights_only=True)["step"]
    return counter["current_epoch"], meta["end-of-epoch"], step


def content(meta, path):
    read = {}
    for file in path.glob("*.ckpt"):
        try:
            read[file.stem] = torch.load(file, weights_only=True)
        except Exception:
            read[file.stem] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {"meta": {key: value for key, value in meta.items() if key not in ("unixtime", "files")}, **read}


def history_of(out):
    history = json.loads((out / "save/history.json").read_text(encoding="utf-8"))
    return [{key: value for key, value in row.items() if key != "peak_memory_bytes"} for row in history]


def state_of(out):
    """Whatever a run has come to but memory and time; the newest and the best checkpoint in all their parts."""
    newest = saved(out)[-1]
    best = min((one for one in saved(out) if "loss" in one[0]), key=lambda one: one[0]["loss"])
    return {
        "newest": content(*newest),
        "best": content(*best),
        "history": history_of(out),
        "predictions": (out / "report/predictions.csv").read_bytes(),
    }


def differences(one, other, where="run"):
    """Paths of what is not the same to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if equal else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [path for key in one for path in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [path for number, pair in pairs for path in differences(*pair, f"{where}/{number}")]
    return [] if type(one) is type(other) and one == other else [where]


def require_the_same(out, whole):
    assert differences(state_of(out), whole.state) == []
    left = [path for path in out.rglob("*") if path.name.startswith((".writing", ".deleted"))]
    left += [path for path in out.rglob(".*") if path.suffix in (".tmp", ".old")]
    assert left == []


# The run that is compared with


def test_the_run_keeps_every_generator_and_stops_early(whole):
    newest = whole.state["newest"]
    assert newest["brain"]["optimizer_step"] == STEPS * len(whole.state["history"])
    assert len(whole.state["history"]) < 6 and newest["counter"]["should_stop"] is True
    random = newest["position"]["random"][0]
    assert random["torch"].numel() and random["numpy"] and random["python"]


def test_a_checkpoint_is_written_after_each_step(whole):
    assert whole.life.saves == (STEPS + 1) * len(whole.state["history"])


@pytest.mark.slow
def test_how_often_one_saves_changes_nothing(lives, whole, tmp_path):
    assert lives.finish(tmp_path / "out", "--num_workers", 1).saves == len(whole.state["history"])
    require_the_same(tmp_path / "out", whole)


@pytest.mark.slow
def test_a_run_that_has_stopped_early_is_not_trained_on(lives, whole, tmp_path):
    shutil.copytree(whole.out, tmp_path / "out")
    assert lives.finish(tmp_path / "out", *OFTEN).saves == 0
    require_the_same(tmp_path / "out", whole)


# Kills


def plans_of(kinds, whole, seed):
    """Where each life is killed, drawn from a seed."""
    rng, plans = np.random.default_rng(seed), []
    for number, kind in enumerate(kinds):
        if kind == "save":
            # A life gets past its first save as often as not.
            plan = {"at": int(rng.integers(1, 2 * whole.life.touches // whole.life.saves)), "half": number % 2 == 0}
        elif kind == "call":
            plan = {"at": int(rng.integers(1, whole.life.calls))}
        else:
            plan = {"after": float(rng.uniform(0, whole.life.seconds / 2))}
        plans.append({"kind": kind, **plan})
    return [plans[place] for place in rng.permutation(len(plans))]


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param({"save": 2, "call": 1, "moment": 1}, id="4"),
        pytest.param(
            {"save": 14, "call": 8, "moment": 8}, id="30", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]
        ),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_weights(lives, whole, tmp_path, kinds, record_property):
    out, told = tmp_path / "0", Counter(kills=0, inside=0, runs=0)
    for number, kill in enumerate(plans_of(Counter(kinds).elements(), whole, SEED)):
        workers = ("--num_workers", int(number % 5 == 4))
        for _ in range(5):
            life = lives.live(out, *OFTEN, *workers, kill=kill)
            assert life.code in (0, -signal.SIGKILL), (kill, life.err[-3000:])
            assert "damaged" not in life.err and life.most <= checkpoints.AT_MOST, kill
            if life.code:
                break
            # It came to its end before: the next begins another run, in which there is more to be killed, and sooner,
            # as the machine may have become faster since the moment was drawn.
            require_the_same(out, whole)
            told["runs"] += 1
            out = tmp_path / str(told["runs"])
            kill |= {"after": kill["after"] / 2} if "after" in kill else {}
        else:
            pytest.fail(f"never killed: {kill}")
        told["kills"] += 1
        told["inside"] += life.saving
    lives.finish(out, *OFTEN)
    require_the_same(out, whole)
    told["runs"] += 1
    for name, figure in told.items():
        record_property(name, figure)
    print("killed {kills} times, {inside} inside a save; {runs} runs ended as without".format_map(told))
    assert told["kills"] == sum(kinds.values()) and told["inside"] >= kinds["save"]


@pytest.mark.slow
def test_killed_before_old_checkpoints_are_deleted_there_are_never_more_than_promised(lives, halfway, tmp_path):
    most = 0
    shutil.copytree(halfway, tmp_path / "out")
    for _ in range(3):
        life = lives.live(tmp_path / "out", *OFTEN, kill={"kind": "method", "name": "delete_checkpoints", "times": 1})
        assert life.code == -signal.SIGKILL, life.err[-3000:]
        most = max(most, life.most)
    assert most <= checkpoints.AT_MOST - 1  # None is damaged.


@pytest.mark.slow
def test_what_a_killed_process_was_writing_is_removed(lives, whole, tmp_path):
    shutil.copytree(whole.out, tmp_path / "out")
    for name in ("save/.history.json.7.tmp", ".run.json.7.tmp"):
        (tmp_path / "out" / name).write_text("{")
    (tmp_path / "out/.bundle.7.tmp").mkdir()
    (tmp_path / "out/save/.writing").mkdir()
    (tmp_path / "out/save/.deleted+CKPT+1").mkdir()
    lives.finish(tmp_path / "out")
    require_the_same(tmp_path / "out", whole)


# Signals


def told_to_end(life, number):
    assert life.code == 128 + number, life.err[-3000:]
    assert f"stopped by {signal.Signals(number).name}" in life.err and "Traceback" not in life.err


def test_told_to_end_it_saves_and_goes_on_there(lives, whole, tmp_path):
    out = tmp_path / "out"
    # The second batch of a step is done before it ends; an epoch's last step has one batch.
    for number, where, times, expected in (
        (signal.SIGTERM, TRAIN, 3, (1, False, 4)),
        (signal.SIGINT, TRAIN, 5, (1, False, BATCHES)),
        (signal.SIGUSR1, VALID, 2, (1, False, BATCHES)),
        (signal.SIGTERM, VALID, 1, (1, False, BATCHES)),
        (signal.SIGINT, EPOCH_END, 1, (2, False, 2)),
    ):
        told_to_end(lives.live(out, signals={**where, "times": times, "numbers": [number]}), number)
        assert place(out) == expected
    lives.finish(out)
    require_the_same(out, whole)


@pytest.mark.slow
def test_a_signal_to_a_worker_as_well_is_no_other(lives, whole, tmp_path):
    out, workers = tmp_path / "out", ("--num_workers", 1)
    for number, where, times in (
        (signal.SIGINT, TRAIN, 12),
        (signal.SIGTERM, VALID, 1),
        (signal.SIGINT, TEST, 2),
    ):
        sent = {**where, "times": times, "numbers": [number], "group": True}
        told_to_end(lives.live(out, *workers, signals=sent), number)
    lives.finish(out, *workers)
    require_the_same(out, whole)


def test_a_second_signal_ends_at_once(lives, tmp_path):
    sent = {**TRAIN, "times": 3, "numbers": [signal.SIGTERM, signal.SIGINT]}
    told_to_end(lives.live(tmp_path / "out", signals=sent), signal.SIGINT)
    assert saved(tmp_path / "out") == []


@pytest.mark.slow
def test_a_signal_at_the_end_of_the_last_epoch_is_heeded(lives, whole, tmp_path):
    out, epochs = tmp_path / "out", len(whole.state["history"])
    sent = {**EPOCH_END, "times": epochs, "numbers": [signal.SIGTERM]}
    told_to_end(lives.live(out, signals=sent), signal.SIGTERM)
    assert place(out) == (epochs, True, 0) and not (out / "report").exists()
    lives.finish(out)
    require_the_same(out, whole)


@pytest.mark.slow
def test_told_to_end_while_it_prepares_it_goes_on_there(lives, whole, tmp_path):
    out, prepared = tmp_path / "out", ("--prepared_folder", tmp_path / "prepared")
    sent = {**PREPARE, "times": 4, "numbers": [signal.SIGTERM]}
    told_to_end(lives.live(out, *prepared, signals=sent), signal.SIGTERM)
    assert not (out / "save").exists()
    lives.finish(out, *prepared)
    assert history_of(out) == whole.state["history"]


# Damage


@pytest.fixture(scope="module")
def halfway(lives, tmp_path_factory):
    """A run that was told to end in its third epoch."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    sent = {**TRAIN, "times": 2 * BATCHES + 3, "numbers": [signal.SIGTERM]}
    told_to_end(lives.live(out, *OFTEN, signals=sent), signal.SIGTERM)
    return out


def flip(path):
    content = bytearray((path / "model.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.ckpt").write_bytes(content)


def truncate(path):
    os.truncate(path / "optimizer.ckpt", (path / "optimizer.ckpt").stat().st_size // 2)


def remove(path):
    (path / "position.ckpt").unlink()


def empty(path):
    (path / "CKPT.yaml").write_bytes(b"")


def garble(path):
    (path / "CKPT.yaml").write_bytes(bytes(range(256)))


DAMAGE = (flip, truncate, remove, empty, garble)


@pytest.mark.parametrize("damage", [flip, *(pytest.param(damage, marks=pytest.mark.slow) for damage in DAMAGE[1:])])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(lives, whole, halfway, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    path = saved(out)[-1][1]
    damage(path)
    life = lives.finish(out, *OFTEN)
    assert f"the damaged checkpoint {path}" in life.err and "Traceback" not in life.err
    assert [left.name for left in (out / "save").glob("damaged*")] == [f"damaged+{path.name}"]
    assert life.most <= checkpoints.AT_MOST
    require_the_same(out, whole)


@pytest.mark.slow
def test_with_a_damaged_best_checkpoint_the_next_best_is_evaluated(lives, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    best = min((one for one in saved(out) if "loss" in one[0]), key=lambda one: one[0]["loss"])[1]
    flip(best)
    (out / "report/predictions.csv").unlink()
    life = lives.finish(out, "--test_only", "True")
    assert f"the damaged checkpoint {best}" in life.err
    with open(out / "report/predictions.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 12


@pytest.mark.slow
def test_with_nothing_but_damaged_checkpoints_it_begins_anew(lives, whole, halfway, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    for (_, path), damage in zip(saved(out), DAMAGE, strict=False):
        damage(path)
    lives.finish(out)
    require_the_same(out, whole)
