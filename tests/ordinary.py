"""Ordinary recordings, as people have them, and what is wrong with what the program reads of each.

    python3 tests/ordinary.py [WORD ...]    # all, or those whose names have one of the words

prints a line for each that fails, and a count. Any rule about recordings is tried on these first: they get no refusal,
no warning and no changed sound, and nobody who speaks is left out.
"""
import base64
import contextlib
import functools
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads take longer for blocks as short as these
sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import numpy as np
import soundfile
import soxr
from tone_speech import synthesize

import inference

CLIPS = [Path(__file__).parent / "real_whisper" / f"{name}.flac" for name in (
    "00_daily", "04_daily", "05_daily", "06_news", "09_news", "12_business", "13_numbers", "16_technical")]  # fmt: skip
SNDFILE, FFMPEG = "libsndfile", "ffmpeg"
BLOCK_S = 0.25  # what is compared at once
VOICE_DB = -23  # RMS of full scale
AUDIBLE_DB = -50  # a block in which a voice is louder has speech
LOSSY_PRECISION = 0.01  # between two decoders of ADPCM; all others are nearer


class MissingProgram(Exception):
    """A program that writes a recording is not on this machine, or cannot write this."""


@dataclass
class Sound:
    """What is recorded: what is said on each channel, and all else there, both (n_samples, n_channels) float64."""

    rate: int
    voices: np.ndarray
    others: np.ndarray

    @property
    def waveform(self) -> np.ndarray:
        """What a 16-bit recorder hears of it."""
        return np.clip(np.round((self.voices + self.others) * 32768), -32768, 32767) / 32768


@dataclass
class Recording:
    """A sound, and how it is written to a file; truth is how many bits of
    it are kept or, where it is lossy, the program that decodes it as well."""

    name: str
    sound: Callable[[], Sound]
    write: Callable[[Sound, Path], None]
    extension: str
    truth: int | str


# --- What is heard: each (n_samples,) float64 ---


def level(waveform: np.ndarray, db: float | None) -> np.ndarray:
    """A waveform at an RMS of db of full scale; None is silence."""
    return waveform * (0 if db is None else 10 ** (db / 20) / (np.sqrt(np.mean(waveform**2)) or 1))


@functools.cache
def clip(index: int, rate: int) -> np.ndarray:
    """A sentence that was spoken."""
    waveform, original = soundfile.read(CLIPS[index % len(CLIPS)])
    return level(soxr.resample(waveform, original, rate), VOICE_DB)


@functools.cache
def talk(seconds: float, rate: int = 16_000, first: int = 0, pause_s: float = 0.4) -> np.ndarray:
    """Sentences one after another, from clip number first on."""
    pieces = []
    while sum(map(len, pieces)) < seconds * rate:
        pieces += [clip(first, rate), np.zeros(round(pause_s * rate))]
        first += 1
    return np.concatenate(pieces)[: round(seconds * rate)]


def tones(text: str, rate: int = 16_000, pause_s: float = 0.8) -> np.ndarray:
    """Tone speech."""
    return level(synthesize(text, rate, pause_s).astype(float), VOICE_DB)


def silence(seconds: float, rate: int = 16_000) -> np.ndarray:
    return np.zeros(round(seconds * rate))


def noise(seconds: float, db: float | None, rate: int = 16_000, seed: int = 0, corner_hz: float = 300) -> np.ndarray:
    """The noise of a room or of air conditioning: white noise through a low pass; corner_hz 0 leaves it white."""
    white = np.random.default_rng(seed).normal(size=round(seconds * rate))
    if corner_hz:
        spectrum = np.fft.rfft(white)
        spectrum /= np.sqrt(1 + (np.fft.rfftfreq(len(white), 1 / rate) / corner_hz) ** 2)
        white = np.fft.irfft(spectrum, len(white))
    return level(white, db)


def hum(seconds: float, db: float, rate: int = 16_000, hz: float = 50) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return level(sum(np.sin(2 * np.pi * hz * k * t + k) / k for k in (1, 2, 3, 5)), db)


def music(seconds: float, db: float, rate: int = 16_000, beat_s: float = 0.4) -> np.ndarray:
    """Chords that are struck at each beat and fade."""
    rng, n, out = np.random.default_rng(1), round(seconds * rate), np.zeros(round((seconds + 3) * rate))
    t = np.arange(2 * rate) / rate
    for first in np.arange(0, seconds, beat_s):
        for hz in 220 * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 11, 12], 3) / 12):
            i = round(first * rate)
            out[i : i + len(t)] += np.exp(-3 * t) * np.sin(2 * np.pi * hz * t)
    return level(out[:n], db)


def keys(text: str, db: float, rate: int = 16_000) -> np.ndarray:
    """A telephone's keys."""
    rows, columns, t = (697, 770, 852, 941), (1209, 1336, 1477), np.arange(round(0.1 * rate)) / rate
    places = {key: divmod(i, 3) for i, key in enumerate("123456789*0#")}
    tones = [np.sin(2 * np.pi * rows[r] * t) + np.sin(2 * np.pi * columns[c] * t) for r, c in map(places.get, text)]
    return level(np.concatenate([np.pad(tone, (0, len(t))) for tone in tones]), db)


