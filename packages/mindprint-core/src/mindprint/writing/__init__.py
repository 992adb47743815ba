"""From a person's documents to rows: passages, prompts for them, and the base model's answers to these."""
