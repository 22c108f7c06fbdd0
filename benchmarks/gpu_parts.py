"""The parts of benchmarks/gpu.py. Each runs in a separate process, which calls `measure`.

A part writes its table rows as lines of JSON as soon as it has them. If a measurement fails, its row names the error,
and the part continues.

Operations of a training step (`operations`): two for each multiplication of a matrix product or a convolution, of the
clips' own frames, without padding. A clip of n samples has T frames of width d. Forward: each convolution
2 frames kernel channels_in channels_out; the projection 2 T channels d; the positional convolution
2 T d (d / groups) kernel; each layer 8 T d^2 for its four projections, 4 T d intermediate for its feed-forward part and
4 T^2 d for its attention. The backward pass takes twice the forward pass, but nothing in the convolutions, which are
frozen. Norms, activations, dropout and the optimizer are not counted.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import memory as memory_benchmark
import numpy as np
import torch
import training as training_benchmark

from accent_plugin import devices
from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.training.batches import Batch, collate
from accent_plugin.training.brain import AccentBrain

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GIB = 2**30
# Of the 16 GB of a T4 some 15.6 GiB are there, and CUDA itself takes half of one before PyTorch's first byte.
CARD_BYTES = 15 * GIB
TINY_SHAPE = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16},
}
TEST_FILES = ("tests/test_gpu.py", "tests/training/test_no_gpu_sync.py", "tests/test_devices.py")
AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements."""

    shape: dict  # of the encoder, where it is not wav2vec2-base's
    clips: int
    batch_seconds: float
    turn: float  # seconds of audio that a peer trains on before it is another's turn
    turns: int
    seconds: float  # for all turns of one table
    batches: int  # of a round of steps
    rounds: int
    files: int
    product: int  # rows and columns of the matrices whose product is timed
    largest_batch: float  # seconds of audio that are tried at most


WHOLE = Sizes({}, 2000, 60.0, 1200.0, 8, 25.0, 20, 5, 400, 8192, 4000.0)
TINY = Sizes(TINY_SHAPE, 24, 8.0, 8.0, 1, 5.0, 2, 2, 8, 256, 16.0)


