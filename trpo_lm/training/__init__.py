"""Runs: the loop, several processes, checkpoints, the screen, and the folder a run leaves.

The only folder that imports accelerate. Imports everything above it.
"""
