"""Training objectives: every difference between the stages of a topic, in one place.

A stage is named after its objective. The plan, the loop, checkpoints, metrics.jsonl, the curriculum and the checks of
`mindprint doctor` are the same for every objective. They look up the differences here.

To add an objective, KTO for example (Ethayarajh et al. 2024, arXiv 2402.01306):

1. Name it in `contract.StageName`, at its place in a topic. `contract.STAGES` and every report follow that order.
2. Give it a section in `config.py`: `class KtoConfig(StageConfig)` with its loss settings, off by default.
3. If its rows are of a new kind (an answer with a label), read them in `data/rows.py` and render them in
   `data/render.py`. Otherwise name the kind that exists.
4. If no step hook fits, add one to `hookspecs.py` with a method in `plugins/backend.py`. KTO needs one, since its loss
   is not a function of single pairs.
5. Derive a class from `Objective` here and add it to `OBJECTIVES`.

`tests/test_objectives.py` does this with an objective that needs steps 1, 2 and 5 only.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from mindprint.config import Config, CurriculumConfig, DpoConfig, StageConfig
from mindprint.contract import (
    STAGES,
    Dtype,
    Int32,
    LoadedModel,
    PreferenceBatch,
    StageName,
    StepMetrics,
    TokenBatch,
    Update,
)
from mindprint.data.collate import pair_sequences, preference_batch, sft_batch
from mindprint.data.render import PreferenceExample, Rendered, SftExample, render_preferences, render_sft
from mindprint.data.rows import Rows
from mindprint.data.tokenizer import Tokenizer
from mindprint.losses import PreferenceLoss
from mindprint.models.likelihoods import CompletionSums
from mindprint.plugins.backend import Backend
from mindprint.training import guards

Example = TypeVar("Example")
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Rewards:
    """Means of the implicit rewards over the pairs of a step."""

    chosen: float
    rejected: float
    margin: float
    accuracy: float


class Objective(ABC, Generic[Example, Batch]):
    """A training objective. `Example` is one rendered row, `Batch` what its step hook takes."""

    name: ClassVar[StageName]
    """Its stage, as metrics.jsonl and decisions.jsonl call it, and its section of the configuration."""

    rows: ClassVar[Literal["sft", "preferences"]]
    """The kind of rows that it trains on: a field of `data.rows.Rows`, and a key of manifest.json."""

    default_epochs: ClassVar[int | None] = None
    default_steps: ClassVar[int | None] = None
    """Its length where the configuration gives neither epochs nor steps. Exactly one of the two is set."""

    may_change_on_resume: ClassVar[frozenset[str]] = frozenset({"backend"})
    """Settings that decide how a step is computed, and not its result."""

    def settings(self, config: Config) -> StageConfig:
        """Return its section of the configuration."""
        section: StageConfig = getattr(config, self.name)
        return section

    def gate(self, curriculum: CurriculumConfig) -> Literal["always", "never"] | float:  # noqa: ARG002
        """Return whether a topic's stage runs: always, never, or only below a voice score."""
        return "always"

    def needs_reference(self, settings: StageConfig) -> bool:  # noqa: ARG002
        """Return whether the stage compares with log-probs of the adapter that it starts from."""
        return False

    def repeats(self, settings: StageConfig) -> int:  # noqa: ARG002
        """Return how often a topic takes the stage, one time after the other."""
        return 1

    def is_on_policy(self, settings: StageConfig) -> bool:  # noqa: ARG002
        """Return whether the model in training answers the prompts of the rows as the stage begins."""
        return False

    @abstractmethod
    def render(self, rows: Rows, tokenizer: Tokenizer, data: Any) -> Rendered[Any]:
        """Turn its rows into examples."""

    @abstractmethod
    def token_count(self, example: Example) -> int:
        """Count the tokens that the model reads of an example, for batches by length."""

    def longest_sequence(self, example: Example) -> int:
        """Return the tokens of the longest sequence that the model reads of an example."""
        return self.token_count(example)

    @abstractmethod
    def update_digest(self, digest: hashlib.blake2b, examples: Sequence[Example]) -> None:
        """Add the examples to the digest of a run's data. Without examples the digest must stay as it is."""

    @abstractmethod
    def batch(self, examples: Sequence[Example], pad_id: int, reference: CompletionSums | None) -> Batch:
        """Collate a micro-batch. `reference` holds its summed log-probs, if the objective needs them."""

    @abstractmethod
    def complete_update(self, update: Update, batches: Sequence[Batch], settings: StageConfig) -> Update:
        """Fill in the normalizers of the loss."""

    @abstractmethod
    def take_step(
        self, backend: Backend, model: LoadedModel, batches: Sequence[Batch], settings: StageConfig, update: Update
    ) -> StepMetrics:
        """Call the backend's step hook."""

    def evaluated_loss(
        self,
        backend: Backend,  # noqa: ARG002
        model: LoadedModel,  # noqa: ARG002
        batches: Sequence[Batch],  # noqa: ARG002
        update: Update,  # noqa: ARG002
    ) -> float | None:
        """Return the step's loss from log-probs alone, None where `check_step` compares the loss at every step."""
        return None

    def check_step(
        self,
        batches: Sequence[Batch],
        metrics: StepMetrics,
        settings: StageConfig,
        update: Update,
        dtype: Dtype,
        *,
        first: bool,
    ) -> None:
        """Raise `GuardError` if a finite, applied step did not compute this objective. `first`: of its stage."""

    def rewards(self, batches: Sequence[Batch], metrics: StepMetrics, settings: StageConfig) -> Rewards | None:  # noqa: ARG002
        """Return the rewards of a step, for objectives that have any."""
        return None

    @abstractmethod
    def array_parts(self, batch: Batch) -> Sequence[tuple[Int32, Int32]]:
        """Return the arrays of a batch that hold tokens, each with its lengths: their difference is padding."""

    @abstractmethod
    def tokens_read(self, batch: Batch) -> int:
        """Count the tokens of a batch that the model reads."""

    @abstractmethod
    def sample_sequences(self, examples: Sequence[Example], pad_id: int) -> TokenBatch:
        """Return examples as sequences to compute log-probs of (`mindprint doctor`)."""

    @abstractmethod
    def sample_prompt(self, example: Example) -> Int32:
        """Return the prompt of an example, to be answered (`mindprint doctor`)."""


