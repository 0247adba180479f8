"""A saved run opened again: evaluated, merged, looked at token by token.

Imports everything above it; of `training` only what reads a run's folder and puts its parts
together.
"""
