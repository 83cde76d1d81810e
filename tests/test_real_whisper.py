"""A real model, OpenAI's Whisper base, on real Japanese: what the tiny model and its tones cannot show."""
import difflib
import json
import statistics
from collections import Counter

import common
import numpy as np
import pytest
import seed_faults
import soundfile
import torch
from conftest import TESTS, run

import eval_accuracy
import inference

REAL = TESTS / "real_whisper"
MODEL, TRUTH = REAL / "model", json.loads((REAL / "truth.json").read_text(encoding="utf-8"))
PROMPT = "住宅三棟、席を外す。"  # what the model mishears without it
MEETINGS = ["meeting25.flac", "meeting10.flac"]  # room noise 25 dB and 10 dB below the voices
CPU = torch.device("cpu")
HAS_MODEL = (MODEL / "config.json").exists()

pytestmark = pytest.mark.skipif(not HAS_MODEL, reason="python3 tests/real_whisper/fetch.py brings the model")
needs_bfloat16 = pytest.mark.skipif(
    common.select_dtype("auto", CPU) != torch.bfloat16, reason="this CPU does not compute bfloat16 natively"
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, dict]:
    """The JSON of each recording, from one run of the program in float32."""
    folder = tmp_path_factory.mktemp("out")
    options = ["--model", MODEL, "--device", "cpu", "--dtype", "float32", "-o", folder, "-f", "json"]
    result = run("inference.py", "--audio", REAL, *options)
    assert result.returncode == 0, result.stderr
    return {name: json.loads((folder / name).with_suffix(".json").read_text(encoding="utf-8")) for name in TRUTH}


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> dict[str, dict]:
    """The JSON of some recordings, from one run of the program with a prompt."""
    folder, names = tmp_path_factory.mktemp("prompted"), ["09_news.flac", "12_business.flac", "meeting25.flac"]
    options = ["--model", MODEL, "--device", "cpu", "--dtype", "float32", "-o", folder, "-f", "json"]
    result = run("inference.py", "--audio", *(REAL / name for name in names), *options, "--prompt", PROMPT)
    assert result.returncode == 0, result.stderr
    return {name: json.loads((folder / name).with_suffix(".json").read_text(encoding="utf-8")) for name in names}


def bare(text: str) -> str:
    """The letters and digits of a text."""
    return "".join(filter(str.isalnum, text))


def starts(output: dict, sentences: list[dict]) -> list[float | None]:
    """When the word begins that has the first character of each sentence; None where that was not transcribed."""
    words = [word for segment in output["segments"] for word in segment["words"]]
    heard = [(character, word["start"]) for word in words for character in bare(word["word"])]
    texts = [bare(sentence["text"]) for sentence in sentences]
    found = [None] * len("".join(texts))
    matcher = difflib.SequenceMatcher(None, "".join(texts), "".join(character for character, _ in heard), False)
    for true, ours, n in matcher.get_matching_blocks():
        found[true : true + n] = [start for _, start in heard[ours : ours + n]]
    return [found[sum(map(len, texts[:i]))] for i in range(len(texts))]


@pytest.mark.parametrize("name", [name for name, truth in TRUTH.items() if "whisper" in truth])
def test_the_text_is_that_of_openai_whisper(outputs, name):
    """real_whisper/witness.py wrote what it makes of the same weights."""
    assert outputs[name]["text"] == TRUTH[name]["whisper"]


