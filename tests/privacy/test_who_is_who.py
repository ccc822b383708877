"""Who is who: units under all spellings of their names, contents under all names of datasets."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from dpalign import sweep
from dpalign.data import DataConfig, build_units, check_disjoint
from dpalign.data.load import read_records
from dpalign.data.names import same_name
from dpalign.data.overlap import DECLARED, Texts, check_contents, hash_texts, remember_contents
from dpalign.errors import DPAlignError
from dpalign.privacy import ledger as ledger_of
from dpalign.privacy.ledger import Ledger
from helpers import call, files_below, ledger_rows, reviews, statement, write_jsonl, write_recipe
from reader import small_model
from test_provenance import INTENT

FORMATS = Path(__file__).parent.parent / "formats"
NFC, NFD = unicodedata.normalize("NFC", "Zoë Å"), unicodedata.normalize("NFD", "Zoë Å")


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def drawn(ledger: Ledger, name: str, **changes: Any) -> None:
    """As if something had been drawn from a dataset."""
    whole: dict[str, Any] = {"low": 0.0, "high": 1.0, "split": "", "run": f"run-{name}"}
    ledger.write([dataclasses.replace(INTENT, dataset=name, **whole | changes)])


# Names of units ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        ([7, 7.0, "7", "7.0", " 7 ", "7.00", Decimal("7"), Decimal("7.000")], "7"),
        ([-3, "-3.0", -3.0], "-3"),
        ([0, -0.0, "-0.0", "0"], "0"),
        ([NFC, NFD, f" {NFD}\t", NFC.replace(" ", "  "), NFC.replace(" ", "\u00a0")], NFC),
        (["Ann"], "Ann"),
        (["ann"], "ann"),
        (["007"], "007"),
        (["7.5"], "7.5"),
        (["v1.0"], "v1.0"),
        ([2**70, float(2**70)], str(2**70)),
        ([None, True, 7.5, math.nan, math.inf, "", " \n", ["a"], {}, Decimal("NaN"), Decimal("7.5")], None),
    ],
    ids=str,
)
def test_one_spelling_for_every_name(spellings, name):
    assert {same_name(value) for value in spellings} == {name}


def test_a_unit_is_one_in_every_format(tmp_path, ledger):
    (tmp_path / "a.csv").write_text(f"who,text\n7.0,x\n{NFD},y\n", encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", [{"who": 7, "text": "p"}, {"who": f" {NFC} ", "text": "q"}])
    config = DataConfig(name="d", unit="who")
    ids = [set(build_units(read_records(str(tmp_path / f)), config, ledger).ids) for f in ("a.csv", "b.jsonl")]
    assert ids[0] == ids[1] and len(ids[0]) == 2


def pair(left: list[Any], right: list[Any], columns: tuple[str | None, str | None] = ("who", "who")) -> dict[str, Any]:
    """Two datasets of these units' names."""
    return {
        stage: ([{column or "who": value, "text": f"{stage} {i}"} for i, value in enumerate(values)], config)
        for stage, values, column, config in zip(
            ("sft", "ppo"), (left, right), columns,
            [DataConfig(name=n, path=f"{n}.jsonl", unit=c) for n, c in zip("ab", columns, strict=True)], strict=True,
        )
    }  # fmt: skip


@pytest.mark.parametrize("declared", [False, True])
def test_people_under_other_spellings_are_found(declared):
    with pytest.raises(DPAlignError, match=r"^2 units are in both 'a' .sft. and 'b' .ppo."):
        check_disjoint(pair(["7.0", NFC, "x"], [7, f"{NFD} ", "y"]), declared)
    assert check_disjoint(pair(["7.0", NFC], [8, "zoë å"]), declared) == []


@pytest.mark.parametrize("columns", [("user", "author"), ("user", None), (None, None)], ids=str)
def test_columns_that_cannot_be_compared_are_never_checked(columns):
    with pytest.raises(DPAlignError, match="cannot be checked without one unit column in both, of the same name"):
        check_disjoint(pair(["ann"], ["ben"], columns), declared=False)
    assert check_disjoint(pair(["ann"], ["ann"], columns), declared=True) == [
        "the units of 'a' and 'b' are disjoint (declared)"
    ]


