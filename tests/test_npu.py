"""The NPU: on a simulated one, on none, and with the real torch_npu that has no CANN to load."""
import platform
import re
import subprocess
import sys

import common
import numpy as np
import pytest
import torch
from conftest import FAKE, FAKE_NPU, MODEL, TESTS, needs_fake, run, run_process, write
from tone_speech import random_text, spoken, synthesize


@pytest.fixture(scope="module")
def hello(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("audio") / "hello.wav", synthesize("こんにちは"))


def infer(*arguments: str, run=run, path: str = str(FAKE_NPU), **environment: str) -> subprocess.CompletedProcess:
    """Run inference.py with the simulated torch_npu importable."""
    environment = {"PYTHONPATH": path, **environment}
    return run("inference.py", "--model", MODEL, *arguments, environment=environment)


@needs_fake
def test_a_copy_of_a_process_does_what_a_new_one_does(hello):
    """All other tests that call run rely on it, those that count the lines of stderr too."""
    copy, new = (infer("--audio", hello, "-f", "srt", run=function) for function in (run, run_process))
    assert (copy.returncode, copy.stdout) == (new.returncode, new.stdout)
    times = re.compile(r"[\d.]+ times|[\d.]+ s")
    assert times.sub("", copy.stderr) == times.sub("", new.stderr)


@needs_fake
@pytest.mark.parametrize("options, device", [([], "npu:0"), (["--device", "npu:1"], "npu:1")])
def test_the_npu_transcribes_in_float16(hello, options, device):
    result = infer("--audio", hello, *options, FAKE_NPU_COUNT="2")
    assert (result.returncode, result.stdout) == (0, "こんにちは\n")
    loading, closing = result.stderr.splitlines()
    assert f"loading {MODEL} on {device} in float16" in loading and f"on {device} in float16, loaded in" in closing


