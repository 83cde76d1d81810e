"""inference.py as its users meet it: options, output formats, messages, exit status."""
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter

import common
import numpy as np
import pytest
from conftest import MODEL, ROOT, run, run_process, start, write
from tone_speech import random_text, spoken, synthesize

import eval_accuracy
import eval_performance
import inference

LONG = random_text(np.random.default_rng(7), 100, 7)  # some 50 s


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """A folder with hello.wav, long.flac, deep/er/bye.MP3 and things that are not audio."""
    folder = tmp_path_factory.mktemp("audio")
    write(folder / "hello.wav", synthesize("こんにちは"))
    write(folder / "long.flac", synthesize(LONG))
    (folder / "deep" / "er").mkdir(parents=True)
    write(folder / "deep" / "er" / "bye.MP3", synthesize("さようなら", 48_000), 48_000)
    (folder / "notes.txt").write_text("not audio")
    (folder / ".hidden.wav").write_text("not audio")
    return folder


def one_line(err: str) -> str:
    assert err.startswith("inference.py: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


# --- formats ---

RECORDING = inference.Recording("audio/x.wav", warnings=["ffmpeg says: ouch"])
for first, end, text, ratio, spoken_to in [
    (0.0, 2.5, "こんにちは", 0.8, 2.35), (59.9996, 3599.9996, "a --> b c", 3.0, 64.8496),
    (363599.5, 363600.25, "終わり", 0.8, 363600.25),
]:  # fmt: skip
    edges = np.linspace(first, spoken_to, len(text) + 1)  # at an even pace
    RECORDING.chunks.append(inference.Chunk(
        first, end, None, RECORDING, text=text, avg_logprob=-0.5, no_speech_prob=0.1, compression_ratio=ratio,
        left_out=False, token_limit=ratio > 2.4, looping=ratio > 2.4, times=np.stack([edges[:-1], edges[1:]], 1),
    ))  # fmt: skip
RECORDING.chunks.insert(1, inference.Chunk(2.5, 59.9996, None, RECORDING, text="ご視聴", no_speech_prob=0.9))


@pytest.mark.parametrize(
    "extension, expected",
    [
        ("txt", "こんにちは\na --> b c\n終わり\n"),
        ("tsv", "start\tend\ttext\n0\t2500\tこんにちは\n60000\t65000\ta --> b c\n363599500\t363600250\t終わり\n"),
        (
            "srt",
            "1\n00:00:00,000 --> 00:00:02,500\nこんにちは\n\n2\n00:01:00,000 --> 00:01:05,000\na -> b c\n\n"
            "3\n100:59:59,500 --> 101:00:00,250\n終わり\n\n",
        ),
        (
            "vtt",
            "WEBVTT\n\n00:00.000 --> 00:02.500\nこんにちは\n\n01:00.000 --> 01:05.000\na --&gt; b c\n\n"
            "100:59:59.500 --> 101:00:00.250\n終わり\n\n",
        ),
    ],
)
def test_formats_are_those_of_openai_whisper(extension, expected):
    assert inference.render(RECORDING, extension, "ja") == expected


def test_json():
    text = inference.render(RECORDING, "json", "ja")
    assert "こんにちは" in text and text.count("\n") == 1
    content = json.loads(text)
    assert content["text"] == "こんにちはa --> b c終わり"
    assert (content["language"], content["duration"], content["path"]) == ("ja", 363600.25, "audio/x.wav")
    assert content["warnings"] == ["ffmpeg says: ouch"]
    left_out = {"start": 2.5, "end": 60.0, "text": "ご視聴", "avg_logprob": None, "no_speech_prob": 0.9}
    assert content["left_out"] == [left_out]
    segment = content["segments"][1]
    assert "".join(word["word"] for word in segment.pop("words")) == segment["text"]
    assert segment == {
        "id": 1, "start": 60.0, "end": 65.0, "text": "a --> b c", "compression_ratio": 3.0, "token_limit": True,
        "looping": True, "times": "proportional", "avg_logprob": -0.5, "no_speech_prob": 0.1,
    }  # fmt: skip
    assert not content["segments"][0]["looping"] and not content["segments"][0]["token_limit"]


@pytest.mark.parametrize("options, start, space", [
    ([], "<|ja|><|transcribe|>", ""), (["--task", "translate"], "<|ja|><|translate|>", " "),
    (["--task", "translate", "--model", "bilingual"], "<|ja|><|translate|>", ""),
    (["--task", "translate", "--model", "bilingual", "--language", "en"], "<|en|><|translate|>", " "),
])  # fmt: skip
def test_the_model_is_told_the_task_and_a_translation_is_spaced(tmp_path, infer, monkeypatch, options, start, space):
    """The text is English without kotoba's bilingual model, and what --language names with it."""
    generate, noted = common.generate, []

    def note_tokens(recognizer, *rest):
        noted.append(recognizer.tokenizer.decode(recognizer.initial_tokens))
        return generate(recognizer, *rest)

    monkeypatch.setattr(common, "generate", note_tokens)
    monkeypatch.chdir(tmp_path)
    os.symlink(MODEL, "bilingual")
    speech = [synthesize("こんにちは"), np.zeros(28 * 16_000), synthesize("さようなら")]
    _, out, err = infer("--audio", write(tmp_path / "a.wav", np.concatenate(speech)), "-f", "json", *options)
    assert noted[0] == f"<|startoftranscript|>{start}<|notimestamps|>"
    assert json.loads(out)["text"] == f"こんにちは{space}さようなら"
    assert "warning" not in err  # whatever a model of another name was trained for


@pytest.mark.parametrize("model, options, warned", [
    ("kotoba-whisper-v2.0", ["--task", "translate"], True), ("kotoba-whisper-v2.0/", ["--language", "English"], True),
    ("kotoba-whisper-v2.0", ["--language", "Japanese"], False), ("kotoba-bilingual", ["--task", "translate"], False),
])  # fmt: skip
def test_a_model_that_knows_japanese_alone_says_so(tmp_path, audio, infer, monkeypatch, model, options, warned):
    monkeypatch.chdir(tmp_path)
    os.symlink(MODEL, model.rstrip("/"))
    status, _, err = infer("--audio", audio / "hello.wav", "--model", model, *options)
    assert status == 0 and err.count("warning: ") == warned
    assert ("warning: kotoba-whisper-v2.0 was trained for Japanese transcription only; " in err) == warned


@pytest.mark.parametrize("name", ["Japanese", "japanese", "JA"])
def test_a_language_has_a_name_and_a_code(audio, infer, name):
    status, out, _ = infer(audio / "hello.wav", "--language", name, "-f", "json")
    assert status == 0 and (json.loads(out)["text"], json.loads(out)["language"]) == ("こんにちは", "ja")


def test_a_recording_without_speech_has_all_its_outputs_and_says_so(tmp_path, infer):
    path = write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 1e-3, 5 * 16_000))
    status, out, err = infer("--audio", path, "-f", "all", "-o", tmp_path / "out")
    assert (status, out) == (0, "") and f"inference.py: {path}: no speech: it is silence or steady sound (" in err
    written = {name.suffix[1:]: name.read_text() for name in (tmp_path / "out").iterdir()}
    assert (written["txt"], written["srt"], written["vtt"]) == ("", "", "WEBVTT\n\n")
    left_out = {"start": 0.0, "end": 5.0, "text": "", "avg_logprob": None, "no_speech_prob": None}
    assert json.loads(written["json"])["left_out"] == [left_out]