class Rows:
    """Writes the rows of a part."""

    def __init__(self, path):
        self.path = path

    def add(self, table, **cells):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, **cells}) + "\n")
        print(table, cells, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def attempt(self, table, **cells):
        """Catch errors of the block, and write them as a row."""
        try:
            yield
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.add(table, **cells, error=f"{type(error).__name__}: {error}"[:500])
        finally:
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of a part."""

    rows: Rows
    sizes: Sizes
    options: object
    end: float  # of time.monotonic

    @functools.cached_property
    def place(self):
        """The folder with clips, rows.json and an encoder; created by the first part that needs it."""
        place = self.options.work / "inputs"
        if not place.is_dir():
            making = self.options.work / f"inputs.{os.getpid()}"
            (making / "clips").mkdir(parents=True)
            rows = training_benchmark.make_clips(self._speech(), making / "clips", self.sizes.clips)
            # Where they will be.
            rows = [row | {"wav": str(place / "clips" / Path(row["wav"]).name)} for row in rows]
            (making / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
            training_benchmark.make_encoder(making / "encoder", **self.sizes.shape)
            making.rename(place)
        return place

    @functools.cached_property
    def clips(self):
        return json.loads((self.place / "rows.json").read_text(encoding="utf-8"))

    @property
    def speech(self):
        """Describe the clips."""
        return "noise (synthetic)" if self.options.clips is self.options.data is None else "real speech"

    def _speech(self):
        """The folder of speech, or None."""
        if self.options.clips is not None or self.options.data is None:
            return self.options.clips
        from datasets import Audio, load_from_disk

        folder = self.options.work / "speech"
        folder.mkdir(exist_ok=True)
        for split, data in load_from_disk(str(self.options.data)).items():
            for number, row in enumerate(data.cast_column("audio", Audio(decode=False))):
                suffix = Path(row["audio"]["path"] or ".flac").suffix
                (folder / f"{split}_{number:05d}{suffix}").write_bytes(row["audio"]["bytes"])
        return folder

    def has(self, seconds):
        """Whether this much time is left."""
        return time.monotonic() + seconds < self.end


def measure(options):
    """Measure the part named in the options."""
    sizes = TINY if options.tiny else WHOLE
    job = Job(Rows(options.work / f"{options.worker}.jsonl"), sizes, options, time.monotonic() + options.limit)
    PARTS[options.worker](job)


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def took(function, times, warm_up=3, in_a_row=1):
    """Median seconds of a call; several calls in a row keep a GPU busy."""
    for _ in range(warm_up):
        function()
    found = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        for _ in range(in_a_row):
            function()
        synchronize()
        found.append((time.perf_counter() - start) / in_a_row)
    return statistics.median(found)


def half():
    """The fast precision of training on this device."""
    return "bf16" if DEVICE == "cpu" or devices.bf16_is_faster("cuda") else "fp16"


def spread(values):
    return f"{min(values):.3g} to {max(values):.3g}"


# --------------------------------------------------------------------------------------------------------- the machine


def matrix_rate(kind, size, times):
    """Operations per second of a product of random square matrices."""
    one, other = (torch.randn(size, size, device=DEVICE, dtype=kind) for _ in range(2))
    return 2 * size**3 / took(lambda: one @ other, times)


def machine(job):
    """Describe the machine, and measure its matrix products and copies."""
    names = ("torch", "torchaudio", "transformers", "speechbrain", "datasets", "numpy", "triton")
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            job.rows.add("machine", what=name, value=importlib.metadata.version(name))
    job.rows.add("machine", what="Python", value=platform.python_version())
    job.rows.add("machine", what="cores", value=os.cpu_count())
    job.rows.add("machine", what="clips", value=f"{job.sizes.clips} of {job.speech}")
    if DEVICE == "cuda":
        about = torch.cuda.get_device_properties(0)
        job.rows.add("machine", what="GPU", value=about.name)
        job.rows.add("machine", what="compute capability", value=f"{about.major}.{about.minor}")
        job.rows.add("machine", what="memory (GiB)", value=round(about.total_memory / GIB, 1))
        job.rows.add("machine", what="CUDA", value=torch.version.cuda)
        with job.rows.attempt("machine", what="driver"):
            words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            job.rows.add("machine", what="driver", value=subprocess.check_output(words, text=True).strip())
    job.rows.add("machine", what="precision: auto comes to", value=devices.fastest_precision(DEVICE))
    size, times = job.sizes.product, 20
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        with job.rows.attempt("rates", what=f"{name} product, {size} cubed"):
            rate = matrix_rate(kind, size, times)
            job.rows.add("rates", what=f"{name} product, {size} cubed", TFLOPs=rate / 1e12)
            (job.options.work / f"rate_{name}").write_text(str(rate))
    with job.rows.attempt("rates", what="copy in memory"):
        block = torch.randn(job.sizes.product**2, device=DEVICE)
        target = torch.empty_like(block)
        seconds = took(lambda: target.copy_(block), times)
        job.rows.add("rates", what="copy in memory, bytes read and written", TBs=2 * block.nbytes / seconds / 1e12)
    with job.rows.attempt("machine", what="clips and encoder"):
        start = time.monotonic()
        assert job.place
        job.rows.add("machine", what="seconds to make clips and encoder", value=round(time.monotonic() - start, 1))


def measured_rate(job, precision):
    """Throughput as measured by `machine`, or measured now."""
    path = job.options.work / f"rate_{precision}"
    if path.is_file():
        return float(path.read_text())
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    return matrix_rate(kind, job.sizes.product, 10)


# ------------------------------------------------------------------------------------------------------------ the tests


class Outcomes:
    """A pytest plugin that writes rows."""

    def __init__(self, rows):
        self.rows, self.file, self.counts, self.reasons = rows, None, {}, collections.Counter()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        file = report.nodeid.split("::")[0]
        if file != self.file:
            self.finish()
            self.file, self.counts = file, dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.rows.add("failures", test=report.nodeid, error=report.longreprtext[-400:])
        elif report.outcome == "skipped":
            self.reasons[str(report.longrepr[2])] += 1

    def finish(self):
        if self.file:
            self.rows.add("outcomes", file=self.file, **self.counts)
        for why, count in self.reasons.items():
            self.rows.add("left out", file=self.file, tests=count, why=why)
        self.reasons.clear()


def tests(job):
    """Run the tests that take another code path on a GPU."""
    import pytest

    outcomes = Outcomes(job.rows)
    words = ["-q", "-p", "no:cacheprovider", "--durations=10", "-m", "not slow", *TEST_FILES]
    if DEVICE == "cuda":
        # What the CPU computes has been tested elsewhere.
        words += ["-k", "not cpu"]
    elif job.options.tiny:
        words += ["-k", "not (hubert or wavlm or data2vec or killed)"]
    code = pytest.main(words, plugins=[outcomes])
    outcomes.finish()
    if code not in (0, 1):
        job.rows.add("failures", test="all", error=f"pytest ended with {code}")


# ------------------------------------------------------------------------------------------- steps of this package


class Ready(list):
    """A training set of batches in memory; also serves as its sampler."""

    epoch = 1
    start = 0
    batch_sampler = property(lambda self: self)

    def set_epoch(self, epoch):
        self.epoch = epoch


def make_brain(encoder, precision, batches, **changes):
    """Make a Brain from the YAML for wav2vec2-base, ready for steps."""
    hparams = training_benchmark.load_hparams(encoder, **changes)
    run = {"device": DEVICE, "precision": precision, "noprogressbar": True}
    brain = AccentBrain(modules=hparams["modules"], options=hparams["training"], hparams=hparams, run_opts=run)
    brain.train_sampler, brain._epochs, brain.step = batches, 1000, 1
    brain.on_fit_start()
    brain.modules.train()
    return brain


def read_batches(job, count, seconds=None, samples=None):
    """Make batches with the recipe's sampler; `samples` pads all clips to one length, for static shapes."""
    batches = Ready()
    for indices in training_benchmark.plan(job.clips, seconds or job.sizes.batch_seconds)[:count]:
        rows = [job.clips[index] for index in indices]
        waves = [codecs.read(row["wav"]) for row in rows]
        batch = collate(
            [(row["ID"], wave, index % 3) for index, (row, wave) in enumerate(zip(rows, waves, strict=True))]
        )
        batches.append(batch if DEVICE == "cpu" else batch.pin_memory())
    return batches


def static_batches(job, count):
    """Make batches of one shape: clips of similar length, padded to the longest."""
    lengths = np.array([round(row["duration"] * SAMPLE_RATE) for row in job.clips])
    longest = int(np.quantile(lengths, 0.6))
    near = np.flatnonzero(lengths <= longest)
    near = near[np.argsort(-lengths[near])][: len(near) // 3]
    size = max(2, int(job.sizes.batch_seconds * SAMPLE_RATE / longest))
    batches = Ready()
    for number in range(count):
        rows = [job.clips[near[(number * size + place) % len(near)]] for place in range(size)]
        wavs = torch.zeros(size, longest)
        for row, clip in zip(wavs, rows, strict=True):
            wave = codecs.read(clip["wav"])
            row[: len(wave)] = torch.from_numpy(wave)
        lens = torch.tensor([round(row["duration"] * SAMPLE_RATE) / longest for row in rows])
        batch = Batch(tuple(row["ID"] for row in rows), wavs, lens, torch.arange(size) % 3)
        batches.append(batch if DEVICE == "cpu" else batch.pin_memory())
    return batches


def seconds_in(batches):
    """Seconds of audio, without padding."""
    total = 0.0
    for batch in batches:
        shares = len(batch) if batch.wav_lens is None else float(batch.wav_lens.sum())
        total += shares * batch.wavs.shape[1] / SAMPLE_RATE
    return total


def do_steps(brain, batches):
    """Seconds of a step on each batch."""
    synchronize()
    start = time.perf_counter()
    for batch in batches:
        brain.fit_batch(batch)
    synchronize()
    return time.perf_counter() - start


def compare_steps(job, table, what, base, changed, base_batches, changed_batches=None):
    """Run steps of two Brains in turns, and write the speed-up of the second."""
    changed_batches = changed_batches or base_batches
    do_steps(base, base_batches)
    start = time.perf_counter()
    do_steps(changed, changed_batches[:1])
    first = time.perf_counter() - start
    do_steps(changed, changed_batches)
    speeds = [], []
    for _ in range(job.sizes.rounds):
        speeds[0].append(seconds_in(base_batches) / do_steps(base, base_batches))
        speeds[1].append(seconds_in(changed_batches) / do_steps(changed, changed_batches))
    ratios = [new / old for old, new in zip(*speeds, strict=True)]
    job.rows.add(
        table,
        what=what,
        without=statistics.median(speeds[0]),
        with_it=statistics.median(speeds[1]),
        times_as_fast=statistics.median(ratios),
        least_to_most=spread(ratios),
        first_step_s=first,
    )


# ------------------------------------------------------------------------------------------------------------- memory


def memory(job):
    """Measure whether the default YAML fits on a GPU of 16 GB, and the largest batch that fits."""
    if DEVICE == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / total))
        limit = f"PyTorch's allocator limited to {CARD_BYTES / GIB:g} GiB of {total / GIB:.0f}"
    else:
        limit = "none: no GPU"
    job.rows.add("limit", value=limit)
    precisions = ("fp16", "bf16") if DEVICE == "cuda" else ("fp32", "bf16")
    tiny = {"batch_seconds": job.sizes.batch_seconds, "max_seconds": 4.0} if job.options.tiny else {}
    for precision in precisions:
        for checkpointing in (False, True):
            what = {"precision": precision, "gradient_checkpointing": checkpointing}
            with job.rows.attempt("wav2vec2_base.yaml", **what):
                if DEVICE == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                try:
                    found = memory_benchmark.train(
                        *(ROOT / "hparams/wav2vec2_base.yaml", precision, 10 if DEVICE == "cuda" else 1),
                        shape=job.sizes.shape, gradient_checkpointing=checkpointing, **tiny,
                    )  # fmt: skip
                except torch.cuda.OutOfMemoryError as error:
                    job.rows.add("wav2vec2_base.yaml", **what, fits=False, why=str(error)[:200])
                    continue
                cells = {"fits": True, "batch_s": found["batch_seconds"], "peak_GiB": found["peak"] / GIB}
                if DEVICE == "cuda":
                    cells["reserved_GiB"] = torch.cuda.max_memory_reserved() / GIB
                job.rows.add("wav2vec2_base.yaml", **what, **cells)
    for precision in precisions:
        with job.rows.attempt("largest batch", precision=precision):
            find_largest_batches(job, precision)


