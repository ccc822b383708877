"""Callbacks of transformers are told public numbers and noised metrics, and nothing else."""

import json

import pytest
from transformers import TrainerCallback

from dpalign import DPAlignError, DPSFTTrainer, Privacy, SFTConfig
from tiny import tiny_folder, words


class Watching(TrainerCallback):
    def __init__(self, stop: bool = False, fail: bool = False) -> None:
        self.seen, self.logs, self.stop, self.fail = [], [], stop, fail

    def on_train_begin(self, args, state, control, **more):
        self.seen.append(("begin", state.max_steps, sorted(more)))

    def on_step_end(self, args, state, control, **more):
        self.seen.append(("step", state.global_step, sorted(more)))
        control.should_training_stop = self.stop
        if self.fail:
            raise ZeroDivisionError

    def on_log(self, args, state, control, logs=None, **more):
        self.logs.append(logs)
        assert not more

    def on_train_end(self, args, state, control, **more):
        self.seen.append(("end", state.global_step, sorted(more)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_folder("llama", tmp_path_factory.mktemp("base") / "base"))


def trainer(base, folder, *callbacks):
    settings = {"expected_batch_size": 8, "micro_batch_size": 8, "max_steps": 2, "max_length": 8}
    declared = Privacy(noise_multiplier=2.0, dataset_name="toy", model_is_public=True, ledger=str(folder) + ".sqlite")
    rows = [{"text": words(6, seed)} for seed in range(32)]
    args = SFTConfig(output_dir=str(folder), **settings)
    return DPSFTTrainer(base, args, rows, callbacks=callbacks, privacy=declared, quiet=True)


def test_callbacks_are_told_what_the_log_says_and_no_more(base, tmp_path):
    watching = Watching()
    trainer(base, tmp_path / "run", watching).train()
    assert watching.seen == [("begin", 2, []), ("step", 1, []), ("step", 2, []), ("end", 2, [])]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in logs.items() if k not in ("epsilon", "epoch")} for logs in watching.logs] == [
        line["noised_metrics"] for line in lines
    ]
    assert [logs["epsilon"] for logs in watching.logs] == [line["epsilon_of_stage"] for line in lines]
    assert watching.logs[1]["epoch"] == 0.5


def test_a_callback_that_steers_is_refused_and_one_that_raises_is_heard(base, tmp_path):
    with pytest.raises(DPAlignError, match="Watching sets should_training_stop"):
        trainer(base, tmp_path / "run", Watching(stop=True)).train()
    with pytest.raises(ZeroDivisionError):
        trainer(base, tmp_path / "other", Watching(fail=True)).train()
    with pytest.raises(DPAlignError, match="type is no transformers"):
        trainer(base, tmp_path / "third", Watching)
