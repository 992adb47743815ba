"""Results of the API: frozen values that print as the command prints, and that a notebook shows as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mindprint.adapter.formats import Format, TargetFormat
from mindprint.api.loss_curve import loss_curve_svg
from mindprint.errors import MissingLibraryError
from mindprint.events import Notice, StepDone
from mindprint.printing import html_table, html_text, printable, short_path, text_table
from mindprint.runs.folder import RunFolder
from mindprint.runs.opened import Answer
from mindprint.runs.results import RunResult
from mindprint.trust.report import Code, Finding, Report

Side = Literal["base", "tuned"]
"""The two models, as docs/glossary.md calls them."""


class Table(NamedTuple):
    """Rows under a header. The columns in `numbers` are set flush right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


class Result:
    """Root of all results of the API: a value to print, to show in a notebook, or to keep as JSON."""

    def blocks(self) -> Iterator[Table | str]:
        """Yield the tables and paragraphs that are printed, in order."""
        raise NotImplementedError

    def cautions(self) -> Sequence[str]:
        """Return the warnings that belong to this result and that its tables do not show."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """Return the values that the command prints with `--json`."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(text_table(*block) if isinstance(block, Table) else block for block in self.blocks())

    def _repr_html_(self) -> str:
        shown = [html_table(*block) if isinstance(block, Table) else html_text(block) for block in self.blocks()]
        return "\n".join([*shown, *(html_text(caution, warning=True) for caution in self.cautions())])


