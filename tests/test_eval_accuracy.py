"""eval_accuracy.py: its figures, its verdict, the faults that it must catch and the runs that it must not flag."""
import contextlib
import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import common
import numpy as np
import pytest
import random_model
import seed_faults
import torch
from conftest import FAKE_NPU, MODEL, ROOT, needs_fake, run, write
from tone_speech import random_text, spoken, synthesize

import eval_accuracy
import eval_performance

PUBLISHED = ROOT.parent / "shared" / "data" / "kotoba-published"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    """Two recordings of 8 and 12 kana."""
    folder, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(1)
    return [write(folder / f"{n}.wav", synthesize(random_text(rng, n))) for n in (8, 12)]


@pytest.fixture
def evaluate(capsys):
    """Run eval_accuracy.py in this process with the tiny model on the CPU: (exit status, stdout, stderr)."""

    def evaluate(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = eval_accuracy.main(["--model", MODEL, "--device", "cpu", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return evaluate


# --- figures ---


@pytest.mark.parametrize(
    "name, expected", [("common_voice_8_0", 9.1912), ("jsut_basic5000", 8.4002), ("reazonspeech_test", 11.6431)]
)
def test_published_character_error_rates(name, expected):
    path = PUBLISHED / f"{name}.csv"
    if not path.exists():
        pytest.skip("the authors' predictions are not here")
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rate = eval_accuracy.character_error_rate(
        [row["reference_raw"] for row in rows], [row["prediction_raw"] for row in rows]
    )
    assert round(100 * rate, 4) == expected


def test_the_rate_is_pooled_and_normalised():
    references = ["あいうえおかきくけこ", "がんば。", "", "。"]
    hypotheses = ["あいうえおかきく", "かん、ば", "い", "う"]
    assert eval_accuracy.character_error_rate(references, hypotheses) == 3 / 13  # two lost, one for another
    assert math.isnan(eval_accuracy.character_error_rate(["。"], ["あ"]))


@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("", "あい", 2), ("あい", "", 2), ("kitten", "sitting", 3)])
def test_edit_distance(a, b, distance):
    assert eval_accuracy.edit_distance(a, b) == distance


def test_compare():
    reference = np.array([[0, 3, 4], [1, -1, 0]], np.float32)
    rows = eval_accuracy.compare(reference, reference + np.array([[0, 0, 2], [0, 0, 0]], np.float32))
    assert rows["max_abs"].tolist() == [2, 0] and rows["relative"].tolist() == [0.5, 0]
    assert rows["mean_abs"].tolist() == [2 / 3, 0]
    assert rows["cosine"].tolist() == pytest.approx([(9 + 24) / math.sqrt(25 * 45), 1])
    assert eval_accuracy.compare_whole(reference, -reference)["relative"] == 8 / 5


def test_teacher_forcing_reproduces_greedy_decoding(recognizer):
    features = common.extract_features(recognizer.extractor, synthesize("こんにちは"))
    [(tokens, _)] = eval_accuracy.decode_freely(recognizer, eval_accuracy.Clip("", 0), [features], 20)
    logits = eval_accuracy.forward(recognizer, [features], tokens)["logits"]
    assert recognizer.tokenizer.decode(tokens, skip_special_tokens=True) == "こんにちは"
    assert logits.shape == (6, recognizer.model.config.vocab_size)
    assert (logits[1:] + recognizer.bias[1].numpy()).argmax(1).tolist() == tokens[1:]


def test_the_random_model_has_the_size_of_the_real_one():
    with torch.device("meta"):
        model = random_model.random_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 756_405_760


# --- the report ---


def test_the_cpu_agrees_with_itself(clips, evaluate, tmp_path):
    status, out, err = evaluate("--audio", *clips, "--dtype", "float32", "--json", tmp_path / "report.json")
    assert (status, err) == (0, "")
    table = dict(line.split("  ", 1) for line in out.splitlines() if not line.startswith("  "))
    assert {name: value.strip() for name, value in table.items()} | {"candidate": "", "smallest top-1 margin": ""} == {
        "model": MODEL, "reference": "cpu in float32", "candidate": "", "HF32": "none on this device",
        "clips, tokens": "2, 22", "text match": "2 of 2", "cosine similarity": "1", "largest absolute error": "0",
        "mean absolute error": "0", "relative error": "0", "top-1 agreement": "22 of 22", "smallest top-1 margin": "",
        "verdict": "PASS",
    }  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "PASS" and report["environment"]["torch"] == torch.__version__
    assert {"torch_npu", "cann", "transformers", "device_name", "allow_hf32", "threads"} <= set(report["environment"])
    first = report["clips"][0]
    assert len(first["tokens"]) == 9 and {len(row) for row in first["per_token"].values()} == {9}
    described = {name for key in report["formulas"] for name in key.split(", ")}
    assert {*first["per_token"], *first["overall"]} <= described


def test_without_an_npu_the_candidate_is_the_cpu_in_float16(clips):
    result = run("eval_accuracy.py", "--model", MODEL, "--audio", clips[0])
    if "npu" in result.stdout:
        pytest.skip("this machine has an NPU")
    assert result.returncode == 0
    assert result.stderr.startswith("eval_accuracy.py: warning: running on the CPU, not on an NPU: ")
    assert result.stderr.count("\n") == 1 and "in float16\n" in result.stdout


def test_a_fail_names_each_clip_and_reason(clips, evaluate):
    status, out, _ = evaluate("--audio", *clips, "--dtype", "bfloat16", "--threshold", "1e-5")
    assert status == 1 and "verdict                       FAIL: 3 of 3 clips" in out
    for path, line in zip([clips[0], *clips], out.splitlines()[-3:], strict=True):
        assert line.startswith(f"FAIL {path}, 0.0 to ") and "is not below 1e-05" in line


def test_the_default_is_the_sweep(evaluate):
    status, out, _ = evaluate("--dtype", "float16")
    assert status == 0 and "clips, tokens                 1, " in out


def test_every_chunk_of_a_long_recording_is_compared(tmp_path, evaluate):
    path = write(tmp_path / "long.wav", synthesize(random_text(np.random.default_rng(0), 80, 5)))
    _, out, _ = evaluate("--audio", path, "--dtype", "float32")
    assert "clips, tokens                 4, 84" in out and "verdict                       PASS" in out


def test_character_error_rate_of_a_manifest(tmp_path, evaluate):
    texts = ["こんにちは", random_text(np.random.default_rng(0), 80, 5)]
    rows = []
    for i, text in enumerate(texts):
        write(tmp_path / f"{i}.wav", synthesize(text))
        rows.append({"audio": f"{i}.wav", "text": spoken(text)})
    rows[0]["text"] = "こんばんは。"
    manifest = tmp_path / "test.jsonl"
    manifest.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    status, out, _ = evaluate("--manifest", manifest, "--dtype", "float32")
    assert status == 0
    for side in ("reference", "candidate"):
        assert f"CER of the {side}".ljust(30) + f"{100 * 2 / 85:.4f} %" in out


def test_a_damaged_recording_is_left_out_and_counted(tmp_path, evaluate, clips):
    """Also one that is damaged after chunks that are not: they would be a part of its text."""
    long = Path(write(tmp_path / "long.flac", synthesize(random_text(np.random.default_rng(0), 100, 5))))
    long.write_bytes(long.read_bytes()[: long.stat().st_size * 2 // 3])
    rows = [{"audio": str(path), "text": "あ"} for path in (clips[0], long, clips[1], tmp_path / "absent.wav")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "report.json"
    status, out, err = evaluate("--manifest", tmp_path / "m.jsonl", "--dtype", "float32", "--json", path)
    assert status == 0 and "verdict                       PASS, on 2 of 4 recordings\n" in out
    assert "clips, tokens                 2, 22\n" in out
    damaged, absent = err.splitlines()
    assert f"error: {long}: damaged after" in damaged and "absent.wav: no such file" in absent
    assert json.loads(path.read_text())["left_out"] == [str(long), str(tmp_path / "absent.wav")]
    all_right = tmp_path / "right.jsonl"
    all_right.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[2])))
    _, expected, _ = evaluate("--manifest", all_right, "--dtype", "float32")
    assert [line for line in out.splitlines() if "CER" in line] == [x for x in expected.splitlines() if "CER" in x]


def test_after_a_failure_of_the_device_the_rest_is_not_reached_and_counts_nowhere(tmp_path, evaluate, monkeypatch):
    texts = ["こんにちは", "さようなら", "こんばんは"]
    rows = [{"audio": write(tmp_path / f"{i}.wav", synthesize(text)), "text": text} for i, text in enumerate(texts)]
    rows = [rows[0], rows[1], rows[0], rows[2]]  # one comes again after the failure
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure = eval_accuracy.measure_candidate

    def fail(recognizer, clip, *rest) -> None:
        if clip.utterance == 1:
            raise common.DeviceError("npu:0 failed")
        measure(recognizer, clip, *rest)

    monkeypatch.setattr(eval_accuracy, "measure_candidate", fail)
    status, out, _ = evaluate("--manifest", tmp_path / "m.jsonl", "--dtype", "float32")
    assert status == 1 and "verdict                       FAIL: 1 of 3 clips, on 1 of 4 recordings\n" in out
    assert out.count(" 0.0000 %\n") == 2  # of the one recording that was compared
    assert out.splitlines()[-1].startswith("FAIL " + rows[1]["audio"]) and out.endswith(" s: npu:0 failed\n")


@pytest.mark.parametrize("script", ["eval_accuracy.py", "eval_performance.py"])
def test_a_report_is_refused_at_the_start_where_it_cannot_be_or_must_not(tmp_path, clips, script, monkeypatch):
    module = {"eval_accuracy.py": eval_accuracy, "eval_performance.py": eval_performance}[script]
    monkeypatch.setattr(common, "select_device", lambda name: pytest.fail("it went on"))
    recording = shutil.copy(clips[0], str(tmp_path / "a.wav"))
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    before = Path(recording).read_bytes()
    for report, words in [
        (recording, "would overwrite"), (tmp_path / "link" / "a.wav", "would overwrite"), (tmp_path, "not a regular"),
        ("/dev/null", "not a regular file"), (tmp_path / "file" / "x", "there is a file of that name"),
    ]:  # fmt: skip
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert module.main(["--audio", recording, "--json", str(report)]) == 2
        assert words in said.getvalue() and said.getvalue().startswith(f"{script}: error: --json")
    assert Path(recording).read_bytes() == before


def test_a_report_over_the_manifest_is_refused(tmp_path, evaluate, clips):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"audio": clips[0], "text": "あ"}))
    status, _, err = evaluate("--manifest", manifest, "--json", manifest)
    assert status == 2 and "would overwrite" in err and json.loads(manifest.read_text())["text"] == "あ"


