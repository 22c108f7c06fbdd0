"""Which precision a device computes fastest in, and the memory that it needed."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from accent_plugin import devices
from accent_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def forget():
    """Devices are asked once per process; here they pretend to be others."""
    devices.bf16_is_faster.cache_clear()
    yield
    devices.bf16_is_faster.cache_clear()


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp16(native, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert devices.fastest_precision("cuda:0") == devices.fastest_precision(torch.device("cuda")) == chosen


def test_the_probe_answers_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    assert devices.bf16_is_faster("cpu") in (True, False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(sys.platform == "win32", reason="its clock of a thread is too coarse")
@pytest.mark.parametrize(("seconds", "faster"), [(0.5, True), (0.79, True), (0.81, False), (2.0, False)])
def test_other_processes_do_not_decide_about_precision(seconds, faster, monkeypatch):
    """On a busy machine the wall clock goes on while a process waits; what it computed is what counts."""
    now = {"thread": 0.0, "wall": 0.0}

    def work(*_, **__):
        assert torch.get_num_threads() == 1
        bf16 = torch.is_autocast_enabled("cpu")
        now["thread"] += seconds if bf16 else 1.0
        now["wall"] += 1.0 if bf16 == faster else 0.01

    monkeypatch.setattr(devices.time, "thread_time", lambda: now["thread"])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(torch.nn.functional, "linear", work)
    monkeypatch.setattr(torch.nn.functional, "conv1d", work)
    threads = torch.get_num_threads()
    assert devices.fastest_precision("cpu") == ("bf16" if faster else "fp32")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("device", ["mps", "xpu:1", "meta"])
def test_of_other_devices_nothing_is_assumed(device):
    assert devices.fastest_precision(device) == "fp32"


def test_peak_memory_by_system(monkeypatch, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows does not have it")
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 9000 kB\nVmHWM:\t    3000 kB\n")
    monkeypatch.setattr(devices, "_STATUS", status)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(sys, "platform", "linux")
    assert (devices.peak_memory("cpu"), devices.peak_memory("cuda:0")) == (3_072_000, 7)
    # A sandbox whose kernel does not tell, and one that has no such file.
    status.write_text("Name:\tpython\n")
    assert devices.peak_memory("cpu") == 5_120_000
    status.unlink()
    assert devices.peak_memory("cpu") == 5_120_000
    monkeypatch.setattr(sys, "platform", "darwin")
    assert devices.peak_memory(torch.device("cpu")) == 5000
    monkeypatch.setitem(sys.modules, "resource", None)
    assert devices.peak_memory("cpu") is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's figure is the process's own")
def test_the_memory_of_the_process_that_started_this_one_does_not_count():
    child = "from accent_plugin.devices import peak_memory; print(peak_memory('cpu'))"
    parent = f"import subprocess, sys; held = b'1' * 2_000_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    run = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    # Python with torch takes some 300 MB.
    assert 1e8 < int(run.stdout) < 1e9


def tf32():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_fp32_is_not_rounded_to_tf32_and_the_switches_are_put_back():
    import speechbrain  # noqa: F401, turns TF32 on

    torch.backends.cudnn.allow_tf32 = True
    before = tf32()
    with pytest.raises(ValueError, match="anything"), devices.exact_fp32():
        assert tf32() == (False, False)
        raise ValueError("anything")
    assert tf32() == before != (False, False)


def test_fp32_stays_exact_until_the_last_of_several_threads_is_done():
    torch.backends.cudnn.allow_tf32 = True
    before = tf32()
    first, second = devices.exact_fp32(), devices.exact_fp32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tf32() == (False, False)
    second.__exit__(None, None, None)
    assert tf32() == before != (False, False)


def test_a_card_that_pytorch_is_not_compiled_for_is_refused_although_it_has_memory(monkeypatch):
    def without_kernel(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore of it")

    monkeypatch.setattr(torch, "ones", without_kernel)
    with pytest.raises(ConfigError, match="'cuda:0' cannot be used here: CUDA error: no kernel image .* device;"):
        devices.require_device("cuda:0")


def test_each_core_has_an_item_of_its_own():
    """Threads that share an operation wait for each other; the caller's number of threads stays."""
    before, here = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        met = threading.Barrier(3, timeout=60)

        def work(item):
            met.wait()
            # PyTorch's threads are created by the first operation that uses them.
            return item, torch.ones(2**16).sum().item(), torch.get_num_threads(), threading.get_ident()

        found = devices.map_on_cores(work, [1, 2, 3])
        new = threading.Thread(target=lambda: here.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert [torch.get_num_threads(), *here] == [3, 3]
        assert [(item, total, threads) for item, total, threads, _ in found] == [(n, 2**16, 1) for n in (1, 2, 3)]
        assert threading.get_ident() not in {thread for *_, thread in found}
        with pytest.raises(ZeroDivisionError):
            devices.map_on_cores(lambda item: 1 / item, [1, 0])
        torch.set_num_threads(1)
        assert devices.map_on_cores(lambda item: threading.get_ident(), [1, 2]) == [threading.get_ident()] * 2
    finally:
        torch.set_num_threads(before)
