"""Benchmarks of EleutherAI's lm-evaluation-harness (the extra `evaluate`)."""
