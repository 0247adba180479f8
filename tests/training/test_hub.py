"""Uploading a run: asked for at the start, done at the end, and never the end of a run."""

import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import runs
from huggingface_hub import HfApi
from runs import trainer

from trpo_lm.config import TrainerConfig
from trpo_lm.errors import TrpoLMError
from trpo_lm.training import hub

PUSH = {"push_to_hub": True, "hub_model_id": "me/mine"}


class Hub:
    """A hub that notes what it is asked, and fails where it is told to."""

    def __init__(self, fails=()):
        self.asked, self.fails = [], fails

    def __call__(self):
        return self

    def _ask(self, question, **given):
        self.asked.append((question, given))
        if question in self.fails:
            raise ConnectionError(f"no route to https://me:secret@hub for {question}")

    def whoami(self):
        self._ask("whoami")

    def create_repo(self, name, **given):
        self._ask("create_repo", name=name, **given)
        return type("Url", (), {"repo_id": name})

    def upload_folder(self, **given):
        self._ask("upload_folder", **given)
        return type("Commit", (), {"repo_url": "https://hub/me/mine"})


@pytest.fixture
def use(monkeypatch):
    def use(api, token="hf_x"):
        monkeypatch.setattr(hub, "HfApi", api)
        monkeypatch.setattr(hub, "get_token", lambda: token)
        return api

    return use


def never(completions):
    raise AssertionError("something was generated")


def test_a_run_is_uploaded_once_it_is_complete(tmp_path, capsys, use):
    api = use(Hub())
    trainer(tmp_path / "run", updates=1, hub_private_repo=True, **PUSH).train()
    names = [name for name, _ in api.asked]
    assert names == ["whoami", "create_repo", "upload_folder"]
    assert api.asked[1][1] == {"name": "me/mine", "private": True, "exist_ok": True}
    given = api.asked[2][1]
    assert given["repo_id"] == "me/mine" and given["folder_path"] == tmp_path / "run"
    assert capsys.readouterr().out.rstrip().endswith("uploaded: https://hub/me/mine")


def test_what_is_published_is_what_others_need(tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    made = trainer(tmp_path / "run", updates=2, save_steps=1, evals=runs.HELD_OUT, eval_steps=1)
    made.archive.plots = True
    made.train()
    (tmp_path / "run" / ".lock").touch()
    files = [p.relative_to(tmp_path / "run") for p in (tmp_path / "run").rglob("*") if p.is_file()]
    kept = {*filter_repo_objects(map(str, files), allow_patterns=list(hub.PUBLISHED))}
    assert {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors",
        "tokenizer.json", "tokenizer_config.json", "plots/overview.png",
    } <= kept  # fmt: skip
    assert all(name.startswith("plots/") or "/" not in name for name in kept)
    assert not kept & {"config.yaml", "metrics.jsonl", "completions.jsonl", "MANIFEST.json"}
    published = [(tmp_path / "run" / name).read_bytes() for name in kept]
    assert not any(str(tmp_path).encode() in content for content in published)


def test_a_failed_upload_leaves_the_run_and_the_command_to_repeat_it(tmp_path, capsys, use):
    use(Hub(fails=["upload_folder"]))
    rows = trainer(tmp_path / "a run", updates=1, **PUSH).train()
    assert len(rows) == 1 and (tmp_path / "a run" / "adapter_model.safetensors").is_file()
    *_, note, command = capsys.readouterr().out.strip().splitlines()
    assert note.startswith("not uploaded: no route to https://***@hub")
    words = shlex.split(command)
    assert words[:5] == ["hf", "upload", "me/mine", str(tmp_path / "a run"), "."]
    assert words[5:7] == ["--include", "README.md"]


@pytest.mark.parametrize(
    ("given", "api", "token", "what"),
    [
        ({"hub_model_id": "a/b/c"}, Hub(), "hf_x", "cannot be the name of a repository"),
        ({"hub_model_id": "me/--x"}, Hub(), "hf_x", "cannot be the name of a repository"),
        ({}, Hub(), None, "nobody is logged in"),
        ({}, Hub(fails=["whoami"]), "hf_x", "does not know who this is: no route"),
        ({}, Hub(fails=["create_repo"]), "hf_x", "me/mine cannot be created: no route"),
    ],
)
def test_what_cannot_be_uploaded_is_told_before_anything_is_generated(
    tmp_path, use, given, api, token, what
):
    use(api, token)
    with pytest.raises(TrpoLMError, match=what) as error:
        trainer(tmp_path, reward=never, **PUSH | given).train()
    assert error.value.where in ("push_to_hub", "hub_model_id") and error.value.hint
    assert "secret" not in str(error.value)


def test_an_answer_of_the_hub_is_passed_on(tmp_path, use):
    """With the true client: a token that the hub does not know."""

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        use(lambda: HfApi(endpoint=url, token="hf_x"))
        with pytest.raises(TrpoLMError, match="does not know who this is") as error:
            hub.require_hub(TrainerConfig(**PUSH))
        assert "HF_TOKEN" in error.value.hint
    finally:
        server.shutdown()
        server.server_close()


def test_the_repository_has_the_name_of_the_folder_if_it_has_no_other(use):
    api = use(Hub())
    given = {"output_dir": "runs/my-run", "push_to_hub": True}
    assert hub.create_repository(TrainerConfig(**given)) == "my-run"
    assert api.asked == [("create_repo", {"name": "my-run", "private": None, "exist_ok": True})]
    with pytest.raises(TrpoLMError, match="where push_to_hub is set"):
        TrainerConfig(hub_model_id="me/mine")
