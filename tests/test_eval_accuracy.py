"""eval_accuracy.py: its figures, its verdict, the faults that it must catch and the devices that it must not flag."""
import csv
import dataclasses
import functools
import json
import math
import os
import re
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from conftest import FAKE, MODEL, NO_NPU, ROOT, needs_fake, run, write
from tone_speech import random_text, spoken, synthesize

import eval_accuracy

PUBLISHED = ROOT.parent / "shared" / "data" / "kotoba-published"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    """Two recordings of 8 and 12 kana."""
    folder, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(1)
    return [write(folder / f"{n}.wav", synthesize(random_text(rng, n))) for n in (8, 12)]


@pytest.fixture
def evaluate(run_here):
    """Run eval_accuracy.py in this process."""
    return functools.partial(run_here, eval_accuracy)


@pytest.fixture(scope="module")
def reference(recognizer) -> eval_accuracy.Reference:
    """Of こんにちは, with rounding to bfloat16."""
    features = common.extract_features(recognizer.extractor, synthesize("こんにちは"))
    return eval_accuracy.Reference(recognizer, features, torch.bfloat16, 20)


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
    references = ["あいうえおかきくけこ", "がんば。", "", "。", "ん"]
    hypotheses = ["あいうえおかきく", "かん、ば", "い", "う", "うんと"]
    assert eval_accuracy.character_error_rate(references, hypotheses) == 5 / 14  # two lost, one changed, two more
    assert math.isnan(eval_accuracy.character_error_rate(["。"], ["あ"]))