def test_a_tie_is_noted_and_what_is_none_is_a_fault(recognizer):
    features = common.extract_features(recognizer.extractor, synthesize("こんにちは"))
    [(tokens, _)] = eval_accuracy.decode_freely(recognizer, eval_accuracy.Clip("", 0), [features], 20)
    logits = eval_accuracy.forward(recognizer, [features], tokens)["logits"]
    other = tokens[0]
    logits[2, other] = logits[2, tokens[2]] + 0.015  # a reference that likes another token better by 0.015

    def compare(error: float, relative: float) -> eval_accuracy.Clip:
        clip = eval_accuracy.Clip("", 0, tokens=[*tokens[:2], other, *tokens[3:]],
                                  per_token={"max_abs": [error] * 6, "relative": [relative] * 6})  # fmt: skip
        eval_accuracy.compare_decoding(recognizer, clip, tokens, logits, 0.01)
        [said] = clip.notes + clip.faults
        assert "text differs from token 2 on: 'に' for 'こ', which the reference prefers by 0.015" in said
        return clip

    assert compare(0.01, 0.001).faults == []
    assert "a fault" in compare(0.005, 0.001).faults[0]  # too far for rounding
    assert "a fault" in compare(0.01, 0.02).faults[0]  # the error itself is beyond the threshold


