"""A scorer of text embeddings, from the extra `mindprint-core[embeddings]`: LUAR, StyleDistance, or another.

    voice:
      scorers:
        embeddings: {model: StyleDistance/styledistance}

LUAR (Rivera-Soto et al. 2021) and StyleDistance (Patel et al. 2025) are trained so that texts of one writer, or of one
style, lie close together whatever they are about. sentence-transformers loads them, from the hub or from a folder, and
is imported only when a voice is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mindprint.contract import Fitted, Float64, Measure
from mindprint.errors import ConfigError, ScorerError, first_line
from mindprint.hookspecs import hookimpl


class EmbeddingsConfig(BaseModel):
    """Settings under `voice.scorers.embeddings`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1)
    revision: str | None = None
    device: str = "cpu"
    batch_size: Annotated[int, Field(gt=0)] = 32
    trust_remote_code: bool = False


class Encoder(Protocol):
    """The method of `sentence_transformers.SentenceTransformer` that is used."""

    def encode(self, sentences: list[str], **options: Any) -> Any:
        """Return float32 `[texts, features]`."""


@dataclass(frozen=True)
class Embeddings:
    """The cosine with the centre of the person's texts, less the cosine with the background's centre.

    `model` is a hub name or a folder.
    """

    config: EmbeddingsConfig

    @property
    def name(self) -> str:
        """Return the measure's name, which names the model."""
        return f"embeddings ({Path(self.config.model).name})"

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:
        """Compute the centres of both sides. Raises `ScorerError` if the model cannot be loaded."""
        # The mean of unit vectors is short where texts differ widely. At length 1 both centres have the same weight.
        centres = [self._unit(self._embedded(side).mean(axis=0, keepdims=True))[0] for side in (own, background)]
        # The product is linear: one product with the difference is the difference of the two cosines.
        towards = centres[0] - centres[1]

        def decide(texts: Sequence[str]) -> Float64:
            decided: Float64 = self._embedded(texts) @ towards
            return decided

        return decide

    def _embedded(self, texts: Sequence[str]) -> Float64:
        """Return unit vectors, float64 `[texts, features]`."""
        made = self._encoder.encode(
            list(texts), batch_size=self.config.batch_size, convert_to_numpy=True, show_progress_bar=False
        )
        return self._unit(np.asarray(made, dtype=np.float64))

    @staticmethod
    def _unit(vectors: Float64) -> Float64:
        # A vector of zeros must stay one: dividing by its length would give NaN.
        unit: Float64 = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return unit

    @cached_property
    def _encoder(self) -> Encoder:
        # The measure is fitted once for each fold and once on all texts, so the model is kept after its first use.
        try:
            library: Any = import_module("sentence_transformers")
        except (ImportError, SystemExit) as error:
            raise ScorerError(
                "scorer 'embeddings' needs sentence-transformers: pip install 'mindprint-core[embeddings]', or remove "
                "it from voice.scorers"
            ) from error
        config = self.config
        try:
            loaded: Encoder = library.SentenceTransformer(
                config.model,
                revision=config.revision,
                device=config.device,
                trust_remote_code=config.trust_remote_code,
            )
        except Exception as error:  # a hub or a model's own code can raise anything
            reason = first_line(error)
            raise ScorerError(f"scorer 'embeddings': {config.model!r} cannot be loaded: {reason}") from error
        return loaded


@hookimpl
def mindprint_scorers(settings: dict[str, object]) -> Sequence[Measure]:
    """Return the measure of the embedding model that the settings name."""
    try:
        config = EmbeddingsConfig.model_validate(settings)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(["voice.scorers.embeddings", *(str(part) for part in problem["loc"])])
        raise ConfigError(f"{where}: {problem['msg']}") from error
    return [Embeddings(config)]
