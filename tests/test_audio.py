"""From a path to chunks: every sample once, in order, cut at pauses, in memory that does not grow."""
import contextlib
import os
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import common
import numpy as np
import pytest
import soundfile
from conftest import ROOT, write
from tone_speech import PAUSE, SLOT_S, random_text, synthesize

RATE = 16_000


def blocks_of(path: str):
    return (block for _, block in common.read_blocks(path))


def chunks_of(path: str, chunk_length_s: float = 15):
    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
    return list(common.split_at_pauses(blocks_of(path), rate, chunk_length_s))


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
def test_silence_is_judged_by_level_whatever_the_offset(tmp_path, offset):
    t = np.arange(2 * RATE) / RATE
    for dbfs, silent in [(common.SILENCE_DBFS - 3, True), (common.SILENCE_DBFS + 3, False)]:
        tone = 10 ** (dbfs / 20) * np.sqrt(2) * np.sin(2 * np.pi * 440 * t)
        path = write(tmp_path / "tone.wav", tone + offset, subtype="FLOAT")
        [(_, _, waveform)] = common.read_chunks(path, 15)
        assert (waveform is None) == silent


def test_chunks_are_resampled_to_the_model_rate(tmp_path):
    t = np.arange(48_000) / 48_000
    path = write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * t), 48_000)
    [(start, end, waveform)] = common.read_chunks(path, 15)
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
    assert errors_of(write(tmp_path / "bad.wav", samples, subtype="FLOAT")) == "NaN or infinite samples"


