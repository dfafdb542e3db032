"""Learns scales, transforms, adapters and rounding from calibration data."""
