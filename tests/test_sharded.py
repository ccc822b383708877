"""A base that processes hold together computes what a whole one does, whatever each of the processes does with it."""

from __future__ import annotations

import gc
import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from dpalign import world as world_module
from dpalign.errors import DPAlignError
from dpalign.evaluation import private
from dpalign.models import AdapterConfig, ModelConfig, Policy, RewardModel
from dpalign.models import sharded as sharding
from dpalign.models.sharded import AT_ONCE, Saved, Shards, is_placeholder, shards_of
from dpalign.models.verify import probe_ids, probe_logits
from dpalign.rewards.foreign import Raised, contained
from dpalign.training import self_check
from dpalign.training.loop import Worker
from dpalign.world import ALONE, LostProcess, LostProcessError, Processes, joined
from helpers import call, ledger_rows, reviews, statement, write_jsonl, write_recipe
from test_many_processes import (
    LONG,
    LOST,
    SEEDED,
    STAGES,
    dies_in,
    difference,
    forked,
    killed,
    learned_recipe,
    lines,
    recipe_in,
    released,
    together,
)
from tiny import VOCABULARY, tiny_base, tiny_folder, tiny_tokenizer


def held(model: torch.nn.Module) -> int:
    """Bytes of all that a model's weights lie in, adapters aside."""
    weights = [p for name, p in model.named_parameters() if ".lora_" not in name]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in weights}.values())


def trained(policy: Policy) -> Policy:
    torch.manual_seed(1)
    has_experts = any(hasattr(module, "num_experts") for module in policy.modules())
    policy.add_adapter("sft", AdapterConfig(r=2, target_modules=["q_proj", "v_proj"] if has_experts else "all-linear"))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    return policy


def passes(policy: Policy, rows: int, checkpointed: bool) -> list[torch.Tensor]:
    """Log-probabilities of rows, and the gradient of their sum."""
    ids = torch.arange(2, 2 + rows * 9).view(rows, 9) % 90 + 2
    policy.checkpoint_activations(checkpointed)
    found, _ = policy.logprobs(ids[:, :-1], torch.ones_like(ids[:, :-1]), ids[:, 4:])
    found.sum().backward()
    policy.checkpoint_activations(False)
    grads = [p.grad for p in policy.parameters() if p.requires_grad]
    for p in policy.parameters():
        p.grad = None
    return [found.detach(), *(g.clone() for g in grads if g is not None)]


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gpt2", "float32"), ("llama", "bfloat16"), ("gemma2", "float32"), ("mixtral", "float32")]
)
def test_a_base_in_parts_computes_what_a_whole_one_does(kind, dtype, tmp_path):
    """Logits, gradients, completions and wide logits; each process makes another number of passes, in another order."""
    folder = tiny_folder(kind, tmp_path / kind)

    def body(rank: int) -> int:
        whole = trained(Policy.load(ModelConfig(str(folder), dtype=dtype)))
        for name in ("full", "training"):
            own = trained(Policy.load(ModelConfig(str(folder), dtype=dtype, sharding=name)))
            shards = shards_of(own.model.get_base_model())
            assert held(own) < held(whole) / 8 and shards.kept < 0.55 * shards.total
            for turn in range(1 + 2 * rank):
                assert same(passes(own, 1 + rank, turn % 2 == 1), passes(whole, 1 + rank, turn % 2 == 1))
            prompts = torch.full((2 + rank, 3), 5)
            written = []
            for policy in (own, whole):
                torch.manual_seed(rank)
                with policy.merged() if policy is own else torch.no_grad():
                    written.append(policy.generate(prompts, torch.ones_like(prompts), 4 + 3 * rank).input_ids)
            assert torch.equal(*written)
            wide = [probe_logits(policy.model, probe_ids(policy)) for policy in (own, whole)]
            assert torch.equal(*wide) and wide[0].isfinite().all()
            assert len(shards._gathered) <= AT_ONCE and held(own) < held(whole) / 8
            joined().share()
            assert not shards._gathered  # a process that waits holds its parts alone
        return 0

    assert [e.status for e in forked(tmp_path, 3, body)] == [0, 0, 0], (tmp_path / "err-0").read_text()


