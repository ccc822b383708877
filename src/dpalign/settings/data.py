"""The private data."""

from __future__ import annotations

from dataclasses import dataclass

from ..domains import within


@dataclass
class DataConfig:
    """The private data.

    Args:
        name: declared name of the dataset, the ledger's key; every run on one name adds up.
        path: .jsonl, .json, .csv, .tsv or .parquet file (.gz allowed), a folder written by `datasets`, a hub name (of
            several configurations `NAME:CONFIGURATION`), or `demo:NAME/FILE`.
        split: split of a `datasets` folder or hub dataset.
        unit: column that names the privacy unit (a person, say; `meta.user` for one inside another); without one each
            record is a unit.
        version: label for a state of data without a unit column: name another one when records came, went or changed,
            and what is spent on both is added up, since nobody can tell who is in which part.
        max_records_per_unit: records of a unit beyond this many are left out, by keyed hash.
        declared_units: public number of units; q, steps and delta use it. Default: the number in the file,
            which thereby counts as public.
        eval_path: held-out records of the same columns, for evaluation.
        eval_split: split of `eval_path`, where it is a `datasets` folder or a hub dataset.
        eval_is_public: declares the held-out records public; only then are exact metrics and samples shown.
        is_demo: public data playing private; what tuning on it has cost is not counted.
    """

    name: str = ""
    path: str = ""
    split: str = "train"
    unit: str | None = None
    version: str = ""
    max_records_per_unit: int = within(1, "[1, 1000000]")
    declared_units: int | None = within(None, "[1, 1000000000000]")
    eval_path: str | None = None
    eval_split: str = "test"
    eval_is_public: bool = False
    is_demo: bool = False
