"""Many files: several processes, starting again after a kill, and disks that fill up."""
import gc
import os
import re
import resource
import socket
import subprocess
import sys
import weakref

import common
import kills
import numpy as np
import pytest
from conftest import FAKE_NPU, MODEL, ROOT, needs_fake, run, write
from tone_speech import random_text, spoken, synthesize

import inference


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, str]:
    """Name without extension and text of ten recordings of 1 to 10 s, in two folders."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    (folder / "deep").mkdir()
    texts = {f"{'deep/' * (i % 2)}{i}": random_text(rng, 2 + int(rng.integers(22))) for i in range(10)}
    for name, text in texts.items():
        write(folder / f"{name}.wav", synthesize(text))
    return folder, texts


def torchrun(*arguments: str, n_processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    return subprocess.run(
        [*command, str(ROOT / "inference.py"), "--model", MODEL, *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, timeout=300,
    )  # fmt: skip


def lines_of(result: subprocess.CompletedProcess, rank: int) -> list[str]:
    """What one process said."""
    start = f"inference.py, rank {rank}: "
    return [line.removeprefix(start) for line in result.stderr.splitlines() if line.startswith(start)]


# --- several processes ---


def test_shares_are_disjoint_whole_and_even(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {str(tmp_path / f"{i:03d}"): int(rng.integers(1, 100_000)) for i in range(300)}
    for path, size in sizes.items():
        with open(path, "wb") as file:
            file.truncate(size)
    shares = [inference.share([*sizes, "absent"], rank, 8) for rank in range(8)]
    assert sorted(path for share in shares for path in share) == sorted([*sizes, "absent"])
    loads = [sum(sizes.get(path, 0) for path in share) for share in shares]
    assert max(loads) - min(loads) <= 0.01 * max(loads)
    for share in shares:
        lengths = [sizes.get(path, 0) for path in share]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("npu", marks=needs_fake)])
def test_torchrun_transcribes_every_file_once(corpus, tmp_path, device):
    folder, texts = corpus
    options = ["--device", "cpu"] if device == "cpu" else []
    environment = {"PYTHONPATH": str(FAKE_NPU), "FAKE_NPU_COUNT": "2"}
    result = torchrun("--audio", folder, "-o", tmp_path / "out", *options, **environment)
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        [line] = lines_of(result, rank)
        where = "cpu" if device == "cpu" else f"npu:{rank}"
        assert re.match(r"[3-7] files, 0 failed; [\d.]+ s of audio in ", line) and f"on {where} in" in line
    counts = [int(lines_of(result, rank)[0].split()[0]) for rank in (0, 1)]
    assert sum(counts) == len(texts)
    for name, text in texts.items():
        assert (tmp_path / "out" / f"{name}.txt").read_text() == f"{text}\n"


@needs_fake
def test_several_processes_share_an_npu(corpus, tmp_path):
    folder, texts = corpus
    environment = {"PYTHONPATH": str(FAKE_NPU), "FAKE_NPU_COUNT": "2"}
    result = torchrun("--audio", folder, "-o", tmp_path, n_processes=3, **environment)
    assert result.returncode == 0, result.stderr
    assert [re.search(r"on (\S+) in", lines_of(result, rank)[0])[1] for rank in range(3)] == ["npu:0", "npu:1", "npu:0"]
    assert len(list(tmp_path.rglob("*.txt"))) == len(texts)


def test_a_failed_file_fails_the_run_but_ends_no_other_process(corpus, tmp_path):
    """torchrun ends all processes as soon as one has failed: here the one that has nothing but a bad file."""
    folder, texts = corpus
    (tmp_path / "bad.wav").write_bytes(b"bad" * 1_000_000)  # the longest file, alone in its share
    result = torchrun("--audio", tmp_path / "bad.wav", folder, "-o", tmp_path / "out", "--device", "cpu")
    assert result.returncode == 1
    assert "1 file, 1 failed" in lines_of(result, 0)[-1] and "10 files, 0 failed" in lines_of(result, 1)[-1]
    assert all((tmp_path / "out" / f"{name}.txt").exists() for name in texts)


def test_a_machine_that_fails_ends_no_other(corpus, tmp_path):
    """Two torchruns as on two machines: the first has bad files alone, and its end takes torchrun's store away."""
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
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1], said
    assert said[0].count("1 file, 1 failed") == 2 and said[1].count(", 0 failed; ") == 2
    assert all((tmp_path / "out" / f"{name}.txt").exists() for name in texts)