# --- errors ---


def test_what_cannot_be_evaluated_is_status_2(tmp_path, evaluate, clips):
    silent = write(tmp_path / "silent.wav", np.zeros(16_000))
    (tmp_path / "text.wav").write_text("not audio")
    for name, content in [("bad", "{"), ("keys", '{"audio": "x.wav"}'), ("gone", '{"audio": "x.wav", "text": ""}'),
                          ("zero", '{"audio": "x\\u0000.wav", "text": ""}'), ("deep", "[" * 100_000),
                          ("surrogate", '{"audio": "x\\ud800.wav", "text": ""}'),
                          ("null", '{"audio": "x.wav", "text": "a"}\n{"audio": "y.wav", "text": null}')]:  # fmt: skip
        (tmp_path / name).write_text(content)
    for arguments, words in [
        (["--audio", tmp_path / "absent.wav"], "no such file"),
        (["--audio", tmp_path / "text.wav"], "not audio"),
        (["--audio", silent], "of 1 recordings 0 cannot be read, and the others are silent"),
        (["--manifest", os.devnull], "there is no line in it"),
        (["--manifest", tmp_path / "null"], "line 2: not"),
        (["--manifest", tmp_path / "absent.jsonl"], "No such file"),
        (["--manifest", tmp_path / "bad"], "line 1: not"),
        (["--manifest", tmp_path / "keys"], "line 1: not"),
        (["--manifest", tmp_path / "zero"], "line 1: not"),
        (["--manifest", tmp_path / "surrogate"], "line 1: not"),
        (["--manifest", tmp_path / "deep"], "line 1: not"),
        (["--manifest", tmp_path / "gone"], "x.wav: no such file"),
        (["--audio", clips[0], "--json", tmp_path / "bad" / "x"], "error: --json"),
    ]:
        status, _, err = evaluate("--dtype", "float32", *arguments)
        assert status == 2 and words in err and err.count("\n") <= 2 and "Traceback" not in err, err
    status, _, err = evaluate("--audio", "a", "--manifest", "b")
    assert status == 2 and "not allowed with" in err
    status, _, err = evaluate("--threshold", "2")
    assert status == 2 and "'2' is not a number from 0 to 1" in err


