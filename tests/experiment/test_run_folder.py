"""A run folder: which configuration it belongs to, which process works in it, and what is deleted to start again."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from accent_plugin.errors import ConfigError
from accent_plugin.experiment import run_folder
from accent_plugin.experiment.run_folder import HOLDER_FILE, LOCK_FILE
from accent_plugin.experiment.settings import _plain

TEXT = (ROOT / "hparams/wav2vec2_base.yaml").read_text(encoding="utf-8")
DEFAULTS = _plain(TEXT, {})


def changes(*, processes=(1, 1), **values):
    """Differences that `identity` makes of values that are others now."""
    before, now = processes
    made = run_folder.run_identity(DEFAULTS, processes=before)
    return run_folder.differences(made, run_folder.run_identity(DEFAULTS | values, processes=now))


# ---- identity


def test_objects_of_the_yaml_are_left_out_and_values_that_a_user_added_are_not():
    assert not {"__set_seed", "model", "modules", "checkpointer"} & set(run_folder.run_identity(DEFAULTS))
    assert run_folder.run_identity(DEFAULTS | {"my_noise": 0.5})["my_noise"] == 0.5


def test_an_identity_is_what_json_gives_back():
    made = run_folder.run_identity(DEFAULTS | {"config_overrides": {1: (2, 3)}})
    assert json.loads(json.dumps(made)) == made


def test_another_fold_is_another_run():
    made, now = (run_folder.run_identity(DEFAULTS, fold) for fold in (1, 2))
    assert run_folder.differences(made, now) == ["fold: 1 in the folder, 2 now"]


def test_fewer_processes_with_as_many_more_batches_are_the_same_run():
    assert changes(processes=(2, 1), grad_accumulation_factor=2) == []
    assert changes(processes=(2, 1)) == ["batches_per_step: 2 in the folder, 1 now"]


def test_choices_of_data_do_not_count_where_the_data_are_taken_as_they_are():
    assert changes(skip_prep=True, min_seconds=3.0) == []


def test_a_run_may_be_prolonged_where_its_learning_rates_do_not_know_the_end():
    def identity(**values):
        return run_folder.run_identity(DEFAULTS | values)

    constant = {"warmup_fraction": 0, "lr_schedule": "none"}
    assert identity(**constant, number_of_epochs=1) == identity(**constant, number_of_epochs=2)
    assert identity(number_of_epochs=1) != identity(number_of_epochs=2)


def folder_of_weights(place, content=b"1234", config_text="{}"):
    place.mkdir(parents=True)
    (place / "config.json").write_text(config_text)
    (place / "model.safetensors").write_bytes(content)
    return str(place)


def test_an_encoder_may_be_moved_and_given_by_a_relative_path(tmp_path, monkeypatch):
    first = folder_of_weights(tmp_path / "a/encoder")
    moved = folder_of_weights(tmp_path / "b/encoder")
    monkeypatch.chdir(tmp_path)
    names = [
        run_folder.run_identity(DEFAULTS | {"wav2vec2_hub": path})["wav2vec2_hub"]
        for path in (first, moved, "b/encoder")
    ]
    assert len(set(names)) == 1 and names[0].startswith("encoder (config.json ")


@pytest.mark.parametrize("name, content, config_text", [("a", b"12", "{}"), ("a", b"1234", "[]"), ("b", b"1234", "{}")])
def test_an_encoder_with_other_content_is_another(tmp_path, name, content, config_text):
    first = folder_of_weights(tmp_path / "first/a")
    second = folder_of_weights(tmp_path / "second" / name, content, config_text)
    made, now = (run_folder.run_identity(DEFAULTS | {"wav2vec2_hub": path}) for path in (first, second))
    assert made != now


def test_where_a_bundle_is_the_start_the_encoder_is_the_bundles(tmp_path):
    bundle = folder_of_weights(tmp_path / "bundle")
    made = run_folder.run_identity(DEFAULTS | {"from_bundle": bundle})
    assert "wav2vec2_hub" not in made and made["from_bundle"].startswith("bundle (config.json ")


values = st.fixed_dictionaries({"a": st.sampled_from([None, 0, 1, "x"]), "b": st.lists(st.integers(0, 1), max_size=2)})


@given(values, values)
def test_identities_are_equal_where_no_difference_is_told(made, now):
    assert (made == now) == (run_folder.differences(made, now) == [])


def test_a_hyperparameter_that_is_not_known_any_more_is_a_difference():
    assert run_folder.differences({"mixup": 0.5}, {}) == ["mixup: 0.5 in the folder, unknown to this version and YAML"]


def test_a_hyperparameter_that_was_not_known_then_is_none():
    assert run_folder.differences({}, {"mixup": 0.5}) == []


# ---- fingerprint


def manifests(folder, **texts):
    folder.mkdir()
    paths = {split: folder / f"{split}.csv" for split in texts}
    for split, path in paths.items():
        path.write_text(texts[split])
    return paths


def test_manifests_are_the_same_wherever_they_are(tmp_path):
    first = manifests(tmp_path / "a", train="one", test="two")
    second = manifests(tmp_path / "b", test="two", train="one")
    assert run_folder.data_fingerprint(first) == run_folder.data_fingerprint(second)


def test_clips_in_another_split_are_other_data(tmp_path):
    first = manifests(tmp_path / "a", train="one", test="two")
    second = manifests(tmp_path / "b", train="two", test="one")
    assert run_folder.data_fingerprint(first) != run_folder.data_fingerprint(second)


# ---- begin

NOW = {"accents": ["us", "england"], "lr_head": 0.0001, "eval_precision": "fp32", "lora_rank": None}


def begin(folder, data="d1", test_only=False, **changed):
    run_folder.begin(folder, NOW | changed, data, save_folder=folder / "save", test_only=test_only)


def checkpoint(folder, name="CKPT+1"):
    (folder / "save" / name).mkdir(parents=True)
    (folder / "save" / name / "CKPT.yaml").write_text("epoch: 1\n")


@pytest.fixture
def trained(tmp_path):
    """A folder with a run of `NOW` on the data d1."""
    begin(tmp_path)
    checkpoint(tmp_path)
    return tmp_path


def refusal(folder, *arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        begin(folder, *arguments, **keywords)
    return str(caught.value).splitlines()


def test_the_same_configuration_goes_on_and_leaves_the_file_as_it_is(trained):
    before = (trained / "run.json").read_bytes()
    begin(trained)
    assert (trained / "run.json").read_bytes() == before
    assert json.loads(before) == {"data": "d1", "values": NOW}


def test_nothing_is_written_before_the_data_are_known(tmp_path):
    begin(tmp_path, data=None)
    assert list(tmp_path.iterdir()) == []


def test_every_difference_is_told_with_both_ways_out(trained):
    lines = refusal(trained, "d2", lr_head=0.001, accents=["england", "us"], lora_rank=4)
    assert lines == [
        f"{trained} belongs to another configuration:",
        "  accents: [us, england] in the folder, [england, us] now",
        "  lora_rank: null in the folder, 4 now",
        "  lr_head: 0.0001 in the folder, 0.001 now",
        "  the data: the clips or their split differ from those it was trained on",
        "choose another --output_folder, or delete that run and start again with --overwrite True",
    ]


def test_a_run_of_version_0_1_0_has_other_names_for_some_values(trained):
    old = {"data": "d1", "values": NOW | {"warmup": 0.1, "decay": "linear"}}
    (trained / "run.json").write_text(json.dumps(old))
    assert "  warmup_fraction: 0.1 in the folder, 0.2 now" in refusal(
        trained, warmup_fraction=0.2, lr_schedule="linear"
    )
    begin(trained, warmup_fraction=0.1, lr_schedule="linear")
    assert json.loads((trained / "run.json").read_text()) == old


def test_values_are_compared_before_the_data_are_known(trained):
    assert "  lr_head: 0.0001 in the folder, 0.001 now" in refusal(trained, None, lr_head=0.001)


def test_a_test_may_reckon_less_exactly_but_not_elsewise(trained):
    before = (trained / "run.json").read_bytes()
    begin(trained, test_only=True, eval_precision="bf16")
    assert (trained / "run.json").read_bytes() == before
    lines = refusal(trained, test_only=True, lr_head=0.001)
    assert "--overwrite" not in lines[-1] and "--output_folder" in lines[-1]


def test_training_may_not_validate_in_another_precision(trained):
    assert "  eval_precision: fp32 in the folder, bf16 now" in refusal(trained, eval_precision="bf16")


def test_a_folder_in_which_nothing_was_trained_belongs_to_nobody(tmp_path):
    begin(tmp_path)
    begin(tmp_path, "d2", lr_head=0.001)
    assert json.loads((tmp_path / "run.json").read_text()) == {"data": "d2", "values": NOW | {"lr_head": 0.001}}


@pytest.mark.parametrize("work", ["save/trials.json", "save/history.json", "report/metrics.json"])
def test_work_without_checkpoints_is_protected_too(tmp_path, work):
    begin(tmp_path)
    (tmp_path / work).parent.mkdir()
    (tmp_path / work).write_text("[]")
    assert "  lr_head: 0.0001 in the folder, 0.001 now" in refusal(tmp_path, lr_head=0.001)


def test_a_new_hyperparameter_holds_from_the_first_time_on(trained, caplog):
    begin(trained, mixup=0.5)
    assert "lacks mixup" in caplog.text
    assert "  mixup: 0.5 in the folder, 0 now" in refusal(trained, mixup=0)


def test_what_does_not_count_for_once_is_not_forgotten(tmp_path):
    begin(tmp_path, min_seconds=1)
    checkpoint(tmp_path)
    begin(tmp_path, mixup=0)
    assert "  min_seconds: 1 in the folder, 2 now" in refusal(tmp_path, min_seconds=2, mixup=0)


def test_checkpoints_of_nobody_knows_what_are_refused(tmp_path):
    checkpoint(tmp_path)
    lines = refusal(tmp_path, None)
    assert "has checkpoints, but" in lines[0] and "no run.json" in lines[0]
    assert "--output_folder" in lines[1] and "--overwrite True" in lines[1]


def test_checkpoints_of_nobody_knows_what_are_tested_with_a_warning(tmp_path, caplog):
    checkpoint(tmp_path)
    begin(tmp_path, test_only=True)
    assert "has checkpoints, but" in caplog.text
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"data": "d1"}', '{"values": {}}', '{"data": 1, "values": {}}'])
def test_a_damaged_file_is_named_with_both_ways_out(trained, text):
    (trained / "run.json").write_text(text)
    lines = refusal(trained)
    assert lines[0].startswith(f"{trained / 'run.json'} is damaged (")
    assert "--output_folder" in lines[1] and "--overwrite True" in lines[1]


def test_what_a_run_was_begun_with_can_be_read(trained, tmp_path):
    assert run_folder.read_identity(trained) == NOW
    assert run_folder.read_identity(tmp_path / "nowhere") is None
    (trained / "run.json").write_text("{")
    assert run_folder.read_identity(trained) is None


# ---- locked

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
CLAIM = r"""
import os, sys
from accent_plugin.experiment import run_folder
with run_folder.locked(sys.argv[1]):
    {inside}
    os.write(1, b"%d\n" % os.getpid())
    sys.stdin.read()
