"""The text that was spoken comes out, whatever the file, the batch and the length."""
import common
import numpy as np
import pytest
from conftest import write
from tone_speech import random_text, spoken, synthesize

import inference

GREETING = "こんにちは、さようなら"


def text_of(transcript: inference.Transcript) -> str:
    assert transcript.error is None
    return "".join(chunk.text for chunk in transcript.chunks)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_sampling_rates(tmp_path, transcribe, rate):
    [transcript] = transcribe(write(tmp_path / "a.wav", synthesize(GREETING, rate), rate))
    assert text_of(transcript) == spoken(GREETING)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_channels(tmp_path, transcribe, channels):
    waveform = np.tile(synthesize(GREETING)[:, None], channels)
    waveform[:, 1:] *= np.linspace(1, 0.5, channels)[1:]
    [transcript] = transcribe(write(tmp_path / "a.wav", waveform))
    assert text_of(transcript) == spoken(GREETING)


@pytest.mark.parametrize(
    "extension, options",
    [
        *(("wav", {"subtype": s}) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
        ("wav", {"subtype": "IMA_ADPCM"}), ("wav", {"subtype": "PCM_16", "format": "RF64"}), ("w64", {}), ("aiff", {}),
        ("au", {}), ("caf", {}), ("flac", {"subtype": "PCM_16"}), ("flac", {"subtype": "PCM_24"}), ("ogg", {}),
        ("opus", {"format": "OGG", "subtype": "OPUS"}), ("mp3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)  # fmt: skip
def test_formats(tmp_path, transcribe, extension, options):
    path = write(tmp_path / f"a.{extension}", synthesize(GREETING, 48_000), 48_000, **options)
    assert text_of(transcribe(path)[0]) == spoken(GREETING)


@pytest.mark.parametrize("level", [0.01, 0.1, 2.0])
def test_levels(tmp_path, transcribe, level):
    path = write(tmp_path / "a.wav", synthesize(GREETING) * level, subtype="FLOAT")
    assert text_of(transcribe(path)[0]) == spoken(GREETING)


def test_a_third_of_a_second(tmp_path, transcribe):
    path = write(tmp_path / "a.wav", synthesize("か", lead_s=0)[: round(0.3 * 16_000)])
    [transcript] = transcribe(path)
    assert (text_of(transcript), transcript.duration) == ("か", 0.3)


@pytest.mark.parametrize("seconds", [31, 45, 60, 600])
def test_long_files_lose_nothing(tmp_path, transcribe, seconds):
    rng = np.random.default_rng(seconds)
    text = random_text(rng, round(seconds / 0.55), pause_every=5)
    waveform = synthesize(text, pause_s=0.8)
    assert len(waveform) > seconds * 16_000
    [transcript] = transcribe(write(tmp_path / "long.flac", waveform))
    assert text_of(transcript) == spoken(text)
    assert transcript.duration == len(waveform) / 16_000
    edges = [0.0, *(chunk.end for chunk in transcript.chunks)]
    assert [chunk.start for chunk in transcript.chunks] == edges[:-1] and edges[-1] == transcript.duration


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[list[str], list[str]]:
    """Twelve files of 1 to 50 s, and their texts."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(5)
    texts = [random_text(rng, n, pause_every=6) for n in (1, 90, 3, 12, 5, 20, 2, 18, 8, 75, 4, 7)]
    paths = [write(folder / f"{i}.wav", synthesize(text, pause_s=0.7)) for i, text in enumerate(texts)]
    return paths, [spoken(text) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 32])
def test_every_batch_size_gives_the_same_text_in_input_order(corpus, transcribe, batch_size):
    paths, texts = corpus
    transcripts = transcribe(*paths, batch_size=batch_size)
    assert [transcript.path for transcript in transcripts] == paths
    assert [text_of(transcript) for transcript in transcripts] == texts


def test_chunks_of_several_files_fill_one_batch(corpus, recognizer):
    chunks = inference.read_files(corpus[0], recognizer.extractor, 15)
    sizes = [sum(features is not None for *_, features in batch) for batch in inference.batches(chunks, 8)]
    assert sizes[:-1] == [8] * (len(sizes) - 1) and sum(sizes) > len(corpus[0])


@pytest.mark.parametrize("chunk_length_s", [4, 10, 30])
def test_chunk_length(corpus, transcribe, chunk_length_s):
    [transcript] = transcribe(corpus[0][1], chunk_length_s=chunk_length_s)
    assert max(s.end - s.start for s in transcript.chunks) <= chunk_length_s
    if chunk_length_s < 30:  # the tiny model was trained on up to 40 kana in a window
        assert text_of(transcript) == corpus[1][1]


def test_a_bad_file_among_good_ones_fails_alone(tmp_path, corpus, transcribe):
    paths, texts = corpus
    waveform = synthesize("あ" * 100)
    waveform[-1] = np.nan
    bad = write(tmp_path / "bad.wav", waveform, subtype="FLOAT")
    good, failed, last = transcribe(paths[1], bad, paths[2])
    assert (text_of(good), text_of(last)) == (texts[1], texts[2])
    assert "NaN" in failed.error


def test_a_file_too_large_for_the_memory_fails_alone(corpus, transcribe, monkeypatch):
    paths, texts = corpus
    read = common.read_chunks

    def read_chunks(path, *options):
        if path == paths[0]:
            raise MemoryError
        return read(path, *options)

    monkeypatch.setattr(common, "read_chunks", read_chunks)
    failed, good = transcribe(paths[0], paths[1])
    assert failed.error == "there is not enough memory to read it" and text_of(good) == texts[1]


def test_silence_is_counted_and_not_decoded(tmp_path, recognizer, transcribe):
    speech, silence = synthesize("こんにちは"), np.zeros(28 * 16_000, np.float32)
    # What the check is for: the model finds words in digital silence.
    features = common.extract_features(recognizer.extractor, silence[: 15 * 16_000])
    assert len(common.generate(recognizer, [features], 20)[0][0]) > 1
    [transcript] = transcribe(write(tmp_path / "a.wav", np.concatenate([speech, silence, speech])))
    assert text_of(transcript) == "こんにちはこんにちは"
    assert (len(transcript.chunks), transcript.silent) == (2, 1)
    [transcript] = transcribe(write(tmp_path / "b.wav", np.zeros(40 * 16_000)))
    assert (text_of(transcript), transcript.silent, transcript.duration) == ("", 3, 40)


def test_the_token_limit_is_seen(tmp_path, transcribe):
    path = write(tmp_path / "a.wav", synthesize("こんにちは"))
    for limit, text, cut in [(3, "こんに", True), (5, "こんにちは", True), (6, "こんにちは", False)]:
        [transcript] = transcribe(path, max_new_tokens=limit)
        assert [(s.text, s.token_limit) for s in transcript.chunks] == [(text, cut)]


def test_a_loop_is_seen_and_kept(tmp_path, transcribe):
    [transcript] = transcribe(write(tmp_path / "a.wav", synthesize("あ" * 30)))
    [chunk] = transcript.chunks
    assert set(chunk.text) == {"あ"} and chunk.looping
    [transcript] = transcribe(write(tmp_path / "b.wav", synthesize(random_text(np.random.default_rng(0), 25))))
    assert not transcript.chunks[0].looping


def test_progress_counts_every_second_once(corpus, transcribe):
    seconds = []
    transcripts = transcribe(*corpus[0], on_progress=seconds.append)
    assert sum(seconds) == pytest.approx(sum(transcript.duration for transcript in transcripts))


def test_reading_runs_ahead_in_another_thread():
    import threading

    threads, made = set(), []

    def items():
        for i in range(4):
            threads.add(threading.current_thread())
            made.append(i)
            yield i

    for i in inference.ahead(items(), 2):
        while len(made) < min(i + 3, 4):  # the next two are made while this one is used
            pass
    assert made == [0, 1, 2, 3] and threading.main_thread() not in threads and len(threads) == 1


def test_what_fails_in_the_background_is_raised():
    def items():
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(inference.ahead(items(), 2))
