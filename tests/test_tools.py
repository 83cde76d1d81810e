"""Every program in benchmarks/ and stress/ runs in its smallest form, so that none of them rots unseen."""
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import FAKE, MODEL, TESTS, needs_fake, run, write
from tone_speech import synthesize

NAME = "xenon/audio/1-01.mp3"  # of a recording in benchmarks/people.json
PROGRAMS = {  # its arguments, and what it must print; None where another test runs it
    "benchmarks/alignment.py": ("-n 1", r"^inference\.py: \d+ tokens, bias "),
    "benchmarks/corpus.py": ("--clips 9 --processes 1", r"^a process for each clip: [\d.]+ s a clip"),
    "benchmarks/decode.py": ("--model MODEL --runs 1", r"^batch of 16: [\d.]+ ms a step"),
    "benchmarks/encoder.py": ("--model MODEL --device cpu --sizes 64", r"^cpu in \w+: encoder \d+ GFLOP/s"),
    "benchmarks/host.py": ("--runs 1 --chunks 3", r"^\| 44\.1-kHz\.m4a \|"),
    "benchmarks/memory.py": ("--seconds 60", r"^ +60 +1\.9 "),
    "benchmarks/peers.py": ("FOLDER/models --minutes 0.6 --runs 1", r"^\| ours, bfloat16 \| [\d.]+ \| .+ \| \d+ \|$"),
    "benchmarks/people.py": ("FOLDER/xenon --model MODEL -o FOLDER/out --device cpu", rf"^\| {NAME} \| \d+ of \d+ \|"),
    "benchmarks/prompt.py": (f"FOLDER/{NAME} --model MODEL --prompt さよなら。", r"^\| さよなら。 \| .* \| 1 of 1 \|"),
    "benchmarks/speech.py": ("FOLDER/xenon --model MODEL -o FOLDER/out --device cpu", r"^\| 1-01 \| 0 of 5 "),
    "stress/fuzz.py": ("--files 50 --seed 1", r"(?s)(?=.*\d\d text\n)(?=.*\d\d error\n).*^50 files in "),
    "stress/hostile.py": None,  # test_hostile.py
    "stress/kills.py": ("--kills 1 --files 15", r"^1 kills survived"),
    "stress/seed_faults.py": None,  # test_eval_accuracy.py
}
NEEDS = {
    "benchmarks/decode.py": needs_fake,
    "benchmarks/host.py": pytest.mark.skipif(not shutil.which("ffmpeg"), reason="there is no ffmpeg on this machine"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the programs are given: a recording and its truth, and a small model in the place of that of peers.py."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / NAME).parent.mkdir(parents=True)
    write(folder / NAME, synthesize("こんにちは"), format="WAV")
    truth = {"1-01": [{"start": 0.1, "end": 2.1, "text": "こんにちは"}]}
    (folder / "xenon" / "truth.json").write_text(json.dumps(truth))
    (folder / "models").mkdir()
    (folder / "models" / "transformers").symlink_to(MODEL)
    return folder


def test_every_program_has_an_entry():
    paths = [*TESTS.glob("benchmarks/*.py"), *TESTS.glob("stress/*.py")]
    assert {str(path.relative_to(TESTS)) for path in paths} == set(PROGRAMS)


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=NEEDS.get(name, ())) for name in PROGRAMS if PROGRAMS[name]]
)
def test_it_runs(program, folder):
    arguments, expected = PROGRAMS[program]
    words = [word.replace("FOLDER", str(folder)).replace("MODEL", MODEL) for word in arguments.split()]
    result = run(f"tests/{program}", *words, environment=FAKE if program == "benchmarks/decode.py" else None)
    assert result.returncode == 0 and re.search(expected, result.stdout, re.MULTILINE), result.stdout + result.stderr