# --- stdout and files ---


def test_one_file_prints_its_text_and_nothing_else(audio, infer):
    status, out, err = infer("--audio", audio / "hello.wav")
    assert (status, out) == (0, "こんにちは\n")
    assert re.fullmatch(r"inference\.py: 1 recording, 2\.1 s of audio in [\d.]+ s \([\d.]+ times real time\) on cpu in "
                        r"float32, loaded in [\d.]+ s\n", err)  # fmt: skip


def test_what_is_loaded_is_said_before(audio, run_here):
    _, _, err = run_here(inference, audio / "hello.wav", "--dtype", "float32")
    assert err.startswith(f"inference.py: loading {MODEL} on cpu in float32\n") and err.count("\n") == 2


@pytest.mark.parametrize("arguments", [
    ["A", "B", "-f", "json"], ["-f", "json", "--audio", "A", "B"], ["A", "-f", "json", "B"],
    ["A", "--audio", "B", "-fjson"], ["A", "--output_format", "json", "B"],
    ["--no_speech_threshold=.7", "--output_format=json", "A", "B"],
])  # fmt: skip
def test_recordings_and_options_may_be_written_as_people_do(audio, infer, arguments):
    paths = {"A": audio / "hello.wav", "B": audio / "deep" / "er" / "bye.MP3"}
    status, out, _ = infer(*(paths.get(argument, argument) for argument in arguments))
    assert (status, {json.loads(line)["text"] for line in out.splitlines()}) == (0, {"こんにちは", "さようなら"})


