"""Benchmarks of drawing from text: GenEval and DPG-Bench, from prompts to scores."""
