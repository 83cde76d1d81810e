"""From a path to chunks: every sample once, in order, cut at pauses, in memory that does not grow."""
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write
from tone_speech import PAUSE, SLOT_S, random_text, synthesize

import common

RATE = 16_000


def blocks_of(path: str):
    return (block for _, block in common.read_blocks(path))


def chunks_of(path: str, chunk_length_s: float = 15, window_s: float = 30):
    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
    return list(common.split_at_pauses(blocks_of(path), rate, chunk_length_s, window_s))


@pytest.mark.parametrize("rate", [1, 50, 149, 8_000, 11_025, 16_000, 44_100, 96_000])
@pytest.mark.parametrize("n_extra", [-1, 0, 1])
@pytest.mark.parametrize("seconds", [1, 15, 30, 45, 61])
def test_every_sample_belongs_to_one_chunk(tmp_path, rate, seconds, n_extra):
    samples = np.random.default_rng(seconds).normal(0, 0.1, max(1, seconds * rate + n_extra)).astype(np.float32)
    path = write(tmp_path / "noise.wav", samples, rate, subtype="FLOAT")
    chunks = chunks_of(path)
    assert max(len(waveform) for _, waveform in chunks) <= (30 if len(chunks) == 1 else 15) * rate
    assert np.array_equal(np.concatenate([waveform for _, waveform in chunks]), samples)
    assert [start for start, _ in chunks] == list(np.cumsum([0] + [len(w) for _, w in chunks[:-1]]))


def test_one_sample_a_second_in_chunks_of_a_second(tmp_path):
    path = write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 40), 1)
    assert [len(waveform) for _, waveform in chunks_of(path, 1)] == [1] * 40


@pytest.mark.parametrize("chunk_length_s", [1, 2.5, 15, 29.99, 30])
def test_no_chunk_is_longer_than_the_limit_or_a_scrap(tmp_path, chunk_length_s):
    samples = np.random.default_rng(0).normal(0, 0.1, 200 * RATE + 1).astype(np.float32)
    chunks = chunks_of(write(tmp_path / "noise.wav", samples, subtype="FLOAT"), chunk_length_s)
    lengths = [len(waveform) / RATE for _, waveform in chunks]
    assert max(lengths) <= chunk_length_s
    assert min(lengths) >= min(0.5 * chunk_length_s - 0.5, common.SHORTEST_TAIL_S) - 1e-3
    assert min(lengths[:-2]) >= 0.49 * chunk_length_s  # cuts lie in the latter half of the stretch


def test_audio_that_fits_the_window_is_one_chunk(tmp_path):
    samples = np.random.default_rng(0).normal(0, 0.1, 30 * RATE).astype(np.float32)
    assert len(chunks_of(write(tmp_path / "30s.wav", samples))) == 1
    assert len(chunks_of(write(tmp_path / "more.wav", np.append(samples, 0.1)))) > 1


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_cuts_fall_into_pauses_not_between_syllables(tmp_path, noise):
    rng = np.random.default_rng(1)
    text = random_text(rng, 120, pause_every=9)
    samples = synthesize(text, RATE, pause_s=0.5)
    path = write(tmp_path / "speech.wav", samples + rng.normal(0, noise, len(samples)))
    pauses, t = [], 0.1
    for character in text:
        pauses += [(t - 0.08, t + 0.5)] if character == PAUSE else []  # a tone ends 0.08 s before its slot
        t += 0.5 if character == PAUSE else SLOT_S
    cuts = [start / RATE for start, _ in chunks_of(path)[1:]]
    assert len(cuts) >= 3
    for cut in cuts:
        assert any(start + 0.1 < cut < end - 0.1 for start, end in pauses), f"{cut:.2f} s is not in a pause"


def test_cut_is_the_quietest_moment_of_the_latter_half():
    waveform = np.random.default_rng(2).normal(0, 0.1, 15 * RATE)
    waveform[3 * RATE : 5 * RATE] = 0  # quieter, but in the former half
    waveform[11 * RATE : 12 * RATE] *= 0.1
    waveform[13 * RATE : 13 * RATE + RATE // 10] = 0  # as short as the closure of a consonant
    assert 11 < common.quietest_cut(waveform, RATE) / RATE < 12


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_silence_is_judged_by_level_whatever_the_offset(tmp_path, offset, recognizer):
    t = np.arange(2 * RATE) / RATE
    for dbfs, silent in [(common.SILENCE_DBFS - 3, True), (common.SILENCE_DBFS + 3, False)]:
        tone = 10 ** (dbfs / 20) * np.sqrt(2) * np.sin(2 * np.pi * 440 * t)
        path = write(tmp_path / "tone.wav", tone + offset, subtype="FLOAT")
        [(_, _, waveform)] = common.read_chunks(path, recognizer.extractor, 15)
        assert (waveform is None) == silent


def test_chunks_are_resampled_to_the_model_rate(tmp_path, recognizer):
    t = np.arange(48_000) / 48_000
    path = write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * t), 48_000)
    [(start, end, waveform)] = common.read_chunks(path, recognizer.extractor, 15)
    assert (start, end, len(waveform), waveform.dtype) == (0, 1, RATE, np.float32)
    assert np.abs(np.fft.rfft(waveform)).argmax() == 1000


