"""The voice score as a judge: does it tell an author from others in a work that it was not fitted on?

    python benchmarks/voice.py FOLDER [--seeds 10] [--lengths 100 250 500] [--only discrimination]

FOLDER holds a folder for each author with two works each (`austen/emma.txt`, ...). The scorer is fitted on 20 passages
of one work of an author, with 20 passages each of the other authors as background, and decides on passages of the
author's
*other* work and of other works of the others. Both directions, several seeds. Printed are the area under the ROC curve
by author and passage length (for the combined score, each measure in it, and two classical measures), the same with
10,000 words of reference, the scores between floor and ceiling of text that nothing was fitted on, and the time of
1,000 answers. An interval is that of the mean over seeds (95 %, Student's t), followed by the least and the greatest
seed. It says how far the draw of passages moves the figure, and not how far other authors would.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mindprint.voice.gates import Gates
from mindprint.voice.measures import CosineDelta, TfidfCosine
from mindprint.voice.scoring import NotScored, Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer

LENGTHS = (100, 250, 500)
AT_LEAST = {100: 0.88, 250: 0.95, 500: 0.98}
AT_LEAST_WITH_MUCH = {100: 0.91, 250: 0.96, 500: 0.98}
REFERENCE = 20
MUCH = 10_000  # words of each author in the larger reference
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by number of seeds
TESTED = 40
EDGES = 500  # words left out at both ends of a work: title pages, tables of contents, notes
SCORED_TOGETHER = 20  # passages behind one calibrated score

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One author, one direction, one seed."""

    author: str
    reference: VoiceReference
    own: list[str]
    others: list[str]
    held_out: list[str]  # of the work that the reference is from
    held_out_background: list[str]


def main() -> int:
    """Print every figure; the exit code says whether all bounds hold."""
    options = arguments()
    works = read(options.folder)
    print(f"{len(works)} authors, {REFERENCE} passages each, {TESTED} tested of each author, {options.seeds} seeds\n")
    holds = [discrimination(works, length, options.seeds, REFERENCE, AT_LEAST[length]) for length in options.lengths]
    print()
    holds += [
        discrimination(works, length, options.seeds, MUCH // length, AT_LEAST_WITH_MUCH[length])
        for length in options.lengths
    ]
    if options.only != "discrimination":
        print()
        holds += [calibration(works, length) for length in options.lengths]
        print()
        holds.append(speed(works))
    return 0 if all(holds) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, choices=LENGTHS)
    parser.add_argument("--only", choices=["discrimination"])
    return parser.parse_args()


def read(folder: Path) -> dict[str, list[list[str]]]:
    """Return the words of each author's first two works."""
    authors = sorted(path for path in folder.iterdir() if path.is_dir())
    works = {a.name: [w.read_text(encoding="utf-8").split() for w in sorted(a.glob("*.txt"))[:2]] for a in authors}
    short = [name for name, texts in works.items() if len(texts) < 2]
    if short or len(works) < 2:
        raise SystemExit(f"{folder}: needs two authors or more, with two works each ({', '.join(short) or 'too few'})")
    return works


def trials(works: dict[str, list[list[str]]], length: int, seed: int, reference: int = REFERENCE) -> Iterator[Trial]:
    for direction in (0, 1):
        rng = np.random.default_rng([seed, direction, length])
        known = {a: passages(texts[direction], length, reference + SCORED_TOGETHER, rng) for a, texts in works.items()}
        other = {a: passages(texts[1 - direction], length, TESTED, rng) for a, texts in works.items()}
        for author in works:
            rest = [a for a in works if a != author]
            yield Trial(
                author,
                VoiceReference(
                    tuple(known[author][:reference]), tuple(text for a in rest for text in known[a][:reference])
                ),
                other[author],
                [text for a in rest for text in other[a]],
                known[author][reference:],
                [text for a in rest for text in known[a][reference:]],
            )