FAULTS = {
    "missing": "torch_npu cannot be loaded (No module named 'torch_npu'): install the torch-npu that goes with torch",
    "cann": "(libhccl.so: cannot open shared object file: No such file or directory): source /usr/local/Ascend/",
    "driver": "(libascend_hal.so: cannot open shared object file: No such file or directory): mount the driver",
    "no-device": "no NPU is visible (ASCEND_RT_VISIBLE_DEVICES: 4,5): see what npu-smi info lists",
    "busy": "npu:0 does not start (Initialize:",
    "opp": "torch_npu cannot be loaded (ASCEND_OPP_PATH environment variable is not set. Please check whether the opp "
           "package has been installed. If exist, please run 'source set_env.sh' in the CANN installation path.): ",
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
    warning, loading, closing = default.stderr.splitlines()
    assert warning.startswith("inference.py: warning: no NPU here, so the CPU is used: ") and FAULTS[fault] in warning
    assert warning.endswith("; --device cpu leaves this line out") and "on cpu in" in loading and "on cpu in" in closing


@needs_fake
def test_the_cpu_asks_nothing_of_an_npu_that_cannot_be_loaded(hello):
    result = infer("--audio", hello, "--device", "cpu", FAKE_NPU_FAULT="opp")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (0, "こんにちは\n", 2)
    assert "NPU" not in result.stderr


@needs_fake
@pytest.mark.parametrize("device, environment, words", [
    ("npu:2", {"FAKE_NPU_COUNT": "2"}, "npu:2 is out of range: npu:0 to npu:1 are visible"),
    ("npu", {"FAKE_NPU_BYTES": "100"}, "npu:0 failed: NPU out of memory."),  # the model does not fit
    ("cuda:9", {}, f"sees {torch.cuda.device_count()} CUDA devices"),
])  # fmt: skip
def test_a_device_that_is_not_there_or_too_small_is_one_line(hello, device, environment, words):
    result = infer("--audio", hello, "--device", device, **environment)
    assert (result.returncode, result.stdout) == (2, "") and words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[str]:
    """Three files of one chunk each."""
    folder = tmp_path_factory.mktemp("three")
    return [write(folder / f"{text}.wav", synthesize(text)) for text in ("あさ", "ひる", "よる")]


@pytest.mark.parametrize("text", [
    "NPU out of memory. Tried to allocate 16.00 MiB (NPU 0; 29.50 GiB total capacity; 27.10 GiB already allocated)",
    "NPU out of memory. NPUWorkspaceAllocator tried to allocate 16.00 MiB(NPU 0; 29.50 GiB total capacity)",
    "NPU function error: aclrtMallocAlign32, error code is 207001\n[ERROR] ERR00100 PTA call acl api failed\n[Error]: "
    "Failed to apply for memory.",
    "call aclnnAddmm failed, detail:EL0004: [PID: 7] Failed to allocate memory requested by RUNTIME module.",
    "CUDA out of memory.",
])  # fmt: skip
def test_every_text_that_means_too_little_memory_is_known(text):
    """Whatever part of torch_npu or CANN says so."""
    with pytest.raises(common.OutOfMemoryError, match=f"cpu failed: {re.escape(text.splitlines()[0])}"), \
            common.device_errors(torch.device("cpu")):  # fmt: skip
        raise RuntimeError(text)


@needs_fake
def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    text = random_text(np.random.default_rng(5), 300, 6)
    path = write(tmp_path / "long.flac", synthesize(text))
    n_bytes = 2 * 128 * 3000 * 2 + 100  # the features of two chunks
    environment = {"FAKE_NPU_BYTES": str(n_bytes)}
    result = infer("--audio", path, "--device", "npu", **environment)
    assert (result.returncode, result.stdout.replace("\n", "")) == (0, spoken(text))
    _, warning, closing = result.stderr.splitlines()
    assert re.search("warning: npu:0 is out of memory in batches of 16: --batch-size [12] from here on$", warning)
    assert "1 recording, " in closing


@needs_fake
def test_an_error_that_shows_when_memory_is_freed_ends_the_run(three):
    code = "import sys, torch, common, inference; common.select_device('npu'); sys.argv[0] = 'inference.py'\n"
    code += "torch.npu.empty_cache = lambda: (_ for _ in ()).throw(RuntimeError('The Inner error is reported'))\n"
    code += "sys.exit(inference.main(sys.argv[1:]))"
    environment = FAKE | {"FAKE_NPU_BYTES": str(2 * 128 * 3000 * 2 + 100)}
    options = ["--model", MODEL, "--device", "npu", "--audio", *three]
    result = run("-c", code, *options, environment=environment)
    assert (result.returncode, result.stdout) == (2, "") and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("inference.py: error: npu:0 failed: The Inner error")


@needs_fake
def test_where_no_chunk_fits_the_run_ends(three):
    result = infer("--audio", *three, "--device", "npu", FAKE_NPU_BYTES="700000")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count(".wav: npu:0 failed: NPU out of memory.") == 3
    assert "not finished: 0;" in result.stderr


STREAM = "NPU function error: aclrtSynchronizeStream, error code is 507018"


@needs_fake
@pytest.mark.parametrize("fault, n_products, words", [  # in the first batch or, at 200, in the second
    ("stumble", 0, STREAM), ("stumble", 200, STREAM), ("lost", 200, STREAM),
    ("async", 200, "The Inner error is reported as above."),  # the task queue says it once and then gives old memory
])  # fmt: skip
def test_a_device_that_fails_ends_the_run(three, fault, n_products, words):
    """What comes back after a failure is never text, not even where the device seems to go on."""
    options = ["--device", "npu", "--batch-size", "1"]
    result = infer("--audio", *three, *options, FAKE_NPU_FAULT=fault, FAKE_NPU_AFTER=str(n_products))
    n_done = int(n_products > 0)
    assert result.returncode == 2 and result.stdout == f"{three[0]}\tあさ\n" * n_done
    _, failed, closing, left, error = result.stderr.splitlines()
    assert f"{three[n_done]}: npu:0 failed: {words}" in failed
    assert f"{n_done + 1} recording" in closing and ", 1 failed, " in closing
    assert "error: npu:0 failed: " in error and f"not finished: {2 - n_done}; the same command" in left


@needs_fake
def test_the_npu_computes_the_gelu_of_the_cpu():
    """F.gelu of torch_npu 2.9.0 is the tanh form; the encoder of the model has it in its layers and outside of them."""
    code = """if True:
        import sys, torch, common
        device = common.select_device("npu")
        import torch_npu
        torch.npu.conv.allow_hf32 = False
        states = []
        for where in (torch.device("cpu"), device):
            recognizer = common.load_model(sys.argv[1], where, torch.float32)
            features = common.extract_features(recognizer.extractor, common.sweep())
            with torch.inference_mode():
                states.append(common.encode(recognizer.model, features.to(where)).cpu())
        assert torch.equal(*states)
    """
    result = run("-c", code, MODEL, environment=FAKE)
    assert result.returncode == 0, result.stderr


@needs_fake
def test_a_file_that_is_in_the_failed_batch_is_not_delivered(three, tmp_path):
    """Not with the text of the chunks before the one that failed, and no file that shares its batch."""
    path = write(tmp_path / "long.flac", synthesize(random_text(np.random.default_rng(5), 300, 6)))
    options = ["--device", "npu", "--batch-size", "2", "--output-dir", tmp_path / "out"]
    result = infer("--audio", three[0], path, three[1], *options, FAKE_NPU_FAULT="stumble", FAKE_NPU_AFTER="900")
    assert result.returncode == 2 and "2 recordings, 1 failed, " in result.stderr
    assert result.stderr.count("inference.py: error: ") == 2 and "not finished: 1;" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["あさ.txt"]


@needs_fake
def test_a_token_takes_at_most_60_launches_and_a_wait_in_8_tokens():
    environment = {"PYTHONPATH": f"{FAKE_NPU}:{TESTS / 'benchmarks'}"}
    result = run("-c", "import decode; decode.count_launches()", environment=environment)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    ours, stock = (re.search(r": ([\d.]+) launches and ([\d.]+) waits", line).groups() for line in out.splitlines())
    assert float(ours[0]) <= 60 and float(ours[1]) <= 1 / 8
    assert float(stock[0]) >= 70 and float(stock[1]) == 2  # the simulated NPU does count


@pytest.fixture(scope="module")
def real_torch_npu(tmp_path_factory) -> str:
    """A folder with the wheel of torch-npu from the package index, which needs the torch of its own version."""
    version = torch.__version__.split("+")[0]
    if version != "2.13.0" or platform.machine() != "x86_64":
        pytest.skip("the wheel tested is torch-npu 2.13.0 for x86_64")
    folder = tmp_path_factory.mktemp("torch_npu")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    if subprocess.run([*command, f"torch-npu=={version}"], capture_output=True).returncode != 0:
        pytest.skip("the package index does not have torch-npu")
    return str(folder)


def test_the_real_torch_npu_without_cann(hello, real_torch_npu):
    npu = infer("--audio", hello, "--device", "npu", run=run_process, path=real_torch_npu)
    assert (npu.returncode, npu.stdout, npu.stderr.count("\n")) == (2, "", 1)
    assert "torch_npu cannot be loaded (lib" in npu.stderr
    assert "source /usr/local/Ascend/cann/set_env.sh (CANN 8.5 and later) or " in npu.stderr
    for options, warning in (["--device", "cpu"], ""), ([], "so the CPU is used: torch_npu cannot be loaded (lib"):
        result = infer("--audio", hello, *options, run=run_process, path=real_torch_npu)
        assert (result.returncode, result.stdout) == (0, "こんにちは\n") and warning in result.stderr
        assert result.stderr.count("\n") == (3 if warning else 2)
