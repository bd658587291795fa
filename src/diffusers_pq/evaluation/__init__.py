"""Measuring reconstructions and generated pictures."""
