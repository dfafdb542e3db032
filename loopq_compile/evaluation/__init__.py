"""Measures of quality: perplexity, agreement with the full-precision model, and lm-eval's tasks."""
