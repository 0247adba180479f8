"""The page of a run: what is on it, what it leaves out, and that texts stay texts."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from folders import HOSTILE, write_run

from trpo_lm.core import natural_step
from trpo_lm.report import run_page
from trpo_lm.report.charts import MARKERS, Level, Series, chart, moving_mean
from trpo_lm.report.glossary import CASES, METRICS, OUTCOMES, REASONS, outcome, step_in_words
from trpo_lm.report.log_tail import CompletionsTail, LogTail, MetricsTail, compact, spread
from trpo_lm.report.page_sections import State
from trpo_lm.report.run_page import PAGE, RunPage
from trpo_lm.storage import append_json_line

RUNNING, FINISHED = State("running"), State("finished")
TEXTS = [
    HOSTILE,
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\"><!-- <script>",
    "\u2028 and \u2029",
    "half \ud800 of a pair \udc00",
    "nul \x00 and bell \x07",
    "\u202egnp.exe\u202c \u200f\u0645\u0631\u062d\u0628\u0627",
    "&lt;b&gt; ${1} `a` 'b' \"c\"",
    "",
]


class Page(HTMLParser):
    """A page as a browser's parser sees it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts, self.styles, self.text = [], [], [], [], ""
        self.inside, self.csp = None, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        given = dict(attrs)
        if tag in ("script", "style"):
            self.inside = self.scripts if tag == "script" else self.styles
            self.inside.append("")
        if given.get("http-equiv") == "Content-Security-Policy":
            self.csp = given["content"]

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside = None

    def handle_data(self, text):
        if self.inside is None:
            self.text += text
        else:
            self.inside[-1] += text

    @property
    def data(self):
        return json.loads(self.scripts[0])


def page_of(folder, state=FINISHED, **options):
    return Page(RunPage(folder, **options).write(state).read_text(encoding="utf-8"))


def complete(folder, update, texts, **more):
    for text in texts:
        line = {"update": update, "prompt": text, "completion": text, "score": 0.5, **more}
        append_json_line(folder / "completions.jsonl", line)


