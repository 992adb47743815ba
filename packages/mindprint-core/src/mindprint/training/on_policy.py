"""Pairs on policy: the model in training answers the prompts of its pairs, and its answers are the rejected ones.

Chosen stays the person's answer. A policy that has learned from SFT is worth more as the opponent than the base model,
whose answers it does not give any more (Chen et al. 2024, arXiv 2401.01335; Shaikh et al. 2024, arXiv 2406.00888).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from mindprint import atomic
from mindprint.adapter.peft_format import adapter_digest
from mindprint.config import DataConfig
from mindprint.contract import Sampling, TrainingState
from mindprint.data.render import PreferenceExample, render_preferences, render_prompt
from mindprint.data.row_files import Origin
from mindprint.data.rows import PreferenceRow
from mindprint.data.tokenizer import Tokenizer
from mindprint.errors import GuardError
from mindprint.input_files import MALFORMED, parse_json
from mindprint.models.engine import Engine, Placement
from mindprint.models.likelihoods import batches_by_length
from mindprint.models.positions import longest_sequence
from mindprint.training.objectives import pairs_digest
from mindprint.training.plan import StagePlan
from mindprint.training.reference import reference_key
from mindprint.writing.checks import up_to_sentence

FORMAT = 1

ROWS = 32
"""Prompts that are answered at once."""

LONGER = 1.3
"""Tokens that an answer may have, relative to the person's. One that reaches it is cut after a sentence."""

OnRows = Callable[[int, int], None]


class PolicyPairs:
    """The pairs on policy of a run: one file of answers for each stage and attempt, which a resumed run reads."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        engine: Engine,
        tokenizer: Tokenizer,
        data: DataConfig,
        rows: Sequence[PreferenceRow],
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._engine = engine
        self._tokenizer = tokenizer
        self._data = data
        self._all_rows = rows

    @cached_property
    def _rows(self) -> Mapping[Origin, PreferenceRow]:
        # Only a stage on policy needs them, and rows on disk would all be read into memory.
        return {row.origin: row for row in self._all_rows}

    def pairs_of(
        self,
        plan: StagePlan,
        placement: Placement,
        start: TrainingState,
        examples: Sequence[PreferenceExample],
        on_rows: OnRows,
    ) -> tuple[PreferenceExample, ...]:
        """Return a stage's pairs with the policy's answers as the rejected ones, from the file or made with `start`.

        A pair keeps its own rejected answer where the policy's is empty, or the same as the chosen one. Raises
        `GuardError` if the file belongs to something else.
        """
        key = reference_key(
            base=self._identity["base model"],
            adapter=adapter_digest(start.adapter),
            rows=pairs_digest(examples),
            template=self._identity["chat template"],
        )
        attempt = f"-{plan.attempt}" if plan.attempt > 1 else ""
        file = self._folder / f"{plan.index:04d}{attempt}.json"
        ranks = placement.backend.ranks
        # Only the first rank has the files of the run.
        stored = ranks.from_first(lambda: _read_answers(file, key, len(examples)) if file.exists() else None)
        if stored is not None:
            answers = stored
        else:
            self._engine.start_stage(placement, start)
            answers = self._answers(examples, on_rows)
            if ranks.first:
                self._folder.mkdir(exist_ok=True)
                content = {"format": FORMAT, "key": key, "backend": placement.backend.name, "answers": answers}
                atomic.write_text(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        return tuple(self._with_rejected(example, answer) for example, answer in zip(examples, answers, strict=True))

    def _answers(self, examples: Sequence[PreferenceExample], on_rows: OnRows) -> list[str]:
        """Return the greedy answer of the adapter in memory to each pair's prompt."""
        rows = [self._rows[example.origin] for example in examples]
        prompts = [render_prompt(row.prompt, self._tokenizer, self._data.format, row.variables) for row in rows]
        most = min(self._data.max_length, longest_sequence(self._engine.folder.path) or self._data.max_length)
        limits = [
            max(1, min(math.ceil(LONGER * len(example.chosen)), most - len(prompt)))
            for example, prompt in zip(examples, prompts, strict=True)
        ]
        backend, model = self._engine.backend, self._engine.model

        def answer_batch(batch: list[int]) -> list[str]:
            sampling = Sampling(max(limits[place] for place in batch), self._tokenizer.stop_token_ids)
            texts = []
            made = backend.generate(model, [prompts[place] for place in batch], sampling)
            for place, generation in zip(batch, made, strict=True):
                tokens = generation.tokens.tolist()
                own = tokens[: limits[place]]
                text = self._tokenizer.answer_text(own, prompts[place].tolist())
                ended = generation.stop_reason == "stop" and len(own) == len(tokens)
                texts.append(text if ended else up_to_sentence(text))
            return texts

        # An answer of few tokens in a batch of long ones would wait for them, so the limit counts as length.
        lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        batches = list(batches_by_length(lengths, ROWS))
        starts = list(accumulate(map(len, batches), initial=0))
        answers = [""] * len(examples)
        for batch, texts in backend.ranks.divide(
            batches, answer_batch, before=lambda done: on_rows(starts[done], len(examples))
        ):
            for place, text in zip(batch, texts, strict=True):
                answers[place] = text
        on_rows(len(examples), len(examples))
        return answers

    def _with_rejected(self, example: PreferenceExample, answer: str) -> PreferenceExample:
        if not answer.strip():
            return example
        row = replace(self._rows[example.origin], rejected=answer)
        # Through the template, as the pairs of files are: the tokens that were generated may divide words otherwise.
        rendered = render_preferences([row], self._tokenizer, self._data).examples
        return rendered[0] if rendered else example


def _read_answers(file: Path, key: str, count: int) -> list[str]:
    try:
        content: Any = parse_json(file.read_bytes())
        answers = content["answers"]
        sound = content["format"] == FORMAT and len(answers) == count and all(isinstance(a, str) for a in answers)
        owner = content["key"]
    except (OSError, *MALFORMED) as error:
        raise GuardError(f"{file}: cannot be read: {error}; delete it and resume: it will be made again") from error
    if owner != key or not sound:
        raise GuardError(
            f"{file}: belongs to another base, adapter, data or template than this stage's; "
            "delete it and resume: it will be made again"
        )
    return list(answers)
