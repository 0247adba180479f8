"""View one completion of a finished run, token by token.

    python recipes/token_view.py runs/sentiment
    python recipes/token_view.py runs/sentiment --row 7 --checkpoint best
    python recipes/token_view.py runs/sentiment --prompt "the director of this"

The recipe samples the completion and draws for each token the exact KL to the reference, the
log-probability under policy and reference, the critic's value and the advantage: as an HTML page
without scripts, a picture, and CSV.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trpo_lm.cli import main, parse
from trpo_lm.config import option
from trpo_lm.errors import TrpoLMError
from trpo_lm.storage import writable_folder


@dataclass(frozen=True)
class Arguments:
    """Which completion of which run."""

    run: str | None = option(None, "folder of a run")
    checkpoint: str = option("last", "'last', 'best', or the number of a checkpoint")
    prompt: str | None = option(None, "what to complete; default: a held-out prompt of the run")
    row: int = option(0, "which of the run's held-out prompts, from 0")
    reward_model: str | None = option(None, "folder or hub id; default: the run's own rewards")
    reward_function: str | None = option(
        None, "module:callable to import as the reward, where the run's was one; runs its code"
    )
    seed: int = option(0, "every random number derives from it")
    output: str | None = option(None, "folder for the files; default: RUN/token_view")


def run() -> None:
    """Parse, sample, measure, draw."""
    (a,) = parse((Arguments,), description=__doc__, positional=("run",))
    folder = None if a.output is None else writable_folder(Path(a.output).resolve())
    print(f"looking into {a.run}: loading torch and transformers ...", flush=True)

    from trpo_lm.analysis.saved_run import held_out_prompts, open_run
    from trpo_lm.analysis.token_view import draw_tokens, token_rows
    from trpo_lm.lm.prompts import Prompts
    from trpo_lm.lm.rewards import load_reward
    from trpo_lm.report.format import clean, conversation, number

    reward = a.reward_model if a.reward_function is None else load_reward(a.reward_function)
    opened = open_run(a.run, a.checkpoint, reward=reward)
    folder = folder or writable_folder(opened.folder / "token_view")
    if a.prompt is not None:
        prompts, name = Prompts([a.prompt], {}), "prompt"
    elif (held_out := held_out_prompts(opened)) is not None:
        if not 0 <= a.row < len(held_out):
            last = len(held_out) - 1
            raise TrpoLMError(f"row = {a.row}; there are rows 0 to {last}", where="row")
        prompts, name = Prompts(*held_out.take([a.row])), f"row-{a.row}"
    else:
        raise TrpoLMError(
            "the run had no held-out prompts", where=a.run, hint="give one with --prompt"
        )
    if opened.rewards is not None:
        opened.rewards.check_columns(prompts.columns)
    rollout = opened.mdp.rollout(
        opened.policy, prompts.prompts, columns=prompts.columns, seed=(a.seed, "token_view")
    )
    rows = token_rows(opened, rollout)
    scored = bool(rollout.scores.valid[0])
    score = f"score {number(float(rollout.scores.score[0]))}, " if scored else ""
    note = f"{score}KL to the reference {number(sum(r['kl'] for r in rows))} nats"
    note += f" in {len(rows)} tokens"
    print(f"{clean(conversation(rollout.prompts[0]))} |{clean(rollout.completions[0])}\n{note}")
    title = f"A completion of the {a.checkpoint} policy (update {opened.update})"
    stem = folder / name
    for path in draw_tokens(rows, stem, title=title, prompt=rollout.prompts[0], note=note):
        print(path)


if __name__ == "__main__":
    main(run)