def test_autograd_keeps_no_weight(tmp_path):
    """But where it is, so that what the backward pass needs is put together for it."""
    folder = tiny_folder("llama", tmp_path / "llama")

    def body(rank: int) -> int:
        policy = trained(Policy.load(ModelConfig(str(folder), dtype="float32", sharding="full")))
        shards, said = policy.shards, []
        pack, unpack = shards.pack, shards.unpack
        shards.pack = lambda tensor: (said.append((tuple(tensor.shape), type(pack(tensor)))), pack(tensor))[1]
        shards.unpack = lambda saved: (said.append(("needed", type(saved))), unpack(saved))[1]
        passes(policy, 2, checkpointed=False)
        weights = {shape for p in policy.parameters() if is_placeholder(p) for shape in (p.shape, p.shape[::-1])}
        kept = [kind for shape, kind in said if shape in weights]
        assert len(kept) == 12 and set(kept) == {Saved} and said.count(("needed", Saved)) == len(kept)
        joined().share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_sampling_puts_a_base_together_once_or_for_each_token(tmp_path):
    folder = tiny_folder("llama", tmp_path / "llama")

    def body(rank: int) -> int:
        asked, whole, prompts = [], joined().whole, torch.full((2, 3), 5)
        joined().whole = lambda number: (asked.append(number), whole(number))[1]
        for kind, often in (("training", 1), ("full", 7)):
            policy = Policy.load(ModelConfig(str(folder), dtype="float32", sharding=kind))
            joined().share()
            asked.clear()
            with policy.merged():
                policy.generate(prompts, torch.ones_like(prompts), 7, min_new_tokens=7)
            assert Counter(asked) == dict.fromkeys(asked, often) and len(set(asked)) == 4
            joined().share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_no_more_blocks_are_whole_than_two(tmp_path):
    """Those that are handed out to others are, while they wait, in nobody's way."""
    tiny_base("llama").config.save_pretrained(tmp_path / "c")
    folder = tmp_path / "llama"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "c", num_hidden_layers=8)).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)

    def body(rank: int) -> int:
        policy, most = trained(Policy.load(ModelConfig(str(folder), dtype="float32", sharding="full"))), [0]
        gather = world_module.dist.all_gather_into_tensor
        blocks = {part.numel() * 2 for part in joined()._kept}

        def counted(whole, part, group=None):
            if whole.dtype is torch.uint8:
                here = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype is torch.uint8]
                here += [p for p in policy.parameters() if not is_placeholder(p)]
                found = {o.untyped_storage().data_ptr() for o in here if o.untyped_storage().nbytes() in blocks}
                most[0] = max(most[0], len(found))
            return gather(whole, part, group=group)

        world_module.dist.all_gather_into_tensor = counted
        for turn in range(1 + rank):
            passes(policy, 2, checkpointed=turn == 1)
        joined().share()
        assert most[0] <= 2
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_checkpointing_sees_what_a_layer_with_many_operations_keeps(tmp_path):
    """Of the experts, which have weights of their own and compute much with them."""
    folder = tiny_folder("mixtral", tmp_path / "mixtral")

    def body(rank: int) -> int:
        seen = {}
        for kind in ("none", "full"):
            policy, kept = trained(Policy.load(ModelConfig(str(folder), dtype="float32", sharding=kind))), []
            weights = {n for p in policy.parameters() for n in (p.numel(), p[0].numel() if p.ndim == 3 else 0)}
            ids = torch.arange(2, 20).view(2, 9)
            with saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
                found, _ = policy.logprobs(ids[:, :-1], torch.ones_like(ids[:, :-1]), ids[:, 4:])
            found.sum().backward()
            seen[kind] = sorted(number for number in kept if number not in weights)
        assert seen["none"] == seen["full"] and len(seen["full"]) > 50
        joined().share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_a_layer_that_computes_with_anothers_weights_is_refused(tmp_path):
    """Mamba's mixer takes its projection's weight without calling the projection; convolutions stay whole."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 1}
    kinds = {
        "mamba": {"state_size": 4, "num_hidden_layers": 2},
        "recurrent_gemma": {
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "lru_width": 32,
        },
    }  # fmt: skip
    for kind, more in kinds.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).save_pretrained(tmp_path / kind)
        tiny_tokenizer().save_pretrained(tmp_path / kind)

    def body(rank: int) -> int:
        for kind in ("none", "full"):
            if kind == "none":
                Policy.load(ModelConfig(str(tmp_path / "mamba"), dtype="float32"))
                continue
            with pytest.raises(DPAlignError, match="a layer of MambaForCausalLM computes with the weights of another"):
                Policy.load(ModelConfig(str(tmp_path / "mamba"), dtype="float32", sharding=kind))
        whole, own = (
            Policy.load(ModelConfig(str(tmp_path / "recurrent_gemma"), dtype="float32", sharding=k))
            for k in ("none", "full")
        )
        prompts, written = torch.full((2, 3), 5), []
        for policy in (whole, own):
            torch.manual_seed(rank)
            written.append(policy.generate(prompts, torch.ones_like(prompts), 6).input_ids)
        assert torch.equal(*written)
        joined().share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_a_new_head_may_differ_when_a_base_is_spread(tmp_path):
    folder = tiny_folder("llama", tmp_path / "llama")

    def body(rank: int) -> int:
        torch.manual_seed(rank)  # the head, which is not in the folder, is random until it is made zero
        RewardModel.load(ModelConfig(str(folder), dtype="float32", sharding="full"))
        joined().share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_a_round_that_fails_ends_the_run_whoever_contains_it(tmp_path):
    def body(rank: int) -> int:
        world = joined()
        number = world.keep([torch.tensor([rank])], lambda: None)
        if rank == 0:
            with pytest.raises(LostProcess):
                world.whole(number)
            return 0
        world._kept[number] = None  # no room for all of it, say
        with pytest.raises(LostProcess, match="weights could not be put together here"):
            contained(lambda: world.whole(number))  # in a person's reward
        world._kept[number] = torch.tensor([rank])
        with pytest.raises(LostProcess):
            world.share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-1").read_text()


def test_a_reward_cannot_end_a_run_with_what_a_lost_process_raises():
    with pytest.raises(Raised):
        contained(lambda: _raise(LostProcess(LostProcessError("a row says so"))))


def _raise(error: BaseException) -> None:
    raise error


def test_a_reward_model_shares_the_parts(tmp_path):
    folder = tiny_folder("llama", tmp_path / "llama")

    def body(rank: int) -> int:
        whole, own = (
            RewardModel.from_policy(trained(Policy.load(ModelConfig(str(folder), dtype="float32", sharding=kind))))
            for kind in ("none", "full")
        )
        for model in (whole, own):
            with torch.no_grad():
                model.head.weight.fill_(0.1)
        texts = ["w1 w2 w3", "w4"][: 1 + rank]
        assert held(own) < held(whole) / 8
        assert torch.equal(own.score(texts), whole.score(texts)) and whole.score(texts).abs().min() > 0
        joined().share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_who_only_waits_hands_out_its_parts_and_most_wishes_come_first(tmp_path):
    def body(rank: int) -> int:
        world = joined()
        waited = []
        first = world.keep([torch.tensor([10 * number + rank]) for number in range(3)], lambda: waited.append(rank))
        wanted = [[2], [0, 2], []][rank]  # 2 is wished for by one at first: the smaller number has its turn
        for number in wanted:
            assert world.whole(first + number).tolist() == [10 * number + r for r in range(3)]
        assert world.share(rank) == 0
        number, _ = world._round(first + min(rank, 1))
        assert number == first + 1
        if rank == 0:
            world.whole(first)
        assert world.deal(["a", "b", "c"]) == "abc"[rank] and waited == [rank] * 2
        world.forget()
        assert world.share(rank) == 0 and waited == [rank] * 3  # as before anything was kept
        return 0

    assert [e.status for e in forked(tmp_path, 3, body)] == [0, 0, 0], (tmp_path / "err-0").read_text()


def test_what_is_raised_in_a_layer_leaves_no_weight_behind(tmp_path):
    folder = tiny_folder("llama", tmp_path / "llama")

    def body(rank: int) -> int:
        policy = Policy.load(ModelConfig(str(folder), dtype="float32", sharding="full"))
        layer = policy.model.model.layers[0].mlp.up_proj
        with pytest.raises(RuntimeError):
            layer(torch.zeros(2, 5))
        assert is_placeholder(layer.weight) and layer.weight.isnan().all()
        kept = torch.zeros(2, requires_grad=True).exp()  # nobody's hooks are left on what autograd keeps
        assert type(kept.grad_fn._saved_result) is torch.Tensor
        joined().share()
        return 0

    assert [e.status for e in forked(tmp_path, 2, body)] == [0, 0], (tmp_path / "err-0").read_text()


def test_one_process_holds_the_whole_base(tmp_path):
    folder = tiny_folder("gpt2", tmp_path / "gpt2")
    policy = Policy.load(ModelConfig(str(folder), dtype="float32", sharding="full"))
    assert joined() is ALONE and held(policy) == held(Policy.load(ModelConfig(str(folder), dtype="float32")))
    with policy.merged():
        assert not any(map(is_placeholder, policy.parameters()))


# Runs ------------------------------------------------------------------------------------------------------------------


def spread(recipe: Path, kind: str) -> Path:
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    settings.setdefault("model", {})["sharding"] = kind
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One process, which draws its completions without merged weights, as those do that hold a base together."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    folder.parent.mkdir(exist_ok=True)
    ended = together(folder.parent, 1, "run", spread(recipe_in(folder), "full"), "--json")
    assert ended[0].status == 0, ended
    return folder


def note(folder: Path):
    """Has each process write down what it holds when a stage begins, and how much is in its parts."""

    def before(rank: int) -> None:
        start = Worker._start_alike

        def noted(self) -> None:
            start(self)
            shards = self.model.shards
            found = {"held": held(self.model), "kept": shards.kept, "total": shards.total}
            (folder / f"held-{rank}.json").write_text(json.dumps(found))

        Worker._start_alike = noted

    return before


@pytest.mark.parametrize(("size", "kind"), [(2, "training"), (4, "full")])
def test_the_release_is_that_of_one_process(size, kind, whole, tmp_path):
    folder = tmp_path / "together"
    ended = together(tmp_path, size, "run", spread(recipe_in(folder), kind), "--json", before=note(tmp_path))
    assert [e.status for e in ended] == [0] * size, ended
    assert difference(released(folder), released(whole)) < 1e-6
    assert lines(folder) == lines(whole) and ledger_rows(folder) == 5
    for rank in range(size):
        found = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert found["kept"] < found["total"] / size * 1.01 and found["held"] < found["total"] / 20


def test_a_process_without_units_hands_out_its_parts(tmp_path):
    """Of one unit a sample, three of four processes compute nothing, and of an empty sample all of them."""
    few = {"sft": SEEDED | {"max_steps": 4, "expected_batch_size": 1}, "ppo": None}
    runs = [(4, "full"), (1, "full")]
    for size, kind in runs:
        recipe = spread(recipe_in(tmp_path / str(size), **few), kind)
        assert {e.status for e in together(tmp_path, size, "run", recipe, "--json")} == {0}
    assert difference(released(tmp_path / "4"), released(tmp_path / "1")) < 1e-6


def test_a_learned_reward_on_a_base_in_parts(tmp_path):
    for size in (1, 2):
        recipe = spread(learned_recipe(tmp_path / str(size)), "full")
        ended = together(tmp_path, size, "run", recipe, "--json")
        assert [e.status for e in ended] == [0] * size, ended
    assert difference(released(tmp_path / "2"), released(tmp_path / "1")) < 1e-6


def test_a_lost_process_ends_all_and_the_run_goes_on_with_fewer(tmp_path):
    """World size 4, then 2 that hold it together, then one that holds it alone, under a target."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = spread(write_recipe(folder, **LONG), "full")
    four = together(tmp_path, 4, "run", recipe, "--json", before=dies_in(4, 2, killed))
    assert [e.status for e in four] == [1, 1, -signal.SIGKILL, 1]
    assert LOST in four[0].err and four[0].err.count("dpalign: ") == 1
    two = together(tmp_path, 2, "run", recipe, "--json", before=dies_in(3, 0, killed))
    assert [e.status for e in two] == [-signal.SIGKILL, 1] and LOST in two[1].err
    one = together(tmp_path, 1, "run", spread(recipe, "none"), "--json")
    assert one[0].status == 0, one
    assert json.loads(one[0].out)["epsilon"] <= 2 and "steps were lost" in one[0].err
    assert statement(folder / "run")["private"]