def test_a_tilde_that_no_shell_has_expanded_is_the_home(tmp_path, audio, infer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(audio / "hello.wav", tmp_path)
    os.symlink(MODEL, tmp_path / "model")
    for name in (["~/hello.wav"], ["--audio", "~/hello.wav", "--overwrite"]):
        assert infer(*name, "--output-dir=~/out", "--model=~/model")[0] == 0
        assert sorted(os.listdir(tmp_path)) == ["hello.wav", "model", "out"] and os.listdir("out") == ["hello.txt"]
    args = eval_accuracy.parse_arguments(["--audio", "~/a", "--model", "~/model"])
    assert (args.audio, args.model) == ([f"{tmp_path}/a"], f"{tmp_path}/model")
    assert eval_accuracy.parse_arguments(["--manifest", "~/b"]).manifest == f"{tmp_path}/b"
    assert eval_performance.parse_arguments(["--audio", "~/a"]).audio == [f"{tmp_path}/a"]


def test_the_closing_line_says_what_is_not_zero():
    totals = Counter(recordings=3, failed=1, skipped=1, audio_s=100.0, warnings=1)
    totals |= {"chunks decoded again": 0, "chunks left out": 2, "chunks looping": 4}
    assert inference.closing_line(totals, inference.parse_arguments(["a", "-o", "out"]), 8.0, " on npu:0") == (
        "4 recordings, 1 failed, 1 skipped, 100.0 s of audio in 8.0 s (12.5 times real time) on npu:0; the files are "
        "in out; warnings: 1; chunks left out: 2; chunks looping: 4"
    )


def test_several_files_print_a_line_each_in_input_order(audio, infer, tmp_path):
    paths = [audio / "long.flac", shutil.copy(audio / "hello.wav", tmp_path / "new\nline.wav")]
    status, out, _ = infer("--audio", *paths)
    assert (status, out) == (0, f"{paths[0]}\t{spoken(LONG)}\n{tmp_path}/new\\nline.wav\tこんにちは\n")
    _, out, _ = infer("--audio", *paths, "-f", "json")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [spoken(LONG), "こんにちは"]


def test_a_folder_is_searched_and_its_tree_kept(audio, infer, tmp_path):
    out = tmp_path / "new" / "out"
    status, said, err = infer("--audio", audio, "-o", out, "-f", "all")
    assert (status, said) == (0, "") and "inference.py: 3 recordings, " in err and "failed" not in err
    written = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert written == {f"{n}.{e}" for n in ("hello", "long", "deep/er/bye") for e in inference.FORMATS}
    assert (out / "hello.txt").read_text() == "こんにちは\n" and (out / "deep/er/bye.txt").read_text() == "さようなら\n"
    (tmp_path / "any").touch()
    assert (out / "hello.txt").stat().st_mode == (tmp_path / "any").stat().st_mode
    [segment] = json.loads((out / "hello.json").read_text())["segments"]
    assert (segment["start"], segment["text"], segment["times"]) == (0.1, "こんにちは", "aligned")
    assert segment["end"] == pytest.approx(2.02, abs=0.25)  # the end of the text takes some of the last sound


@pytest.mark.parametrize("extension", ["srt", "tsv", "vtt", "all"])
def test_formats_that_need_a_folder_say_so(audio, infer, extension):
    status, out, err = infer("--audio", audio / "long.flac", audio / "hello.wav", "-f", extension)
    assert (status, out) == (2, "") and "needs --output-dir" in one_line(err)
    status, out, _ = infer("--audio", audio / "hello.wav", "-f", extension)
    assert status == 2 if extension == "all" else status == 0 and "こんにちは" in out


# --- errors ---


@pytest.mark.parametrize("options, words", [
    (["--batch-size", "0"], "'0' is not a whole number of at least 1"),
    (["--max-new-tokens", "445"], "'445' is not a whole number from 1 to 444"),
    (["--chunk-length", "nan"], "'nan' is not a number from 1 to 30"),
    (["--device", "gpu"], "--device gpu: not npu, npu:N, cpu, cuda or cuda:N"),
    (["--output-format", "docx"], "invalid choice: 'docx'"), (["--language", "jp"], "error: --language jp: not a"),
    (["--no-speech-threshold", "70"], "'70' is not a number from 0 to 1"),
    (["--prompt", "<|ja|>"], "--prompt must be plain text"), (["--prompt", "こ" * 223], "its 224 tokens are more than"),
])  # fmt: skip
def test_wrong_options(audio, infer, options, words):
    status, out, err = infer("--audio", audio / "hello.wav", *options)
    assert (status, out) == (2, "") and words in err.splitlines()[-1]


def test_wrong_options_are_answered_before_what_takes_long_is_imported(audio):
    code = "import sys, inference; sys.argv[1:] = ['--audio', 'x', '--batch-size', '0']\ntry: inference.main()\n"
    code += "finally: print(sorted({'transformers', 'librosa'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "[]\n")


@pytest.fixture
def no_model(monkeypatch):
    """The model must not be loaded."""
    monkeypatch.setattr(common, "load_model", lambda *arguments: pytest.fail("the model was loaded"))


def test_inputs_and_outputs_are_checked_before_the_model_is_loaded(tmp_path, audio, infer, no_model):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder").mkdir()
    for path, words in [("absent.wav", "no such file"), ("empty.wav", "empty"), ("folder", "no audio in this folder")]:
        status, out, err = infer("--audio", tmp_path / path)
        assert (status, out) == (1, "") and words in one_line(err) and path in err
    for path, words in [("empty.wav", "File exists"), ("empty.wav/below", "Not a directory")]:
        status, _, err = infer("--audio", audio / "hello.wav", "-o", tmp_path / path)
        assert status == 2 and one_line(err).endswith(f"--output-dir {tmp_path / path}: no file can be written there: "
                                                      f"{words}\n")  # fmt: skip
    status, _, err = infer("-f", "txt")
    assert status == 2 and "error: which recordings?" in err.splitlines()[-1]


@pytest.mark.parametrize("function", ["replace", "remove"])
def test_a_folder_that_cannot_rename_or_remove_is_refused(tmp_path, audio, infer, no_model, monkeypatch, function):
    """As some mounts of object stores."""

    def fail(*paths: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, function, fail)
    status, _, err = infer(audio / "hello.wav", "-o", tmp_path)
    assert status == 2 and "no file can be written there: Operation not permitted" in one_line(err)


@pytest.mark.parametrize("option", ["-o", "--output"])
@pytest.mark.parametrize("name, remedy", [("talk.srt", "-o . -f srt;"), ("out/talk.VTT", "-o out -f vtt;")])
def test_a_file_s_name_in_place_of_a_folder_s(tmp_path, audio, infer, no_model, monkeypatch, option, name, remedy):
    monkeypatch.chdir(tmp_path)
    status, _, err = infer("--audio", audio / "hello.wav", option, name)
    assert status == 2 and f"--output-dir {name}: this is to be a folder, not a file: write {remedy}" in one_line(err)
    assert os.listdir(tmp_path) == []


def test_a_folder_may_be_named_as_a_file_if_it_is_there_or_has_no_extension(tmp_path, audio, infer):
    (tmp_path / "old.txt").mkdir()
    for folder in (tmp_path / "old.txt", tmp_path / "srt"):
        assert infer("--audio", audio / "hello.wav", "-o", folder)[0] == 0
        assert (folder / "hello.txt").read_text() == "こんにちは\n"


def test_what_is_there_is_replaced_only_if_asked(tmp_path, infer, monkeypatch):
    """A corpus keeps what was really said beside its recordings."""
    path = write(tmp_path / "talk.wav", synthesize("さようなら"))
    (tmp_path / "talk.txt").write_text("by hand")
    (tmp_path / "talk.srt").write_text("by hand too")
    load_model = common.load_model
    with monkeypatch.context() as patch:
        patch.setattr(common, "load_model", lambda *arguments: pytest.fail("the model was loaded"))
        for options, n in ([], 1), (["-f", "all"], 2):
            status, _, err = infer(path, "-o", tmp_path, *options)
            assert status == 2 and f"outputs are already there: {n}, such as {tmp_path}/talk.txt: n" in one_line(err)
        status, _, err = infer(path, "-o", tmp_path, "--skip-existing", "--overwrite")
        assert status == 2 and "not allowed with argument" in err.splitlines()[-1]
    assert load_model is common.load_model
    assert infer(path, "-o", tmp_path, "-f", "all", "--skip-existing")[0] == 0  # what is missing is written
    assert (tmp_path / "talk.txt").read_text() == "by hand" and (tmp_path / "talk.srt").read_text() == "by hand too"
    assert json.loads((tmp_path / "talk.json").read_text())["text"] == "さようなら"
    assert infer(path, "-o", tmp_path, "--overwrite")[0] == 0
    assert (tmp_path / "talk.txt").read_text() == "さようなら\n"
    assert (tmp_path / "talk.srt").read_text() == "by hand too"


def test_names_that_differ_in_case_alone_are_kept_apart(tmp_path, infer, no_model):
    """On the disks of macOS and Windows, and on many network disks, they are the same."""
    names = ["REC.wav", "rec.aiff", "が.wav", unicodedata.normalize("NFD", "が.mp3")]
    assert inference.output_names(dict(zip(names, names, strict=True))) == dict(zip(names, names, strict=True))
    for path in ("Talk.wav", "talk.wav"):
        write(tmp_path / path, synthesize("さ"))
    if len(os.listdir(tmp_path)) == 2:
        status, _, err = infer(tmp_path, "-o", tmp_path / "out")
        assert status == 2 and re.search("talk.wav.txt would overwrite .+/Talk.wav.txt: many disks", one_line(err))
        assert not (tmp_path / "out").exists()


def test_two_inputs_with_one_output_name_get_one_each(tmp_path, infer):
    """x.wav and x.mp3 in a folder, and the same in another folder: all are transcribed."""
    texts = {"a/x.wav": "さ", "a/x.mp3": "よ", "a/y.wav": "う", "b/x.wav": "な", "b/z.wav": "ら", "a/x.mp3.ogg": "ひ"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, synthesize(text * 3))
    out = tmp_path / "out"
    status, _, err = infer("--audio", tmp_path / "a", tmp_path / "b", "-o", out)
    assert status == 0 and "6 recordings, " in err and "failed" not in err
    written = {str(path.relative_to(out)): path.read_text().strip() for path in out.rglob("*.txt")}
    whole = str(tmp_path).lstrip("/")
    assert written == {
        "y.txt": "ううう", "z.txt": "ららら", "x.mp3.ogg.txt": "ひひひ", f"{whole}/a/x.mp3.txt": "よよよ",
        f"{whole}/a/x.wav.txt": "さささ", f"{whole}/b/x.wav.txt": "ななな",
    }  # fmt: skip


def test_a_file_named_in_several_ways_is_one(tmp_path, infer, monkeypatch):
    write(tmp_path / "a.wav", synthesize("さ"))
    (tmp_path / "link.wav").symlink_to("a.wav")
    monkeypatch.chdir(tmp_path)
    status, out, err = infer("--audio", "a.wav", "./a.wav", "--audio", tmp_path / "a.wav")
    assert (status, out) == (0, "さ\n") and "1 recording, " in one_line(err)
    status, out, err = infer("--audio", ".", "a.wav")
    assert (status, out) == (0, "さ\n") and "1 recording, " in err and err.count("\n") == 2
    assert "inference.py: ./link.wav is the same file as ./a.wav, which alone is transcribed\n" in err


def test_hidden_and_trash_folders_are_not_searched_and_what_is_passed_over_is_said(tmp_path, infer):
    """A recording that is a link into a hidden folder, as git-annex keeps it, has an output under its own name."""
    object_ = tmp_path / ".git" / "annex" / "objects" / "x1" / "SHA256E-s1.wav" / "SHA256E-s1.wav"
    for name in (".Trash-1000/files", "$RECYCLE.BIN/S-1-5", "deep/@eaDir", "#1 talk", object_.parent):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name / "old.wav", synthesize("な"))
    write(object_, synthesize("さようなら"))
    (tmp_path / "deep" / "talk.wav").symlink_to(object_)
    (tmp_path / "again").symlink_to("deep")
    for name in ("notes.txt", "deep/a.xyz", "deep/b.XYZ", "deep/._talk.wav"):
        (tmp_path / name).touch()
    out = tmp_path / "out"
    status, _, err = infer("--audio", tmp_path, "-o", out)
    assert status == 0 and "2 recordings, " in err
    written = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.*")}
    assert written == {"again/talk.txt": "さようなら\n", "#1 talk/old.txt": "な\n"}
    assert f": {tmp_path}: files not looked at: 4 (.xyz " in err and f": {tmp_path}: folders not searched: 4 (" in err
    assert f": {tmp_path}/deep is the same folder as {tmp_path}/again, which alone is searched\n" in err
    status, said, err = infer("--audio", tmp_path / ".Trash-1000")  # which is named, and so is searched
    assert (status, said) == (0, "な\n") and one_line(err)


