"""Completions from vLLM's servers, by HTTP; vLLM itself is in an environment of its own.

    publish     save the adapter to a new folder -> load it under a new name on every server
                -> unload the one before -> only then delete its folder
    complete    one request a prompt, for n completions with the seeds s, s + 1, ..., s + n - 1;
                the same request again, so the same tokens, until it is answered

A server may answer 200 with a stale, broken or ignored adapter. So names are of this run and of one
version, and are never loaded again in place; every answer is held against its request; at the start
`published_is_sampled` compares log-probabilities under an adapter that is far from the base; and a
run measures the distance of what was sampled from its own policy in every rollout.

`recipes/serve.py` starts a server with the flags that this needs.
"""

from __future__ import annotations

import json
import math
import queue
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from trpo_lm.core.divergences import token_logprobs
from trpo_lm.errors import RunFault, TrpoLMError, first_line
from trpo_lm.lm.examination import moved, shortest_number
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.sampling import Drawn
from trpo_lm.seeds import derive_seed
from trpo_lm.storage import sync

T = TypeVar("T")

AT_ONCE = 64  # requests to one server, which batches them
START, PER_TOKEN = 60.0, 1.0  # seconds that an answer may take, and more for each token asked for
PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds before the same request is sent again
LEAVE = 2.0  # seconds that a run waits for servers at its end
BUSY = (502, 503, 504)  # HTTP statuses that say to come back
TEXTS = ["The film was", " 12 + 30 = 42.\n", "na\u00efve \u2013 \u4f60\u597d"]  # for tokenizers
PROBES, PROBE_TOKENS = 8, 16
MOVES = (0.01, 0.04, 0.16)  # of each parameter, until the probe is FAR from the base
CLOSE = {8: 1e-3, 4: 1e-3, 2: 0.05, 1: 0.05}  # nats a token, by bytes of the base's numbers
FAR = 10  # times that
FLAGS = "start it as `trpo-lm serve` does, which prints the flags it needs"

_open = build_opener(ProxyHandler({})).open  # servers are neighbours: no proxy stands between


class Unanswered(Exception):
    """No answer, or one that says to come back."""


class Refused(Exception):
    """An answer that says no.

    Attributes:
        status: Of HTTP.
        reason: The server's own.
    """

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, reason
        super().__init__(f"{status}, {reason}")


@dataclass
class Server:
    """One server.

    Attributes:
        url: Without a slash at its end.
        base: Name under which it serves the base model.
        context: Longest sequence that it serves, tokens.
    """

    url: str
    base: str = ""
    context: int = 0


