"""Checkpoints: written atomically, verified before use, and limited in number."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from speechbrain.utils.checkpoints import METAFNAME, Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter

from accent_plugin.errors import CheckpointError
from accent_plugin.training import checkpoints
from accent_plugin.training.checkpoints import AT_MOST, NEWEST, AtomicCheckpointer


class Holder(torch.nn.Linear):
    """A model of one number."""

    def __init__(self, value=0.0):
        super().__init__(1, 1, bias=False)
        self.set(value)

    def set(self, value):
        with torch.no_grad():
            self.weight.fill_(value)

    def get(self):
        return self.weight.item()


def make(folder):
    """A checkpointer of a model and an epoch counter, and the model."""
    model = Holder()
    return AtomicCheckpointer(folder, {"model": model, "counter": EpochCounter(10)}), model


def save(checkpointer, model, value, **meta):
    model.set(value)
    return checkpointer.save_checkpoint({"epoch": int(value), **meta})


def values(folder):
    """Values in the intact checkpoints of a folder, as a new process finds them."""
    checkpointer, model = make(folder)
    found = []
    for checkpoint in sorted(checkpointer.list_checkpoints(), key=lambda one: one.meta["unixtime"]):
        checkpointer.load_checkpoint(checkpoint)
        assert model.get() == checkpoint.meta["epoch"]
        found.append(model.get())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two checkpoints, which hold 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "save"
    checkpointer, model = make(folder)
    for value in (1.0, 2.0):
        save(checkpointer, model, value, macro_f1=0.5)
    return folder


def copied(folder, to):
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


def newest(folder):
    return max(folder.glob("CKPT*"), key=lambda one: yaml.safe_load((one / METAFNAME).read_text())["unixtime"])


# Round trip


def test_a_saved_checkpoint_can_be_loaded(tmp_path):
    checkpointer, model = make(tmp_path)
    saved = save(checkpointer, model, 3.0, macro_f1=0.25)
    other, fresh = make(tmp_path)
    found = other.recover_if_possible()
    assert fresh.get() == 3.0 and found.path == saved.path and found.paramfiles == saved.paramfiles
    assert found.meta == saved.meta and found.meta["macro_f1"] == 0.25 and found.meta["end-of-epoch"] is True


def test_speechbrains_own_class_reads_what_was_written(two):
    model = Holder()
    Checkpointer(two, {"model": model, "counter": EpochCounter(10)}).recover_if_possible()
    assert model.get() == 2.0


def test_checkpoints_of_speechbrains_own_class_are_found(tmp_path):
    model = Holder(7.0)
    Checkpointer(tmp_path, {"model": model, "counter": EpochCounter(10)}).save_checkpoint({"epoch": 7})
    assert values(tmp_path) == [7.0]


def test_every_file_is_named_with_size_and_digest(two):
    folder = newest(two)
    files = yaml.safe_load((folder / METAFNAME).read_text())["files"]
    assert files.keys() == {path.name for path in folder.iterdir()} - {METAFNAME}
    assert all((folder / name).stat().st_size == file["bytes"] for name, file in files.items())


def test_names_differ_within_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.time, "strftime", lambda *_: "2020-01-01+00-00-00")
    checkpointer, model = make(tmp_path)
    names = [save(checkpointer, model, value).path.name for value in (1.0, 2.0, 3.0)]
    assert len(set(names)) == 3 and values(tmp_path) == [1.0, 2.0, 3.0]


def test_the_last_checkpoint_is_the_newest_even_if_the_clock_is_set_back(tmp_path, monkeypatch):
    clock = iter([1000.0] * 4 + [500.0] * 100)
    monkeypatch.setattr(checkpoints.time, "time", lambda: next(clock))
    for value in (1.0, 2.0, 3.0, 4.0):
        # A new checkpointer for each, like a new process: it knows the time of earlier checkpoints from the disk only.
        checkpointer, model = make(tmp_path)
        checkpointer.recover_if_possible()
        save(checkpointer, model, value)
    times = [one.meta["unixtime"] for one in sorted(checkpointer.list_checkpoints(), key=lambda one: one.meta["epoch"])]
    assert times == sorted(set(times)) and times[0] >= 500.0
    assert checkpointer.find_checkpoint().meta["epoch"] == 4


# Damage


def _flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


DAMAGES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 20), st.integers(0, 7)),
    st.tuples(st.just("truncate"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("delete")),
    st.tuples(st.just("replace"), st.binary(max_size=60)),
    st.tuples(st.just("folder")),
)
FILES = st.sampled_from(["model.ckpt", "counter.ckpt", METAFNAME])


def damage(path, kind, *how):
    if kind == "flip":
        _flip(path, *how)
    elif kind == "truncate":
        path.write_bytes(path.read_bytes()[: int(how[0] * path.stat().st_size)])
    elif kind == "replace":
        path.write_bytes(*how)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FILES, DAMAGES)
@example("model.ckpt", ("replace", b""))
@example(METAFNAME, ("delete",))
def test_a_damaged_newest_checkpoint_is_skipped(two, tmp_path, caplog, name, how):
    caplog.clear()
    folder = copied(two, tmp_path / "save")
    spoilt = newest(folder)
    before = (spoilt / name).read_bytes()
    damage(spoilt / name, *how)
    checkpointer, model = make(folder)
    found = checkpointer.recover_if_possible()
    if found.path == spoilt:
        # Only if the damage is in the words before the digest, not in the content that it covers.
        assert name == METAFNAME and how[0] == "flip" and model.get() == 2.0
        # Without its "#" the line with the digest is one more key.
        assert yaml.safe_load(before).items() <= found.meta.items()
        return
    assert model.get() == 1.0
    assert not spoilt.exists() and (folder / f"damaged+{spoilt.name}").is_dir()
    assert spoilt.name in caplog.text and "skipped the damaged checkpoint" in caplog.text
    assert values(folder) == [1.0]


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "word", "a: 1", "unixtime: 1.0", "{unixtime: .nan, end-of-epoch: true}",
     "{unixtime: .inf, end-of-epoch: true}", "{unixtime: 1.0, end-of-epoch: 3}", "2001-99-99", "[" * 5000,
     "{unixtime: '1', end-of-epoch: true}", "{unixtime: 9.0e9, end-of-epoch: true, files: [model.ckpt]}",
     "{unixtime: 9.0e9, end-of-epoch: true, files: {model.ckpt: 3}}", "!!python/object:os.system {}",
     "{unixtime: 9.0e9, end-of-epoch: true, files: {model.ckpt: {bytes: 3}}}", "{[1]: 2}", "&a [*a]",
     "{unixtime: 9.0e9, end-of-epoch: true, files: {7: {bytes: 3}}}"],
)  # fmt: skip
def test_an_invalid_ckpt_yaml_is_a_damaged_checkpoint(two, tmp_path, text, caplog):
    folder = copied(two, tmp_path / "save")
    spoilt = newest(folder)
    (spoilt / METAFNAME).write_text(text)
    assert values(folder) == [1.0]
    assert (folder / f"damaged+{spoilt.name}").is_dir() and spoilt.name in caplog.text


def test_damage_during_training_is_detected(tmp_path, caplog):
    checkpointer, model = make(tmp_path)
    for value in (1.0, 2.0):
        saved = save(checkpointer, model, value)
    (saved.path / METAFNAME).write_text("word")
    assert checkpointer.find_checkpoint().meta["epoch"] == 1 and saved.path.name in caplog.text


def test_files_of_another_run_are_detected(two, tmp_path, caplog):
    other, model = make(tmp_path / "other")
    save(other, model, 9.0)
    folder = copied(two, tmp_path / "save")
    shutil.copy(newest(tmp_path / "other") / "model.ckpt", newest(folder) / "model.ckpt")
    assert values(folder) == [1.0] and "the content of model.ckpt has changed" in caplog.text


def test_without_an_intact_checkpoint_none_is_found(two, tmp_path):
    folder = copied(two, tmp_path / "save")
    for one in folder.glob("CKPT*"):
        (one / "model.ckpt").unlink()
    checkpointer, model = make(folder)
    assert checkpointer.recover_if_possible() is None and model.get() == 0.0
    # Only one damaged checkpoint is kept.
    assert len(list(folder.glob("damaged+*"))) == 1


def test_an_intact_checkpoint_of_another_model_is_an_error(two, tmp_path):
    folder = copied(two, tmp_path / "save")
    checkpointer = AtomicCheckpointer(folder, {"model": torch.nn.Linear(3, 3), "counter": EpochCounter(10)})
    with pytest.raises(CheckpointError, match=re.escape(newest(folder).name)) as caught:
        checkpointer.recover_if_possible()
    assert "another model" in str(caught.value)


def test_a_damaged_checkpoint_of_speechbrains_own_class_is_an_error(tmp_path):
    model = Holder(7.0)
    saved = Checkpointer(tmp_path, {"model": model}).save_checkpoint({"epoch": 7})
    path = saved.path / "model.ckpt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        make(tmp_path)[0].recover_if_possible()


# Interruption at every operation of the file system

OPERATIONS = [
    (os, "fsync"), (os, "makedirs"), (os, "open"), (os, "close"), (torch, "save"), (yaml, "safe_dump"),
    (Path, "rename"), (Path, "write_text"), (Path, "mkdir"), (Path, "stat"),
    (checkpoints, "_digest"), (checkpoints, "_sync"), (Path, "exists"),
]  # fmt: skip


class Killed(BaseException):
    """Not an `Exception`, like an interruption, so that no handler swallows it."""


def interrupted_at(monkeypatch, number, error, operation):
    """Raise at the n-th file operation; returns a function that tells whether it was reached."""
    count = 0

    def watched(function):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == number:
                raise error
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patched:
        for owner, name in OPERATIONS:
            patched.setattr(owner, name, watched(getattr(owner, name)))
        try:
            operation()
        except (type(error), CheckpointError):
            return True
    # Operations whose failure is only logged are counted, too.
    return count >= number


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "full"])
def test_an_interrupted_save_leaves_all_or_nothing(two, tmp_path, monkeypatch, error):
    number, outcomes, came = 0, [], True
    while came:
        number += 1
        folder = copied(two, tmp_path / "save")
        checkpointer, model = make(folder)
        came = interrupted_at(monkeypatch, number, error, lambda one=checkpointer, two=model: save(one, two, 3.0))
        outcomes.append(values(folder))
        checkpointer.tidy()
        assert sorted(path.name[:4] for path in folder.iterdir()) == ["CKPT"] * len(outcomes[-1]), number
    assert all(outcome in ([1.0, 2.0], [1.0, 2.0, 3.0]) for outcome in outcomes)
    assert outcomes[0] == [1.0, 2.0] and outcomes[-1] == [1.0, 2.0, 3.0] and number > 15


@pytest.mark.parametrize("error", [Killed(), OSError(5, "Input/output error")], ids=["killed", "refused"])
def test_an_interrupted_deletion_leaves_intact_checkpoints(two, tmp_path, monkeypatch, error):
    number, outcomes, came = 0, [], True
    while came:
        number += 1
        folder = copied(two, tmp_path / "save")
        checkpointer, _ = make(folder)
        came = interrupted_at(monkeypatch, number, error, checkpointer.delete_checkpoints)
        outcomes.append(values(folder))
    # A checkpoint that cannot be verified counts as damaged.
    assert all(2.0 in outcome or 1.0 in outcome for outcome in outcomes)
    assert outcomes[-1] == [2.0] and number > 2


def test_a_partly_deleted_folder_is_not_a_checkpoint(two, tmp_path, monkeypatch):
    folder = copied(two, tmp_path / "save")
    checkpointer, _ = make(folder)

    def killed(path, **_):
        if path.exists():
            (path / METAFNAME).unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            checkpointer.delete_checkpoints()
    assert values(folder) == [2.0] and not list(folder.glob("damaged+*"))
    checkpointer.tidy()
    assert [path.name[:4] for path in folder.iterdir()] == ["CKPT"]


def test_a_failed_deletion_is_logged_and_training_continues(two, tmp_path, monkeypatch, caplog):
    folder = copied(two, tmp_path / "save")
    checkpointer, _ = make(folder)

    def refused(path, target):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        checkpointer.delete_checkpoints()
    assert "cannot delete" in caplog.text and values(folder) == [1.0, 2.0]


def test_tidy_removes_leftovers_only(two, tmp_path):
    folder = copied(two, tmp_path / "save")
    for name in (".writing", ".deleted+CKPT+x", "damaged+CKPT+y", "mine", "CKPT.not-a-folder"):
        (folder / name).mkdir() if "not" not in name else (folder / name).write_text("")
        if "not" not in name:
            (folder / name / "file").write_text("")
    before = {path.name for path in folder.iterdir()}
    make(folder)[0].tidy()
    assert before - {path.name for path in folder.iterdir()} == {".writing", ".deleted+CKPT+x"}


# How much


def test_there_are_never_more_checkpoints_than_the_maximum(tmp_path, monkeypatch):
    folder, most = tmp_path / "save", 0
    checkpointer, model = make(folder)
    publish = checkpointer._publish

    def watched(saved, place):
        nonlocal most
        most = max(most, len([path for path in place.iterdir() if path.is_dir()]))
        return publish(saved, place)

    monkeypatch.setattr(checkpointer, "_publish", watched)
    for epoch in range(1, 20):
        save(checkpointer, model, float(epoch), macro_f1=float(epoch == 3))
        if epoch % 5 == 0:
            # Now and then the newest is damaged, which a new process detects.
            (newest(folder) / "model.ckpt").write_bytes(b"")
            checkpointer._whole.clear()
        best = checkpointer.find_checkpoint(max_key="macro_f1")
        checkpointer.delete_checkpoints(num_to_keep=NEWEST, ckpt_predicate=lambda one: one.path != best.path)  # noqa: B023
    assert most == AT_MOST
    assert values(folder) == [3.0, 18.0, 19.0]


def test_size_and_number_are_logged_once(tmp_path, caplog):
    model = torch.nn.Linear(1024, 1024, bias=False)
    checkpointer = AtomicCheckpointer(tmp_path, {"model": model})
    with caplog.at_level(logging.INFO):
        checkpointer.save_checkpoint()
        checkpointer.save_checkpoint()
    assert caplog.text.count(f"a checkpoint takes 4 MiB; at most {AT_MOST} are kept, 20 MiB in all") == 1


# A disk that refuses

_SAVE_WITH_LIMITS = """
import json, resource, sys, torch
from accent_plugin.checkpoints import AtomicCheckpointer
from accent_plugin.errors import CheckpointError

