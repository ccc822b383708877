"""The calls of vLLM's server that a rollout engine is asked, on plain transformers and peft: where no vLLM is.

    python benchmarks/engine_server.py MODEL --port 8000 [--dtype float32] [--max_model_len N] [--fault stale --after 2]

Serves the folder MODEL on 127.0.0.1, one request at a time, and says its address on the first line. It knows nothing of
dpalign. Faults are planted ones, for tests: see FAULTS.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

FAULTS = {
    "never": "adapters are acknowledged, and the base goes on",
    "stale": "the adapter before is served under the new name",
    "half": "an adapter has half of its effect",
    "temperature": "samples at 0.7 times the temperature",
    "top_p": "cuts the law off at 0.8",
    "one_seed": "seeds are ignored: every request has the same coins",
    "crash": "completions fail with status 500",
    "refuse": "completions of prompts that begin with a token of `refused` fail with status 400",
    "lose": "adapters are forgotten",
}


class Refusal(Exception):
    """A status and what is said."""


class Served:
    """A model and its adapters, by the names that they are asked by; peft's own names are numbers."""

    def __init__(self, model: Any, name: str = "base", max_model_len: int | None = None) -> None:
        self.model, self.name = model.eval(), name
        self.config = model.config.get_text_config()
        self.max_model_len = max_model_len or getattr(self.config, "max_position_embeddings", None)
        self.adapters: dict[str, str | None] = {}
        self.loads, self.after = 0, 0  # the fault begins with the load of that number
        self.planted: str | None = None
        self.refused: set[int] = set()
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def fault(self) -> str | None:
        return self.planted if self.loads >= self.after else None

    def load(self, name: str, folder: str) -> None:
        self.loads += 1
        older = next(reversed(self.adapters.values()), None)
        if self.fault in ("never", "stale"):
            self.adapters[name] = None if self.fault == "never" else older
            return
        number = str(self.loads)
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, adapter_name=number)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=number).eval()
        if self.fault == "half":
            for module in self.model.modules():
                if isinstance(module, LoraLayer) and number in module.scaling:
                    module.scaling[number] *= 0.5
        self.adapters[name] = number

    def unload(self, name: str) -> None:
        if name not in self.adapters:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.")
        number = self.adapters.pop(name)
        if number is not None and number not in self.adapters.values() and len(self.model.peft_config) > 1:
            self.model.delete_adapter(number)

    @torch.no_grad()
    def logits(self, name: str, ids: list[int]) -> torch.Tensor:
        """`(length, vocabulary)`."""
        row, number = torch.tensor([ids]), None if name == self.name else self.adapters[name]
        if number is None and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                return self.model(row).logits[0].float()
        if number is not None:
            self.model.set_adapter(number)
        return self.model(row).logits[0].float()

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        name, prompt = asked["model"], asked["prompt"]
        if self.fault == "crash":
            raise Refusal(500, f"cannot complete {prompt}")
        if name != self.name and (name not in self.adapters or self.fault == "lose"):
            raise Refusal(404, f"The model `{name}` does not exist.")
        if not prompt or max(prompt) >= self.config.vocab_size:
            raise Refusal(400, f"out of the vocabulary: {prompt}")
        if self.max_model_len is not None and len(prompt) + asked["max_tokens"] > self.max_model_len:
            raise Refusal(400, f"maximum context length is {self.max_model_len} tokens")
        if self.fault == "refuse" and prompt[0] in self.refused and not asked.get("echo"):
            raise Refusal(400, f"no: {prompt}")
        if asked.get("echo"):
            law = self.logits(name, prompt).log_softmax(-1)
            ids = prompt
            said = [None, *law[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()]
        else:
            ids, said = self.sample(name, asked)
        tokens = [f"token_id:{token}" for token in ids]
        logprobs = {"tokens": tokens, "token_logprobs": said, "top_logprobs": None, "text_offset": []}
        return {"object": "text_completion", "choices": [{"index": 0, "text": "", "logprobs": logprobs}]}

    def sample(self, name: str, asked: dict[str, Any]) -> tuple[list[int], list[float]]:
        generator = torch.Generator().manual_seed(7 if self.fault == "one_seed" else asked["seed"])
        ids, said, stops = list(asked["prompt"]), [], set(asked["stop_token_ids"])
        temperature = asked["temperature"] * (0.7 if self.fault == "temperature" else 1.0)
        for step in range(asked["max_tokens"]):
            logits = self.logits(name, ids)[-1] / temperature
            if step < asked["min_tokens"]:
                logits[list(stops)] = -torch.inf
            law = logits.softmax(-1)
            if self.fault == "top_p":
                ordered, places = law.sort(descending=True)
                law[places[ordered.cumsum(0) - ordered > 0.8]] = 0
            token = int(torch.multinomial(law, 1, generator=generator))
            ids.append(token)
            said.append(float(logits.log_softmax(-1)[token]))
            if token in stops:
                break
        return ids[len(asked["prompt"]) :], said

    def answer(self, path: str, asked: dict[str, Any] | None) -> Any:
        if path == "/v1/models":
            names = [self.name, *self.adapters]
            return {"object": "list", "data": [{"id": name, "max_model_len": self.max_model_len} for name in names]}
        assert asked is not None
        self.requests.append({"path": path, **asked})
        if path == "/v1/completions":
            return self.complete(asked)
        if path == "/v1/load_lora_adapter":
            return self.load(asked["lora_name"], asked["lora_path"])
        if path == "/v1/unload_lora_adapter":
            return self.unload(asked["lora_name"])
        raise Refusal(404, "Not Found")


def handler_of(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, asked: dict[str, Any] | None) -> None:
            try:
                with served.lock:
                    status, value = 200, served.answer(self.path, asked)
            except Refusal as refusal:
                status, value = refusal.args[0], {"error": {"message": refusal.args[1]}}
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing of a prompt is written down."""

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that may wait


def serve(served: Served, port: int = 0) -> Server:
    """Listening on 127.0.0.1; `serve_forever` is the caller's."""
    return Server(("127.0.0.1", port), handler_of(served))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max_model_len", type=int)
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--after", type=int, default=0, help="the number of the load with which the fault begins")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
    served = Served(model, "base", given.max_model_len)
    served.planted, served.after = given.fault, given.after
    server = serve(served, given.port)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
