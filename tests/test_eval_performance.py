"""eval_performance.py: what it measures adds up, and it cannot be misread."""
import json
import os
import re

import common
import numpy as np
import pytest
import torch
from conftest import FAKE, MODEL, NO_NPU, needs_fake, run, write
from tone_speech import synthesize

import eval_performance

QUICK = ["--model", MODEL, "--warmup", "1", "--runs", "2", "--max-new-tokens", "9"]


def table(text: str) -> dict[str, list[str]]:
    """The cells of Markdown tables by the first of each row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def report() -> dict:
    """The JSON of a run on both devices."""
    options = [*QUICK, "--batch-sizes", "3", "--json"]
    result = run("eval_performance.py", *options, environment=FAKE)
    said = [f"{label} on {device}: 100%" for device in ("cpu", "npu:0") for label in ("sweep", "batch of 3")]
    assert result.returncode == 0 and re.findall(r"[^\r]+: 100%(?=\|.+\| 6/6 \[.+\n)", result.stderr) == said
    return json.loads(result.stdout)


@needs_fake
def test_cpu_and_npu_do_equal_work(report):
    cpu, npu = (column["measurements"] for column in report["columns"])
    # One token limit for each chunk, of which there are 1 and 3.
    assert [m["n_tokens"] for m in cpu] == [m["n_tokens"] for m in npu] == [9, 27] and report["comparable"]
    assert [m["audio_s"] for m in cpu] == [3, 90]
    assert all(len(m["samples_s"]) == 2 and min(m["samples_s"]) > 0 for m in cpu + npu)
    assert all(m["peak_bytes"] is None for m in cpu) and all(m["peak_bytes"] is not None for m in npu)


@needs_fake
def test_the_figures_printed_are_those_of_the_samples_and_the_user_s_come_first(report):
    cells = table(eval_performance.format_report(report, eval_performance.parse_arguments(["--runs", "2"])))
    assert list(cells)[2:6] == ["time, median (s)", "speed-up over the CPU", "RTF", "tokens"]
    assert [name.partition(",")[0] for name in cells["sweep, 3.0 s, 2 runs after 2"]] == ["cpu", "npu:0"]
    medians = []
    for i, column in enumerate(report["columns"]):
        m = column["measurements"][0]
        medians.append(np.median(m["samples_s"]))
        assert cells["time, median (s)"][i] == f"{medians[i]:.3f}"
        assert cells["RTF"][i] == f"{medians[i]:.3f} / 3.0 = {medians[i] / 3:.4f}"
        assert cells["first run, cold (s)"][i] == f"{m['first_s']:.3f}" and m["first_s"] not in m["samples_s"]
        stages_s = {name: np.median(samples) for name, samples in m["stages_s"].items()}
        assert all(stages_s.values()) and cells["encoder (ms)"][i].split(",")[0] == f"{1000 * stages_s['encoder']:.1f}"
        share = 100 * sum(stages_s.values()) / medians[i]
        assert cells["sum of the stages (ms)"][i].endswith(f", {share:.0f} % of the time")
    speed_up = f"{medians[0]:.3f} / {medians[1]:.3f} = {medians[0] / medians[1]:.2f}"
    assert cells["speed-up over the CPU"] == ["", speed_up]
    batch_s = np.median(report["columns"][0]["measurements"][1]["samples_s"])
    assert cells["times real time, batch of 3"][0] == f"90.0 / {batch_s:.3f} = {90 / batch_s:.2f}"


@needs_fake
def test_no_work_is_pending_when_the_clock_is_read():
    code = """if True:
        import sys, time, torch, types, common, eval_performance
        common.select_device("npu")
        import torch_npu
        torch.ones(1, device="npu") + 1
        assert torch_npu.STATS["pending"] > 0  # so it does count
        torch.npu.synchronize()
        launches = []
        def perf_counter():
            assert torch_npu.STATS["pending"] == 0
            launches.append(torch_npu.STATS["launches"])
            return time.perf_counter()
        eval_performance.time = types.SimpleNamespace(perf_counter=perf_counter)
        assert eval_performance.main(sys.argv[1:]) == 0
        n_busy = sum(after > before for before, after in zip(launches, launches[1:]))
        assert n_busy >= 3 * 4, n_busy  # in three runs: copy, encoder, decode, and all of it
    """
    result = run("-c", code, *QUICK, "--device", "npu", environment=FAKE)
    assert result.returncode == 0, result.stderr


def test_without_an_npu_the_cpu_alone_and_the_reason():
    result = run("eval_performance.py", *QUICK, environment=NO_NPU)
    cells = table(result.stdout)
    assert result.returncode == 0 and cells["tokens"] == ["9"] and "speed-up over the CPU" not in cells
    warning, progress = result.stderr.split("\n", 1)
    assert "no NPU here, so the CPU is used: torch_npu cannot be loaded" in warning and "sweep on cpu: 100%" in progress


@needs_fake
def test_unequal_numbers_of_tokens_void_the_comparison(tmp_path):
    path = write(tmp_path / "a.wav", synthesize("こんにちは"))
    result = run("eval_performance.py", *QUICK, "--audio", path, environment=FAKE)
    assert result.returncode == 0 and table(result.stdout)["tokens"] == ["6", "6"]  # to the end of the text
    code = "import sys, common, eval_performance\n" \
        "decode = common.decode\n" \
        "def cut(r, *rest):\n" \
        "    ids, probs = decode(r, *rest)\n" \
        "    return ([[*row[:3], row[-1]] for row in ids] if r.model.device.type == 'npu' else ids), probs\n" \
        "common.decode = cut\n" \
        "sys.exit(eval_performance.main(sys.argv[1:]))"  # fmt: skip
    result = run("-c", code, *QUICK, "--audio", path, environment=FAKE)
    assert result.returncode == 1
    said = table(result.stdout)["speed-up over the CPU"][1]
    assert re.fullmatch(r"void: 1\d tokens, not 6", said), said  # it is decoded again in two


@pytest.mark.parametrize("amx, avx512, words", [
    (True, True, "AMX and AVX512-BF16"), (False, True, "AVX512-BF16"), (False, False, "neither AMX nor AVX512-BF16"),
])  # fmt: skip
def test_the_environment_says_what_the_processor_computes_also_where_no_cores_are_assigned(
    amx, avx512, words, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    environment = common.environment(torch.device("cpu"))
    assert environment["device_name"].endswith(f" with {words}") and environment["cpus"] == os.cpu_count()


@pytest.mark.parametrize("options, words", [
    (["--runs", "0"], "'0' is not a whole number of at least 1"),
    (["--batch-sizes", "1,x"], "'x' is not a whole number from 1 to 1024"),
])  # fmt: skip
def test_wrong_options(options, words, capsys):
    with pytest.raises(SystemExit) as end:
        eval_performance.main(options)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("is_there, words", [(False, "no such file"), (True, "silence or steady sound")])
def test_audio_that_cannot_be_measured(tmp_path, is_there, words):
    path = write(tmp_path / "a.wav", np.zeros(16_000)) if is_there else tmp_path / "absent.wav"
    result = run("eval_performance.py", *QUICK, "--device", "cpu", "--audio", path)
    assert (result.returncode, result.stdout) == (2, "") and words in result.stderr.splitlines()[-1]