@dataclass(frozen=True)
class TrainResult(Result, RunResult):
    """A finished run, returned by `mindprint.train`.

    Attributes:
        run: The run's folder.
        adapter: The folder of the adapter, in PEFT's format.
        stages: One summary per topic and stage: steps, first and last loss, seconds.
        verdicts: The outcome of every evaluation that had a threshold.
        failed: The verdicts that failed.
        not_evaluated: The verdicts that had a threshold and could not be evaluated.
        steps: One `StepDone` per optimizer step that counts, in order. Steps that were rolled back are left out.
        report: The page with curves, voice and answers.
    """

    @property
    def report(self) -> Path:
        """The run's report as a page for a browser."""
        return self.run / "report.html"

    @cached_property
    def steps(self) -> list[StepDone]:
        """The loss curve: every step from metrics.jsonl except those that were rolled back."""
        names = {field.name for field in fields(StepDone)}
        # Steps that were undone are not part of the adapter's history.
        lines = (line for line in RunFolder(self.run).read_steps() if not line.get("rolled_back"))
        # A line may have fields that the event lacks, and those are ignored.
        return [StepDone(**{name: value for name, value in line.items() if name in names}) for line in lines]

    def to_pandas(self) -> Any:
        """Return the steps as a `pandas.DataFrame`, one row per step and one column per field.

        Raises:
            MissingLibraryError: pandas is not installed.
        """
        try:
            # pandas is optional and slow to import, so it is only loaded here.
            pandas = import_module("pandas")
        except ImportError as error:
            raise MissingLibraryError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame([asdict(step) for step in self.steps])

    def blocks(self) -> Iterator[Table | str]:
        """Yield the table of stages, and where report and adapter are."""
        rows = [
            (s.topic, s.stage, s.backend, str(s.steps), f"{s.first_loss:.4f} → {s.last_loss:.4f}", f"{s.seconds:.1f}")
            for s in self.stages
        ]
        yield Table(("topic", "stage", "backend", "steps", "loss", "seconds"), rows, (3, 4, 5))
        yield f"report:  {short_path(self.report)}\nadapter: {short_path(self.adapter)}"

    def cautions(self) -> Sequence[str]:
        """Return the verdicts that failed or could not be evaluated."""
        return [str(verdict) for verdict in (*self.failed, *self.not_evaluated)]

    def to_dict(self) -> dict[str, Any]:
        """Return run, adapter, stages and verdicts."""
        stages = [asdict(stage) for stage in self.stages]
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        return {"run": str(self.run), "adapter": str(self.adapter), "stages": stages, "verdicts": verdicts}

    def _repr_html_(self) -> str:
        return super()._repr_html_() + loss_curve_svg(self.steps)


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with the answers of both models.

    Attributes:
        prompt: The prompt.
        base: The base model's answer, or None where it was not asked for.
        tuned: The answer with the adapter, or None where it was not asked for.
    """

    prompt: str
    base: Answer | None
    tuned: Answer | None

    @property
    def sides(self) -> dict[Side, Answer | None]:
        """Both answers under the names that the command uses."""
        return {"base": self.base, "tuned": self.tuned}

    def to_dict(self) -> dict[str, Any]:
        """Return prompt, texts and stop reasons."""
        return {
            "prompt": self.prompt,
            **{name: answer.text if answer else None for name, answer in self.sides.items()},
            "stop_reasons": {name: answer.stop_reason if answer else None for name, answer in self.sides.items()},
        }


@dataclass(frozen=True)
class Source:
    """The origin of a result: the adapter, its base model, and where they computed.

    Attributes:
        adapter_folder: The adapter's folder, absolute. None for a model that answered without one.
        model: The base model's name.
        backend: The backend's name.
        device: The device's name.
        dtype: The dtype that it computes in.
    """

    adapter_folder: str | None
    model: str
    backend: str
    device: str
    dtype: str


SIDES: Mapping[Side, str] = {"base": "without the adapter", "tuned": "with the adapter"}


@dataclass(frozen=True)
class GenerateResult(Result):
    """Answers to prompts without and with the adapter, returned by `mindprint.generate`.

    Attributes:
        answers: One `AnsweredPrompt` per prompt, in order.
        source: The adapter, its base model, and where they computed.
        notices: Messages about loading, in order.
    """

    answers: tuple[AnsweredPrompt, ...]
    source: Source
    notices: tuple[Notice, ...] = ()

    def blocks(self) -> Iterator[Table | str]:
        """Yield each prompt and its answers."""
        for answered in self.answers:
            yield f"prompt: {answered.prompt}"
            for name, answer in answered.sides.items():
                if answer is not None:
                    yield f"{SIDES[name]}:\n{shown_answer(answer)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the source, and the prompts with their answers."""
        return {**asdict(self.source), "prompts": [answered.to_dict() for answered in self.answers]}

    def _repr_html_(self) -> str:
        asked = [name for name in SIDES if all(answered.sides[name] is not None for answered in self.answers)]
        rows = [
            (answered.prompt, *(shown_answer(answer) for answer in answered.sides.values() if answer is not None))
            for answered in self.answers
        ]
        return html_table(("prompt", *(SIDES[name] for name in asked)), rows)


def shown_answer(answer: Answer) -> str:
    """Return an answer as a terminal may show it, with a mark where it was cut off."""
    return printable(answer.text, lines=True) + (" […]" if answer.stop_reason == "length" else "")


