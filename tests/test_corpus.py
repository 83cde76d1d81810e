"""Many files: several processes, and starting again after a stop."""
import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import common
import numpy as np
import pytest
from conftest import FAKE, MODEL, ROOT, needs_fake, options_of, run, write
from tone_speech import random_text, spoken, synthesize

import inference


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder with ten recordings of 1 to 10 s, and their texts by their names without extension."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    (folder / "deep").mkdir()
    texts = {f"{'deep/' * (i % 2)}{i}": random_text(rng, 2 + int(rng.integers(22))) for i in range(10)}
    for name, text in texts.items():
        write(folder / f"{name}.wav", synthesize(text))
    return folder, texts


def torchrun(
    *arguments: str, n_processes: int = 2, script: Path = ROOT / "inference.py", **environment: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    return subprocess.run(
        [*command, str(script), "--model", MODEL, *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


def lines_of(result: subprocess.CompletedProcess, rank: int) -> list[str]:
    """What one process said."""
    start = f"inference.py, rank {rank}: "
    return [line.removeprefix(start) for line in result.stderr.splitlines() if line.startswith(start)]


# --- several processes ---


def test_torchrun_transcribes_every_file_once(corpus, tmp_path):
    """What is no file, or one that has another name as well, is reported by one process alone."""
    folder, texts = corpus
    (tmp_path / "link.wav").symlink_to(folder / "0.wav")
    result = torchrun("--audio", "absent.wav", folder, tmp_path / "link.wav", "-o", tmp_path, "--device", "cpu")
    assert result.returncode == 1 and result.stderr.count("absent.wav: no such file") == 1
    assert result.stderr.count(f"link.wav is the same file as {folder}/0.wav, ") == 1
    *_, first, of_all = lines_of(result, 0)
    assert re.match(r"6 recordings, 1 failed, [\d.]+ s of audio in ", first) and "on cpu in" in first
    assert re.match(r"5 recordings, [\d.]+ s of audio in ", lines_of(result, 1)[-1])
    assert re.fullmatch(r"all processes: 11 recordings, 1 failed, ([\d.]+) s of audio in [\d.]+ s \([\d.]+ times real "
                        rf"time\); the files are in {tmp_path}", of_all)  # fmt: skip
    for name, text in texts.items():
        assert (tmp_path / f"{name}.txt").read_text() == f"{text}\n"
    result = torchrun(folder, "-o", tmp_path, "--device", "cpu")
    assert result.returncode == 1 and result.stderr.count("inference.py, ") == 1
    assert "rank 0: error: --output-dir" in result.stderr and "outputs are already there: 10, such as " in result.stderr


def test_a_recording_that_arrives_while_torchrun_s_processes_start_shifts_no_share(corpus, tmp_path):
    """The second process sees a file more than the first, which alone decides."""
    folder, texts = corpus
    seen = shutil.copytree(folder, tmp_path / "in")
    script = tmp_path / "late.py"
    script.write_text(f"import os, shutil, sys; sys.path.insert(0, {str(ROOT)!r}); import inference\n"
                      f"sys.argv[0] = 'inference.py'; find = inference.find_audio\n"
                      f"def find_later(arguments):\n"
                      f"    if os.environ['RANK'] == '1': shutil.copy({str(folder / '0.wav')!r}, '{seen}/00.wav')\n"
                      f"    return find(arguments)\n"
                      f"inference.find_audio = find_later; sys.exit(inference.main())")  # fmt: skip
    result = torchrun(seen, "-o", tmp_path / "out", "--device", "cpu", script=script)
    assert result.returncode == 0 and "all processes: 10 recordings, " in result.stderr, result.stderr
    assert len([*(tmp_path / "out").rglob("*.txt")]) == len(texts)


@needs_fake
def test_several_processes_share_an_npu(corpus, tmp_path):
    folder, texts = corpus
    result = torchrun("--audio", folder, "-o", tmp_path, n_processes=3, FAKE_NPU_COUNT="2", **FAKE)
    assert result.returncode == 0, result.stderr
    loading = [f"loading {MODEL} on npu:{i} in float16" for i in (0, 1, 0)]
    assert [lines_of(result, rank)[0] for rank in range(3)] == loading
    assert len(list(tmp_path.rglob("*.txt"))) == len(texts)


def test_a_machine_that_fails_ends_no_other(corpus, tmp_path):
    """Two torchruns as on two machines: the processes of the first have bad files alone and fail before all others,
    which torchrun would then stop; and its end takes away the store through which they meet."""
    folder, texts = corpus
    (tmp_path / "bad.wav").write_bytes(b"bad" * 1_000_000)
    (tmp_path / "also.wav").write_bytes(b"bad" * 900_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(port), "--nproc-per-node"]
    options = [str(ROOT / "inference.py"), "--model", MODEL, "--device", "cpu", "-o", str(tmp_path / "out")]
    options += ["--audio", str(tmp_path / "bad.wav"), str(tmp_path / "also.wav"), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [subprocess.Popen([*command, "2", "--node-rank", str(i), *options], **pipes) for i in (0, 1)]
    said = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1], said
    assert said[0].count(" recordings, 1 failed, ") == 2 and said[1].count(" recordings, ") == 2
    assert said[0].count("all processes: 12 recordings, 2 failed, ") == 1
    assert all((tmp_path / "out" / f"{name}.txt").exists() for name in texts)


def test_several_processes_need_an_output_dir(corpus):
    result = torchrun("--audio", corpus[0], "--device", "cpu")
    assert result.returncode == 1 and "error: more than one process needs --output-dir" in result.stderr


def test_a_cluster_s_variables_without_torchrun_change_nothing(corpus):
    folder, texts = corpus
    leaked = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    result = run("inference.py", "--audio", folder, "--device", "cpu", "--model", MODEL, environment=leaked)
    assert result.returncode == 0 and "inference.py: 10 recordings, " in result.stderr
    lines = dict(line.split("\t") for line in result.stdout.splitlines())
    assert lines == {f"{folder}/{name}.wav": spoken(text) for name, text in texts.items()}


@pytest.mark.parametrize("environment", [
    {}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": None}, {"RANK": "1", "MASTER_PORT": "1"}, {"RANK": "1\n2"},
])  # fmt: skip
def test_variables_left_by_an_earlier_torchrun_are_an_error_of_one_line(corpus, tmp_path, environment):
    code = "import sys, inference, datetime; inference.START_TIMEOUT = datetime.timedelta(seconds=1)\n"
    code += "sys.argv[0] = 'inference.py'; sys.exit(inference.main(sys.argv[1:]))"
    place = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    place = {name: value for name, value in (place | environment).items() if value is not None}
    result = run("-c", code, "--audio", corpus[0], "-o", tmp_path, environment=place)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "torchrun's processes do not find each other (" in result.stderr and os.listdir(tmp_path) == []


# --- starting again ---


def test_skip_existing(corpus, tmp_path, infer, monkeypatch):
    """An output is missing, or older than its recording, or than one whose clock was in another time zone."""
    folder = shutil.copytree(corpus[0], tmp_path / "in")
    tmp_path = tmp_path / "out"
    assert infer("--audio", folder, "--skip-existing") == (
        2, "", "inference.py: error: --skip-existing needs --output-dir\n"
    )  # fmt: skip
    assert infer("--audio", folder, "-o", tmp_path, "-f", "all")[0] == 0
    (tmp_path / "0.srt").unlink()
    (tmp_path / "2.txt").write_text("kept\n")
    (tmp_path / "4.txt").write_text("of the half\n")
    os.utime(tmp_path / "4.txt", (0, os.path.getmtime(folder / "4.wav") - 1))
    os.utime(folder / "6.wav", (0, time.time() + 9 * 3600))
    (tmp_path / "6.txt").write_text("kept\n")
    status, out, err = infer("--audio", folder, "-o", tmp_path, "-f", "all", "--skip-existing")
    assert (status, out) == (0, "") and "inference.py: 10 recordings, 8 skipped, " in err
    assert (tmp_path / "6.txt").read_text() == "kept\n"
    assert (tmp_path / "0.srt").exists() and (tmp_path / "2.txt").read_text() == "kept\n"
    assert (tmp_path / "4.txt").read_text() == f"{corpus[1]['4']}\n"
    monkeypatch.setattr(common, "load_model", lambda *arguments: pytest.fail("the model was loaded"))
    status, out, err = infer("--audio", folder, "-o", tmp_path, "--skip-existing")
    assert (status, out, err) == (0, "", f"inference.py: 10 recordings, 10 skipped; the files are in {tmp_path}\n")


# --- what fails on the way ---


def test_what_is_kept_of_many_files_does_not_grow(corpus, recognizer):
    """The recordings that have been delivered are let go."""
    alive, most = weakref.WeakSet(), []
    paths = [f"{corpus[0]}/{name}.wav" for name in corpus[1]]
    for recording in inference.transcribe(recognizer, paths, options_of(batch_size=1)):
        alive.add(recording)
        del recording
        gc.collect()
        most.append(len(alive))
    assert len(most) == 10 and max(most) <= 3