folder, model, said = sys.argv[1], torch.nn.Linear(200, 200), []
checkpointer = AtomicCheckpointer(folder, {"model": model})
checkpointer.save_checkpoint({"epoch": 1})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        checkpointer.save_checkpoint({"epoch": 2})
        said.append(None)
    except CheckpointError as error:
        said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print(json.dumps([said, [one.meta["epoch"] for one in AtomicCheckpointer(folder, {}).list_checkpoints()]]))
"""


def test_a_full_disk_is_an_error(tmp_path):
    """A file size limit makes writes fail like a full disk: at the first byte, in the middle of the weights, ..."""
    pytest.importorskip("resource", reason="Windows has no such limit")
    limits = ["0", "10", "150", "1000", "100000", "160000"]
    command = [sys.executable, "-c", _SAVE_WITH_LIMITS, str(tmp_path / "save"), *limits]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said, epochs = json.loads(done.stdout.splitlines()[-1])
    for limit, words in zip(limits, said, strict=True):
        assert words and f"cannot write a checkpoint in {tmp_path / 'save'}" in words, limit
        assert "MiB are free" in words and "rerun the same command" in words
    assert epochs == [1]
    assert [path.name[:4] for path in (tmp_path / "save").iterdir()] == ["CKPT"]


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 662",
        "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file write failed",
        "Parent directory /somewhere/save/.writing does not exist.",
    ],
)
def test_disk_errors_raised_by_torch_are_checkpoint_errors(two, tmp_path, monkeypatch, words):
    folder = copied(two, tmp_path / "save")
    checkpointer, model = make(folder)

    def refused(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(torch, "save", refused)
    with pytest.raises(CheckpointError, match="rerun the same command"):
        save(checkpointer, model, 3.0)
    assert values(folder) == [1.0, 2.0]


def test_other_errors_of_torch_are_not_hidden(tmp_path, monkeypatch):
    checkpointer, model = make(tmp_path)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        save(checkpointer, model, 1.0)
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_is_an_error(two, tmp_path):
    folder = copied(two, tmp_path / "save")
    folder.chmod(0o500)
    try:
        (folder / "x").touch()
    except PermissionError:
        pass
    else:
        pytest.skip("this user may write everywhere: permissions do not bind")
    try:
        checkpointer, model = make(folder)
        with pytest.raises(CheckpointError, match="Permission denied"):
            save(checkpointer, model, 3.0)
        assert values(folder) == [1.0, 2.0]
    finally:
        folder.chmod(0o700)


def test_a_folder_that_becomes_read_only_is_an_error(two, tmp_path, monkeypatch):
    folder = copied(two, tmp_path / "save")
    checkpointer, model = make(folder)

    def refused(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refused)
        with pytest.raises(CheckpointError, match=re.escape(str(folder))):
            save(checkpointer, model, 3.0)
    assert values(folder) == [1.0, 2.0]


def test_a_missing_folder_is_an_error(two, tmp_path):
    folder = copied(two, tmp_path / "save")
    checkpointer, model = make(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        save(checkpointer, model, 3.0)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


@pytest.mark.parametrize("name", ["model.ckpt", METAFNAME])
def test_a_checkpoint_that_was_never_downloaded_is_an_error_and_stays(two, tmp_path, name):
    folder = copied(two, tmp_path / "save")
    place = newest(folder)
    (place / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer: .* git lfs pull"):
        make(folder)[0].list_checkpoints()
    assert place.is_dir()


@pytest.mark.parametrize("content", [b"", bytes(100)])
def test_what_a_crash_of_the_machine_leaves_is_damage(two, tmp_path, content):
    folder = copied(two, tmp_path / "save")
    (newest(folder) / "model.ckpt").write_bytes(content)
    assert values(folder) == [1.0]


def test_a_checkpoint_with_nan_is_refused_by_the_name_of_the_tensor(tmp_path):
    checkpointer, model = make(tmp_path / "save")
    save(checkpointer, model, 1.0)
    model.set(float("nan"))
    saved = checkpointer.save_checkpoint({"epoch": 2})
    with pytest.raises(CheckpointError, match="model.ckpt has NaN or infinity in weight"):
        checkpointer.load_checkpoint(saved)
