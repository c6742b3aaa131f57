"""Benchmarks: a network under EleutherAI's lm-evaluation-harness (the extra `evaluate`)."""
