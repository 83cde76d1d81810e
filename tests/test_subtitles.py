"""Times and cues: against the truth of tone speech, and over random texts."""
import html
import json
import random
import re

import common
import numpy as np
import pytest
import srt
import torch
import webvtt
from conftest import FAKE_NPU, MODEL, TESTS, needs_fake, options_of, run, write
from tone_speech import KANA, SLOT_S, TONE_S, random_text, synthesize, tone

import inference

JSON = options_of(max_new_tokens=64)


def timed_speech(rng: np.random.Generator) -> tuple[np.ndarray, str, list[float]]:
    """As the tiny model's training has it, pauses, leading silence, levels and noise: waveform, text, true starts."""
    t, pieces = rng.uniform(0, 0.5), []
    for i in range(rng.integers(2, 21)):
        t += rng.uniform(0.3, 1.5) if i and rng.random() < 0.12 else 0
        pieces.append((t, KANA[rng.integers(len(KANA))]))
        t += SLOT_S
    waveform = np.zeros(round((t + rng.uniform(0, 1)) * 16_000))
    for start, kana in pieces:
        chord = tone(kana, 16_000) * rng.uniform(0.6, 1.1)
        waveform[round(start * 16_000) :][: len(chord)] += chord
    waveform = waveform * 10 ** rng.uniform(-1, 0.2) + rng.normal(0, 10 ** rng.uniform(-5, -2.5), len(waveform))
    return waveform.astype(np.float32), "".join(kana for _, kana in pieces), [start for start, _ in pieces]


def chunk_to_decode(recognizer, waveform: np.ndarray) -> inference.Chunk:
    """A chunk that is a recording of its own."""
    recording, features = inference.Recording(""), common.extract_features(recognizer.extractor, waveform)
    chunk = inference.Chunk(
        0, len(waveform) / 16_000, waveform, recording, features=features,
        loud_frames=inference.find_loud_frames(waveform),
    )
    recording.chunks.append(chunk)
    return chunk


def measure(device: str, dtype: str, n: int) -> dict[str, float]:
    """How far the starts and ends of n texts' characters are from the truth, in seconds."""
    where = common.select_device(device)
    recognizer = common.load_model(MODEL, where, common.select_dtype(dtype, where))
    rng, errors, n_aligned, n_exact = np.random.default_rng(13), [], 0, 0
    speech = [timed_speech(rng) for _ in range(n)]
    chunks = [chunk_to_decode(recognizer, waveform) for waveform, *_ in speech]
    for first in range(0, n, 16):
        inference.recognize(recognizer, chunks[first : first + 16], 16, JSON)
    for chunk, (_, text, starts) in zip(chunks, speech, strict=True):
        if chunk.text == text:  # else there is no telling which character is which
            n_exact += 1
            n_aligned += chunk.aligned
            errors += list(chunk.times[:, 0] - starts)
    return {
        "exact": n_exact, "proportional": n_exact - n_aligned, "starts": len(errors), "bias": np.median(errors),
        "median": np.median(np.abs(errors)), "90 %": np.quantile(np.abs(errors), 0.9), "worst": np.abs(errors).max(),
    }  # fmt: skip


