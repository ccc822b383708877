"""Trackers are told numbers that may be published, when that tells nothing of the time, and find nothing out themselves."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from dpalign import DPAlignError, DPSFTTrainer, Privacy, SFTConfig
from dpalign.recipe import Recipe
from dpalign.reporting.progress import Reporter
from dpalign.reporting.terminal import Terminal
from dpalign.reporting.trackers import PACKAGES, Tracker
from dpalign.settings.trainers import one_tracker
from dpalign.training import StepReport
from helpers import call, ledger_rows, reviews, small_model, write_jsonl, write_recipe
from test_progress import PLAN

FAKES = sorted(set(PACKAGES) - {"tensorboard"})


class Told:
    """Stands for a tracker's module and for all that is in it: every call is written down."""

    def __init__(self, place: str, calls: list[Any], answers: dict[str, Any]) -> None:
        self.__dict__.update(place_=place, calls_=calls, answers_=answers, __path__=[], __spec__=None)

    def __getattr__(self, name: str) -> Any:
        place = f"{self.place_}.{name}"
        return self.answers_.get(place) or Told(place, self.calls_, self.answers_)

    def __setattr__(self, name: str, value: Any) -> None:
        self.calls_.append((f"{self.place_}.{name} =", (value,), {}))

    def __setitem__(self, name: str, value: Any) -> None:
        self.calls_.append((f"{self.place_}[{name!r}] =", (value,), {}))

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls_.append((self.place_, given, named))
        answer = self.answers_.get(f"{self.place_}()", Told(f"{self.place_}()", self.calls_, self.answers_))
        if isinstance(answer, BaseException):
            raise answer
        return answer


ANSWERS = {
    "comet_ml.__version__": "3.58.8",
    "mlflow.search_experiments()": [],
    "mlflow.create_experiment()": "7",
    "clearml.Task.current_task()": None,
}


@pytest.fixture
def fake(monkeypatch):
    def make(name: str, **answers: Any) -> list[Any]:
        calls: list[Any] = []
        module = Told(name, calls, ANSWERS | answers)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "dvclive.plots", Told("plots", [], {"plots.Metric.could_log()": True}))
        return calls

    return make


def named(calls: list[Any]) -> dict[str, dict[str, Any]]:
    return {place: options for place, _, options in calls}


# What each is told ------------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_that_accelerate_has():
    assert set(PACKAGES) == set(LOGGER_TYPE_TO_CLASS)
    assert {*PACKAGES, "none"} == set(get_args(get_type_hints(Recipe)["report_to"]))


