"""Options that several commands have, so that they read alike everywhere."""

from __future__ import annotations

import click

backend_option = click.option("--backend", help="auto, torch, mlx, ...; default: the run's.")
device_option = click.option("--device", help="auto, cpu, cuda, mps, metal; default: the run's.")
model_option = click.option("--model", help="Where the base model is, if not where the run or the adapter says.")

max_new_tokens_option = click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Longest answer; default: the run's setting."
)
temperature_option = click.option(
    "--temperature", type=click.FloatRange(min=0), help="0 is greedy; default: the run's setting."
)
top_p_option = click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Nucleus sampling; likewise."
)
top_k_option = click.option(
    "--top-k", type=click.IntRange(min=0), help="Draw from this many tokens; 0 is all; likewise."
)
min_p_option = click.option(
    "--min-p", type=click.FloatRange(min=0, max=1, max_open=True), help="Least relative probability; likewise."
)
repetition_penalty_option = click.option(
    "--repetition-penalty", type=click.FloatRange(min=1, max=10), help="1 changes nothing; likewise."
)
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