class Servers:
    """Samples from a policy on servers that hold its base; see `sampling.Sampler`.

    Args:
        urls: Of the servers; prompts are dealt to them in this order.
        folder: Receives the adapters; the servers must see it under the same path.
        run: Names the adapters of this run, and of no other.
        vocabulary: Ids that the policy knows, 0 to that less 1.
        patience: Seconds that an answer may take, repeated attempts included; None: `START`, and
            `PER_TOKEN` for each token of a completion.
        on_main: Does something on one process of the run and returns its result on all.
    """

    def __init__(
        self,
        urls: Sequence[str],
        folder: Path,
        *,
        run: str,
        vocabulary: int,
        patience: float | None = None,
        on_main: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    ):
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.folder, self.run, self.vocabulary, self.patience = folder, run, vocabulary, patience
        self.name: str | None = None  # of the adapter that is sampled from; None: the base
        self.on_main, self._wrote = on_main, False  # anything, from this process
        self._loaded: list[str] = []

    # ---------------------------------------------------------------- adapters

    def publish(self, policy: Policy, version: str) -> None:
        """Sample from a policy as it is now; every process of the run calls this.

        Args:
            policy: At the parameters to sample from. With its adapter switched off, it is the base.
            version: Their name: equal ones are equal parameters.

        Raises:
            RunFault: If the adapter is not finite, or a server does not take it.
        """
        self.name = self.on_main(lambda: self._published(policy, version))

    def _published(self, policy: Policy, version: str) -> str | None:
        """Load an adapter on every server; return its name, None for the base's."""
        layers = (m for m in policy.model.modules() if isinstance(m, BaseTunerLayer))
        if any(layer.disable_adapters for layer in layers):
            return None
        name = f"{self.run}-{version}"
        if name not in self._loaded:
            self._save(policy, name)
            before, self._loaded = self._loaded, [*self._loaded, name]
            for server in self.servers:
                self._load(server, name)
            for old in before:
                self._unload(old, self._deadline())
        return name

    def withdraw(self) -> None:
        """Unload and delete what this process published, as far as servers answer at once."""
        for name in list(self._loaded):
            with suppress(RunFault):
                self._unload(name, monotonic() + LEAVE)
        self._loaded, self.name = [], None
        if self._wrote:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _save(self, policy: Policy, name: str) -> None:
        """Write an adapter to the folder of its name, whole or not at all."""
        if not all(p.isfinite().all() for p in policy.parameters.tensors):
            raise RunFault(
                "the adapter has values that are nan or infinite", where=f"adapter {name}",
                hint="served, it would spoil the answers to other requests; lower max_kl",
            )  # fmt: skip
        unfinished, self._wrote = self.folder / f".tmp-{name}", True
        try:
            unfinished.mkdir(parents=True)
            policy.save(unfinished)
            for file in unfinished.iterdir():
                sync(file)
            unfinished.rename(self.folder / name)
        except OSError as error:
            raise RunFault(f"cannot write the adapter: {error}", where=str(unfinished)) from error

    def _load(self, server: Server, name: str) -> None:
        body = {"lora_name": name, "lora_path": str(self.folder / name)}
        try:
            self._ask(server, "/v1/load_lora_adapter", body, deadline=self._deadline())
        except Refused as refusal:
            if refusal.status == 400 and name in self._models(server):
                return  # the answer to an earlier attempt was lost
            raise RunFault(
                f"the server does not take the adapter: {refusal}",
                where=f"{server.url}, adapter {name}",
                hint=_cure(refusal, body["lora_path"]),
            ) from refusal

    def _unload(self, name: str, deadline: float) -> None:
        """Unload an adapter everywhere, then delete its folder: never the other way round."""
        for server in self.servers:
            with suppress(Refused):  # a server that was restarted does not know it
                body = {"lora_name": name}
                self._ask(server, "/v1/unload_lora_adapter", body, deadline=deadline)
        self._loaded.remove(name)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    # ---------------------------------------------------------------- completions

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        *,
        max_tokens: int,
        stop_ids: Sequence[int],
        temperature: float,
        seed: tuple[int | str, ...],
    ) -> Drawn:
        """Draw n completions of each prompt; see `Sampler.complete`.

        Raises:
            RunFault: If a server does not answer in time, refuses, or answers something else than
                was asked for.
        """
        first = derive_seed(*seed, "generate") % 2**62  # type: ignore[misc]
        settings = {
            "n": n, "max_tokens": max_tokens, "stop_token_ids": list(stop_ids), "ignore_eos": True,
            "temperature": temperature, "top_p": 1, "top_k": 0, "min_p": 0,
            "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
            "logprobs": 0, "return_token_ids": True, "add_special_tokens": False,
            "skip_special_tokens": False,
        }  # fmt: skip

        def work(i: int) -> list[tuple[list[int], list[float]]]:
            server = self.servers[i % len(self.servers)]
            body = {**settings, "prompt": list(prompts[i]), "seed": first + i * n}
            answer = self._completion(server, body, max_tokens)
            try:
                return drawn_as_asked(answer, body, self.vocabulary)
            except ValueError as error:
                raise RunFault(
                    f"a server did not do what it was asked: {error}",
                    where=f"{server.url}, prompt {i} of {len(prompts)}", hint=FLAGS,
                ) from error  # fmt: skip

        answers = concurrently(work, len(prompts), AT_ONCE * len(self.servers))
        rows = [row for answer in answers for row in answer]
        tokens = torch.zeros(len(rows), max_tokens, dtype=torch.int64)
        logprobs = torch.zeros(len(rows), max_tokens)
        for row, (ids, values) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            logprobs[row, : len(ids)] = torch.tensor(values)
        return Drawn(tokens, logprobs)

    def _completion(self, server: Server, body: Mapping[str, Any], max_tokens: int) -> Any:
        """Ask for completions; an adapter that a restarted server lost is loaded once more."""
        deadline, name = self._deadline(max_tokens), self.name
        for attempt in range(2):
            asked = {"model": server.base if name is None else name, **body}
            try:
                return self._ask(
                    server, "/v1/completions", asked, deadline=deadline, again=(500, *BUSY)
                )
            except Refused as refusal:
                if refusal.status == 404 and name is not None and attempt == 0:
                    self._load(server, name)
                    continue
                raise RunFault(
                    f"the server refuses to complete a prompt: {refusal}",
                    where=f"{server.url}, model {asked['model']}", hint=FLAGS,
                ) from refusal  # fmt: skip

    # ---------------------------------------------------------------- the start

    def wait(self) -> None:
        """Return once every server is there; raise if one is not in time, or is none of vLLM's."""
        deadline = self._deadline()
        for server in self.servers:
            try:
                self._ask(server, "/health", deadline=deadline)
                found = self._ask(server, "/v1/models", deadline=deadline)["data"]
                base = next(model for model in found if model.get("parent") is None)
                server.base, server.context = str(base["id"]), int(base["max_model_len"])
            except RunFault as fault:
                raise TrpoLMError(fault.what, where="rollout_servers", hint=FLAGS) from fault
            except (Refused, LookupError, TypeError, ValueError, StopIteration) as error:
                raise TrpoLMError(
                    f"{server.url} is no server of vLLM: {error or type(error).__name__}",
                    where="rollout_servers", hint=FLAGS,
                ) from error  # fmt: skip

    def tokens(self, server: Server, text: str) -> list[int]:
        """Return the tokens that a server makes of a text, no special ones added."""
        body = {"model": server.base, "prompt": text, "add_special_tokens": False}
        return self._ask(server, "/tokenize", body, deadline=self._deadline())["tokens"]

    def _models(self, server: Server) -> list[str]:
        found = self._ask(server, "/v1/models", deadline=self._deadline())["data"]
        return [model.get("id") for model in found]

    # ---------------------------------------------------------------- requests

    def _deadline(self, tokens: int = 0) -> float:
        given = START + PER_TOKEN * tokens if self.patience is None else self.patience
        return monotonic() + given

    def _ask(
        self,
        server: Server,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        deadline: float,
        again: Sequence[int] = BUSY,
    ) -> Any:
        """Send a request until it is answered or its time is over.

        Every one may be sent twice: a completion has a seed, an adapter a name of its own.

        Raises:
            Refused: If the answer is no.
            RunFault: If there is none in time.
        """
        start, pause = monotonic(), PAUSE
        while True:
            try:
                return answer(server.url + path, body, deadline - monotonic(), again)
            except Unanswered as missing:
                if monotonic() + pause >= deadline:
                    raise RunFault(
                        f"no answer from {server.url}{path} within "
                        f"{monotonic() - start:.0f} s: {missing}",
                        where="rollout_servers",
                        hint="see the server's own log; rollout_timeout sets how long to wait",
                    ) from missing
            sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def answer(
    url: str, body: Mapping[str, Any] | None, seconds: float, again: Sequence[int] = BUSY
) -> Any:
    """Send one request; return its answer, from JSON, or text where it is none.

    Args:
        url: Of what is asked.
        body: Sent as JSON by POST; None: by GET.
        seconds: That it may take.
        again: HTTP statuses that count as no answer.

    Raises:
        Unanswered: If there is none.
        Refused: If it is no.
    """
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    try:
        with _open(request, timeout=max(seconds, PAUSE)) as response:
            content = response.read()
    except HTTPError as error:
        reason = _reason(error)
        if error.code in again:
            raise Unanswered(f"{error.code}, {reason}") from error
        raise Refused(error.code, reason) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # of a URLError
        raise Unanswered(str(reason) or type(reason).__name__) from error
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def _reason(error: HTTPError) -> str:
    """Return what a server says of its refusal."""
    text = error.reason
    with suppress(OSError, HTTPException):
        text = error.read().decode(errors="replace") or text
    with suppress(ValueError, LookupError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(text).split())[:500]


