"""A server samples: it is found out if it goes on with older weights or another law, and private prompts go nowhere else."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpalign.algorithms import PPO, Offline
from dpalign.algorithms.base import encode_units, rows_of_units
from dpalign.engines import Engine, Local, reach
from dpalign.engines import engine as engines
from dpalign.engines.engine import rollouts_of, seeds_of
from dpalign.engines.verified import Agreement, kolmogorov
from dpalign.errors import DPAlignError, EngineError
from dpalign.models import AdapterConfig
from dpalign.plan import RecipeStage
from dpalign.privacy.entropy import SystemEntropy
from dpalign.recipe import Recipe
from dpalign.rewards import Reward
from dpalign.run import Run
from dpalign.settings.dpo import DPOConfig
from dpalign.settings.engine import EngineConfig
from dpalign.settings.offline import OfflineConfig
from dpalign.settings.ppo import PPOConfig
from helpers import call, ledger_rows, small_model, statement, write_recipe
from tiny import tiny_base, tiny_policy, words

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from engine_server import Served, serve  # noqa: E402

FEW = 160  # sampled tokens for the law, where it is not what is tested


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch):
    monkeypatch.setattr(engines, "LAW_TOKENS", FEW)


@contextmanager
def serving(served: Served) -> Iterator[str]:
    server = serve(served)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served() -> Iterator[Served]:
    """The tiny Llama, with `url`."""
    made = Served(tiny_base("llama"), max_model_len=64)
    with serving(made) as url:
        made.url = url
        yield made


def settings(url: str, **more) -> PPOConfig:
    lengths = {"max_prompt_length": 8, "max_completion_length": 5}
    return PPOConfig(noise_multiplier=1.0, expected_batch_size=8, engine=EngineConfig(url=url), **lengths | more)


def moved(policy, by: float = 3e-3) -> None:
    """One step of AdamW with a random gradient."""
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p).sign())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# Where private prompts may go -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://localhost:8000", "https://[::1]:1", "http://127.9.0.1:80"]
)
def test_this_machine_needs_no_trust(url):
    EngineConfig(url=url).validate()
    assert EngineConfig(url=url).is_here


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8000", "http://engine:8000", "http://localhost.example.org:80", "http://0.0.0.0:80"]
)
def test_any_other_has_to_be_declared(url):
    with pytest.raises(DPAlignError, match="declare is_trusted"):
        EngineConfig(url=url).validate()
    EngineConfig(url=url, is_trusted=True).validate()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://127.0.0.1", "ftp://127.0.0.1:8000", "http://me:secret@127.0.0.1:8000",
            "http://127.0.0.1:8000/v1", "http://127.0.0.1:99999", "http://:8000"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url):
    with pytest.raises(DPAlignError, match="expected http://HOST:PORT"):
        EngineConfig(url=url).validate()


def test_a_recipe_says_where_it_is_wrong():
    with pytest.raises(DPAlignError, match=r"^ppo\.engine: url 'http://10\.0\.0\.1:1' is not this machine's own"):
        Recipe(ppo=settings("http://10.0.0.1:1")).check()
    with pytest.raises(
        DPAlignError, match=r"^ppo\.engine: model, is_trusted is of a server that samples: give its url"
    ):
        Recipe(ppo=PPOConfig(engine=EngineConfig(model="base", is_trusted=True))).check()


def test_a_name_that_leads_elsewhere_is_not_followed(monkeypatch):
    from dpalign.engines import wire

    class Elsewhere(wire.HTTPConnection):
        def connect(self):
            self.sock = self

        def getpeername(self):
            return ("10.0.0.1", 80)

        def close(self):
            self.sock = None

        def request(self, *_):
            raise AssertionError("sent")

    monkeypatch.setattr(wire, "HTTPConnection", Elsewhere)
    with pytest.raises(EngineError, match="leads to another machine"):
        wire.Wire("http://localhost:80", only_here=True).ask("/v1/completions", {"prompt": [1]})


def test_no_proxy_is_asked_and_no_redirect_followed(served, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert list(Engine(EngineConfig(url=served.url)).api.models()) == ["base"]

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(307)
            self.send_header("Location", f"{served.url}/v1/models")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_): ...

    other = HTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=other.handle_request, daemon=True).start()
    with pytest.raises(EngineError, match=r"refused to list its models \(307\)"):
        Engine(EngineConfig(url=f"http://127.0.0.1:{other.server_address[1]}")).api.models()
    other.server_close()


# What is pushed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_what_is_written_and_the_model_stays_as_it_is(kind, tmp_path):
    policy = tiny_policy(kind)
    layers = {"llama": (["q_proj", "v_proj"], ["q_proj", "up_proj"]), "gpt2": (["c_attn"], ["c_attn", "c_fc"])}[kind]
    for number, names in enumerate(layers):
        policy.add_adapter(f"stage{number}", AdapterConfig(r=2 + number, target_modules=names))
        moved(policy, 0.1)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    state = {n: p.clone() for n, p in policy.named_parameters()}
    policy.write_adapter(tmp_path, "base")
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(p, state[n]) for n, p in policy.named_parameters()) and len(state) == len(
        [*policy.parameters()]
    )
    ids = torch.arange(2, 12)[None]
    plain = PeftModel.from_pretrained(tiny_base(kind), tmp_path).eval()
    ours = policy(ids, torch.ones_like(ids), 10)[0]
    assert torch.allclose(plain(ids).logits, ours, atol=1e-5)
    with policy.reference():  # only what is on is written
        policy.write_adapter(tmp_path / "reference", "base")
        ours = policy(ids, torch.ones_like(ids), 10)[0]
    plain = PeftModel.from_pretrained(tiny_base(kind), tmp_path / "reference").eval()
    assert torch.allclose(plain(ids).logits, ours, atol=1e-5)
    with policy.base():
        assert policy.concatenated() == {}


# Agreement -------------------------------------------------------------------------------------------------------


def agreement(rounding: float = 0.0, dtype: torch.dtype = torch.float32) -> Agreement:
    found = Agreement(dtype, "http://here")
    found.rounding = rounding
    found.begin(torch.zeros(100, dtype=torch.float64), torch.full((100,), 1e-4, dtype=torch.float64))
    return found


def test_the_share_of_a_move_worked_by_hand():
    move = torch.full((100,), 2e-3, dtype=torch.float64)
    assert agreement().check(move, move + 1e-4) == pytest.approx(1.0)
    assert agreement().check(move, 0.7 * move + 1e-4) == pytest.approx(0.7)
    with pytest.raises(EngineError, match=r"its answer moved by 0\.00 of what it should, and is 0\.0019 nats away"):
        agreement().check(move, torch.full_like(move, 1e-4))
    with pytest.raises(EngineError, match=r"moved by -1\.00"):
        agreement().check(move, 1e-4 - move)
    with pytest.raises(EngineError, match=r"moved by 1\.50"):
        agreement().check(move, 1e-4 + 1.5 * move)
    with pytest.raises(EngineError, match=r"probe and is 0\.01 nats away \(rounding explains 0\.005\)|nats away"):
        agreement(rounding=1.0).check(move, move + 1e-2)
    with pytest.raises(EngineError, match="is inf nats away"):
        agreement().check(move, move * torch.nan)


def test_a_move_below_rounding_waits_for_the_next():
    """|moved|^2 = 100 * 4e-6; with rounding of 2e-3 half of it is no signal: 2e-4, of a deviation of 3.5e-5 (0.17)."""
    found, move = agreement(rounding=2e-3), torch.full((100,), 2e-3, dtype=torch.float64)
    start = found.trainer
    assert found.check(move, torch.full_like(move, 1e-4)) is None and found.trainer is start
    with pytest.raises(EngineError, match=r"moved by 0\.00"):  # twice as far: 1.4e-3, of a deviation of 7.7e-5
        found.check(2 * move, torch.full_like(move, 1e-4))
    assert found.check(2 * move, 2 * move + 1e-4) == pytest.approx(1600 / 1400) and found.trainer is not start


def test_rounding_here_and_there_averages_out():
    """Tokens round by as much as they move, and pushes are told from none."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return 0.01 * torch.randn(768, generator=generator, dtype=torch.float64)

    for _ in range(20):
        found = Agreement(torch.bfloat16, "http://here")
        found.rounding = 0.01 * 2**0.5 * 2**0.5  # of two answers here, and of two there
        move = 0.02 * torch.randn(768, generator=generator, dtype=torch.float64)
        stale = noise()
        found.begin(noise(), stale)
        assert found._share(move, torch.zeros_like(move)) == 0
        assert found.check(move + noise(), move + noise()) == pytest.approx(1, abs=0.35)