def find_largest_batches(job, precision):
    """Find the largest batch that fits, in seconds of audio, for clips of usual and of maximum length."""
    brain = make_brain(job.place / "encoder", precision, Ready([None]))

    def fits(seconds, length):
        count = max(1, int(seconds / length))
        batch = Batch(
            tuple(map(str, range(count))),
            torch.randn(count, int(length * SAMPLE_RATE)),
            torch.linspace(0.95, 1.0, count),
            torch.arange(count) % 3,
        )
        try:
            do_steps(brain, [batch] * 2)
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            brain.optimizer.zero_grad(set_to_none=True)
            # Where it was cut off, it would wait for the rest of that step.
            if brain.scaler.is_enabled():
                brain.scaler._per_optimizer_states.clear()
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()

    for length in (5.4, 20.0) if DEVICE == "cuda" else (2.0,):
        low, high = 0.0, max(length, job.sizes.batch_seconds)
        while high <= job.sizes.largest_batch and fits(high, length):
            low, high = high, 2 * high
        # To a clip, or to a twentieth.
        while high - low > max(length, low / 20) and high <= job.sizes.largest_batch:
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle, length) else (low, middle)
        more = ", and more was not tried" if high > job.sizes.largest_batch else ""
        job.rows.add("largest batch", precision=precision, clip_s=length, batch_s=f"{low:.0f}{more}")


