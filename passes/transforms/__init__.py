"""Scaling, transforms and adapters around quantized linears."""