def test_compare():
    encoded, logits = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 3.0, 6.0], [1.0, 0.0, -1.0]])
    computed = functools.partial(eval_accuracy.Computed, [2, 0])
    reference = computed(encoded, logits)
    moved = eval_accuracy.compare(reference, computed(2 * encoded, logits + 1))
    assert list(moved.values()) == pytest.approx([56 / math.sqrt(47 * 71), 1, 1, 1 / 7, 1, 0])  # all logits by one
    error = torch.tensor([[1.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
    of_one = eval_accuracy.compare(reference, computed(encoded, logits + error))
    assert list(of_one.values())[1:] == pytest.approx([2, 4 / 6, 2 / 7, 0, math.sqrt(6 / 20)])
    assert math.isnan(eval_accuracy.compare(reference, computed(encoded, logits / 0))["logits error"])


def test_limits_and_nan():
    values = dict.fromkeys(["cosine similarity", *eval_accuracy.LIMITS], 0.02)
    rounding = {"cosine similarity": 0.9, "relative error": 0.001, "encoder error": 0.0001, "logits error": 0.007}
    figures = eval_accuracy.limited(values, rounding, "", is_float32=False)
    assert [figure.limit for figure in figures] == [None, 0.01, 5e-4, pytest.approx(0.021)]
    assert [figure.is_fault for figure in figures] == [False, True, True, False]
    assert {figure.limit for figure in eval_accuracy.limited(values, rounding, "", is_float32=True)} == {5e-4}
    nan = dataclasses.replace(figures[3], value=math.nan)
    assert nan.is_fault and eval_accuracy.worst([*figures, nan, figures[3]])[3] is nan


def test_the_reference_forces_the_tokens_and_knows_what_rounding_makes(reference):
    token_ids = reference.token_ids
    assert reference.text(token_ids) == "こんにちは"
    expected, rounding = reference.computed(token_ids)
    assert expected.logits.shape == (6, reference.recognizer.model.config.vocab_size)
    assert (expected.logits + reference.recognizer.token_mask[1])[1:].argmax(1).tolist() == token_ids[1:]
    device = common.load_model(MODEL, torch.device("cpu"), torch.bfloat16)
    features = common.extract_features(device.extractor, synthesize("こんにちは"))
    [computed] = eval_accuracy.decode_rows(device, [reference], 20)
    assert computed.token_ids == token_ids
    found = eval_accuracy.compare(expected, computed)
    for name in ("encoder error", "logits error"):  # what a true bfloat16 makes
        assert found[name] == pytest.approx(rounding[name], rel=0.25)
    exact = eval_accuracy.Reference(reference.recognizer, features, torch.float32, 20).computed(token_ids)[1]
    assert exact["encoder error"] == exact["logits error"] == 0


def test_a_text_that_leaves_the_references_at_a_tie_is_a_note_and_else_a_fault(reference):
    ids = reference.token_ids
    logits = reference.computed(ids)[0].logits
    other = [*ids[:2], ids[0], *ids[3:]]  # こんこちは
    margin = float(logits[2, ids[2]] - logits[2, ids[0]])

    def differ(token_ids: list[int], error: float, is_sound: bool) -> eval_accuracy.Clip:
        clip, expected = eval_accuracy.Clip(""), reference.computed(token_ids)[0]
        off = torch.zeros_like(expected.logits).index_fill_(1, torch.tensor([5]), error)
        found = expected._replace(logits=expected.logits + off)
        eval_accuracy.note_difference(clip, reference, found, is_sound, "alone")
        return clip

    clip = differ(other, 0.51 * margin, True)
    assert clip.faults == [] and clip.notes == [
        f"text differs from token 2 on: 'こ' for 'に', which the reference prefers by {margin:.3g} (alone)"
    ]
    assert differ(other, 0.49 * margin, True).faults  # farther than the error there explains
    assert differ(other, 0.51 * margin, False).faults  # the error itself is beyond a limit
    assert differ(ids[:3], 100, True).faults  # it breaks off
    assert differ(ids, 100, True) == eval_accuracy.Clip("")


# --- the report ---


def test_the_users_rows_come_first_and_the_header_says_what_was_not_tested(clips, evaluate):
    status, out, err = evaluate("--audio", *clips, "--dtype", "float32", "--max-new-tokens", 20)
    said = [line.split(": ")[1] for line in err.splitlines()]
    assert (status, said) == (0, ["recording 1 of 2", "recording 2 of 2"])
    *lines, last = out.splitlines()
    table = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines if line[0] != " ")
    assert list(table) == [
        "model", "reference", "candidate", "batch sizes", "clips, tokens", "text match", "cosine similarity",
        "largest absolute error", "mean absolute error", "relative error", "encoder error", "logits error",
        "encoder error in float32", "logits error in float32",
    ]  # fmt: skip
    assert table["batch sizes"] == "8; on a CPU no other size is checked"
    assert table["candidate"].endswith(" in float32: no NPU was tested")
    assert (table["clips, tokens"], table["text match"]) == ("2, 22", "2 of 2")
    assert last.startswith("PASS: cpu in float32 computes what the CPU computes in float32; 2 clips, worst ")
    where = r"\S+wav, 0.0 to \S+ s, (in a batch of 8|alone|to position 448)"
    assert re.fullmatch(rf"\S+ +0.01 +0 +{where}", table["relative error"])
    assert re.fullmatch(r"0 +0.0005 +\S+wav, 0.0 to \S+ s, in float32", table["encoder error in float32"])


def test_json_has_every_figure_with_its_limit_and_the_versions(clips, evaluate):
    status, out, _ = evaluate("--audio", *clips, "--dtype", "bfloat16", "--json", "--max-new-tokens", 20)
    report = json.loads(out)
    assert (status, report["left_out"]) == (0, [])
    assert {"torch", "torch_npu", "cann", "transformers", "device_name", "threads"} <= set(report["environment"])
    [first, second] = report["clips"]
    assert (first["n_tokens"], first["text"], len(first["figures"]), len(second["figures"])) == (
        9, first["candidate_text"], 2 + 3 * 6, 2 + 2 * 6
    )  # fmt: skip
    for figure in first["figures"]:
        if "cosine" not in figure["name"] and "absolute" not in figure["name"]:
            assert 0 <= figure["value"] < figure["limit"]
            assert figure["limit"] == 5e-4 or figure["limit"] >= 2.9 * figure["rounding"]
    assert len(report["figures"]) == 8
    said, worst = report["verdict"].split(", worst ")
    assert said == "PASS: cpu in bfloat16 computes what the CPU computes in float32; 2 clips"
    name, share, where = re.fullmatch(r"(.+), ([\d.]+) of its limit, in (.+)", worst).groups()
    shares = {(f["name"], f["where"]): f["value"] / f["limit"] for f in report["figures"] if f["limit"]}
    assert max(shares, key=shares.get) == (name, where) and f"{shares[name, where]:.2f}" == share


def test_a_fail_names_each_clip_and_reason(clips, evaluate, monkeypatch):
    monkeypatch.setattr(eval_accuracy, "FACTOR", 0.1)
    status, out, _ = evaluate("--audio", *clips, "--dtype", "bfloat16", "--max-new-tokens", 20)
    *_, first, second, last = out.splitlines()
    said = "FAIL: cpu in bfloat16 does not compute what the CPU computes in float32: 2 of 2 clips"
    assert (status, last) == (1, said)
    for path, line in zip(clips, (first, second), strict=True):
        reason = r"encoder error \S+ is not below \S+ \(in a batch of 8\); logits "
        assert re.match(rf"FAIL {path}, 0.0 to \S+ s: {reason}", line)


def test_without_an_npu_there_is_no_verdict(clips):
    result = run("eval_accuracy.py", "--model", MODEL, "--audio", clips[0], environment=NO_NPU)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("eval_accuracy.py: error: --device npu: torch_npu ")


def test_a_manifest_has_error_rates_and_its_bad_recordings_are_compared_as_far_as_they_go_or_counted(
    tmp_path, evaluate, clips
):
    cut = Path(write(tmp_path / "cut.flac", synthesize(random_text(np.random.default_rng(0), 20, 5))))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    write(tmp_path / "0.wav", synthesize("こんにちは"))
    text = random_text(np.random.default_rng(0), 80, 5)
    long = write(tmp_path / "1.wav", synthesize(text))
    rows = [("0.wav", "こんばんは。"), (long, spoken(text)), (str(cut), ""), (str(tmp_path / "absent.wav"), "あ")]
    lines = (json.dumps({"audio": path, "text": text}, ensure_ascii=False) for path, text in rows)
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8-sig")
    status, out, err = evaluate("--manifest", tmp_path / "m.jsonl", "--dtype", "float32", "--max-new-tokens", 40)
    assert (status, err.count("recording 2 of 4: ")) == (0, 4)  # chunks
    for side in ("reference", "candidate"):
        assert re.search(f"^CER of the {side} +{100 * 2 / 85:.4f} %$", out, re.MULTILINE)
    assert re.search("^PASS: .+; 6 clips, .+; recordings left out: 1$", out, re.MULTILINE)
    assert f"warning: {cut}: cut off or damaged" in err
    assert err.endswith("absent.wav: no such file or folder: left out\n")


def test_after_a_failure_of_the_device_the_rest_is_not_reached_and_counts_nowhere(tmp_path, evaluate, monkeypatch):
    texts = ["こんにちは", "さようなら", "こんばんは"]
    rows = [{"audio": write(tmp_path / f"{i}.wav", synthesize(text)), "text": text} for i, text in enumerate(texts)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    compare, error = eval_accuracy.compare_clip, common.DeviceError("npu:0 failed")

    def fail(clip, *rest) -> None:
        if clip.name.startswith(rows[1]["audio"]):
            raise error
        compare(clip, *rest)

    monkeypatch.setattr(eval_accuracy, "compare_clip", fail)
    arguments = "--manifest", tmp_path / "m.jsonl", "--dtype", "float32", "--max-new-tokens", 20
    status, out, _ = evaluate(*arguments)
    *_, reason, last = out.splitlines()
    assert status == 1 and last.startswith("FAIL: ") and last.endswith(": 1 of 2 clips; recordings left out: 2")
    assert out.count(" 0.0000 %\n") == 2  # of the one recording that was compared
    assert reason.startswith("FAIL " + rows[1]["audio"]) and reason.endswith(" s: npu:0 failed")
    error = common.OutOfMemoryError("npu:0 failed: full")
    status, out, err = evaluate(*arguments)
    assert (status, out) == (2, "") and err.endswith("error: npu:0 failed: full\n")


# --- errors ---


def test_what_cannot_be_evaluated_is_status_2(tmp_path, evaluate, clips):
    (tmp_path / "text.wav").write_text("not audio")
    for name, content in [("bad", "{"), ("keys", '{"audio": "x.wav"}'), ("deep", "[" * 100_000),
                          ("null", '{"audio": "x.wav", "text": "a"}\n{"audio": "y.wav", "text": null}'),
                          ("part", '{"audio": "x.wav", "text": "a", "offset": 9.5}')]:  # fmt: skip
        (tmp_path / name).write_text(content)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    for arguments, words in [
        (["--audio", tmp_path / "absent.wav"], "no such file"),
        (["--audio", tmp_path / "text.wav", tmp_path / "absent.wav"], "none of 2 recordings can be read"),
        (["--manifest", os.devnull], "there is no line in it"),
        (["--manifest", tmp_path / "null"], "line 2: not"),
        (["--manifest", tmp_path / "part"], "offset is of a segment, but a text is that of a whole file: cut"),
        (["--manifest", tmp_path / "absent.jsonl"], "No such file"),
        *((["--manifest", tmp_path / name], "line 1: not") for name in ("bad", "keys", "deep", "bytes")),
    ]:
        status, _, err = evaluate("--dtype", "float32", *arguments)
        assert status == 2 and words in err and err.count("\n") <= 3 and "Traceback" not in err, err
    status, _, err = evaluate("--audio", "a", "--manifest", "b")
    assert status == 2 and "not allowed with" in err


# --- faults, on the simulated NPU ---

# What must be named for each fault, and no other name would do. tests/README.md has more faults, on real weights too.
CAUGHT = {
    "head_wrong_in_the_last_layer": "logits error in float32 ",
    "float16_noise": r"logits error .*\(alone\)",
    "nan_in_one_logit": "npu:0 computes NaN or infinity in float32",
    "nan_in_batches": r"npu:0 computes NaN or infinity in float16: .* \(in a batch of 2\)$",
    "encoder_off_by_one_frame": "encoder error in float32 ",  # the decoder does not mind the order of the frames
    "cache_off_by_one": "logits error in float32 ",
    "cache_wrong_beyond_256": r"logits error .*\(to position 448\)",
    "wrong_suppress_list": "the device suppresses other tokens",
    "rows_swapped": r"encoder error .*\(in a batch of 2\)",
    "first_row_wrong": r"encoder error .*\(in a batch of 2\)",
    "wrong_in_batches_of_7": r"encoder error .*\(in a batch of 7\)",
    "wrong_in_full_batches": r"encoder error .*\(in a batch of 4\)",
    "second_window_wrong": r"encoder error .*\(in a batch of 3\)",
    "stale_results": "npu:0 gives 4 rows for a batch of 1",
    "stale_after_an_error": "npu:0 failed: The Inner error is reported as above.",
    "stale_without_an_error": "encoder error in float32 |npu:0 computes NaN",
}
HEALTHY = ["another_make", "kernels_with_an_error_of_1e_5"]


@needs_fake
def test_faults_are_named_and_healthy_devices_pass(clips):
    options = ["--short", "--max-new-tokens", "20", "--model", MODEL, "--audio", clips[1], "--only", *CAUGHT, *HEALTHY]
    result = run("tests/stress/seed_faults.py", *options, environment=FAKE)
    seeded = [json.loads(line) for line in result.stdout.splitlines() if line[:1] == "{"]
    passed = [(row["fault"], row["dtype"]) for row in seeded if row["status"] == 0]
    assert sorted(passed) == [(device, dtype) for device in HEALTHY for dtype in ("bfloat16", "float16")]
    failed = {row["fault"]: row["reasons"] for row in seeded if row["status"] == 1}
    assert failed.keys() == CAUGHT.keys()
    for fault, reasons in failed.items():
        assert any(re.match(CAUGHT[fault], reason) for reason in reasons), (fault, reasons)


@needs_fake
def test_without_options_it_is_the_sweep_on_the_npu_in_float16_with_hf32_off_or_an_error():
    arguments = ["--model", MODEL, "--json"]
    report = json.loads(run("eval_accuracy.py", *arguments, "--max-new-tokens", "5", environment=FAKE).stdout)
    assert report["candidate"] == "npu:0 (Ascend910B4 (simulated)) in float16, HF32 off"
    assert report["verdict"].startswith("PASS: npu:0 in float16 computes what the CPU computes in float32; 1 clip, ")
    assert report["clips"][0]["name"] == "sweep, 0.0 to 3.0 s"
    decoded = [figure["where"].split(", ")[-1] for figure in report["clips"][0]["figures"]]
    batches = [f"in a batch of {size}" for size in range(2, 17)]
    assert list(dict.fromkeys(decoded)) == ["in float32", *batches, "alone", "to position 448"]
    assert report["batch sizes"] == "16; all smaller ones for the first clip"
    result = run("eval_accuracy.py", *arguments, environment=FAKE | {"FAKE_NPU_FAULT": "hf32"})
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "error code is 500001" in result.stderr and "set_env.sh" in result.stderr