# ----------------------------------------------------------------------------------------------------------- training


def training(job):
    """Compare with transformers and SpeechBrain: at their defaults, in the same precision, with the same batches."""
    precision = half()
    tables = {
        "each at its defaults": {"precision": None},
        f"all in {precision}": {"precision": precision},
        f"all in {precision}, the same batches": {"precision": precision, "same_batches": True},
    }
    if job.options.tiny:
        # Three processes more for nothing that the others do not rehearse.
        del tables[f"all in {precision}"]
    for table, changes in tables.items():
        with job.rows.attempt(table):
            take_turns(job, table, training_benchmark.PEERS, **changes)
    with job.rows.attempt("profile of one step"):
        profile(job, precision)


def take_turns(job, table, peers, precision, same_batches=False):
    """Write the measurements of `benchmarks/training.py`."""
    log = job.options.work / f"peers_{len(list(job.options.work.glob('peers_*')))}.log"
    options = SimpleNamespace(
        peers=list(peers), precision=precision, same_batches=same_batches, batch_seconds=job.sizes.batch_seconds,
        turn=job.sizes.turn, turns=job.sizes.turns, log=str(log),
    )  # fmt: skip
    warm_up = 2 if DEVICE == "cuda" else 1
    found, ended = training_benchmark.take_turns(job.place, options, warm_up, time.monotonic() + job.sizes.seconds)
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    print(said, file=sys.stderr)
    own = precision or devices.fastest_precision(DEVICE)
    for name, row in training_benchmark.summarise(found).items():
        cells = {"audio_s_per_s": row["speed"], "least_to_most": spread((row["least"], row["most"]))}
        if "ratio" in row:
            cells |= {"ours_to_it": row["ratio"], "of_each_turn": spread(row["ratios"])}
        cells |= {"waits_for_data": row["loading"], "peak_GiB": row["memory"] / GIB, "turns": row["turns"]}
        if name not in ("transformers", "speechbrain"):
            rate = row["speed"] * operations_per_second(job) / measured_rate(job, own)
            cells |= {"share_of_matrix_rate": rate}
        job.rows.add(table, peer=name, **cells)
    for name in ended:
        job.rows.add(table, peer=name, error=f"it ended: {said[-300:]}")


