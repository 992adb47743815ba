"""The voice of a person, measured in text and in the answers of models."""
