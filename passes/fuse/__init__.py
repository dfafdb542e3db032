"""Fuses operators into those that kernels compute."""