def operations(config, samples):
    """Operations of a training step for one clip; see the head of this file."""
    frames, channels, frozen = samples, 1, 0
    for width, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        frozen += 2 * frames * kernel * channels * width
        channels = width
    width = config.hidden_size
    trained = 2 * frames * channels * width
    trained += 2 * frames * width * (width // config.num_conv_pos_embedding_groups) * config.num_conv_pos_embeddings
    layer = 8 * frames * width**2 + 4 * frames * width * config.intermediate_size + 4 * frames**2 * width
    return frozen + 3 * (trained + config.num_hidden_layers * layer)


def operations_per_second(job):
    """Mean operations per second of audio over the clips."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.place / "encoder")
    clips = [round(row["duration"] * SAMPLE_RATE) for row in job.clips]
    return sum(operations(config, samples) for samples in clips) / (sum(clips) / SAMPLE_RATE)


def profile(job, precision):
    """Write the ten slowest kernels of a step, and the fraction of its time in which any kernel runs."""
    batches = read_batches(job, job.sizes.batches)
    brain = make_brain(job.place / "encoder", precision, batches)
    do_steps(brain, batches)
    seconds = do_steps(brain, batches) / len(batches)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (DEVICE == "cuda")
    middle = batches[len(batches) // 2]
    with torch.profiler.profile(activities=kinds) as profiler:
        do_steps(brain, [middle])
    events = profiler.key_averages()
    if DEVICE == "cuda":
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    spent = {
        id(event): event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total for event in events
    }
    whole = sum(spent.values())
    job.rows.add(
        "step",
        precision=precision,
        ms_per_step=1e3 * seconds,
        ms_of_kernels=whole / 1e3,
        kernels=sum(event.count for event in events),
        clips=len(middle),
        audio_s=seconds_in([middle]),
    )
    for event in sorted(events, key=lambda event: -spent[id(event)])[:10]:
        share = spent[id(event)] / whole
        job.rows.add(
            "profile of one step", kernel=event.key[:120], calls=event.count, ms=spent[id(event)] / 1e3, share=share
        )


# ------------------------------------------------------------------------------------------------------------- levers


class PlainAdamW(torch.optim.AdamW):
    """Unfused AdamW, which cannot skip a step by itself."""

    def step(self, closure=None):
        self.found_inf = self.grad_scale = None
        return super().step(closure)


def without_fused(brain):
    groups = [{**group, "fused": False, "foreach": True} for group in brain.optimizer.param_groups]
    brain.optimizer = PlainAdamW(groups)


def convolve_channels_last(conv, inputs):
    """A convolution over time as a channels-last convolution over an image of one row."""
    weight = conv.weight.unsqueeze(2).to(memory_format=torch.channels_last)
    image = inputs.unsqueeze(2).to(memory_format=torch.channels_last)
    return torch.nn.functional.conv2d(image, weight, conv.bias, (1, conv.stride[0])).squeeze(2)


def channels_last(brain):
    convolutions = brain._model().wav2vec2.feature_encoder
    # Otherwise they would be matrix products.
    convolutions.as_products = False
    for layer in convolutions.conv_layers:
        layer.conv.forward = functools.partial(convolve_channels_last, layer.conv)


def levers(job):
    """Compare single changes with the default, in turns."""
    precision, table = half(), "steps"
    batches = read_batches(job, job.sizes.batches)
    encoder = job.place / "encoder"
    base = make_brain(encoder, precision, batches)
    other = {"bf16": "fp16", "fp16": "fp32"}[precision] if DEVICE == "cuda" else "fp32"
    changes = [
        (f"{other} in place of {precision}" + ", with GradScaler" * (other == "fp16"), other, {}, None),
        ("AdamW that is not fused", precision, {}, without_fused),
        ("convolutions with channels last", precision, {}, channels_last),
        ("gradient checkpointing", precision, {"gradient_checkpointing": True}, None),
        ("no dropout in the encoder", precision, {"config_overrides": dict.fromkeys(_DROPOUTS, 0.0)}, None),
    ]
    for what, kind, yaml, change in changes:
        with job.rows.attempt(table, what=what):
            brain = make_brain(encoder, kind, batches, **yaml)
            if change is not None:
                change(brain)
            compare_steps(job, table, what, base, brain, batches)
            del brain
    with job.rows.attempt(table, what="fp32 with TF32 in place of fp32 without"):
        brain = make_brain(encoder, "fp32", batches)
        speeds = []
        for matrices in ("highest", "high"):
            torch.set_float32_matmul_precision(matrices)
            torch.backends.cudnn.allow_tf32 = matrices == "high"
            do_steps(brain, batches)
            speeds.append(seconds_in(batches) / do_steps(brain, batches))
        cells = {"without": speeds[0], "with_it": speeds[1], "times_as_fast": speeds[1] / speeds[0]}
        job.rows.add(table, what="fp32 with TF32 in place of fp32 without", **cells)
        torch.set_float32_matmul_precision("highest")
    del base
    with job.rows.attempt("batch_seconds"):
        for times in (0.25, 0.5, 1, 2, 4):
            seconds = times * job.sizes.batch_seconds
            larger = read_batches(job, job.sizes.batches, seconds)
            brain = make_brain(encoder, precision, larger)
            do_steps(brain, larger)
            cells = {"audio_s_per_s": seconds_in(larger) / do_steps(brain, larger), "peak_GiB": peak_and_reset()}
            job.rows.add("batch_seconds", batch_seconds=seconds, **cells)
            del brain
    with job.rows.attempt("num_workers"):
        peers = ["workers_1"] if job.options.tiny else ["accent_plugin", *map("workers_{}".format, (0, 1, 4, 8))]
        take_turns(job, "num_workers", peers, precision)


_DROPOUTS = ("hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout")


def peak_and_reset():
    """Peak memory since the last call."""
    found = devices.peak_memory(DEVICE) / GIB
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return found


# ---------------------------------------------------------------------------------------------- packed sequences


def attend_packed(query, key, value, ends, longest, scale=None):
    """Attention within each of several concatenated sequences: (frames, heads, features) tensors."""
    if DEVICE == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale)
    # There is no such kernel; for the rehearsal.
    parts = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        own = (one[start:end].transpose(0, 1) for one in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*own, scale=scale).transpose(0, 1))
    return torch.cat(parts)


class Packing:
    """Indices of the valid frames of a batch; computed on the host, before the step."""

    # That of the batch which is being encoded.
    now = None

    def __init__(self, counts, frames):
        counts = torch.tensor(counts)
        valid = torch.arange(frames) < counts[:, None]
        self.rows = valid.flatten().nonzero().squeeze(1).to(DEVICE)
        self.ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32).to(DEVICE)
        self.longest = int(counts.max())


def attend_packed_inside(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **keywords):
    """Attention with Hugging Face's interface; frames are packed before and unpacked after it."""
    (batch, heads, frames, width), packing = query.shape, Packing.now
    packed = (one.transpose(1, 2).flatten(0, 1).index_select(0, packing.rows) for one in (query, key, value))
    output = attend_packed(*packed, packing.ends, packing.longest, scaling)
    whole = output.new_zeros(batch * frames, heads, width).index_copy(0, packing.rows, output)
    return whole.view(batch, frames, heads, width), None


def attention(job):
    """Measure attention alone at the encoder's shape, and steps with it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.place / "encoder")
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    batches = read_batches(job, job.sizes.batches)
    encoder = make_brain(job.place / "encoder", half(), batches)._model().wav2vec2
    counts = [frames_of(encoder, batch) for batch in batches]
    middle = sorted(counts, key=max)[len(counts) // 2]
    shapes = {"a usual batch": middle, "clips of 20 s": [999, 980, 940]} if DEVICE == "cuda" else {"a batch": middle}
    for name, frames in shapes.items():
        attention_alone(job, name, frames, heads, width)
    attention_in_steps(job, encoder, batches, counts)


def frames_of(encoder, batch):
    """Frames of each clip."""
    shares = [1.0] * len(batch) if batch.wav_lens is None else batch.wav_lens.tolist()
    return [encoder.frame_counts(round(share * batch.wavs.shape[1])) for share in shares]


def attention_alone(job, name, counts, heads, width):
    """Measure the forward and backward pass of one layer's attention in all implementations."""
    kind = torch.bfloat16 if half() == "bf16" else torch.float16
    frames, attend = max(counts), torch.nn.functional.scaled_dot_product_attention
    valid = (torch.arange(frames) < torch.tensor(counts)[:, None]).to(DEVICE)
    mask = valid[:, None, None, :].expand(-1, 1, frames, -1).contiguous()
    own = [torch.randn(len(counts), heads, frames, width, device=DEVICE, dtype=kind) for _ in range(3)]
    packing = Packing(counts, frames)
    packed = [one.transpose(1, 2).flatten(0, 1)[packing.rows] for one in own]

    def jagged(query, key, value):
        lay = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=packing.ends.long())
        return attend(*(lay(one).transpose(1, 2) for one in (query, key, value))).transpose(1, 2).values()

    ways = {
        "padded, masked (as it is)": (lambda *parts: attend(*parts, attn_mask=mask), own),
        "padded, masked, dropout": (lambda *parts: attend(*parts, attn_mask=mask, dropout_p=0.1), own),
        "padded, no mask (wrong, the bound)": (attend, own),
        "packed, varlen_attn": (lambda *parts: attend_packed(*parts, packing.ends, packing.longest), packed),
        "packed, nested tensor": (jagged, packed),
    }
    exact = attend(*own, attn_mask=mask).transpose(1, 2).flatten(0, 1)[packing.rows]
    useful = 3.5 * 4 * sum(count**2 for count in counts) * heads * width
    for way, (function, parts) in ways.items():
        with job.rows.attempt("one layer", shape=name, way=way):
            parts = [one.detach().clone().requires_grad_() for one in parts]
            cells = {}
            if parts[0].ndim == 3:
                cells["differs_by"] = float((function(*parts) - exact).abs().max())

            def both(parts=parts, function=function):
                for one in parts:
                    one.grad = None
                function(*parts).sum().backward()

            often = {"times": 10, "in_a_row": 10} if DEVICE == "cuda" else {"times": 3}
            seconds = took(both, **often)
            forward = took(lambda parts=parts, function=function: function(*parts), **often)
            cells |= {"forward_ms": 1e3 * forward, "both_ms": 1e3 * seconds, "TFLOPs": useful / seconds / 1e12}
            job.rows.add("one layer", shape=name, way=way, **cells)