@pytest.mark.parametrize("extension, format", [("sph", "NIST"), ("AWB", "FLAC")])
def test_a_folder_has_recordings_of_rarer_formats(tmp_path, infer, extension, format):
    write(tmp_path / f"a.{extension}", synthesize("さ"), format=format)
    status, out, err = infer("--audio", tmp_path)
    assert (status, out) == (0, "さ\n") and one_line(err)


def test_a_folder_has_recordings_of_phones_cameras_and_television(tmp_path):
    for name in ("memo.qta", "MOV001.MOD", "MOV002.tod", "VR_MOVIE.VRO", "news.tp", "film.evo", "go.sum"):
        (tmp_path / name).write_bytes(b"sound")
    assert len(inference.find_audio([str(tmp_path)])[0]) == 6


def test_a_write_protected_transcript_stays_and_is_an_error(tmp_path, audio, infer):
    """For root too, who may write anything."""
    (tmp_path / "hello.srt").write_text("corrected by hand")
    (tmp_path / "hello.srt").chmod(0o444)
    paths = [audio / "hello.wav", audio / "long.flac"]
    status, _, err = infer("--audio", *paths, "-o", tmp_path, "-f", "all", "--overwrite")
    assert status == 1 and "2 recordings, 1 failed, " in err
    assert f"{audio}/hello.wav: cannot write {tmp_path}/hello.srt: it is write-protected, and stays as it is\n" in err
    assert (tmp_path / "hello.srt").read_text() == "corrected by hand"
    assert (tmp_path / "hello.txt").read_text() == "こんにちは\n" and (tmp_path / "long.srt").exists()