def test_an_absent_file_is_reported_by_one_process(corpus, tmp_path):
    result = torchrun("--audio", "absent.wav", corpus[0] / "0.wav", "-o", tmp_path, "--device", "cpu")
    assert result.returncode == 1 and result.stderr.count("absent.wav: no such file") == 1
    assert (tmp_path / "0.txt").exists() and lines_of(result, 1) == ["0 files, 0 failed"]


def test_several_processes_need_an_output_dir(corpus):
    result = torchrun("--audio", corpus[0], "--device", "cpu")
    assert result.returncode == 1 and "error: more than one process needs --output-dir" in result.stderr


@pytest.mark.parametrize("leaked", [
    {"WORLD_SIZE": "4", "RANK": "2"}, {"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    {"LOCAL_RANK": "3"}, {"LOCAL_WORLD_SIZE": "8"},
])  # fmt: skip
def test_what_a_cluster_leaves_in_the_environment_divides_nothing(corpus, leaked):
    folder, texts = corpus
    options = ["--audio", folder, "--device", "cpu", "--model", MODEL]
    result = run("inference.py", *options, environment=leaked)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == len(texts)
    assert "10 files, 0 failed" in result.stderr


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "4", "RANK": "9"}, {"WORLD_SIZE": "", "RANK": ""}, {"WORLD_SIZE": "two", "RANK": "0"},
    {"WORLD_SIZE": "-1", "RANK": "0"}, {"WORLD_SIZE": "0", "RANK": "0"}, {"LOCAL_RANK": "1\n2"},
    {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"},
    {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"},
    {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
])  # fmt: skip
def test_an_environment_that_contradicts_itself_is_refused(corpus, tmp_path, environment):
    options = ["--audio", corpus[0], "--device", "cpu", "--model", MODEL, "-o", tmp_path]
    result = run("inference.py", *options, environment=environment)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert "torchrun" in result.stderr and os.listdir(tmp_path) == []


def test_threads_are_divided_among_processes(tmp_path):
    code = "import os, inference, common, torch; os.sched_getaffinity = lambda pid: range(12)\n" \
        "common.select_device('cpu', *inference.torchrun_place()[2:]); print(torch.get_num_threads())"
    place = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
    environment = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert int(out.stdout) == 3, out.stderr


@pytest.mark.parametrize("port", ["1", "99999", "x"])
def test_a_store_that_does_not_answer_is_one_line(corpus, tmp_path, port):
    code = "import sys, inference; inference.STORE_TIMEOUT_S = 1; sys.exit(inference.main(sys.argv[1:]))"
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", code, "--audio", corpus[0], "-o", tmp_path]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"torchrun's store at 127.0.0.1:{port} does not answer" in result.stderr


def test_two_runs_under_one_torchrun_are_refused(corpus, tmp_path):
    """The second would take the first's statuses for its own."""
    script = tmp_path / "twice.sh"
    options = f"{ROOT / 'inference.py'} --device cpu --model {MODEL} --audio {corpus[0]} -o {tmp_path / 'out'}"
    script.write_text(f"{sys.executable} {options} && {sys.executable} {options}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    result = subprocess.run([*command, "bash", script], capture_output=True, text=True)
    assert result.returncode == 1 and "2 processes have RANK=" in result.stderr
    assert len(list((tmp_path / "out").rglob("*.txt"))) == 10


# --- starting again ---


def test_skip_existing(corpus, tmp_path, infer):
    folder, _ = corpus
    assert infer("--audio", folder, "-o", tmp_path, "-f", "all")[0] == 0
    (tmp_path / "0.srt").unlink()
    (tmp_path / "2.txt").write_text("kept\n")
    status, out, err = infer("--audio", folder, "-o", tmp_path, "-f", "all", "--skip-existing")
    assert (status, out) == (0, "") and "10 files, 0 failed, 9 skipped; " in err and "chunks: 1 decoded" in err
    assert (tmp_path / "0.srt").exists() and (tmp_path / "2.txt").read_text() == "kept\n"


def test_when_all_is_there_no_model_is_loaded(corpus, tmp_path, infer, monkeypatch):
    folder, _ = corpus
    assert infer("--audio", folder, "-o", tmp_path)[0] == 0
    monkeypatch.setattr(common, "load_model", lambda *arguments: pytest.fail("the model was loaded"))
    status, out, err = infer("--audio", folder, "-o", tmp_path, "--skip-existing")
    assert (status, out, err) == (0, "", "inference.py: 10 files, 0 failed, 10 skipped\n")


def test_skip_existing_needs_an_output_dir(corpus, infer):
    status, _, err = infer("--audio", corpus[0], "--skip-existing")
    assert (status, err) == (2, "inference.py: error: --skip-existing needs --output-dir\n")


def test_runs_that_are_killed_lose_nothing():
    """3 kills; python3 tests/stress/kills.py does 20."""
    assert kills.run(3, n_files=30, seed=0) == 3


# --- what fails on the way ---


def test_a_file_that_disappears(corpus, infer, monkeypatch):
    folder, _ = corpus
    gone = str(folder / "gone.wav")
    write(folder / "gone.wav", synthesize("さ"))
    load = common.load_model
    monkeypatch.setattr(common, "load_model", lambda *arguments: os.remove(gone) or load(*arguments))
    status, out, err = infer("--audio", folder)
    assert (status, out.count("\n")) == (1, 10) and f"error: {gone}: no such file" in err


def test_a_full_disk_fails_the_files_that_do_not_fit(corpus, tmp_path, infer, monkeypatch):
    """No output grows over 40 bytes: of a full disk the part that needs no rights to set up."""
    folder, texts = corpus
    before, write_whole = resource.getrlimit(resource.RLIMIT_FSIZE), common.write_whole

    def write_on_a_full_disk(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
        try:
            write_whole(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(common, "write_whole", write_on_a_full_disk)
    status, _, err = infer("--audio", folder, "-o", tmp_path)
    long = {name for name, text in texts.items() if len(f"{text}\n".encode()) > 40}
    assert 0 < len(long) < 10
    assert status == 1 and f"10 files, {len(long)} failed; " in err
    assert err.count("File too large") == len(long)
    assert {str(p.relative_to(tmp_path))[:-4] for p in tmp_path.rglob("*.txt")} == set(texts) - long
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_in_place_of_an_output_folder(corpus, infer, tmp_path):
    (tmp_path / "deep").write_text("a file")
    status, _, err = infer("--audio", corpus[0], "-o", tmp_path)
    assert status == 1 and "10 files, 5 failed" in err and len(list(tmp_path.glob("*.txt"))) == 5


def test_what_is_kept_of_many_files_does_not_grow(corpus, recognizer):
    """The transcripts that have been delivered are let go."""
    alive, most = weakref.WeakSet(), []
    paths = [f"{corpus[0]}/{name}.wav" for name in corpus[1]]
    for transcript in inference.transcribe(recognizer, paths, 256, 15, batch_size=1):
        alive.add(transcript)
        del transcript
        gc.collect()
        most.append(len(alive))
    assert len(most) == 10 and max(most) <= 3


def test_the_text_of_a_corpus(corpus, infer):
    folder, texts = corpus
    _, out, _ = infer("--audio", folder)
    assert dict(line.split("\t") for line in out.splitlines()) == {
        f"{folder}/{name}.wav": spoken(text) for name, text in texts.items()
    }
