"""Finds linears, and quantizes weights and activations."""