@pytest.mark.parametrize("script", ["inference.py", "eval_accuracy.py", "eval_performance.py"])
def test_a_script_finds_its_own_modules_where_python_does_not_look_for_them(tmp_path, script):
    command = [sys.executable, "-I", ROOT / script, "--help"]  # as -P and PYTHONSAFEPATH of Python 3.11
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith(f"usage: {script}")


@pytest.mark.parametrize("through", ["", "link"])
def test_an_output_that_is_an_input_is_refused(tmp_path, infer, no_model, through):
    (tmp_path / "recordings").mkdir()
    (tmp_path / "link").symlink_to("recordings")
    path = write(tmp_path / "recordings" / "odd.txt", synthesize("さ"), format="WAV")
    before = (tmp_path / "recordings" / "odd.txt").read_bytes()
    status, _, err = infer("--audio", path, "-o", tmp_path / (through or "recordings"))
    assert status == 2 and "would overwrite" in one_line(err)
    assert (tmp_path / "recordings" / "odd.txt").read_bytes() == before


def test_a_recording_fails_alone_and_a_damaged_one_has_a_warning(tmp_path, audio, infer, monkeypatch):
    bad, odd, damaged = (tmp_path / name for name in ("bad.wav", "odd.wav", "damaged.flac"))
    bad.write_text("not audio")
    odd.write_text("not audio")
    damaged.write_bytes((audio / "long.flac").read_bytes()[:200_000])
    read = common.read_chunks

    def read_chunks(path, *options):
        if path == str(odd):
            raise ZeroDivisionError("by\nnought")
        return read(path, *options)

    monkeypatch.setattr(common, "read_chunks", read_chunks)
    status, out, err = infer("--audio", bad, "absent.wav", odd, damaged, audio / "hello.wav", "-f", "json")
    first, second = map(json.loads, out.splitlines())
    assert (status, second["text"], second["warnings"]) == (1, "こんにちは", [])
    assert spoken(LONG).startswith(first["text"][:20])
    assert f"warning: {damaged}: {first['warnings'][0]}\n" in err
    assert "error: absent.wav: no such file" in err and f"error: {odd}: cannot be read (ZeroDivisionError: by)\n" in err
    assert re.search(r"error: .+bad\.wav: (not audio|no sound)", err)  # without ffmpeg, and with it
    assert "5 recordings, 3 failed, " in err.splitlines()[-1] and "; warnings: 1" in err.splitlines()[-1]


