"""From a path to chunks: every sample once, in order, cut at pauses, in memory that does not grow."""
import contextlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import common
import numpy as np
import pytest
import soundfile
from conftest import ROOT, write
from tone_speech import random_text, synthesize

RATE = 16_000


def read(path) -> tuple[int, np.ndarray, list[str]]:
    """The sampling rate, the samples and the warnings of a recording."""
    warnings = []
    with common.open_sound(str(path), warnings.append) as sound:
        samples = np.concatenate(list(common.mix_down(sound.blocks(), sound.rate)) or [np.zeros(0)])
    return sound.rate, samples, warnings


def chunks_of(path: str, chunk_length_s: float) -> list[np.ndarray]:
    rate, samples, _ = read(path)
    blocks = (samples[i : i + rate] for i in range(0, len(samples), rate))
    return list(common.split_at_pauses(blocks, rate, chunk_length_s))


def error_of(path) -> str:
    with pytest.raises(common.AudioError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- chunks ---


@pytest.mark.parametrize("rate", [1, 149, 16_000])
@pytest.mark.parametrize("seconds, n_samples, limit", [(1, 0, 15), (30, 0, 15), (30, 1, 15), (61, 1, 15), (31, 1, 1),
                                                       (200, 1, 2.5), (200, 1, 30)])  # fmt: skip
def test_chunks_have_every_sample_once_and_none_is_too_long_or_a_scrap(tmp_path, rate, seconds, n_samples, limit):
    samples = np.random.default_rng(seconds).normal(0, 0.1, seconds * rate + n_samples).astype(np.float32)
    chunks = chunks_of(write(tmp_path / "noise.wav", samples, rate, subtype="FLOAT"), limit)
    lengths = [len(waveform) for waveform in chunks]
    assert np.array_equal(np.concatenate(chunks), samples)
    assert (len(chunks) == 1) == (len(samples) <= 30 * rate)  # which fits the window
    if len(chunks) > 1 and rate > 1:
        assert max(lengths) <= round(limit * rate)
        assert min(lengths) >= min(0.5 * limit - 0.5, common.SHORTEST_TAIL_S) * rate - 2
        assert min(lengths[:-2]) >= 0.48 * limit * rate  # cuts lie in the latter half of the stretch


def test_cut_is_the_quietest_moment_of_the_latter_half():
    waveform = np.random.default_rng(2).normal(0, 0.1, 15 * RATE)
    waveform[3 * RATE : 5 * RATE] = 0  # quieter, but in the former half
    waveform[11 * RATE : 12 * RATE] *= 0.1
    waveform[13 * RATE : 13 * RATE + RATE // 10] = 0  # as short as the closure of a consonant
    assert 11 < common.quietest_cut(waveform, RATE) / RATE < 12


@pytest.mark.parametrize("rate", [7350, 22_255, 47_999])
def test_thirty_seconds_at_an_odd_rate_fit_the_window(tmp_path, rate):
    path = write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 30 * rate), rate)
    [chunk] = common.read_chunks(path, 15, pytest.fail)
    assert chunk.end == 30 and len(chunk.waveform) == 30 * RATE


def test_memory_held_does_not_grow_with_the_audio():
    block, held = np.zeros(RATE, np.float32), []
    blocks = (block for _ in range(3600))
    for waveform in common.split_at_pauses(blocks, RATE, 15):
        base = waveform if waveform.base is None else waveform.base
        held.append(base.nbytes)
    assert max(held) <= 4 * RATE * 40


# --- channels ---


