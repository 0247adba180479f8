"""The theory behind trpo_lm, checked by exact sums, without sampling.

    python recipes/theory.py          from the project's root; about ten seconds on a CPU

A tiny GPT-2 with LoRA, four words and at most four steps has 242 completions of two prompts, so
every expectation is a finite sum and each statement below is an equation with two sides to compute,
in float64. Every line has a quantity, its value, and the range in which the statement holds. The
sums are in statements/enumerable.py, the statements (with their sources) in identities.py and
updates.py beside it; tests/test_theory.py asserts the same lines.

    1  Q, V, A and GAE                       identities.statement_1
    2  performance difference                identities.statement_2
    3  L_pi: the states of the old policy    identities.statement_3
    4  the lower bound, and how loose it is  identities.statement_4
    5  importance sampling                   identities.statement_5
    6  first and second order models         updates.statement_6
    7  the step in closed form, two balls    updates.statement_7
    8  TRPO, vanilla gradient, PPO's clip    updates.statement_8
    9  the budget and the tilted optimum     updates.statement_9
    10 the KL of whole completions           identities.statement_10
    11 variance and bias, any critic         identities.statement_11
"""

print("writing out a token MDP with a tiny transformer in it ...", flush=True)

import torch
from statements.enumerable import build
from statements.identities import (
    statement_1,
    statement_2,
    statement_3,
    statement_4,
    statement_5,
    statement_10,
    statement_11,
)
from statements.updates import statement_6, statement_7, statement_8, statement_9


def main() -> int:
    torch.set_num_threads(1)  # tensors this small are slower on more
    tree, small = build(), build(steps=3)
    print(
        f"{len(tree.states)} states, {len(tree.completions)} completions, {tree.V} words, ", end=""
    )
    print(f"{len(tree.policy.parameters)} LoRA parameters\n")
    failed = 0
    for number, statement, argument in (
        (1, statement_1, {"tree": tree}),
        (2, statement_2, {"tree": tree}),
        (3, statement_3, {"tree": tree}),
        (4, statement_4, {"tree": tree}),
        (5, statement_5, {"tree": tree}),
        (6, statement_6, {"tree": tree}),
        (7, statement_7, {"tree": tree}),
        (8, statement_8, {"tree": small, "starts": 3}),  # the tests use 20
        (9, statement_9, {}),
        (10, statement_10, {"tree": tree}),
        (11, statement_11, {"tree": small}),
    ):
        print(f"{number}. {statement.__doc__.splitlines()[0]}", flush=True)
        lines = statement(**argument)
        print(*lines, "", sep="\n", flush=True)
        failed += sum(not line.holds for line in lines)
    print("every statement holds" if not failed else f"{failed} lines FAIL")
    return failed


if __name__ == "__main__":
    raise SystemExit(bool(main()))
