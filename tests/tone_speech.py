"""Tone speech: an artificial language in which each kana is a chord of two tones.

It stands in for recorded Japanese where no recording may be shipped: tests/tiny_whisper, a Whisper trained on it
by tests/tiny_whisper/train.py, truly transcribes it, so that a test can compare the text that went in with the
text that comes out. Every tone lies below 3.5 kHz and therefore survives an 8 kHz recording.
"""
import numpy as np

KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよわをらりるれろんがだばで"
ROW_HZ = [350 + 110 * row for row in range(10)]  # the lower tone: which row of five kana
COLUMN_HZ = [1700, 2030, 2420, 2880, 3430]  # the higher tone: which kana of the row
TONE_S = 0.32
SLOT_S = 0.40  # from the start of one kana to the start of the next
PAUSE = "、"


def tone(kana: str, sampling_rate: int) -> np.ndarray:
    """The chord of one kana: (TONE_S * sampling_rate,) float64 with a peak near 0.4."""
    index = KANA.index(kana)
    t = np.arange(round(TONE_S * sampling_rate)) / sampling_rate
    chord = np.sin(2 * np.pi * ROW_HZ[index // 5] * t) + np.sin(2 * np.pi * COLUMN_HZ[index % 5] * t)
    return 0.2 * np.hanning(len(t)) ** 0.3 * chord


def synthesize(text: str, sampling_rate: int = 16_000, pause_s: float = 0.8, lead_s: float = 0.1) -> np.ndarray:
    """Speech for a text of KANA, with a pause of pause_s seconds for each 、: (n_samples,) float32.

    lead_s seconds of digital silence come before the first kana; each kana takes SLOT_S seconds.
    """
    pieces, t = [], lead_s
    for character in text:
        if character == PAUSE:
            t += pause_s
        else:
            pieces.append((t, character))
            t += SLOT_S
    waveform = np.zeros(round(t * sampling_rate) + 1)
    for start, character in pieces:
        first = round(start * sampling_rate)
        chord = tone(character, sampling_rate)
        waveform[first : first + len(chord)] += chord[: len(waveform) - first]
    return waveform[: round(t * sampling_rate)].astype(np.float32)


def random_text(rng: np.random.Generator, n_kana: int, pause_every: int = 0) -> str:
    """n_kana random kana, with a pause after every pause_every of them (0: none)."""
    text = ""
    for i in range(n_kana):
        if pause_every and i and i % pause_every == 0:
            text += PAUSE
        text += KANA[rng.integers(len(KANA))]
    return text


def spoken(text: str) -> str:
    """What a perfect transcript of synthesize(text) says: the text without its pauses."""
    return text.replace(PAUSE, "")