def test_the_distance_from_a_uniform_law_by_hand():
    assert kolmogorov(torch.tensor([0.25, 0.75], dtype=torch.float64)) == pytest.approx(0.25 * 2**0.5)
    assert kolmogorov(torch.tensor([0.9, 0.9, 0.9, 0.9], dtype=torch.float64)) == pytest.approx(0.9 * 2)


# An engine that is tried --------------------------------------------------------------------------------------


def test_an_engine_that_does_what_it_should(served):
    policy = tiny_policy("llama")
    state = torch.get_rng_state()
    engine = reach(settings(served.url), policy)
    assert torch.equal(torch.get_rng_state(), state) and policy.adapters == []
    policy.add_adapter("ppo", AdapterConfig())
    engine.push(policy)
    for _ in range(3):
        moved(policy)
        engine.push(policy)
    rows = [[5, 6, 7, 8], [9, 10]]
    for ours, theirs in zip(Local().logprobs(policy, rows), engine.logprobs(policy, rows), strict=True):
        assert len(ours) == len(theirs) and torch.allclose(ours, theirs, atol=1e-5)
    assert len(served.adapters) == 1  # older ones are unloaded
    pushed = served.loads
    engine.push(policy)
    assert served.loads == pushed  # the same weights, asked again and not pushed again
    engine.close()
    assert not served.adapters


