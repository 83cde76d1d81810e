"""eval_performance.py: what it measures adds up, and it cannot be misread."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import FAKE_NPU, MODEL, ROOT, needs_fake, run, write
from tone_speech import random_text, synthesize

import eval_performance

QUICK = ["--model", MODEL, "--warmup", "1", "--runs", "2", "--max-new-tokens", "9"]
FAKE = {"PYTHONPATH": str(FAKE_NPU)}


def table(text: str) -> dict[str, list[str]]:
    """The cells of Markdown tables by the first of each row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def on_both(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    path = tmp_path_factory.mktemp("report") / "report.json"
    options = ["--batch-sizes", "1,3", "--durations", "3,15,62.5", "--json", path]
    result = run("eval_performance.py", *QUICK, *options, environment=FAKE)
    assert (result.returncode, result.stderr) == (0, "")
    return result, json.loads(path.read_text())


@needs_fake
def test_cpu_and_npu_do_equal_work(on_both):
    result, report = on_both
    cells = table(result.stdout)
    assert cells["sweep, 3.0 s, 2 runs after 1"][0].startswith("cpu, ")
    assert cells["sweep, 3.0 s, 2 runs after 1"][1] == "npu:0, float16"
    assert cells["tokens"] == ["9", "9"] and report["comparable"]
    cpu, npu = (column["measurements"] for column in report["columns"])
    # One token limit for each chunk, of which there are 1, 1, 3, 1, 1 and, at the pauses, 5 in 62.5 s.
    assert [m["n_tokens"] for m in cpu] == [m["n_tokens"] for m in npu] == [9, 9, 27, 9, 9, 45]
    assert [m["audio_s"] for m in cpu] == [3, 30, 90, 3, 15, 62.5]
    assert all(len(m["samples_s"]) == 2 and min(m["samples_s"]) > 0 for m in cpu + npu)
    assert all(m["peak_bytes"] is None for m in cpu) and all(m["peak_bytes"] is not None for m in npu)


@needs_fake
def test_the_figures_printed_are_those_of_the_samples(on_both):
    result, report = on_both
    cells = table(result.stdout)
    medians = []
    for i, column in enumerate(report["columns"]):
        m = column["measurements"][0]
        medians.append(np.median(m["samples_s"]))
        assert cells["steady state, median (s)"][i] == f"{medians[i]:.3f}"
        assert cells["RTF, steady state"][i] == f"{medians[i]:.3f} / 3.0 = {medians[i] / 3:.4f}"
        assert cells["first run, cold (s)"][i] == f"{m['first_s']:.3f}"
        stages_ms = [1000 * np.median(samples) for samples in m["stages_s"].values()]
        assert cells["encoder (ms)"][i] == f"{stages_ms[3]:.1f}" and stages_ms[3] > 0
        total, share = re.fullmatch(r"([\d.]+), ([\d.]+) % of a run", cells["sum of the stages (ms)"][i]).groups()
        assert float(total) == pytest.approx(sum(stages_ms), abs=0.06)
        assert float(share) == pytest.approx(sum(stages_ms) / medians[i] / 10, abs=0.06)
    speed_up = f"{medians[0]:.3f} / {medians[1]:.3f} = {medians[0] / medians[1]:.2f}"
    assert cells["speed-up over the CPU"][1] == speed_up
    batch_s = np.median(report["columns"][0]["measurements"][2]["samples_s"])
    assert cells["RTFx, batch of 3"][0] == f"90.0 / {batch_s:.3f} = {90 / batch_s:.2f}"


@needs_fake
def test_no_work_is_pending_when_the_clock_is_read():
    code = """if True:
        import sys, time, torch
        import common, eval_performance
        device, _ = common.select_device("npu")
        import torch_npu
        import types
        reads = []
        def perf_counter():
            reads.append((torch_npu.STATS["pending"], torch_npu.STATS["launches"]))
            return time.perf_counter()
        eval_performance.time = types.SimpleNamespace(perf_counter=perf_counter)
        status = eval_performance.main(sys.argv[1:])
        assert status == 0, status
        assert [pending for pending, _ in reads] == [0] * len(reads), reads
        launches = [after - before for (_, before), (_, after) in zip(reads, reads[1:])]
        busy = sum(n > 0 for n in launches)
        print("reads", len(reads), "with work in between", busy)
    """
    result = subprocess.run(
        [sys.executable, "-c", code, *QUICK, "--device", "npu"], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{FAKE_NPU}:{ROOT}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    n_reads, n_busy = map(int, re.search(r"reads (\d+) with work in between (\d+)", result.stdout).groups())
    assert n_reads > 3 * 2 * 7 and n_busy >= 3 * 4  # on the NPU: copy, encoder, decode and a whole run, three times


def test_without_an_npu_the_cpu_alone_and_the_reason():
    result = run("eval_performance.py", *QUICK)
    assert result.returncode == 0 and table(result.stdout)["tokens"] == ["9"]
    assert result.stderr.count("\n") == 1 and "not on an NPU: torch_npu is not installed" in result.stderr


def test_an_npu_asked_for_and_not_there():
    result = run("eval_performance.py", *QUICK, "--device", "npu")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("eval_performance.py: error: --device npu: torch_npu is not installed")


@needs_fake
def test_unequal_numbers_of_tokens_void_the_comparison(tmp_path):
    path = write(tmp_path / "a.wav", synthesize("こんにちは"))
    result = run("eval_performance.py", *QUICK, "--audio", path, environment=FAKE)
    assert result.returncode == 0 and table(result.stdout)["tokens"] == ["6", "6"]  # to the end of the text
    code = "import sys, common, eval_performance\n" \
        "decode = common.decode\n" \
        "def cut(r, *rest):\n" \
        "    ids, scores = decode(r, *rest)\n" \
        "    return ([row[:4] for row in ids] if r.model.device.type == 'npu' else ids), scores\n" \
        "common.decode = cut\n" \
        "sys.exit(eval_performance.main(sys.argv[1:]))"  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code, *QUICK, "--audio", path], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{FAKE_NPU}:{ROOT}"},
    )  # fmt: skip
    assert result.returncode == 1
    assert table(result.stdout)["speed-up over the CPU"][1] == "void: 4 tokens, not 6"