def _cure(refusal: Refused, path: str) -> str:
    reason = refusal.reason.lower()
    if "rank" in reason:
        return "restart the server with a --max-lora-rank of at least lora_r"
    if refusal.status in (404, 405) and "adapter" not in reason:
        return f"it was started without LoRA at run time: {FLAGS}; it has none for GPT-2"
    return (
        f"the server must see {path} (give an output_dir that all hosts share), have LoRA for "
        "this architecture, and have all of lora_target_modules"
    )


def drawn_as_asked(
    answer: Any, asked: Mapping[str, Any], vocabulary: int
) -> list[tuple[list[int], list[float]]]:
    """Return ids and log-probabilities of the completions in an answer.

    Args:
        answer: To a request for completions.
        asked: The request.
        vocabulary: Ids that there are.

    Raises:
        ValueError: Says what is not as it was asked for.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = [
            (
                choice["prompt_token_ids"],
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                choice["finish_reason"],
            )
            for choice in choices
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"its answer has no token ids or log-probabilities ({type(error).__name__}: {error})"
        ) from error
    if len(found) != asked["n"]:
        raise ValueError(f"{len(found)} completions came back, not {asked['n']}")
    most, stops = asked["max_tokens"], set(asked["stop_token_ids"])
    for prompt, ids, logprobs, reason in found:
        if prompt != asked["prompt"]:
            raise ValueError("the prompt's tokens came back as others")
        if not ids or any(type(i) is not int or not 0 <= i < vocabulary for i in ids):
            raise ValueError(f"a completion has tokens that the model does not know: {ids!r:.80}")
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
        if not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
            raise ValueError(f"a log-probability is no finite number: {logprobs!r:.80}")
        ends = [k for k, i in enumerate(ids) if i in stops]
        whole = ends == [len(ids) - 1] if ends else len(ids) == most
        if not whole or len(ids) > most or (reason == "stop") != bool(ends):
            raise ValueError(
                f"a completion of {len(ids)} tokens, at most {most}, ended by {reason!r} at token "
                f"{ids[-1]}"
            )
    return [(ids, logprobs) for _, ids, logprobs, _ in found]


def concurrently(work: Callable[[int], T], count: int, threads: int) -> list[T]:
    """Return work(0), ..., work(count - 1), made by threads; the first failure is raised.

    It is raised at once, and so is an interrupt: threads that wait for an answer end by themselves.
    """
    jobs, done = deque(range(count)), queue.SimpleQueue[tuple[int, T | None, Exception | None]]()

    def run() -> None:
        while True:
            try:
                i = jobs.popleft()
            except IndexError:
                return
            try:
                done.put((i, work(i), None))
            except Exception as error:
                jobs.clear()
                done.put((i, None, error))

    for _ in range(min(threads, count)):
        Thread(target=run, daemon=True).start()
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            i, result, error = done.get()
            if error is not None:
                raise error
            results[i] = result
    finally:
        jobs.clear()
    return [results[i] for i in range(count)]


# ---------------------------------------------------------------- checks of the start


def servers_answer(servers: Servers) -> None:
    """Every rollout server is there."""
    servers.wait()


def longest_row_is_served(servers: Servers, tokens: int) -> None:
    """The longest prompt and its completion fit every rollout server.

    Args:
        servers: Which.
        tokens: Of both; a longer row would be cut short without a word.
    """
    for server in servers.servers:
        if server.context < tokens:
            raise TrpoLMError(
                f"{server.url} serves {server.context} tokens, and the longest prompt and its "
                f"completion have {tokens}",
                where="rollout_servers",
                hint=f"restart it with --max-model-len {tokens}, or lower max_completion_length",
            )


def tokenizers_agree(servers: Servers, tokenizer: Any) -> None:
    """Every rollout server has the policy's tokenizer."""
    for server in servers.servers:
        for text in TEXTS:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            try:
                found = servers.tokens(server, text)
            except (Refused, LookupError, TypeError) as error:
                raise TrpoLMError(
                    f"{server.url} makes no tokens of a text: {first_line(error)}",
                    where="rollout_servers", hint=FLAGS,
                ) from error  # fmt: skip
            if found != own:
                raise TrpoLMError(
                    f"{server.url} has another tokenizer, so another model: {text!r} has the "
                    f"tokens {own} here and {found!r:.80} there",
                    where="rollout_servers",
                    hint=f"it serves {server.base!r}: serve the model that is trained",
                )