@dataclass(frozen=True)
class VerifyResult(Result):
    """A verification, returned by `mindprint.verify`.

    Attributes:
        report: Everything that was checked, with all figures.
        ok: Whether nothing failed.
        findings: The differences that were found, failures and notes.
        codes: The codes of the findings that fail.
        notices: Messages about loading, in order.
    """

    report: Report
    notices: tuple[Notice, ...] = ()

    @property
    def ok(self) -> bool:
        """True if the adapter, or the merged model, computes the same as where it was trained."""
        return self.report.ok

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The differences that were found."""
        return self.report.findings

    @property
    def codes(self) -> frozenset[Code]:
        """The codes of the findings that fail."""
        return self.report.codes

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        # Without a fingerprint nothing was compared with the training, so it must not be called verified.
        if self.ok and not any(finding.code == "no_fingerprint" for finding in self.findings):
            return "verified: it does what it did where it was trained"
        if self.ok:
            return "nothing wrong was found; without a fingerprint that is all that can be said"
        failed = sum(finding.fails for finding in self.findings)
        return f"not verified: {failed} finding{'s' if failed > 1 else ''}"

    def blocks(self) -> Iterator[Table | str]:
        """Yield the subject, the compared log-probs, the adapter's effect, and the findings with the verdict."""
        report = self.report
        yield (
            f"{report.kind}: {report.subject}\n"
            f"base: {report.base}, on {report.backend}, {report.device}, {report.dtype}\n"
            f"checked: {', '.join(report.checked)}"
        )
        if report.comparisons:
            header = (
                "log-probs, nats a token",
                "tokens",
                "mean",
                "greatest",
                "mean allowed",
                "greatest allowed",
                "which is",
            )
            yield Table(header, list(self._compared_rows()), (1, 2, 3, 4, 5))
        if report.effect is not None:
            recorded = report.effect.recorded
            then = "" if recorded is None else f", {recorded:.4g} where it was trained"
            yield f"the adapter moves the probe by {report.effect.found:.4g} nats a token{then}"
        lines = [
            f"{'FAILED' if finding.fails else 'note'}  {finding.code}: {finding.message}" for finding in self.findings
        ]
        yield "\n".join([*lines, self.verdict])

    def _compared_rows(self) -> Iterator[tuple[str, ...]]:
        for compared in self.report.comparisons:
            allowed = compared.tolerance
            figures = (compared.mean, compared.greatest, allowed.mean, allowed.greatest)
            yield compared.what, str(compared.tokens), *(f"{figure:.1e}" for figure in figures), allowed.reason

    def to_dict(self) -> dict[str, Any]:
        """Return `ok` and the whole report."""
        return {"ok": self.ok, **asdict(self.report)}


@dataclass(frozen=True)
class MergeResult(Result):
    """A merged model, returned by `mindprint.merge`.

    Attributes:
        folder: The merged model's folder, or its GGUF file.
        base: The base model's name.
        changed: The names of the weights that the adapter changed.
        verification: The verification by a backend, or None where only the files were compared.
        notices: Messages about the work, in order.
    """

    folder: Path
    base: str
    changed: tuple[str, ...]
    verification: VerifyResult | None
    notices: tuple[Notice, ...] = ()

    def blocks(self) -> Iterator[Table | str]:
        """Yield how many weights changed, then the verification."""
        yield f"{self.folder}: {len(self.changed)} weights of {self.base} changed, everything else is as it was"
        if self.verification is not None:
            yield from self.verification.blocks()

    def __str__(self) -> str:
        # The verification belongs to the first line, so no empty line separates them.
        first = next(iter(self.blocks()))
        return str(first) if self.verification is None else f"{first}\n{self.verification}"

    def cautions(self) -> Sequence[str]:
        """Return the notices that are warnings."""
        return [notice.message for notice in self.notices if notice.warning]

    def to_dict(self) -> dict[str, Any]:
        """Return folder, base, changed weights and the verification."""
        verified = None if self.verification is None else self.verification.to_dict()
        folder = str(self.folder.resolve())
        return {"folder": folder, "base": self.base, "changed": list(self.changed), "verified": verified}


@dataclass(frozen=True)
class ConvertResult(Result):
    """A converted adapter, returned by `mindprint.convert`.

    Attributes:
        folder: The new adapter's folder.
        source_format: The format that it was read from.
        target_format: The format that was written.
        modules: How many modules the adapter has.
        notes: Limits of the new format that concern this adapter.
    """

    folder: Path
    source_format: Format
    target_format: TargetFormat
    modules: int
    notes: tuple[str, ...]

    def blocks(self) -> Iterator[Table | str]:
        """Yield where the adapter is, and in which format."""
        yield f"{self.folder}: {self.modules} modules, in the format of {self.target_format}"

    def cautions(self) -> Sequence[str]:
        """Return the notes."""
        return self.notes

    def to_dict(self) -> dict[str, Any]:
        """Return folder, formats, number of modules and notes."""
        return {
            "folder": str(self.folder.resolve()),
            "from": self.source_format,
            "to": self.target_format,
            "modules": self.modules,
            "notes": list(self.notes),
        }
