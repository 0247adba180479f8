"""Completions from servers: of the small one that lies, and of vLLM itself (marker `vllm`)."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from lying_server import LyingServer
from processes import free_port

from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm import servers as client
from trpo_lm.lm.servers import (
    Servers,
    concurrently,
    longest_row_is_served,
    published_is_sampled,
    servers_answer,
    tokenizers_agree,
)

SIZES = {  # of a model that both servers take: vLLM has no smaller heads
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
CONTEXT = 64
ROWS = [[tiny.BOS, 5, 6], [tiny.BOS, 7], [tiny.BOS, 4, 4, 9]]
VLLM = os.environ.get("TRPO_LM_VLLM")  # Python of an environment that has vLLM
SERVE = Path(__file__).parents[2] / "recipes" / "serve.py"


def policy(**options):
    seed = options.pop("model_seed", 0)
    return tiny.policy(model=tiny.build("llama", seed=seed, **SIZES), **options)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.02)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@contextlib.contextmanager
def vllm(folder, *flags):
    """A server of vLLM over the model, in a process group of its own."""
    tiny.build("llama", **SIZES).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    port, environment = free_port(), os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    words = [
        VLLM, SERVE, folder, "--lora_r", "8", "--max_model_len", str(CONTEXT), "--dtype",
        "float32", "--port", str(port), *flags,
    ]  # fmt: skip
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            list(map(str, words)), stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        made = Servers(
            [f"http://127.0.0.1:{port}"], folder, run="x", vocabulary=tiny.V, patience=900.0
        )
        made.wait()
        made.name = None
        made.complete([[1]], 1, max_tokens=1, stop_ids=(), temperature=1.0, seed=(0,))  # compiles
        yield made.servers[0].url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if VLLM is None:
        pytest.skip("TRPO_LM_VLLM names no Python that has vLLM")
    with vllm(tmp_path_factory.mktemp("vllm")) as url:
        yield url


@pytest.fixture
def small():
    with LyingServer(tiny.build("llama", **SIZES), tiny.tokenizer(), context=CONTEXT) as server:
        yield server


@pytest.fixture(params=["small", pytest.param("real", marks=pytest.mark.vllm)])
def url(request):
    """Of a server that does not lie: whatever holds here, holds for both."""
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, str) else found.url


def joined(folder, *urls, patience=120.0):
    run = f"r{time.monotonic_ns()}"
    made = Servers(urls, folder / run, run=run, vocabulary=tiny.V, patience=patience)
    servers_answer(made)
    return made


def complete(servers, temperature=1.0, *, rows=ROWS, n=3, most=6, stops=tiny.STOPS, seed=(7,)):
    return servers.complete(
        rows, n, max_tokens=most, stop_ids=stops, temperature=temperature, seed=seed
    )


def own_logprobs(policy, drawn, rows=ROWS):
    each = len(drawn.tokens) // len(rows)
    return client._logprobs(policy, [row for row in rows for _ in range(each)], drawn.tokens)


# ---------------------------------------------------------------- both servers


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_drawn_has_the_policys_log_probabilities(url, tmp_path, temperature):
    made, served = policy(spread=0.1, temperature=temperature), joined(tmp_path, url)
    served.publish(made, "1")
    drawn = complete(served, temperature, n=8, stops=())
    assert (own_logprobs(made, drawn) - drawn.logprobs).abs().max() < 1e-4
    with made.reference():
        served.publish(made, "reference")  # a fresh adapter switched off: the base itself
        drawn = complete(served, temperature, n=8, stops=())
        assert (own_logprobs(made, drawn) - drawn.logprobs).abs().max() < 1e-4
    served.withdraw()


def test_equal_seeds_draw_the_same_and_all_completions_have_their_own(url, tmp_path):
    served = joined(tmp_path, url)
    served.publish(policy(spread=0.1), "1")
    one, again, other = (complete(served, seed=(s,)).tokens for s in (7, 7, 8))
    assert torch.equal(one, again) and not torch.equal(one, other)
    alike = complete(served, rows=[ROWS[0]] * 4, n=4, most=10, stops=()).tokens
    assert len({tuple(row) for row in alike.tolist()}) > 12  # of 16: no two share their noise
    served.withdraw()


def test_completions_end_at_a_stop_id_and_nowhere_else(url, tmp_path):
    served = joined(tmp_path, url)
    served.publish(policy(spread=0.1), "1")
    drawn = complete(served, n=16, stops=(6, 9)).tokens.tolist()
    ends = [next((t for t, i in enumerate(row) if i in (6, 9)), None) for row in drawn]
    assert None in ends and {*ends} - {None, 5}
    assert any(tiny.EOS in row for row in drawn)  # the model's own ends nothing here
    served.withdraw()


def test_versions_have_names_of_their_own_and_leave_no_folder(url, tmp_path):
    served, made = joined(tmp_path, url), policy(spread=0.1)
    for version in "123":
        tiny.perturb(made, 0.2, seed=int(version))
        served.publish(made, version)
        served.publish(made, version)
        drawn = complete(served, stops=())
        assert (own_logprobs(made, drawn) - drawn.logprobs).abs().max() < 1e-4
        assert [p.name for p in served.folder.iterdir()] == [f"{served.run}-{version}"]
    served.name = f"{served.run}-2"
    with pytest.raises(RunFault, match="does not take the adapter: 404"):
        complete(served)
    served.withdraw()
    assert not served.folder.exists() and len(served._models(served.servers[0])) == 1


def test_an_adapter_that_a_server_lost_is_loaded_once_more(url, tmp_path):
    served = joined(tmp_path, url)
    served.publish(policy(spread=0.1), "1")
    before = complete(served).tokens
    body = {"lora_name": served.name}
    served._ask(served.servers[0], "/v1/unload_lora_adapter", body, deadline=served._deadline())
    assert torch.equal(complete(served).tokens, before)
    served.withdraw()


def test_an_adapter_of_too_large_a_rank_is_refused_with_the_flag_to_set(url, tmp_path):
    served = joined(tmp_path, url)
    with pytest.raises(RunFault, match=r"rank 16 is greater") as error:
        served.publish(policy(peft=tiny.lora(r=16)), "1")
    assert "--max-lora-rank" in error.value.hint
    served.withdraw()


@pytest.mark.parametrize(
    "rows, fault",
    [([[tiny.BOS] * (CONTEXT - 2)], "at most 6, ended by 'length'"), ([[1, 500]], "400")],
    ids=["no room", "unknown token"],
)
def test_a_prompt_that_a_server_cannot_complete_is_a_fault(url, tmp_path, rows, fault):
    served = joined(tmp_path, url)
    with pytest.raises(RunFault, match=fault) as error:
        complete(served, rows=rows, stops=())
    assert url in error.value.where


def test_the_checks_of_the_start_pass_and_leave_nothing_behind(url, tmp_path):
    served, made = joined(tmp_path, url), policy()
    theta = made.parameters.checksum()
    tokenizers_agree(served, tiny.tokenizer())
    longest_row_is_served(served, CONTEXT)
    assert published_is_sampled(served, made, ROWS, most=8) is None
    assert made.parameters.checksum() == theta and not served.folder.exists()
    with pytest.raises(TrpoLMError, match=f"serves {CONTEXT} tokens.*have {CONTEXT + 1}") as error:
        longest_row_is_served(served, CONTEXT + 1)
    assert f"--max-model-len {CONTEXT + 1}" in error.value.hint


def test_another_base_is_found_at_the_start(url, tmp_path):
    with pytest.raises(TrpoLMError, match="samples from another distribution") as error:
        published_is_sampled(joined(tmp_path, url), policy(model_seed=5), ROWS, most=8)
    assert error.value.where == "rollout_servers" and "serve the model" in error.value.hint


# ---------------------------------------------------------------- lies


LIES = {
    "cut": "at most 6, ended by 'length'",
    "prompt": "prompt's tokens came back as others",
    "one less": "2 completions came back, not 3",
    "beyond": "tokens that the model does not know",
    "fewer": "log-probabilities for 6 tokens",
    "infinite": "log-probability is no finite number",
    "no ids": "no token ids",
    "no json": "no token ids",
    "nan": "400, Out of range float values",
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_not_what_was_asked_for_is_a_fault(small, tmp_path, lie):
    served = joined(tmp_path, small.url)
    served.publish(policy(spread=0.1), "1")
    small.lie = lie
    with pytest.raises(RunFault, match=LIES[lie]) as error:
        complete(served, stops=())
    assert small.url in error.value.where and error.value.hint


@pytest.mark.parametrize("lie", ["drop", "busy", "engine", "slow"])
def test_a_request_is_repeated_with_its_seeds_until_it_is_answered(small, tmp_path, lie):
    served = joined(tmp_path, small.url)
    served.publish(policy(spread=0.1), "1")
    expected = complete(served).tokens
    small.lie, small.times = lie, 3
    assert torch.equal(complete(served).tokens, expected) and small.times == 0


@pytest.mark.parametrize(
    "lie, fault",
    [("drop", "end closed"), ("busy", "503, Serv"), ("engine", "500, En"), ("hang", "timed out")],
)
def test_a_server_that_does_not_answer_in_time_is_a_fault(small, tmp_path, lie, fault):
    served = joined(tmp_path, small.url)
    served.publish(policy(), "1")
    served.patience, small.lie, start = 0.5, lie, time.monotonic()
    with pytest.raises(RunFault, match=rf"no answer from {small.url}/v1/completions .*{fault}"):
        complete(served)
    assert time.monotonic() - start < 20  # and not for ever


def test_time_grows_with_the_tokens_asked_for_unless_it_is_set():
    left = [
        Servers([], Path(), run="", vocabulary=1, patience=p)._deadline(n) - time.monotonic()
        for p, n in ((None, 0), (None, 500), (7.0, 500))
    ]
    assert left == pytest.approx([60, 560, 7], abs=0.1)


def test_a_server_that_is_gone_is_a_fault(small, tmp_path):
    served = joined(tmp_path, small.url)
    served.patience = 0.5
    small.stop()
    with pytest.raises(RunFault, match="Connection refused"):
        complete(served)


@pytest.mark.parametrize(
    "lie, fault, hint",
    [
        ("refuse", "500, Loading lora failed: the moon", "LoRA for this architecture"),
        ("no lora", "404, Not Found", "GPT-2"),
    ],
)
def test_a_refused_adapter_is_a_fault_with_the_servers_reason(small, tmp_path, lie, fault, hint):
    served, small.lie = joined(tmp_path, small.url), lie
    with pytest.raises(RunFault, match=f"does not take the adapter: {fault}") as error:
        served.publish(policy(), "1")
    assert hint in error.value.hint
    with pytest.raises(TrpoLMError, match=fault) as error:
        published_is_sampled(served, policy(), ROWS, most=4)
    assert error.value.exit_code == 2


def test_an_answer_that_was_lost_does_not_make_a_load_fail(small, tmp_path):
    served, made = joined(tmp_path, small.url), policy(spread=0.1)
    served.publish(made, "1")
    served._load(served.servers[0], served.name)  # again: it is there
    assert complete(served).tokens.shape == (9, 6)


def test_an_adapter_that_is_not_finite_is_not_published(small, tmp_path):
    served, made = joined(tmp_path, small.url), policy()
    with torch.no_grad():
        made.parameters.tensors[-1][0] = torch.inf
    with pytest.raises(RunFault, match="nan or infinite"):
        served.publish(made, "1")
    assert not any("load" in path for path, _ in small.log)


@pytest.mark.parametrize(
    "lie, fault",
    [
        ("ignored", "the base model and ignores the adapter"),
        ("half", "another distribution"),
        ("shifted", "another distribution"),
    ],
)
def test_an_adapter_that_is_not_what_is_sampled_is_found_at_the_start(small, tmp_path, lie, fault):
    served, small.lie = joined(tmp_path, small.url), lie
    with pytest.raises(TrpoLMError, match=fault) as error:
        published_is_sampled(served, policy(), ROWS, most=8)
    assert error.value.exit_code == 2 and "output layer" in error.value.hint


def test_log_probabilities_of_another_temperature_are_found_at_the_start(tmp_path):
    model = tiny.build("llama", **SIZES)
    with LyingServer(model, tiny.tokenizer(), logprobs="raw") as server:
        assert published_is_sampled(joined(tmp_path, server.url), policy(), ROWS, most=8) is None
        with pytest.raises(TrpoLMError, match="another distribution") as error:
            published_is_sampled(
                joined(tmp_path, server.url), policy(temperature=0.7), ROWS, most=8
            )
    assert "processed_logprobs" in error.value.hint


def test_one_of_several_servers_that_lies_is_named(small, tmp_path):
    model = tiny.build("llama", **SIZES)
    with LyingServer(model, tiny.tokenizer()) as other:
        other.lie = "ignored"
        with pytest.raises(TrpoLMError, match=f"{other.url} samples from the base"):
            published_is_sampled(joined(tmp_path, small.url, other.url), policy(), ROWS, most=8)


def test_another_tokenizer_is_found_at_the_start(small, tmp_path):
    served, small.lie = joined(tmp_path, small.url), "tokenizer"
    with pytest.raises(TrpoLMError, match="has another tokenizer"):
        tokenizers_agree(served, tiny.tokenizer())


@pytest.mark.parametrize("kind", ["nobody", "busy for good", "another server"])
def test_a_server_that_is_not_there_is_a_mistake_of_the_start(small, tmp_path, kind):
    if kind == "nobody":
        small.stop()
    small.lie = "down"
    url = small.url if kind != "another server" else f"{small.url}/elsewhere"
    if kind == "another server":
        small.lie, small.answer = None, lambda path, body: "hello"
    with pytest.raises(TrpoLMError, match=small.url) as error:
        joined(tmp_path, url, patience=0.3)
    assert error.value.where == "rollout_servers" and "trpo-lm serve" in error.value.hint
    assert error.value.exit_code == 2


# ---------------------------------------------------------------- several servers, threads


def test_servers_share_the_prompts_in_a_fixed_order_and_draw_what_one_draws(small, tmp_path):
    model, made = tiny.build("llama", **SIZES), policy(spread=0.1)
    with LyingServer(model, tiny.tokenizer()) as other:
        both, one = joined(tmp_path, small.url, other.url), joined(tmp_path, small.url)
        both.publish(made, "1")
        found = complete(both).tokens
        asked = [
            sorted(body["prompt"] for path, body in server.log if path == "/v1/completions")
            for server in (small, other)
        ]
        assert asked == [sorted(ROWS[::2]), ROWS[1::2]]
        one.publish(made, "1")
        assert torch.equal(complete(one).tokens, found)


def test_work_is_done_at_once_and_in_order():
    meeting = threading.Barrier(4, timeout=10)

    def work(i):
        meeting.wait()
        return i * i

    assert concurrently(work, 8, 4) == [i * i for i in range(8)]
    assert concurrently(work, 0, 4) == []


def test_the_first_failure_is_raised_and_stops_the_rest():
    done = []

    def work(i):
        done.append(i)
        if i == 3:
            raise RunFault("three")
        return i

    with pytest.raises(RunFault, match="three"):
        concurrently(work, 100, 1)
    assert done == [0, 1, 2, 3]


# ---------------------------------------------------------------- the recipe


@pytest.mark.parametrize("rank, room", [(1, 1), (4, 8), (8, 8), (9, 16), (64, 64)])
def test_the_recipe_prints_the_flags_that_a_run_needs(rank, room):
    words = [sys.executable, SERVE, "LM", "--lora_r", rank, "--max_model_len", 300, "--print_only"]
    printed = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for flags in (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "--model LM", f"--max-lora-rank {room} ",
        "--max-loras 2", "--logprobs-mode processed_logprobs", "--generation-config vllm",
        "--max-model-len 300",
    ):  # fmt: skip
        assert flags in printed