def test_stdout_that_cannot_be_written(clips):
    arguments = ["--model", MODEL, "--device", "cpu", "--dtype", "float32", "--audio", clips[0]]
    with open("/dev/full", "w") as full:
        result = run("eval_accuracy.py", *arguments, stdout=full)
    assert (result.returncode, result.stderr) == (
        2, "eval_accuracy.py: error: cannot write to stdout: No space left on device\n"
    )  # fmt: skip
    reader, writer = os.pipe()
    os.close(reader)  # as head does when it has seen enough
    result = run("eval_accuracy.py", *arguments, stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


# --- faults, on the simulated NPU ---

# What must be named for each fault, and no other name would do.
CAUGHT = {
    "wrong_weight": "relative ",
    "head_zeroed": "text differs",
    "head_wrong_in_the_last_layer": "relative ",
    "bias_dropped": "relative ",
    "layer_norm_epsilon": "relative ",
    "layer_norm_epsilon_small": "float32_relative ",  # in float16 it hides behind rounding
    "float16_noise": "relative ",
    "nan_in_one_logit": "npu:0 computes NaN or infinity in float16",
    "encoder_off_by_one_frame": "encoder ",  # the decoder does not mind the order of the frames
    "cache_off_by_one": "cache ",
    "cache_wrong_beyond_256": "cache in float32 ",
    "wrong_suppress_list": "the candidate suppresses other tokens",
    "rows_swapped": "repeat ",
    "even_rows_wrong": "repeat ",
    "nan_in_batches": "NaN or infinite values",
    "wrong_in_batches_of_16": "cache ",
    "second_window_wrong": "repeat ",
    "stale_results": "npu:0 gives 2 rows for a batch of 1",
    "stale_after_an_error": "npu:0 failed: The Inner error is reported as above.",
    "stale_without_an_error": "text differs",
}


@pytest.fixture(scope="module")
def seeded(clips) -> dict[tuple[str, str], dict]:
    """What two processes, of a thread each, make of the faults and of the healthy devices."""
    names = [f if isinstance(f, str) else f.__name__ for f in (*seed_faults.FAULTS, *seed_faults.HEALTHY)]
    short = [name for name in names if name not in ("nothing", "cache_wrong_beyond_256", "reordered_reductions")]
    command = [sys.executable, "tests/stress/seed_faults.py", "--model", MODEL, "--audio", clips[1], "--only"]
    environment = {**os.environ, "PYTHONPATH": str(FAKE_NPU), "OMP_NUM_THREADS": "1"}
    pipes = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, *names[i::2], "--short", *short], **pipes) for i in (0, 1)]
    lines = [line for process in processes for line in process.communicate()[0].splitlines() if line[:1] == "{"]
    assert [process.returncode for process in processes] == [0, 0]
    return {(row["fault"], row["dtype"]): row for row in map(json.loads, lines)}