def test_an_output_that_cannot_be_written_whole_is_not_written_and_fails_its_file(tmp_path, audio, infer, monkeypatch):
    (tmp_path / "hello.txt").mkdir()
    status, _, err = infer("--audio", audio, "-o", tmp_path, "--overwrite")
    assert status == 2 and "hello.txt is a folder: name another place" in one_line(err)
    (tmp_path / "hello.txt").rmdir()
    (tmp_path / "long.txt").write_text("old")

    fsync, calls = os.fsync, []

    def full_after_the_first(file) -> None:
        calls.append(file)
        if len(calls) > 1:  # which is a try
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full_after_the_first)
    paths = [audio / "long.flac", audio / "hello.wav"]
    status, _, err = infer("--audio", *paths, "-o", tmp_path, "-f", "all", "--overwrite")
    assert status == 1 and err.count("No space left on device") == 2 * 5  # five files each
    assert (tmp_path / "long.txt").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["long.txt"]  # and no .part


def test_a_model_that_is_not_there(audio):
    arguments = ["--audio", audio / "hello.wav", "--device", "cpu", "--model"]
    for model, words, environment in [
        *((name, "no such folder, and no download from ", {}) for name in ("no/such/folder", "~/kotoba/", "kotoba")),
        (audio / "hello.wav", "no such folder, and no download from ", {}),
        ("someone/some-model", " (OfflineModeIsEnabled): check the name", {}),
        ("someone/some-model", "no download from http://127.0.0.1:9 (ConnectionError): check the name (a private model "
         "needs hf auth login); where the hub cannot be reached, set HF_ENDPOINT=https://hf-mirror.com, or name a "
         "folder that has the model\n", {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}),
    ]:  # fmt: skip
        result = run("inference.py", *arguments, model, environment=environment)
        loading, error = result.stderr.splitlines(keepends=True)
        assert (result.returncode, result.stdout) == (2, "") and "loading " in loading and words in one_line(error)