@pytest.mark.parametrize(
    ("fault", "after", "said"),
    [
        ("never", 0, "moved by 0.00 of what it should"),
        ("stale", 2, "moved by 0.00 of what it should"),
        ("half", 0, "nats away"),
        ("temperature", 0, "samples by another law"),
        ("top_p", 0, "samples by another law"),
        ("one_seed", 0, "samples by another law"),
        ("crash", 0, "refused the public probe (500)"),
    ],
)
def test_a_fault_is_found_before_anything_is_drawn(fault, after, said, served, monkeypatch):
    monkeypatch.setattr(engines, "LAW_TOKENS", 600)
    served.planted, served.after = fault, after
    with pytest.raises(EngineError) as error:
        reach(settings(served.url), tiny_policy("llama"))
    assert said in str(error.value) and str(error.value).count("\n") == 0


def test_another_model_is_found():
    torch.manual_seed(1)
    base = tiny_base("llama")
    with torch.no_grad():
        base.lm_head.weight += 0.05 * torch.randn_like(base.lm_head.weight)
    with serving(Served(base)) as url, pytest.raises(EngineError, match="computes with another model than this run"):
        reach(settings(url), tiny_policy("llama"))


def test_another_vocabulary_is_found():
    base = tiny_base("llama")
    base.resize_token_embeddings(20)
    with serving(Served(base)) as url, pytest.raises(EngineError, match="serves another model or vocabulary"):
        reach(settings(url), tiny_policy("llama"))


@pytest.mark.parametrize("is_said", [True, False])
def test_a_short_context_is_found(is_said, monkeypatch):
    served = Served(tiny_base("llama"), max_model_len=30)
    config = settings("http://127.0.0.1:1", max_prompt_length=28)
    listed = served.answer("/v1/models", None)
    if not is_said:
        monkeypatch.setattr(served, "answer", silent(served, listed))
    with serving(served) as url, pytest.raises(EngineError) as error:
        config.engine.url = url
        reach(config, tiny_policy("llama"))
    said = "--max-model-len 33" if is_said else "refused public prompts of the stage's lengths"
    assert said in str(error.value)


def silent(served, listed):
    """Answers without the longest sequence."""
    plain = served.answer

    def answer(path, asked):
        if path == "/v1/models":
            return {"data": [{"id": one["id"]} for one in listed["data"]]}
        return plain(path, asked)

    return answer


def test_nobody_there_and_no_such_model(served):
    with pytest.raises(EngineError, match=r"does not answer \(ConnectionRefusedError\): start it"):
        reach(settings(f"http://127.0.0.1:{free_port()}"), tiny_policy("llama"))
    config = settings(served.url)
    config.engine.model = "other"
    with pytest.raises(EngineError, match=r"serves no model 'other' \(it serves: base\)"):
        reach(config, tiny_policy("llama"))


# Rollouts --------------------------------------------------------------------------------------------------------