ALL_OFF = {
    "wandb": {"console": "off", "disable_code": True, "disable_git": True, "disable_job_creation": True, "host": "",
              "program": "dpalign", "reinit": "create_new", "save_code": False, "x_disable_machine_info": True,
              "x_disable_meta": True, "x_disable_stats": True, "x_save_requirements": False},
    "swanlab": {"terminal": {"proxy_type": "none"}, "probe": {
        "conda": False, "git": False, "hardware": False, "monitor": False, "requirements": False, "runtime": False,
        "swanlab": False}},
}  # fmt: skip
BEGIN = {
    "wandb": ("wandb.init", {"project": "dpalign", "name": "run", "save_code": False, "settings": ALL_OFF["wandb"]}),
    "swanlab": ("swanlab.init", {"project": "dpalign", "name": "run", "settings": ALL_OFF["swanlab"]}),
    "trackio": ("trackio.init", {
        "project": "dpalign", "name": "run", "private": True, "embed": False, "auto_log_cpu": False, "auto_log_gpu": False}),
    "aim": ("aim.Run", {"system_tracking_interval": None, "log_system_params": False, "capture_terminal_logs": False}),
    "mlflow": ("mlflow.start_run", {
        "run_id": None, "experiment_id": "7", "run_name": "run", "nested": False, "description": None, "tags": {
            "mlflow.user": "unknown", "mlflow.source.name": "dpalign", "mlflow.source.git.commit": "unknown",
            "mlflow.source.git.branch": "unknown", "mlflow.source.git.repoURL": "unknown"}}),
    "dvclive": ("dvclive.Live", {"save_dvc_exp": False, "dvcyaml": False, "monitor_system": False}),
    "comet_ml": ("comet_ml.start", {"project_name": "dpalign", "mode": "create"}),
    "clearml": ("clearml.Task.init", {
        "project_name": "dpalign", "task_name": "run", "reuse_last_task_id": False, "auto_connect_arg_parser": False,
        "auto_connect_streams": False, "auto_resource_monitoring": False}),
}  # fmt: skip
LOGGED = {
    "wandb": [("wandb.init().log", ({"sft/noised_loss": 1.5, "sft/epsilon": 0.5},), {"step": 3})],
    "aim": [("aim.Run().track", (1.5,), {"name": "sft/noised_loss", "step": 3}),
            ("aim.Run().track", (0.5,), {"name": "sft/epsilon", "step": 3})],
    "mlflow": [("mlflow.log_metrics", ({"sft/noised_loss": 1.5, "sft/epsilon": 0.5},), {"step": 3})],
    "dvclive": [("dvclive.Live().step =", (3,), {}), ("dvclive.Live().log_metric", ("sft/noised_loss", 1.5), {}),
                ("dvclive.Live().log_metric", ("sft/epsilon", 0.5), {}), ("dvclive.Live().next_step", (), {})],
    "comet_ml": [("comet_ml.start().set_step", (3,), {}),
                 ("comet_ml.start().log_metric", ("sft/noised_loss", 1.5), {"step": 3}),
                 ("comet_ml.start().log_metric", ("sft/epsilon", 0.5), {"step": 3})],
    "clearml": [("clearml.Task.init().get_logger", (), {}),
                *[("clearml.Task.init().get_logger().report_scalar", (),
                   {"title": title, "series": "train", "value": value, "iteration": 3})
                  for title, value in (("sft/noised_loss", 1.5), ("sft/epsilon", 0.5))]],
}  # fmt: skip
LOGGED |= {
    name: [(f"{name}.init().log", ({"sft/noised_loss": 1.5, "sft/epsilon": 0.5},), {"step": 3})]
    for name in ("trackio", "swanlab")
}


