"""The voice score as a judge: does it tell an author from others in a work that it was not fitted on?

    python benchmarks/voice.py FOLDER [--seeds 10] [--lengths 100 250 500] [--only discrimination]

FOLDER holds a folder for each author with two works each (`austen/emma.txt`, ...). The scorer is fitted on 20 passages
of one work of an author, with 20 passages each of the other authors as background, and decides on passages of the
author's *other* work and of other works of the others. Both directions, several seeds. Printed are the area under the
ROC curve by author and passage length, the same with 10,000 words of reference for each author, the scores between
floor and ceiling of text that nothing was fitted on, and the time of 1,000 answers.

The headline is validated with an author left out. Which measures are averaged is chosen on the three other authors
alone, among themselves, and the figure is that of the fourth author with this choice. The line `as shipped` has the
measures of the package, for which all four authors were seen.

An interval is that of the mean over seeds (95 %, Student's t), followed by the least and the greatest seed. It says how
far the draw of passages moves the figure, and not how far other authors would.
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
from mindprint.voice.measures import MASKED_CHARACTERS, MASKED_WORDS, CosineDelta, TfidfCosine, measures
from mindprint.voice.scoring import NotScored, Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer

LENGTHS = (100, 250, 500)
AT_LEAST = {100: 0.88, 250: 0.95, 500: 0.98}
AT_LEAST_WITH_MUCH = {100: 0.91, 250: 0.96, 500: 0.98}
REFERENCE = 20
MUCH = 10_000  # words of each author in the larger reference
OTHERS = tuple(measure.name for measure in measures()[2:])
MASKED = (MASKED_CHARACTERS.name, MASKED_WORDS.name)
SETS = {
    "not masked": ("characters", "words", *OTHERS),
    "masked": (*MASKED, *OTHERS),
    "both": ("characters", "words", *MASKED, *OTHERS),
    "not masked, classifiers only": ("characters", "words", "delta"),
    "masked, classifiers only": (*MASKED, "delta"),
}
"""The measures that may be averaged, between which the choice is made."""
SHIPPED = "not masked"
CHOICE_SEEDS, CHOICE_LENGTHS = (1000, 1001), (100, 250)  # other seeds than those of the figures
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
    if options.only == "smollm2":
        return on_model(works, options)
    print(f"{len(works)} authors, {REFERENCE} passages each, {TESTED} tested of each author, {options.seeds} seeds\n")
    chosen = choices(works)
    print()
    sizes = [(length, REFERENCE, AT_LEAST[length]) for length in options.lengths]
    sizes += [(length, MUCH // length, AT_LEAST_WITH_MUCH[length]) for length in options.lengths]
    holds = [discrimination(works, length, options.seeds, known, chosen, bound) for length, known, bound in sizes]
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
    parser.add_argument("--only", choices=["discrimination", "smollm2"])
    model = parser.add_argument_group("--only smollm2: adapters of two authors on the scale of the first")
    model.add_argument("--model", help="folder of a base model")
    model.add_argument("--person", default="doyle", help="author whose voice is scored")
    model.add_argument("--other", default="austen", help="author of the other adapter")
    model.add_argument("--steps", type=int, default=150, help="optimizer steps of each adapter")
    return parser.parse_args()


def on_model(works: dict[str, list[list[str]]], options: argparse.Namespace) -> int:
    # Imported here: the other figures need NumPy alone, and no backend.
    from voice_on_model import compare_adapters  # noqa: PLC0415

    if not options.model or not {options.person, options.other} <= works.keys():
        raise SystemExit(f"name the folder of a base model with --model, and two of {', '.join(works)}")
    # Every requirement is printed, also after one that does not hold.
    held = [
        verdict(*row) for row in compare_adapters(works, options.model, options.person, options.other, options.steps)
    ]
    return 0 if all(held) else 1


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


def choices(works: dict[str, list[list[str]]]) -> dict[str, str]:
    """Return for each author the set of measures that tells the other authors from each other best."""
    by_author = {}
    for left_out in works:
        rest = {author: texts for author, texts in works.items() if author != left_out}
        found: dict[str, list[float]] = {name: [] for name in SETS}
        for length in CHOICE_LENGTHS:
            for seed in CHOICE_SEEDS:
                for trial in trials(rest, length, seed):
                    for name, area in areas(trial, length).items():
                        if name in found:
                            found[name].append(area)
        means = {name: float(np.mean(areas)) for name, areas in found.items()}
        by_author[left_out] = max(means, key=means.__getitem__)
        shown = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        print(f"chosen without {left_out}: {by_author[left_out]} ({shown})", flush=True)
    return by_author


def discrimination(
    works: dict[str, list[list[str]]], length: int, seeds: int, reference: int, chosen: dict[str, str], at_least: float
) -> bool:
    # By measure and author, a figure for each seed: the mean over the two directions.
    by_name: dict[str, dict[str, list[list[float]]]] = {}
    for seed in range(seeds):
        for trial in trials(works, length, seed, reference):
            found = areas(trial, length)
            found = {"author left out": found[chosen[trial.author]], "as shipped": found[SHIPPED], **found}
            for name, area in found.items():
                by_seed = by_name.setdefault(name, {}).setdefault(trial.author, [[] for _ in range(seeds)])
                by_seed[seed].append(area)
    title = f"ROC AUC, {length:3d} words, {reference} x {length} of reference"
    print(f"{title:44s}" + "".join(f"{author[:10]:>11s}" for author in works) + "       mean  95 % interval      seeds")
    headline = 0.0
    for name, by_author in by_name.items():
        figures = np.array([[np.mean(areas) for areas in by_author[author]] for author in works])
        means = "".join(f"{mean:11.3f}" for mean in figures.mean(axis=1))
        print(f"  {name:42s}{means}{figures.mean():11.3f}  {interval(figures.mean(axis=0))}", flush=True)
        headline = float(figures.mean()) if name == "author left out" else headline
    bound = f"{length} words, {reference} x {length} of reference, author left out, at least {at_least}"
    holds = verdict(bound, f"{headline:.3f}", headline >= at_least)
    print()
    return holds


def interval(by_seed: Float64) -> str:
    count, mean = len(by_seed), float(by_seed.mean())
    if count < 2:
        return "one seed has none"
    half = STUDENT.get(count, 2.26) * float(by_seed.std(ddof=1)) / count**0.5
    return f"{mean - half:.3f} to {mean + half:.3f}  {by_seed.min():.3f} to {by_seed.max():.3f}"


def areas(trial: Trial, length: int) -> dict[str, float]:
    """Return the area of each set of measures, of each measure, and of two classical ones in brackets."""
    scorer = fit_scorer(trial.reference, passage_words=length, gates=Gates(), extra=(MASKED_CHARACTERS, MASKED_WORDS))
    if isinstance(scorer, NotScored):
        raise SystemExit(scorer.reason)
    texts = [*trial.own, *trial.others]
    by_measure = dict(zip((m.name for m in scorer.fitted), scorer.by_measure(texts), strict=True))
    decided = {name: np.mean([by_measure[part] for part in parts], axis=0) for name, parts in SETS.items()}
    decided |= by_measure
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
