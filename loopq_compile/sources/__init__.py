"""Models, tokenizers and calibration text, by name or path."""
