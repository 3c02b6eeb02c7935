"""Validation: nothing lost, every reason told, and no check that breaks lets a row pass."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny

from steps import rows, validate
from steps.checks import CHECKS, Check
from steps.datasets import Rules
from steps.errors import DataError
from steps.validate import BOUNDS, check_settings, report_lines

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
NOUNS = ("ocean", "castle", "garden", "robot", "winter", "violin", "harbour", "desert", "mirror", "forest")


def pairs(count: int = 30) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Tell me of {NOUNS[n % 10]} {n}", "chosen": f"Good {n} {n % 2 * 'yes'}", "rejected": f"Bad {n} so"}
        for n in range(count)
    ]


CONTROL = {"prompt": "p\x07", "chosen": "a", "rejected": "b"}
PERSONAL = {"prompt": "Mail jo@example.org", "chosen": "a", "rejected": "b"}
BROKEN = b"{broken"


def jsonl(*records: Any) -> tiny.Files:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return {"p.jsonl": b"\n".join(lines)}


# -- nothing is lost ---------------------------------------------------------------------------------------------


def test_quarantine_keeps_text_line_and_every_reason(tmp_path: Path) -> None:
    bad = '{"prompt":  "é \\u0007",\t"chosen": "same", "rejected": "Same", "margin": -2}  '
    valid, quarantine, counts = tiny.validated(jsonl(*pairs()[:9], bad.encode(), *pairs()[9:]), tmp_path)
    (row,) = quarantine
    assert (row["line"], row["raw"], row["chosen"]) == (10, bad, "same")
    assert [reason.partition(": ")[0] for reason in row["reasons"]] == [
        "encoding",
        "same_sides",
        "label_against_score",
    ]
    assert len(valid) == 30
    assert [counts["checks"][name]["rows"] for name in ("encoding", "same_sides", "mojibake")] == [1, 1, 0]
    assert counts["examples"]["same_sides"] == ["p.jsonl line 10: chosen and rejected are the same"]


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_the_size_of_a_chunk_changes_nothing(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"prompt": "Long?", "chosen": " ".join(f"word{n}" for n in range(40)), "rejected": "no"}
    files = jsonl(
        long,
        *pairs(8),
        {**long, "rejected": "nay"},
        CONTROL,
        PERSONAL,
        pairs()[2],
        BROKEN,
        {**pairs()[5], "chosen": "Bad 5 so", "rejected": "Good 5 yes"},
    )
    whole = tiny.validated(files, tmp_path / "whole", rules={"checks": {"quarantined": "off"}})
    for module in (rows, validate, __import__("steps.ingest").ingest, __import__("steps.overview").overview):
        monkeypatch.setattr(module, "CHUNK", chunk)
    parts = tiny.validated(files, tmp_path / "parts", rules={"checks": {"quarantined": "off"}})
    assert len(whole[1]) == 5
    assert whole[2]["checks"]["near_repeat"]["rows"] == 1
    assert parts == whole


def test_valid_rows_hold_warnings_and_no_raw_text(tmp_path: Path) -> None:
    valid, _, _ = tiny.validated(jsonl(*pairs(), PERSONAL), tmp_path)
    assert all("raw" not in row for row in valid)
    assert [row["warnings"] for row in valid[:-1]] == [[]] * 30
    assert valid[-1]["warnings"] == ["personal: prompt holds what looks like an e-mail address"]


@pytest.mark.parametrize("records", [(), (BROKEN, b"3", b"words")])
def test_no_valid_row_is_an_error_after_all_is_written(records: tuple[bytes, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row"):
        tiny.validated(jsonl(*records), tmp_path)
    assert pq.read_table(tmp_path / "quarantine.parquet").num_rows == len(records)
    assert json.loads((tmp_path / "validation.json").read_text())["read"] == len(records)


def test_raw_text_is_found_in_every_kind_of_file(tmp_path: Path) -> None:
    files: tiny.Files = {
        "a.csv": b'prompt,chosen,rejected\nq,"x\ny",z\nq,"a ""b""",\n',
        "b.json": json.dumps([*pairs(5), {"prompt": "p", "chosen": "é"}]).encode(),
        "c.jsonl.gz": gzip.compress(b'\n\n{"prompt": "p", "chosen": "\xe9"}'),
    }
    _, bad, _ = tiny.validated(files, tmp_path, rules={"checks": {"quarantined": "off", "source_imbalance": "off"}})
    assert [(row["file"], row["line"], row["raw"]) for row in bad] == [
        ("a.csv", 4, 'q,"a ""b""",'),
        ("b.json", 6, '{"prompt": "p", "chosen": "é"}'),
        ("c.jsonl.gz", 3, '{"prompt": "p", "chosen": "é"}'),
    ]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny.validated(jsonl(*pairs(), CONTROL, PERSONAL), tmp_path / name)
    for table in ("valid.parquet", "quarantine.parquet"):
        assert (tmp_path / "one" / table).read_bytes() == (tmp_path / "two" / table).read_bytes()


