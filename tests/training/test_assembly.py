"""What the trainer, a reopened run and TRL's arm share: parts, prompts, settings."""

import pytest
import runs
import tiny
import torch
import yaml

from trpo_lm import PPO, TRPO, TrainerConfig, TrpoLMError
from trpo_lm.config import Limits
from trpo_lm.lm.prompts import Prompts
from trpo_lm.training.assembly import (
    Data,
    assemble,
    fit_data,
    load_data,
    make_rewards,
    prompts_of_update,
)

CPU = torch.device("cpu")


def parts(reward=runs.score, tokenizer=None, **options):
    args = TrainerConfig(max_completion_length=5, **options)
    made = assemble(
        tiny.build(), make_rewards(reward, None, args, CPU), args,
        device=CPU, peft_config=tiny.lora(), tokenizer=tokenizer or tiny.tokenizer(),
    )  # fmt: skip
    return made, args


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("critic", ["auto", "prefix", "value_head", "none"])
def test_a_critic_reads_prefixes_where_its_name_says_so(critic, prefixes):
    def reward(completions):
        return runs.score(completions)

    reward.scores_prefixes = prefixes
    made, _ = parts(reward, critic=critic)
    assert made.critic.reads_prefixes == ("prefix" in made.critic.name)


def test_the_limits_of_the_algorithms():
    assert TRPO(max_kl=0.2, max_ref_kl=None).limits == Limits(0.2, None)
    assert TRPO(max_kl=0.2, max_ref_kl=1.0).limits == Limits(0.2, 1.0)
    assert PPO().limits == Limits(None, None)


def test_every_epoch_is_another_shuffle_of_all_prompts():
    args = TrainerConfig(prompts_per_update=3, seed=4)
    rows = [row for update in range(1, 8) for row in prompts_of_update(update, args, 7)]
    epochs = [rows[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompts_of_update(5, args, 7) == rows[12:15]


def test_of_the_held_out_prompts_the_first_are_kept_once_all_of_them_fit():
    made, args = parts(eval_prompts=2, truncate_prompts="left")
    notes, long = [], " ".join(["w1"] * 70)
    data = Data(Prompts(["w1", long], {}), Prompts(["w2"] * 3, {}))
    data = fit_data(data, made, args, notes.append)
    assert len(data.train) == 2 and data.held_out.prompts == ["w2"] * 2
    assert notes == ["1 prompts were truncated on the left to fit 59 tokens"]
    made, args = parts(eval_prompts=2)
    with pytest.raises(TrpoLMError, match="row 2"):
        fit_data(Data(data.train, Prompts(["w2", "w2", long], {})), made, args, notes.append)


def test_every_process_needs_a_prompt():
    args = TrainerConfig(prompts_per_update=2, eval_prompts=9)
    assert load_data(["w1"], ["w2"] * 2, "prompt", args, 2).held_out.prompts == ["w2"] * 2
    for held_out, processes, setting in ((["w2"], 2, "eval_prompts"), (None, 3, "prompts_per")):
        with pytest.raises(TrpoLMError, match=f"cannot be shared by {processes}.*{setting}"):
            load_data(["w1"], held_out, "prompt", args, processes)


def test_the_settings_of_a_run_in_the_order_of_its_file(tmp_path):
    made = runs.trainer(tmp_path, updates=1)
    made.train()
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings == made.archive.settings
    assert list(settings)[:10] == [
        "model", "adapter", "algorithm", "reward_funcs", "prompts", "dataset", "hub_dataset",
        "world_size", "reference", "reward_models",
    ]  # fmt: skip
    assert settings["adapter"]["r"] == 1 and settings["reward_models"] == [None]
    assert settings["max_kl"] == made.algorithm.max_kl and settings["updates"] == 1


def test_B15_template_arguments_are_used_or_answered_and_unused_columns_named():
    made, args = parts(chat_template_kwargs={"loud": True})
    made.tokenizer.chat_template = (
        "{% if loud is defined %}w7 {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    talk, notes = [{"role": "user", "content": "w1"}], []
    columns = {"tools": [None], "images": ["x"], "completions": [1]}
    fit_data(Data(Prompts([talk], columns)), made, args, notes.append)
    assert notes == ["columns of the dataset that no reward takes, not used: images, completions"]
    assert made.mdp.encode([talk])[0][:2] == [11, 5]  # w7 w1
    with pytest.raises(TrpoLMError, match=r"no prompt is a conversation .*chat_template_kwargs"):
        fit_data(Data(Prompts(["w1"], {})), made, args, print)


def test_B18_columns_that_no_other_process_can_compare_are_named_at_the_start():
    made, args = parts(lambda completions, **_: [0.0] * len(completions))
    held_out, notes = Prompts(["w1"], {"lambda": [print], "x": [lambda: 1]}), []
    fit_data(Data(Prompts(["w1"], {"thing": [object()]}), held_out), made, args, notes.append)
    assert any("will not notice if they changed: thing, x" in note for note in notes), notes


def test_B33_a_run_takes_the_folder_of_a_tokenizer(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    for given in (tmp_path, str(tmp_path)):
        made, _ = parts(tokenizer=given)
        assert made.mdp.encode(["w1"]) == [tiny.tokenizer()("w1").input_ids]
    with pytest.raises(TrpoLMError, match="is no tokenizer"):
        parts(tokenizer=object())


def test_a_reward_that_cannot_read_prefixes_is_no_critic():
    def needs(completions, completion_ids):
        return [0.0] * len(completions)

    def stateful(completions, trainer_state):
        return [0.0] * len(completions)

    def can(completions, completion_ids=None, trainer_state=None):
        return [0.0] * len(completions)

    for refused, argument in ((needs, "completion_ids"), (stateful, "trainer_state")):
        with pytest.raises(TrpoLMError, match=f"requires {argument}, which unfinished .*critic"):
            parts(refused, critic="prefix")
        parts(refused, critic="value_head")
        parts([refused, can], critic="prefix", reward_weights=[0.0, 1.0])
    parts(can, critic="prefix")