def test_one_file_has_one_name(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", reviews(4))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    records = reviews(4)
    two = {
        stage: (records, DataConfig(name=stage, path=str(tmp_path / path)))
        for stage, path in (("sft", "data.jsonl"), ("ppo", "link.jsonl"))
    }
    with pytest.raises(DPAlignError, match=r"are one file, .*: give it one name"):
        check_disjoint(two, declared=True)


# The name under which parts are compared ---------------------------------------------------------------------


def split_of(records: list[dict[str, Any]], ledger: Ledger, low: float = 0.0, high: float = 0.5, **config: Any) -> str:
    return build_units(records, DataConfig(name="d", **config), ledger, low, high).part.identity


def test_a_splits_name_is_random_and_says_nothing_of_the_records(ledger, tmp_path):
    records = reviews(40)
    name = split_of(records, ledger)
    assert split_of(records[::-1], ledger, 0.5, 1.0) == name != split_of(records, Ledger(tmp_path / "other.sqlite"))
    assert split_of(records, ledger, unit="id") not in (name, "")
    drawn(ledger, "d", low=0.0, high=0.5, split=name)
    assert split_of(records, Ledger(tmp_path / "ledger.sqlite"), 0.5, 1.0) == name  # another process, another day


def test_parts_of_changed_records_are_refused_or_apart(ledger):
    """Neither may the name tell that they changed, nor may parts be compared that cannot be."""
    records = reviews(40)
    name = split_of(records, ledger)
    changed = [records[0] | {"text": "Another."}, *records[1:]]
    assert split_of(changed, ledger)  # nothing was drawn: mended data
    name = split_of(records, ledger)
    drawn(ledger, "d", low=0.0, high=0.5, split=name)
    with pytest.raises(DPAlignError, match=r"'d' has changed since .*\(data\.unit\).*\(data\.version\)"):
        split_of(changed, ledger)
    assert split_of(changed, ledger, 0.0, 1.0) == name  # whoever is in it is in the whole
    assert split_of(changed, ledger, version="May") not in (name, "")
    assert split_of(records, ledger) == name


def test_a_change_after_wholes_alone_keeps_the_name(ledger):
    records = reviews(40)
    name = split_of(records, ledger, 0.0, 1.0)
    drawn(ledger, "d", split=name)
    assert split_of(records, ledger) == name and split_of(reviews(41), ledger) == name


def test_units_of_a_column_keep_their_parts_when_others_come(ledger):
    name = split_of(reviews(40), ledger, unit="id")
    drawn(ledger, "d", low=0.0, high=0.5, split=name)
    assert split_of(reviews(41), ledger, 0.5, 1.0, unit="id") == name


def test_public_data_that_changes_is_another_split(ledger):
    name = split_of(reviews(40), ledger, is_demo=True)
    drawn(ledger, "d", low=0.0, high=0.5, split=name)
    assert split_of(reviews(41), ledger, is_demo=True) != name


# Contents ----------------------------------------------------------------------------------------------------


def texts(records: list[dict[str, Any]], ledger: Ledger, name: str | None = "a", is_public: bool = False) -> Texts:
    columns = ["prompt", "completion", "text", "chosen", "rejected", "messages"]
    return hash_texts(records, columns, ledger, name=name, is_public=is_public or name is None, source=repr(name))


def shared(one: list[dict[str, Any]], other: list[dict[str, Any]], ledger: Ledger) -> int:
    return texts(one, ledger).shared_with([texts(other, ledger, "b").hashes])


SAID = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"id": 1, "text": "A b."}, {"id": "x", "text": " A  b. ", "n": 2}, 1),
        ({"text": NFC}, {"prompt": NFD}, 1),
        ({"text": "A b."}, {"text": "a b."}, 0),
        ({"prompt": "Is it so?", "completion": "Yes."}, {"prompt": "Is it so?"}, 1),
        ({"prompt": "Is it so?", "completion": "Yes."}, {"prompt": "Or not?", "completion": "Yes."}, 0),
        ({"chosen": "One.", "rejected": "Two."}, {"text": "Two."}, 1),
        ({"messages": SAID}, {"prompt": SAID[:1]}, 1),
        ({"messages": SAID}, {"prompt": "Is it so?"}, 1),
        ({"messages": SAID}, {"messages": [SAID[0] | {"content": "No?"}, SAID[1]]}, 0),
    ],
)
def test_what_is_one_text(one, other, expected, ledger):
    assert shared([one], [other], ledger) == shared([other], [one], ledger) == expected