def passages(words: list[str], length: int, count: int, rng: np.random.Generator) -> list[str]:
    """Return passages drawn without overlap."""
    inner = words[EDGES:-EDGES]
    starts = rng.permutation(len(inner) // length)[:count] * length
    return [" ".join(inner[start : start + length]) for start in starts]


def discrimination(works: dict[str, list[list[str]]], length: int, seeds: int, reference: int, at_least: float) -> bool:
    # By measure and author, a figure for each seed: the mean over the two directions.
    by_name: dict[str, dict[str, list[list[float]]]] = {}
    for seed in range(seeds):
        for trial in trials(works, length, seed, reference):
            for name, area in areas(trial, length).items():
                by_seed = by_name.setdefault(name, {}).setdefault(trial.author, [[] for _ in range(seeds)])
                by_seed[seed].append(area)
    title = f"ROC AUC, {length:3d} words, {reference} x {length} of reference"
    print(f"{title:44s}" + "".join(f"{author[:10]:>11s}" for author in works) + "       mean  95 % interval      seeds")
    combined = 0.0
    for name, by_author in by_name.items():
        figures = np.array([[np.mean(areas) for areas in by_author[author]] for author in works])
        means = "".join(f"{mean:11.3f}" for mean in figures.mean(axis=1))
        print(f"  {name:42s}{means}{figures.mean():11.3f}  {interval(figures.mean(axis=0))}", flush=True)
        combined = float(figures.mean()) if name == "combined" else combined
    bound = f"combined at {length} words, {reference} x {length} of reference, at least {at_least}"
    return verdict(bound, f"{combined:.3f}", combined >= at_least)


def interval(by_seed: Float64) -> str:
    count, mean = len(by_seed), float(by_seed.mean())
    if count < 2:
        return "one seed has none"
    half = STUDENT.get(count, 2.26) * float(by_seed.std(ddof=1)) / count**0.5
    return f"{mean - half:.3f} to {mean + half:.3f}  {by_seed.min():.3f} to {by_seed.max():.3f}"


def areas(trial: Trial, length: int) -> dict[str, float]:
    scorer = fitted(trial.reference, length)
    texts = [*trial.own, *trial.others]
    by_measure = scorer.by_measure(texts)
    decided = {"combined": scorer.combined(by_measure)}
    decided |= {measure.name: row for measure, row in zip(scorer.fitted, by_measure, strict=True)}
    for measure in (TfidfCosine(), CosineDelta()):
        decided[f"({measure.name})"] = measure.fit(trial.reference.own, trial.reference.background)(texts)
    return {name: auc(row[: len(trial.own)], row[len(trial.own) :]) for name, row in decided.items()}


def auc(positive: Float64, negative: Float64) -> float:
    """Return the chance that a positive scores higher than a negative; ties count half."""
    difference = positive[:, None] - negative
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def fitted(reference: VoiceReference, length: int) -> VoiceScorer:
    # The passages are text, so no gate is asked: the figures are those of the measures.
    scorer = fit_scorer(reference, passage_words=length, gates=Gates())
    if isinstance(scorer, NotScored):
        raise SystemExit(scorer.reason)
    return scorer


def calibration(works: dict[str, list[list[str]]], length: int) -> bool:
    """Print the scores of held-out passages whose other half, and the fitted ones left out in turn, set both ends."""
    print(
        f"scores, {length:3d} words      " + f"{'own, held out':>15s}{'others, held out':>18s}{'own, other work':>17s}"
    )
    means = []
    for author in works:
        scores = np.array(
            [
                s
                for seed in range(4)
                for t in trials(works, length, seed)
                if t.author == author
                for s in [ends(t, length)]
            ]
        )
        print(
            f"  {author:20s}"
            + "".join(f"{mean:{width}.2f}" for mean, width in zip(scores.mean(axis=0), (15, 18, 17), strict=True))
        )
        means.append(scores.mean(axis=0))
    own, others, _ = np.mean(means, axis=0)
    holds = abs(own - 1) <= 0.1 and abs(others) <= 0.1
    return verdict("held-out text scores 1 ± 0.1 and others' 0 ± 0.1", f"{own:.2f} and {others:.2f}", holds)


def ends(trial: Trial, length: int) -> list[float]:
    half, third = len(trial.held_out) // 2, trial.held_out_background
    scale = fitted(trial.reference, length).calibrated(floor=third[::2], ceiling=trial.held_out[:half])
    return [value(scale, texts) for texts in (trial.held_out[half:], third[1::2], trial.own)]


def value(scale: Scale | NotScored, texts: Sequence[str]) -> float:
    score = scale if isinstance(scale, NotScored) else scale.score(texts)
    return score.value if isinstance(score, VoiceScore) else float("nan")


def speed(works: dict[str, list[list[str]]]) -> bool:
    trial = next(trials(works, 250, 0))
    words = next(iter(works.values()))[0]
    answers = [" ".join(words[start : start + 200]) for start in range(0, 100_000, 100)][:1000]
    started = time.perf_counter()
    value(fitted(trial.reference, 250).calibrated(), answers)
    seconds = time.perf_counter() - started
    return verdict("1,000 answers of 200 words in under 30 s, fit included", f"{seconds:.1f} s", seconds < 30)


def verdict(bound: str, figure: str, holds: bool) -> bool:
    print(f"{'ok    ' if holds else 'FAILED'}  {bound}: {figure}")
    return bool(holds)


if __name__ == "__main__":
    raise SystemExit(main())
