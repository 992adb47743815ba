"""The faults that plain nox leaves to `nox -s trust`."""

from __future__ import annotations

THOROUGH = frozenset(
    {
        "a bfloat16 merge is a little noisy",
        "a bfloat16 merge is cut",
        "a bias is zero",
        "a float16 merge is noisy",
        "a float32 merge went through bfloat16",
        "a normalizer is added",
        "a sliding window is added",
        "a token is added",
        "a token is no longer special",
        "alpha pattern is edited",
        "an earlier checkpoint is in its place",
        "an earlier checkpoint is there in float16",
        "answers of the merge end elsewhere",
        "changes of layers are exchanged",
        "dynamic rope is added",
        "factors are cut to bfloat16",
        "factors went through 8 bits",
        "heads are in another order",
        "noise is far below bfloat16",
        "one number of a bfloat16 merge is wrong",
        "rope scaling is added under its old name",
        "rows of the embedding are exchanged",
        "the base was cast down and up again",
        "the context is shorter",
        "the decoder is lost",
        "the merge has another context",
        "the merge has another decoder",
        "the merge has rope scaling",
    }
)
"""Names of faults. Each has a sibling of its kind in the rest."""