def test_a_damaged_file_is_an_error_not_a_short_transcript(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 10 * RATE)
    path = write(tmp_path / "noise.flac", noise)
    data = Path(path).read_bytes()
    (tmp_path / "short.flac").write_bytes(data[: len(data) // 2])
    assert errors_of(tmp_path / "short.flac").startswith("damaged after 4 s")


def test_memory_held_does_not_grow_with_the_audio():
    block, held = np.zeros(RATE, np.float32), []
    blocks = (block for _ in range(3600))
    for _, waveform in common.split_at_pauses(blocks, RATE, 15):
        base = waveform if waveform.base is None else waveform.base
        held.append(base.nbytes)
    assert max(held) <= 4 * RATE * 33


# --- through ffmpeg, with that of the distribution and a newer one ---

FFMPEGS = {"distribution": shutil.which("ffmpeg"), "imageio": None}
with contextlib.suppress(ImportError):
    import imageio_ffmpeg

    FFMPEGS["imageio"] = imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg_alone(name: str, folder: Path, monkeypatch) -> str:
    """The program of FFMPEGS, alone on the PATH."""
    if FFMPEGS[name] is None:
        pytest.skip(f"there is no ffmpeg of {name} on this machine")
    folder.mkdir(exist_ok=True)
    (folder / "ffmpeg").symlink_to(FFMPEGS[name])
    monkeypatch.setenv("PATH", str(folder))
    return str(folder / "ffmpeg")


@pytest.fixture(params=FFMPEGS)
def ffmpeg(request, tmp_path, monkeypatch) -> str:
    """Each ffmpeg, alone on the PATH."""
    return ffmpeg_alone(request.param, tmp_path / "bin", monkeypatch)


def encode(ffmpeg: str, waveform: np.ndarray, rate: int, path, *options: str) -> str:
    """Have ffmpeg write a file of another format."""
    wav = write(Path(f"{path}.wav"), waveform, rate, subtype="FLOAT")
    subprocess.run([ffmpeg, "-v", "error", "-y", "-i", wav, *options, f"file:{path}"], check=True)
    os.remove(wav)
    return str(path)


def samples_of(path) -> tuple[int, np.ndarray]:
    rates, blocks = zip(*common.read_blocks(str(path)), strict=True)
    [rate] = set(rates)
    return rate, np.concatenate(blocks)


def speech_of(n_channels: int, rate: int) -> np.ndarray:
    """Speech and noise, other in each channel: (n, n_channels) float32 below full scale."""
    rng = np.random.default_rng(n_channels)
    speech = synthesize(random_text(rng, 8), rate)
    return np.stack([speech * (0.9 - 0.1 * i) + rng.normal(0, 0.01, len(speech)) for i in range(n_channels)], 1)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("n_channels", [1, 2, 6])
@pytest.mark.parametrize("extension, codec", [("m4a", "alac"), ("mov", "pcm_f32le"), ("mkv", "flac")])
def test_samples_through_ffmpeg_are_those_that_went_in(tmp_path, ffmpeg, extension, codec, n_channels, rate):
    waveform = speech_of(n_channels, rate).astype(np.float32)
    path = encode(ffmpeg, waveform, rate, tmp_path / f"a.{extension}", "-c:a", codec)
    got_rate, got = samples_of(path)
    assert (got_rate, len(got)) == (rate, len(waveform))
    assert np.abs(got - waveform.mean(1)).max() < 1e-4


@pytest.mark.parametrize("extension, codec", [("m4a", "aac"), ("mp4", "aac"), ("webm", "libopus"), ("mkv", "ac3"),
    ("wma", "wmav2"), ("ac3", "ac3"), ("aac", "aac"), ("ts", "mp2"), ("avi", "libmp3lame"), ("3gp", "aac"),
])  # fmt: skip
def test_lossy_formats_are_as_another_ffmpeg_decodes_them(tmp_path, ffmpeg, extension, codec):
    path = encode(ffmpeg, speech_of(2, 48_000), 48_000, tmp_path / f"a.{extension}", "-c:a", codec)
    rate, got = samples_of(path)
    other = next((exe for exe in FFMPEGS.values() if exe and exe != os.readlink(ffmpeg)), ffmpeg)
    subprocess.run([other, "-v", "error", "-i", f"file:{path}", "-c:a", "pcm_s16le", tmp_path / "o.wav"], check=True)
    with wave.open(str(tmp_path / "o.wav")) as file:
        expected = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels()) / 32768
    expected = expected.mean(1)
    n = min(len(got), len(expected)) - 2400
    # Versions of ffmpeg differ in whether they leave out what an encoder puts before the first sample.
    shift = max(range(-2400, 2401), key=lambda k: got[2400 : n : 7] @ expected[2400 + k : n + k : 7])
    assert rate == 48_000 and n > 0.95 * max(len(got), len(expected))
    assert np.abs(got[2400:n] - expected[2400 + shift : n + shift]).max() < 2e-3


@pytest.mark.parametrize("n_channels", [2, 6, 8, 16])
def test_antiphase_or_a_single_channel_through_ffmpeg(tmp_path, ffmpeg, n_channels):
    speech = synthesize("こんにちは")
    waveform = np.zeros((len(speech), n_channels), np.float32)
    waveform[:, 0], waveform[:, 1] = speech, -speech
    path = encode(ffmpeg, waveform, RATE, tmp_path / "a.mkv", "-c:a", "pcm_s16le")
    assert np.abs(samples_of(path)[1] - speech).max() < 1e-3


def test_a_recording_that_begins_mid_stream(tmp_path, ffmpeg, transcribe):
    """A transport stream, cut in the middle of a picture."""
    wav = write(tmp_path / "a.wav", synthesize("こんにちは、さようなら", pause_s=2.0))
    picture = ["-f", "lavfi", "-i", "testsrc=size=320x240:rate=25", "-c:v", "mpeg2video", "-g", "50", "-c:a", "mp2"]
    subprocess.run([ffmpeg, "-v", "error", "-i", wav, *picture, "-shortest", tmp_path / "a.ts"], check=True)
    data = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "b.ts").write_bytes(data[3 * len(data) // 5 :])
    said = subprocess.run([ffmpeg, "-v", "error", "-i", tmp_path / "b.ts", "-f", "null", "-"], capture_output=True)
    assert b"mpeg2video" in said.stderr  # it does complain
    [transcript] = transcribe(str(tmp_path / "b.ts"))
    assert (transcript.error, "".join(s.text for s in transcript.chunks)) == (None, "さようなら")


def test_a_picture_without_sound_says_so(tmp_path, ffmpeg):
    subprocess.run([ffmpeg, "-v", "error", "-f", "lavfi", "-i", "testsrc=duration=1", tmp_path / "a.mp4"], check=True)
    assert errors_of(tmp_path / "a.mp4") == "no sound in it, only a picture"


@pytest.mark.parametrize("extension", ["m4a", "mp4", "webm"])
def test_what_libsndfile_cannot_read_goes_through_ffmpeg(tmp_path, ffmpeg, extension, transcribe):
    name = f"- 'a' $HOME;.{extension}"  # that a shell would trip over
    path = encode(ffmpeg, synthesize("こんにちは", 48_000), 48_000, tmp_path / name)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)
    [transcript] = transcribe(path)
    assert (transcript.error, [s.text for s in transcript.chunks]) == (None, ["こんにちは"])


@pytest.mark.parametrize("extension", ["mkv", "webm", "wma", "aac"])
def test_a_file_that_ffmpeg_cannot_read_is_one_line(tmp_path, ffmpeg, extension):
    (tmp_path / "text.m4a").write_text("こんにちは" * 100)
    assert errors_of(tmp_path / "text.m4a").startswith("damaged, or not audio (")
    path = Path(encode(ffmpeg, synthesize("こんにちは" * 10, 48_000), 48_000, tmp_path / f"a.{extension}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = np.random.default_rng(0).bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    assert errors_of(path).startswith("damaged, or not audio (")


# --- joined recordings ---

PLAIN_MP3 = ["-write_xing", "0", "-id3v2_version", "0"]


def joined(folder: Path, extension: str, rates=(44_100, 44_100, 44_100), **options) -> tuple[str, list[np.ndarray]]:
    """Three recordings in one file, as by cat, and the samples of each as libsndfile reads it alone."""
    parts, data = [], b""
    for i, (text, rate) in enumerate(zip(("こんにちは" * 3, "さようなら", "なにぬねの" * 2), rates, strict=True)):
        path = write(folder / f"{i}.{extension}", synthesize(text, rate), rate, **options)
        data += Path(path).read_bytes()
        parts.append(soundfile.read(path, dtype="float32")[0])
    (folder / f"joined.{extension}").write_bytes(data)
    return str(folder / f"joined.{extension}"), parts


@pytest.mark.parametrize("extension, options", [("mp3", {}), ("flac", {}), ("ogg", {}), ("wav", {}),
    ("opus", {"format": "OGG", "subtype": "OPUS"}), ("aiff", {}), ("au", {}), ("caf", {}),
    ("rf64", {"format": "RF64"})])  # fmt: skip
def test_joined_recordings_are_read_to_the_end(tmp_path, monkeypatch, extension, options):
    monkeypatch.setenv("PATH", "")  # no ffmpeg
    rates = (48_000,) * 3 if extension == "opus" else (44_100,) * 3
    path, parts = joined(tmp_path, extension, rates, **options)
    _, got = samples_of(path)
    assert np.array_equal(got, np.concatenate(parts))


@pytest.mark.parametrize("options", [[], ["-write_xing", "0"], ["-write_xing", "0", "-q:a", "3"],
                                     ["-id3v2_version", "0"], ["-q:a", "3", "-ac", "2"]], ids=str)  # fmt: skip
def test_joined_mp3_of_every_kind_lose_nothing(tmp_path, ffmpeg, transcribe, options):
    texts = ["こんにちは" * 3, "さようなら", "なにぬねの" * 2]
    parts = [encode(ffmpeg, synthesize(text, 44_100), 44_100, tmp_path / f"{i}.mp3", *options)
             for i, text in enumerate(texts)]  # fmt: skip
    path = tmp_path / "joined.mp3"
    path.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    [transcript] = transcribe(str(path))
    if transcript.error is None:
        assert "".join(s.text for s in transcript.chunks) == "".join(texts)
    else:  # guessed length and tags in between are too much for both libsndfile and ffmpeg
        assert options == ["-write_xing", "0", "-q:a", "3"] and "damaged, or not audio" in transcript.error


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("extension, options", [
    ("mp3", []), ("mp3", ["-q:a", "4"]), ("mp3", ["-b:a", "32k"]), ("mp3", PLAIN_MP3),
    ("mp3", ["-q:a", "3", "-write_xing", "0"]),
    ("ogg", ["-c:a", "libvorbis"]), ("flac", []), ("wav", ["-c:a", "adpcm_ms"]),
])  # fmt: skip
def test_samples_are_as_ffmpeg_decodes_them(tmp_path, ffmpeg, extension, options, rate):
    """libsndfile's, read second by second."""
    path = encode(ffmpeg, speech_of(2, rate), rate, tmp_path / f"a.{extension}", *options)
    got_rate, got = samples_of(path)
    decode = [ffmpeg, "-v", "error", "-i", path, "-f", "f32le", "-"]
    expected = np.frombuffer(subprocess.run(decode, capture_output=True, check=True).stdout, "<f4").reshape(-1, 2)
    n = min(len(got), len(expected))
    assert got_rate == rate and n >= max(len(got), len(expected)) - 2 * 1152
    assert np.abs(got[:n] - expected[:n].mean(1)).max() < 1e-4


@pytest.mark.parametrize("extension", ["mp3", "flac", "ogg", "wav"])
def test_joined_recordings_may_differ_in_sampling_rate(tmp_path, monkeypatch, transcribe, extension):
    monkeypatch.setenv("PATH", "")
    path, parts = joined(tmp_path, extension, (16_000, 44_100, 22_050))
    [transcript] = transcribe(path)
    assert "".join(s.text for s in transcript.chunks) == "こんにちは" * 3 + "さようなら" + "なにぬねの" * 2
    seconds = sum(len(part) / rate for part, rate in zip(parts, (16_000, 44_100, 22_050), strict=True))
    assert transcript.duration == pytest.approx(seconds, abs=0.2)


@pytest.mark.parametrize("between", [b"\0", bytes(4096), b"odd"])
def test_joined_wav_files_with_something_in_between(tmp_path, transcribe, between):
    texts = ("こんにちは", "さようなら")
    parts = [Path(write(tmp_path / f"{i}.wav", synthesize(text))) for i, text in enumerate(texts)]
    (tmp_path / "joined.wav").write_bytes(between.join(part.read_bytes() for part in parts))
    [transcript] = transcribe(str(tmp_path / "joined.wav"))
    assert "".join(s.text for s in transcript.chunks) == "こんにちはさようなら"


@pytest.mark.parametrize("extension", ["flac", "mp3"])
def test_a_tag_before_a_recording_is_not_one(tmp_path, extension):
    """FLAC files have it too, from programs that do not know better."""
    path = Path(write(tmp_path / f"a.{extension}", synthesize("こんにちは")))
    expected, tag = samples_of(path)[1], b"ID3\3\0\0\0\0\1\0" + bytes(128)
    for n in (1, 2):
        (tmp_path / f"tagged.{extension}").write_bytes(n * (tag + path.read_bytes()))
        assert np.array_equal(samples_of(tmp_path / f"tagged.{extension}")[1], np.tile(expected, n))


def test_a_recorder_that_was_stopped_before_it_wrote_the_length(tmp_path, ffmpeg):
    path = Path(write(tmp_path / "a.wav", synthesize("こんにちは")))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = bytes(4)
    (tmp_path / "b.wav").write_bytes(data)
    assert errors_of(tmp_path / "b.wav").endswith("; ffmpeg -i FILE x.wav saves what can be saved")


def test_a_hole_in_an_ogg_file_is_damage(tmp_path):
    path = Path(write(tmp_path / "a.ogg", synthesize("こんにちは" * 5)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = bytes(600)
    path.write_bytes(data)
    assert errors_of(path).startswith("damaged")


def test_antiphase_under_a_hum(tmp_path, transcribe):
    speech = synthesize("こんにちは")
    hum = 0.3 * np.sin(2 * np.pi * 50 * np.arange(len(speech)) / RATE)
    [transcript] = transcribe(write(tmp_path / "a.wav", 0.5 * np.stack([speech + hum, hum - speech], 1)))
    assert [s.text for s in transcript.chunks] == ["こんにちは"]


def test_a_tag_at_the_end_of_an_mp3_is_no_recording(tmp_path):
    path = Path(write(tmp_path / "a.mp3", synthesize("こんにちは")))
    expected = samples_of(path)[1]
    for tag in (b"TAG" + bytes(125), b"APETAGEX" + bytes(100_000), b"LYRICSBEGIN" + b"la " * 9999, bytes(2000)):
        (tmp_path / "tagged.mp3").write_bytes(path.read_bytes() + tag)
        assert np.array_equal(samples_of(tmp_path / "tagged.mp3")[1], expected)


@pytest.mark.parametrize("tag", [b"TAG" + bytes(125), b"APETAGEX" + bytes(1000) + b"TAG" + bytes(125)])
def test_an_mp3_without_a_head_joined_to_one_with_a_tag_at_its_end(tmp_path, ffmpeg, transcribe, tag):
    first = encode(ffmpeg, synthesize("こんにちは", 44_100), 44_100, tmp_path / "a.mp3")
    second = encode(ffmpeg, synthesize("さようなら", 44_100), 44_100, tmp_path / "b.mp3", *PLAIN_MP3)
    (tmp_path / "joined.mp3").write_bytes(Path(first).read_bytes() + tag + Path(second).read_bytes())
    [transcript] = transcribe(str(tmp_path / "joined.mp3"))
    assert (transcript.error, "".join(s.text for s in transcript.chunks)) == (None, "こんにちはさようなら")


def test_what_follows_a_recording_and_is_none_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = Path(write(tmp_path / "a.mp3", synthesize("こんにちは")))
    path.write_bytes(path.read_bytes() + bytes([1, 2, 3, 4]) * 10_000)
    assert "(it goes on after what libsndfile reads)" in errors_of(path)


# --- channels ---


@pytest.mark.parametrize("n_channels", [2, 32])
def test_a_channel_that_the_mix_would_lose(tmp_path, transcribe, n_channels):
    speech = 0.02 * synthesize("こんにちは")
    waveform = np.zeros((len(speech), n_channels), np.float32)
    waveform[:, -1] = speech
    if n_channels == 2:
        waveform[:, 0] = -speech
    [transcript] = transcribe(write(tmp_path / "a.wav", waveform))
    assert [s.text for s in transcript.chunks] == ["こんにちは"] and transcript.silent == 0


# --- what resampling meets ---


@pytest.mark.parametrize("rate", [7350, 22_255, 47_999])
def test_thirty_seconds_at_an_odd_rate(tmp_path, transcribe, rate):
    path = write(tmp_path / "a.wav", np.pad(synthesize("こんにちは", rate), (0, 30 * rate))[: 30 * rate], rate)
    [transcript] = transcribe(path)
    assert (transcript.error, [s.text for s in transcript.chunks]) == (None, ["こんにちは"])


def test_an_interrupt_while_a_file_is_read_is_not_lost(tmp_path):
    """libsndfile drops what is raised in a callback of Python, and takes it for the end of the file."""
    path = write(tmp_path / "long.wav", np.zeros((600 * RATE, 2), np.int16))
    code = "import signal, sys, common\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\nn = 0\n"
    code += "for i in range(30):\n    try:\n        signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.001 * i)\n"
    code += "        for block in common.read_blocks(sys.argv[1]): pass\n        for _ in range(10**8): pass\n"
    code += "    except KeyboardInterrupt: n += 1\nprint(n)"
    result = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("30\n", "")
