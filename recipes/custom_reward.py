"""Train on a custom reward, any function of the text; here: completions that mention the music.

    accelerate launch recipes/custom_reward.py

A reward function takes the keywords it names (prompts, completions, completion_ids, any column of
the dataset) and returns a number for each completion. `scores_prefixes` declares that the function
can score unfinished text as well and so serve as a critic: learning is several times faster with
it, and correct without it.
"""

import os
from pathlib import Path

from trpo_lm.cli import main, parse
from trpo_lm.config import TrainerConfig

DATA = Path(__file__).resolve().parent.parent / "data"


def run():
    (args,) = parse((TrainerConfig,), description=__doc__)
    if os.environ.get("RANK", "0") == "0":
        print("trpo_lm: loading torch and transformers ...", flush=True)
    from trpo_lm import TRPO, Trainer, scores_prefixes

    @scores_prefixes
    def mentions_music(completions):
        words = ("music", "score", "song", "soundtrack")
        return [float(any(w in text for w in words)) for text in completions]

    Trainer(
        model=str(DATA / "lm"),
        reward_funcs=mentions_music,
        train_dataset=str(DATA / "prompts_train.jsonl"),
        eval_dataset=str(DATA / "prompts_test.jsonl"),
        algorithm=TRPO(max_kl=0.05, max_ref_kl=2.0),
        args=args,
    ).train()


if __name__ == "__main__":
    main(run)
