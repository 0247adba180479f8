"""The token MDP: a causal LM as a policy, rewards, critics, and batches of completions.

Imports transformers and peft and, of this package, `core`. Nothing here knows of an update rule, a
file of a run or another process: sums over processes come in as a function `reduce`.
"""
