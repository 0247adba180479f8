"""Runs: the loop, several processes, checkpoints, console output, and the output folder.

The only folder that imports accelerate. Imports everything above it.
"""