def ringing(seconds: float, db: float, rate: int = 16_000) -> np.ndarray:
    """A telephone that rings at the other end, as in Japan: 400 Hz, one second in three."""
    t = np.arange(round(seconds * rate)) / rate
    return level(np.sin(2 * np.pi * 400 * t) * (1 + np.sin(2 * np.pi * 16 * t)) * (t % 3 < 1), db)


def timecode(seconds: float, db: float, rate: int = 16_000) -> np.ndarray:
    """What a film camera's second channel has."""
    n, step = round(seconds * rate), rate // 2000
    bits = np.repeat(np.random.default_rng(0).integers(0, 2, n // step + 1), step)[:n]
    edges = (np.arange(n) % step == 0) | (bits & (np.arange(n) % step == step // 2))
    return level((-1.0) ** np.cumsum(edges), db)


def envelope(waveform: np.ndarray, rate: int, window_s: float) -> np.ndarray:
    """The RMS of the window around each sample."""
    n = round(window_s * rate / 2)
    energy = np.cumsum(np.pad(waveform**2, (n + 1, n)))
    return np.sqrt(np.maximum(energy[2 * n + 1 :] - energy[: -2 * n - 1], 0) / (2 * n + 1))


def whispered(waveform: np.ndarray, rate: int = 16_000) -> np.ndarray:
    """Noise in the place of the voice."""
    return level(np.diff(noise(len(waveform) / rate, -20, rate, 2, 0), prepend=0) * envelope(waveform, rate, 0.03), -35)


def limited(waveform: np.ndarray, rate: int = 16_000) -> np.ndarray:
    """What television's compressor (20 to 1 above -40 dBFS, within 50 ms) and limiter make of a sound."""
    loudness = np.maximum(envelope(waveform, rate, 0.05) / 0.01, 1)
    return np.clip(10 * waveform * loudness ** (1 / 20 - 1), -0.5, 0.5)


def in_turns(texts: int, turn_s: float, rate: int = 16_000, n_people: int = 2) -> np.ndarray:
    """Who speaks when, (n_people, n_samples): turns of turn_s seconds, and half a second between."""
    people = np.zeros((n_people, round(texts * (turn_s + 0.5) * rate)))
    for i in range(texts):
        first = round(i * (turn_s + 0.5) * rate)
        said = talk(turn_s, rate, 3 * i)
        people[i % n_people, first : first + len(said)] = said
    return people


# --- Sounds ---


def sound(*channels: tuple[np.ndarray, ...], rate: int = 16_000) -> Sound:
    """A sound of channels: of each, what is said there and then what else there is."""
    n = max(len(part) for channel in channels for part in channel)
    voices, others = np.zeros((n, len(channels))), np.zeros((n, len(channels)))
    for i, (voice, *rest) in enumerate(channels):
        voices[: len(voice), i] = voice
        for part in rest:
            others[: len(part), i] += part
    return Sound(rate, voices, others)


def join(*pieces: np.ndarray) -> np.ndarray:
    return np.concatenate(pieces)


def room(db: float | None, before_s: float, after_s: float, rate: int = 16_000, n_channels: int = 1,
         corner_hz: float = 300) -> Sound:  # fmt: skip
    """Somebody speaks for 5 s in a room in which nothing else happens."""
    voice = join(silence(before_s, rate), talk(5, rate), silence(after_s, rate))
    noises = [noise(len(voice) / rate, db, rate, seed, corner_hz) for seed in range(n_channels)]
    return sound(*((voice, background) for background in noises), rate=rate)


def dialogue(rate: int = 16_000, turns: int = 2, turn_s: float = 1.25, db: float = -65, n_channels: int = 2) -> Sound:
    """People who speak in turns, each on a channel of their own."""
    people = in_turns(turns, turn_s, rate, n_channels)
    return sound(*((person, noise(len(person) / rate, db, rate, i)) for i, person in enumerate(people)), rate=rate)


def sounds() -> dict[str, Callable[[], Sound]]:
    """What people record, by name; all of it is written as WAV or FLAC."""
    def mono(*parts: np.ndarray, rate: int = 16_000) -> Sound:
        return sound(parts, rate=rate)

    table = {}
    for db in (None, -80, -70, -60, -55, -50, -45, -40, -30):
        table[f"a room of {db} dBFS, then speech"] = lambda db=db: room(db, 35, 1, corner_hz=0)
        table[f"speech, then a room of {db} dBFS"] = lambda db=db: room(db, 0, 35)
    for db in (-60, -50, -40, -30):
        table[f"a stereo room of {db} dBFS"] = lambda db=db: room(db, 6, 2, 48_000, 2)
        table[f"a stereo room of white noise of {db} dBFS"] = lambda db=db: room(db, 6, 2, 44_100, 2, 0)
        table[f"one side turned over, noise of {db} dBFS on each"] = lambda db=db: sound(
            (talk(20), noise(20, db, seed=1)), (-talk(20), noise(20, db, seed=2)))
    one, two = in_turns(6, 2.5)
    long_one, long_two = in_turns(3, 13)
    table |= {
        # one channel
        "a sentence": lambda: mono(clip(0, 16_000)),
        "a word": lambda: mono(clip(1, 16_000)[2000:9000]),
        "a syllable": lambda: mono(clip(0, 16_000)[8000:11_200]),
        "tone speech": lambda: mono(tones("こんにちは、さようなら" * 12, pause_s=0.3)),
        "counting": lambda: mono(tones("いち、に、さん、よん、ろく、なな、はち" * 4, pause_s=1)),
        "the same answer again and again": lambda: mono(tones("はいはいはい、はいはいはいはい")),
        "the same sentence five times": lambda: mono(np.tile(join(clip(1, 16_000), silence(0.2)), 5)),
        "a speech of a minute": lambda: mono(talk(60), noise(60, -62)),
        "without a pause": lambda: mono(talk(40, pause_s=0)),
        "digital silence between words": lambda: mono(talk(45, pause_s=2)),
        "half a minute of silence in the middle": lambda: mono(join(talk(8), silence(30), talk(8, first=3))),
        "one word in a minute of noise": lambda: mono(join(silence(40), clip(1, 16_000)), noise(60, -45)),
        "mains hum": lambda: mono(talk(35), hum(35, -35)),
        "loud mains hum": lambda: mono(talk(35), hum(35, -23, hz=60)),
        "mains hum that is louder than the voice": lambda: mono(talk(35), hum(35, -13)),
        "keys, ringing, then speech, on the telephone": lambda: mono(
            join(silence(14, 8000), talk(10, 8000)), join(keys("0312345678", -20, 8000), ringing(12, -20, 8000)),
            rate=8000),
        "a telephone's tone, then speech": lambda: mono(
            join(silence(9, 8000), talk(9, 8000)), level(np.sin(np.arange(8 * 8000) * np.pi / 10), -20), rate=8000),
        "clipped": lambda: mono(30 * talk(20)),
        "whispered": lambda: mono(whispered(talk(20)), noise(20, -65)),
        "quiet": lambda: mono(level(talk(20), -48), noise(20, -75)),
        "from afar in noise": lambda: mono(level(talk(40), -38), noise(40, -43)),
        "with an offset": lambda: mono(talk(20), np.full(320_000, 0.2)),
        "limited as on television": lambda: mono(limited(talk(45, pause_s=0.1))),
        "limited, with music": lambda: mono(limited(talk(40) + music(40, -35))),
        "music, then speech over it": lambda: mono(join(silence(12), talk(25)), music(37, -30)),
        "typing": lambda: mono(talk(20), noise(20, -20, corner_hz=0) * (np.arange(320_000) % 3000 < 80)),
        "a train that comes and goes": lambda: mono(talk(30), noise(30, -25) * np.hanning(480_000)),
        "a voice that fades": lambda: mono(talk(20) * np.linspace(1, 0.03, 320_000), noise(20, -75)),
        "a recorder that begins in a word": lambda: mono(talk(40)[5000:]),
        # two
        "the same on both sides": lambda: sound((talk(20),), (talk(20),)),
        "the same on both sides, and a noise on each": lambda: sound(
            (talk(20), noise(20, -55, seed=1)), (talk(20), noise(20, -55, seed=2))),
        "nearer to the left": lambda: sound((talk(20),), (0.4 * talk(20),)),
        "two microphones apart": lambda: sound((talk(20), noise(20, -60)), (np.roll(talk(20), 8), noise(20, -60))),
        "one side is silent": lambda: sound((talk(20),), (silence(20),)),
        "the other side is silent": lambda: sound((silence(20),), (talk(20),)),
        "a person a side": lambda: sound((one,), (two,)),
        "a person a side, in noise": lambda: sound((one, noise(18, -55, seed=1)), (two, noise(18, -50, seed=2))),
        "a person a side, on the telephone": lambda: dialogue(8000, 8, 3),
        "two who talk at once": lambda: sound((talk(20),), (talk(20, first=4),)),
        "monologues in turns": lambda: sound((long_one, noise(40, -60)), (long_two, noise(40, -60, seed=1))),
        "the last word is on the other side": lambda: sound(
            (talk(16), noise(16.8, -60)), (join(silence(16.05), clip(1, 16_000)[:12_000]), noise(16.8, -65))),
        "one answer on the other side": lambda: sound(
            (talk(30), noise(30, -60)), (join(silence(13), clip(1, 16_000)), noise(30, -55))),
        "a roll call": lambda: sound((np.tile(tones("たなかさん、、"), 12),), (np.tile(tones("、、、、はい"), 8),)),
        "music on one side": lambda: sound((talk(20),), (silence(20), music(20, -25))),
        "air conditioning on one side": lambda: sound((talk(20), noise(20, -60)), (silence(20), noise(20, -35))),
        "hum on one side": lambda: sound((silence(20), hum(20, -25)), (talk(20),)),
        "timecode on one side": lambda: sound((talk(20),), (silence(20), timecode(20, -15))),
        "a fan beside one microphone": lambda: sound((one, noise(18, -26)), (two, noise(18, -65))),
        "both in a train": lambda: sound((one, noise(18, -25)), (two, noise(18, -25, seed=1))),
        # more
        "four microphones in a room": lambda: sound(
            *((np.roll(talk(20), 5 * i) * 0.8**i, noise(20, -60, seed=i)) for i in range(4))),
        "5.1 with the voice in the middle": lambda: sound(
            *((talk(10, 48_000) if i == 2 else silence(10, 48_000), music(10, -30, 48_000) if i < 2 else silence(0))
              for i in range(6)), rate=48_000),
        "four people at four microphones": lambda: dialogue(turns=8, turn_s=2.5, n_channels=4),
        "sixteen channels with two voices": lambda: sound(
            *((one if i == 3 else 0.2 * two if i == 11 else silence(18), noise(18, -65, seed=i)) for i in range(16))),
    }  # fmt: skip
    return table


# --- Files ---


def programs(name: str) -> list[str]:
    """The programs of a name that can be used; ffmpeg of imageio, which starts faster, before that of the PATH."""
    found = [path] if (path := shutil.which(name)) else []
    with contextlib.suppress(ImportError):
        import imageio_ffmpeg

        found[:0] = [imageio_ffmpeg.get_ffmpeg_exe()] if found and name == FFMPEG else []
    return found


def run(name: str, *arguments: object) -> bytes:
    """What a program writes to stdout, which is a pipe. Raises MissingProgram where none of the name can do it."""
    reason = f"there is no {name} on the PATH"
    for path in programs(name):
        result = subprocess.run([path, *map(str, arguments)], capture_output=True)
        if result.returncode == 0:
            return result.stdout
        said = result.stderr.decode(errors="replace").strip()
        match = re.search("Unknown encoder.*|no handler for.*", said)
        if match is None:
            raise RuntimeError(f"{path} {arguments}: {said}")
        reason = f"{name} says: {match[0]}"
    raise MissingProgram(reason)


def by_libsndfile(subtype: str, **options) -> Callable[[Sound, Path], None]:
    """A writer; in pieces, because libsndfile's vorbis encoder overflows its stack on long ones."""

    def write(sound: Sound, path: Path) -> None:
        waveform = sound.waveform
        with soundfile.SoundFile(path, "w", sound.rate, waveform.shape[1], subtype, **options) as file:
            for first in range(0, len(waveform), sound.rate):
                file.write(waveform[first : first + sound.rate])

    return write


def by_ffmpeg(*options: str, format: str | None = None) -> Callable[[Sound, Path], None]:
    """A writer; with a format to a pipe. Options of an input come first, before its -i."""

    def write(sound: Sound, path: Path) -> None:
        source = path.with_name("source.wav")
        soundfile.write(source, sound.waveform, sound.rate, "FLOAT")
        output = ["-f", format, "pipe:1"] if format else ["-y", path]
        data = run("ffmpeg", "-nostdin", "-v", "error", "-i", source, *options, *output)
        if format:
            path.write_bytes(data)

    return write


def by_sox(*options: str, pipe: bool = False) -> Callable[[Sound, Path], None]:
    """A writer, without dither."""

    def write(sound: Sound, path: Path) -> None:
        source = path.with_name("source.wav")
        soundfile.write(source, sound.waveform, sound.rate, "FLOAT")
        data = run("sox", "-D", source, *options, *(["-t", path.suffix[1:], "-"] if pipe else [path]))
        if pipe:
            path.write_bytes(data)

    return write


def by_python(width: int) -> Callable[[Sound, Path], None]:
    """A writer: Python's wave, with samples of width bytes."""

    def write(sound: Sound, path: Path) -> None:
        integers = np.round(sound.waveform * 2 ** (8 * width - 1)).astype("<i4").reshape(-1)
        integers += 128 * (width == 1)  # these have no sign
        data = integers.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
        with wave.open(str(path), "wb") as file:
            file.setparams((sound.voices.shape[1], width, sound.rate, 0, "NONE", ""))
            file.writeframes(data)

    return write


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def by_recorder(
    first: bytes = b"", before: bytes = b"", after: bytes = b"", length: int | None = None
) -> Callable[[Sound, Path], None]:
    """A writer: WAV with chunks first, right before the sound and after it, or with the length that a recorder writes
    to a pipe."""

    def write(sound: Sound, path: Path) -> None:
        buffer = io.BytesIO()
        soundfile.write(buffer, sound.waveform, sound.rate, "PCM_16", format="WAV")
        wav = buffer.getvalue()
        body = b"WAVE" + first + wav[12:36] + before + chunk(b"data", wav[44:]) + after
        data = b"RIFF" + struct.pack("<I", len(body)) + body
        if length is not None:
            data = data[:4] + struct.pack("<I", min(length + 36, 2**32 - 1)) + data[8:40] + struct.pack("<I", length)
            data += wav[44:]
        path.write_bytes(data)

    return write


def cut(write: Callable[[Sound, Path], None], at: Callable[[bytes], int]) -> Callable[[Sound, Path], None]:
    """A writer of what another one writes, from a byte on."""

    def write_cut(sound: Sound, path: Path) -> None:
        write(sound, path)
        data = path.read_bytes()
        path.write_bytes(data[at(data) :])

    return write_cut


def id3(cover: int) -> bytes:
    """A tag with a Japanese title and a cover of so many bytes."""
    picture = b"\0image/jpeg\0\3\0\xff\xd8\xff" + bytes(cover)
    frames = [(b"TIT2", b"\1" + "会議の録音".encode("utf-16")), (b"APIC", picture)]
    tag = b"".join(name + struct.pack(">IH", len(frame), 0) + frame for name, frame in frames)
    return b"ID3\3\0\0" + bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0)) + tag


BEXT = chunk(b"bext", bytes(602) + b"A=PCM,F=48000,W=16,M=stereo,T=recorder\r\n")
IXML = chunk(b"iXML", "<BWFXML><SCENE>会議</SCENE></BWFXML>\n".encode())
LIST = chunk(b"LIST", b"INFO" + chunk(b"INAM", "会議".encode()) + chunk(b"ISFT", b"recorder"))
CUES = chunk(b"cue ", struct.pack("<I", 1) + struct.pack("<II4sIII", 1, 16_000, b"data", 0, 0, 16_000))
CUES += chunk(b"LIST", b"adtl" + chunk(b"labl", struct.pack("<I", 1) + b"mark\0"))
PICTURE = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=3.5"]
LONGER = [*PICTURE[:-1], PICTURE[-1].replace("duration=3.5", "duration=6")]
SUBTITLE = base64.b64encode("1\n00:00:07,000 --> 00:00:09,000\n字幕\n".encode()).decode()
SUBTITLES = ["-f", "srt", "-i", f"data:text/plain;base64,{SUBTITLE}"]
VP8 = ["-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8"]
STILL = ["-f", "lavfi", "-i", "testsrc=size=600x600:rate=1:duration=1", "-map", "0:a", "-map", "1:v", "-c:v", "mjpeg"]
STILL += ["-disposition:v", "attached_pic", "-metadata", "title=会議の録音"]


def files() -> list[tuple]:
    """What people keep recordings in: extension, sampling rate, channels, writer, truth, and a remark."""
    fragments = "-movflags", "frag_keyframe+empty_moov"
    third = lambda data: len(data) // 3  # noqa: E731
    packet = lambda data: len(data) // 3 // 188 * 188  # noqa: E731
    return [
        *(("wav", rate, 1 + i % 2, by_libsndfile("PCM_16"), 16)
          for i, rate in enumerate((8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000))),
        ("wav", 8000, 1, by_libsndfile("PCM_U8"), 8), ("wav", 48_000, 2, by_libsndfile("PCM_24"), 24),
        ("wav", 48_000, 1, by_libsndfile("PCM_32"), 24), ("wav", 48_000, 2, by_libsndfile("FLOAT"), 24),
        ("wav", 16_000, 1, by_libsndfile("DOUBLE"), 24), ("wav", 8000, 2, by_libsndfile("ULAW"), FFMPEG),
        ("wav", 8000, 1, by_libsndfile("ALAW"), FFMPEG), ("wav", 16_000, 1, by_libsndfile("IMA_ADPCM"), FFMPEG),
        ("wav", 16_000, 2, by_libsndfile("MS_ADPCM"), FFMPEG), ("wav", 8000, 1, by_libsndfile("GSM610"), FFMPEG),
        ("wav", 48_000, 2, by_libsndfile("PCM_24", format="WAVEX"), 24, "extensible"),
        ("wav", 48_000, 2, by_libsndfile("PCM_16", format="RF64"), 16, "RF64"),
        ("aiff", 44_100, 2, by_libsndfile("PCM_16"), 16), ("aiff", 48_000, 1, by_libsndfile("PCM_24"), 24),
        ("aiff", 44_100, 2, by_libsndfile("FLOAT"), 24), ("aiff", 22_050, 1, by_libsndfile("PCM_S8"), 8),
        ("aif", 44_100, 2, by_libsndfile("PCM_16", format="AIFF", endian="LITTLE"), 16, "little-endian"),
        ("au", 8000, 1, by_libsndfile("ULAW"), FFMPEG), ("au", 16_000, 2, by_libsndfile("PCM_16"), 16),
        ("caf", 44_100, 1, by_libsndfile("PCM_16"), 16), ("caf", 48_000, 2, by_libsndfile("PCM_24"), 24),
        ("caf", 44_100, 1, by_libsndfile("ALAC_16"), 16), ("w64", 48_000, 2, by_libsndfile("PCM_16"), 16),
        ("w64", 48_000, 2, by_libsndfile("FLOAT"), 24), ("flac", 16_000, 1, by_libsndfile("PCM_16"), 16),
        ("flac", 48_000, 2, by_libsndfile("PCM_24"), 24), ("flac", 8000, 1, by_libsndfile("PCM_S8"), 8),
        ("ogg", 44_100, 2, by_libsndfile("VORBIS"), SNDFILE),
        ("mp3", 44_100, 2, by_libsndfile("MPEG_LAYER_III"), SNDFILE),
        ("opus", 48_000, 1, by_libsndfile("OPUS", format="OGG"), SNDFILE),
        *(("wav", 16_000, 1 + width % 2, by_python(width), 8 * width, "Python's wave") for width in (1, 2, 3, 4)),
        # recorders, editors, programs that write to a pipe
        ("wav", 48_000, 2, by_recorder(first=BEXT + IXML), 16, "bext, iXML"),
        ("wav", 44_100, 1, by_recorder(before=LIST), 16, "LIST before the sound"),
        ("wav", 44_100, 1, by_recorder(after=LIST), 16, "LIST"),
        ("wav", 44_100, 2, by_recorder(after=CUES), 16, "cues"),
        ("wav", 48_000, 2, by_recorder(first=chunk(b"JUNK", bytes(28)), before=chunk(b"FLLR", bytes(4016))), 16,
         "JUNK, FLLR"),
        ("wav", 44_100, 2, by_recorder(after=chunk(b"id3 ", id3(300_000))), 16, "ID3 and cover"),
        *(("wav", 16_000, 1, by_recorder(length=length), 16, f"a length of {length:#x}")
          for length in (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
        # ffmpeg
        ("wav", 48_000, 2, by_ffmpeg("-write_bext", "1", "-metadata", "description=会議"), 16, "ffmpeg, bext"),
        ("wav", 16_000, 1, by_ffmpeg("-c:a", "adpcm_ima_wav"), FFMPEG, "ffmpeg, ADPCM"),
        ("wav", 44_100, 2, by_ffmpeg("-c:a", "libmp3lame"), FFMPEG, "ffmpeg, MP3 in WAV"),
        ("aiff", 44_100, 2, by_ffmpeg("-write_id3v2", "1", "-metadata", "title=会議"), 16, "ffmpeg, ID3"),
        ("flac", 44_100, 2, by_ffmpeg(*STILL), 16, "ffmpeg, cover"),
        ("mp3", 44_100, 2, by_ffmpeg("-b:a", "128k", "-write_id3v1", "1"), SNDFILE, "ffmpeg, ID3"),
        ("mp3", 44_100, 2, by_ffmpeg("-q:a", "5"), SNDFILE, "ffmpeg, VBR"),
        ("mp3", 16_000, 1, by_ffmpeg(), SNDFILE, "ffmpeg"),
        ("mp3", 44_100, 1, by_ffmpeg("-write_xing", "0"), SNDFILE, "ffmpeg, no Xing"),
        ("mp3", 44_100, 2, by_ffmpeg(*STILL, "-id3v2_version", "3"), SNDFILE, "ffmpeg, cover"),
        ("mp3", 44_100, 2, cut(by_ffmpeg("-b:a", "128k"), third), FFMPEG, "cut out of a longer one"),
        ("mp2", 48_000, 2, by_ffmpeg(), FFMPEG, "ffmpeg"), ("aac", 44_100, 2, by_ffmpeg(), FFMPEG, "ffmpeg"),
        ("aac", 48_000, 2, cut(by_ffmpeg(), third), FFMPEG, "cut out of a longer one"),
        ("ac3", 48_000, 6, by_ffmpeg(), FFMPEG, "ffmpeg"),
        *((extension, 8000, 1, by_ffmpeg("-c:a", "libopencore_amrnb"), FFMPEG, "ffmpeg, AMR")
          for extension in ("amr", "3gp")),
        ("m4a", 44_100, 2, by_ffmpeg(), FFMPEG, "ffmpeg"),
        ("m4a", 16_000, 1, by_ffmpeg("-b:a", "32k"), FFMPEG, "ffmpeg"),
        ("m4a", 48_000, 1, by_ffmpeg("-c:a", "alac"), 16, "ffmpeg, ALAC"),
        ("m4a", 44_100, 2, by_ffmpeg(*STILL), FFMPEG, "ffmpeg, cover"),
        ("m4a", 48_000, 1, by_ffmpeg("-movflags", "+faststart"), FFMPEG, "ffmpeg, faststart"),
        ("mp4", 48_000, 2, by_ffmpeg(*PICTURE, "-c:v", "libx264"), FFMPEG, "ffmpeg, H.264"),
        ("mp4", 48_000, 6, by_ffmpeg(*PICTURE, "-c:v", "mpeg4"), FFMPEG, "ffmpeg, 5.1"),
        ("mp4", 48_000, 2, by_ffmpeg(*PICTURE, "-c:v", "mpeg4", *fragments), FFMPEG, "ffmpeg, fragmented"),
        ("mp4", 48_000, 2, by_ffmpeg(*LONGER, "-c:v", "mpeg4"), FFMPEG, "ffmpeg, the picture is longer"),
        ("mov", 48_000, 2, by_ffmpeg(*PICTURE, "-c:v", "mpeg4", "-c:a", "pcm_s16le", "-timecode", "10:00:00:00"), 16,
         "ffmpeg, timecode"),
        ("mkv", 48_000, 2, by_ffmpeg("-c:a", "flac"), 16, "ffmpeg, FLAC"),
        ("mkv", 48_000, 2, by_ffmpeg(*PICTURE, "-c:v", "libx264", "-c:a", "aac"), FFMPEG, "ffmpeg, H.264"),
        ("mkv", 48_000, 2, by_ffmpeg(*LONGER, "-c:v", "mpeg4", "-c:a", "aac"), FFMPEG, "ffmpeg, the picture is longer"),
        ("mkv", 48_000, 2, by_ffmpeg(*SUBTITLES, "-c:a", "aac"), FFMPEG, "ffmpeg, the subtitles are longer"),
        ("webm", 48_000, 1, by_ffmpeg("-c:a", "libopus"), FFMPEG, "ffmpeg, Opus"),
        ("webm", 44_100, 2, by_ffmpeg("-c:a", "libvorbis"), FFMPEG, "ffmpeg, Vorbis"),
        ("ts", 48_000, 2, by_ffmpeg(*PICTURE, "-c:v", "mpeg2video", "-c:a", "aac"), FFMPEG, "ffmpeg, AAC"),
        ("ts", 48_000, 2, by_ffmpeg("-c:a", "mp2"), FFMPEG, "ffmpeg, MP2"),
        ("ts", 48_000, 6, by_ffmpeg("-c:a", "ac3"), FFMPEG, "ffmpeg, AC-3"),
        *(("ts", 48_000, 2, cut(by_ffmpeg(*PICTURE, "-c:v", "mpeg2video", "-c:a", codec), packet), FFMPEG,
           f"{codec}, the recorder began in the middle") for codec in ("aac", "mp2")),
        ("m2ts", 48_000, 2, by_ffmpeg("-c:a", "ac3", "-mpegts_m2ts_mode", "1"), FFMPEG, "ffmpeg"),
        ("mpg", 48_000, 2, by_ffmpeg(*PICTURE), FFMPEG, "ffmpeg"), ("wma", 44_100, 2, by_ffmpeg(), FFMPEG, "ffmpeg"),
        *((extension, 44_100, 2, by_ffmpeg(*PICTURE), FFMPEG, "ffmpeg") for extension in ("wmv", "flv", "avi")),
        ("oga", 44_100, 2, by_ffmpeg("-c:a", "flac"), 16, "ffmpeg, FLAC"),
        ("opus", 48_000, 1, by_ffmpeg("-application", "voip", "-b:a", "16k"), FFMPEG, "ffmpeg, voice"),
        ("spx", 16_000, 1, by_ffmpeg("-c:a", "libspeex"), FFMPEG, "ffmpeg"),
        *((extension, 44_100, 2, by_ffmpeg(), 16, "ffmpeg") for extension in ("tta", "wv")),
        *((extension, 48_000, 2, by_ffmpeg(*options, format=format), bits, "ffmpeg, to a pipe")
          for extension, format, bits, *options in (
              ("wav", "wav", 16), ("aiff", "aiff", 16), ("au", "au", 16), ("caf", "caf", 16), ("w64", "w64", 16),
              ("flac", "flac", 16), ("mp3", "mp3", SNDFILE), ("ogg", "ogg", SNDFILE), ("opus", "opus", SNDFILE),
              ("aac", "adts", FFMPEG), ("mkv", "matroska", FFMPEG), ("webm", "webm", FFMPEG, *PICTURE, *VP8),
              ("ts", "mpegts", FFMPEG), ("mp4", "mp4", FFMPEG, *fragments))),
        # sox
        *((extension, 44_100, 2, by_sox(), bits, "sox") for extension, bits in (
            ("wav", 16), ("aiff", 16), ("flac", 16), ("au", 16), ("caf", 16), ("w64", 16), ("sph", 16),
            ("ogg", SNDFILE), ("mp3", SNDFILE))),
        ("wav", 44_100, 2, by_sox("-b", "24"), 24, "sox, 24 bits"),
        *((extension, 16_000, 1, by_sox("-b", "16", pipe=True), bits, "sox, to a pipe") for extension, bits in (
            ("wav", 16), ("aiff", 16), ("flac", 16), ("au", 16), ("caf", FFMPEG), ("sph", 16), ("ogg", SNDFILE))),
    ]  # fmt: skip


def recordings() -> list[Recording]:
    """All of them."""
    table = []
    for i, (name, make) in enumerate(sounds().items()):
        extension = "flac" if i % 3 == 0 else "wav"
        table.append(Recording(f"{name} ({extension})", make, by_libsndfile("PCM_16"), extension, 16))
    for extension, rate, n_channels, write, truth, *remark in files():
        name = f"{extension}, {rate} Hz, {n_channels} channels, {remark[0] if remark else truth}"
        table.append(Recording(name, functools.partial(dialogue, rate, n_channels=n_channels), write, extension, truth))
    return table


# --- What is wrong with what is read ---


def decode(path: Path, sound: Sound, program: str) -> np.ndarray:
    """The samples of a lossy file as a program decodes them that is not the one under test or, where there is no other,
    as ffmpeg does without any filter: (n_samples, n_channels)."""
    if program == SNDFILE:
        return soundfile.read(path, always_2d=True)[0]
    options = ["-c:a", "pcm_f32le", "-ar", sound.rate, "-ac", sound.voices.shape[1], "-f", "f32le", "-"]
    data = run(shutil.which(FFMPEG) or FFMPEG, "-v", "quiet", "-i", path, "-vn", *options)
    return np.frombuffer(data, "<f4").reshape(-1, sound.voices.shape[1]).astype(float)


def read(path: Path) -> tuple[int, np.ndarray, list[str]]:
    """The sampling rate, the samples and the warnings of a recording. Raises common.AudioError."""
    warnings = []
    with common.open_sound(str(path), warnings.append) as sound:
        samples = np.concatenate(list(common.mix_down(sound.blocks(), sound.rate)))
    return sound.rate, samples, warnings


def faults_of(recording: Recording, folder: Path) -> list[str]:
    """What is wrong with what the program reads of a recording, a line for each. Raises MissingProgram."""
    sound, path = recording.sound(), folder / f"recording.{recording.extension}"
    recording.write(sound, path)
    try:
        rate, samples, warnings = read(path)
    except common.AudioError as error:
        return [f"refused: {error}"]
    faults = [f"warned: {warning}" for warning in warnings]
    if rate != sound.rate:
        return [*faults, f"{rate} Hz in place of {sound.rate}"]
    if recording.truth in (SNDFILE, FFMPEG):
        expected, precision = decode(path, sound, recording.truth), LOSSY_PRECISION
    else:
        expected, precision = sound.waveform, 1.01 / 2 ** (recording.truth - 1) + 1e-6
    if abs(len(samples) - len(expected)) > rate / 1000:
        faults.append(f"{len(samples) / rate:.3f} s in place of {len(expected) / rate:.3f}")
    faults += different(sound, expected, samples, precision)
    if recording.extension in ("wav", "flac"):
        faults += [f"not decoded: {start:.1f} to {end:.1f} s" for start, end in passed_over(path, sound)]
    return faults


def different(sound: Sound, expected: np.ndarray, samples: np.ndarray, precision: float) -> list[str]:
    """What is wrong with samples that should be the mean of the expected channels (n_samples, n_channels), or of some
    of them among which are all on which somebody speaks."""
    worst, missing, n_channels = 0.0, [], expected.shape[1]
    n = round(BLOCK_S * sound.rate)
    for first in range(0, min(map(len, (samples, expected, sound.voices))) - n, n):
        block, channels, voices = (x[first : first + n] for x in (samples, expected, sound.voices))
        weights = np.linalg.lstsq(channels, block, rcond=1e-4)[0] if n_channels > 1 else np.ones(1)
        worst = max(worst, np.abs(channels @ weights - block).max())
        for i, voice in enumerate(voices.T):  # what another channel has of it counts too
            power = voice @ voice
            heard = max(abs(weights[i]), abs(voices @ weights @ voice) / (power + 1e-12))
            if power / n > 10 ** (AUDIBLE_DB / 10) and heard < 0.8 / n_channels:
                missing.append(f"{first / sound.rate:.2f} s")
    if worst > precision:
        return [f"samples differ by {worst:.2g}, more than {precision:.2g}"]
    return [f"speech is left out at {' '.join(missing[:3])}, {len(missing)} times"] if missing else []


def is_decoded(chunk: common.Chunk) -> bool:
    """Whether the program decodes a chunk, which it does unless that is steady."""
    recognizer = SimpleNamespace(extractor=lambda *args, **options: SimpleNamespace(input_features="features"))
    chunk = inference.Chunk(**vars(chunk), recording=inference.Recording(""))
    inference.prepare(recognizer, chunk, SimpleNamespace(no_speech_threshold=inference.NO_SPEECH_THRESHOLD))
    return chunk.features is not None


def passed_over(path: Path, sound: Sound) -> list[tuple[float, float]]:
    """The chunks that the program does not decode, although somebody speaks in them: start and end in s."""
    found = []
    for chunk in common.read_chunks(str(path), 15, lambda warning: None):
        voices = sound.voices[round(chunk.start * sound.rate) : round(chunk.end * sound.rate)]
        has_speech = (np.abs(voices) > 10 ** (AUDIBLE_DB / 20)).sum() > 0.1 * sound.rate
        if has_speech and not is_decoded(chunk):
            found.append((chunk.start, chunk.end))
    return found


def main(words: list[str]) -> int:
    """Try all recordings, or those whose names have one of the words; 1 where some fail."""
    n, n_failed, missing = 0, 0, set()
    for recording in recordings():
        if words and not any(word in recording.name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                faults = faults_of(recording, Path(folder))
            except MissingProgram as error:
                missing.add(str(error))
                continue
        n, n_failed = n + 1, n_failed + bool(faults)
        for fault in faults:
            print(f"{recording.name}: {fault}", flush=True)
    for reason in sorted(missing):
        print(f"skipped: {reason}")
    print(f"{n_failed} of {n} recordings fail")
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