def published_is_sampled(
    servers: Servers, policy: Policy, prompts: Sequence[Sequence[int]], *, most: int
) -> str | None:
    """Every rollout server samples from the adapter that is published.

    The adapter is moved away from its start, where it is the identity, until completions have other
    log-probabilities under the base. Every process of a run does this: they may share the base.

    Args:
        servers: Which.
        policy: At any parameters.
        prompts: Token ids of some prompts; the first are continued.
        most: Tokens of a completion.
    """
    close, count = CLOSE[shortest_number(policy.base)], len(servers.servers)
    rows = [list(p) for p in prompts[:PROBES] for _ in range(count)]  # each goes to every server

    def sample() -> Drawn:
        return servers.complete(
            rows, 1, max_tokens=min(most, PROBE_TOKENS), stop_ids=(),
            temperature=policy.temperature, seed=(0, "probe"),
        )  # fmt: skip

    try:
        for number, move in enumerate(MOVES):
            with moved(policy.parameters, move):
                servers.publish(policy, f"probe{number}")
                tokens, drawn = servers.on_main(sample)
                own = _logprobs(policy, rows, tokens)
                with policy.model.disable_adapter():
                    base = _logprobs(policy, rows, tokens)
            far = bool((own - base).abs().mean() >= FAR * close)
            if servers.on_main(lambda far=far: far):  # the same on all, however they round
                break
    except RunFault as fault:
        raise TrpoLMError(fault.what, where=fault.where, hint=fault.hint) from fault
    finally:
        servers.withdraw()
    for k, server in enumerate(servers.servers):
        from_own, from_base = (float((drawn - x)[k::count].abs().mean()) for x in (own, base))
        if not from_own <= close:
            ignored = from_base <= close
            what = "the base model and ignores the adapter" if ignored else "another distribution"
            raise TrpoLMError(
                f"{server.url} samples from {what}: log-probabilities are {from_own:.2g} nats a "
                f"token from those under the adapter, {from_base:.2g} from the base's",
                where="rollout_servers",
                hint=f"it serves {server.base!r}: serve the model that is trained, in the same "
                "dtype, with --logprobs-mode processed_logprobs; vLLM has no LoRA on the output "
                "layer",
            )
    return None if far else "no move of the adapter takes a probe far from the base"


@torch.no_grad()
def _logprobs(policy: Policy, prompts: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """Return the log-probability of each token that continues a prompt, (N, T)."""
    rows = []
    for prompt, row in zip(prompts, tokens, strict=True):
        ids = torch.cat([torch.tensor(list(prompt)), row])[None]
        states = torch.zeros_like(ids, dtype=torch.bool)
        states[:, len(prompt) - 1 : -1] = True
        features = policy.features(ids, torch.ones_like(ids), states)
        rows.append(token_logprobs(policy.logprobs(features), row.to(policy.device)).cpu())
    return torch.stack(rows)
