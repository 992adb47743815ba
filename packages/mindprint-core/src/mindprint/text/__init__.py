"""Words, n-grams and near-duplicates: text without a model."""