def test_channels_are_mixed_down(tmp_path):
    left, right = np.full(RATE, 0.5), np.full(RATE, -0.25)
    path = write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    assert np.allclose(np.concatenate(list(blocks_of(path))), 0.125)


def errors_of(path) -> str:
    with pytest.raises(common.AudioError) as caught:
        list(common.read_blocks(str(path)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_without_audio_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no ffmpeg
    assert errors_of(tmp_path / "absent.wav") == "no such file or folder"
    (tmp_path / "empty.wav").touch()
    assert errors_of(tmp_path / "empty.wav") == "empty (0 bytes)"
    (tmp_path / "text.wav").write_text("こんにちは")
    assert "libsndfile" in errors_of(tmp_path / "text.wav") and "ffmpeg" in errors_of(tmp_path / "text.wav")
    assert "0 samples" in errors_of(write(tmp_path / "header.wav", np.zeros(0)))
    os.mkfifo(tmp_path / "pipe.wav")
    assert errors_of(tmp_path / "pipe.wav") == "not a regular file"
    (tmp_path / "headerless.raw").write_bytes(bytes(1000))
    assert "libsndfile" in errors_of(tmp_path / "headerless.raw")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_refused(tmp_path, bad):
    samples = np.zeros(3 * RATE, np.float32)
    samples[2 * RATE + 5] = bad
    assert errors_of(write(tmp_path / "bad.wav", samples, subtype="FLOAT")) == (
        "NaN or infinite samples in the second after 2 s"
    )


def test_a_damaged_file_is_an_error_not_a_short_transcript(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 10 * RATE)
    path = write(tmp_path / "noise.flac", noise)
    data = Path(path).read_bytes()
    (tmp_path / "short.flac").write_bytes(data[: len(data) // 2])
    assert errors_of(tmp_path / "short.flac").startswith("damaged after 4 s")


def test_memory_held_does_not_grow_with_the_audio():
    block, held = np.zeros(RATE, np.float32), []
    blocks = (block for _ in range(3600))
    for _, waveform in common.split_at_pauses(blocks, RATE, 15, 30):
        base = waveform if waveform.base is None else waveform.base
        held.append(base.nbytes)
    assert max(held) <= 4 * RATE * 33


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch) -> str:
    """The ffmpeg program, alone on the PATH."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", str(folder))
    return shutil.which("ffmpeg")


@pytest.mark.parametrize("extension", ["m4a", "mp4", "webm"])
def test_what_libsndfile_cannot_read_goes_through_ffmpeg(tmp_path, ffmpeg, extension, transcribe):
    wav = write(tmp_path / "a.wav", synthesize("こんにちは", 48_000), 48_000)
    path = str(tmp_path / f"- 'a' $HOME;.{extension}")  # a name that a shell would trip over
    subprocess.run([ffmpeg, "-v", "error", "-i", wav, f"file:{path}"], check=True)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)
    [transcript] = transcribe(path)
    assert (transcript.error, [s.text for s in transcript.segments]) == (None, ["こんにちは"])


def test_a_file_that_ffmpeg_cannot_read_is_one_line(tmp_path, ffmpeg):
    (tmp_path / "text.m4a").write_text("こんにちは" * 100)
    assert errors_of(tmp_path / "text.m4a").startswith("damaged, or not audio (")
    wav = write(tmp_path / "a.wav", synthesize("こんにちは" * 10))
    subprocess.run([ffmpeg, "-v", "error", "-i", wav, str(tmp_path / "a.mkv")], check=True)
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    data[len(data) // 2 :] = os.urandom(len(data) - len(data) // 2)
    (tmp_path / "a.mkv").write_bytes(data)
    assert errors_of(tmp_path / "a.mkv").startswith("damaged, or not audio (")
