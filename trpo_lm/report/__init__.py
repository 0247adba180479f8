"""Figures, statistics and the model card of a run, from its files.

Imports numpy and matplotlib, no torch, and of this package only the modules outside the folders: an
old run can be redrawn without its model.
"""
