"""Measurements: quality, speed, scaling, operations, and ablations of the recipe."""