"""
# Its child stays, as a data loader's worker may.
FORK = "if not os.fork(): pass"


class Other:
    """A process that claims a folder until its standard input ends."""

    def __init__(self, folder, inside="pass"):
        command = [sys.executable, "-c", CLAIM.format(inside=inside), str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def pid(self):
        return int(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.communicate()


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    with Other(tmp_path / "run") as other:
        pid = other.pid()
        with pytest.raises(ConfigError) as caught, run_folder.locked(tmp_path / "run"):
            pass
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'run'} is in use by process {pid} on ")
    assert "--output_folder" in lines[1]


def test_a_folder_is_free_again_when_the_first_has_ended(tmp_path):
    for _ in range(2):
        with run_folder.locked(tmp_path / "run") as folder:
            assert folder.is_dir()


@needs_fork
def test_a_worker_that_outlives_its_killed_parent_holds_nothing(tmp_path):
    with Other(tmp_path, FORK) as other:
        pids = {other.pid(), other.pid()}
        parent = other.process.pid
        (child,) = pids - {parent}
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(child, 0)
        with run_folder.locked(tmp_path):
            pass


@needs_fork
def test_a_worker_that_ends_first_leaves_the_lock_to_its_parent(tmp_path):
    with contextlib.ExitStack() as block:
        block.enter_context(run_folder.locked(tmp_path))
        child = os.fork()
        if not child:
            # It leaves the block as its parent would.
            with contextlib.suppress(BaseException):
                block.close()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), run_folder.locked(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]"])
def test_a_holder_that_has_not_written_its_name(tmp_path, text):
    with run_folder.locked(tmp_path):
        (tmp_path / ".run.holder.json").write_text(text)
        with pytest.raises(ConfigError, match="is in use by another process"), run_folder.locked(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_where_the_file_system_has_no_locks_there_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_folder.locked(tmp_path):
        assert "cannot be locked (" in caplog.text


def test_a_file_in_the_folders_place_is_the_systems_answer(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), run_folder.locked(tmp_path / "file"):
        pass


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    write(tmp_path, ".bundle.7.tmp/config.json", ".run.json.7.tmp", ".bundle.7.old/config.json", "bundle/config.json")
    write(tmp_path, f".{HOLDER_FILE}.7.tmp")
    with run_folder.locked(tmp_path):
        assert files(tmp_path) == {LOCK_FILE, HOLDER_FILE, "bundle/config.json"}
    assert not (tmp_path / ".bundle.7.old").exists()


def test_what_else_was_in_a_bundle_that_was_being_replaced_stays(tmp_path):
    write(tmp_path, *(f".bundle.{number}.old/config.json" for number in (6, 7, 8)), ".bundle.7.old/notes.txt")
    with run_folder.locked(tmp_path):
        assert files(tmp_path) == {LOCK_FILE, HOLDER_FILE, ".bundle.7.old/notes.txt"}


# ---- clear


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir() or path.is_symlink()}


def write(folder, *names, text="x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def clear(folder, **places):
    places = {"save_folder": folder / "save", "train_log": folder / "train_log.txt"} | places
    return run_folder.clear(folder, **places)


def test_all_that_a_run_made_is_deleted(trained):
    write(trained, "save/.writing/CKPT+2/model.ckpt", "save/.deleted+CKPT+3/CKPT.yaml", "save/damaged+CKPT+4/CKPT.yaml")
    write(trained, "save/history.json", "save/trials.json", "train_log.txt", "log.txt", "env.log", "hyperparams.yaml")
    write(trained, "report/metrics.json", "report/predictions.csv", "report/confusion.png", "bundle/model.ckpt")
    write(trained, "bundle/config.json", text='{"format_version": 1}')
    write(trained, "tensorboard/events.out.tfevents.1")
    deleted = clear(trained)
    assert list(trained.iterdir()) == []
    assert "save/CKPT+1" in deleted and "report" in deleted and deleted[-1] == "run.json"


def test_what_a_user_keeps_beside_it_stays(trained):
    theirs = {"notes.txt", "save/notes.txt", "report/notes.txt", "bundle/config.json", "tensorboard/notes.txt"}
    theirs |= {"fold_1/run.json", "train.py"}
    write(trained, "report/metrics.json", *theirs)
    clear(trained)
    assert files(trained) == theirs


def test_a_folder_of_anything_else_stays_as_it_is(tmp_path):
    theirs = {"log.txt", "env.log", "hyperparams.yaml", "train_log.txt", "report/report.md", "save/history.json"}
    write(tmp_path, *theirs)
    assert clear(tmp_path) == []
    assert files(tmp_path) == theirs


def test_a_run_from_before_there_were_identities_is_known_by_its_hyperparameters(tmp_path):
    write(tmp_path, "hyperparams.yaml", text="# Generated 2024-01-01 from:\n")
    write(tmp_path, "log.txt")
    assert clear(tmp_path) == ["log.txt", "hyperparams.yaml"]


def test_a_log_that_is_a_folder_stays(trained):
    write(trained, "train_log.txt/notes.txt")
    clear(trained)
    assert files(trained) == {"train_log.txt/notes.txt"}


@pytest.mark.parametrize("linked", ["report", "bundle", "tensorboard", "save/CKPT+2"])
def test_links_are_not_followed(trained, tmp_path_factory, linked):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    theirs = {"metrics.json", "config.json", "model.ckpt", "events.out.tfevents.1", "CKPT.yaml"}
    write(elsewhere, *theirs, text='{"format_version": 1}')
    (trained / linked).symlink_to(elsewhere)
    clear(trained)
    assert files(elsewhere) == theirs


def test_checkpoints_behind_a_link_are_refused(trained, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "save"
    shutil.move(trained / "save", elsewhere)
    (trained / "save").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a link to .*where --overwrite True deletes nothing"):
        clear(trained)
    assert files(elsewhere) == {"CKPT+1/CKPT.yaml"} and (trained / "run.json").exists()


def test_checkpoints_in_a_place_of_their_own_are_deleted(tmp_path):
    write(tmp_path, "scratch/CKPT+1/CKPT.yaml", "out/log.txt")
    clear(tmp_path / "out", save_folder=tmp_path / "scratch")
    assert files(tmp_path) == set()


# ---- restarted


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("value, answer", [("0", False), ("1", True), ("12", True), ("", False), ("no", False)])
def test_a_job_that_was_started_again(monkeypatch, name, value, answer):
    monkeypatch.setenv(name, value)
    assert run_folder.restarted() is answer


def test_a_job_that_was_started_by_hand(monkeypatch):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert run_folder.restarted() is False