def attention_in_steps(job, encoder, batches, counts):
    """Compare whole steps with and without packed attention, both without dropout of attention weights."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("packed", attend_packed_inside)
    AttentionMaskInterface.register("packed", lambda **keywords: None)
    still, table = {"config_overrides": {"attention_dropout": 0.0}}, "steps"
    with job.rows.attempt(table, what="packed attention"):
        base, changed = (make_brain(job.place / "encoder", half(), batches, **still) for _ in range(2))
        changed.modules.load_state_dict(base.modules.state_dict())
        changed._model().wav2vec2.model.set_attn_implementation("packed")
        fit_batch = changed.fit_batch
        known = {batch.ids: Packing(own, max(own)) for batch, own in zip(batches, counts, strict=True)}

        def pack(batch):
            Packing.now = known[batch.ids]
            return fit_batch(batch)

        changed.fit_batch = pack
        # The control attends to the padding.
        padding = [max(own) * len(own) - sum(own) for own in counts]
        batch, rows = batches[int(np.argmax(padding))], counts[int(np.argmax(padding))]
        ways = {"padded": (base, None), "packed": (changed, known[batch.ids])}
        ways["control"] = changed, Packing([max(rows)] * len(rows), max(rows))
        found = {name: encode_with(brain, batch, packing) for name, (brain, packing) in ways.items()}
        for name in ("packed", "control"):
            difference = (found[name] - found["padded"]).norm() / found["padded"].norm()
            job.rows.add("correctness", what=name, frames_differ_by=float(difference))
        compare_steps(job, table, "packed attention", base, changed, batches)


def encode_with(brain, batch, packing):
    """Number of valid frames of a batch."""
    Packing.now, encoder = packing, brain._model().wav2vec2.eval()
    batch = batch.to(DEVICE)
    with torch.no_grad(), brain.training_ctx:
        frames, valid = encoder(batch.wavs, batch.wav_lens)
    encoder.train()
    return frames[valid].float()


# ---------------------------------------------------------------------------------------------------------- compiling


def compile(job):
    """Measure a CUDA graph of a step, and torch.compile, on batches of one shape; dropout is unchanged."""
    precision, encoder = half(), job.place / "encoder"
    usual, static = read_batches(job, job.sizes.batches), static_batches(job, job.sizes.batches)
    base = make_brain(encoder, precision, usual)
    table = "steps"
    with job.rows.attempt(table, what="static shapes alone"):
        compare_steps(job, table, "static shapes alone (beside usual batches)", base, base, usual, static)
    with job.rows.attempt(table, what="CUDA graph of forward and backward pass"):
        if DEVICE == "cuda":
            recorded = make_brain(encoder, precision, static)
            record(recorded, static[0])
            compare_steps(job, table, "CUDA graph of forward and backward pass", base, recorded, static)
            del recorded
        else:
            job.rows.add(table, what="CUDA graph of forward and backward pass", note="needs a GPU")
    ways = {
        "torch.compile, static shapes": {"dynamic": False},
        "torch.compile, reduce-overhead (CUDA graphs)": {"dynamic": False, "mode": "reduce-overhead"},
        "torch.compile, dynamic shapes, usual batches": {"dynamic": True},
    }
    if job.options.tiny:
        # Tracing takes half a minute already; the code that is generated then would take minutes on a CPU.
        ways = {"torch.compile, traced alone": {"dynamic": False, "backend": "aot_eager"}}
    for what, how in ways.items():
        # A compilation that is cut off says nothing.
        if not job.has(20):
            job.rows.add(table, what=what, note="not run: out of time")
            continue
        with job.rows.attempt(table, what=what):
            torch.compiler.reset()
            batches = usual if how["dynamic"] else static
            brain = make_brain(encoder, precision, batches)
            brain.modules["model"] = torch.compile(brain.modules.model, **how)
            compare_steps(job, table, what, base, brain, batches)
            del brain


def record(brain, example):
    """Make a Brain replay a CUDA graph of the forward and backward pass; all batches need the same shape."""
    held = example.to(DEVICE)
    fixed = dataclasses.replace(
        held, wavs=held.wavs.clone(), wav_lens=held.wav_lens.clone(), labels=held.labels.clone()
    )
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[half()]

    def forward_and_backward():
        # Outside the Brain's own context: weights that it keeps in bf16 must not outlive the recording.
        with torch.autocast("cuda", kind, cache_enabled=False):
            scores = brain.modules.model(fixed.wavs, fixed.wav_lens)
            loss = torch.nn.functional.cross_entropy(scores.float(), fixed.labels, reduction="sum")
        brain.scaler.scale(loss).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            brain.optimizer.zero_grad(set_to_none=True)
            forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    brain.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_and_backward()
    # The graph writes into these; a step must not drop them.
    brain.optimizer.zero_grad = lambda set_to_none=True: None

    def fit_batch(batch):
        for name in ("wavs", "wav_lens", "labels"):
            getattr(fixed, name).copy_(getattr(batch, name), non_blocking=True)
        graph.replay()
        brain._window += len(batch)
        brain._set_learning_rates(0.5)
        brain.optimizers_step()

    brain.fit_batch = fit_batch


# ---------------------------------------------------------------------------------------------------------- inference


def inference(job):
    """Compare classification of files with transformers' pipeline, and measure the network alone."""
    import inference as inference_benchmark
    from transformers import pipeline

    from accent_plugin.inference.classifier import AccentClassifier

    folder = bundle_folder(job)
    paths = [Path(row["wav"]) for row in job.clips[: job.sizes.files]]
    seconds = sum(row["duration"] for row in job.clips[: job.sizes.files])
    decoded = {path: inference_benchmark.decoded(path) for path in paths}
    running = {}

    def add_pipeline(what, size, kind=torch.float32):
        with job.rows.attempt("files", what=what):
            pipe = pipeline("audio-classification", model=str(folder / "hf"), device=DEVICE, dtype=kind)
            copies = lambda some: (dict(decoded[path]) for path in some)  # noqa: E731
            running[what] = lambda some: list(pipe(copies(some), batch_size=size))

    def add_ours(what, precision, batch):
        with job.rows.attempt("files", what=what):
            ours = AccentClassifier.from_bundle(folder / "bundle", device=DEVICE, precision=precision)
            running[what] = lambda some: list(ours.predict_files(some, batch_seconds=batch))

    add_pipeline("transformers pipeline, defaults, audio decoded already", 1)
    add_pipeline("transformers pipeline, batches of 8", 8)
    add_pipeline("transformers pipeline, batches of 32", 32)
    if DEVICE == "cuda":
        add_pipeline("transformers pipeline, fp16, batches of 32", 32, torch.float16)
    add_ours("accent_plugin, fp32", "fp32", None)
    add_ours("accent_plugin, bf16", "bf16", None)
    add_ours("accent_plugin, bf16, batches of 600 s", "bf16", 600.0)
    with job.rows.attempt("files"):
        found = inference_benchmark.in_turns(running, paths, max(1, len(paths) // 4))
        for what, times in found.items():
            cells = {"files_per_s": len(paths) / sum(times), "audio_s_per_s": seconds / sum(times)}
            job.rows.add("files", what=what, **cells, to_the_pipeline=inference_benchmark.ratios(found, what))
    network_alone(job, folder)


def bundle_folder(job):
    """Write a Hugging Face checkpoint and a bundle of the same encoder."""
    import inference as inference_benchmark

    folder = job.options.work / "bundles"
    if not (folder / "bundle").is_dir():
        folder.mkdir(exist_ok=True)
        inference_benchmark.make(folder, **job.sizes.shape)
    return folder


def network_alone(job, folder):
    """Measure the network on clips of 5.4 s in device memory, by precision and batch size."""
    from accent_plugin.bundle.load import load_bundle

    model = load_bundle(folder / "bundle").modules["embedding_model"].model.to(DEVICE).eval()
    kinds = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    for size in (1, 8, 32, 128) if DEVICE == "cuda" else (1, 2):
        wavs = torch.randn(size, int(5.4 * SAMPLE_RATE), device=DEVICE)
        lens = torch.linspace(0.9, 1.0, size, device=DEVICE) if size > 1 else None
        for precision, kind in kinds.items():
            with job.rows.attempt("network alone", clips=size, precision=precision):
                autocast = torch.autocast(DEVICE, kind, enabled=kind is not None)
                with torch.inference_mode(), autocast:
                    seconds = took(
                        lambda wavs=wavs, lens=lens: model.wav2vec2(wavs, lens), 10 if DEVICE == "cuda" else 1, 2
                    )
                job.rows.add("network alone", clips=size, precision=precision, clips_per_s=size / seconds)


def serving(job):
    """Measure concurrent requests of one file each with and without dynamic batching, without the HTTP server."""
    from accent_plugin.inference.classifier import AccentClassifier

    bundle = bundle_folder(job) / "bundle"
    paths = [row["wav"] for row in job.clips[: job.sizes.files]]
    for precision in ("fp32", "auto"):
        with job.rows.attempt("requests", precision=precision), ThreadPoolExecutor(AT_ONCE) as clients:
            ways = {"alone": {"batch_seconds": 0.01}, "together": {}}
            ways = {
                name: AccentClassifier.from_bundle(bundle, device=DEVICE, precision=precision, **how)
                for name, how in ways.items()
            }
            sharing = {name: classifier.enable_batching() for name, classifier in ways.items()}
            speeds, answers = {name: [] for name in ways}, {}
            for turn in range(1 + (3 if DEVICE == "cuda" else 1)):
                for name, classifier in ways.items():
                    start = time.perf_counter()
                    answers[name] = [one.probabilities for one in clients.map(classifier.predict_file, paths)]
                    if turn:
                        speeds[name].append(len(paths) / (time.perf_counter() - start))
            pairs = zip(*answers.values(), strict=True)
            most = max(abs(one[label] - other[label]) for one, other in pairs for label in one)
            for name, values in speeds.items():
                ratios = [own / alone for own, alone in zip(values, speeds["alone"], strict=True)]
                job.rows.add(
                    "requests", precision=precision, way=name, at_once=AT_ONCE, per_s=statistics.median(values),
                    times_alone=statistics.median(ratios), least_to_most=spread(ratios),
                    windows_a_batch=sharing[name].windows / max(1, sharing[name].calls), answers_differ_by=most,
                )  # fmt: skip
            for one in sharing.values():
                one.close()


# --------------------------------------------------------------------------------------------------------- end to end


def end_to_end(job):
    """Fine-tune a pretrained encoder in five folds with the command that a user would type."""
    data, encoder = job.options.data, job.options.encoder
    more = ["--number_of_epochs", "15", "--lr_encoder", "0.0001", "--lr_head", "0.001"]
    more += ["--balance", "none", "--class_weights", "balanced", "--valid_fraction", "0.15", "--num_workers", "4"]
    if data is None or encoder is None:
        if not job.options.tiny:
            job.rows.add("folds", note="not run: give --data and --encoder")
            return
        data, encoder = make_rehearsal(job)
    if job.options.tiny:
        more += ["--number_of_epochs", "1", "--num_workers", "0", "--fold", "1", "--valid_fraction", "0.25"]
    out = job.options.work / "end_to_end"
    words = [sys.executable, "recipes/CommonVoiceAccent/train.py", "hparams/moonshine_tiny.yaml"]
    words += ["--data_folder", str(data), "--wav2vec2_hub", str(encoder), "--n_folds", "5", *more, "--noprogressbar"]
    words += ["--prepared_folder", str(job.options.work / "prepared"), "--output_folder", str(out)]
    words += ["--device", DEVICE]
    job.rows.add("command", value=" ".join(["python", *words[1:]]))
    started, told = time.monotonic(), set()
    trained = subprocess.Popen(words, cwd=ROOT, stdout=sys.stderr)
    while True:
        code = trained.poll()
        for path in sorted(out.glob("**/report/metrics.json")):
            if path not in told:
                told.add(path)
                tell_metrics(job, path, time.monotonic() - started)
        if code is not None:
            break
        time.sleep(0.5)
    if code:
        job.rows.add("folds", what="train.py", error=f"exit code {code}")


def tell_metrics(job, path, seconds):
    """Write the figures of a report."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    what = path.parents[1].name
    cells = {"fold": "all" if what == "end_to_end" else what, "after_s": seconds, "clips": metrics["data"]["clips"]}
    for unit in ("clip", "speaker"):
        found = metrics[unit]["unweighted_average_recall"]
        cells[f"recall_by_{unit}"] = found["value"]
        cells[f"interval_by_{unit}"] = f"{found['low']:.3f} to {found['high']:.3f}"
    job.rows.add("folds", **cells)


def make_rehearsal(job):
    """Make a DatasetDict of noise and a tiny encoder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import dataset_dicts, encoders

    accents = ("us", "england", "australia")
    tables = dataset_dicts.three_splits(accents, clients=(6, 2, 2))
    data = dataset_dicts.save(job.options.work / "noise", **tables)
    return data, encoders.make("moonshine", job.options.work / "moonshine")


PARTS = {
    "machine": machine,
    "tests": tests,
    "memory": memory,
    "training": training,
    "levers": levers,
    "attention": attention,
    "compile": compile,
    "inference": inference,
    "serving": serving,
    "end_to_end": end_to_end,
}
