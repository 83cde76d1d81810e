"""README.md: its first check, its table of options and its lines of Python."""
import re

from conftest import MODEL, ROOT, run, write
from tone_speech import synthesize

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_check_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    check = re.search(r"^\.venv/bin/python (.+ --device cpu)\n# (.+\n)# (.+)\n# (.+\n)", README, re.MULTILINE)
    command, loading, text, closing = check.groups()
    result = run(*command.split())
    assert (result.returncode, result.stdout) == (0, f"{text}\n")
    figures = r"[\d.]+|bfloat16|float32"  # the dtype is that of the processor
    assert re.sub(figures, "", result.stderr) == re.sub(figures, "", loading + closing)


def test_the_options_and_defaults_are_those_of_help():
    text = " ".join(run("inference.py", "--help").stdout.split())
    options = re.findall(r"^\| `(--\S+)(?: [A-Z.]+)?`.* \| `?(.+?)`? \|$", README, re.MULTILINE)
    assert len(options) == 8
    for option, default in options:
        assert option in text
        if default not in ("required", "stdout") and "," not in default:
            assert re.search(rf" {option} [^.]+(\. [^(]*)?[^(]*\(default: {default}\)", text), option


def test_the_lines_of_python_transcribe(tmp_path):
    path = write(tmp_path / "x.wav", synthesize("こんにちは"))
    code = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]
    result = run("-c", code.replace("common.MODEL", repr(MODEL)).replace("x.wav", path))
    assert (result.stdout, result.stderr) == ("['こんにちは']\n", "")
