"""Finds loops, rolls them up, and stops them early."""