class SftObjective(Objective[SftExample, TokenBatch]):
    """Supervised fine-tuning on completions."""

    name = "sft"
    rows = "sft"
    default_epochs = 3

    def render(self, rows: Rows, tokenizer: Tokenizer, data: Any) -> Rendered[SftExample]:
        return render_sft(rows.sft, tokenizer, data)

    def token_count(self, example: SftExample) -> int:
        return len(example.tokens)

    def update_digest(self, digest: hashlib.blake2b, examples: Sequence[SftExample]) -> None:
        for example in examples:
            digest.update(example.topic.encode() + example.tokens.tobytes() + example.loss_mask.tobytes())

    def batch(
        self,
        examples: Sequence[SftExample],
        pad_id: int,
        reference: CompletionSums | None,  # noqa: ARG002
    ) -> TokenBatch:
        return sft_batch(examples, pad_id)

    def complete_update(self, update: Update, batches: Sequence[TokenBatch], settings: StageConfig) -> Update:  # noqa: ARG002
        # Over all micro-batches at once: accumulated steps equal one step on the large batch.
        return replace(update, tokens=sum(batch.loss_tokens for batch in batches))

    def take_step(
        self,
        backend: Backend,
        model: LoadedModel,
        batches: Sequence[TokenBatch],
        settings: StageConfig,  # noqa: ARG002
        update: Update,
    ) -> StepMetrics:
        return backend.sft_step(model, batches, update)

    def evaluated_loss(
        self, backend: Backend, model: LoadedModel, batches: Sequence[TokenBatch], update: Update
    ) -> float:
        # A step returns no log-probs, so evaluation has to compute them: for the same micro-batches, in float64.
        return -sum(float(backend.log_probs(model, batch).sum(dtype=np.float64)) for batch in batches) / update.tokens

    def array_parts(self, batch: TokenBatch) -> Sequence[tuple[Int32, Int32]]:
        return ((batch.tokens, batch.lengths),)

    def tokens_read(self, batch: TokenBatch) -> int:
        return int(batch.lengths.sum())

    def sample_sequences(self, examples: Sequence[SftExample], pad_id: int) -> TokenBatch:
        return sft_batch(examples, pad_id)

    def sample_prompt(self, example: SftExample) -> Int32:
        # Everything before the first trained token. Plain text is trained from its start: its prompt is one token.
        return example.tokens[: max(1, int(example.loss_mask.argmax()))]


