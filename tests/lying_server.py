"""A small server that speaks as vLLM's does, over a Hugging Face model, and lies when told to.

`tests/lm/test_servers.py` holds it against the real one too (marker `vllm`).
"""

import copy
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file


class Refusal(Exception):
    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class LyingServer:
    """`with LyingServer(model, tokenizer) as server:` serves at `server.url`.

    Attributes:
        lie: Name of what it does wrong; None: nothing.
        times: Requests, of those the lie is about, that are still lied to.
        log: (path, body) of every request.
    """

    def __init__(self, model, tokenizer, *, context=64, rank=8, logprobs="processed"):
        self.base, self.tokenizer = copy.deepcopy(model).eval(), tokenizer
        self.peft, self.names = None, {}  # served name: adapter's name in peft
        self.context, self.rank, self.processed = context, rank, logprobs == "processed"
        self.lie, self.times, self.log = None, math.inf, []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def tell(self, lie):
        self.lie = lie

    def lies(self, *names):
        """Whether it is to lie now, in one of these ways."""
        if self.lie not in names or self.times <= 0:
            return False
        self.times -= 1
        return True

    # ---- what is asked

    def answer(self, path, body):
        self.log.append((path, body))
        if path == "/health":
            return ""
        if path == "/v1/models":
            base = {"id": "base", "parent": None, "max_model_len": self.context}
            return {"data": [base, *({"id": n, "parent": "base"} for n in self.names)]}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return {"tokens": [i + 1 for i in ids] if self.lies("tokenizer") else ids}
        with self.lock:
            return {
                "/v1/load_lora_adapter": self.load,
                "/v1/unload_lora_adapter": self.unload,
                "/v1/completions": self.complete,
            }[path](body)

    def load(self, body):
        name, folder = body["lora_name"], Path(body["lora_path"])
        assert not body.get("load_inplace")
        if self.lies("no lora"):
            raise Refusal(404, "Not Found")
        if self.lies("refuse"):
            raise Refusal(500, "Loading lora failed: the moon is full")
        if name in self.names:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").exists():
            raise Refusal(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.rank:
            raise Refusal(500, f"LoRA rank {rank} is greater than max_lora_rank {self.rank}.")
        own = next(iter(self.names.values()), None) if self.lies("stale") else None
        if own is None:
            own = f"a{len(self.log)}"
            folder = self._halved(folder) if self.lies("half") else folder
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, folder, adapter_name=own)
            else:
                self.peft.load_adapter(folder, adapter_name=own)
            self.peft.eval()
        self.names[name] = own
        return f"Success: LoRA adapter '{name}' added successfully."

    @staticmethod
    def _halved(folder):
        """An adapter whose first layer has no tensors."""
        file = folder / "adapter_model.safetensors"
        kept = {k: v if "layers.0." not in k else v * 0 for k, v in load_file(file).items()}
        made = folder.with_name(folder.name + "-half")
        made.mkdir()
        (made / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        save_file(kept, made / file.name)
        return made

    def unload(self, body):
        if body["lora_name"] not in self.names:
            raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.names[body["lora_name"]]
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def complete(self, body):
        name, prompt, n = body["model"], body["prompt"], body["n"]
        if self.lies("forget"):
            self.names.clear()
        if name != "base" and name not in self.names:
            raise Refusal(404, f"The model `{name}` does not exist.")
        if self.lies("engine"):
            raise Refusal(500, "EngineCore encountered an issue.")
        if self.lies("nan"):
            raise Refusal(400, "Out of range float values are not JSON compliant: nan")
        if max(prompt) >= self.base.config.vocab_size:
            raise Refusal(400, "Token id is out of vocabulary")
        room = min(body["max_tokens"], self.context - len(prompt))
        rows = self._sampled(name, {**body, "max_tokens": room})
        choices = []
        for index, (ids, logprobs) in enumerate(rows):
            ended = ids[-1] in body["stop_token_ids"]
            if self.lies("cut"):
                ids, logprobs, ended = ids[:1], logprobs[:1], False
            if self.lies("beyond"):
                ids = [*ids[:-1], 10**6]
            if self.lies("shifted"):
                logprobs = [x - 0.4 for x in logprobs]
            if self.lies("fewer"):
                logprobs = logprobs[:-1]
            if self.lies("infinite"):
                logprobs = [math.inf, *logprobs[1:]]
            choice = {
                "index": index, "prompt_token_ids": prompt[1:] if self.lies("prompt") else prompt,
                "token_ids": ids, "logprobs": {"token_logprobs": logprobs},
                "finish_reason": "stop" if ended else "length",
            }  # fmt: skip
            if self.lies("no ids"):
                del choice["token_ids"]
            choices.append(choice)
        choices = choices[: n - 1] if self.lies("one less") else choices
        return {"choices": choices}

    @torch.no_grad()
    def _sampled(self, name, body):
        model, T = self.base if self.peft is None else self.peft, body["temperature"]
        if self.peft is not None and name != "base" and not self.lies("ignored"):
            model.set_adapter(self.names[name])
        elif self.peft is not None:
            with model.disable_adapter():
                return self._rows(model, body, T)
        return self._rows(model, body, T)

    def _rows(self, model, body, T):
        """Ids and log-probabilities of n completions, each by the noise of its own seed."""
        n, stops = body["n"], {*body["stop_token_ids"]}
        noise = [torch.Generator().manual_seed(body["seed"] + i) for i in range(n)]
        rows, running = [([], []) for _ in range(n)], {*range(n)}
        ids = torch.tensor([body["prompt"]] * n)
        for _ in range(body["max_tokens"]):
            logits = model(input_ids=ids).logits[:, -1]
            drawn = (logits / T).log_softmax(-1)
            told = drawn if self.processed else logits.log_softmax(-1)
            new = [int(torch.multinomial(drawn[i].exp(), 1, generator=noise[i])) for i in range(n)]
            for i in running:
                rows[i][0].append(new[i])
                rows[i][1].append(float(told[i, new[i]]))
            running -= {i for i in running if new[i] in stops}
            if not running:
                break
            ids = torch.cat([ids, torch.tensor(new)[:, None]], dim=1)
        return rows


class _Handler(BaseHTTPRequestHandler):
    owner: LyingServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        owner = self.owner
        asked = self.path == "/v1/completions" or owner.lie == "down"
        if asked and owner.lies("drop"):
            self.close_connection = True
            return
        if asked and owner.lies("hang"):
            owner.closing.wait(30)
        if asked and owner.lies("slow"):
            time.sleep(0.3)
        try:
            if asked and owner.lies("busy", "down"):
                raise Refusal(503, "Service Unavailable")
            found, status = owner.answer(self.path, body), 200
        except Refusal as refusal:
            found, status = {"error": {"message": str(refusal)}}, refusal.status
        text = found if isinstance(found, str) else json.dumps(found)
        if status == 200 and asked and owner.lies("no json"):
            text = "<html>"
        try:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:  # who asked has gone
            pass
