"""Ordinary recordings get no refusal, no warning and no changed sound, and nothing that is said in them is left out."""
import itertools

import common
import numpy as np
import ordinary
import pytest
from conftest import write
from tone_speech import spoken, synthesize

import inference

RATE = 16_000


@pytest.mark.parametrize("recording", ordinary.recordings(), ids=lambda recording: recording.name)
def test_an_ordinary_recording_is_read_as_it_is(tmp_path, recording):
    try:
        assert ordinary.faults_of(recording, tmp_path) == []
    except ordinary.MissingProgram as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("kind", ["plain", "limited", "limited with music"])
def test_speech_that_is_cut_out_of_speech_is_decoded(kind):
    """Without a pause at either end, plain and as television has it."""
    for first in range(8):
        speech = ordinary.talk(20, first=first, pause_s=0.1)
        if kind != "plain":
            speech = ordinary.limited(speech + ordinary.music(20, -35 if kind == "limited with music" else None))
        for seconds, start_s in itertools.product((0.2, 0.5, 1, 1.5, 2, 2.5, 4, 8), (0.3, 3.1, 7.7, 11.3)):
            waveform = speech[round(start_s * RATE) :][: round(seconds * RATE)].astype(np.float32)
            assert ordinary.is_decoded(common.Chunk(0, seconds, waveform)), (first, start_s, seconds)


@pytest.mark.parametrize("text", ["はい、はい、はい、", "はいはいはいはい、" * 3, "わかりました、" * 5, "いいえ、" * 3,
                                  "そう、" * 9, "たなかさん、" * 5, "うれしいたのしい" * 3])  # fmt: skip
def test_what_people_say_again_and_again_is_no_loop(tmp_path, transcribe, text):
    [recording] = transcribe(write(tmp_path / "a.wav", synthesize(text, pause_s=0.4)))
    assert inference.full_text(recording, "ja").replace("\n", "") == spoken(text)
    assert not any(chunk.looping or chunk.token_limit for chunk in recording.chunks)