class DpoObjective(Objective[PreferenceExample, PreferenceBatch]):
    """Preference optimization on pairs of answers, with any loss of `losses.py`."""

    name = "dpo"
    rows = "preferences"
    default_steps = 100
    may_change_on_resume = frozenset({"backend", "share_prompts"})

    def gate(self, curriculum: CurriculumConfig) -> Literal["always", "never"] | float:
        return curriculum.dpo

    def needs_reference(self, settings: StageConfig) -> bool:
        return not self._loss(settings).reference_free

    def repeats(self, settings: StageConfig) -> int:
        return _dpo_settings(settings).iterations

    def is_on_policy(self, settings: StageConfig) -> bool:
        return _dpo_settings(settings).pairs == "on_policy"

    def render(self, rows: Rows, tokenizer: Tokenizer, data: Any) -> Rendered[PreferenceExample]:
        return render_preferences(rows.preferences, tokenizer, data)

    def token_count(self, example: PreferenceExample) -> int:
        return len(example.prompt) + len(example.chosen) + len(example.rejected)

    def longest_sequence(self, example: PreferenceExample) -> int:
        # A pair is read as two sequences, each with the prompt before it.
        return len(example.prompt) + max(len(example.chosen), len(example.rejected))

    def update_digest(self, digest: hashlib.blake2b, examples: Sequence[PreferenceExample]) -> None:
        digest.update(pairs_digest(examples).encode())

    def batch(
        self, examples: Sequence[PreferenceExample], pad_id: int, reference: CompletionSums | None
    ) -> PreferenceBatch:
        sums = (reference.chosen, reference.rejected) if reference is not None else None
        return preference_batch(examples, pad_id, sums)

    def complete_update(self, update: Update, batches: Sequence[PreferenceBatch], settings: StageConfig) -> Update:
        return replace(
            update,
            tokens=sum(int(batch.chosen_lengths.sum()) for batch in batches),
            pairs=sum(batch.pairs for batch in batches),
            share_prompts=_dpo_settings(settings).share_prompts,
        )

    def take_step(
        self,
        backend: Backend,
        model: LoadedModel,
        batches: Sequence[PreferenceBatch],
        settings: StageConfig,
        update: Update,
    ) -> StepMetrics:
        return backend.dpo_step(model, batches, self._loss(settings), update)

    def check_step(
        self,
        batches: Sequence[PreferenceBatch],
        metrics: StepMetrics,
        settings: StageConfig,
        update: Update,
        dtype: Dtype,
        *,
        first: bool,
    ) -> None:
        loss = self._loss(settings)
        if first:
            guards.check_first_preference_step(batches, metrics, loss, dtype)
            guards.check_preference_gradient(metrics)
        # At every step: it costs no evaluation, because the step returns its log-probs.
        guards.check_preference_loss(batches, metrics, loss, update)

    def rewards(self, batches: Sequence[PreferenceBatch], metrics: StepMetrics, settings: StageConfig) -> Rewards:
        chosen, rejected = self._loss(settings).rewards(guards.pair_log_probs(batches, metrics))
        # Strictly greater below: a tie counts as not preferred, as in TRL.
        margins = chosen - rejected
        return Rewards(float(chosen.mean()), float(rejected.mean()), float(margins.mean()), float((margins > 0).mean()))

    def array_parts(self, batch: PreferenceBatch) -> Sequence[tuple[Int32, Int32]]:
        return (
            (batch.prompt, batch.prompt_lengths),
            (batch.chosen, batch.chosen_lengths),
            (batch.rejected, batch.rejected_lengths),
        )

    def tokens_read(self, batch: PreferenceBatch) -> int:
        # The prompt counts twice, once for each completion, also where a backend reads it only once.
        return int(2 * batch.prompt_lengths.sum() + batch.chosen_lengths.sum() + batch.rejected_lengths.sum())

    def sample_sequences(self, examples: Sequence[PreferenceExample], pad_id: int) -> TokenBatch:
        return pair_sequences(examples, pad_id)[0]

    def sample_prompt(self, example: PreferenceExample) -> Int32:
        return example.prompt

    def _loss(self, settings: StageConfig) -> PreferenceLoss:
        return _dpo_settings(settings).preference_loss()


OBJECTIVES: Mapping[StageName, Objective[Any, Any]] = {
    objective.name: objective for objective in (SftObjective(), DpoObjective())
}
"""Every objective by its stage's name, in the order in which a topic takes them."""

assert tuple(OBJECTIVES) == STAGES, "contract.StageName lists the same stages in the same order"


def pairs_digest(examples: Sequence[PreferenceExample]) -> str:
    """Digest the token ids of all pairs, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for part in (example.prompt, example.chosen, example.rejected):
            # Each part with its length: tokens that move from one part to the next are another digest.
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _dpo_settings(settings: StageConfig) -> DpoConfig:
    assert isinstance(settings, DpoConfig)
    return settings