# --- how it ends ---


def test_a_reader_that_has_gone_ends_it_quietly(audio):
    reader, writer = os.pipe()
    os.close(reader)
    paths = [audio / "hello.wav", audio / "long.flac"]
    result = run_process("inference.py", "--audio", *paths, "--device", "cpu", "--model", MODEL, stdout=writer)
    os.close(writer)
    assert result.returncode == 141 and "loading " in one_line(result.stderr)


@pytest.mark.parametrize("options, status, out, words", [
    ("2>/dev/full", 0, "こんにちは\n", ""), ("-o out >&- 2>&-", 0, "", ""), ("absent.wav -o out 2>&-", 1, "", ""),
    (">/dev/full", 2, "", "error: cannot write to stdout: No space left on device\n"),
    (">&-", 2, "", "error: cannot write to stdout: it is closed\n"),
])  # fmt: skip
def test_streams_that_take_nothing_cost_no_transcript_or_are_an_error(audio, tmp_path, options, status, out, words):
    arguments = [sys.executable, ROOT / "inference.py", "--device", "cpu", "--model", MODEL, "--audio"]
    command = f"{shlex.join(map(str, [*arguments, audio / 'hello.wav']))} {options}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (status, out)
    assert result.stderr.endswith(words) and result.stderr.count("\n") == 2 * (words != "")  # what is loaded, and this
    assert os.listdir(tmp_path) == ["out"] * ("-o" in options)


def test_librosa_that_may_not_keep_a_cache_is_one_line(tmp_path):
    """numba keeps what it compiles in the package's folder or at home, and fails where it may write to neither."""
    code = "import sys, inference, numba.core.caching as caching\n"
    code += "for name in ('UserProvidedCacheLocator', 'InTreeCacheLocator', 'UserWideCacheLocator'):\n"
    code += "    getattr(caching, name).from_function = classmethod(lambda cls, *arguments: None)\n"
    code += "sys.exit(inference.main(sys.argv[1:]))"
    path = write(tmp_path / "a.wav", synthesize("さようなら", 48_000), 48_000)
    result = run_process("-c", code, "--audio", path, "--device", "cpu", "--model", MODEL, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 2)
    assert "no locator available" in result.stderr.splitlines()[1]