def stage(url: str, reward=None, **more) -> PPO:
    scores = reward or (lambda prompts, completions, **_: [1.0] * len(completions))
    return PPO(settings(url, **more), Reward(scores, -5, 5))


def test_only_verified_weights_are_sampled_from(served):
    policy, algorithm = tiny_policy("llama"), stage(served.url)
    algorithm.generator = reach(algorithm.config, policy)
    algorithm.setup(policy)
    with pytest.raises(EngineError, match="was not pushed the weights"):
        algorithm.rows(policy, [[]], [SystemEntropy()])
    algorithm.before_draw(policy)
    asked = len(served.requests)
    units = encode_units(algorithm, policy, [[{"prompt": words(4, seed)}] for seed in range(6)])
    rows = rows_of_units(algorithm, policy, units, [SystemEntropy()] * len(units))
    sent = served.requests[asked:]
    assert sorted(one["prompt"] for one in sent) == sorted(unit[0].ids for unit in units)
    assert len({one["seed"] for one in sent}) == 6 and all(0 <= one["seed"] < 2**63 for one in sent)
    for name, value in {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}.items():
        assert all(one[name] == value for one in sent)
    assert rows.tensors["input_ids"].shape == (6, 13) and rows.unit.tolist() == [*range(6)]
    assert rows.tensors["completion_mask"].sum(1).min() >= 1
    moved(policy)
    with pytest.raises(EngineError, match="was not pushed the weights"):
        rows_of_units(algorithm, policy, units, [SystemEntropy()] * len(units))
    served.planted = "stale"
    with pytest.raises(EngineError, match="nothing was sampled with them"):
        algorithm.before_draw(policy)
    with pytest.raises(EngineError, match="was not pushed the weights"):
        rows_of_units(algorithm, policy, units, [SystemEntropy()] * len(units))


def test_a_prompt_that_is_refused_adds_zero_alone(served):
    policy, algorithm = tiny_policy("llama"), stage(served.url)
    algorithm.generator = reach(algorithm.config, policy)
    algorithm.setup(policy)
    algorithm.before_draw(policy)
    units = encode_units(algorithm, policy, [[{"prompt": f"w{number} w7"}] for number in (1, 2, 3)])
    served.planted, served.refused = "refuse", {units[1][0].ids[0]}
    rows = rows_of_units(algorithm, policy, units, [SystemEntropy()] * len(units))
    assert rows.unit.tolist() == [0, 2]
    served.planted = "crash"  # of everything: that is nobody's own matter
    with pytest.raises(EngineError) as error:
        rows_of_units(algorithm, policy, units, [SystemEntropy()] * len(units))
    assert (
        str(error.value)
        == f"the rollout engine at {served.url} fails (500): start it again, and the same command goes on."
    )
    served.planted = "lose"
    with pytest.raises(EngineError, match="has lost its adapter"):
        rows_of_units(algorithm, policy, units, [SystemEntropy()] * len(units))


def test_what_the_stage_started_from_is_pushed_where_that_is_sampled(served):
    config = OfflineConfig(
        engine=EngineConfig(url=served.url), max_prompt_length=8, max_completion_length=5, num_generations=2
    )
    algorithm, policy = Offline(config, Reward(lambda p, c, **_: [1.0] * len(c), -5, 5)), tiny_policy("llama")
    algorithm.generator = reach(config, policy)
    algorithm.setup(policy)
    loads = served.loads
    algorithm.before_draw(policy)
    moved(policy)
    algorithm.before_draw(policy)  # what it learns changes nothing
    assert served.loads == loads
    asked = len(served.requests)
    algorithm.rows(policy, encode_units(algorithm, policy, [[{"prompt": "w3 w4"}]]), [SystemEntropy()])
    sent = served.requests[asked:]
    assert [one["model"] for one in sent] == ["base", "base"] and sent[0]["seed"] != sent[1]["seed"]