# -- severities and thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", ["quarantine", "warn", "off", None])
@pytest.mark.parametrize(("check", "fault"), [("encoding", CONTROL), ("personal", PERSONAL)])
def test_the_registry_says_what_is_done_about_a_row(
    check: str, fault: dict[str, str], severity: str | None, tmp_path: Path
) -> None:
    rules = {"checks": {check: severity}} if severity else {}
    valid, bad, counts = tiny.validated(jsonl(*pairs(), fault), tmp_path, rules=rules)
    done = severity or CHECKS[check].severity
    assert [row["line"] for row in bad] == ([31] if done == "quarantine" else [])
    assert [row["line"] for row in valid if row["warnings"]] == ([31] if done == "warn" else [])
    assert counts["checks"].get(check) == (None if done == "off" else {"rows": 1, "severity": done})


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("encoding", CONTROL),
        ("personal", PERSONAL),
        ("unreadable", BROKEN),
        ("turns", b'{"chosen": [], "rejected": []}'),
    ],
)
def test_a_check_that_stops_names_the_rows_after_all_is_written(check: str, fault: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"a rule that stops: {check}") as caught:
        tiny.validated(jsonl(*pairs(), fault), tmp_path, rules={"checks": {check: "stop"}})
    assert "p.jsonl line 31" in str(caught.value)
    assert (tmp_path / "validation.html").is_file()
    assert json.loads((tmp_path / "validation.json").read_text())["checks"][check]["rows"] == 1


def test_a_check_that_stops_and_finds_nothing_stops_nothing(tmp_path: Path) -> None:
    stops = dict.fromkeys((*CHECKS, *BOUNDS), "stop")
    assert tiny.validated(jsonl(*pairs()), tmp_path, rules={"checks": stops})[2]["valid"] == 30