def test_recordings_end_where_their_text_ends_and_batches_fill(tmp_path):
    texts = [random_text(np.random.default_rng(i), 60, 6) for i in range(2)]
    paths = [write(tmp_path / f"{i}.flac", synthesize(text, 44_100), 44_100) for i, text in enumerate(texts)]
    result = run("eval_performance.py", *QUICK, "--max-new-tokens", 64, "--device", "cpu", "--audio", *paths)
    cells = table(result.stdout)
    assert result.returncode == 0 and result.stderr == ""
    assert int(cells["tokens"][0]) < 2 * 64 * 3 and "RTF, steady state" in cells


@pytest.mark.parametrize(
    "options, words",
    [
        (["--runs", "0"], "'0' is not a whole number of at least 1"),
        (["--warmup", "0"], "'0' is not a whole number of at least 1"),
        (["--batch-sizes", "1,x"], "'x' is not a whole number from 1 to 1024"),
        (["--batch-sizes", "1,"], "'' is not a whole number"),
        (["--durations", "3,0"], "'0' is not a number from 1 to 36000"),
        (["--durations", "nan"], "'nan' is not a number from 1 to 36000"),
        (["--durations", "inf"], "'inf' is not a number from 1 to 36000"),
        (["--max-new-tokens", "445"], "'445' is not a whole number from 1 to 444"),
    ],
)
def test_wrong_options(options, words, capsys):
    with pytest.raises(SystemExit) as end:
        eval_performance.main(options)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("silence", "all of the audio is silent"),
                                            ("text", "not audio")])  # fmt: skip
def test_audio_that_cannot_be_measured(tmp_path, content, words):
    path = tmp_path / "a.wav"
    if content == "silence":
        write(path, np.zeros(16_000))
    elif content:
        path.write_text("こんにちは")
    result = run("eval_performance.py", *QUICK, "--device", "cpu", "--audio", path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1) and words in result.stderr


def test_a_report_that_cannot_be_written(tmp_path):
    result = run("eval_performance.py", *QUICK, "--device", "cpu", "--json", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"error: --json {tmp_path}: not a regular file" in result.stderr