@needs_fake
@pytest.mark.parametrize("fault", CAUGHT)
def test_a_fault_is_caught(seeded, fault):
    row = seeded[fault, "float16"]
    assert row["status"] == 1
    assert any(reason.startswith(CAUGHT[fault]) for reason in row["reasons"]), row["reasons"]


@needs_fake
def test_no_fault_is_left_out(seeded):
    assert {fault for (fault, _), row in seeded.items() if row["status"]} == set(CAUGHT)


@needs_fake
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("device", [health.__name__ for health in seed_faults.HEALTHY])
def test_a_healthy_device_passes_and_what_it_computes_otherwise_is_explained(seeded, device, dtype):
    row = seeded[device, dtype]
    assert row["status"] == 0, row["reasons"]
    notes = [note for note in row["notes"] if not note.startswith("text differs")]  # at a tie
    worst = max(row["float32_relative"], row["float32_encoder"])
    if worst < eval_accuracy.FLOAT32_LIMIT:
        assert notes == [] and device not in ("tanh_gelu_of_the_device", "both_of_them")
    else:
        assert device in ("tanh_gelu_of_the_device", "both_of_them", "hf32_that_stays_on")
        assert notes and all(note.startswith("the device computes ") for note in notes)


@needs_fake
def test_an_npu_whose_hf32_cannot_be_set_is_one_line_and_no_fail(clips):
    environment = {"PYTHONPATH": str(FAKE_NPU), "FAKE_NPU_FAULT": "hf32"}
    result = run("eval_accuracy.py", "--model", MODEL, "--audio", clips[0], environment=environment)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "error code is 500001" in result.stderr and "set_env.sh" in result.stderr


@needs_fake
def test_hf32_is_off_on_the_npu(clips, tmp_path):
    report = tmp_path / "report.json"
    environment = {"PYTHONPATH": str(FAKE_NPU)}
    result = run("eval_accuracy.py", "--model", MODEL, "--audio", clips[0], "--json", report, environment=environment)
    assert "HF32                          off\n" in result.stdout
    assert "candidate                     npu:0 (Ascend910B4 (simulated)) in float16\n" in result.stdout
    assert json.loads(report.read_text())["environment"]["allow_hf32"] == {"matmul": False, "conv": False}
