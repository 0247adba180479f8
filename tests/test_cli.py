"""The command line: cases C01-C05, S02, S07 and the exit codes of section 2."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import trpo_lm
from trpo_lm.cli import command_line, main, parse
from trpo_lm.config import PPOSettings, TrainerConfig, TRPOSettings, option
from trpo_lm.errors import Interrupted, RunFault, TrpoLMError


@dataclass(frozen=True)
class Arguments:
    """What this recipe takes."""

    model: str = option("tiny", "name of a model, 100% local")
    tags: list[str] | None = field(default=None, metadata={"help": "labels"})


def read(*words, file=None, classes=(Arguments, TRPOSettings, TrainerConfig)):
    return parse(classes, [*words, *(["--config", str(file)] if file else [])])


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


# ---------------------------------------------------------------- what is accepted


def test_flags_become_settings():
    arguments, trpo, trainer = read(
        "--model", "gpt2", "--max_kl", "1e-2", "--max-ref-kl=none", "--load-in-4bit",
        "--gradient_checkpointing", "false", "--tags", "a", "b", "--reward_weights", "1", "-5e-1",
    )  # fmt: skip
    assert arguments == Arguments("gpt2", ["a", "b"])
    assert trpo == TRPOSettings(max_kl=0.01, max_ref_kl=None)
    assert trainer == TrainerConfig(load_in_4bit=True, reward_weights=[1.0, -0.5])


@pytest.mark.parametrize(
    "text", ['{"enable_thinking": false, "n": [1]}', "{enable_thinking: false, n: [1]}"]
)
def test_a_mapping_is_json_or_yaml(yaml_file, text):
    wanted = {"enable_thinking": False, "n": [1]}
    block = "chat_template_kwargs:\n  enable_thinking: false\n  n: [1]\n"
    for found in (
        read("--chat_template_kwargs", text),
        read(file=yaml_file(f"chat_template_kwargs: {text}\n")),
        read(file=yaml_file(block)),
    ):
        assert found[2].chat_template_kwargs == wanted
    assert read("--chat_template_kwargs", "none")[2].chat_template_kwargs is None
    for wrong in ("true", "[1]", "{", "{1: 2}"):
        with pytest.raises(TrpoLMError, match="chat_template_kwargs"):
            read("--chat_template_kwargs", wrong)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(yaml_file):
    file = yaml_file(
        "max_kl: 1e-3\nlam: 1\nupdates: 7\nrun_name: 'no'\nload_in_8bit: yes\n"
        "reward_weights: [1, -2e-1]\nmax_ref_kl: null\nseed: 010\n"
    )
    _, trpo, trainer = read("--updates", "9", file=file)
    assert (trpo.max_kl, trpo.lam, trpo.max_ref_kl) == (0.001, 1.0, None)
    assert isinstance(trpo.lam, float)
    assert (trainer.updates, trainer.run_name, trainer.seed) == (9, "no", 10)
    assert trainer.load_in_8bit is True
    assert trainer.reward_weights == [1.0, -0.2]
    assert trainer.save_steps == TrainerConfig().save_steps


def test_classes_with_a_field_of_the_same_name_share_a_flag():
    @dataclass(frozen=True)
    class Other:
        """Another update rule."""

        gamma: float = option(1.0, "discount")

    trpo, other = read("--gamma", "0.5", classes=(TRPOSettings, Other))
    assert trpo.gamma == other.gamma == 0.5


def test_words_before_the_flags_are_the_positional_settings(capsys):
    def read(*words):
        return parse((Arguments, TRPOSettings), words, positional=("model", "tags"))[0]

    assert read("a", "b", "--max_kl", "1") == read("a", "--tags", "b") == Arguments("a", ["b"])
    assert read("--model", "a", "--tags", "b", "c") == Arguments("a", ["b", "c"])
    with pytest.raises(TrpoLMError, match="TAGS is missing"):
        read("a")
    with pytest.raises(TrpoLMError, match="unexpected argument 'c'"):
        read("a", "b", "c")
    with pytest.raises(SystemExit):
        read("--help")
    assert " MODEL TAGS [--config" in capsys.readouterr().out


def test_help_answers_at_once_and_without_torch(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import atexit, sys\n"
        "from trpo_lm.cli import main, parse\n"
        "from trpo_lm.config import TrainerConfig, TRPOSettings\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "main(lambda: print(parse((TRPOSettings, TrainerConfig), description='Trains a model.')))\n"
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, recipe, "--help"], capture_output=True, text=True, cwd=trpo_root()
    )
    spent = os.times()  # processor time: the machine may be busy with something else
    spent = spent.children_user + spent.children_system
    assert spent - before.children_user - before.children_system < 1
    assert done.returncode == 0
    assert done.stderr.strip() == "False"
    assert "Trains a model." in done.stdout
    assert re.search(
        r"--max_kl FLOAT\s+trust region:.*\n.*nats per completion \[0\.1\]", done.stdout
    )
    assert "--load_in_4bit true|false" in done.stdout


def trpo_root():
    return Path(trpo_lm.__file__).parent.parent


def test_help_survives_percent_signs(capsys):
    with pytest.raises(SystemExit) as leave:
        read("--help")
    assert leave.value.code == 0
    assert "100% local [tiny]" in capsys.readouterr().out


# ---------------------------------------------------------------- what is refused


def test_C01_unknown_setting_names_its_place_and_the_nearest_name(yaml_file):
    file = yaml_file("seed: 1\nmax_k1: 0.05\n")
    with pytest.raises(TrpoLMError) as error:
        read(file=file)
    assert error.value.what == "unknown setting 'max_k1'; did you mean max_kl?"
    assert error.value.where == f"{file}, line 2"
    with pytest.raises(TrpoLMError) as error:
        read("--max_k1", "0.05")
    assert error.value.what == "unknown setting 'max_k1'; did you mean max_kl?"
    assert error.value.where == "command line"


@pytest.mark.parametrize(
    ("name", "value", "use"),
    [
        ("bf16", "true", "--dtype bfloat16"),
        ("num_generations", "8", "use completions_per_prompt"),
        ("max_steps", "100", "use updates"),
        ("beta", "0.04", "max_ref_kl"),
        ("learning-rate", "1e-6", "max_kl"),
        ("use_vllm", "true", "use rollout_servers"),
        ("per_device_train_batch_size", "8", "prompts_per_update"),
        ("max_new_tokens", "64", "use max_completion_length"),
    ],
)
def test_C01_a_name_of_another_library_is_answered_with_the_one_to_use(yaml_file, name, value, use):
    file = yaml_file(f"seed: 1\n{name}: {value}\n")
    for words, where in ((["--" + name, value], "command line"), ([], f"{file}, line 2")):
        with pytest.raises(
            TrpoLMError, match=f"unknown setting '{name.replace('-', '.')}'"
        ) as error:
            read(*words, file=None if words else file)
        assert use in error.value.what and error.value.where == where


def test_settings_of_the_other_algorithms_keep_their_names():
    (ppo,) = parse((PPOSettings,), ["--beta", "0.2", "--learning_rate", "0.1"])
    assert (ppo.beta, ppo.learning_rate) == (0.2, 0.1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("updates: 3.7", "updates must be a whole number, not 3.7"),
        ("updates: [1,2]", "updates must be a whole number, not [1,2]"),
        ("updates: null", "updates must be a whole number, not null"),
        ("updates:", "updates must be a whole number, not nothing"),
        ("updates: {a: 1}", "updates must be a whole number, not {a: 1}"),
        ("updates: 1:30", "updates must be a whole number, not 1:30"),
        ("updates: true", "updates must be a whole number, not true"),
        ("max_kl: abc", "max_kl must be a number, not abc"),
        ("max_kl: !!python/name:os.system", "max_kl must be a number, not !!python/name:os.system"),
        ("max_kl: true", "max_kl must be a number, not true"),
        ("load_in_4bit: 1", "load_in_4bit must be true or false, not 1"),
        ("run_name: no", "run_name must be text, or none, not no (YAML reads it as something else"),
        ("output_dir: null", "output_dir must be text, not null"),
        ("output_dir: 2026-01-01", "output_dir must be text, not 2026-01-01 (YAML reads it as"),
        ("reward_weights: 1", "reward_weights must be a list of numbers, or none, not 1"),
        ("reward_weights: [1, [2]]", "reward_weights must be a list of numbers, or none, not [1,"),
        (
            "reward_weights: &a [*a]",
            "reward_weights must be a list of numbers, or none, not &a [*a]",
        ),
        ("seed: 1\n# x\nseed: 2", "seed is set twice, first in line 2 ("),
        ("<<: {seed: 1}", "unknown setting '<<'"),
        ("[1]: 2", "unknown setting '[1]'"),
    ],
)
def test_C02_wrong_type_names_key_type_and_line(yaml_file, text, what):
    file = yaml_file("# settings\n" + text + "\n")
    with pytest.raises(TrpoLMError) as error:
        read(file=file)
    assert what in str(error.value)
    assert f"{file}, line {4 if 'twice' in what else 2}" in str(error.value)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--updates", "3.7"], "updates must be a whole number, not 3.7"),
        (["--updates"], "updates must be a whole number, not nothing"),
        (["--updates", "3", "4"], "updates must be a whole number, not 3 4"),
        (["--max_kl", "none"], "max_kl must be a number, not none"),
        (["--load_in_4bit", "maybe"], "load_in_4bit must be true or false, not maybe"),
        (["--reward_weights"], "reward_weights must be a list of numbers, or none, not nothing"),
        (["word", "--seed", "1"], "unexpected argument 'word'"),
        (["--seed", "1", "-rf"], "seed must be a whole number, not 1 -rf"),
        (["--max_kl", "nan"], "max_kl = nan is not allowed: it must be a number above 0"),
        (["--max", "0.1"], "unknown setting 'max'"),  # no abbreviations
    ],
)
def test_C02_wrong_type_on_the_command_line(words, what):
    with pytest.raises(TrpoLMError) as error:
        read(*words)
    assert error.value.what.startswith(what)
    assert "command line" in str(error.value.where)


def test_C02_every_mistake_is_told_at_once(yaml_file):
    file = yaml_file("max_k1: 0.1\nupdates: 3.7\ngamma: 7\nseed: 1\nseed: 2\n")
    with pytest.raises(TrpoLMError) as error:
        read("--micro_batch_tokens", "0", "--load_in_4bit", "maybe", file=file)
    text = str(error.value)
    for part in (
        "6 settings are wrong",
        f"unknown setting 'max_k1'; did you mean max_kl? ({file}, line 1)",
        f"updates must be a whole number, not 3.7 ({file}, line 2)",
        f"it must be in (0, 1] (gamma: {file}, line 3)",
        f"seed is set twice, first in line 4 ({file}, line 5)",
        "at least 1 (micro_batch_tokens: command line)",
        "load_in_4bit must be true or false, not maybe (command line)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- 1\n- 2\n", "is not a mapping"),
        (b"just words", "is not a mapping"),
        (b"\x7fELF\x00\xff\xfe", "is not YAML text"),
        (b"a: \x00", "is not YAML text"),
        (b"a: [1\nb: 2\n", "is not valid YAML"),
        (b"a: *b\n", "is not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
        (b"[" * 1000, "is not"),
    ],
)
def test_C03_unreadable_settings_file(tmp_path, content, what):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TrpoLMError, match=what):
        read(file=file)


def test_C03_dangling_config_or_a_folder(tmp_path):
    for words in (["--config"], ["--config", "a", "b"], ["--config", str(tmp_path)]):
        with pytest.raises(TrpoLMError, match=r"--config"):
            read(*words)


def test_C05_env_block_is_an_unknown_key(yaml_file):
    with pytest.raises(TrpoLMError, match="unknown setting 'env'"):
        read(file=yaml_file("env:\n  LD_PRELOAD: x.so\n"))
    assert "LD_PRELOAD" not in os.environ


# ---------------------------------------------------------------- exit codes


def leave(run, **options):
    with pytest.raises(SystemExit) as exit:
        main(run, **options)
    return exit.value.code


def raiser(error):
    def run():
        raise error

    return run


def test_main_tells_errors_in_two_lines(capsys):
    error = TrpoLMError("max_kl = 0 is not allowed", where="command line", hint="try 0.05")
    assert leave(raiser(error), debug=False) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: max_kl = 0 is not allowed (command line)\nhint: try 0.05\n"
    assert printed.out == ""
    assert leave(raiser(RunFault("disk full")), debug=False) == 3
    assert capsys.readouterr().err == "error: disk full\n"


def test_main_shows_the_traceback_when_asked(capsys, monkeypatch):
    assert leave(raiser(RunFault("disk full")), debug=True) == 3
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--debug"])
    assert leave(raiser(RunFault("disk full"))) == 3
    assert "Traceback" in capsys.readouterr().err


def test_main_exit_codes_of_signals_and_success(capsys):
    assert leave(lambda: None, debug=False) == 0
    assert leave(raiser(KeyboardInterrupt()), debug=False) == 130
    assert leave(raiser(Interrupted("saved checkpoint-12", signum=2)), debug=False) == 130
    assert leave(raiser(Interrupted("saved checkpoint-12", signum=15)), debug=False) == 143
    assert "saved checkpoint-12\n" in capsys.readouterr().err


def test_main_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        main(lambda: print(1 / 0), debug=False)


# ---------------------------------------------------------------- security


@pytest.mark.parametrize(
    "banned", ["torch.load", "pickle", r"\beval\(", "exec(", "shell=True", "yaml.load("]
)
def test_S02_nothing_in_the_package_can_run_data_as_code(banned):
    pattern = re.compile(banned if banned.startswith("\\") else re.escape(banned))
    for file in Path(trpo_lm.__file__).parent.rglob("*.py"):
        text = re.sub(r"\.eval\(\)", "", file.read_text())  # torch.nn.Module.eval()
        assert not pattern.search(text), f"{banned} in {file.name}"


def test_S07_command_line_masks_secrets(monkeypatch):
    words = [
        *("python", "run.py", "--hub_token", "abc", "--api-key=def", "HF_TOKEN=ghi"),
        *("--x", "hf_0123456789ab", "--url", "https://me:pass@host/x", "--max_tokens", "5"),
        *("--tokenizer", "t", "--note", "two words", "--password", "--seed", "1"),
    ]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert command_line() == (
        "python run.py --hub_token '***' '--api-key=***' 'HF_TOKEN=***' --x '***' "
        "--url 'https://***@host/x' --max_tokens 5 --tokenizer t --note 'two words' "
        "--password --seed 1"
    )
