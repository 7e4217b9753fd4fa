"""Records: every kind survives the way to disk and back, damage is named, a killed writer does no harm."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from entropi import record_files
from entropi.errors import UserError
from entropi.records import (
    AttentionPattern,
    CountRecord,
    DiagnosisRecord,
    EntropySnapshot,
    Evaluation,
    OperationCost,
    OperationCount,
    PassCost,
    PlaintextComparison,
    PredictionRecord,
    PrivateRun,
    Record,
    RolledBack,
    RunStarted,
    SkippedUpdate,
    Spread,
    StageCommunication,
    StudyClaim,
    StudyRow,
    StudyRun,
    TaperSnapshot,
    TrainingStep,
)


def started(total_steps: int = 100, resumed_at: int = 0) -> RunStarted:
    return RunStarted(
        time="2025-01-02T03:04:05+00:00",
        name="EReg(SM(t)+ScFuFFN)",
        architecture="SM(t)+ScFuFFN",
        parameters=7556,
        layers=2,
        heads=2,
        hidden_size=16,
        vocab_size=300,
        context_length=16,
        train_tokens=1000,
        heldout_tokens=100,
        corpus="texte/größe",
        corpus_hash="ab" * 32,
        tokens_per_step=64,
        total_steps=total_steps,
        precision="fp32",
        resumed_at=resumed_at,
    )


def step(number: int, cross_entropy: float = 5.5) -> TrainingStep:
    return TrainingStep(
        step=number,
        cross_entropy=cross_entropy,
        entropy_penalty=None,
        learning_rate=1e-3,
        grad_norm=0.5,
        tokens_per_second=1000.0,
    )


def evaluation(number: int) -> Evaluation:
    return Evaluation(step=number, cross_entropy=1.5, perplexity=math.exp(1.5), tokens=99, entropy=[[1.0, 2.0]])


EXAMPLES: list[Record] = [
    started(),
    step(1),
    EntropySnapshot(step=1, entropy=[[1.0, 2.0], [0.1, 0.25]], threshold=[[0.5, 0.5], [0.5, 0.5]], temperature=None),
    TaperSnapshot(
        step=1,
        stage="norm",
        gates={"norm": [1.0, 0.5], "final_norm": [1.0]},
        distance=[[0.0, 0.1], [0.2, 0.3]],
        divergence=0.01,
        hidden=None,
    ),
    evaluation(10),
    SkippedUpdate(step=4, reason='step 4: "quoted", with a\nline break'),
    RolledBack(step=100, from_step=140, reason="step 140: the gradient is not finite", rate_factor=0.5),
    DiagnosisRecord(
        entropy=[[1.0, 2.0]],
        context_length=16,
        max_observed=2.0,
        max_possible=math.log(16),
        quartile_shares=[0.0, 0.5, 0.0, 0.5],
        overloaded=[(0, 1)],
        collapsed=[],
        verdict="Entropic overload",
        layers=[3],
    ),
    AttentionPattern(
        sequences=8,
        context_length=16,
        distance=[[3.0, 2.0]],
        on_first=[[0.5, 0.25]],
        on_previous=[[0.1, 0.1]],
        on_itself=[[0.1, 0.1]],
        positions=[0, 8],
        entropy_by_position=[[0.5, 1.5]],
        layers=[3],
    ),
    CountRecord(
        architecture="SM",
        seq_len=16,
        parameters=1,
        nonlinear=[OperationCount(operation="softmax", count=4, shape=(16, 16))],
        ffn_flops=10**12,
        attention_flops=2,
    ),
    PrivateRun(
        protocol="cheetah",
        trust="semi-honest",
        server="127.0.0.1:9000",
        prompt="def f(\u2028",
        prompt_tokens=[1, 2],
        new_tokens=[3],
        new_text="x\n",
        stages=[
            StageCommunication(
                name="exp",
                layer=0,
                token=0,
                seconds=0.5,
                sent_bytes=1,
                received_bytes=2,
                sent_messages=3,
                received_messages=4,
            )
        ],
        setup_seconds=1.0,
        setup_bytes=10,
        reveal_bytes=5,
        seconds=2.0,
        ring_bits=64,
        fraction_bits=18,
        softmax="power-8",
    ),
    PlaintextComparison(max_logit_error=[0.01], same_top1=[True], plaintext_tokens=[3]),
    PredictionRecord(
        architecture="SM",
        layers=1,
        heads=2,
        hidden_size=4,
        vocab_size=300,
        seq_len=16,
        protocol="cheetah",
        trust="semi-honest",
        network="wan",
        embedding="private",
        softmax="power-2",
        calibrated_on="a machine",
        set_up=PassCost(operations=[]),
        prompt=PassCost(
            operations=[
                OperationCost(name="exp", layer=0, bytes=1e6, messages=12.0, rounds=3.0, seconds=0.5, latency=0.75)
            ]
        ),
        further=None,
    ),
    RolledBack(step=10, from_step=14, reason="step 14: the gradient is not finite", rate_factor=0.5),
    StudyRun(
        row="SM, a=1",
        seed=3,
        folder="SM,a=1/seed-3",
        diverged=True,
        step=7,
        cross_entropy=0.0,
        perplexity=1.0,
        tokens_per_second=10.0,
        reason="step 7: the gradient is not finite",
        layer=1,
    ),
    StudyRow(
        name="SM",
        settings={"architecture": "SM", "entropy_margin": "0.2"},
        seeds=[0, 1],
        diverged=[1],
        cross_entropy=Spread(mean=1.5, std=0.1, n=2),
        perplexity=Spread(mean=4.5, std=0.2, n=2),
        layers=1,
        heads=2,
        hidden_size=4,
        context_length=16,
        tokens=1000,
        parameters=10,
        nonlinear=[OperationCount(operation="softmax", count=2, shape=(16, 16))],
        ffn_flops=1,
        attention_flops=2,
        quartile_shares=[Spread(mean=0.25, std=0.0, n=2)] * 4,
        overloaded=[0.5],
        collapsed=[0.0],
        entropy=[[1.0, 2.0]],
        threshold=[],
        entropy_steps=[1, 2],
        layer_entropy=[[1.0], [1.5]],
        layer_entropy_std=[[0.1], [0.1]],
        loss_steps=[1],
        loss=[3.0],
        loss_std=[0.1],
    ),
    StudyClaim(
        lower="SM",
        higher="SM+G",
        seeds=[0, 1],
        differences=[math.inf, 0.5],
        mean=0.0,
        std=0.1,
        test="signs",
        p=0.25,
        least_p=0.25,
    ),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / record_files.RECORDS_FILE


def kinds(found: list[Record]) -> list[type]:
    return [type(record) for record in found]


def test_examples_cover_every_kind():
    assert set(kinds(EXAMPLES)) == set(get_args(Record))


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_round_trip(path: Path, record: Record):
    record_files.append(path, record)
    assert record_files.read(path) == [record]
    assert path.read_bytes().count(b"\n") == 1  # one line, whatever the texts hold
    record_files.rewrite(path, [record, record])
    assert record_files.read(path) == [record, record]


def test_traffic_adds_up_both_directions():
    (stage,) = next(r for r in EXAMPLES if isinstance(r, PrivateRun)).stages
    assert (stage.bytes, stage.messages) == (3, 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(path: Path, value: float):
    """A diverged model has them everywhere a float can stand."""
    record_files.append(
        path,
        TrainingStep(
            step=1, cross_entropy=value, entropy_penalty=value, learning_rate=0.0, grad_norm=value, tokens_per_second=1
        ),
    )
    record_files.append(path, EntropySnapshot(step=1, entropy=[[value, 1.0]], threshold=[[value]]))
    training, snapshot = record_files.read(path)
    assert isinstance(training, TrainingStep)
    assert isinstance(snapshot, EntropySnapshot)
    assert snapshot.threshold is not None
    found = [training.cross_entropy, training.entropy_penalty, training.grad_norm]
    for number in [*found, snapshot.entropy[0][0], snapshot.threshold[0][0]]:
        assert number == value or (number is not None and math.isnan(number) and math.isnan(value))
    assert b"null" not in path.read_bytes().replace(b'"temperature":null', b"")


def test_none_stays_none(path: Path):
    record_files.append(path, step(1))
    (found,) = record_files.read(path)
    assert isinstance(found, TrainingStep)
    assert found.entropy_penalty is None


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_a_last_line_cut_short_is_ignored(path: Path):
    for number in range(3):
        record_files.append(path, step(number))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole)):  # wherever a killed process was in its write
        path.write_bytes(whole[:length])
        assert record_files.read(path) == [step(0), step(1)]


@pytest.mark.parametrize("left", [b'{"kind":"step","st', b"", b"\xff\xfe"])
def test_append_after_a_line_cut_short(path: Path, left: bytes):
    """The next record must not be glued to the remains of the last one."""
    record_files.append(path, step(1))
    with open(path, "ab") as file:
        file.write(left)
    record_files.append(path, step(2))
    record_files.append(path, step(3))
    assert record_files.read(path) == [step(1), step(2), step(3)]


def test_append_when_only_a_part_of_a_line_is_there(path: Path):
    path.write_bytes(b'{"kind":"ru')
    record_files.append(path, step(1))
    assert record_files.read(path) == [step(1)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind":"step"',
        b"",
        b"[]",
        b'{"kind":"unheard of","version":1}',
        b'{"kind":"step","version":1}',
        b'{"step":1,"version":1}',
        b'{"kind":"skipped","step":1,"reason":"\xff"}',
        b'{"kind":"skipped","step":"one","reason":""}',
        b'{"kind":"skipped","step":1,"reason":"","version":"x"}',
        b"\x00\x00\x00",
    ],
)
def test_a_damaged_line_in_the_middle_is_named(path: Path, line: bytes):
    record_files.append(path, step(1))
    with open(path, "ab") as file:
        file.write(line + b"\n")
    record_files.append(path, step(3))
    with pytest.raises(UserError, match="line 2 is damaged") as caught:
        record_files.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_schema_version_is_refused(path: Path):
    record_files.append(path, step(1))
    with open(path, "ab") as file:  # a version may have kinds and fields that this one does not know
        file.write(b'{"kind":"step 2.0","version":2}\n')
    with pytest.raises(UserError, match="line 2 has schema version 2, this program reads 1"):
        record_files.read(path)


def test_fields_of_a_later_minor_change_are_passed_over(path: Path):
    path.write_bytes(b'{"kind":"skipped","step":1,"reason":"r","extra":[1],"version":1}\n')
    assert record_files.read(path) == [SkippedUpdate(step=1, reason="r")]


def test_missing_file_is_one_line(path: Path):
    with pytest.raises(UserError, match=r"cannot read the records .*No such file"):
        record_files.read(path)


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_forget_after_keeps_the_past(path: Path):
    back = RolledBack(step=4, from_step=9, reason="r", rate_factor=0.5)
    past = [started(), step(1), evaluation(4), SkippedUpdate(step=5, reason="r"), back, started(resumed_at=5), step(5)]
    lost = [step(6), evaluation(8), SkippedUpdate(step=7, reason="r"), EntropySnapshot(step=6, entropy=[[1.0]])]
    record_files.rewrite(path, [*past, *lost])
    record_files.forget_after(path, 5)
    assert record_files.read(path) == past


def test_forget_after_drops_what_the_end_of_a_run_writes_again(path: Path):
    """Killed between its last record and its model, a run evaluates once more from its last checkpoint."""
    the_end = [r for r in EXAMPLES if isinstance(r, DiagnosisRecord | AttentionPattern | CountRecord)]
    assert len(the_end) == 3
    record_files.rewrite(path, [started(10), step(9), evaluation(9), step(10), evaluation(10), *the_end])
    record_files.forget_after(path, 10)
    assert record_files.read(path) == [started(10), step(9), evaluation(9), step(10)]


def test_forget_after_everything(path: Path):
    record_files.rewrite(path, [started(), step(1), evaluation(2)])
    record_files.forget_after(path, 0)
    assert record_files.read(path) == [started()]
    record_files.forget_after(path.with_name("missing"), 0)
    assert not path.with_name("missing").exists()


def test_forget_after_mends_a_last_line_cut_short(path: Path):
    record_files.append(path, step(1))
    with open(path, "ab") as file:
        file.write(b'{"kind"')
    record_files.forget_after(path, 1)
    assert path.read_bytes() == record_files.encode(step(1)) + b"\n"


def test_rewrite_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch):
    record_files.append(path, step(1))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            record_files.rewrite(path, [step(2), step(3)])
    assert record_files.read(path) == [step(1)]
    record_files.rewrite(path, [step(2)])
    assert record_files.read(path) == [step(2)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rewrite_of_records_that_cannot_be_encoded_leaves_the_file(path: Path):
    record_files.append(path, step(1))

    def failing() -> list[Record]:
        yield step(2)  # type: ignore[misc]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        record_files.rewrite(path, failing())
    assert record_files.read(path) == [step(1)]


def test_a_prediction_with_the_former_name_of_its_rounds_is_read(tmp_path: Path) -> None:
    """Until 27 November 2026 rounds were recorded as "trips"."""
    (prediction,) = (r for r in EXAMPLES if isinstance(r, PredictionRecord))
    line = record_files.encode(prediction)
    older = line.replace(b'"rounds":', b'"trips":')
    assert older != line
    (tmp_path / "records.jsonl").write_bytes(older + b"\n" + line + b"\n")
    assert record_files.read(tmp_path / "records.jsonl") == [prediction, prediction]
    assert prediction.prompt.rounds == 3.0


@pytest.mark.parametrize("polynomial", [False, True])
def test_records_with_two_fields_for_the_softmax_are_read(path: Path, polynomial: bool) -> None:
    """Of private runs t alone was recorded; whether it was a polynomial's is told by the stages."""
    now, former = (b"polynomial-2", b"power") if polynomial else (b"power-2", b"exp")
    lines = []
    for record in EXAMPLES:
        if isinstance(record, PredictionRecord):
            one = record_files.encode(msgspec.structs.replace(record, softmax=now.decode()))
            fields = b'"exp_iterations":2,"polynomial":' + (b"true" if polynomial else b"false")
        elif isinstance(record, PrivateRun):
            stages = [msgspec.structs.replace(record.stages[0], name=former.decode())]
            one = record_files.encode(msgspec.structs.replace(record, softmax=now.decode(), stages=stages))
            fields = b'"exp_iterations":2'
        else:
            continue
        older = one.replace(b'"softmax":"' + now + b'"', fields)
        assert older != one
        lines += [older, one]
    path.write_bytes(b"\n".join([*lines, b""]))
    found = record_files.read(path)
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert {record.softmax for record in found if isinstance(record, PredictionRecord | PrivateRun)} == {now.decode()}

    path.write_bytes(lines[0].replace(b'"exp_iterations":2', b'"exp_iterations":"two"') + b"\n")
    with pytest.raises(UserError, match="line 1 is damaged: exp_iterations is 'two', expected int"):
        record_files.read(path)
    path.write_bytes(lines[1].replace(now, b"<b>") + b"\n")
    with pytest.raises(UserError, match="line 1 is damaged: softmax must be exact, quartic"):
        record_files.read(path)


ROOT = Path(__file__).parents[1]
COMMITTED = [
    *sorted((ROOT / "docs" / "gallery" / "records").glob("*/records.jsonl")),
    *sorted((ROOT / "benchmarks" / "results" / "studies").glob("*/study.jsonl")),
]


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda path: path.parent.name)
def test_records_of_older_versions_are_read(committed: Path):
    """As they were written then: every line is a record, and says what it said."""
    lines = committed.read_bytes().splitlines()
    found = record_files.read(committed)
    assert len(found) == len(lines) > 0
    for record, line in zip(found, lines):
        now = msgspec.json.decode(record_files.encode(record))
        then = msgspec.json.decode(line)
        if iterations := then.pop("exp_iterations", None):  # now one text, in either of the two kinds that have it
            assert now["softmax"] == f"power-{iterations}"
        assert {name: now[name] for name in then if name in now} == then


def test_there_are_records_of_runs_and_of_studies():
    assert {path.name for path in COMMITTED} == {record_files.RECORDS_FILE, record_files.STUDY_FILE}