def test_a_process_that_ends_while_layers_are_put_together_ends_all(tmp_path):
    def dies(rank: int) -> None:
        block, count = Shards._block, [0]

        def dying(self, number):
            count[0] += 1
            if rank == 1 and count[0] == 40:
                killed()
            return block(self, number)

        Shards._block = dying

    folder = tmp_path / "run"
    folder.mkdir()
    ended = together(tmp_path, 2, "run", spread(write_recipe(folder, **LONG), "full"), "--json", before=dies)
    assert [e.status for e in ended] == [1, -signal.SIGKILL] and LOST in ended[0].err
    assert "Traceback" not in ended[0].err


def dies_while(what: str, flag: Path):
    """Process 1 dies at the next round after the first process has begun `what`, a function of `evaluation/private.py`, or
    the self-check."""

    def before(rank: int) -> None:
        place = self_check.SelfCheck if what == "run" else private
        known, rounds, count = getattr(place, what), Processes._round, [0]

        def begun(*arguments, **settings):
            flag.touch()
            return known(*arguments, **settings)

        def dying(self, wish):
            count[0] += flag.exists()
            if rank == 1 and count[0] == 1:
                killed()
            return rounds(self, wish)

        setattr(place, what, begun)
        Processes._round = dying

    return before


def test_a_measurement_is_not_made_of_what_a_lost_process_left(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_jsonl(folder / "held.jsonl", reviews(64, "day"))
    held_out = {
        "measurement": {"noise_multiplier": 0.05},
        "measurement_data": {"name": "held", "path": str(folder / "held.jsonl")},
    }
    recipe = spread(write_recipe(folder, target_epsilon=1000, units_disjoint="declared", **held_out), "full")
    ended = together(tmp_path, 2, "run", recipe, "--json", before=dies_while("_measured_once", tmp_path / "begun"))
    assert [e.status for e in ended] == [1, -signal.SIGKILL] and LOST in ended[0].err, ended[0].err
    assert not [*(folder / "run").rglob("result.json")]


@pytest.mark.self_check
def test_a_process_that_ends_during_the_self_check_is_no_fault_of_the_model(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = spread(write_recipe(folder, **LONG), "full")
    ended = together(tmp_path, 2, "run", recipe, before=dies_while("run", tmp_path / "begun"))
    assert [e.status for e in ended] == [1, -signal.SIGKILL] and ledger_rows(folder) == 0
    assert LOST in ended[0].err and "refused" not in ended[0].err


def test_another_base_in_one_process_is_refused_before_anything_is_put_together(tmp_path):
    def other_weights(rank: int) -> None:
        checked = sharding.checksums
        sharding.checksums = lambda *given: {name: v + (rank == 1) for name, v in checked(*given).items()}

    folder = tmp_path / "run"
    folder.mkdir()
    ended = together(tmp_path, 2, "run", spread(write_recipe(folder, **LONG), "full"), before=other_weights)
    assert [e.status for e in ended] == [1, 1] and ledger_rows(folder) == 0
    assert "1 of 2 processes have other weights than the first one" in ended[0].err


def test_what_needs_the_whole_base_is_refused(tmp_path, capsys):
    ppo = STAGES["ppo"] | {"adapter": {"r": 2, "freeze_a": True, "init_a": "synthetic_gradient"}}
    refused = call(capsys, "run", spread(write_recipe(tmp_path, ppo=ppo), "training"))
    assert "ppo.adapter.init_a synthetic_gradient needs the whole base in every process" in refused.error
    with pytest.raises(Exception, match="sharding full: a quantised base"):
        Policy.load(
            ModelConfig(str(tiny_folder("gpt2", tmp_path / "g")), dtype="float32", sharding="full", quantization="nf4")
        )


def test_a_run_goes_on_with_another_sharding():
    """It changes nothing that is released."""
    from dpalign.training.loop import hash_of

    assert hash_of({"model": {"name_or_path": "m", "sharding": "full"}}) == hash_of({"model": {"name_or_path": "m"}})
