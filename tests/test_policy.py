"""Stacked adapters: what trains, what is frozen, what generation sees; which adapters and models can be a policy."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.activations import GELUActivation

from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Policy, RewardModel
from dpalign.models.lora import FIELDS, check_to_train, refused_fields
from dpalign.models.verify import check_release
from tiny import VOCABULARY, tiny_base, tiny_folder, tiny_object, tiny_policy, tiny_tokenizer


def stacked(kind: str = "llama") -> Policy:
    policy = tiny_policy(kind)
    policy.add_adapter("sft", AdapterConfig(r=2))
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        if ".sft." in name:
            torch.nn.init.normal_(p, std=0.3)
    policy.finish_stage()
    policy.add_adapter("ppo", AdapterConfig(r=1, freeze_a=True))
    for name, p in policy.named_parameters():
        if "lora_B.ppo." in name:
            torch.nn.init.normal_(p, std=0.3)
    policy.add_value_head()
    return policy


def trainable(policy: Policy) -> set[str]:
    return {name for name, p in policy.named_parameters() if p.requires_grad}


def prompts(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    return policy.encode_prompts([[3, 4, 5], [6, 7], [8, 9, 10]], 4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_switching_adapters_never_changes_what_trains(kind):
    policy = stacked(kind)
    before = trainable(policy)
    assert before and all("lora_B.ppo." in n or n.startswith("value_head.") for n in before)
    ids, mask = prompts(policy)
    for switch in (policy.reference, policy.base, policy.merged):
        with switch():
            policy.generate(ids, mask, 3)
        assert trainable(policy) == before
    with policy.reference(), policy.merged():
        policy.generate(ids, mask, 3)
    assert trainable(policy) == before


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_weights_are_the_same_law_and_leave_no_trace(kind):
    policy = stacked(kind)
    ids, mask = prompts(policy)
    original = {n: p.clone() for n, p in policy.named_parameters()}
    plain = policy(ids, mask, 4)[0]
    with policy.merged():
        merged = policy(ids, mask, 4)[0]
    assert (plain - merged).abs().max() < 1e-5
    assert all(torch.equal(p, original[n]) for n, p in policy.named_parameters())


def test_reference_is_the_model_before_the_newest_stage():
    policy, before = stacked(), tiny_policy("llama")
    ids, mask = prompts(policy)
    with policy.base():
        assert torch.equal(policy(ids, mask, 4)[0], before(ids, mask, 4)[0])
    with policy.reference():
        reference = policy(ids, mask, 4)[0]
        with policy.merged():
            assert (policy(ids, mask, 4)[0] - reference).abs().max() < 1e-5
    for name, p in policy.named_parameters():
        if "lora_B.ppo." in name:
            p.data.zero_()
    assert (policy(ids, mask, 4)[0] - reference).abs().max() < 1e-6
    assert (reference - before(ids, mask, 4)[0]).abs().max() > 1e-2


def test_a_base_with_dropout_has_none():
    policy = tiny_policy("gpt2")
    policy.train()
    ids, mask = prompts(policy)
    assert torch.equal(policy(ids, mask, 4)[0], policy(ids, mask, 4)[0])


def test_the_head_reads_one_block():
    """`generate` cuts the last states out of the prompt's; a product for each row would copy bfloat16 weights for each."""
    policy, blocks = tiny_policy("llama"), []
    policy.model.get_output_embeddings().register_forward_pre_hook(lambda m, x: blocks.append(x[0].is_contiguous()))
    policy.generate(*prompts(policy), 3)
    assert len(blocks) == 3 and all(blocks)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu"])
def test_gelu_is_one_pass_over_memory_and_the_same_function(activation):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, activation_function=activation,
        initializer_range=0.5,
    )  # fmt: skip
    base = GPT2LMHeadModel(config)
    ids = torch.randint(VOCABULARY, (4, 8))
    with torch.no_grad():
        plain = base.eval()(ids).logits
        policy = Policy(base, tiny_tokenizer())
        logits, _ = policy(ids, torch.ones_like(ids), 8)
        again, _ = Policy(base, tiny_tokenizer())(ids, torch.ones_like(ids), 8)
    activations = [type(module.act.function) for name, module in base.named_modules() if name.endswith(".mlp")]
    assert activations == [nn.GELU if activation != "gelu" else GELUActivation] * 2 and torch.equal(again, logits)
    assert plain.abs().max() > 1 and (logits - plain).abs().max() < 1e-5


