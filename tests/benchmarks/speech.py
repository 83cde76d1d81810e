"""How well inference.py hears real speech: characters wrong or invented, and when its subtitles are shown.

    python3 tests/benchmarks/speech.py --model tests/real_whisper/model RECORDINGS/

RECORDINGS has the recordings and a truth.json: for each of them, by its name without extension, the sentences that are
spoken in it, as {"start": s, "end": s, "text": "..."} in order, or none where nobody speaks. It prints a row of a
Markdown table for each recording. All other options go to the program, and --program names another version of it.
With --output-dir the JSON files are kept; where they are there already, they are counted and the program does not run.
"""
import argparse
import difflib
import json
import subprocess
import sys
import tempfile
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).parent.parent.parent / "inference.py"
EARLY_S, PAUSE_S, CUT_S = 0.5, 1.0, 0.1
TOLERANCE_S = 0.15  # of a cue that reaches over a pause
NEAR_S = 0.5  # a cue that is farther from all speech is invented


@dataclass
class Figures:
    """What is counted in one recording, or in several together."""

    n_characters: int = 0  # that are spoken
    n_wrong: int = 0  # edits from them to the text
    n_invented: int = 0  # characters of cues where nobody speaks
    n_across: int = 0  # cues across a pause of more than PAUSE_S
    word_errors: list[float] = field(default_factory=list)  # of the start of each sentence's first word, s
    cue_errors: list[float] = field(default_factory=list)  # of the start of each cue that begins a sentence, s
    end_errors: list[float] = field(default_factory=list)  # of the end of each cue that ends one, s

    def add(self, other: "Figures") -> None:
        """Count those of another recording too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self, name: str) -> str:
        """A row of the table."""
        if not self.n_characters:
            return f"| {name} | | {self.n_invented} | | | | |"
        wrong = f"{self.n_wrong} of {self.n_characters} ({self.n_wrong / self.n_characters:.1%})"
        size = np.abs(self.word_errors)
        starts = f"{np.median(size):.2f} / {np.quantile(size, 0.9):.2f} ({len(size)})" if len(size) else ""
        early = f"{sum(error < -EARLY_S for error in self.cue_errors)} of {len(self.cue_errors)}"
        cut = f"{sum(error < -CUT_S for error in self.end_errors)} of {len(self.end_errors)}"
        return f"| {name} | {wrong} | {self.n_invented} | {starts} | {early} | {self.n_across} | {cut} |"


HEAD = (
    f"| recording | characters wrong | invented | first words, median / 90 % (s) | cues over {EARLY_S} s early "
    f"| across a pause over {PAUSE_S:g} s | ends cut by over {CUT_S} s |\n|---|---|---|---|---|---|---|"
)


def normalize(text: str) -> str:
    """The characters of a text after NFKC and in lower case, without signs and spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(character for character in text if unicodedata.category(character)[0] not in "PZSC")


def n_edits(truth: str, text: str) -> int:
    """The Levenshtein distance of two texts."""
    distances = np.arange(len(text) + 1)
    for i, character in enumerate(truth):
        same = np.array([character == other for other in text], dtype=int)
        best = np.minimum(distances[1:] + 1, distances[:-1] + 1 - same)
        best = np.concatenate([[i + 1], best]) - np.arange(len(text) + 1)
        distances = np.minimum.accumulate(best) + np.arange(len(text) + 1)  # insertions
    return int(distances[-1])


def measure(truth: list[dict], segments: list[dict]) -> Figures:
    """The figures of a recording: its sentences against the segments of its JSON."""
    spoken = [normalize(sentence["text"]) for sentence in truth]
    places = [(i, k) for i, text in enumerate(spoken) for k in range(len(text))]  # of each character
    words = [(word, i) for i, segment in enumerate(segments) for word in segment["words"]]
    characters = [(character, word, i) for word, i in words for character in normalize(word["word"])]
    reference, text = "".join(spoken), "".join(character for character, _, _ in characters)
    figures = Figures(len(reference), n_edits(reference, text) if truth else 0)
    pauses = [(a["end"], b["start"]) for a, b in zip([{"end": 0.0}, *truth], truth, strict=False)]
    for segment in segments:
        if not any(segment["start"] < s["end"] + NEAR_S and segment["end"] > s["start"] - NEAR_S for s in truth):
            figures.n_invented += len(normalize(segment["text"]))
        figures.n_across += any(
            end - start > PAUSE_S and segment["start"] < start - TOLERANCE_S and segment["end"] > end + TOLERANCE_S
            for start, end in pauses
        )
    of_cues = [i for _, _, i in characters]
    begun, matcher = set(), difflib.SequenceMatcher(None, reference, text, autojunk=False)
    matches = [(a + n, b + n) for a, b, size in matcher.get_matching_blocks() for n in range(size)]
    for in_truth, j in matches:
        (i, k), (_, word, cue) = places[in_truth], characters[j]
        if k <= 1 and i not in begun:  # its first character or, where that is wrong, its second
            begun.add(i)
            figures.word_errors.append(word["start"] - truth[i]["start"])
            if j - of_cues.index(cue) <= 1:
                figures.cue_errors.append(segments[cue]["start"] - truth[i]["start"])
        if k == len(spoken[i]) - 1 and cue not in of_cues[j + 1 :]:
            figures.end_errors.append(segments[cue]["end"] - truth[i]["end"])
    return figures


def parse_options(doc: str) -> tuple[argparse.Namespace, list[str]]:
    """The options of a script with this docstring, and the others, which go to the program."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("recordings", metavar="RECORDINGS", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--program", default=PROGRAM, help="an inference.py (default: this repository's)")
    parser.add_argument("--output-dir", "-o", type=Path, help="keep the JSON files here, or count those that are here")
    return parser.parse_known_args()


def transcribe(args: argparse.Namespace, others: list[str]) -> tuple[int, str, list[dict]]:
    """The program's exit status, what it says on stderr, and the contents of the JSON files that it writes."""
    status, said = 0, ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        if not any(folder.glob("**/*.json")):
            command = [sys.executable, args.program, "--audio", *args.recordings, "--model", args.model, "-f", "json"]
            command += ["--output-dir", folder, *others]
            with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
                for line in process.stderr:
                    print(line, end="", file=sys.stderr)
                    said += line
            status = process.returncode
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("**/*.json"))]
    return status, said, contents


def main() -> int:
    args, others = parse_options(__doc__)
    truths = [json.loads((folder / "truth.json").read_text(encoding="utf-8")) for folder in args.recordings]
    status, _, contents = transcribe(args, others)
    segments = {Path(content["path"]).stem: content["segments"] for content in contents}
    total = Figures()
    print(HEAD)
    for name, of_name in sorted(item for truth in truths for item in truth.items()):
        if name in segments:
            figures = measure(of_name, segments[name])
            total.add(figures)
            print(figures.row(name))
    print(total.row("together"))
    return status


if __name__ == "__main__":
    sys.exit(main())