@pytest.mark.parametrize("severity", ["warn", "off"])
def test_half_a_surrogate_pair_is_never_a_valid_row(severity: str, tmp_path: Path) -> None:
    fault = b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}'
    valid, bad, _ = tiny.validated(jsonl(*pairs(), fault), tmp_path, rules={"checks": {"encoding": severity}})
    assert [row["line"] for row in bad] == [31]
    assert all(row["kind"] for row in valid)


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ({"mojibak": "off"}, "did you mean 'mojibake'?"),
        ({"lenght_bias": "off"}, "did you mean 'length_bias'?"),
        ({"zzz": "warn"}, "known: "),
        ({"unreadable": "warn"}, "'unreadable' cannot be set to warn"),
        ({"turns": "off"}, "'turns' cannot be set to off"),
        ({"not_text": "off"}, "'not_text' cannot be set to off"),
        ({"prompts_differ": {"severity": "warn"}}, "'prompts_differ' cannot be set to warn"),
        ({"length_bias": "quarantine"}, "no row can go to quarantine"),
        ({"too_long": {"threshold": 100}}, "'too_long' has no threshold"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused(checks: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        tiny.validated(jsonl(*pairs()), tmp_path, rules={"checks": checks})
    assert said in str(caught.value)
    assert "rules.checks" in str(caught.value)


def test_every_severity_of_every_check_is_followed_or_refused() -> None:
    for name in (*CHECKS, *BOUNDS):
        for severity in ("quarantine", "warn", "stop", "off"):
            impossible = name in CHECKS and CHECKS[name].unreadable and severity in ("warn", "off")
            if impossible or (name in BOUNDS and severity == "quarantine"):
                with pytest.raises(DataError, match=name):
                    check_settings(Rules(checks={name: severity}))
            else:
                check_settings(Rules(checks={name: severity}))


def unbalanced(longer: int) -> list[dict[str, str]]:
    """Twenty pairs, so many of them with a longer chosen side."""
    texts = [("very short", "tiny"), ("tiny", "very short")]
    sides = [[f"{n} {text}" for text in texts[n >= longer]] for n in range(20)]
    return [{"prompt": f"p{n}", "chosen": chosen, "rejected": rejected} for n, (chosen, rejected) in enumerate(sides)]


@pytest.mark.parametrize(
    ("longer", "threshold", "kept"),
    [(13, None, True), (14, None, False), (14, 0.7, True), (6, 0.25, False), (1, 0.0, False)],
)
def test_the_bias_for_the_longer_side_is_held_against_a_limit(
    longer: int, threshold: float | None, kept: bool, tmp_path: Path
) -> None:
    checks = {"length_bias": {"threshold": threshold}}
    _, _, counts = tiny.validated(jsonl(*unbalanced(longer)), tmp_path, rules={"checks": checks})
    assert counts["bounds"]["length_bias"] == {
        "value": longer / 20,
        "limit": 0.65 if threshold is None else threshold,
        "kept": kept,
    }
    assert any("longer side is chosen" in line for line in report_lines(counts)) is not kept


def test_a_limit_that_stops_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a rule that stops: length_bias") as caught:
        tiny.validated(jsonl(*unbalanced(20)), tmp_path, rules={"checks": {"length_bias": "stop"}})
    assert "share of pairs whose longer side is chosen is 1" in str(caught.value)


@pytest.mark.parametrize(("bad", "kept"), [(2, True), (3, False)])
def test_a_large_share_in_quarantine_is_told(bad: int, kept: bool, tmp_path: Path) -> None:
    counts = tiny.validated(jsonl(*pairs(8), *[BROKEN] * bad), tmp_path)[2]
    assert counts["bounds"]["quarantined"]["kept"] is kept


@pytest.mark.parametrize(("small", "kept"), [(2, True), (1, False), (0, None)])
def test_one_source_that_outweighs_the_others_is_told(small: int, kept: bool | None, tmp_path: Path) -> None:
    records = pairs(30)
    files: tiny.Files = {"a.jsonl": records[small:]}
    if small:
        files["b.jsonl"] = records[:small]
    counts = tiny.validated(files, tmp_path)[2]
    assert counts["bounds"].get("source_imbalance", {"kept": None})["kept"] is kept


def test_personal_data_is_written_over_wherever_it_stands(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "I am jo@example.org"}, {"role": "assistant", "content": "Hi +442071838750"}]
    records = [{"chosen": talk, "rejected": [talk[0], {"role": "assistant", "content": "No"}]}]
    valid, _, _ = tiny.validated(jsonl(*pairs(), PERSONAL, *records), tmp_path, rules={"redact": True})
    assert valid[-2]["prompt"] == "Mail [EMAIL]"
    assert valid[-1]["prompt"] == "\n\nHuman: I am [EMAIL]\n\nAssistant:"
    assert valid[-1]["chosen"] == " Hi [PHONE]"
    assert "@" not in json.dumps(valid)
    assert [row["prompt"] for row in valid[:-2]] == [row["prompt"] for row in pairs()]


# -- Great Expectations ------------------------------------------------------------------------------------------


def broken_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    from great_expectations.expectations.core import ExpectColumnValuesToBeNull

    def throws(*_: object, **__: object) -> None:
        raise TypeError("the expectation broke")

    monkeypatch.setattr(ExpectColumnValuesToBeNull, "_validate", throws)


def test_an_expectation_that_throws_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_expectation(monkeypatch)
    with pytest.raises(DataError, match="a check could not be evaluated") as caught:
        tiny.validated(jsonl(*pairs(), CONTROL), tmp_path)
    assert "the check '" in str(caught.value)
    assert "the expectation broke" in str(caught.value)
    assert not (tmp_path / "valid.parquet").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_an_expectation_about_a_column_that_is_not_there_stops_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = validate._reasons
    monkeypatch.setattr(validate, "_reasons", lambda found, count: whole(found, count).drop(columns="script"))
    with pytest.raises(DataError, match="the check 'script'"):
        tiny.validated(jsonl(*pairs()), tmp_path)


def test_a_limit_that_cannot_be_evaluated_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from great_expectations.expectations.core import ExpectColumnValuesToBeBetween

    def throws(*_: object, **__: object) -> None:
        raise TypeError("the limit broke")

    monkeypatch.setattr(ExpectColumnValuesToBeBetween, "_validate", throws)
    with pytest.raises(DataError, match="the limit broke"):
        tiny.validated(jsonl(*pairs()), tmp_path)


def test_a_check_that_throws_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def throws(_: object) -> dict[int, str]:
        raise KeyError("nowhere")

    monkeypatch.setitem(CHECKS, "script", Check("x", "warn", throws))
    with pytest.raises(DataError, match="a check could not be evaluated") as caught:
        tiny.validated(jsonl(*pairs()), tmp_path)
    assert "the check 'script'" in str(caught.value)
    assert "nowhere" in str(caught.value)


def test_every_failing_row_is_listed_however_many_there_are(tmp_path: Path) -> None:
    records = pairs(300)
    for record in records[100:]:
        record["prompt"] = " "
    _, bad, _ = tiny.validated(jsonl(*records), tmp_path)
    assert [row["line"] for row in bad] == list(range(101, 301))


def test_the_page_names_every_check(tmp_path: Path) -> None:
    tiny.validated(jsonl(*pairs(), CONTROL), tmp_path)
    page = (tmp_path / "validation.html").read_text(encoding="utf-8")
    assert all(name in page for name in CHECKS)
    assert "control characters" in page


# -- real data ---------------------------------------------------------------------------------------------------


def test_the_faults_of_real_transcripts_are_found_on_their_lines(tmp_path: Path) -> None:
    path = DATA / "hh-harmless" / "harmless-base-0000-1599.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    valid, bad, counts = tiny.validated({path.name: path.read_bytes()}, tmp_path, format="hh")
    checks = {row["line"] - 1: [reason.partition(":")[0] for reason in row["reasons"]] for row in bad}
    expected = {1254: ["prompts_differ"], **{row: ["empty"] for row in (86, 516, 925, 1103)}}
    assert {row: checks.get(row) for row in expected} == expected
    assert (counts["read"], len(valid)) == (1600, 1589)
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    assert all(row["raw"] == lines[row["line"] - 1] for row in bad)
    for row in valid:
        record = json.loads(lines[row["line"] - 1])
        assert (row["prompt"] + row["chosen"]).split() == record["chosen"].split()
        assert (row["prompt"] + row["rejected"]).split() == record["rejected"].split()


def test_real_comparisons_go_round_in_no_circle(tmp_path: Path) -> None:
    path = DATA / "finegrained-qa" / "dev_feedback-000-349.json.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    records = json.loads(gzip.decompress(path.read_bytes()))
    settings = {"format": "comparisons", "columns": {"prompt": "question"}}
    valid, bad, counts = tiny.validated({path.name: path.read_bytes()}, tmp_path, **settings)
    assert (len(records), counts["read"]) == (350, 2100)
    ties = sum(verdict == 0 for record in records for verdict in record["preference"])
    assert sum(row["tie"] for row in valid + bad) == ties == counts["statistics"]["ties"]
    assert counts["checks"]["cycle"]["rows"] == counts["checks"]["unreadable"]["rows"] == 0
    for row in valid + bad:
        record = records[row["line"] - 1]
        answers = [record[f"prediction {n}"] for n in (1, 2, 3, 4)]
        first, second = [(a, b) for a in range(4) for b in range(a + 1, 4)][row["part"]]
        verdict = record["preference"][row["part"]]
        chosen, rejected = (second, first) if verdict == 2 else (first, second)
        assert (row["prompt"], row["tie"]) == (record["question"], verdict == 0)
        assert (row["chosen"], row["rejected"]) == (answers[chosen], answers[rejected])
