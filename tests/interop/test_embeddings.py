"""The embeddings scorer on real sentence-transformers models, small enough to know every vector of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mindprint.errors import ConfigError, ScorerError
from mindprint.plugins.scoring import load_scorers
from mindprint.voice.embeddings import mindprint_scorers
from mindprint.voice.scoring import VoiceReference, VoiceScore, fit_scorer

WORDS = ("unknown", "aye", "yes", "tide")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder in which each word is a unit vector of its own, and a text the mean of its words."""
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = np.eye(len(WORDS), dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)]).save(str(tmp_path / "one-hot"))
    return str(tmp_path / "one-hot")


def test_the_decision_is_the_difference_of_two_cosines(model: str) -> None:
    """The person says `aye`, others `yes`: centres (aye, 0) and (0, yes). `aye yes` lies between, `tide` nowhere."""
    (measure,) = mindprint_scorers({"model": model})
    assert measure.name == "embeddings (one-hot)"
    decide = measure.fit(["aye", "aye aye"], ["yes"])
    np.testing.assert_allclose(
        decide(["aye", "yes", "aye yes", "tide", "aye tide"]), [1, -1, 0, 0, 0.5**0.5], atol=1e-6
    )


def test_it_stands_beside_the_score_and_is_not_averaged_in(model: str) -> None:
    her = [f"aye aye tide number {n} and so we wait for it, never you mind the other one" for n in range(60)]
    others = [f"yes the tide is number {n} which is because of the moon that visitors ask about" for n in range(60)]
    reference = VoiceReference(tuple(her[:40]), tuple(others[:40]))

    def scored(extra: bool) -> VoiceScore:
        scorer = fit_scorer(reference, extra=load_scorers({"embeddings": {"model": model}}) if extra else ())
        score = scorer.calibrated(floor=others[40:], ceiling=her[40:]).score(her[40:])
        assert isinstance(score, VoiceScore)
        return score

    with_it, without = scored(True), scored(False)
    assert with_it.value == without.value
    assert with_it.measures["embeddings (one-hot)"] == pytest.approx(1)
    assert "embeddings (one-hot)" not in without.measures


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"voice\.scorers\.embeddings\.model: Field required"):
        load_scorers({"embeddings": {}})
    (tmp_path / "empty").mkdir()
    (measure,) = load_scorers({"embeddings": {"model": str(tmp_path / "empty")}})
    with pytest.raises(ScorerError, match="scorer 'embeddings': '.*empty' cannot be loaded"):
        measure.fit(["aye"], ["yes"])
