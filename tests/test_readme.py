"""README.md: its first check, its commands and its lines of Python."""
import re
import shlex

import pytest
from conftest import MODEL, ROOT, run, write
from tone_speech import synthesize

import eval_accuracy
import eval_performance
import inference

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"inference": inference, "eval_accuracy": eval_accuracy, "eval_performance": eval_performance}
COMMANDS = re.findall(r"(inference|eval_accuracy|eval_performance)\.py ([^#|`\n]*)", README.replace("\\\n", ""))


def test_the_first_check_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    command, text = re.search(r"\.venv/bin/python (inference.py tests/.+ --device cpu)\n# (.+)\n", README).groups()
    result = run(*command.split())
    assert (result.returncode, result.stdout) == (0, f"{text}\n")


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=" ".join)
def test_the_options_of_the_commands_exist(script, arguments):
    assert SCRIPTS[script].parse_arguments(shlex.split(arguments))


def test_there_are_commands():
    assert len(COMMANDS) > 12


def test_the_lines_of_python_transcribe(tmp_path):
    path = write(tmp_path / "x.wav", synthesize("こんにちは"))
    code = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]
    result = run("-c", code.replace("common.MODEL", repr(MODEL)).replace("x.wav", path))
    assert result.stderr == "" and result.stdout.endswith("\nこんにちは\n\n") and " --> " in result.stdout