def test_shared_records_are_counted_each_once(ledger):
    one = [*reviews(50), *reviews(3)]  # three texts twice
    other = [*reviews(100)[48:], *reviews(2)]
    assert shared(one, other, ledger) == 2 + 2 * 2
    both = {"chosen": "One.", "rejected": "Two."}
    assert shared([both], [{"text": "One."}, {"text": "Two."}], ledger) == 1


def test_hashes_are_small_and_confirm_nothing_without_the_ledger(ledger, tmp_path):
    found = texts(reviews(500), ledger)
    assert found.hashes.nbytes == 16 * 500
    other = texts(reviews(500), Ledger(tmp_path / "other.sqlite"))
    assert not set(found.hashes.tolist()) & set(other.hashes.tolist())


def test_a_dataset_is_compared_with_others_and_public_records_and_not_with_itself(ledger):
    private, twice = texts(reviews(10), ledger), texts([*reviews(4), *reviews(4)], ledger)
    check_contents([private, twice, texts(reviews(4, "else"), ledger, "b")], ledger)
    with pytest.raises(DPAlignError, match=r"^4 of the 10 records of 'a' .* in 'b', too: who wrote them"):
        check_contents([private, texts(reviews(4), ledger, "b")], ledger)
    with pytest.raises(DPAlignError, match=r"^4 of the 10 records of 'a' .* Whatever is declared public is shown"):
        check_contents([private, texts(reviews(4), ledger, None)], ledger)
    check_contents([texts(reviews(4), ledger, "demo", True), texts(reviews(4), ledger, None)], ledger)  # nobody's


@pytest.mark.parametrize("was_public", [False, True])
@pytest.mark.parametrize("is_public", [False, True])
def test_the_ledger_knows_the_records_under_their_old_name(is_public, was_public, ledger, tmp_path):
    remember_contents([texts(reviews(10), ledger, "old", was_public)], ledger)
    new = texts(reviews(12)[5:], Ledger(tmp_path / "ledger.sqlite"), "new", is_public)
    check_contents([new], ledger)  # nothing was drawn from them: a run that was refused
    drawn(ledger, "old")
    if is_public and was_public:
        check_contents([new], ledger)
    else:
        with pytest.raises(DPAlignError, match=r"^5 of the 7 records of 'new' .* 'old', which the ledger knows, too"):
            check_contents([new], ledger)
    check_contents([texts(reviews(12)[5:], ledger, "old", was_public)], ledger)


def test_the_ledger_keeps_each_text_once_in_rows_of_bounded_size(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_of, "SHELF", 64)
    for count in (200, 200, 300):
        remember_contents([texts(reviews(count), ledger)], ledger)
    blobs = list(ledger.texts("a", False))
    assert sum(map(len, blobs)) == 16 * 300 and max(map(len, blobs)) == 16 * 64
    drawn(ledger, "a")
    with pytest.raises(DPAlignError, match=r"^300 of the 400 records"):
        check_contents([texts(reviews(400), ledger, "b")], ledger)


def test_a_write_that_fails_half_way_leaves_nothing(ledger, monkeypatch):
    monkeypatch.setattr(ledger_of, "SHELF", 64)

    class Torn(bytes):
        def __getitem__(self, where: Any) -> Any:
            if where.start:
                raise KeyboardInterrupt
            return super().__getitem__(where)

    with pytest.raises(KeyboardInterrupt):
        ledger.remember_texts("a", False, Torn(16 * 100))
    assert list(ledger.texts("a", False)) == []
    ledger.remember_texts("a", False, bytes(16 * 100))
    assert sum(map(len, ledger.texts("a", False))) == 16 * 100


# Through the command -----------------------------------------------------------------------------------------

SHORT = {"max_steps": 1}