def _six_digits(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", config="max_kl: 0.05\nmax_ref_kl: 1.5\nupdates: 9\n")
    for update in range(1, 7):
        complete(folder, update, ["a prompt", "another"], **{"rewards/len": 2, "rewards/b": None})
    return folder


# ---------------------------------------------------------------- what is on it


def test_the_page_holds_every_metric_and_completion(run):
    page = page_of(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    data = page.data
    for shown, row in zip(data["rows"], rows, strict=True):
        shown += [None] * (len(data["columns"]) - len(shown))
        assert dict(zip(data["columns"], shown, strict=True)) == {
            name: _six_digits(row.get(name)) for name in data["columns"]
        }
    assert data["meanings"] == METRICS
    assert [c[2] for c in data["completions"]] == [u for u in range(1, 7) for _ in range(2)]
    assert {data["prompts"][c[0]] for c in data["completions"]} == {"a prompt", "another"}
    assert data["completions"][0][3:] == ["a prompt", 0.5, {"len": 2.0, "b": None}]
    assert "update 6 of 9" in page.text and "max_ref_kl = 1.50 nats" in page.text
    assert "Score" in page.text and page.tags.count("svg") > 6


def test_numbers_and_pictures_are_there_without_scripts(run):
    page = page_of(run)
    words = [step_in_words(json.loads(x)) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(words) == 6 and all(text in page.text for text in words)
    assert [o for o in ("taken", "rejected", "skipped") if o in page.data["outcomes"]] == [
        "taken", "rejected", "skipped",
    ]  # fmt: skip


def test_conversations_and_references_are_kept_apart(run):
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}]
    line = {"update": 7, "prompt": prompt, "completion": "4", "score": 1.0}
    append_json_line(run / "completions.jsonl", line)
    pair = {"update": 4, "of": "held-out prompt", "prompt": "p", "reference": "r", "policy": "q",
            "score_before": 0.25, "score_after": 0.75}  # fmt: skip
    append_json_line(run / "samples.jsonl", pair)
    data = page_of(run).data
    chat, beside = data["completions"][-2:]
    assert data["prompts"][chat[0]] == [["system", "Be kind."], ["user", "2 + 2?"]]
    assert beside[1] < 0 and beside[2:] == [4, "q", 0.75, {}, "r", 0.25, "held-out prompt"]


def test_a_run_of_ppo_or_without_any_update_has_a_page(tmp_path):
    ppo = page_of(write_run(tmp_path / "ppo", config="clip: 0.2\nalgorithm: PPO\n", trpo=False))
    assert set(ppo.data["outcomes"]) == {"updated", "skipped"} and "PPO" in ppo.text
    (tmp_path / "new").mkdir()
    empty = page_of(tmp_path / "new", RUNNING)
    assert empty.data["rows"] == [] and "no update yet" in empty.text


@pytest.mark.parametrize("kind", ["running", "finished", "stopped"])
def test_only_the_page_of_a_running_run_loads_itself_again(run, kind):
    page = page_of(run, State(kind, "out of disk"))
    assert (page.data["refresh"] > 0) == (kind == "running")
    assert (("http-equiv", "refresh") in page.attributes) == (kind == "running")
    assert kind in page.text and "out of disk" in page.text
    command = {"running": "--watch", "finished": "evaluate.py", "stopped": "--resume_from"}[kind]
    assert command in page.text


def test_several_rewards_have_a_chart_and_files_a_link(run):
    assert "Rewards" not in page_of(run).text
    append_json_line(run / "metrics.jsonl", {"update": 7, "rewards/len": 1.0, "rewards/b": 2.0})
    (run / "token_view").mkdir()
    (run / "token_view" / "row 0#.html").touch()
    page = page_of(run)
    assert "Rewards" in page.text
    assert ("href", "token_view/row%200%23.html") in page.attributes


# ---------------------------------------------------------------- hostile content


def hostile(folder):
    folder.mkdir()
    for update, text in enumerate(TEXTS, start=1):
        row = {"update": update, "skipped": text, f"rewards/{text}": 1.0, "objective/ref_kl": 0.1}
        append_json_line(folder / "metrics.jsonl", row)
        complete(folder, update, TEXTS, **{f"rewards/{text}": 0.5})
    pair = {"update": 1, "of": TEXTS[1], "prompt": TEXTS[1], "reference": TEXTS[2], "policy": "p"}
    append_json_line(folder / "samples.jsonl", pair)
    settings = {"model": TEXTS[1], "algorithm": TEXTS[2], "reward_funcs": [TEXTS[1], 5]}
    (folder / "config.yaml").write_text(json.dumps({**settings, "reward_models": 3, "updates": []}))
    return folder


def test_no_text_becomes_markup(tmp_path):
    page = page_of(hostile(tmp_path / "run"), State("stopped", TEXTS[1]))
    plain = page_of(write_run(tmp_path / "plain"), State("stopped"))
    assert len(page.scripts) == len(plain.scripts) == 2 and page.scripts[1] == plain.scripts[1]
    assert set(page.tags) <= {*plain.tags, "li"} and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.scripts[0].isascii() and not set("<>&") & set(page.scripts[0])
    data = page.data
    assert [c[3] for c in data["completions"][: len(TEXTS)]] == TEXTS
    assert {data["prompts"][c[0]] for c in data["completions"]} == set(TEXTS)


def test_nothing_runs_but_the_page_s_own_script_and_nothing_is_fetched(run):
    page = page_of(run)
    for policy, text in (("script-src", page.scripts[1]), ("style-src", page.styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{policy} 'sha256-{digest}'" in page.csp
    assert page.csp.startswith("default-src 'none'; ") and "unsafe" not in page.csp
    places = [value for name, value in page.attributes if name in ("src", "href", "action")]
    assert not [p for p in places if ":" in p or p.startswith("/")]
    script = (Path(run_page.__file__).parent / "run_page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch\(", script)
    assert "style" not in [name for name, _ in page.attributes]


@pytest.mark.parametrize(
    "line",
    [b"garbage", b"[1]", b'{"update": "x"}', b'{"update": 3.5}', b'{"update": true}', b'{"a": NaN}',
     b"\xff\xfe", b"[" * 5000, b'{"update": 7, "a": 1e999', b"{}"],
    ids=range(10),
)  # fmt: skip
def test_damaged_lines_are_counted_and_left_out(run, line):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(line + b'\n{"update": 7, "objective/score_mean": 1e999, "time/total": 1e300}\n')
    page = page_of(run)
    assert page.data["rows"][-1][0] == 7 and len(page.data["rows"]) == 7
    assert "1 line of the logs could not be read" in page.text


def test_settings_that_cannot_be_read_are_told(run):
    (run / "config.yaml").write_text("a: [")
    assert "config.yaml: not YAML" in page_of(run).text


# ---------------------------------------------------------------- sizes


def test_a_large_log_is_shown_in_part_and_the_page_says_so(tmp_path):
    folder = write_run(tmp_path / "run", updates=60)
    for update in range(1, 61):
        complete(folder, update, [f"{update} {i} {'x' * 80}" for i in range(20)])
    size = (folder / "completions.jsonl").stat().st_size
    page = page_of(folder, room=size // 5)
    shown = page.data["completions"]
    assert len(json.dumps(shown)) < size // 5
    counts = [sum(c[2] == update for c in shown) for update in range(1, 61)]
    first = int(re.search(r"all from update (\d+) on", page.text)[1])
    assert counts[first - 1 :] == [20] * (61 - first) and 50 < first < 58
    assert set(counts[5 : first - 1]) == {2}, "as many of each earlier update"
    assert f"{len(shown):,} of 1,200 completions are on this page" in page.text
    assert page_of(folder, room=0).data["completions"] == []


def test_a_long_run_and_a_long_text_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(run_page, "MOST_ROWS", 10)
    monkeypatch.setattr(run_page, "LONGEST_TEXT", 100)
    folder = write_run(tmp_path / "run", updates=40)
    complete(folder, 1, ["y" * 1000])
    page = page_of(folder)
    updates = [row[0] for row in page.data["rows"]]
    assert len(updates) <= 10 and updates[-1] == 40 and "40 updates: 10 of them" in page.text
    assert "900 more characters in the log" in page.data["completions"][0][3]


def test_a_drawing_does_not_grow_with_the_run():
    def size(count):
        y = np.random.default_rng(0).normal(size=count)
        return len(chart("t", "n", np.arange(1.0, count + 1), [Series("a", "a", y)]))

    assert size(20_000) < 1.3 * size(2_000) and size(20_000) < 60_000


def test_charts_have_gaps_limits_and_logarithms():
    x, y = np.arange(1.0, 6), np.array([1.0, np.nan, 0.0, 1000.0, 10.0])
    drawn = chart("t", "n", x, [Series("a", "a", y)], log=True, levels=[Level(100.0, "limit")])
    line = re.search(r'class="a" d="([^"]*)"', drawn)[1]
    assert line.count("M") == 2 and line.count("L") == 1  # a point alone, then two joined
    assert "limit" in drawn and ">1,000<" in drawn
    assert chart("t", "n", x, [Series("a", "a", np.full(5, np.nan))]) == ""
    assert moving_mean(np.array([1.0, np.nan, 3.0, 8.0]), 3).tolist() == [1.0, 2.0, 5.5, 5.5]
    assert np.isnan(moving_mean(np.full(MARKERS, np.nan), 3)).all()


def test_a_spread_is_even_and_complete():
    assert spread(10, 10) == [*range(10)] and spread(10, 99) == [*range(10)] and spread(10, 0) == []
    assert spread(10, 2) == [2, 7] and spread(0, 3) == []


# ---------------------------------------------------------------- logs that grow


def test_only_what_is_new_is_read_and_an_unfinished_line_waits(tmp_path):
    path = tmp_path / "log"
    tail = LogTail(path)
    assert [*tail.lines()] == []
    path.write_bytes(b"one\ntwo\nth")
    tail.restarted()
    assert [*tail.lines()] == [(0, b"one"), (4, b"two")]
    with open(path, "ab") as file:
        file.write(b"ree\n")
    assert not tail.restarted() and [*tail.lines()] == [(8, b"three")]


def test_a_log_that_was_replaced_by_a_longer_one_is_read_anew(tmp_path):
    path, other = tmp_path / "log", tmp_path / "other"
    tail = LogTail(path)
    path.write_bytes(b"one\n")
    assert tail.restarted() and [*tail.lines()] == [(0, b"one")]
    other.write_bytes(b"first\nsecond\n")
    other.replace(path)
    assert tail.restarted() and [line for _, line in tail.lines()] == [b"first", b"second"]


def test_a_log_that_a_resume_truncated_is_read_anew(run):
    page = RunPage(run)
    page.html(RUNNING)
    for name in ("metrics.jsonl", "completions.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["update"] <= 2]
        (run / f"new-{name}").write_text("".join(kept))
        (run / f"new-{name}").replace(run / name)
    append_json_line(run / "metrics.jsonl", {"update": 3})
    complete(run, 3, ["after the resume"])
    data = Page(page.html(RUNNING)).data
    assert [row[0] for row in data["rows"]] == [1, 2, 3]
    assert [c[2] for c in data["completions"]] == [1, 1, 2, 2, 3]
    assert data["completions"][-1][3] == "after the resume"


def test_a_page_that_follows_equals_a_page_made_at_once(run):
    following = RunPage(run)
    following.html(RUNNING)
    append_json_line(run / "metrics.jsonl", {"update": 7, "new": 1.5})
    complete(run, 7, ["late"])
    one, two = Page(following.html(RUNNING)).data, Page(RunPage(run).html(RUNNING)).data
    for data in (one, two):
        data.pop("written")
        width = len(data["columns"])
        data["rows"] = [row + [None] * (width - len(row)) for row in data["rows"]]
    assert one == two


def test_a_completion_that_changed_meanwhile_is_left_out(run):
    tail = CompletionsTail(run / "completions.jsonl")
    tail.read()
    places, _ = tail.chosen(1 << 20)
    (run / "completions.jsonl").write_bytes(b"x" * 100)
    assert [*tail.texts(places)] == [None] * len(places)
    (run / "completions.jsonl").unlink()
    assert [*tail.texts(places)] == [None] * len(places)


def test_a_link_is_not_followed(run, tmp_path):
    (run / "elsewhere").write_text('{"update": 1}\n')
    (tmp_path / "metrics.jsonl").symlink_to(run / "elsewhere")
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    tail.read()
    assert tail.rows == []
    outside = run / "outside"
    outside.write_text("keep")
    (run / PAGE).symlink_to(outside)
    page_of(run)
    assert outside.read_text() == "keep" and not (run / PAGE).is_symlink()


def test_a_page_is_there_whole_or_as_it_was(run, monkeypatch):
    page_of(run)
    before = (run / PAGE).read_bytes()

    def full(path, content):
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_page, "write_through", full)
    with pytest.raises(OSError, match="No space"):
        page_of(run, RUNNING)
    assert (run / PAGE).read_bytes() == before
    assert not [p for p in run.iterdir() if p.name.startswith(".tmp-")]


# ---------------------------------------------------------------- words


def test_every_case_and_reason_of_the_code_has_its_words():
    source = Path(natural_step.__file__).read_text()
    reasons = re.findall(r'return "([a-z][\w -]+)"', source[source.index("def why_rejected") :])
    assert {"kl above max_kl", "non-finite"} <= set(reasons) <= set(REASONS)
    assert {*natural_step.BROKEN.values(), "a gradient was not finite", "no step"} <= set(REASONS)
    assert set(CASES) == {"old", "ref", "both", "recover", "none"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reason", [None, *REASONS, "something new"])
def test_every_step_is_told_in_sentences(case, reason):
    for accepted in (True, False):
        row = {"trust_region/case": case, "line_search/reason": reason,
               "line_search/accepted": accepted, "line_search/trials": 3}  # fmt: skip
        told = step_in_words(row)
        assert told.endswith(".") and told[0].isupper() and "None" not in told
        assert outcome(row) in OUTCOMES
        if reason and reason not in ("no step",) and case != "none":
            assert REASONS.get(reason, reason) in told
    assert outcome({}) == "updated" and outcome({"skipped": "x"}) == "skipped"


def test_json_in_a_page_holds_no_markup():
    assert compact({"a": "</script><!--&\u2028"}) == (
        '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028"}'
    )


# ---------------------------------------------------------------- in a browser

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: one of {', '.join(NAMES)} must be on the PATH"
)


def rendered(path, state="", width=1200):
    """Return the page as a browser makes it, and what it complained about."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom",
         path.resolve().as_uri() + state],
        capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    return Page(done.stdout), [x for x in done.stderr.splitlines() if "CONSOLE" in x]


@browser
def test_a_browser_shows_hostile_texts_and_runs_none(tmp_path):
    path = RunPage(hostile(tmp_path / "run")).write(FINISHED)
    for state in ("", "#q=script", "#o=longest&k=pairs", "#u=2&s=nowhere&t=none&o=what"):
        page, complaints = rendered(path, state)
        assert complaints == [] and "img" not in page.tags and "pwned'" in page.text
        assert len(page.scripts) == 2
    page, _ = rendered(path)
    assert {"U+2028", "U+D800", "U+0000", "U+202E"} <= set(re.findall(r"U\+\w{4}", page.text))


@browser
def test_a_browser_searches_pages_and_remembers_by_the_address(run):
    complete(run, 6, [f"needle {i}" for i in range(45)])
    path = RunPage(run).write(FINISHED)
    page, complaints = rendered(path, "#q=NEEDLE")
    assert complaints == [] and "45 of 57 on this page" in page.text
    assert page.tags.count("article") == 20 and "1 to 20 of 45" in page.text
    assert page.tags.count("mark") == 40  # in prompts and completions
    page, _ = rendered(path, "#u=3&t=rejected")
    assert "2 of 57 on this page" in page.text and page.tags.count("article") == 2


@browser
def test_a_large_run_is_on_the_screen_within_seconds(tmp_path):
    folder = write_run(tmp_path / "run", updates=1000)
    line = json.dumps({"update": 0, "prompt": "p" * 40, "completion": "c" * 200, "score": 0.5})
    with open(folder / "completions.jsonl", "w") as file:
        for update in range(1, 1001):
            file.write((line.replace("0,", f"{update},", 1) + "\n") * 32)
    path = RunPage(folder).write(FINISHED)
    assert path.stat().st_size < 6e6
    page, complaints = rendered(path)
    assert complaints == [] and page.tags.count("article") == 20
