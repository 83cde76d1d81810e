"""Hostile input: each file ends in text or in one clear line, with the documented status, never in a traceback."""
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import common
import fuzz
import hostile
import numpy as np
import pytest
from conftest import MODEL, options_of, run, write

import inference


@pytest.fixture(autouse=True)
def no_ffmpeg(monkeypatch):
    """What ffmpeg makes of these files is its own affair."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ffmpeg" else which(name))


@pytest.fixture(autouse=True)
def time_limit():
    """No test of this file may hang, not even in C code."""
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, str | None]:
    """Path and what should come out, as in hostile.py."""
    folder = tmp_path_factory.mktemp("hostile")
    return hostile.make_contents(folder) | hostile.make_special(folder)


def check(path: str, expected: str | None, status: int, text: str, error: str | None) -> None:
    if expected is None:
        assert (status, error) == (0, None), path
    elif expected == hostile.TEXT:
        assert (status, text, error) == (0, hostile.TEXT, None), path
    else:
        assert status == 1 and text == "" and re.search(expected, error or ""), (path, status, text, error)


def test_each_alone(corpus, infer):
    assert len(corpus) >= 60
    for path, expected in corpus.items():
        status, out, err = infer("--audio", path)
        lines = err.removesuffix("\n").split("\n")  # not splitlines, which ends lines at more than \n
        assert len(lines) <= 3, (path, err)
        assert all(line.startswith("inference.py: ") and "Traceback" not in line for line in lines), (path, err)
        check(path, expected, status, out.strip(), lines[0] if status else None)


def test_all_together(corpus, tmp_path):
    folder, options = os.path.dirname(next(iter(corpus))), ["--model", MODEL, "--device", "cpu", "--dtype", "float32"]
    options += ["-f", "json"]
    (tmp_path / "bin").mkdir()
    environment = {"PATH": str(tmp_path / "bin")}  # no ffmpeg
    result = run("inference.py", "--audio", folder, "-o", tmp_path / "out", *options, environment=environment)
    lines = result.stderr.split("\n")
    n_failed = sum(expected not in (None, hostile.TEXT) for expected in corpus.values())
    assert result.returncode == 1 and f"{len(corpus)} recordings, {n_failed} failed, " in lines[-2]
    assert sum(line.startswith("inference.py: error: ") for line in lines) == n_failed
    assert "Traceback" not in result.stderr
    outputs = [json.loads(path.read_bytes()) for path in (tmp_path / "out").iterdir()]
    texts = {content["path"]: content["text"] for content in outputs}
    for path, expected in corpus.items():
        start = f"inference.py: error: {common.one_line(path)}: "
        errors = [line.removeprefix(start) for line in lines if line.startswith(start)]
        check(path, expected, int(bool(errors)), texts.get(path, ""), errors[0] if errors else None)
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".part")]


def test_folders_named_like_audio(tmp_path, infer):
    (tmp_path / "x.wav").mkdir()
    status, out, err = infer("--audio", tmp_path / "x.wav")
    assert (status, out) == (1, "") and "no audio in this folder" in err
    (tmp_path / "x.wav" / "loop").symlink_to(tmp_path)
    (tmp_path / "x.wav" / "y.wav").write_bytes(hostile.contents()["w64.w64"][0])
    status, out, _ = infer("--audio", tmp_path)
    assert (status, out) == (0, "こんにちは\n")


def test_links_to_folders_are_followed_once(tmp_path, infer):
    (tmp_path / "real").mkdir()
    write(tmp_path / "real" / "a.wav", hostile.synthesize("さ"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "corpus")
    inputs, failed = inference.find_audio([str(tmp_path / "corpus")])
    assert (inputs, failed) == ({str(tmp_path / "corpus" / "link" / "a.wav"): "link/a.wav"}, [])


def test_the_same_file_twice_is_transcribed_once(tmp_path, infer):
    path = write(tmp_path / "a.wav", hostile.synthesize("さ"))
    status, out, err = infer("--audio", path, tmp_path, path)
    assert (status, out.count("さ")) == (0, 1) and "1 recording, " in err
    assert infer("--audio", tmp_path, path, "-o", tmp_path / "out")[0] == 0


@pytest.fixture
def readable_by_all():
    """A folder that another user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def nobody(readable_by_all):
    """Be a user without rights, if root: root may read and write everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield readable_by_all
    if os.getuid() == 0:
        os.seteuid(0)


def test_no_permission(readable_by_all, request, infer):
    folder = readable_by_all / "audio"
    folder.mkdir(mode=0o755)
    model = ["--model", shutil.copytree(MODEL, readable_by_all / "model")]  # the clone may be its owner's alone
    good = write(folder / "good.wav", hostile.synthesize("さ"))
    secret = write(folder / "secret.wav", hostile.synthesize("さ"))
    (folder / "closed").mkdir()
    (folder / "out").mkdir()
    os.chmod(secret, 0)
    os.chmod(folder / "closed", 0)
    os.chmod(folder / "out", 0o555)
    assert infer("--audio", good, *model)[0] == 0  # what is imported only now may lie where nobody may read
    request.getfixturevalue("nobody")
    status, out, err = infer("--audio", folder, *model)
    assert (status, out) == (1, f"{good}\tさ\n") and "3 recordings, 2 failed, " in err
    assert f"error: {secret}: " in err and f"error: {folder}/closed: Permission denied" in err
    assert "ermission" in next(line for line in err.splitlines() if secret in line)
    status, out, err = infer("--audio", good, "-o", folder / "out", *model)
    assert status in (1, 2) and "ermission" in err.splitlines()[0]


def test_a_name_that_begins_with_a_dash(tmp_path, infer, monkeypatch):
    write(tmp_path / "-x.wav", hostile.synthesize("さ"))
    monkeypatch.chdir(tmp_path)
    assert infer("--audio", "./-x.wav")[:2] == (0, "さ\n")
    status, _, err = infer("--audio", "-x.wav")
    assert status == 2 and "expected at least one argument" in err


def test_a_name_that_is_not_utf_8_stays_exact(tmp_path, infer):
    path = tmp_path / os.fsdecode(b"\xff.wav")
    path.write_bytes(hostile.encode("WAV", hostile.synthesize("さ")))
    assert infer("--audio", path, "-f", "json", "-o", tmp_path / "out")[0] == 0
    content = json.loads((tmp_path / "out" / os.fsdecode(b"\xff.json")).read_text(encoding="utf-8"))
    assert content["path"] == str(path)


def noises() -> dict[str, np.ndarray]:
    """Seconds of what is not speech, at 16 kHz."""
    rng, sounds = np.random.default_rng(0), {}
    for seconds in (1, 3, 10, 29, 60):
        n = seconds * hostile.RATE
        t = np.arange(n) / hostile.RATE
        for level in (0.001, 0.01, 0.1):
            sounds[f"white noise, {level}, {seconds} s"] = level * rng.normal(size=n)
        sounds[f"hum, {seconds} s"] = 0.1 * sum(np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3))
        chords = [np.sin(2 * np.pi * f * t) for f in (261.6, 329.6, 392.0)]
        sounds[f"chord, {seconds} s"] = 0.1 * sum(chords) * (1 + np.sin(2 * np.pi * 0.5 * t))
        sounds[f"silence, {seconds} s"] = np.zeros(n)
    return sounds


def test_noise_gives_few_false_words(tmp_path, recognizer):
    """The tiny model was trained on speech and on silence between it alone."""
    sounds = noises()
    paths = [write(tmp_path / f"{i}.wav", waveform) for i, waveform in enumerate(sounds.values())]
    results = inference.transcribe(recognizer, paths, options_of())
    counts = {}
    for name, recording in zip(sounds, results, strict=True):
        assert recording.error is None
        kind = name.split(",")[0]
        n_kana, seconds = counts.get(kind, (0, 0.0))
        counts[kind] = n_kana + len(inference.full_text(recording, "ja")), seconds + recording.duration
    print({kind: f"{n} kana in {seconds:.0f} s" for kind, (n, seconds) in counts.items()})
    assert counts["silence"][0] == 0
    # Speech has 2.5 kana a second, each a chord of two tones.
    for kind, limit in (("white noise", 0.2), ("hum", 0.2), ("chord", 2)):
        assert counts[kind][0] <= limit * counts[kind][1], counts


def test_fuzz(tmp_path):
    """50 mutated files; python3 tests/stress/fuzz.py does 2,000."""
    outcome = fuzz.fuzz(50, seed=1)
    assert outcome["text"] + outcome["error"] == 50 and outcome["text"] > 5 and outcome["error"] > 5


def test_a_file_that_hangs_would_be_noticed(monkeypatch):
    monkeypatch.setattr(fuzz, "TIME_LIMIT_S", 3)
    monkeypatch.setattr(fuzz, "COMMAND", [sys.executable, "-c", "import time; time.sleep(99)"])
    with pytest.raises(SystemExit, match="no answer within 3 s"):
        fuzz.fuzz(2, seed=0)