def two_files(folder: Path, other: list[dict[str, Any]], **changes: Any) -> Path:
    """SFT on 64 reviews, PPO on another file without a unit column."""
    write_jsonl(folder / "other.jsonl", other)
    mine = {"data": None, "sft_data": {"name": "reviews", "path": str(folder / "data.jsonl")}}
    mine["ppo_data"] = {"name": "others", "path": str(folder / "other.jsonl")}
    return write_recipe(folder, units_disjoint="declared", sft=SHORT, ppo=SHORT, **mine | changes)


def refused(folder: Path, called: Any, says: str) -> None:
    """Before any draw, to the terminal alone, without a text."""
    assert says in called.error and "evening" not in called.error
    assert ledger_rows(folder) == 0
    assert not files_below(folder / "run", lambda path: path.parts[0] != "private")


def test_a_run_refuses_records_of_another_dataset(tmp_path, capsys):
    recipe = two_files(tmp_path, [r | {"id": "somebody"} for r in reviews(20)])
    says = "20 of the 64 records of 'reviews' (sft) have texts that are in 'others' (ppo)"
    refused(tmp_path, call(capsys, "run", recipe, "--json"), says)


def test_a_run_refuses_private_prompts_as_public_ones(tmp_path, capsys):
    public = write_jsonl(tmp_path / "public.jsonl", [*reviews(3, "public"), *reviews(2)])
    recipe = write_recipe(tmp_path, data={"eval_path": str(public), "eval_is_public": True})
    says = f"2 of the 64 records of 'reviews' (sft) have texts that are in {public} (declared public)"
    refused(tmp_path, call(capsys, "run", recipe, "--json"), says)
    assert not (tmp_path / "run" / "completions.json").exists()


def test_a_new_name_does_not_begin_a_new_account(tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo=None, sft=SHORT)
    assert call(capsys, "run", recipe, "--json").json["private"]
    again = ("run", recipe, "--json", "--output_dir", tmp_path / "again")
    error = call(capsys, *again, "--data.name", "fresh").error
    assert "64 of the 64 records of 'fresh' (sft) have texts that are in 'reviews', which the ledger knows" in error
    assert ledger_rows(tmp_path) == ledger_rows(tmp_path, dataset="reviews") == 1
    assert call(capsys, *again).json["ledger"][0]["runs"] == 2


def test_the_data_holder_may_declare_that_equal_texts_are_different_peoples(tmp_path, capsys):
    recipe = two_files(tmp_path, reviews(20), shared_texts="declared")
    assert DECLARED in call(capsys, "run", recipe, "--json").json["assumptions"]
    stated = statement(tmp_path / "run")
    assert DECLARED in stated["assumptions"] and "20" not in " ".join(stated["assumptions"])


def test_a_declaration_is_stated_whatever_was_found(tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo=None, sft=SHORT, shared_texts="declared")
    assert DECLARED in call(capsys, "run", recipe, "--json").json["assumptions"]


# Through commands that draw nothing --------------------------------------------------------------------------


@pytest.fixture
def knowing(tmp_path) -> bytes:
    """A ledger that something was drawn from the 64 reviews in; its bytes."""
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        remember_contents([texts(reviews(64), ledger, "reviews")], ledger)
        drawn(ledger, "reviews")
    return (tmp_path / "ledger.sqlite").read_bytes()


def test_a_copy_of_a_ledger_knows_what_it_knows_and_writes_nothing(knowing, tmp_path):
    copy = Ledger.copy_of(tmp_path / "ledger.sqlite")
    drawn(copy, "others")
    with pytest.raises(DPAlignError, match=r"^5 of the 5 records of 'new' .* 'reviews', which the ledger knows"):
        check_contents([texts(reviews(5), copy, "new")], copy)
    assert (tmp_path / "ledger.sqlite").read_bytes() == knowing
    assert Ledger.copy_of(tmp_path / "none.sqlite").known_texts() == [] and not (tmp_path / "none.sqlite").exists()
    old = FORMATS / "ledger_v0.sqlite"
    before = old.read_bytes()
    assert Ledger.copy_of(old).datasets() == Ledger(shutil.copy(old, tmp_path / "old.sqlite")).datasets() != []
    assert old.read_bytes() == before
    (tmp_path / "letter").write_text("no ledger " * 99)
    with pytest.raises(DPAlignError, match="letter cannot be read"):
        Ledger.copy_of(tmp_path / "letter")


