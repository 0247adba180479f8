"""The model card says how the adapter was made, and lets nothing through that it should not."""

import pytest
import yaml
from folders import write_run

from trpo_lm.report.model_card import model_card, summary
from trpo_lm.report.run_log import load_run
from trpo_lm.storage import append_json_line
from trpo_lm.training.metrics import metrics_row

FACTS = {"base_model": "org/tiny-lm", "command": "python recipes/sentiment.py"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def test_a_run_of_skipped_updates_has_a_card(tmp_path):
    row = {"update": 1, "skipped": "none", "completions": 4}
    append_json_line(tmp_path / "metrics.jsonl", metrics_row(row))
    assert summary(load_run(tmp_path)) == []
    assert "1 updates, of which 1 skipped" in model_card(tmp_path, FACTS)


def test_what_was_measured_once_did_not_change():
    rows = [
        {"objective/score_mean": s, "objective/eval_score_mean": e} for s, e in ((1, None), (2, 3))
    ]
    assert [name for name, *_ in summary(rows)] == ["mean score, training prompts"]
    assert summary(rows[:1]) == [("mean score, training prompts", 1.0, 1.0)]


def test_the_summary_goes_from_first_to_last(run):
    lines = {name: (first, last) for name, first, last in summary(load_run(run))}
    assert lines["mean score, training prompts"] == pytest.approx((0.56, 0.71))
    assert lines["KL to the reference, nats per completion"] == pytest.approx((0.0, 1.0))


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_tells_how_the_adapter_was_made(run):
    facts = FACTS | {
        "command": ["python", "a b.py", "--max_kl", "0.05"],
        "rewards": ["sentiment"],
        "data": "1,024 prompts",
        "seed": 7,
        "versions": {"torch": "2.13"},
        "settings": {"max_kl": 0.05, "lam": None, "cg_tolerance": 0.012345},
    }
    card = model_card(run, facts)
    assert front_matter(card)["library_name"] == "peft"
    assert front_matter(card)["base_model"] == "org/tiny-lm"
    assert "\npython 'a b.py' --max_kl 0.05\n" in card
    assert "](plots/overview.png)" in card
    assert "| mean score, training prompts | 0.56 | 0.71 |" in card
    assert "Largest KL of one update: 0.04 of 0.05 nats per completion allowed" in card
    for line in ("| seed | 7 |", "| torch | 2.13 |", "lam: null", "cg_tolerance: 0.012345"):
        assert f"\n{line}\n" in card
    assert "6 updates, of which 1 skipped and 1 rejected; 1,536 completions" in card


def test_the_card_shows_texts_of_models_without_obeying_them(run):
    sample = {
        "prompt": "<script>alert(1)</script> | `x`",
        "reference": "[click](https://evil.example) ![](x) **bold** _it_ www.evil.example",
        "policy": "\x1b[31m\n# heading\n---\n@someone #1 &lt;",
        "score_before": 0.1,
        "score_after": 0.9,
    }
    card = model_card(run, FACTS | {"samples": [sample], "rewards": ["a|b<c>"]})
    (line,) = [line for line in card.splitlines() if "alert" in line]
    assert line.count("|") == 6 and line.endswith("| 0.10 | 0.90 |")
    cells = line.replace("&#", "")  # the entities are what does the escaping
    assert not set("<>[]`*_!@#&:\x1b") & set(cells) and "www." not in cells
    assert "a&#124;b&#60;c&#62;" in card


def test_S07_the_card_holds_no_folders_of_the_machine_and_no_environment(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    facts = {
        "base_model": "/home/someone/models/tiny",
        "command": "/opt/venv/bin/python3.11 /clone/recipes/sentiment.py --output_dir=/given/a b "
        "--dataset '/home/someone/x y.jsonl' --updates 3",
        "data": "/home/someone/my data/prompts.jsonl",
        "settings": {
            "output_dir": "/home/someone/runs/a",
            "files": ["/home/someone/b"],
            "windows": "C:\\Users\\someone\\c",
            "home": "see ~/someone/d or file:///home/someone/e",
            "url": "https://example.org/x/y",
        },
    }
    card = model_card(run, facts)
    assert "someone" not in card and "hf_secret" not in card and str(run) not in card
    assert (
        "\npython recipes/sentiment.py --output_dir=path/to/a b --dataset 'path/to/x y.jsonl' "
        "--updates 3\n"
    ) in card
    assert 'from_pretrained("tiny")' in card and "base_model" not in front_matter(card)
    assert '\noutput_dir: "a"\nfiles: ["b"]\n' in card and "| data | prompts.jsonl |" in card
    assert "example.org/x/y" in card


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (
            "/v/bin/python /v/bin/trpo-lm sentiment --model /m/lm",
            "trpo-lm sentiment --model path/to/lm",
        ),
        ("python -m trpo_lm sentiment --model me/lm", "python -m trpo_lm sentiment --model me/lm"),
        ("C:/v/python.exe recipes/x.py --model C:/m/lm", "python recipes/x.py --model path/to/lm"),
        ("python x.py --servers http://a:1/v1", "python x.py --servers http://a:1/v1"),
    ],
)
def test_the_command_has_placeholders_for_paths_of_the_machine(run, command, shown):
    assert f"```bash\n{shown}\n```" in model_card(run, FACTS | {"command": command})


def test_settings_are_readable_and_cannot_leave_their_block(run):
    settings = {"adapter": {"r": 8, "modules": ["a", "b"]}, "note": "x\n```\n# y", "lam": None}
    card = model_card(run, FACTS | {"settings": settings})
    block = card.split("```yaml\n")[1].split("\n```")[0]
    assert block.splitlines()[0] == 'adapter: {"r": 8, "modules": ["a", "b"]}'
    read = yaml.safe_load(block)
    assert read["adapter"] == settings["adapter"] and read["lam"] is None
    assert len(block.splitlines()) == 3 and read["note"] == "x ``` # y"


def test_what_a_hub_reads_of_the_card(run, tmp_path):
    plain = front_matter(model_card(run, FACTS))
    assert plain["base_model_relation"] == "adapter" and plain["library_name"] == "peft"
    assert "datasets" not in plain and "model-index" not in plain
    row = metrics_row({"update": 1, "objective/eval_score_mean": 0.81234})
    append_json_line(tmp_path / "metrics.jsonl", row)
    front = front_matter(model_card(tmp_path, FACTS | {"dataset": "org/prompts", "name": "mine"}))
    assert front["datasets"] == ["org/prompts"]
    (result,) = front["model-index"][0]["results"]
    assert front["model-index"][0]["name"] == "mine"
    assert result["dataset"] == {"name": "org/prompts", "type": "org/prompts"}
    assert result["metrics"][0]["value"] == 0.8123


def test_a_local_folder_is_not_passed_off_as_a_hub_id(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny-lm").mkdir(parents=True)
    assert "base_model" not in front_matter(model_card(run, FACTS))
