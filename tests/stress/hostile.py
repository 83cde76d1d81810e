"""Sound files of all kinds, and files that are not what they seem: what test_hostile.py feeds the program."""
import os
import socket
import struct
from pathlib import Path

import numpy as np
import soundfile
from tone_speech import synthesize

TEXT = "こんにちは"
RATE = 16_000


def encode(format: str, waveform: np.ndarray, rate: int = RATE, subtype: str | None = None) -> bytes:
    """A sound file as bytes."""
    import io

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def riff(samples: bytes, riff_size: int | None = None, data_size: int | None = None, **fields: int) -> bytes:
    """A wav file with any values in its header; 16-bit mono at 16 kHz by default."""
    f = {"tag": 1, "channels": 1, "rate": RATE, "bytes_per_s": 2 * RATE, "block": 2, "bits": 16} | fields
    data_size = len(samples) if data_size is None else data_size
    riff_size = 36 + len(samples) if riff_size is None else riff_size
    header = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", riff_size, b"WAVEfmt ", 16, *f.values(), b"data", data_size)
    return header + samples


def contents() -> dict[str, tuple[bytes, str | None]]:
    """Name, bytes, and what should come out: the TEXT itself, None for any text, or words of the error's message."""
    speech = synthesize(TEXT)
    wav, flac, ogg, mp3 = (encode(name, speech) for name in ("WAV", "FLAC", "OGG", "MP3"))
    pcm = wav[44:]
    no_audio = "not audio that libsndfile reads|no samples in it|empty"
    boundaries = (0, 1, 4, 8, 12, 16, 20, 22, 24, 28, 32, 34, 36, 40, 44)
    cases = {f"wav-cut-at-{n}.wav": (wav[:n], no_audio) for n in boundaries}
    cases |= {f"flac-cut-at-{n}.flac": (flac[:n], no_audio) for n in (1, 4, 8, 26, 42, 60)}
    cases["flac-cut-in-the-middle.flac"] = flac[: len(flac) // 2], None
    cases |= {f"ogg-cut-at-{n}.ogg": (ogg[:n], no_audio) for n in (4, 27, 28, 58, 200)}
    cases["ogg-cut-in-the-middle.ogg"] = ogg[: len(ogg) // 2], no_audio  # it is one page
    cases |= {f"mp3-cut-at-{n}.mp3": (mp3[:n], no_audio) for n in (1, 4, 10, 100)}
    cases["mp3-cut-in-the-middle.mp3"] = mp3[: len(mp3) // 2], None
    cases["wav-cut-in-the-middle.wav"] = wav[: len(wav) // 2], None
    cases |= {
        "wav-named.mp3": (wav, TEXT), "flac-named.wav": (flac, TEXT), "mp3-named.wav": (mp3, TEXT),
        "ogg-named.flac": (ogg, TEXT), "also-wav-named.m4a": (wav, TEXT),
        "no-samples.wav": (encode("WAV", speech[:0]), no_audio),
        "no-samples-either.flac": (encode("FLAC", speech[:0]), no_audio),
        "one-sample.wav": (encode("WAV", speech[9999:10000]), None),
        "offset.wav": (encode("WAV", 0.5 * speech + 0.5), None),
        "clipping.wav": (encode("WAV", np.clip(20 * speech, -1, 1)), None),
        "amplitude-1e-30.wav": (encode("WAV", 1e-30 * speech, subtype="FLOAT"), None),
        "amplitude-1e30.wav": (encode("WAV", 1e30 * speech.astype(float), subtype="DOUBLE"), "samples of 3.*e[+]29"),
        "integers-as-floats.wav": (encode("WAV", 32768 * speech, subtype="FLOAT"), "samples of 1.* where 1 is"),
        "8-kHz.wav": (encode("WAV", synthesize(TEXT, 8_000), 8_000), TEXT),
        "44100-Hz.flac": (encode("FLAC", synthesize(TEXT, 44_100), 44_100, "PCM_24"), TEXT),
        "192-kHz.wav": (encode("WAV", synthesize(TEXT, 192_000), 192_000), TEXT),
        "opus.ogg": (encode("OGG", synthesize(TEXT, 48_000), 48_000, "OPUS"), TEXT),
        "quiet.aiff": (encode("AIFF", 0.01 * speech), TEXT), "caf.caf": (encode("CAF", speech), TEXT),
        "loud.au": (encode("AU", 2 * speech, subtype="FLOAT"), TEXT),
        "1-Hz.wav": (encode("WAV", speech[:8], 1), None),
        "0-Hz.wav": (riff(pcm, rate=0), no_audio), "2-GHz.wav": (riff(pcm, rate=2**31 - 1), None),
        "4-GHz.wav": (riff(pcm, rate=2**32 - 1), no_audio),
        "64-channels.wav": (encode("WAV", np.repeat(speech[:, None], 64, 1)), TEXT),
        "0-channels.wav": (riff(pcm, channels=0), no_audio),
        "65535-channels.wav": (riff(pcm, channels=65535), no_audio),
        "0-bits.wav": (riff(pcm, bits=0), no_audio), "block-of-0.wav": (riff(pcm, block=0), None),
        "unknown-tag.wav": (riff(pcm, tag=0x4242), no_audio),
        "twice-the-length.wav": (riff(pcm, data_size=2 * len(pcm)), TEXT),
        "4-GB.wav": (riff(pcm, 2**32 - 1, 2**32 - 1), TEXT), "length-0.wav": (riff(pcm, 0, 0), no_audio),
        "rf64.wav": (encode("RF64", speech), TEXT),
        "w64.w64": (encode("W64", speech), TEXT),
        "double.wav": (encode("WAV", speech.astype(np.float64), subtype="DOUBLE"), TEXT),
        "24-bit.wav": (encode("WAV", speech, subtype="PCM_24"), TEXT),
        "8-bit.wav": (encode("WAV", speech, subtype="PCM_U8"), TEXT),
        "a-law.wav": (encode("WAV", speech, subtype="ALAW"), TEXT),
        "adpcm.wav": (encode("WAV", speech, subtype="IMA_ADPCM"), None),
        "text.wav": (b"I am not audio.\n" * 1000, no_audio), "html.m4a": (b"<html>404 Not Found</html>", no_audio),
        "picture.mp3": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)) * 40, no_audio),
        "archive.flac": (b"PK\x03\x04" + bytes(1000), no_audio),
        "noise.ogg": (np.random.default_rng(0).bytes(1 << 20), no_audio), "zeros.mp3": (bytes(1 << 20), no_audio),
        "silence.wav": (encode("WAV", np.zeros(RATE)), None),
    }  # fmt: skip
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus-inf", -np.inf)):
        waveform = speech.copy()
        waveform[1000] = value
        cases[f"{name}.wav"] = encode("WAV", waveform, subtype="FLOAT"), "samples of (nan|inf) where 1 is full scale"
    names = ["new\nline.wav", "tab\tand\rreturn.wav", "it's \"quoted\".wav", "-o.wav", "--audio.wav", "🎤 emoji.wav",
             "back\\slash.wav", "%s %d {}.wav", "$(reboot) `x` ; rm *.wav", " spaces .wav", "\x1b[31mred.wav",
             "line\u2028separator.wav", os.fsdecode(b"not \xff\xfe utf-8.wav"), "n" * 250 + ".wav"]  # fmt: skip
    return cases | dict.fromkeys(names, (wav, TEXT))


def make_contents(folder: Path) -> dict[str, str | None]:
    """Write the files; path and what should come out."""
    expected = {}
    for name, (data, outcome) in contents().items():
        (folder / name).write_bytes(data)
        expected[str(folder / name)] = outcome
    return expected


def make_special(folder: Path) -> dict[str, str]:
    """Things in a folder that are no files; path and words of the error's message."""
    (folder / "dangling.wav").symlink_to(folder / "nothing")
    (folder / "loop-a.wav").symlink_to(folder / "loop-b.wav")
    (folder / "loop-b.wav").symlink_to(folder / "loop-a.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "null.wav").symlink_to("/dev/null")
    (folder / "zero.wav").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(folder)  # the name of a socket must be short
        server.bind("socket.wav")
        os.chdir(before)
    absent, special = "no such file|a file that is not there", "not a regular file"
    expected = {"dangling": absent, "loop-a": absent, "loop-b": absent, "pipe": special, "null": special,
                "zero": special, "socket": special}  # fmt: skip
    return {str(folder / f"{name}.wav"): words for name, words in expected.items()}