@pytest.mark.parametrize("n_channels, hum", [(2, 0), (2, 0.1), (6, 0), (32, 0)])
def test_a_channel_that_the_mix_would_lose(tmp_path, n_channels, hum):
    speech = synthesize("こんにちは") / 2
    waveform = np.zeros((len(speech), n_channels), np.float32)
    waveform[:, -1] = speech  # all others are silent or, of two, the same turned over
    waveform[:, 0] = -speech if n_channels == 2 else 0
    hums = (hum * np.sin(2 * np.pi * 50 * np.arange(len(speech)) / RATE)).astype(np.float32)
    _, samples, _ = read(write(tmp_path / "a.wav", waveform + hums[:, None], subtype="FLOAT"))
    assert np.corrcoef(np.abs(samples - hums), np.abs(speech))[0, 1] > 0.95  # of either sign


@pytest.mark.parametrize("noise_db", [-60, -55, -50, -45])
def test_one_side_turned_over_and_a_noise_on_each(tmp_path, noise_db):
    """The mean of such channels is the noise alone."""
    speech = synthesize(random_text(np.random.default_rng(0), 60, pause_every=15), pause_s=3)
    noise = 10 ** (noise_db / 20) * np.random.default_rng(1).normal(size=(len(speech), 2))
    _, samples, _ = read(write(tmp_path / "a.wav", np.stack([speech, -speech], 1) + noise, subtype="FLOAT"))
    assert np.abs(np.abs(samples) - np.abs(speech)).max() < 6 * 10 ** (noise_db / 20)  # of either sign