# What ends a completion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [[7, 8], 7, None, [7, 4000, -1]])
def test_rollouts_stop_at_every_eos_id(named):
    base, tokenizer = tiny_base("llama"), tiny_tokenizer()
    base.generation_config = GenerationConfig(eos_token_id=named)
    policy = Policy(base, tokenizer)
    stops = {1} | {i for i in (named if isinstance(named, list) else [named]) if i is not None and 0 <= i < VOCABULARY}
    assert policy.stop_ids == sorted(stops)
    ids, mask = policy.encode_prompts([[3, 4, 5]] * 4000, 3)
    torch.manual_seed(0)
    rollouts = policy.generate(ids, mask, 24, min_new_tokens=2)
    last, lengths = set(), set()
    for row, inside in zip(rollouts.completion_ids.tolist(), rollouts.completion_mask.tolist(), strict=True):
        length = int(sum(inside))
        assert not stops & set(row[: length - 1]) and inside == [1.0] * length + [0.0] * (24 - length) and length > 2
        last.add(row[length - 1])
        lengths.add(length)
        assert length == 24 or row[length - 1] in stops
    assert last >= stops and min(lengths) == 3
    found = policy.completion_logprobs(rollouts, 2)[0]
    with torch.no_grad():
        logits = policy(rollouts.input_ids[:, :-1], rollouts.attention_mask[:, :-1], 24)[0][:, 0]
        logits[:, sorted(stops)] = -torch.inf  # the first token's law knows no stop
        first = logits.log_softmax(-1).gather(1, rollouts.completion_ids[:, :1])[:, 0]
    assert (found[:, 0] - first).abs().max() < 1e-5


# What can be a policy ---------------------------------------------------------------------------------------------


def test_a_bidirectional_model_is_no_policy(tmp_path):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    shape |= {"max_position_embeddings": 64, "initializer_range": 0.2}
    for is_decoder in (True, False):
        BertLMHeadModel(BertConfig(**shape, is_decoder=is_decoder)).save_pretrained(tmp_path / str(is_decoder))
        tiny_tokenizer().save_pretrained(tmp_path / str(is_decoder))
    Policy.load(ModelConfig(str(tmp_path / "True")))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(DPAlignError, match="BertLMHeadModel reads later tokens too"):
            Policy.load(ModelConfig(str(tmp_path / "False"), dtype=dtype))


@pytest.mark.parametrize(("kind", "layer"), [("gpt2", "lm_head"), ("llama", "embed_tokens")])
def test_tied_and_embedding_layers_are_no_targets(kind, layer):
    policy = tiny_policy(kind)
    with pytest.raises(DPAlignError, match=f"{layer} (has the same weight as transformer.wte|is no linear layer)"):
        policy.add_adapter("sft", AdapterConfig(r=2, target_modules=[layer]))


def test_an_output_layer_of_its_own_is_a_target(tmp_path):
    policy = Policy.load(ModelConfig(str(tiny_folder("llama", tmp_path / "base"))))
    randomised(policy, AdapterConfig(r=2, target_modules=["lm_head", "q_proj"]))
    policy.save_adapter(tmp_path / "release", str(tmp_path / "base"))
    check_release(policy, tmp_path / "release", str(tmp_path / "base"))
    again = Policy.load(ModelConfig(str(tmp_path / "release")))
    ids, mask = prompts(policy)
    with again.merged():
        assert (again(ids, mask, 4)[0] - policy(ids, mask, 4)[0]).abs().max() < 1e-4


def randomised(policy: Policy, config: AdapterConfig) -> None:
    policy.add_adapter("sft", config)
    torch.manual_seed(1)
    for name, p in policy.named_parameters():
        if ".sft." in name:
            torch.nn.init.normal_(p, std=0.3)


# peft's fields ----------------------------------------------------------------------------------------------------


def test_every_field_of_peft_has_its_rule():
    """A field that a newer peft adds fails here until somebody says what becomes of it."""
    assert set(FIELDS) == {f.name for f in dataclasses.fields(LoraConfig)}


