"""Hostile input: each file ends in text or in one clear line, with the documented status, never in a traceback."""
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import common
import hostile
from conftest import MODEL, run, write


def test_each_ends_in_text_or_in_one_line(tmp_path):
    (tmp_path / "in").mkdir()
    expected = hostile.make_contents(tmp_path / "in") | hostile.make_special(tmp_path / "in")
    options = ["--model", MODEL, "--device", "cpu", "--dtype", "float32", "-o", tmp_path / "out", "-f", "json"]
    result = run("inference.py", "--audio", tmp_path / "in", *options, environment={"PATH": ""})  # no ffmpeg
    lines = result.stderr.split("\n")  # not splitlines, which ends lines at more than \n
    n_failed = sum(outcome not in (None, hostile.TEXT) for outcome in expected.values())
    assert result.returncode == 1 and f"{len(expected)} recordings, {n_failed} failed, " in lines[-2]
    assert "Traceback" not in result.stderr
    outputs = [json.loads(path.read_bytes()) for path in (tmp_path / "out").iterdir()]
    texts = {content["path"]: content["text"] for content in outputs}
    assert len(outputs) == len(expected) - n_failed  # and no .part
    for path, outcome in expected.items():
        start = f"inference.py: error: {common.one_line(path)}: "
        errors = [line.removeprefix(start) for line in lines if line.startswith(start)]
        if outcome in (None, hostile.TEXT):
            assert (errors, texts[path]) == ([], outcome or texts[path]), path
        else:
            assert len(errors) == 1 and re.search(outcome, errors[0]), (path, errors)


def test_folders_named_like_audio_and_links_in_a_circle(tmp_path, infer):
    (tmp_path / "x.wav").mkdir()
    status, out, err = infer("--audio", tmp_path / "x.wav")
    assert (status, out) == (1, "") and "no audio in this folder" in err
    (tmp_path / "x.wav" / "up").symlink_to(tmp_path)
    write(tmp_path / "x.wav" / "Y.WAV", hostile.synthesize("さ"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(tmp_path / "x.wav")
    for folder, path in ("other", "link/Y.txt"), (".", "other/link/Y.txt"):
        status, _, err = infer("--audio", tmp_path / folder, "-o", tmp_path / f"out {folder}")
        assert status == 0 and "1 recording, " in err and (tmp_path / f"out {folder}" / path).read_text() == "さ\n"


def test_no_permission():
    with tempfile.TemporaryDirectory() as name:
        folder, audio = Path(name), Path(name) / "audio"
        os.chmod(folder, 0o755)  # another user may enter it, unlike the folders of pytest
        model = shutil.copytree(MODEL, folder / "model")  # the clone may be its owner's alone
        for path in (audio, audio / "closed", folder / "out"):
            path.mkdir()
        good, secret = (write(audio / name, hostile.synthesize("さ")) for name in ("good.wav", "secret.wav"))
        for path in folder.rglob("*"):
            path.chmod(0o755)  # whatever the umask
        for path, mode in (secret, 0), (audio / "closed", 0), (folder / "out", 0o555):
            os.chmod(path, mode)
        # Root may read and write everything. The first run imports what may lie where nobody else may read.
        code = f"import os, sys, inference\nsys.argv[0] = 'inference.py'\ninference.main([*sys.argv[2:], {good!r}])\n"
        code += "os.getuid() or os.setuid(65534)\n"
        code += f"print(inference.main(sys.argv[2:]), inference.main([*sys.argv[2:], '-o', '{folder}/out']))"
        result = run("-c", code, "--", "--device", "cpu", "--model", model, "--audio", audio)
    assert result.stdout.splitlines()[-2:] == [f"{good}\tさ", "1 2"]
    assert "3 recordings, 2 failed, " in result.stderr and f"error: {secret}: Permission denied" in result.stderr
    assert f"error: {audio}/closed: Permission denied" in result.stderr
    assert f"error: --output-dir {folder}/out: no file can be written there: Permission denied" in result.stderr
