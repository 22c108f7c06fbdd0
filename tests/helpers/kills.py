"""Lives of a training: a process that has imported everything forks one for each, which is killed where it is told to.

    python helpers/kills.py

reads one line of JSON for each life and answers with one: its process number when it begins, and how it ended. What
kills it or sends it signals is put into the child alone; the code that is trained with is the recipe's as it is.
"""

import atexit
import collections
import contextlib
import importlib
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

# C functions that touch the disk: between any two of them a save may be cut off.
TOUCHES = {
    *("open", "write", "close", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"),
    *("PyTorchFileWriter", "write_record", "write_end_of_file"),
}
# Anything of these is a checkpoint, or what is left of one.
CHECKPOINTS = ("CKPT*", ".writing*/CKPT*", ".deleted*", "damaged*")
# Bytes that parent and child share: whether training has begun, whether it is saving, and then some JSON.
_BEGUN, _SAVING, _TEXT, _SIZE = 0, 1, 2, 4096


class Lives:
    """Starts lives of a run, one at a time, in a process that has imported everything."""

    def __init__(self, words, folder):
        self.words, self.log = words, folder / "log"
        # A process that has asked CUDA whether it is there cannot fork others that use it; this asks the driver.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def live(self, out, *more, **plan):
        argv = [*self.words, "--output_folder", str(out), *map(str, more)]
        self.process.stdin.write(json.dumps({"argv": argv, "log": str(self.log), **plan}) + "\n")
        self.process.stdin.flush()
        life = json.loads(self.process.stdout.readline())
        return SimpleNamespace(**{"most": 0, "saves": 0, **life}, err=self.log.read_text(encoding="utf-8"))

    def finish(self, out, *more):
        """A life that nobody ends."""
        life = self.live(out, *more)
        assert life.code == 0, life.err[-3000:]
        return life

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Life:
    """Inside the child: counts what happens, and ends it."""

    def __init__(self, plan, shared):
        self.plan, self.shared = plan, shared
        self.kill = plan.get("kill") or {}
        self.said = {"calls": 0, "touches": 0, "saves": 0, "most": 0}
        self.seen, self.seen_methods = 0, collections.Counter()

    def say(self, **more):
        self.said |= more
        text = json.dumps(self.said).encode()
        self.shared[_TEXT : _TEXT + len(text) + 1] = text + b"\0"

    def die(self, place, frame=None):
        """Leave like one whose power was cut: of a file that is just being forced to the disk only half is there."""
        if self.kill.get("half") and place == "fsync":
            with contextlib.suppress(OSError):
                os.ftruncate(frame.f_locals["descriptor"], os.fstat(frame.f_locals["descriptor"]).st_size // 2)
        self.say(place=place)
        os.kill(os.getpid(), signal.SIGKILL)

    def count(self, frame, event, function):
        """For sys.setprofile: calls, and what a save does to the disk."""
        if event not in ("call", "c_call"):
            return
        self.said["calls"] += 1
        if self.kill.get("kind") == "call" and self.said["calls"] == self.kill["at"]:
            self.die(getattr(function, "__name__", None) or frame.f_code.co_name)
        if event == "c_call" and self.shared[_SAVING] and function.__name__ in TOUCHES:
            # YAML is written to memory first.
            if not isinstance(getattr(function, "__self__", None), io.StringIO):
                self.said["touches"] += 1
                if self.kill.get("kind") == "save" and self.said["touches"] == self.kill["at"]:
                    self.die(function.__name__, frame)

    def count_checkpoints(self, folder):
        found = [path for pattern in CHECKPOINTS for path in folder.glob(pattern)]
        self.said["most"] = max(self.said["most"], len(found))

    def watch_saves(self, checkpointer, name):
        method, fsync, life = getattr(checkpointer, name), os.fsync, self

        def watched(self, *arguments, **keywords):
            folder = Path(self.checkpoints_dir)

            def watched_fsync(descriptor):
                life.count_checkpoints(folder)
                return fsync(descriptor)

            os.fsync, life.shared[_SAVING] = watched_fsync, 1
            life.seen_methods[name] += 1
            if life.kill.get("kind") == "method" and life.kill["name"] == name:
                if life.seen_methods[name] == life.kill["times"]:
                    life.die(name)
            if life.kill.get("kind") == "save":
                sys.setprofile(life.count)
            try:
                return method(self, *arguments, **keywords)
            finally:
                if life.kill.get("kind") == "save":
                    sys.setprofile(None)
                os.fsync, life.shared[_SAVING] = fsync, 0
                life.said["saves"] += name == "save_checkpoint"
                life.count_checkpoints(folder)
                life.say()

        setattr(checkpointer, name, watched)

    def watch_beginning(self, brain):
        fit_batch, life = brain.fit_batch, self

        def watched(self, batch):
            if not life.shared[_BEGUN]:
                life.shared[_BEGUN] = 1
                if life.plan.get("count") or life.kill.get("kind") == "call":
                    sys.setprofile(life.count)
            return fit_batch(self, batch)

        brain.fit_batch = watched

    def send_signals(self, at, times, numbers, stage=None, group=False):
        """Let a function of the package send signals to this process, or its group, when it is called so often."""
        module, _, path = at.partition(":")
        *owners, name = path.split(".")
        owner, life = importlib.import_module(module), self
        for part in owners:
            owner = getattr(owner, part)
        function = getattr(owner, name)

        def sending(*arguments, **keywords):
            stages = [value.name for value in (*arguments, *keywords.values()) if hasattr(value, "name")]
            life.seen += stage is None or stage in stages
            if life.seen == times:
                life.seen += 1
                life.say(sent=True)
                for number in numbers:
                    (os.killpg if group else os.kill)(os.getpid(), number)
            return function(*arguments, **keywords)

        setattr(owner, name, sending)

    def run(self, recipe):
        from accent_plugin.training.brain import AccentBrain
        from accent_plugin.training.checkpoints import AtomicCheckpointer

        for name in ("save_checkpoint", "delete_checkpoints"):
            self.watch_saves(AtomicCheckpointer, name)
        self.watch_beginning(AccentBrain)
        if self.plan.get("signals"):
            self.send_signals(**self.plan["signals"])
        code = recipe.main(self.plan["argv"])
        sys.setprofile(None)
        self.say()
        return code


def live(plan, shared, recipe):
    """The child: run the recipe and end as a program of its own would."""
    os.setsid()
    log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        code = Life(plan, shared).run(recipe)
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(pid, plan, shared):
    """The parent: kill it after a while, where that is the plan; how it ended."""
    kill, begun = plan.get("kill") or {}, None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if begun is None and shared[_BEGUN]:
            begun = time.monotonic()
        if kill.get("kind") == "moment" and begun is not None and time.monotonic() - begun >= kill["after"]:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            break
        time.sleep(0.002)
    text = shared[_TEXT:].split(b"\0")[0]
    seconds = None if begun is None else time.monotonic() - begun
    said = json.loads(text) if text else {}
    return {"code": os.waitstatus_to_exitcode(status), "saving": bool(shared[_SAVING]), "seconds": seconds, **said}


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(__file__).resolve().parents[2] / "recipes/CommonVoiceAccent"
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    recipe = importlib.import_module("train")
    # Whatever a life would import on its way.
    for name in ("report.write", "report.html", "report.figures", "bundle.model_card", "bundle.write"):
        importlib.import_module(f"accent_plugin.{name}")
    importlib.import_module("transformers.models.wav2vec2.modeling_wav2vec2")
    # As in helpers/recipe.py, which a script beside it cannot import.
    importlib.import_module("speechbrain.utils.logger").get_environment_description = lambda: "not described in tests"
    for line in sys.stdin:
        plan, shared = json.loads(line), mmap.mmap(-1, _SIZE)
        pid = os.fork()
        if not pid:
            live(plan, shared, recipe)
        print(json.dumps(watch(pid, plan, shared)), flush=True)


if __name__ == "__main__":
    main()