def test_an_evaluation_refuses_private_prompts_as_public_ones(knowing, tmp_path, capsys):
    shown = [{"prompt": r["text"], "summary": f"of {r['id']}"} for r in [*reviews(3, "public"), *reviews(2)]]
    public = write_jsonl(tmp_path / "public.jsonl", shown)
    words = ("evaluate", small_model(tmp_path / "little"), "--data", public, "--eval_is_public")
    words += ("--max_completion_length", 1, "--json")
    error = call(capsys, *words).error
    assert f"2 of the 5 records of {public} (declared public) have texts that are in 'reviews', which the" in error
    assert "evening" not in error and "--shared_texts declared" in error
    assert "there is no ledger elsewhere" in call(capsys, *words, "--ledger", "elsewhere").error
    assert call(capsys, *words, "--shared_texts", "declared").json["assumptions"] == [DECLARED]
    write_jsonl(public, shown[:3])
    assert call(capsys, *words).json["assumptions"] == []
    write_jsonl(public, [shown[0] | {"summary": reviews(1)[0]["text"]}])
    assert "1 of the 1 records" in call(capsys, *words, "--reference_column", "summary").error
    assert (tmp_path / "ledger.sqlite").read_bytes() == knowing


def test_a_plan_compares_what_a_run_compares(knowing, tmp_path, capsys):
    other = [r | {"id": "somebody"} for r in reviews(20)]
    model = {"name_or_path": str(small_model(tmp_path / "little")), "is_public": True}
    recipe = two_files(tmp_path, other, ledger=str(tmp_path / "none.sqlite"), model=model)
    says = "20 of the 64 records of 'reviews' (sft) have texts that are in 'others' (ppo)"
    assert says in call(capsys, "plan", recipe).error
    assert (
        "cannot be checked without one unit column" in call(capsys, "plan", recipe, "--units_disjoint", "checked").error
    )
    assert call(capsys, "plan", recipe, "--no_data").status == 0
    recipe = write_recipe(tmp_path, ppo=None, data={"name": "fresh"}, model=model)
    assert "64 of the 64 records of 'fresh' (sft)" in call(capsys, "plan", recipe).error
    assert call(capsys, "plan", recipe, "--data.name", "reviews").status == 0
    assert not (tmp_path / "none.sqlite").exists() and (tmp_path / "ledger.sqlite").read_bytes() == knowing


def test_a_sweep_refuses_a_proxy_and_prompts_of_the_recipes_own_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "_in_fresh_process", lambda words: pytest.fail("a run has begun"))
    public = write_jsonl(tmp_path / "public.jsonl", reviews(8, "morning"))
    proxy = write_jsonl(tmp_path / "proxy.jsonl", [*reviews(30, "noon"), *reviews(2)])
    recipe = write_recipe(tmp_path, data={"eval_path": str(public), "eval_is_public": True})
    words = ("sweep", recipe, "--epsilons", 2, "--seeds", 1, "--output_dir", tmp_path / "sweep", "--json")
    says = f"2 of the 64 records of 'reviews' (sft) have texts that are in the proxy {proxy}"
    assert says in call(capsys, *words, "--public_proxy", proxy).error
    write_jsonl(public, [*reviews(7, "morning"), *reviews(1)])
    assert f"1 of the 64 records of 'reviews' (sft) have texts that are in {public}" in call(capsys, *words).error
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "ledger.sqlite").exists()


def test_a_sweep_says_what_it_could_not_compare_its_proxy_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "_in_fresh_process", lambda words: (1, ""))
    public = write_jsonl(tmp_path / "public.jsonl", reviews(8, "morning"))
    recipe = write_recipe(tmp_path, data={"eval_path": str(public), "eval_is_public": True, "path": "elsewhere.jsonl"})
    words = ("sweep", recipe, "--epsilons", 2, "--seeds", 1, "--output_dir", tmp_path / "sweep")
    called = call(capsys, *words, "--public_proxy", write_jsonl(tmp_path / "proxy.jsonl", reviews(30, "noon")))
    told = "the data of stage sft (elsewhere.jsonl) is not here: nothing was compared with it"
    assert told in " ".join((called.out + called.err).split())
