"""From a person's documents to the rows of a project: passages, prompts for them, and what the base would have said."""