def noises(n: int) -> dict[str, np.ndarray]:
    """What stands on a channel that nobody speaks on: n samples of each kind."""
    t, rng = np.arange(n) / RATE, np.random.default_rng(0)
    bits = np.repeat(rng.integers(0, 2, n // 8 + 1), 8)[:n]  # 2000 a second, as timecode has
    edges = (np.arange(n) % 8 == 0) | (bits & (np.arange(n) % 8 == 4))  # one in the middle for each 1
    return {"hiss": rng.normal(0, 0.1, n), "hum": np.sin(2 * np.pi * 50 * t) / 2, "silence": np.zeros(n),
            "timecode": 0.5 * (-1.0) ** np.cumsum(edges)}  # fmt: skip


@pytest.mark.parametrize("level", [1, 0.01])
@pytest.mark.parametrize("kind", ["hiss", "hum", "silence", "timecode"])
def test_a_channel_that_nobody_speaks_on_is_left_out(tmp_path, kind, level):
    """On either side, and through a pause of 20 s in which nothing moves on any channel."""
    speech = synthesize("こんにちは、さようなら", pause_s=20)
    noise = level * noises(len(speech))[kind].astype(np.float32)
    for channels in (speech, noise), (noise, speech), (noise, speech, noise):
        _, samples, warnings = read(write(tmp_path / "a.wav", np.stack(channels, 1), subtype="FLOAT"))
        assert np.array_equal(samples, speech) and warnings == []


def test_two_people_on_two_channels_are_both_heard(tmp_path):
    first, second = (synthesize(text * 5) for text in ("こんにちは", "さようなら"))
    waveform = np.zeros((len(first) + len(second), 2), np.float32)
    waveform[: len(first), 0], waveform[len(first) :, 1] = first, second
    _, samples, _ = read(write(tmp_path / "a.wav", waveform, subtype="FLOAT"))
    assert np.all(np.abs(samples) >= 0.499 * np.abs(waveform).max(1))  # whoever speaks, at half the level at least


@pytest.mark.parametrize("subtype", ["FLOAT", "PCM_16"])
def test_a_recording_is_called_very_quiet_once_and_only_if_it_may_hold_speech(tmp_path, subtype):
    speech, noise = synthesize("こんにちは" * 30), noises(60 * RATE)["hiss"]
    loudest = np.sqrt(common.mean_squares(speech, RATE, 0.1).max())

    def warnings_of(waveform: np.ndarray) -> list[str]:
        warnings, path = [], write(tmp_path / "a.wav", waveform, subtype=subtype)
        assert len(list(common.read_chunks(path, 15, warnings.append))) > 1
        return warnings

    for db in (-62, -70, -80):
        [warning] = warnings_of(speech / loudest * 10 ** (db / 20))
        assert warning.startswith(f"very quiet, {db} dBFS where it is loudest: ")
    for ordinary in (speech / loudest * 10 ** (-58 / 20), 0.003 * noise, 0 * speech,
                     np.concatenate([speech / 1e4, speech / 50])):  # fmt: skip
        assert warnings_of(ordinary) == []


# --- what is no audio, and what is damaged ---


def test_files_without_audio_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no ffmpeg; hostile.py has more of them
    assert "it has no samples" in error_of(write(tmp_path / "header.wav", np.zeros(0)))
    for path in ("-", "https://example.com/a.wav"):
        assert error_of(path) == "not a regular file: save the sound to one first"
    (tmp_path / "a.m4a").write_bytes(bytes(1000))
    assert error_of(tmp_path / "a.m4a").endswith("; for m4a, mp4, webm and others put the ffmpeg program on the PATH")


def test_what_comes_before_damage_is_kept_with_a_warning(tmp_path):
    path = Path(write(tmp_path / "noise.flac", np.random.default_rng(0).normal(0, 0.1, 10 * RATE)))
    _, whole, _ = read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, samples, [warning] = read(path)
    assert 4 * RATE <= len(samples) < 6 * RATE and np.array_equal(samples, whole[: len(samples)])
    assert warning == f"cut off or damaged: its sound has {len(samples) / RATE:.0f} of the 10 s that it declares"


@pytest.mark.parametrize("format", ["FLAC", "AU", "CAF", "MP3", "OGG"])
def test_bytes_behind_a_recording_are_counted(tmp_path, monkeypatch, format):
    """Two recordings in one file, as by cat, without ffmpeg."""
    monkeypatch.setenv("PATH", "")
    path, noise = tmp_path / "a", np.random.default_rng(0).normal(0, 0.1, 60 * RATE)
    alone = read(write(path, noise, format=format))
    assert alone[2] == [] and np.allclose(alone[1], soundfile.read(path)[0], atol=1e-6)  # as if read at once
    path.write_bytes(2 * path.read_bytes())
    _, samples, [warning] = read(path)
    assert np.array_equal(samples, alone[1])
    n_bytes = int(warning.removesuffix(" bytes behind the end that its header declares were not read"))
    assert n_bytes == pytest.approx(path.stat().st_size / 2, rel=0.15)  # it reads ahead


def test_seconds_that_are_only_an_estimate_are_not_missed(tmp_path, monkeypatch):
    """MP3 of a variable rate without a header that says how long it is, read without ffmpeg."""
    path, noise = tmp_path / "a.mp3", np.random.default_rng(0).normal(0, 0.1, 20 * RATE)
    noise[: len(noise) // 2] /= 1e4  # the estimate is made from the size of the first frames
    write(path, noise, format="MP3", bitrate_mode="VARIABLE", compression_level=0.9)
    data = path.read_bytes()
    header = data.index(b"Xing") - 36
    frame = 144 * 32_000 // 2 // RATE
    path.write_bytes(data[:header] + data[header + frame :])
    monkeypatch.setenv("PATH", "")
    assert len(read(path)[1]) >= len(noise) and read(path)[2] == []


def test_a_hole_in_an_ogg_file_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = Path(write(tmp_path / "a.ogg", synthesize("こんにちは" * 5)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = bytes(600)
    path.write_bytes(data)
    assert read(path)[2][0].startswith("cut off or damaged: ")


def test_an_interrupt_while_a_file_is_read_is_not_lost(tmp_path):
    """libsndfile drops what is raised in a callback of Python, and takes it for the end of the file."""
    path = write(tmp_path / "long.wav", np.zeros((600 * RATE, 2), np.int16))
    code = "import signal, sys, common\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\nn = 0\n"
    code += "for i in range(30):\n    try:\n        signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.001 * i)\n"
    code += "        for chunk in common.read_chunks(sys.argv[1], 15, print): pass\n"
    code += "        for _ in range(10**8): pass\n"
    code += "    except KeyboardInterrupt: n += 1\nprint(n)"
    result = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("30\n", "")


# --- through ffmpeg, with that of the distribution and a newer one ---

FFMPEGS = {"distribution": shutil.which("ffmpeg"), "imageio": None}
with contextlib.suppress(ImportError):
    import imageio_ffmpeg

    FFMPEGS["imageio"] = imageio_ffmpeg.get_ffmpeg_exe()


@pytest.fixture(params=FFMPEGS)
def ffmpeg(request, tmp_path, monkeypatch) -> str:
    """Each ffmpeg, alone on the PATH."""
    if FFMPEGS[request.param] is None:
        pytest.skip(f"there is no ffmpeg of {request.param} on this machine")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(FFMPEGS[request.param])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return str(tmp_path / "bin" / "ffmpeg")


def encode(ffmpeg: str, waveform: np.ndarray, rate: int, path, *options: str) -> Path:
    """Have ffmpeg write a file of another format."""
    wav = write(Path(f"{path}.wav"), waveform, rate, subtype="FLOAT")
    subprocess.run([ffmpeg, "-v", "error", "-y", "-i", wav, *options, f"file:{path}"], check=True)
    os.remove(wav)
    return Path(path)


def stereo(waveform: np.ndarray, n_channels: int = 2) -> np.ndarray:
    return np.stack([waveform * (1 - 0.05 * i) for i in range(n_channels)], 1)


def assert_alike(samples: np.ndarray, expected: np.ndarray, rate: int, start_s: float = 0) -> None:
    """The expected sound begins start_s into the samples, within 0.1 s, as far as a lossy codec leaves it alike."""
    first = round(start_s * rate)
    levels = [common.mean_squares(x, rate, 0.05) for x in (samples[first:], expected)]
    n = min(map(len, levels)) - 10
    shifts = [np.corrcoef(levels[0][10 + k : n + k], levels[1][10:n])[0, 1] for k in range(-10, 11)]
    assert max(shifts) > 0.95, f"{max(shifts):.3f}"


@pytest.mark.parametrize("extension, codec, n_channels, rate", [
    ("m4a", "alac", 1, 44_100), ("mov", "pcm_f32le", 2, 16_000), ("mkv", "flac", 6, 96_000), ("mp4", "alac", 2, 48_000),
])  # fmt: skip
def test_samples_through_ffmpeg_are_those_that_went_in(tmp_path, ffmpeg, extension, codec, n_channels, rate):
    waveform = stereo(synthesize(random_text(np.random.default_rng(0), 8), rate), n_channels)
    path = tmp_path / f"- 'a' $HOME;.{extension}"  # what a shell would trip over
    got_rate, samples, warnings = read(encode(ffmpeg, waveform, rate, path, "-c:a", codec))
    assert (got_rate, len(samples), warnings) == (rate, len(waveform), [])
    assert np.abs(samples - waveform.mean(1)).max() < 1e-4


@pytest.mark.parametrize("codec", ["libopus", "libvorbis"])
def test_what_a_codec_needs_to_start_is_no_sound(tmp_path, ffmpeg, codec):
    path = encode(ffmpeg, synthesize("こんにちは", 48_000), 48_000, tmp_path / "a.webm", "-c:a", codec)
    raw = subprocess.run([ffmpeg, "-v", "error", "-i", path, "-f", "f32le", "-"], capture_output=True).stdout
    assert np.array_equal(read(path)[1], np.frombuffer(raw, "<f4"))


def test_w64_of_32_bits_is_read_right_or_refused_without_ffmpeg(tmp_path, ffmpeg, monkeypatch):
    """libsndfile takes the floats that the distribution's ffmpeg writes there for integers."""
    speech = synthesize("こんにちは")
    path = encode(ffmpeg, speech, RATE, tmp_path / "a.w64", "-c:a", "pcm_f32le")
    assert np.array_equal(read(path)[1], speech)
    monkeypatch.setenv("PATH", "")
    with contextlib.suppress(common.AudioError):
        assert np.array_equal(read(path)[1], speech)


@pytest.mark.parametrize("extension, options", [("webm", []), ("mkv", ["-c:a", "flac"]), ("aac", []),
    ("mp4", ["-movflags", "frag_keyframe+empty_moov", "-frag_duration", "1000000"])])  # fmt: skip
def test_a_recording_cut_at_three_quarters_is_heard_to_there(tmp_path, ffmpeg, extension, options):
    waveform = synthesize(random_text(np.random.default_rng(0), 50), 48_000)
    path = encode(ffmpeg, waveform, 48_000, tmp_path / f"a.{extension}", *options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    rate, samples, [warning] = read(path)
    assert len(samples) / rate == pytest.approx(15, abs=1.5) and warning.startswith(("ffmpeg says: ", "cut off or "))
    assert_alike(samples[: 13 * rate], waveform, rate)


@pytest.mark.parametrize("n_samples", [1, 2048, 65_536])
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_recorder_that_was_stopped_before_it_wrote_the_length(tmp_path, ffmpeg, n_samples, size):
    samples = np.random.default_rng(0).integers(-9999, 9999, n_samples).astype("<i2")
    data = samples.tobytes() + b"\0"  # and half a sample
    wav = b"WAVE%sfmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16) + b"data" + struct.pack("<I", size)
    padding = b"JUNK" + struct.pack("<I", 36) + bytes(36)
    caf = b"caff\0\1\0\0desc" + struct.pack(">qd4s5I", 32, RATE, b"lpcm", 2, 2, 1, 1, 16)
    caf += b"data" + struct.pack(">qI", size if size == 0 else -1, 0)
    for head in (b"RIFF" + struct.pack("<I", size) + wav % b"", b"RIFF" + bytes(4) + wav % padding, caf):
        (tmp_path / "a.wav").write_bytes(head + data)
        _, got, warnings = read(tmp_path / "a.wav")
        assert np.array_equal(np.round(got * 32768), samples) and not any("header" in text for text in warnings)


def test_the_reason_is_ffmpeg_s_and_not_a_line_of_the_dynamic_loader(tmp_path, ffmpeg, monkeypatch):
    path = encode(ffmpeg, synthesize("こんにちは"), RATE, tmp_path / "a.m4a", "-c:a", "alac")
    subprocess.run([ffmpeg, "-v", "error", *PICTURE, tmp_path / "picture.mp4"], check=True)
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/libgomp.so.1")
    _, samples, warnings = read(path)
    assert len(samples) == 2.1 * RATE and warnings == []
    assert error_of(tmp_path / "picture.mp4").startswith("no sound could be read: ffmpeg says: ")
    path.write_bytes(path.read_bytes()[:1500])  # the table of contents stands at the end
    assert "moov atom not found" in error_of(path)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_ffmpeg_says_of_tags_is_no_warning_and_what_it_says_of_the_sound_is(tmp_path, ffmpeg, damaged):
    """A comment without its byte order mark, and a cover that is no picture."""
    sound = encode(ffmpeg, synthesize("こんにちは" * 5), RATE, tmp_path / "a.mp3", "-id3v2_version", "0").read_bytes()
    sound = sound[:9000] + bytes(3000) + sound[12_000:] if damaged else sound
    comment, cover = b"\1jpn\0\0" + "コメント".encode("utf-16-le"), b"\0image/jpeg\0\3\0\xff\xd8\xff" + bytes(99)
    frames = ((b"COMM", comment), (b"APIC", cover))
    tag = b"".join(name + struct.pack(">IH", len(frame), 0) + frame for name, frame in frames)
    path = tmp_path / "a.mp3"
    path.write_bytes(b"ID3\3\0\0" + bytes([0, 0, len(tag) >> 7, len(tag) & 127]) + tag + sound)
    shown = subprocess.run([ffmpeg, "-v", "error", "-i", path, "-f", "null", "-"], capture_output=True).stderr
    assert b"BOM" in shown
    assert [warning.startswith(("ffmpeg says: ", "cut off or ")) for warning in read(path)[2]] == [True] * damaged


PICTURE = ["-f", "lavfi", "-i", "testsrc=size=160x120:rate=25:duration=8"]


@pytest.mark.parametrize("extension, video, audio", [("mp4", "mpeg4", "aac"), ("mov", "mpeg4", "pcm_s16le"),
    ("mkv", "mpeg4", "flac"), ("webm", "libvpx", "libopus")])  # fmt: skip
def test_a_sound_that_begins_later_than_the_picture(tmp_path, ffmpeg, extension, video, audio):
    wav = write(tmp_path / "a.wav", synthesize("こんにちは", 48_000), 48_000)
    command = [ffmpeg, "-v", "error", *PICTURE, "-itsoffset", "4", "-i", wav, "-c:v", video, "-c:a", audio]
    subprocess.run([*command, tmp_path / f"a.{extension}"], check=True)
    rate, samples, _ = read(tmp_path / f"a.{extension}")
    assert np.abs(samples[: 4 * rate]).max() < 0.02
    assert_alike(samples, synthesize("こんにちは", 48_000), rate, start_s=4)


@pytest.mark.parametrize("extension", ["mp4", "mov", "mkv", "webm", "flv", "avi", "wmv", "ts"])
def test_a_picture_that_is_longer_than_the_sound_is_no_loss(tmp_path, ffmpeg, extension):
    wav = write(tmp_path / "a.wav", synthesize("こんにちは", 44_100), 44_100)
    subprocess.run([ffmpeg, "-v", "error", *PICTURE, "-i", wav, tmp_path / f"a.{extension}"], check=True)
    rate, samples, warnings = read(tmp_path / f"a.{extension}")
    assert len(samples) / rate == pytest.approx(2.1, abs=0.1) and warnings == []


@pytest.mark.parametrize("extension, codec", [("mp4", "aac"), ("mov", "pcm_s16le"), ("mkv", "flac")])
@pytest.mark.parametrize("n_channels", [1, 2])  # of the second track; ffmpeg takes the one that has more
def test_of_several_audio_tracks_one_is_read_and_the_line_says_how_to_read_another(tmp_path, ffmpeg, extension, codec,
                                                                                   n_channels):  # fmt: skip
    texts = ("こんにちは", "さようなら")
    files = [write(tmp_path / f"{i}.wav", stereo(synthesize(texts[i]), n)) for i, n in ((0, 1), (1, n_channels))]
    inputs = [*PICTURE, "-i", files[0], "-i", files[1], "-map", "0", "-map", "0", "-map", "1", "-map", "2"]
    path, other = tmp_path / f"a.{extension}", tmp_path / "other.flac"
    command = [ffmpeg, "-v", "error", *inputs, "-disposition:a", "0", "-c:v", "mpeg4", "-c:a", codec, path]
    subprocess.run(command, check=True)
    rate, samples, [warning] = read(path)
    first, second = texts if n_channels == 1 else texts[::-1]
    assert_alike(samples, synthesize(first, rate), rate)
    said, command = warning.split("; for another: ffmpeg ")
    assert said == "it has 2 audio tracks, of which one was read"
    command = [{"FILE": path, "OTHER.flac": other}.get(word, word) for word in command.split()]
    subprocess.run([ffmpeg, "-v", "error", *command], check=True)
    assert_alike(read(other)[1], synthesize(second, rate), rate)


def test_several_pictures_and_programs_that_share_a_sound_are_no_tracks(tmp_path, ffmpeg):
    wav = write(tmp_path / "a.wav", synthesize("こんにちは"))
    command = [ffmpeg, "-v", "error", *PICTURE, "-i", wav, "-map", "0", "-map", "0", "-map", "1", "-c:v", "mpeg2video"]
    subprocess.run([*command, "-program", "st=0:st=2", "-program", "st=1:st=2", tmp_path / "a.ts"], check=True)
    assert read(tmp_path / "a.ts")[2] == []


def test_a_broadcast_in_ogg_that_was_joined_on_the_way(tmp_path, ffmpeg):
    """The clock of its sender began long before."""
    data = encode(ffmpeg, synthesize("こんにちは" * 9, 48_000), 48_000, tmp_path / "a.opus").read_bytes()
    pages = [i for i in range(len(data)) if data.startswith(b"OggS", i)]
    (tmp_path / "a.opus").write_bytes(data[: pages[2]] + data[pages[len(pages) // 2] :])
    rate, samples, warnings = read(tmp_path / "a.opus")
    assert 5 < len(samples) / rate < 15 and warnings == []


@pytest.mark.parametrize("extension, codec", [("webm", "libopus"), ("mp4", "aac"), ("ts", "mp2"), ("ts", "aac")])
def test_fifteen_seconds_that_are_missing_stay_missing(tmp_path, ffmpeg, extension, codec):
    waveform = synthesize("こんにちは" * 6, 48_000)[: 12 * 48_000]
    gap = ["-af", r"asetpts=PTS+gte(T\,6)*15/TB", "-c:a", codec]
    rate, samples, _ = read(encode(ffmpeg, waveform, 48_000, tmp_path / f"a.{extension}", *gap))
    assert len(samples) / rate == pytest.approx(27, abs=0.1) and np.abs(samples[7 * rate : 20 * rate]).max() < 0.02
    assert_alike(samples[: 6 * rate], waveform, rate)
    assert_alike(samples[21 * rate :], waveform[6 * rate :], rate)


@pytest.mark.parametrize("extension, codec", [("mp3", "libmp3lame"), ("ogg", "libvorbis"), ("opus", "libopus"),
    ("aac", "aac"), ("webm", "libopus"), ("mkv", "flac"), ("ts", "mp2"), ("ts", "aac"), ("ac3", "ac3")])  # fmt: skip
def test_joined_recordings_are_heard_to_the_end(tmp_path, ffmpeg, extension, codec):
    """The clock of the second begins anew, as in broadcasts, where channels and sampling rate change on the way too.
    Newer versions of ffmpeg refuse that in Ogg, and say so."""
    data, path = b"", tmp_path / f"a.{extension}"
    second = {"flac": (48_000, 1), "aac": (32_000, 6)}.get(codec, (32_000, 2))
    for text, (rate, n_channels) in (("こんにちは", (48_000, 1)), ("さようなら", second)):
        waveform = stereo(synthesize(text, rate), n_channels)
        data += encode(ffmpeg, waveform, rate, path, "-c:a", codec).read_bytes()
    path.write_bytes(data)
    rate, samples, warnings = read(path)
    assert_alike(samples, synthesize("こんにちは", rate), rate)
    if any(" change is not supported" in warning for warning in warnings):
        assert extension in ("ogg", "opus")
        return
    assert len(samples) / rate == pytest.approx(4.2, abs=0.2)
    assert_alike(samples[-2 * rate :], synthesize("さようなら", rate)[-2 * rate :], rate)


@pytest.mark.parametrize("format, codec", [("wav", "pcm_s16le"), ("wav", "adpcm_ms"), ("aiff", "pcm_s16be")])
def test_bytes_behind_the_end_and_missing_bytes_are_counted(tmp_path, ffmpeg, format, codec):
    path = encode(ffmpeg, synthesize("こんにちは" * 10, 48_000), 48_000, tmp_path / "a", "-c:a", codec, "-f", format)
    data = path.read_bytes()
    _, samples, warnings = read(path)
    assert warnings == []
    path.write_bytes(data[: len(data) * 6 // 10])  # a copy that was broken off
    missing = len(data) - len(data) * 6 // 10
    assert f"{missing} bytes that its header declares are missing at the end" in read(path)[2]
    path.write_bytes(2 * data)  # joined by cat
    _, twice, warnings = read(path)
    assert len(twice) == len(samples)
    assert warnings == [f"{len(data)} bytes behind the end that its header declares were not read"]


@pytest.mark.parametrize("options", [["mp3"], ["wav", "-rf64", "always"], ["flv", "-c:a", "aac"], ["au"], ["tta"]])
def test_a_copy_that_was_broken_off_has_fewer_seconds_than_it_declares(tmp_path, ffmpeg, options):
    format, *options = options
    path = encode(ffmpeg, synthesize("こんにちは" * 10, 48_000), 48_000, tmp_path / "a", *options, "-f", format)
    rate, samples, warnings = read(path)
    assert warnings == []
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    rate, samples, [warning] = read(path)
    seconds = [int(word) for word in warning.split() if word.isdigit()]
    assert warning.startswith("cut off or damaged: its sound has ") and seconds == [round(len(samples) / rate), 20]
    assert 11 <= seconds[0] <= 14


@pytest.mark.parametrize("format, order", [("WAV", "<"), ("AIFF", ">")])
def test_pictures_and_notes_behind_the_sound_are_the_recording_s_own(tmp_path, format, order):
    """Cover art, XMP, the overviews of an editor: chunks within the declared length. Another recording is not."""
    path = Path(write(tmp_path / "a", synthesize("こんにちは"), format=format))
    data, notes = path.read_bytes(), bytes(300_000)
    chunk = b"NOTE" + struct.pack(f"{order}I", len(notes)) + notes
    [size] = struct.unpack(f"{order}I", data[4:8])
    data = data[:4] + struct.pack(f"{order}I", size + len(chunk)) + data[8:] + chunk
    path.write_bytes(data)
    assert read(path)[2] == []
    path.write_bytes(2 * data)
    assert read(path)[2] == [f"{len(data)} bytes behind the end that its header declares were not read"]


@pytest.mark.parametrize("extension, codec", [("wav", "pcm_s16le"), ("flac", "flac"), ("mkv", "flac"), ("ts", "mp2")])
def test_a_recording_that_is_still_being_written(tmp_path, ffmpeg, extension, codec):
    path = encode(ffmpeg, synthesize("こんにちは" * 20), RATE, tmp_path / f"a.{extension}", "-c:a", codec)
    size, warnings = path.stat().st_size, []
    with common.open_sound(str(path), warnings.append) as sound:
        n_read = next(sound.blocks()).shape[1]
        with path.open("ab") as file:
            file.write(bytes(100))
        n_read += sum(block.shape[1] for block in sound.blocks())
    assert n_read > 20 * RATE
    assert f"it had {size} bytes and now has {size + 100}: it is still being written, and more may follow" in warnings


@pytest.mark.parametrize("end, reason", [("echo '[error] out of ink' >&2; exit 69", "ffmpeg says: out of ink"),
    ("echo '[info] handler_name: Sound' >&2; kill -9 $$", "ffmpeg was ended by SIGKILL")])  # fmt: skip
def test_ffmpeg_that_ends_with_an_error_on_the_way(tmp_path, monkeypatch, end, reason):
    """No damage brings both ffmpeg to that; a full disk or too little memory would."""
    write(tmp_path / "b.au", synthesize("こんにちは"), subtype="FLOAT")
    (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\ncat '{tmp_path}/b.au'; {end}\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.m4a").write_bytes(bytes(1000))
    _, samples, warnings = read(tmp_path / "a.m4a")
    assert len(samples) == 2.1 * RATE and warnings == [f"broken off after 2 s: {reason}"]
    (tmp_path / "b.au").write_bytes(b"")
    assert error_of(tmp_path / "a.m4a") == f"no sound could be read: {reason}"