@pytest.mark.parametrize("name", FAKES)
def test_it_is_told_its_name_that_all_is_off_and_the_numbers(name, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TAGS", '{"mlflow.user": "somebody"}')
    (tmp_path / "run").mkdir()
    calls = fake(name)
    tracker = Tracker(name, tmp_path / "run", pytest.fail)
    place, options = BEGIN[name]
    begun = named(calls)[place]
    paths = {"dir", "log_dir", "repo"} & begun.keys()
    assert {key: v for key, v in begun.items() if key in options} == options
    assert all(begun[key].startswith(str(tmp_path / "run")) for key in paths)
    others = begun.keys() - options.keys() - paths
    assert others == {"comet_ml": {"experiment_config"}, "clearml": {"auto_connect_frameworks"}}.get(name, set())
    count = len(calls)
    tracker.say(
        3, {"sft/noised_loss": 1.5, "sft/epsilon": 0.5, "sft/text": "a record", "sft/nan": float("nan"), "sft/no": None}
    )
    assert calls[count:] == LOGGED[name]
    count = len(calls)
    tracker.end()
    assert calls[count][0].split(".")[-1] in ("finish", "end", "end_run", "close")
    known = {place, *(place for place, _, _ in LOGGED[name])}
    also = {
        "comet_ml": {"comet_ml.ExperimentConfig"}, "clearml": {"clearml.Task.current_task"}, "aim": {"aim.Run().name ="},
        "mlflow": {"mlflow.disable_system_metrics_logging", "mlflow.search_experiments", "mlflow.create_experiment"},
        "swanlab": {"swanlab.config['FRAMEWORK'] ="},
    }  # fmt: skip
    assert {place for place, _, _ in calls[:count]} == known | also.get(name, set())


def test_what_comet_and_clearml_would_find_out_is_off(fake, tmp_path, monkeypatch):
    calls = fake("comet_ml")
    Tracker("comet_ml", tmp_path, pytest.fail)
    config = named(calls)["comet_ml.ExperimentConfig"]
    assert config.pop("name") == tmp_path.name and len(config) == 20 and not any(config.values())
    assert {"log_code", "log_env_host", "log_git_patch", "auto_output_logging", "log_env_details"} <= config.keys()
    calls = fake("clearml")
    monkeypatch.delenv("CLEARML_WORKER_NAME", raising=False)
    Tracker("clearml", tmp_path, pytest.fail)
    assert os.environ["CLEARML_WORKER_NAME"] == "dpalign"
    frameworks = named(calls)["clearml.Task.init"]["auto_connect_frameworks"]
    assert {"detect_repository", "pytorch", "tensorboard"} <= frameworks.keys() and not any(frameworks.values())


def test_an_open_task_of_clearml_is_not_joined(fake, tmp_path):
    fake("clearml", **{"clearml.Task.current_task()": "a task"})
    with pytest.raises(DPAlignError, match="one is open already: close it first"):
        Tracker("clearml", tmp_path, pytest.fail)


def test_a_trainer_takes_a_list_of_one_as_transformers_does():
    assert [one_tracker(given) for given in ("wandb", ["wandb"], [], None)] == ["wandb", "wandb", "none", "none"]
    with pytest.raises(DPAlignError, match=r"report_to=\['wandb', 'mlflow'\]: name one tracker"):
        one_tracker(["wandb", "mlflow"])
    declared = Privacy(noise_multiplier=1.0, dataset_name="toy", model_is_public=True)
    args = SFTConfig(output_dir="x", report_to=["wandb"])
    assert DPSFTTrainer(small_model(), args, reviews(8), privacy=declared, quiet=True)._recipe.report_to == "wandb"


# When ---------------------------------------------------------------------------------------------------------------


def stage(reporter: Reporter, calls: list[Any], private: bool) -> list[int]:
    """How many calls there are after each step, and when the stage has ended."""
    reporter.start("sft", replace(PLAN, steps=2), 1000, "user", private, tokens=1.0, seconds=1.0, done=5)
    seen = []
    with reporter.showing("sft"):
        for step in (1, 2):
            reporter.step(StepReport("sft", step, 2, 0.5 * step, {"loss": 1.5}))
            seen.append(len(calls))
    return [*seen, len(calls)]


def test_a_private_stage_is_told_when_it_has_ended(fake, tmp_path):
    """Sent step by step, the times at which a server gets them would tell how many units each step drew."""
    calls = fake("wandb")
    reporter = Reporter(quiet=True)
    with reporter.tracking("wandb", tmp_path):
        assert stage(reporter, calls, private=True) == [1, 1, 3]
        assert [named["step"] for _, _, named in calls[1:]] == [6, 7]  # of the whole run
        assert calls[2][1] == ({"sft/noised_loss": 1.5, "sft/epsilon": 1.0},)
        assert stage(reporter, calls, private=False) == [4, 5, 5]


def test_one_that_is_interrupted_is_told_what_there_is(fake, tmp_path):
    calls = fake("wandb")
    reporter = Reporter(quiet=True)
    with pytest.raises(KeyboardInterrupt), reporter.tracking("wandb", tmp_path):
        reporter.start("sft", PLAN, 1000, "user", True, tokens=1.0, seconds=1.0)
        with reporter.showing("sft"):
            reporter.step(StepReport("sft", 1, 60, 0.5, {"loss": 1.5}))
            raise KeyboardInterrupt
    assert [place for place, _, _ in calls] == ["wandb.init", "wandb.init().log", "wandb.init().finish"]


# When it fails ----------------------------------------------------------------------------------------------------------


def test_one_that_cannot_begin_is_said_in_one_sentence(fake, tmp_path):
    fake("wandb", **{"wandb.init()": ValueError("No API key\nconfigured")})
    with pytest.raises(DPAlignError, match=r"^report_to wandb cannot begin: No API key\.$"):
        Tracker("wandb", tmp_path, pytest.fail)
    fake("trackio", **{"trackio.init()": SystemExit(3)})
    with pytest.raises(DPAlignError, match=r"^report_to trackio cannot begin: 3\.$"):
        Tracker("trackio", tmp_path, pytest.fail)


@pytest.mark.parametrize("broken", [ConnectionError("token 123"), SystemExit(2)])
def test_one_that_fails_later_is_told_nothing_more(broken, fake, tmp_path):
    calls = fake("wandb", **{"wandb.init().log()": broken})
    out = io.StringIO()
    reporter = Reporter(console=Terminal(file=out, force_terminal=False))
    with reporter.tracking("wandb", tmp_path):
        stage(reporter, calls, private=True)
    assert [place for place, _, _ in calls] == ["wandb.init", "wandb.init().log"]
    said = [line for line in out.getvalue().splitlines() if "report_to" in line]
    assert said == [
        f"report_to wandb has failed ({type(broken).__name__}) and is told nothing more; metrics.jsonl has all numbers."
    ]


@pytest.mark.parametrize("name", FAKES)
def test_a_missing_package_is_named_before_anything_is_read(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dpalign.reporting.trackers.find_spec", lambda module: None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("dpalign.run.read_stage_records", lambda *given: pytest.fail("data is read"))
    called = call(capsys, "run", write_recipe(tmp_path), "--report_to", name)
    package = PACKAGES[name]
    assert called.status != 0 and f"report_to {name} needs the package {package}: pip install {package}." in called.err
    assert not (tmp_path / "ledger.sqlite").exists()


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_it_publishes(fake, tmp_path, capsys):
    calls = fake("wandb")
    public = write_jsonl(tmp_path / "public.jsonl", reviews(4, "public"))
    recipe = write_recipe(tmp_path, data={"eval_path": str(public), "eval_is_public": True})
    called = call(capsys, "run", recipe, "--report_to", "wandb", "--json")
    assert called.status == 0, called.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [(named["step"], given[0]) for place, given, named in calls if place.endswith(".log")]
    steps = [
        {f"{line['stage']}/noised_{k}": v for k, v in line["noised_metrics"].items()}
        | {f"{line['stage']}/epsilon": line["epsilon_of_stage"]}
        for line in lines
    ]
    assert [(step + 1, numbers) for step, numbers in enumerate(steps)] == told[:5] and len(lines) == 5
    summary = called.json
    measured = {f"evaluation/{of}/{k}": v for of, row in summary["evaluation"].items() for k, v in row.items() if v}
    assert {k: v for _, numbers in told[5:] for k, v in numbers.items() if v} == measured | {
        "run/epsilon": summary["epsilon"]
    }
    assert [place for place, _, _ in calls if ".log" not in place] == ["wandb.init", "wandb.init().finish"]
    count, rows = len(calls), ledger_rows(tmp_path)
    assert call(capsys, "run", recipe, "--report_to", "wandb").status == 0  # done: nothing is left to tell
    assert len(calls) == count and ledger_rows(tmp_path) == rows


def test_a_run_does_not_end_with_its_tracker(fake, tmp_path, capsys):
    fake("mlflow", **{"mlflow.log_metrics()": ConnectionError("gone"), "mlflow.end_run()": OSError("gone")})
    called = call(capsys, "run", write_recipe(tmp_path, ppo=None), "--report_to", "mlflow")
    assert called.status == 0 and called.err.count("report_to mlflow has failed (ConnectionError)") == 1
    assert (tmp_path / "run" / "release" / "privacy.json").exists()
    assert "gone" not in called.err + called.out


def test_tensorboard_has_no_clock_of_a_private_step(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder: Path = tmp_path / "run"
    reporter = Reporter(quiet=True)
    folder.mkdir()
    with reporter.tracking("tensorboard", folder):
        reporter.start("sft", PLAN, 1000, "user", True, tokens=1.0, seconds=1.0)
        with reporter.showing("sft"):
            reporter.step(StepReport("sft", 1, 60, 0.5, {"loss": 1.5}))
            assert not EventAccumulator(str(folder / "logs" / "run")).Reload().Tags()["scalars"]
    events = EventAccumulator(str(folder / "logs" / "run")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/noised_loss")] == [(1, 1.5)]
