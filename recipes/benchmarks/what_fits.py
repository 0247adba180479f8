"""What runs of 0.5B, 1.5B and 7B chat models need on 24 and 80 GB: plans, as a Markdown table.

    python recipes/benchmarks/what_fits.py

Nothing is loaded: the models exist as configs (Qwen2.5's shapes) on torch's meta device.
"""

from __future__ import annotations

from dataclasses import dataclass

from trpo_lm.cli import main, parse
from trpo_lm.config import TrainerConfig, option

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
BASES = (("0.5B", False), ("1.5B", False), ("7B", False), ("7B", True))
HEADER = (
    "model", "tokens", "device", "weights", "adapters", "features", "rollout", "measurement",
    "gradient", "Fisher", "peak", "fits",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """The batch that the figures are for."""

    completions: int = option(64, "completions of a batch")
    prompt: int = option(128, "tokens of each prompt")


def run() -> None:
    """Plan every run and print the table."""
    (a,) = parse((Arguments,), description=__doc__)
    from transformers import Qwen2Config

    from trpo_lm.training.plan import make_plan

    print(" | ".join(HEADER).join(("| ", " |")))
    print("|" + "---|" * len(HEADER))
    for name, quantised in BASES:
        hidden, inner, layers, heads, kv, vocabulary, tied = SHAPES[name]
        config = Qwen2Config(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocabulary,
            tie_word_embeddings=tied, max_position_embeddings=32768,
        )  # fmt: skip
        for tokens in (512, 1024):
            args = TrainerConfig(
                prompts_per_update=a.completions,
                max_completion_length=tokens - a.prompt,
                load_in_4bit=quantised,
            )
            for memory in ("24GB", "80GB"):
                plan = make_plan(config, args, memory=memory, prompt_length=a.prompt)
                sizes = {row[0].split(",")[0]: row[1] for row in plan.as_table()[1:]}
                fits = "yes" if plan.fits else "no" if plan.advice is None else "no; it would with "
                cells = [
                    f"{name}, {plan.dtype}", f"{tokens:,}", memory,
                    *(sizes[column] for column in HEADER[3:9]),
                    f"{sizes['Fisher']}, {plan.product}",
                    f"{plan.peak / 2**30:.1f}, {plan.at}",
                    fits + (f"`{' '.join(plan.advice)}`" if plan.advice else ""),
                ]  # fmt: skip
                print(" | ".join(cells).join(("| ", " |")), flush=True)


if __name__ == "__main__":
    main(run)
