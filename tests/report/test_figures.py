"""Figures show the numbers of metrics.jsonl, and those beside them in CSV."""

import subprocess
import sys

import pytest
from folders import table, write_run

from trpo_lm.errors import TrpoLMError
from trpo_lm.report.figures import FIGURES, main, plot_run
from trpo_lm.report.run_log import load_run
from trpo_lm.storage import append_json_line
from trpo_lm.training.metrics import metrics_row


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def test_every_figure_is_drawn_with_its_numbers_beside_it(run):
    files = plot_run(run)
    assert {path.name for path in files} == {f"{s}.{e}" for s in FIGURES for e in ("png", "csv")}
    assert all(path.parent == run / "plots" for path in files)
    rows = load_run(run)
    for stem, (_, columns) in FIGURES.items():
        assert (run / "plots" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        numbers = table(run / "plots" / f"{stem}.csv")
        assert len(numbers) == len(rows)
        for line, row in zip(numbers, rows, strict=True):
            for name in ["update", *columns]:
                assert line[name] == ("" if row[name] is None else str(row[name]))


@pytest.mark.filterwarnings("error")
def test_a_run_of_one_update_can_be_drawn(tmp_path):
    assert len(plot_run(write_run(tmp_path / "run", 1))) == 2 * len(FIGURES)


@pytest.mark.filterwarnings("error")
def test_a_ppo_run_has_no_prediction_to_draw(tmp_path):
    run = write_run(tmp_path / "run", config="clip: 0.2\n", trpo=False)
    files = {path.stem for path in plot_run(run, tmp_path / "elsewhere")}
    assert files == set(FIGURES) - {"prediction"}
    assert not (run / "plots").exists()


@pytest.mark.filterwarnings("error")
def test_a_run_of_skipped_updates_draws_nothing_and_fails_nowhere(tmp_path):
    row = {"update": 1, "skipped": "none", "completions": 4}
    append_json_line(tmp_path / "metrics.jsonl", metrics_row(row))
    assert plot_run(tmp_path) == []


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


def test_figures_need_no_display_and_leave_no_global_state():
    code = (
        "import sys, trpo_lm.report.figures, trpo_lm.report.model_card\n"
        "print({'matplotlib.pyplot', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
