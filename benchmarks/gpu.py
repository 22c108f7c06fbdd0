"""Measurements of one GPU in one command and in a limited time; see benchmarks/GPU.md.

    python benchmarks/gpu.py --data DATASETDICT --encoder FOLDER
    python benchmarks/gpu.py --tiny        # a rehearsal of every part on a CPU; its figures mean nothing

The parts run one after the other, the most valuable first, each in a separate process with a time limit. Their rows are
in results.json and results.md within seconds. A part that fails or runs out of time does not stop the others.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Part -> what it measures, and the seconds that it may take at most.
PARTS = {
    "machine": ("the card, and the rate of its matrix products", 60),
    "tests": ("the tests that differ on a GPU", 150),
    "memory": ("whether the default YAML fits a card of 16 GB", 75),
    "training": ("training beside transformers and SpeechBrain, and a profile of one step", 150),
    "levers": ("what single changes do to a step", 75),
    "attention": ("attention with packed sequences in place of padding", 45),
    "compile": ("CUDA graphs and torch.compile with static shapes", 120),
    "inference": ("files a second beside transformers' pipeline", 75),
    "serving": ("requests in common batches beside alone", 30),
    "end_to_end": ("five folds of real speech, fine-tuned", 240),
}
OUT_OF_TIME = "not run: out of time"
# A part is not started with fewer seconds left.
_LEAST = 5.0
_POLL = 0.5
_TAIL = 3000
# Factor of a rehearsal on two cores, most of which is imports.
_TINY_FACTOR = 3


# ------------------------------------------------------------------------------------------------------- the results


def replace(path, text):
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_rows(path):
    """Rows that a part has written so far, by table; a last line that is not whole yet does not count."""
    tables = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                tables.setdefault(row.pop("table"), []).append(row)
    return tables


def write(out, results):
    replace(out / "results.json", json.dumps(results, indent=1) + "\n")
    replace(out / "results.md", as_markdown(results))


def as_markdown(results):
    lines = ["# Measurements on a GPU", ""]
    if results["tiny"]:
        lines += ["**A rehearsal with tiny sizes: these figures mean nothing.**", ""]
    lines += [f"`{results['command']}`", ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}: {part['about']}", "", f"{part['status']}{_seconds(part)}", ""]
        for title, rows in part["tables"].items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += [f"### {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
            lines.append("")
        if part.get("stderr"):
            lines += ["```", part["stderr"], "```", ""]
    return "\n".join(lines)


def _seconds(part):
    return f" ({part['seconds']:.0f} s, {part['cpu_seconds']:.0f} s of CPU)" if "seconds" in part else ""


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")[:400]


# --------------------------------------------------------------------------------------------------------- the parts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budget", type=float, default=8.0, help="total minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu", help="folder for the results")
    parser.add_argument("--clips", type=Path, help="folder of speech (default: the speech of --data, or noise)")
    parser.add_argument("--data", type=Path, help="DatasetDict of real speech, for end_to_end")
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained Moonshine, for end_to_end")
    parser.add_argument("--tiny", action="store_true", help="rehearse all parts with tiny sizes on a CPU")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
    else:
        sys.exit(run(options))


def run(options):
    """Run the parts, and return the exit code: 1 if one failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    chosen = [name for name in PARTS if name in options.parts]
    # Written first, so that the file is correct if this process is killed.
    parts = {name: {"about": PARTS[name][0], "status": OUT_OF_TIME, "tables": {}} for name in chosen}
    results = {"command": command, "tiny": options.tiny, "parts": parts}
    write(options.out, results)
    end = time.monotonic() + 60 * options.budget
    with tempfile.TemporaryDirectory() as folder, open(options.out / "gpu.log", "w", encoding="utf-8") as log:
        for name in chosen:
            limit = min(PARTS[name][1] * (_TINY_FACTOR if options.tiny else 1), end - time.monotonic())
            if limit >= _LEAST:
                run_part(name, limit, Path(folder), log, options, results)
            print(f"{name}: {parts[name]['status']}{_seconds(parts[name])}", flush=True)
    print((options.out / "results.md").read_text(encoding="utf-8"))
    return any(part["status"].startswith("failed") for part in parts.values())


def run_part(name, limit, folder, log, options, results):
    """Run one part in its own process group, and record its results while it runs."""
    part, rows, errors = results["parts"][name], folder / f"{name}.jsonl", folder / f"{name}.err"
    part["status"] = "cut off"
    write(options.out, results)
    words = [sys.executable, __file__, "--worker", name, "--work", str(folder), "--limit", str(limit)]
    words += ["--tiny"] if options.tiny else []
    for option in ("clips", "data", "encoder"):
        if value := getattr(options, option):
            words += [f"--{option}", str(value.resolve())]
    started, cpu, size = time.monotonic(), cpu_of_children(), -1
    log.write(f"\n==== {name}\n")
    log.flush()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if options.tiny:
        # With such small sizes, several threads are slower than one.
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with open(errors, "w", encoding="utf-8") as stderr:
        worker = subprocess.Popen(words, stdout=stderr, stderr=stderr, start_new_session=True, env=env, cwd=ROOT)
    try:
        while worker.poll() is None and time.monotonic() < started + limit:
            time.sleep(_POLL)
            if rows.is_file() and rows.stat().st_size != size:
                size, part["tables"] = rows.stat().st_size, read_rows(rows)
                write(options.out, results)
        code = worker.poll()
    finally:
        # Also ends the processes that it started.
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        worker.wait()
    said = errors.read_text(encoding="utf-8", errors="replace")
    log.write(said)
    log.flush()
    part["tables"], part["seconds"] = read_rows(rows), time.monotonic() - started
    part["cpu_seconds"] = cpu_of_children() - cpu
    failed = [row for table in part["tables"].values() for row in table if row.get("error")]
    if code is None:
        part["status"] = f"cut off after {limit:.0f} s"
    elif code:
        part["status"] = f"failed with exit code {code}"
    else:
        part["status"] = f"failed in {len(failed)} of its rows" if failed else "done"
    if code or failed:
        part["stderr"] = said[-_TAIL:]
    write(options.out, results)


def cpu_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def work(options):
    """Measure one part in this process."""
    parent = os.getppid()

    def follow():
        while os.getppid() == parent:
            time.sleep(_POLL)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    import gpu_parts

    gpu_parts.measure(options)


if __name__ == "__main__":
    main()
