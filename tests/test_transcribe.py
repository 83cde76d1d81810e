"""The text that was spoken comes out, whatever the file, the batch and the length."""
import json
import threading

import common
import numpy as np
import pytest
from conftest import FAKE, MODEL, needs_fake, options_of, run, write
from tone_speech import random_text, spoken, synthesize

import inference


def text_of(recording: inference.Recording) -> str:
    assert recording.error is None
    return inference.full_text(recording, "ja")


@pytest.mark.parametrize("seconds", [31, 300])
def test_long_files_lose_nothing(tmp_path, transcribe, seconds):
    rng = np.random.default_rng(seconds)
    text = random_text(rng, round(seconds / 0.55), pause_every=5)
    waveform = synthesize(text, pause_s=0.8)
    assert len(waveform) > seconds * 16_000
    [recording] = transcribe(write(tmp_path / "long.flac", waveform))
    assert text_of(recording) == spoken(text)
    assert recording.duration == len(waveform) / 16_000
    edges = [0.0, *(chunk.end for chunk in recording.chunks)]
    assert [chunk.start for chunk in recording.chunks] == edges[:-1] and edges[-1] == recording.duration


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[list[str], list[str]]:
    """Twelve files of 1 to 50 s, and their texts."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(5)
    texts = [random_text(rng, n, pause_every=6) for n in (1, 90, 3, 12, 5, 20, 2, 18, 8, 75, 4, 7)]
    paths = [write(folder / f"{i}.wav", synthesize(text, pause_s=0.7)) for i, text in enumerate(texts)]
    return paths, [spoken(text) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_batch_size_gives_the_same_text_in_input_order(corpus, transcribe, batch_size):
    paths, texts = corpus
    recordings = transcribe(*paths, batch_size=batch_size)
    assert [recording.path for recording in recordings] == paths
    assert [text_of(recording) for recording in recordings] == texts


def test_chunks_of_several_files_fill_one_batch(corpus, recognizer):
    chunks, sizes = inference.read_recordings(corpus[0], recognizer, options_of()), []
    while batch := inference.next_batch(chunks, 8):
        sizes.append(sum(chunk.features is not None for chunk in batch))
    assert sizes[:-1] == [8] * (len(sizes) - 1) and sum(sizes) > len(corpus[0])


def test_chunk_length(corpus, transcribe):
    [recording] = transcribe(corpus[0][1], chunk_length_s=4)
    assert max(chunk.end - chunk.start for chunk in recording.chunks) <= 4 and text_of(recording) == corpus[1][1]


def test_a_bad_file_among_good_ones_fails_alone(tmp_path, corpus, transcribe):
    paths, texts = corpus
    waveform = synthesize("あ" * 100)
    waveform[-1] = np.nan
    bad = write(tmp_path / "bad.wav", waveform, subtype="FLOAT")
    good, failed, last = transcribe(paths[1], bad, paths[2])
    assert (text_of(good), text_of(last)) == (texts[1], texts[2])
    assert "samples of nan" in failed.error


RNG = np.random.default_rng(0)
SECONDS = np.arange(40 * 16_000) / 16_000
STEADY = {
    "digital silence": np.zeros(len(SECONDS)),
    "rounding": RNG.integers(-1, 2, len(SECONDS)) / 32768,
    "room noise": 10 ** (-54 / 20) * RNG.normal(size=len(SECONDS)),
    "loud noise": 0.2 * RNG.normal(size=len(SECONDS)),
    "hum": 0.1 * sum(np.sin(2 * np.pi * 50 * k * SECONDS) / k for k in (1, 2, 3)) + 0.3,
}


@pytest.mark.parametrize("kind", STEADY)
def test_what_is_steady_is_not_decoded(tmp_path, transcribe, kind):
    [recording] = transcribe(write(tmp_path / "a.wav", STEADY[kind], subtype="FLOAT"))
    assert (text_of(recording), recording.duration) == ("", 40)
    assert len(recording.chunks) >= 3 and all(chunk.left_out for chunk in recording.chunks)
    [kept] = transcribe(write(tmp_path / "a.wav", STEADY[kind], subtype="FLOAT"), no_speech_threshold=1)
    assert not any(chunk.left_out for chunk in kept.chunks)


def test_speech_around_silence_and_however_faint_is_decoded(tmp_path, transcribe):
    speech, silence = synthesize("こんにちは"), np.zeros(28 * 16_000, np.float32)
    [recording] = transcribe(write(tmp_path / "a.wav", np.concatenate([speech, silence, speech])))
    assert text_of(recording) == "こんにちはこんにちは"
    assert [chunk.left_out for chunk in recording.chunks] == [False, True, False]
    long = np.tile(speech, 10)
    assert not common.is_steady(long / 10 + 5 * STEADY["hum"][: len(long)], 16_000)  # 30 dB louder
    assert not common.is_steady(10 ** (-54 / 20) * speech + 1e-5 * RNG.normal(size=len(speech)), 16_000)
    assert not common.is_steady(STEADY["room noise"][:8_000], 16_000)  # half a second is too short to tell


def test_what_the_model_takes_for_no_speech_is_left_out_and_kept_in_the_json(tmp_path, infer, monkeypatch):
    path, generate = write(tmp_path / "a.wav", synthesize("こんにちは")), common.generate

    def generate_doubtful(*arguments):
        decoded = generate(*arguments)
        return decoded._replace(no_speech_probs=[0.8] * len(decoded.token_ids))

    monkeypatch.setattr(common, "generate", generate_doubtful)
    content = json.loads(infer("--audio", path, "-f", "json")[1])
    assert (content["text"], content["left_out"]) == ("こんにちは", [])  # a likely text is speech
    monkeypatch.setattr(inference, "LOGPROB_LIMIT", 0)
    status, out, err = infer("--audio", path, "-f", "json")
    content = json.loads(out)
    assert (status, content["text"], content["segments"]) == (0, "", [])
    [left_out] = content["left_out"]
    assert -0.5 < left_out.pop("avg_logprob") < 0
    assert left_out == {"start": 0.0, "end": 2.1, "text": "こんにちは", "no_speech_prob": 0.8}
    said, closing = err.splitlines()
    assert said.endswith("a.wav: no speech: the model finds none (--no-speech-threshold 1 keeps all)")
    assert closing.endswith("; chunks left out: 1")
    for kept in ("0.8", "1"):
        content = json.loads(infer("--audio", path, "-f", "json", "--no-speech-threshold", kept)[1])
        assert (content["text"], content["left_out"]) == ("こんにちは", [])


def test_a_text_that_reaches_the_token_limit_is_decoded_again_in_two_parts(tmp_path, transcribe):
    path = write(tmp_path / "a.wav", synthesize("こんにちは"))
    for limit, parts in [(1, [("こ", True), ("ち", True)]), (3, [("こんに", True), ("ちは", False)])]:
        [recording] = transcribe(path, max_new_tokens=limit)
        assert [(s.text, s.token_limit) for s in recording.chunks] == parts
    [recording] = transcribe(path, max_new_tokens=6)
    assert [(s.text, s.token_limit) for s in recording.chunks] == [("こんにちは", False)]


@pytest.mark.parametrize("prompt, prob, text", [
    ("こんにちは、さようなら。", 0.4, ""), ("こんにちは、さようなら。", 0.2, "こんにちは"),
    ("さようなら。", 0.4, "こんにちは"),
])  # fmt: skip
def test_a_prompt_that_is_echoed_where_nobody_may_speak_is_left_out(tmp_path, infer, monkeypatch, prompt, prob, text):
    generate, load_model = common.generate, common.load_model
    monkeypatch.setattr(common, "generate", lambda *arguments: generate(*arguments)._replace(no_speech_probs=[prob]))
    monkeypatch.setattr(common, "load_model", lambda *arguments: load_model(*arguments[:5]))  # it does not know prompts
    status, out, _ = infer("--audio", write(tmp_path / "a.wav", synthesize("こんにちは")), "--prompt", prompt)
    assert (status, out.strip()) == (0, text)


def test_a_recording_of_a_tenth_of_a_second_is_not_cut(tmp_path, transcribe):
    waveform = np.random.default_rng(0).normal(0, 0.1, 16_000)
    for n in (1, 10, 500, 2_400, 3_800):
        [recording] = transcribe(write(tmp_path / "a.wav", waveform[:n]), max_new_tokens=1, no_speech_threshold=1)
        assert recording.error is None and len(recording.chunks) == 1


def test_silence_keeps_no_sound(tmp_path, recognizer):
    path = write(tmp_path / "a.wav", np.zeros(40 * 16_000))
    chunks = inference.read_recordings([path], recognizer, options_of())
    assert [chunk.waveform for chunk in chunks] == [None] * 3


@pytest.mark.parametrize("logprob, text", [(-2, "こ"), (0, "こち")])
def test_a_chunk_stays_whole_where_none_of_its_parts_is_kept(tmp_path, transcribe, monkeypatch, logprob, text):
    """Of a text that reaches the token limit the parts are likely or not."""
    force, is_first = inference.force_texts, [True]

    def doubtful(*arguments):
        for weights, logprobs in force(*arguments):
            yield weights, logprobs if is_first.pop() else logprobs.new_full(logprobs.shape, logprob)
            is_first.append(False)

    monkeypatch.setattr(inference, "force_texts", doubtful)
    [recording] = transcribe(write(tmp_path / "a.wav", synthesize("こんにちは")), max_new_tokens=1)
    assert inference.full_text(recording, "ja") == text and recording.error is None
    assert (recording.n_windows, recording.n_again) == (3, 1)


COUNTED = """if True:
    import sys, common, inference
    sizes, generate = [], common.generate
    def counted(recognizer, features, *rest):
        sizes.append(len(features))
        return generate(recognizer, features, *rest)
    common.generate, sys.argv[0] = counted, "inference.py"
    status = inference.main(sys.argv[1:])
    print(*sizes, file=sys.stderr)
    sys.exit(status)
