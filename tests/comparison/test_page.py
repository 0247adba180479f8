"""The page of a comparison and its figures."""

import csv
import json

import pytest
from folders import table, write_comparison

from trpo_lm.comparison import page
from trpo_lm.comparison.page import main as draw
from trpo_lm.comparison.page import write_page
from trpo_lm.comparison.results import load_comparison, outcomes


def test_the_page_is_self_contained_and_nothing_in_it_runs(tmp_path):
    page = write_page(write_comparison(tmp_path / "c")).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5
    assert "<script" not in page and "<img src=http" not in page and "\x1b" not in page
    assert 'src="http' not in page and "href=" not in page and "url(" not in page
    assert "&lt;script&gt;" in page and "trpo max_ref_kl=1" in page
    for stem in ("frontier", "trust_region", "score", "prediction", "radar"):
        assert (tmp_path / "c/figures" / f"{stem}.png").stat().st_size > 10_000
        with open(tmp_path / "c/figures" / f"{stem}.csv", newline="") as file:
            header, *rows = csv.reader(file)
            assert rows and all(len(row) == len(header) for row in rows)
    assert len(table(tmp_path / "c/results.csv")) == 6


def test_a_comparison_of_many_arms_without_any_trust_region(tmp_path):
    arms = [f"ppo learning_rate={lr}" for lr in ("1e-4", "3e-4", "1e-3", "3e-3")]
    arms += [f"grpo learning_rate={lr}" for lr in ("1e-4", "3e-4", "1e-3", "3e-3")]
    folder = write_comparison(tmp_path / "c", arms, seeds=1, updates=5)
    page = write_page(folder).read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4  # nothing was predicted
    assert [arm.name for arm in load_comparison(folder).arms][:2] == arms[:2]


def test_a_run_that_blew_up_is_a_result(tmp_path):
    folder = write_comparison(tmp_path / "c", seeds=2)
    file = folder / "runs/ppo_beta=0.3/seed-0/result.json"
    result = json.loads(file.read_text())
    del result["held_out"], result["samples"]
    file.write_text(json.dumps(result | {"fault": "non-finite logits"}))
    (file.parent / "metrics.jsonl").unlink()  # in its first update
    assert "non-finite logits" in write_page(folder).read_text()
    assert outcomes(load_comparison(folder)) == [
        ["trpo", 2, "100%", "0%"],
        ["ppo", 4, "75% *", "25%"],
    ]


def test_a_sample_without_a_score_is_shown_without_one(tmp_path):
    folder = write_comparison(tmp_path / "c", ["trpo max_ref_kl=1"], seeds=1)
    file = folder / "runs/trpo_max_ref_kl=1/seed-0/result.json"
    result = json.loads(file.read_text())
    result["samples"][0] |= {"completion": "not scored", "score": None}
    file.write_text(json.dumps(result))
    assert "not scored</td><td>-</td>" in write_page(folder).read_text()


def test_the_page_leads_with_the_best_of_all_other_arms(tmp_path):
    folder = write_comparison(tmp_path / "c", ("trpo max_ref_kl=1", "ppo beta=0.1", "grpo"))
    file = folder / "runs/grpo/seed-0/metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["objective/score_mean"] += 0.2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_page(folder).read_text()
    first, every = page.split("<details>")[0], page.split("<details>")[1].split("</details>")[0]
    assert "trpo minus the best competing arm" in first
    assert "grpo" in first.split(">best competing arm<")[1]
    assert "ppo beta=0.1" not in first.split(">best competing arm<")[1].split("</table>")[0]
    assert "ppo beta=0.1" in every and "grpo" in every


@pytest.mark.parametrize("name", ["comparison.html", "figures", "frontier.png"])
def test_B59_a_comparison_tries_its_outputs_before_it_draws(tmp_path, monkeypatch, capsys, name):
    folder = write_comparison(tmp_path / "c")
    (tmp_path / "elsewhere").mkdir()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(page, "save_figure", lambda *_: pytest.fail("it draws"))
    monkeypatch.setattr(page, "save_png", lambda *_: pytest.fail("it draws"))
    options = ["--frontier", str(folder / name)] if name == "frontier.png" else []
    assert draw([str(folder), *options]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_frontier_alone_has_few_arms(tmp_path):
    arms = [f"trpo max_ref_kl={k}" for k in (0.5, 1, 2)]
    arms += [f"{a} beta={b}" for a in ("ppo", "trl-rloo") for b in (0.1, 0.2, 0.3)]
    folder = write_comparison(tmp_path / "c", arms, seeds=1)
    file = folder / "runs/ppo_beta=0.2/seed-0/metrics.jsonl"
    file.write_text(
        file.read_text().replace('"objective/score_mean": 0.', '"objective/score_mean": 0.9')
    )
    featured = load_comparison(folder).featured
    assert [arm.name for arm in featured[:4]] == [*arms[:3], "ppo beta=0.2"] and len(featured) == 5
    assert draw([str(folder), "--frontier", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert not (folder / "comparison.html").exists()
