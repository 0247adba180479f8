"""One budgeted step on a small network of your own; loads torch alone, no transformers.

python recipes/any_torch_model.py
"""

import torch

from trpo_lm.config import TRPOSettings
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.core.natural_step import trust_region_step


def main():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    states, payoffs = torch.randn(256, 4), torch.randn(256, 3)  # 256 bandits of three arms
    reference = torch.full((256, 3), 1 / 3).log()
    old = network(states).log_softmax(-1).detach()

    update = trust_region_step(
        list(network.parameters()),
        surrogate=lambda: (network(states).softmax(-1) * payoffs).sum(-1).mean(),
        kl=lambda: categorical_kl(old=old, new=network(states).log_softmax(-1)).mean(),
        ref_kl=lambda: categorical_kl(old=network(states).log_softmax(-1), new=reference).mean(),
        settings=TRPOSettings(max_kl=0.01, max_ref_kl=0.03, damping=0.1),
    )
    trial = update.search.trial
    print(f"KL(old || new) {trial.kl:.4f} of 0.01, KL(new || reference) {trial.ref_kl:.4f} of 0.03")
    print(f"payoff {trial.gain:+.4f} (predicted {update.step.gain:+.4f}), case {update.step.case}")


if __name__ == "__main__":
    main()