"""


@needs_fake
def test_an_accelerator_decodes_the_parts_of_several_batches_together(tmp_path):
    """Of a dialogue whose long sentences reach the token limit; a CPU decodes them batch by batch."""
    rng, dialogue = np.random.default_rng(0), []
    for n_kana in rng.integers(1, 13, 30):
        dialogue += [synthesize(random_text(rng, n_kana)), np.zeros(16_000, np.float32)]
    path = write(tmp_path / "a.flac", np.concatenate(dialogue))
    options = ["--model", MODEL, "--audio", path, "--batch-size", "4", "--chunk-length", "6", "--max-new-tokens", "9"]
    texts, sizes = [], []
    for device in ("cpu", "npu"):
        result = run("-c", COUNTED, *options, "--device", device, environment=FAKE)
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout)
        sizes.append([*map(int, result.stderr.splitlines()[-1].split())])
    assert texts[0] == texts[1] and sum(sizes[0]) == sum(sizes[1])
    assert len(sizes[1]) == -(-sum(sizes[1]) // 4) < len(sizes[0]), sizes


@needs_fake
@pytest.mark.parametrize("device, expected", [("npu", "4 4 4"), ("cpu", "4 4 2")])
def test_a_recording_whose_parts_wait_fails_with_the_device(tmp_path, device, expected):
    """On an NPU parts of the second batch wait while the third one fails; on a CPU they are the third."""
    text = "さ、" * 15 + "あいうえおかきくけ、" + "さ、" * 40
    paths = [write(tmp_path / "0.wav", synthesize("あ")), write(tmp_path / "1.flac", synthesize(text))]
    lost = "if len(sizes) == 3:\n            raise common.DeviceError('lost')\n        return generate"
    options = ["--model", MODEL, "--audio", *paths, "--device", device, "--batch-size", "4", "--max-new-tokens", "8"]
    code = COUNTED.replace("return generate", lost)
    result = run("-c", code, *options, "--chunk-length", "5", environment=FAKE)
    _, failed, *_, error, _, sizes = result.stderr.splitlines()
    assert (result.returncode, result.stdout, sizes) == (2, f"{paths[0]}\tあ\n", expected), result.stderr
    assert f"{paths[1]}: lost" in failed and "recordings not begun or not finished: 0" in error


@pytest.mark.parametrize("text", ["いう" + "あ" * 30, "あい" * 8, "かきくけこ、" * 5])
def test_a_text_that_ends_by_itself_is_kept_whole_however_it_repeats_itself(tmp_path, transcribe, text):
    [recording] = transcribe(write(tmp_path / "a.wav", synthesize(text)))
    said = spoken(text)
    assert text_of(recording) in (said, said[:-1])  # of thirty the tiny model misses one
    assert recording.chunks[0].compression_ratio > 2.4 and not recording.chunks[0].looping


def test_a_loop_that_reaches_the_token_limit_is_delivered_once_and_what_follows_is_heard(tmp_path, transcribe):
    [recording] = transcribe(write(tmp_path / "a.wav", synthesize("いう" + "あ" * 30)), max_new_tokens=20)
    first, second = recording.chunks
    assert first.text == "いうあ" and first.looping and not first.token_limit and first.compression_ratio > 2.4
    assert set(second.text) == {"あ"}
    assert first.end == second.start and (first.start, second.end) == (0, recording.duration)


def test_a_loop_is_stopped_when_nobody_can_have_said_so_much(tmp_path, recognizer):
    """By a model that never ends its text. Measurements decode to the limit all the same."""
    path, endless = write(tmp_path / "a.wav", synthesize("こんにちは")), common.endless(recognizer)
    [recording] = inference.transcribe(endless, [path], options_of())
    assert all(chunk.looping for chunk in recording.chunks) and recording.n_tokens < 256
    [recording] = inference.transcribe(endless, [path], options_of(fixed_work=True))
    assert recording.n_tokens == 256


@pytest.mark.parametrize("ids, kept", [("abcabcabc", "abc"), ("xyabcabcabcab", "xyabc"), ("xaaa", "xa"), ("aa", "aa"),
    ("abab", "abab"), ("xabcab", "xabcab"), ("", ""), ("aaaaab", "aaaaab"), ("abaabaabaaba", "aba")])  # fmt: skip
def test_the_first_turn_of_a_loop(ids, kept):
    assert "".join(inference.without_loop(list(ids))) == kept


def test_reading_runs_ahead_in_another_thread_and_its_errors_are_raised():
    threads, third = set(), threading.Event()

    def items():
        for i in range(4):
            threads.add(threading.current_thread())
            if i == 2:
                third.set()
            yield i
        raise ZeroDivisionError

    ahead = inference.ahead(items(), 2)
    assert next(ahead) == 0 and third.wait(10)  # the next two are made while the first is used
    with pytest.raises(ZeroDivisionError):
        assert list(ahead)
    assert threading.main_thread() not in threads and len(threads) == 1