def check(figures: dict[str, float], label: str, n: int) -> None:
    print(label, " ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    assert figures["exact"] >= 0.95 * n and figures["proportional"] <= 0.05 * figures["exact"]
    assert figures["median"] <= 0.1 and figures["90 %"] <= 0.25


@pytest.mark.parametrize("dtype, n", [("float32", 100), ("bfloat16", 50)])
def test_characters_begin_when_they_are_spoken(dtype, n):
    check(measure("cpu", dtype, n), f"cpu, {dtype}:", n)


@needs_fake
def test_characters_begin_when_they_are_spoken_on_the_npu():
    code = "import json, test_subtitles; print(json.dumps(test_subtitles.measure('npu', 'float16', 50)))"
    result = run("-c", code, environment={"PYTHONPATH": f"{FAKE_NPU}:{TESTS}"})
    assert result.returncode == 0, result.stderr
    check(json.loads(result.stdout), "npu, float16:", 50)


def align(recognizer, waveform: np.ndarray, text: str) -> inference.Chunk:
    """A chunk that says text, whatever was spoken, with its times."""
    ids = recognizer.tokenizer(text, add_special_tokens=False).input_ids
    return align_tokens(recognizer, waveform, [*ids, recognizer.tokenizer.eos_token_id])


def align_tokens(recognizer, waveform: np.ndarray, ids: list[int]) -> inference.Chunk:
    chunk = chunk_to_decode(recognizer, waveform)
    inference.set_text(chunk, recognizer.tokenizer, ids, 0.0)
    chunk.token_ids = ids  # also where they loop
    chunk.text = recognizer.tokenizer.decode(ids, skip_special_tokens=True)
    with torch.inference_mode():
        encoded = common.encode(recognizer.model, chunk.features)
        [(weights, _)] = inference.force_texts(recognizer, encoded, [ids])
    inference.set_times(chunk, recognizer.tokenizer, weights)
    return chunk


@pytest.mark.parametrize("prompt", ["", "さようなら。"])
def test_the_attention_is_that_of_transformers(prompt):
    """Against output_attentions of the eager attention; also in a batch, with a row shorter than another."""
    import transformers

    eager = transformers.WhisperForConditionalGeneration.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    recognizer = common.load_model(MODEL, torch.device("cpu"), torch.float32, prompt=prompt)
    features = common.extract_features(recognizer.extractor, synthesize("こんにちは"))
    rows = [recognizer.tokenizer(text, add_special_tokens=False).input_ids for text in ("こんにちは", "こん")]
    with torch.inference_mode():
        encoded = common.encode(recognizer.model, features).expand(2, -1, -1)
        ours = list(inference.force_texts(recognizer, encoded, rows))
        for ids, (weights, logprobs) in zip(rows, ours, strict=True):
            inputs, n = torch.tensor([[*recognizer.initial_tokens.tolist(), *ids[:-1]]]), len(ids)
            theirs = eager(input_features=features, decoder_input_ids=inputs, output_attentions=True)
            attention = torch.cat(theirs.cross_attentions, 1)[0, :, -n:]
            torch.testing.assert_close(weights, attention)
            logits = theirs.logits[0, -n:]
            logits[:, torch.isinf(recognizer.token_mask[1])] = -torch.inf
            logits[0, torch.isinf(recognizer.token_mask[0])] = -torch.inf
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
            torch.testing.assert_close(logprobs, -loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("said, text, why", [
    ("こんにちは", "", "no text"), ("あ", "さようなら" * 40, "more tokens than frames"),
    ("さようならまたあしたあいたい", "き", "a token of more than 2 s"),
])  # fmt: skip
def test_a_doubtful_alignment_shares_the_loud_frames(recognizer, said, text, why):
    chunk = align(recognizer, synthesize(said, lead_s=1.0), text)
    assert not chunk.aligned, why
    if text:
        lead_s = 0 if why == "more tokens than frames" else 1  # then what is loud is not what was said
        assert chunk.times[0, 0] == pytest.approx(lead_s, abs=0.03) and (np.diff(chunk.times) > 0).all()


@pytest.mark.parametrize("n_bytes", [1, 2, 3])
def test_bytes_of_a_character_share_its_time_and_half_a_character_turns_no_time_back(recognizer, n_bytes):
    """The tiny model's tokens have no kanji and no emoji: each takes three or four tokens there."""
    tokenizer, waveform = recognizer.tokenizer, synthesize("こんにちは、さようなら")
    before, kanji, after = tokenizer(["こんにちは", "漢", "さようなら😀。"], add_special_tokens=False).input_ids
    chunk = align_tokens(recognizer, waveform, [*before, *kanji[:n_bytes], *after, tokenizer.eos_token_id])
    assert ("\ufffd" in chunk.text) == (n_bytes < 3) and chunk.aligned
    assert chunk.token_starts == {*range(len(chunk.text))} and len(chunk.times) == len(chunk.text)
    assert (np.diff(chunk.times.ravel()) >= 0).all() and (np.diff(chunk.times) > 0).all()


@pytest.mark.parametrize("n_tokens", [370, 400, 430, 1000])
def test_units_are_made_of_whole_tokens_and_whole_characters(recognizer, n_tokens):
    """Against the offsets with which a tokenizer writes texts, from bytes and halves of characters to whole words."""
    texts = ["「こんにちは」、「漢字」は難しい。「😀」と言った、「はい」", "（笑）そうですか？ ええ。"]
    texts += ["さようなら👨‍👩‍👧é。Hello the world, it's 12,345円", "ー々㌔ﾊﾟ𠮷野家"]
    tokenizer = recognizer.tokenizer.train_new_from_iterator(3 * texts, n_tokens, show_progress=False)
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        units, token_starts = inference.find_units(tokenizer, encoded.input_ids, text)
        firsts, stops = zip(*encoded.offset_mapping, strict=True)
        assert token_starts == {first for first, done in zip(firsts, (0, *stops), strict=False) if first >= done}
        assert "".join(text[unit.first : unit.stop] for unit in units) == text
        for unit in units:
            assert unit.first <= firsts[unit.tokens.start] and stops[unit.tokens][-1] <= unit.stop
            assert re.search(r"\w", text[firsts[unit.tokens.start] : stops[unit.tokens][-1]])
        assert not any(text[unit.stop - 1] in inference.NOT_LAST for unit in units)


@pytest.mark.parametrize("written, units", [
    (" He said . あ ? ", ["H", "e", " s", "a", "i", "d.", " あ?"]),  # transformers takes out spaces before signs
    ("あ\tい\n", ["あ", " い"]), ("、。", []), ("", []), ("「『あ」。（い、「う」", ["「『あ」。", "（い、", "「う」"]),
])  # fmt: skip
def test_units_are_all_of_the_text_that_is_left_of_the_tokens(recognizer, written, units, monkeypatch):
    monkeypatch.setattr(recognizer.tokenizer, "clean_up_tokenization_spaces", True)  # as for kotoba-whisper
    ids = recognizer.tokenizer(written, add_special_tokens=False).input_ids
    assert units_of(recognizer.tokenizer, ids) == units


@pytest.mark.parametrize("missing, units", [(slice(1), ["か\ufffd\ufffd", "き"]), (slice(1, 2), ["か\ufffd", "き"])])
def test_bytes_that_make_no_character_belong_to_what_is_before_them(recognizer, missing, units):
    """A character's first byte is missing, or the next one; the text is what the tokenizer makes of the rest."""
    before, kanji, after = recognizer.tokenizer(["か", "漢", "き"], add_special_tokens=False).input_ids
    del kanji[missing]
    assert units_of(recognizer.tokenizer, [*before, *kanji, *after]) == units
    assert units_of(recognizer.tokenizer, [*before, *kanji]) == units[:1]


def units_of(tokenizer, ids: list[int]) -> list[str]:
    """The characters of each unit of a decoded text, among which must be those of the unit's tokens."""
    chunk = inference.Chunk(0, 0, None, None)
    inference.set_text(chunk, tokenizer, [*ids, tokenizer.eos_token_id], 0.0)
    units, _ = inference.find_units(tokenizer, ids, chunk.text)
    shown = [chunk.text[unit.first : unit.stop] for unit in units]
    assert all(tokenizer.decode(ids[unit.tokens]).strip() in text for unit, text in zip(units, shown, strict=True))
    return shown


def test_a_bang_does_not_hide_the_speech(tmp_path, transcribe):
    """Noise 34 dB above the speech after it: nothing but the noise is loud."""
    speech = 0.02 * synthesize("こんにちは、さようなら")
    noise = np.random.default_rng(0).normal(0, 0.3, 4_800)
    path = write(tmp_path / "a.wav", np.concatenate([noise, speech]))
    [recording] = transcribe(path)
    cues = inference.cues_of(recording)
    assert sum(cue.end - cue.start for cue in cues) > 0.8 * len(speech) / 16_000


def test_a_long_pause_ends_a_segment_and_no_segment_outlasts_the_speech(recognizer):
    rng, chunks, truth = np.random.default_rng(1), [], []
    for _ in range(48):
        parts = [random_text(rng, int(rng.integers(2, 8))) for _ in range(3)]
        pause_s, lead_s = float(rng.choice([1.0, 1.5, 2.5])), float(rng.uniform(0.1, 0.5))
        waveform = np.append(synthesize("、".join(parts), pause_s=pause_s, lead_s=lead_s), np.zeros(16_000, np.float32))
        chunks.append(chunk_to_decode(recognizer, waveform))
        lengths = np.cumsum([0, *map(len, parts)])
        ends = [lead_s + pause_s * i + SLOT_S * lengths[i + 1] - SLOT_S + TONE_S for i in range(3)]
        truth.append(("".join(parts), lengths[1:], ends))
    inference.recognize(recognizer, chunks, 16, JSON)
    n_pauses = n_missed = 0
    for chunk, (text, lengths, ends) in zip(chunks, truth, strict=True):
        if chunk.text == text:
            cues = inference.cues_of(chunk.recording)
            found = dict(zip(np.cumsum([len(cue.text) for cue in cues]).tolist(), cues, strict=True))
            n_pauses += 2
            n_missed += sum(n not in found for n in lengths[:-1].tolist())
            for n, end in zip(lengths.tolist(), ends, strict=True):
                assert n not in found or found[n].end <= max(end + 0.3, found[n].start + 1)
    print(f"{n_missed} of {n_pauses} pauses ended no cue")
    assert n_pauses >= 60 and n_missed <= 0.05 * n_pauses


# --- cues ---


def chunk_of(text: str, start: float, seconds: float, rng: random.Random, tokens: bool) -> inference.Chunk:
    """A chunk whose characters are spoken at random times, some after long pauses."""
    chunk = inference.Chunk(start, start + seconds, None, None, text=text.strip(), left_out=False, aligned=True)
    chunk.token_starts = {i for i in range(len(text)) if rng.random() < 0.6 or not tokens}
    n = len(chunk.text)
    chunk.times = np.sort([rng.uniform(0, seconds) for _ in range(2 * n)]).reshape(n, 2)
    silent = [i for i in range(1, n) if not re.match(r"\w", chunk.text[i])]
    chunk.times[silent, 0] = chunk.times[[i - 1 for i in silent], 1]
    chunk.times += start
    chunk.no_speech_prob = 0.0
    return chunk


ALPHABETS = {
    "kana": "あいうえおかきくけこさしすせそんっゃょー",
    "mixed": "日本語はカタカナとABC、xyz 123。「」！？ーっ",
    "english": "abcdefgh    ,.'-?",
    "emoji": "😀👍🏽👨‍👩‍👧🇯🇵é♪あ",
    "signs": "、。！？」』）ーっょ「（『",
    "spaces": "あ a　b",
    "markup": "<b>&;あ->",
}  # fmt: skip


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("limits", [(16, 2), (5, 1)], ids=str)
def test_cues_lose_nothing_overlap_nowhere_and_keep_the_limits(alphabet, limits, monkeypatch):
    rng = random.Random(f"{alphabet} {limits}")
    if limits == (5, 1):  # the others are inference.py's own
        monkeypatch.setattr(inference, "LINE_CELLS", limits[0])
        monkeypatch.setattr(inference, "CUE_LINES", limits[1])
    for _ in range(30):
        n_chunks, chunks = rng.randrange(1, 4), []
        for i in range(n_chunks):
            text = "".join(rng.choice(ALPHABETS[alphabet]) for _ in range(rng.choice([1, 5, 40, 100, 400])))
            chunks.append(chunk_of(text, 15.0 * i, 15.0, rng, tokens=rng.random() < 0.7))
        recording = inference.Recording("x.wav", chunks)
        cues = inference.cues_of(recording)
        for chunk in chunks:
            assert "".join(cue.text for cue in cues if cue.chunk is chunk) == chunk.text
        assert all("".join(word for word, *_ in cue.words) == cue.text for cue in cues)
        for cue, following in zip(cues, [*cues[1:], None], strict=False):
            assert 0 <= cue.start <= cue.end <= (following.start if following else recording.duration)
            assert cue.end - cue.start <= 7 + 1e-9
            assert all(cue.start <= start <= end <= cue.end for _, start, end in cue.words)
            assert re.sub(r"\s", "", "".join(cue.lines)) == re.sub(r"\s", "", cue.text)
            assert max(map(inference.cells, cue.lines)) <= limits[0]
            if re.search(r"\w", cue.text):
                assert len(cue.lines) <= limits[1]
        check_kinsoku(cues)
        check_subtitles(recording, cues)


def check_kinsoku(cues: list[inference.Cue]) -> None:
    """No line begins or ends with what must not stand there, unless nothing else was possible."""
    for cue in cues:
        qualities = inference.break_qualities(cue.text, set())
        for before, after in zip(cue.lines, cue.lines[1:], strict=False):
            if after[0] in "、。！？」』）ーっょ" or before[-1] in "「『（":
                first = cue.text.index(before)
                assert not any(qualities[first + 1 : first + len(before) + 1]), cue.lines


def check_subtitles(recording: inference.Recording, cues: list[inference.Cue]) -> None:
    """SRT and WebVTT are read back by other programs' parsers as they were meant."""
    shown = ["\n".join(cue.lines) for cue in cues]
    arrows = [text.replace("-->", "->") for text in shown]  # as in openai/whisper
    subtitles = list(srt.parse(inference.render(recording, "srt", "ja")))
    assert [subtitle.content for subtitle in subtitles] == arrows
    assert [subtitle.index for subtitle in subtitles] == list(range(1, len(cues) + 1))
    captions = webvtt.from_string(inference.render(recording, "vtt", "ja"))
    assert [html.unescape(caption.text) for caption in captions] == shown
    for cue, subtitle, caption in zip(cues, subtitles, captions, strict=True):
        assert subtitle.start.total_seconds() == pytest.approx(cue.start, abs=0.001)
        assert caption.end_in_seconds == pytest.approx(cue.end, abs=1)


@pytest.mark.parametrize("text, expected", [
    ("はい。そうです。", ["はい。", "そうです。"]), ("本当？！うん", ["本当？！", "うん"]),
    ("「はい。」そう", ["「はい。」", "そう"]), ("3.5 is it. Yes", ["3.5 is it.", " Yes"]), ("。あ。。", ["。あ。。"]),
    ("今日は晴れ!でも寒い?うん", ["今日は晴れ!", "でも寒い?", "うん"]), ("", []),
    ("すごい！ーほんと", ["すごい！ーほんと"]), ("え？っそうなの", ["え？っそうなの"]), ("5. りんご", ["5. りんご"]),
    ("I met Mr. Smith in the U.S. today. Yes", ["I met Mr. Smith in the U.S. today.", " Yes"]),
])  # fmt: skip
def test_sentences(text, expected):
    assert [text[first:end] for first, end in inference.sentences(text)] == expected
    assert "".join(expected) == text


def test_lines_break_between_words(monkeypatch):
    def lines(text: str, width: float) -> list[str]:
        monkeypatch.setattr(inference, "LINE_CELLS", width)
        return inference.break_lines(text, inference.break_qualities(text, set(range(len(text)))))

    assert lines("The quick brown fox jumps over it", 10) == ["The quick brown", "fox jumps over it"]
    assert lines("今日はいい天気なので、散歩に行きました", 13) == ["今日はいい天気なので、", "散歩に行きました"]
    assert lines("価格は全部で1,234,567円になります", 11) == ["価格は全部で", "1,234,567円になります"]
    assert lines("iPhoneを買いました", 8) == ["iPhoneを", "買いました"]
    assert lines("来週は大切なお客様が来ます", 9) == ["来週は大切な", "お客様が来ます"]
    assert lines("今月の売り上げが増えました", 8) == ["今月の売り上げが", "増えました"]


def test_a_cue_is_cut_at_a_long_pause_ends_with_the_speech_and_stays_a_second(tmp_path, transcribe):
    text = "こんにちは、、き、、さようなら"
    [recording] = transcribe(write(tmp_path / "a.wav", synthesize(text, pause_s=1.0)))
    first, short, last = inference.cues_of(recording)
    assert (first.text, short.text, last.text) == tuple(re.split("、+", text))
    assert first.start == pytest.approx(0.1, abs=0.1) and first.end == pytest.approx(0.1 + 5 * SLOT_S, abs=0.2)
    assert short.start == pytest.approx(0.1 + 5 * SLOT_S + 2, abs=0.1) and short.end - short.start == pytest.approx(1)


def test_text_on_stdout_is_that_of_the_file(tmp_path, infer):
    path = write(tmp_path / "a.wav", synthesize("こんにちは、、さようなら"))
    assert infer("--audio", path, "-f", "all", "-o", tmp_path)[0] == 0
    assert infer("--audio", path)[1] == (tmp_path / "a.txt").read_text() == "こんにちはさようなら\n"
