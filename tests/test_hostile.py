"""Hostile input: each file ends in text or in one clear line, with the documented status, never in a traceback."""
import json
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import common
import fuzz
import hostile
import pytest
from conftest import MODEL, run, write

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


def test_each_ends_in_text_or_in_one_line(corpus, tmp_path):
    folder, options = os.path.dirname(next(iter(corpus))), ["--model", MODEL, "--device", "cpu", "--dtype", "float32"]
    (tmp_path / "bin").mkdir()
    environment = {"PATH": str(tmp_path / "bin")}  # no ffmpeg
    result = run("inference.py", "--audio", folder, "-o", tmp_path / "out", "-f", "json", *options,
                 environment=environment)  # fmt: skip
    lines = result.stderr.split("\n")  # not splitlines, which ends lines at more than \n
    n_failed = sum(expected not in (None, hostile.TEXT) for expected in corpus.values())
    assert result.returncode == 1 and f"{len(corpus)} recordings, {n_failed} failed, " in lines[-2]
    assert "Traceback" not in result.stderr
    outputs = [json.loads(path.read_bytes()) for path in (tmp_path / "out").iterdir()]
    texts = {content["path"]: content["text"] for content in outputs}
    assert len(outputs) == len(corpus) - n_failed  # and no .part
    for path, expected in corpus.items():
        start = f"inference.py: error: {common.one_line(path)}: "
        errors = [line.removeprefix(start) for line in lines if line.startswith(start)]
        if expected in (None, hostile.TEXT):
            assert (errors, texts[path]) == ([], expected or texts[path]), path
        else:
            assert len(errors) == 1 and re.search(expected, errors[0]), (path, errors)


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


def test_a_name_that_is_not_utf_8_stays_exact(tmp_path, infer):
    path = tmp_path / os.fsdecode(b"\xff.wav")
    path.write_bytes(hostile.encode("WAV", hostile.synthesize("さ")))
    assert infer("--audio", path, "-f", "json", "-o", tmp_path / "out")[0] == 0
    content = json.loads((tmp_path / "out" / os.fsdecode(b"\xff.json")).read_text(encoding="utf-8"))
    assert content["path"] == str(path)


def test_fuzz(tmp_path):
    """50 mutated files; python3 tests/stress/fuzz.py does 2,000."""
    outcome = fuzz.fuzz(50, seed=1)
    assert outcome["text"] + outcome["error"] == 50 and outcome["text"] > 5 and outcome["error"] > 5