def test_a_name_that_is_too_long_with_its_extension_fails_alone(tmp_path, audio, infer):
    for name in ("x" * 251 + ".wav", "あ" * 83 + "xy.m"):
        path = shutil.copy(audio / "hello.wav", tmp_path / name)
        out = tmp_path / name[0]
        status, _, err = infer("--audio", path, audio / "hello.wav", "-o", out, "-f", "json")
        assert status == 1 and "File name too long" in err.splitlines()[0] and "2 recordings, 1 failed, 2.1 s" in err
        assert os.listdir(out) == ["hello.json"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_with_a_line_and_the_next_run_goes_on(audio, tmp_path, name):
    for i in range(99):
        shutil.copy(audio / "hello.wav", tmp_path / f"{i}.wav")
    out, number = tmp_path / "out", getattr(signal, name)
    options = ["--batch-size", "1", "--device", "cpu", "--dtype", "float32", "--model", MODEL]
    process = start("inference.py", tmp_path, "-o", out, *options,
                    preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # fmt: skip
    while not [*out.glob("*.txt")]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    n_done = len([*out.glob("*.txt")])
    _, closing, left, last = err.splitlines()
    assert (process.returncode, last) == (128 + number, f"inference.py: interrupted by {name}")
    assert f"inference.py: {n_done} recording" in closing and f"; the files are in {out}" in closing
    assert f"not finished: {99 - n_done}; the same command with -o DIR --skip-existing" in left
    assert n_done == len(os.listdir(out))  # and no .part


def test_nohup_is_not_undone(audio, tmp_path):
    """It lets SIGHUP be ignored, which comes when its terminal is closed."""
    code = "import os, signal, sys, common, inference; sys.argv[0] = 'inference.py'; generate = common.generate\n"
    code += "common.generate = lambda *given: (os.kill(os.getpid(), signal.SIGHUP), generate(*given))[1]\n"
    code += "sys.exit(inference.main(sys.argv[1:]))"
    options = [audio / "hello.wav", "--device", "cpu", "--model", MODEL]
    ignoring, hanging_up = (
        run("-c", f"import signal; signal.signal(signal.SIGHUP, signal.{action})\n{code}", *options)
        for action in ("SIG_IGN", "SIG_DFL")
    )
    assert (ignoring.returncode, ignoring.stdout) == (0, "こんにちは\n")
    assert (hanging_up.returncode, hanging_up.stdout) == (129, "")


def test_it_works_in_a_thread(audio):
    """As servers import and call it: only the main thread may handle signals."""
    code = "import sys, threading; [sys.modules.pop(name, None) for name in ('common', 'inference')]; statuses = []\n"
    code += "def work():\n import inference; statuses.append(inference.main(sys.argv[1:]))\n"
    code += "thread = threading.Thread(target=work); thread.start(); thread.join(); sys.exit(statuses[0])"
    result = run("-c", code, audio / "hello.wav", "--device", "cpu", "--model", MODEL)
    assert (result.returncode, result.stdout) == (0, "こんにちは\n")


def test_progress_on_a_terminal_whatever_the_name(audio, tmp_path, infer, monkeypatch):
    path = shutil.copy(audio / "long.flac", tmp_path / os.fsdecode(b"\xff.flac"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(inference, "REDRAW_S", 0.001)
    err = infer(path, "--chunk-length", "5", "--batch-size", "1")[2]
    assert re.search(r"\r 1\d%\|.*\| \d s of audio \[\d\d:\d\d<\d\d:\d\d, [\d.]+ times real time\]", err)
    assert re.search(r"\r100%\|.*\| 5\d s of audio \[\d\d:\d\d<00:00, [\d.]+ times real time\]", err)
    err = infer(path, audio / "hello.wav", audio / "deep", "--batch-size", "1")[2]
    assert re.search(r"\rfile 2 of 3:  33%\|.*\| \[\d\d:\d\d<\d\d:\d\d\]", err) or "\rfile 2 of 3:  67%|" in err
    assert re.search(r"\rfile 3 of 3: 100%\|.*\| \[00:\d\d<00:00\]", err)


def test_progress_in_a_log_is_whole_lines(audio, infer, monkeypatch):
    monkeypatch.setattr(inference, "LOG_EVERY_S", 0.001)
    *lines, closing = infer(audio / "long.flac", "--chunk-length", "5", "--batch-size", "1")[2].splitlines()
    assert "\r" not in "".join(lines) and len(lines) > 9 and "1 recording, " in closing
    state = re.compile(r"inference\.py: +\d+%\|.*\| \d+ s of audio \[\d\d:\d\d<\S+, [\d.]+ times real time\]")
    assert all(map(state.fullmatch, lines))


def test_the_text_of_one_recording_is_written_as_it_is_heard(tmp_path, infer, monkeypatch):
    """What was decoded before the run ends is on stdout; the whole is what a file has."""
    text = "、、".join(["こんにちは", "さようなら", "またあした"] * 4)
    path = write(tmp_path / "a.wav", synthesize(text, pause_s=0.8))
    status, whole, _ = infer("--audio", path, "--batch-size", "1", "--chunk-length", "5")
    assert status == 0 and infer("--audio", path, "-o", tmp_path, "--chunk-length", "5")[0] == 0
    assert whole == (tmp_path / "a.txt").read_text() and whole.count("\n") >= 3
    generate, written = common.generate, []

    def lost_at_the_third(*arguments):
        if len(written) == 2:
            raise common.DeviceError("npu:0 failed")
        written.append(None)
        return generate(*arguments)

    monkeypatch.setattr(common, "generate", lost_at_the_third)
    status, out, err = infer("--audio", path, "--batch-size", "1", "--chunk-length", "5")
    assert status == 2 and whole.startswith(out) and out.count("\n") == 2 and "npu:0 failed" in err