def heard_share(sentences: list[dict], text: str) -> float:
    """The share of the characters of sentences that a text has, in their order."""
    true = bare("".join(sentence["text"] for sentence in sentences))
    blocks = difflib.SequenceMatcher(None, true, bare(text), False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(true)


def test_what_is_said_after_a_pause_is_in_the_text(outputs):
    """The model ends its text at the pause, and writes the second sentence when it is decoded again."""
    _, second = TRUTH["pause.flac"]["sentences"]
    recognizer = common.load_model(str(MODEL), CPU, torch.float32)
    options = inference.Options(fixed_work=True)
    [once] = inference.transcribe(recognizer, [str(REAL / "pause.flac")], options)
    assert heard_share([second], once.chunks[0].text) < 0.3
    after = [s for s in outputs["pause.flac"]["segments"] if s["start"] > second["start"] - 0.5]
    assert heard_share([second], "".join(s["text"] for s in after)) > 0.9
    assert after[0]["start"] == pytest.approx(second["start"], abs=0.3)


def test_speech_that_is_not_heard_in_two_tries_is_said(tmp_path):
    """The model writes the first of four turns and ends, and of the three that are left the first again."""
    turn, rate = soundfile.read(REAL / "05_daily.flac", dtype="float32")
    gap = np.zeros(round(0.4 * rate), np.float32)
    soundfile.write(tmp_path / "four.wav", np.concatenate([turn, gap] * 4), rate)
    recognizer = common.load_model(str(MODEL), CPU, torch.float32)
    [recording] = inference.transcribe(recognizer, [str(tmp_path / "four.wav")], inference.Options())
    content, second_s = json.loads(inference.render(recording, "json", "ja")), (len(turn) + len(gap)) / rate
    assert content["text"].count("届いて") == 2
    assert content["unheard"][0]["start"] == pytest.approx(2 * second_s, abs=0.3)
    assert content["unheard"][-1]["end"] > 3 * second_s
    totals = Counter()
    inference.count(recording, totals)
    assert totals["chunks with loud sound that has no text"] == 1


@pytest.mark.parametrize("name", ["telephone.flac", "talk.flac", "train.flac"])
def test_people_on_the_telephone_in_talk_and_in_noise_are_heard(outputs, name):
    output = outputs[name]
    assert heard_share(TRUTH[name]["sentences"], output["text"]) > 0.75, output["text"]
    assert output["left_out"] == [] and output["unheard"] == [] and output["warnings"] == []


def test_what_is_called_ten_times_is_written_ten_times(outputs):
    output = outputs["cheers.flac"]
    assert output["text"].count("ガンバレ") == 10 and not output["segments"][0]["looping"], output["text"]


def test_noise_without_speech_has_no_text(outputs):
    """Two sentences, then 28 s of room noise at -54 dBFS, of which the model itself makes greetings and thanks."""
    output, sentences = outputs["noise.flac"], TRUTH["noise.flac"]["sentences"]
    assert abs(len(bare(output["text"])) - len(bare("".join(s["text"] for s in sentences)))) <= 2, output["text"]
    assert output["segments"][-1]["end"] <= sentences[-1]["end"] + 0.5
    assert output["left_out"][-1]["end"] == pytest.approx(output["duration"], abs=0.001)
    assert {chunk["no_speech_prob"] for chunk in output["left_out"]} == {None}  # not even decoded: nothing moves


@pytest.mark.parametrize("name, run", [*((name, "outputs") for name in MEETINGS), (MEETINGS[0], "prompted")])
def test_sentences_begin_when_they_are_spoken(request, name, run):
    output, sentences = request.getfixturevalue(run)[name], TRUTH[name]["sentences"]
    found = [(start, s["start"]) for start, s in zip(starts(output, sentences), sentences, strict=True)]
    errors = [abs(start - true) for start, true in found if start is not None]
    assert len(errors) >= 0.7 * len(sentences) and statistics.median(errors) <= 0.1, found


@pytest.mark.parametrize("name, term", [("09_news.flac", "住宅三棟"), ("12_business.flac", "席を外し")])
def test_terms_of_the_prompt_are_written_as_they_are_there(outputs, prompted, name, term):
    assert term in prompted[name]["text"] and term not in outputs[name]["text"]
    assert term in TRUTH[name]["sentences"][0]["text"]


@pytest.mark.parametrize("prompt", [PROMPT, "国土交通省、円相場、見積書"])
def test_a_prompt_gives_the_token_ids_of_transformers(prompt):
    recognizer = common.load_model(str(MODEL), CPU, torch.float32, prompt=prompt)
    clips = [chunk for name in ("06_news.flac", "12_business.flac")
             for chunk in common.read_chunks(str(REAL / name), 15, pytest.fail)]  # fmt: skip
    features = [common.extract_features(recognizer.extractor, clip.waveform) for clip in clips]
    prompt_ids = torch.tensor(recognizer.tokenizer.get_prompt_ids(prompt))
    rows = common.generate(recognizer, features, 40).token_ids
    for row, each in zip(rows, features, strict=True):
        [expected] = recognizer.model.generate(
            each, prompt_ids=prompt_ids, language="ja", task="transcribe", return_timestamps=False, num_beams=1,
            do_sample=False, max_new_tokens=40, force_unique_generate_call=True,
        ).tolist()  # fmt: skip
        assert row == expected[len(prompt_ids) + common.START_LENGTH :]


def test_the_smallest_fault_is_beyond_the_limit_and_reordered_sums_are_not():
    """LayerNorm with torch's usual epsilon in place of Whisper's shows on real weights alone."""
    recognizer = common.load_model(str(MODEL), CPU, torch.float32)
    [chunk] = common.read_chunks(str(REAL / "12_business.flac"), 15, pytest.fail)
    features = common.extract_features(recognizer.extractor, chunk.waveform)

    def decoded() -> eval_accuracy.Reference:
        return eval_accuracy.Reference(recognizer, features, torch.float32, 40)

    reference = decoded()
    expected, rounding = reference.computed(reference.token_ids)
    for change, is_fault in (seed_faults.reordered_reductions, False), (seed_faults.layer_norm_epsilon_small, True):
        change(recognizer.model)
        changed = decoded()
        values = eval_accuracy.compare(expected, changed.forward(changed.encoded, reference.token_ids))
        figures = eval_accuracy.limited(values, rounding, "", is_float32=True)
        assert any(figure.is_fault for figure in figures) == is_fault, figures


@needs_bfloat16
def test_a_healthy_cpu_passes_in_bfloat16():
    options = ["--model", MODEL, "--device", "cpu", "--dtype", "bfloat16"]
    result = run("eval_accuracy.py", *options, "--audio", REAL / "13_numbers.flac")
    assert result.returncode == 0 and "PASS" in result.stdout, result.stdout + result.stderr


def test_the_performance_of_a_recording():
    options = ["--model", MODEL, "--device", "cpu", "--dtype", "float32", "--warmup", "1", "--runs", "1"]
    result = run("eval_performance.py", *options, "--audio", REAL / "04_daily.flac")
    assert result.returncode == 0 and "RTF" in result.stdout, result.stdout + result.stderr
