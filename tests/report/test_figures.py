"""Figures show what metrics.jsonl says, and the model card lets nothing through it should not."""

import csv
import subprocess
import sys

import pytest
import yaml

from trpo_lm.errors import TrpoLMError
from trpo_lm.report.figures import FIGURES, load_run, main, model_card, plot_run, summary
from trpo_lm.storage import append_json_line
from trpo_lm.training.metrics import metrics_row

FACTS = {"base_model": "org/tiny-lm", "command": "python recipes/sentiment.py"}


def write_run(folder, updates=6, config="max_kl: 0.05\nmax_ref_kl: 1.5\n", trpo=True):
    folder.mkdir(exist_ok=True)
    for update in range(1, updates + 1):
        row = {
            "update": update,
            "completions": 256 * update,
            "objective/score_mean": 0.53 + 0.03 * update,
            "objective/score_std": 0.25,
            "objective/ref_kl": 0.2 * (update - 1),
            "objective/entropy": 3.0,
            "objective/completion_length": 18.0,
            "objective/eos_rate": 0.8,
            "trust_region/kl": 0.04,
        }
        if trpo:
            row |= {
                "trust_region/predicted_kl": 0.041,
                "trust_region/predicted_gain": 0.06,
                "trust_region/actual_gain": 0.05,
                "trust_region/radius": 0.05 if update < 5 else 0.025,
                "line_search/trials": 1 + update % 3,
                "line_search/accepted": update != 3,
            }
        if update == 4:  # skipped: nothing about the step is known
            row = {"update": 4, "completions": 1024, "skipped": "zero advantage"}
        append_json_line(folder / "metrics.jsonl", metrics_row(row))
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_is_drawn_with_its_numbers_beside_it(run):
    written = plot_run(run)
    assert {path.name for path in written} == {f"{s}.{e}" for s in FIGURES for e in ("png", "csv")}
    assert all(path.parent == run / "plots" for path in written)
    rows = load_run(run)
    for stem, (_, columns) in FIGURES.items():
        assert (run / "plots" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        numbers = table(run / "plots" / f"{stem}.csv")
        assert len(numbers) == len(rows)
        for line, row in zip(numbers, rows, strict=True):
            for name in ["update", *columns]:
                assert line[name] == ("" if row[name] is None else str(row[name]))


def test_a_share_of_one_is_the_whole_trust_region(run):
    rows = load_run(run)
    assert rows[0]["kl_share"] == pytest.approx(0.8) and rows[3]["kl_share"] is None
    assert {row["max_ref_kl"] for row in rows} == {1.5}


def test_without_a_config_the_recorded_radius_is_the_limit(tmp_path):
    rows = load_run(write_run(tmp_path / "run", config=None))
    assert rows[0]["max_kl"] == 0.05 and rows[0]["max_ref_kl"] is None


@pytest.mark.filterwarnings("error")
def test_a_run_of_one_update_can_be_drawn(tmp_path):
    assert len(plot_run(write_run(tmp_path / "run", 1))) == 2 * len(FIGURES)


@pytest.mark.filterwarnings("error")
def test_a_ppo_run_has_no_prediction_to_draw(tmp_path):
    run = write_run(tmp_path / "run", config="clip: 0.2\n", trpo=False)
    written = {path.stem for path in plot_run(run, tmp_path / "elsewhere")}
    assert written == set(FIGURES) - {"prediction"}
    assert not (run / "plots").exists()


@pytest.mark.filterwarnings("error")
def test_a_run_of_skipped_updates_draws_nothing_and_fails_nowhere(tmp_path):
    append_json_line(
        tmp_path / "metrics.jsonl", metrics_row({"update": 1, "skipped": "none", "completions": 4})
    )
    assert plot_run(tmp_path) == []
    assert summary(load_run(tmp_path)) == []
    assert "1 updates, of which 1 skipped" in model_card(tmp_path, FACTS)


def test_a_folder_that_is_no_run_is_an_error_that_says_so(tmp_path, capsys):
    with pytest.raises(TrpoLMError, match=r"metrics\.jsonl"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(TrpoLMError, match="no update was recorded"):
        plot_run(tmp_path)
    write_run(tmp_path, 1, config="- a list\n")
    with pytest.raises(TrpoLMError, match="not a mapping"):
        plot_run(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: not YAML")


def test_the_scores_of_the_first_the_middle_and_the_last_update(tmp_path):
    run = write_run(tmp_path / "run")
    assert not any(path.stem == "scores" for path in plot_run(run))
    for update in range(1, 6):
        for i in range(8):  # update 5: seven ones and a zero; nothing is scored in update 2
            score = None if update == 2 else float(i < update + 2)
            append_json_line(run / "completions.jsonl", {"update": update, "score": score})
    assert {path.name for path in plot_run(run)} >= {"scores.png", "scores.csv"}
    rows = table(run / "plots" / "scores.csv")
    assert list(rows[0]) == ["from", "to", "update 1", "update 4", "update 5"]
    assert (float(rows[0]["from"]), float(rows[-1]["to"])) == (0, 1)
    for name, ones in (("update 1", 3), ("update 4", 6), ("update 5", 7)):
        assert [float(row[name]) for row in rows] == [1 - ones / 8, *[0] * 18, ones / 8]


def test_a_run_without_any_score_has_no_histogram(tmp_path):
    run = write_run(tmp_path / "run", 1)
    append_json_line(run / "completions.jsonl", {"update": 1, "score": None})
    assert not any(path.stem == "scores" for path in plot_run(run))


def test_the_command_line_redraws_a_run(run, tmp_path):
    command = [sys.executable, "-m", "trpo_lm.report", str(run), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(tmp_path / "overview.png") in done.stdout.splitlines()
    assert (tmp_path / "overview.csv").exists()


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
    for line in (
        "| seed | 7 |",
        "| torch | 2.13 |",
        "| lam | None |",
        "| cg_tolerance | 0.012345 |",
    ):
        assert line in card
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
        "command": "python x.py --output_dir /given/in/command",
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
    assert "/given/in/command" in card
    assert 'from_pretrained("tiny")' in card and "base_model" not in front_matter(card)
    assert "| output_dir | a |" in card and "| data | prompts.jsonl |" in card
    assert "example.org/x/y" in card


def test_a_local_folder_is_not_passed_off_as_a_hub_id(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny-lm").mkdir(parents=True)
    assert "base_model" not in front_matter(model_card(run, FACTS))


def test_figures_need_no_display_and_leave_no_global_state():
    code = (
        "import sys, trpo_lm.report.figures\n"
        "print({'matplotlib.pyplot', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
