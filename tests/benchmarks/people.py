"""How well inference.py hears people: characters wrong, lost or invented, and when their sentences begin.

    python3 tests/benchmarks/people.py RECORDINGS/ --model tests/real_whisper/model --device cpu --dtype float32

tests/README.md says where the recordings come from. people.json has the truth of each, by its path below RECORDINGS:
its sentences, with | between them, and the stretches of speech that Silero hears, (start, end) in s. A folder of other
recordings has a truth.json of the same form. The script prints a row of a Markdown table for each recording. All other
options go to the program, and --program names another version. --output-dir is as in speech.py.
"""
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from speech import EARLY_S, n_edits, normalize, parse_options, transcribe

TRUTH = Path(__file__).with_suffix(".json")
STEP_S = 0.01  # of the grid on which speech and cues are compared
WIDER_S = 0.2  # that a cue may begin late or end early
SPOKEN = 0.1  # of a cue's duration: it is invented where less of it is speech
SILENCE_S = 0.7  # before a sentence whose start is measured


@dataclass
class Figures:
    """What is counted in one recording, or in several together."""

    n_characters: int = 0  # of the truth, where it is known
    n_wrong: int = 0  # edits from them to the text
    speech_s: float = 0.0
    uncovered_s: float = 0.0  # speech under no cue
    n_cues_invented: int = 0  # where nobody speaks
    n_characters_invented: int = 0  # in them
    n_without_text: int = 0  # sentences after a silence to which no word belongs
    errors: list[float] = field(default_factory=list)  # of the starts of the others, s

    def add(self, other: "Figures") -> None:
        """Count those of another recording too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self, name: str) -> str:
        """A row of the table."""
        wrong = f"{self.n_wrong} of {self.n_characters}" if self.n_characters else ""
        size = np.abs(self.errors)
        starts = f"{np.median(size):.2f} / {np.quantile(size, 0.9):.2f} ({len(size)})" if len(size) else ""
        early = sum(error < -EARLY_S for error in self.errors)
        uncovered = f"{self.uncovered_s:.1f} of {self.speech_s:.1f}"
        invented = f"{self.n_characters_invented} in {self.n_cues_invented}"
        return f"| {name} | {wrong} | {uncovered} | {invented} | {starts} | {early} | {self.n_without_text} |"


HEAD = (
    "| recording | characters wrong | speech under no cue (s) | characters in cues without speech "
    f"| starts, median / 90 % (s) | over {EARLY_S} s early | without text |\n|---|---|---|---|---|---|---|"
)


def overlap_s(start: float, end: float, stretches: list[list[float]]) -> float:
    """How much of the time from start to end lies in stretches, in s."""
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in stretches)


def measure(truth: dict, content: dict) -> Figures:
    """The figures of a recording: its truth against the program's JSON."""
    speech, cues = truth["speech"] or [], content["segments"]
    expected = normalize(truth["text"] or "")
    figures = Figures(len(expected), n_edits(expected, normalize(content["text"])) if expected else 0)
    for start, end in speech:
        times = np.arange(start, end, STEP_S)
        shown = [(times >= cue["start"] - WIDER_S) & (times <= cue["end"] + WIDER_S) for cue in cues]
        figures.speech_s += end - start
        figures.uncovered_s += STEP_S * (~np.any(shown, axis=0)).sum() if cues else end - start
    for cue in cues:
        start, end = cue["start"], cue["end"]
        if normalize(cue["text"]) and overlap_s(start, end, speech) < SPOKEN * (end - start):
            figures.n_cues_invented += 1
            figures.n_characters_invented += len(normalize(cue["text"]))
    sentences = []  # stretches of speech with at least SILENCE_S between them
    for start, end in speech:
        if sentences and start - sentences[-1][1] < SILENCE_S:
            sentences[-1][1] = end
        else:
            sentences.append([start, end])
    first = {}  # when the first word of each sentence begins; a word belongs to the sentence that is nearest
    for word in (word for cue in cues for word in cue["words"] if sentences and normalize(word["word"])):
        middle = (word["start"] + word["end"]) / 2
        nearest = min(range(len(sentences)), key=lambda i: max(sentences[i][0] - middle, middle - sentences[i][1], 0))
        first.setdefault(nearest, word["start"])
    figures.errors = [start - sentences[i][0] for i, start in first.items()]
    figures.n_without_text = len(sentences) - len(first)
    return figures


def main() -> int:
    args, others = parse_options(__doc__)
    truth = {}
    for path in (TRUTH, *(folder / "truth.json" for folder in args.recordings)):
        if path.exists():
            truth |= json.loads(path.read_text(encoding="utf-8"))
    status, said, contents = transcribe(args, others)
    total = Figures()
    print(HEAD)
    for name, of_name in truth.items():
        for content in contents:
            if f"/{content['path']}".endswith(f"/{name}"):
                figures = measure(of_name, content)
                total.add(figures)
                print(figures.row(name))
    print(total.row("together"))
    print(*re.findall(r"chunks decoded again: \d+", said), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