OTHER_VALUES = {
    "lora_dropout": 0.1,
    "bias": "all",
    "init_lora_weights": "pissa",
    "layers_pattern": "h",
    "revision": "v2",
}
OTHER_VALUES |= {
    "qalora_group_size": 8,
    "megatron_core": "mine",
    "modules_to_save": ["lm_head"],
    "exclude_modules": "x",
}


@pytest.mark.parametrize("name", [name for name, (trained, _) in FIELDS.items() if trained == "default"])
def test_what_cannot_be_trained_is_refused_by_its_name(name):
    config = LoraConfig(r=2)
    assert not refused_fields(vars(config), 0)
    setattr(config, name, OTHER_VALUES.get(name, True))
    with pytest.raises(DPAlignError, match=f"{name}="):
        check_to_train(config)


def test_a_field_that_nobody_knows_is_refused_unless_it_is_empty():
    assert refused_fields({"of_the_future": None, "another": {}}, 1) == []
    assert refused_fields({"of_the_future": 3}, 1) == ["of_the_future=3"]


def public_adapter(folder, **options) -> str:
    """An adapter that somebody trained with peft on the base in folder / base."""
    torch.manual_seed(2)
    model = get_peft_model(
        tiny_object("llama", folder / "base"),
        LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], **options}),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return str(folder / "adapter")


HONOURED = {
    "rank_pattern": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "exclude_modules": {"exclude_modules": r".*layers\.0.*"},
    "layers": {"layers_to_transform": 1, "layers_pattern": "layers", "init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("case", HONOURED)
def test_a_public_adapter_is_in_the_release(case, tmp_path):
    adapter = public_adapter(tmp_path, **HONOURED[case])
    policy = Policy.load(ModelConfig(adapter))
    ids, mask = prompts(policy)
    with policy.base():
        base = policy(ids, mask, 4)[0]
    assert (policy(ids, mask, 4)[0] - base).abs().max() > 0.1
    randomised(policy, AdapterConfig(r=3, target_modules=["q_proj", "up_proj"]))
    policy.save_adapter(tmp_path / "release", str(tmp_path / "base"))
    check_release(policy, tmp_path / "release", str(tmp_path / "base"))


DROPPED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "layer_replication": {"layer_replication": [(0, 2), (0, 2)]},
}


@pytest.mark.parametrize("case", DROPPED)
def test_a_public_adapter_that_would_lose_a_part_is_refused_by_name(case, tmp_path):
    with pytest.raises(DPAlignError, match=f"no plain LoRA: .*{case}"):
        Policy.load(ModelConfig(public_adapter(tmp_path, **DROPPED[case])))


def test_tensors_beside_the_matrices_and_other_kinds_of_adapter_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    file = folder / "adapter_model.safetensors"
    public_adapter(tmp_path)
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.ones(2)}, file)
    with pytest.raises(DPAlignError, match=r"the tensor base_model\.model\.lm_head\.weight"):
        Policy.load(ModelConfig(str(folder)))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(DPAlignError, match="type 'IA3'"):
        Policy.load(ModelConfig(str(folder)))
    file.unlink()
    with pytest.raises(DPAlignError, match=r"needs adapter_config.json and adapter_model.safetensors"):
        Policy.load(ModelConfig(str(folder)))


@pytest.mark.parametrize("ranks", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}, {"rank_pattern": True}, {"r": "2"}, {"r": 0}])
def test_ranks_that_no_tensor_has_take_no_memory(ranks, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    public_adapter(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | ranks))
    monkeypatch.setattr("dpalign.models.stack.base_path", None)  # nothing is loaded before
    with pytest.raises(DPAlignError, match=r"names ranks|cannot be read"):
        Policy.load(ModelConfig(str(folder)))


def test_a_public_classifiers_adapter_may_bring_its_head_alone(tmp_path):
    tiny_folder("llama", tmp_path / "base")
    for name, more in (("fine", []), ("more", ["model.norm"])):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score", *more])
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    assert RewardModel.load(ModelConfig(str(tmp_path / "fine"))).adapters == ["earlier"]
    with pytest.raises(DPAlignError, match=r"modules_to_save \(model.norm\)"):
        RewardModel.load(ModelConfig(str(tmp_path / "more")))
    with pytest.raises(DPAlignError, match="modules_to_save"):
        Policy.load(ModelConfig(str(tmp_path / "fine")))
