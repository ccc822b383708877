"""accelerate's trackers, told numbers that may be published, and nothing of the machine, the code or the terminal.

A tracker stamps what it is told with the time. How long a private step takes depends on who was drawn, so what is known
of a private stage is held back until the stage has ended. What a tracker raises before the first draw refuses the run;
afterwards it is said once, and the run goes on without it.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import DPAlignError
from ..printable import printable

PROJECT = "dpalign"
PACKAGES = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}  # by the names that accelerate has for them, which are those of their modules


class Tracker:
    """One run of a tracker.

    Args:
        report_to: a name of PACKAGES.
        folder: of the run; its name is also that of the tracker's run. Files of a tracker are in its `logs`, or in
            `private/trackers` where there is more than numbers in them.
        tell: says that the tracker has failed.

    Raises:
        DPAlignError: it cannot begin.
    """

    def __init__(self, report_to: str, folder: Path, tell: Callable[[str], None]) -> None:
        check_installed(report_to)
        self.name, self._tell, self._failed = report_to, tell, False
        self._held: list[tuple[int, dict[str, float]]] | None = None
        files = folder / ("private/trackers" if report_to in ("swanlab", "wandb") else "logs")
        files.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                self._tracker = _begin(report_to, files, folder.resolve().name)
        except DPAlignError:
            raise
        except (Exception, SystemExit) as error:
            said = printable(str(error).strip().partition("\n")[0], longest=200)
            raise DPAlignError(f"report_to {report_to} cannot begin: {said or type(error).__name__}.") from None

    def hold(self) -> None:
        """Keeps what is said until `release`."""
        self._held = []

    def say(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step; what is no finite number is left out."""
        numbers = {name: float(v) for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        if self._held is not None:
            self._held.append((step, numbers))
        elif numbers:
            self._attempt(lambda: self._tracker.log(numbers, step=step))

    def release(self) -> None:
        """Says what was held back, and from now on all at once."""
        held, self._held = self._held or [], None
        for step, numbers in held:
            self.say(step, numbers)

    def end(self) -> None:
        self.release()
        self._attempt(lambda: self._tracker.finish())

    def _attempt(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            with redirect_stdout(sys.stderr):
                call()
        except (Exception, SystemExit) as error:
            self._failed = True
            self._tell(
                f"report_to {self.name} has failed ({type(error).__name__}) and is told nothing more; metrics.jsonl "
                "has all numbers."
            )


def check_installed(report_to: str) -> None:
    """Raises DPAlignError for a tracker whose package is missing; `none` needs none."""
    package = PACKAGES.get(report_to)
    if package is None or report_to in sys.modules or find_spec(report_to) is not None:
        return
    raise DPAlignError(f"report_to {report_to} needs the package {package}: pip install {package}.")


def _begin(report_to: str, files: Path, run: str) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # trackers ask it whether this is the main process
    kind = LOGGER_TYPE_TO_CLASS[report_to]
    where = (str(files),) if kind.requires_logging_directory else ()
    name = run if report_to == "tensorboard" else PROJECT  # of its folder; of the project elsewhere
    tracker = kind(name, *where, **_options(report_to, files, run))
    if report_to == "mlflow":
        tracker.tags = _mlflow_tags()  # whatever $MLFLOW_TAGS says
    tracker.start()
    return tracker


def _options(report_to: str, files: Path, run: str) -> dict[str, Any]:
    """What a tracker begins with: the run's name, and everything off that it would find out by itself."""
    if report_to == "wandb":
        return {"name": run, "dir": str(files), "save_code": False, "settings": WANDB}
    if report_to == "trackio":
        return {"name": run, "private": True, "embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    if report_to == "comet_ml":
        config = importlib.import_module("comet_ml").ExperimentConfig
        return {"mode": "create", "experiment_config": config(name=run, **COMET)}
    if report_to == "aim":
        return {"system_tracking_interval": None, "log_system_params": False, "capture_terminal_logs": False}
    if report_to == "mlflow":
        importlib.import_module("mlflow").disable_system_metrics_logging()
        return {"run_name": run}
    if report_to == "clearml":
        os.environ.setdefault("CLEARML_WORKER_NAME", PROJECT)  # instead of the machine's name
        if importlib.import_module("clearml").Task.current_task() is not None:  # it would be joined as it is
            raise DPAlignError("report_to clearml begins a task of its own, and one is open already: close it first.")
        return {"project_name": PROJECT, "task_name": run, "reuse_last_task_id": False, **CLEARML}
    if report_to == "dvclive":
        return {"dir": str(files / "dvclive"), "save_dvc_exp": False, "dvcyaml": False, "monitor_system": False}
    if report_to == "tensorboard":  # the machine's name would be in the name of its file
        named = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        named.socket = SimpleNamespace(gethostname=lambda: PROJECT)  # type: ignore[attr-defined]
    if report_to == "swanlab":
        return {"name": run, "log_dir": str(files), "settings": SWANLAB}
    return {}


WANDB = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": "",
    "program": PROJECT,
    "reinit": "create_new",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
COMET = {
    "auto_histogram_activation_logging": False,
    "auto_histogram_gradient_logging": False,
    "auto_histogram_tensorboard_logging": False,
    "auto_histogram_weight_logging": False,
    "auto_log_co2": False,
    "auto_metric_logging": False,
    "auto_output_logging": False,
    "auto_param_logging": False,
    "display_summary_level": 0,
    "log_code": False,
    "log_env_cpu": False,
    "log_env_details": False,
    "log_env_disk": False,
    "log_env_gpu": False,
    "log_env_host": False,
    "log_env_network": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "log_graph": False,
    "parse_args": False,
}
FRAMEWORKS = (
    "catboost", "detect_repository", "fastai", "gradio", "hydra", "joblib", "lightgbm", "matplotlib", "megengine",
    "pytorch", "scikit", "tensorboard", "tensorflow", "tfdefines", "xgboost",
)  # fmt: skip
CLEARML = {
    "auto_connect_arg_parser": False,
    "auto_connect_frameworks": dict.fromkeys(FRAMEWORKS, False),
    "auto_connect_streams": False,
    "auto_resource_monitoring": False,
}
PROBES = ("conda", "git", "hardware", "monitor", "requirements", "runtime", "swanlab")
SWANLAB = {"probe": dict.fromkeys(PROBES, False), "terminal": {"proxy_type": "none"}}


def _mlflow_tags() -> dict[str, str]:
    """In place of those that mlflow would find out: who runs what, from which commit."""
    found = ("mlflow.source.git.branch", "mlflow.source.git.commit", "mlflow.source.git.repoURL", "mlflow.user")
    return {**dict.fromkeys(found, "unknown"), "mlflow.source.name": PROJECT}
