"""The NPU: on a simulated one, on none, and with the real torch_npu that has no CANN to load."""
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAKE_NPU, MODEL, run, write
from tone_speech import random_text, spoken, synthesize

# The simulated NPU is a device written in Python, which torch allows from 2.10 on.
needs_fake = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="torch before 2.10 has no Python device hook"
)


@pytest.fixture(scope="module")
def hello(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("audio") / "hello.wav", synthesize("こんにちは"))


def infer(*arguments: str, path: str = str(FAKE_NPU), **environment: str) -> subprocess.CompletedProcess:
    """Run inference.py with the simulated torch_npu importable."""
    environment = {"PYTHONPATH": path, **environment}
    return run("inference.py", "--model", MODEL, *arguments, environment=environment)


@needs_fake
@pytest.mark.parametrize("options", [[], ["--device", "npu"], ["--device", "npu:0"]], ids=str)
def test_the_npu_transcribes_in_float16(hello, options):
    result = infer("--audio", hello, *options)
    assert (result.returncode, result.stdout) == (0, "こんにちは\n")
    assert "on npu:0 in float16;" in result.stderr and result.stderr.count("\n") == 1


@needs_fake
def test_npu_and_cpu_give_the_same_text(tmp_path):
    import numpy as np

    text = random_text(np.random.default_rng(4), 90, 6)
    path = write(tmp_path / "long.flac", synthesize(text, 44_100), 44_100)
    result = infer("--audio", path, "--device", "npu", "--dtype", "float32", "--batch-size", "3")
    assert result.stdout.replace("\n", "") == spoken(text)


@needs_fake
def test_the_second_npu(hello):
    result = infer("--audio", hello, "--device", "npu:1", FAKE_NPU_COUNT="2")
    assert (result.returncode, result.stdout) == (0, "こんにちは\n") and "on npu:1 in" in result.stderr


FAULTS = {
    "missing": "torch_npu is not installed: install the torch-npu that goes with torch 2.",
    "cann": "(libhccl.so: cannot open shared object file: No such file or directory): source /usr/local/Ascend/",
    "driver": "(libascend_hal.so: cannot open shared object file: No such file or directory): mount the driver",
    "no-device": "no NPU is visible (ASCEND_RT_VISIBLE_DEVICES: 4,5): see what npu-smi info lists",
    "busy": "npu:0 does not start (Initialize:",
}


@needs_fake
@pytest.mark.parametrize("fault", FAULTS)
def test_an_npu_that_cannot_be_used(hello, fault):
    environment = {"FAKE_NPU_FAULT": fault, "ASCEND_RT_VISIBLE_DEVICES": "4,5"}
    asked = infer("--audio", hello, "--device", "npu", **environment)
    assert (asked.returncode, asked.stdout, asked.stderr.count("\n")) == (2, "", 1)
    assert asked.stderr.startswith("inference.py: error: --device npu: ") and FAULTS[fault] in asked.stderr
    default = infer("--audio", hello, **environment)
    assert (default.returncode, default.stdout) == (0, "こんにちは\n")
    warning, closing = default.stderr.splitlines()
    assert warning.startswith("inference.py: warning: running on the CPU, not on an NPU: ")
    assert FAULTS[fault] in warning and "on cpu in" in closing
    cpu = infer("--audio", hello, "--device", "cpu", **environment)
    assert (cpu.returncode, cpu.stdout, cpu.stderr.count("\n")) == (0, "こんにちは\n", 1)


@needs_fake
def test_an_index_out_of_range(hello):
    result = infer("--audio", hello, "--device", "npu:2", FAKE_NPU_COUNT="2")
    assert result.returncode == 2 and "npu:2 is out of range: npu:0 to npu:1 are visible" in result.stderr


@needs_fake
@pytest.mark.parametrize(
    "environment, words",
    [
        ({"FAKE_NPU_BYTES": "100"}, "npu:0 failed: NPU out of memory."),  # no room for the model
        ({"FAKE_NPU_BYTES": "700000"}, "a smaller --batch-size needs less"),  # no room for the batch
        ({"FAKE_NPU_FAULT": "lost"}, "npu:0 failed: NPU function error: aclrtSynchronizeStream, error code is 507018"),
    ],
)
def test_an_npu_that_fails_at_work(hello, environment, words):
    result = infer("--audio", hello, "--device", "npu", **environment)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert words in result.stderr


@needs_fake
def test_the_simulated_npu_refuses_what_a_real_one_refuses():
    code = """if True:
        import torch, torch_npu
        x = torch.ones(2, 2, device="npu")
        assert (x @ x + x.T).cpu().tolist() == [[3, 3], [3, 3]] and (x + 1).dtype is torch.float32
        assert torch.nn.Linear(2, 2).half().to("npu:0").float().weight.dtype is torch.float32
        for work, words in [
            (lambda: x + torch.ones(2, 2), "Expected all tensors to be on the same device"),
            (lambda: x.numpy(), "can't convert npu:0"),
            (lambda: torch.npu.set_device(1), "107001"),
        ]:
            try:
                work()
            except (RuntimeError, TypeError) as error:
                assert words in str(error), error
            else:
                raise AssertionError(words)
        torch.npu.synchronize()
        assert torch_npu.STATS["pending"] == 0
        y = x * 2
        assert torch_npu.STATS["pending"] == 1
    """
    environment = {**os.environ, "PYTHONPATH": str(FAKE_NPU), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@needs_fake
def test_a_token_takes_at_most_60_launches_and_a_wait_in_8_tokens():
    command = [sys.executable, "-c", "import benchmark_decode; benchmark_decode.count_launches()"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    ours, stock = (re.search(r": ([\d.]+) launches and ([\d.]+) waits", line).groups() for line in out.splitlines())
    assert float(ours[0]) <= 60 and float(ours[1]) <= 1 / 8
    assert float(stock[0]) >= 70 and float(stock[1]) == 2  # the simulated NPU does count


def test_no_cuda_device(hello):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    result = infer("--audio", hello, "--device", "cuda", path="")
    assert (result.returncode, result.stdout) == (2, "") and "sees 0 CUDA devices" in result.stderr


@pytest.fixture(scope="module")
def real_torch_npu(tmp_path_factory) -> str:
    """A folder with the wheel of torch-npu from the package index, which needs the torch of its own version."""
    version = torch.__version__.split("+")[0]
    if version != "2.13.0" or platform.machine() != "x86_64":
        pytest.skip("the wheel tested is torch-npu 2.13.0 for x86_64")
    folder = tmp_path_factory.mktemp("torch_npu")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"torch-npu=={version}"], check=True, capture_output=True)
    return str(folder)


def test_the_real_torch_npu_without_cann(hello, real_torch_npu):
    cpu = infer("--audio", hello, "--device", "cpu", path=real_torch_npu)
    assert (cpu.returncode, cpu.stdout, cpu.stderr.count("\n")) == (0, "こんにちは\n", 1)
    npu = infer("--audio", hello, "--device", "npu", path=real_torch_npu)
    assert (npu.returncode, npu.stdout, npu.stderr.count("\n")) == (2, "", 1)
    assert "torch_npu cannot load CANN (lib" in npu.stderr
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in npu.stderr
    default = infer("--audio", hello, path=real_torch_npu)
    assert (default.returncode, default.stdout) == (0, "こんにちは\n")
    assert "running on the CPU, not on an NPU: torch_npu cannot load CANN" in default.stderr
