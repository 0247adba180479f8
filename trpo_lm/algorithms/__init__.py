"""The update rules: how rewards become advantages, and how the policy moves.

Imports `core` and `lm`. An algorithm is a frozen dataclass whose fields are its hyperparameters;
its state goes in and comes back.
"""
