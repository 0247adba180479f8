"""The mathematics: exact divergences, advantages, conjugate gradient, the step between two balls.

Imports torch and the settings of `config`; no language model, no rank, no device. Everything here
works on any torch model: `natural_step.trust_region_step` is the whole of it behind one function.
"""
