"""Writes what openai/whisper makes of the recordings of one sentence, with the same weights, into truth.json.

    pip install --no-deps --target ow openai-whisper==20250625 tiktoken more-itertools
    PYTHONPATH=ow python3 tests/real_whisper/witness.py

It decodes in float32 without timestamps, always with the likeliest token.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "benchmarks")]
import alignment  # noqa: E402
import librosa  # noqa: E402
import torch  # noqa: E402
import whisper  # noqa: E402
from transformers import WhisperForConditionalGeneration  # noqa: E402

model = WhisperForConditionalGeneration.from_pretrained(HERE / "model", dtype=torch.float32)
theirs = alignment.openai_model(model)
path = HERE / "truth.json"
truth = json.loads(path.read_text(encoding="utf-8"))
for name, recording in truth.items():
    if len(recording["sentences"]) == 1:
        waveform, _ = librosa.load(HERE / name, sr=16_000)
        features = whisper.log_mel_spectrogram(whisper.pad_or_trim(torch.from_numpy(waveform)))
        options = whisper.DecodingOptions(language="ja", without_timestamps=True, fp16=False)
        recording["whisper"] = whisper.decode(theirs, features, options).text
        print(name, recording["whisper"])
path.write_text(json.dumps(truth, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