def test_a_completion_ends_where_it_stops():
    policy = tiny_policy("llama")
    ids, mask = policy.encode_prompts([[5, 6], [7]], 3)
    rollouts = rollouts_of(policy, ids, mask, [[8, 1], [9, 10, 11, 12]], 4)
    assert rollouts.input_ids.tolist() == [[0, 5, 6, 8, 1, 0, 0], [0, 0, 7, 9, 10, 11, 12]]
    assert rollouts.attention_mask.tolist() == [[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert rollouts.completion_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert rollouts_of(policy, ids[:0], mask[:0], [], 4).input_ids.shape == (0, 7)


def test_an_answer_that_breaks_the_rules_is_none(served):
    api, config = Engine(EngineConfig(url=served.url)).api, settings(served.url)

    def read(tokens: list, stops=(1,)) -> list[int] | None:
        said = {"tokens": tokens, "token_logprobs": []}
        return api._ids({"choices": [{"logprobs": said}]}, config, list(stops))

    assert read(["token_id:5", "token_id:1", "token_id:7"]) == [5, 1]
    assert read([f"token_id:{n}" for n in range(2, 7)]) == [2, 3, 4, 5, 6]
    assert read(["token_id:5"]) is None and read([f"token_id:{n}" for n in range(2, 9)]) is None
    assert read(["a", "token_id:1"]) is None and read([]) is None
    assert api._ids(None, config, [1]) is None and api._ids({"choices": []}, config, [1]) is None


def test_seeds_come_from_the_secret_coins():
    class Coins(SystemEntropy):
        def __init__(self):
            self.asked = 0

        def bytes(self, count):
            self.asked += count
            return bytes([255 - self.asked // 8] * count)

    coins = Coins()
    assert seeds_of([coins, coins], 2) == [
        int.from_bytes(b"\xfe" * 8, "big") >> 1,
        int.from_bytes(b"\xfd" * 8, "big") >> 1,
    ]
    torch.manual_seed(3)
    public = seeds_of(None, 3)
    torch.manual_seed(3)
    assert seeds_of(None, 3) == public and len(set(public)) == 3


# A whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_served() -> Iterator[Served]:
    made = Served(AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32))
    with serving(made) as url:
        made.url = url
        yield made


def test_a_run_samples_by_its_engine_and_says_so(small_served, tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo={"engine": {"url": small_served.url}})
    assert call(capsys, "run", recipe, "--json").status == 0
    said = [line for line in statement(tmp_path / "run")["assumptions"] if "private prompts" in line]
    assert len(said) == 1 and said[0].startswith("stage ppo sent private prompts to a server on the same machine")
    assert "127.0.0.1" not in said[0] and not small_served.adapters
    # Six tokens a prompt at most, of the drawn units alone; nothing of it lies in the run's folder or the engine's.
    private = [one for one in small_served.requests if one["path"] == "/v1/completions" and one["max_tokens"] == 6]
    assert private and all(len(one["prompt"]) <= 5 for one in private)


def test_a_failing_engine_stops_a_run_that_goes_on(small_served, tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo={"engine": {"url": small_served.url}, "max_steps": 3})
    small_served.planted, small_served.after = "stale", 5  # two are tried, one is without a step, one has one, one two
    stopped = call(capsys, "run", recipe)
    assert (
        "does not compute with the weights that were pushed" in stopped.error and "nothing was sampled" in stopped.error
    )
    drawn = ledger_rows(tmp_path, stage="ppo")
    assert drawn == small_served.loads - 3  # every push but the last was followed by a draw
    small_served.planted = None
    assert call(capsys, "run", recipe).status == 0
    assert ledger_rows(tmp_path, stage="ppo") == 3  # nothing was lost, and nothing drawn twice
    assert statement(tmp_path / "run")["epsilon"] <= 2


def test_a_plan_tries_the_engine_too(tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo={"engine": {"url": f"http://127.0.0.1:{free_port()}"}})
    assert "does not answer" in call(capsys, "plan", recipe).error
    assert "does not answer" in call(capsys, "run", recipe).error
    assert ledger_rows(tmp_path) == 0 if (tmp_path / "ledger.sqlite").exists() else True


def test_private_pairs_need_no_engine():
    with pytest.raises(DPAlignError, match="engine is for prompts that are no one's"):
        Recipe(dpo=DPOConfig(engine=EngineConfig(url="http://127.0.0.1:1"))).check()


def test_many_processes_share_no_engine(served, tmp_path):
    """They would sample from weights that were pushed by none of them."""

    run = Run.__new__(Run)
    run.plan = SimpleNamespace(order={"ppo": RecipeStage("ppo", settings(served.url))})
    run.workspace, run.world = SimpleNamespace(private=tmp_path), SimpleNamespace(size=2)
    with pytest.raises(DPAlignError, match=r"^ppo\.engine: an engine samples for one process, and the run has 2"):
        run.reach_engines()
