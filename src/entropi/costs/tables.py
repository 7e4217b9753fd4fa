"""What `entropi cost` prints: one report, several side by side, and what fits a budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from entropi.costs import advice, budget
from entropi.costs.budget import Candidate, Search
from entropi.costs.report import CostReport
from entropi.records import MATERIAL, OPERATIONS, BatchCost, OperationCost, PassCost, PredictionRecord, PreparedRecord

_BAR = 24  # characters of the longest bar
_FILE_WIDTH = 120  # columns
ROUNDS = "A round is one message latency, one way: half a round trip of the network."


def show(report: CostReport) -> None:
    """One configuration on standard output."""
    console = _console()
    _show_counts(console, report)
    _show_operations(console, report.prediction)
    _show_passes(console, report.prediction)
    if report.prediction.batch is not None:
        _show_batch(console, report.prediction, report.prediction.batch)
    if report.prediction.prepared is not None:
        _show_prepared(console, report.prediction, report.prediction.prepared)
    _show_legend(console, report.prediction.prompt.by_operation())
    if report.paper is not None:
        console.print(f"\nthe paper: {report.paper[0]} GB, {report.paper[1]} min. {advice.PAPER_REMARK}")
    if report.changes:
        console.print(f"\n{_dominant(report)}. What would help, all sizes as they are:")
        for change in report.changes:
            console.print(f"  {change.words} would save {_size(change.saved_bytes)} and {change.saved_latency:,.1f} s")
        if report.together is not None and report.prediction.batch is None:
            console.print(f"  {_together(report.prediction, report.together)} (--batch {report.together.prompts})")
        if report.size_options is not None:
            architecture = report.counts.architecture
            console.print(f"Another architecture at these sizes: --compare '{architecture}' NAME {report.size_options}")


def _show_counts(console: Console, report: CostReport) -> None:
    counts, record = report.counts, report.prediction
    console.print(
        f"{report.name}: {counts.parameters:,} parameters, {record.layers} layers, {record.heads} heads,"
        f" width {record.hidden_size}, {record.tokens_in_words}"
    )
    for operation in counts.nonlinear:
        rows, columns = operation.shape
        console.print(f"  {operation.operation:12} {operation.count:4} x R^({rows} x {columns})")
    console.print(f"  FLOPs        FFN {_flops(counts.ffn_flops)}, attention {_flops(counts.attention_flops)}")
    console.print(f"  folded       FFN {_flops(report.folded.ffn_flops)}, what private inference computes\n")
    console.print(f"{record.protocol}: {record.trust}")
    console.print(
        f"{record.network}; {record.embedding} token table; {record.kernel}; prices of {record.calibrated_on}\n"
    )


def _show_operations(console: Console, record: PredictionRecord) -> None:
    table = Table(title=f"pass over the prompt, by operation, {record.kernel_label}", title_justify="left", box=SIMPLE)
    for column in ("operation", "MB", "", "messages", "rounds", "computing s", "in all s"):
        table.add_column(column, justify="left" if column in ("operation", "") else "right", no_wrap=True)
    operations = record.prompt.by_operation()
    largest = max(operation.bytes for operation in operations.values())
    for number, (name, o) in enumerate(operations.items()):
        share = o.bytes / record.prompt.bytes if record.prompt.bytes else 0.0
        bar = "█" * round(_BAR * o.bytes / largest) if largest else ""
        table.add_row(
            f"[bold]{name}[/bold]" if number == 0 else name,
            f"{o.bytes / 1e6:,.1f}",
            f"{bar} {share:.0%}",
            f"{o.messages:,.0f}",
            f"{o.rounds:,.0f}",
            f"{o.seconds:.1f}",
            f"{o.latency:.1f}",
        )
    console.print(table)


def _show_passes(console: Console, record: PredictionRecord) -> None:
    for words, part in (
        ("set-up, once", record.set_up),
        ("prompt", record.prompt),
        ("each further token", record.further),
        (f"with {_draft_tokens(record.draft_tokens)}", record.drafted),
    ):
        if part is not None:
            console.print(
                f"{words:20} {_size(part.bytes):>10}, {part.messages:,.0f} messages, {part.rounds:,.0f} rounds,"
                f" {part.seconds:,.1f} s computing, {part.latency:,.1f} s in all"
                + ("" if part is record.set_up else f"; {record.kernel_label}")
            )
    if record.drafted is not None and record.further is not None:
        console.print(_break_even(record.drafted, record.further, record.draft_tokens))


def _show_batch(console: Console, record: PredictionRecord, batch: BatchCost) -> None:
    """Passes that several prompts share, beside as many prompts one at a time."""
    table = Table(
        title=f"{batch.prompts} prompts of {record.tokens_in_words}, one at a time and together, {record.kernel_label}",
        title_justify="left",
        box=SIMPLE,
    )
    for column in ("", "MB", "rounds", "computing s", "in all s", "tokens a minute"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def row(words: str, one: PassCost, times: int, speed: float | None = None) -> None:
        sums = [one.bytes / 1e6, one.rounds, one.seconds, one.latency]
        cells = [f"{times * number:,.{digits}f}" for number, digits in zip(sums, (1, 0, 1, 1))]
        table.add_row(words, *cells, "" if speed is None else f"{speed:,.1f}")

    row("prompts, one at a time", record.prompt, batch.prompts)
    row("prompts together", batch.prompt, 1)
    if record.further is not None and batch.further is not None:
        table.add_section()
        row("a token of each, one at a time", record.further, batch.prompts, record.tokens_a_minute)
        row("a token of each together", batch.further, 1, batch.tokens_a_minute)
    console.print()
    console.print(table)
    if batch.tokens_a_minute:
        console.print(_together(record, batch))


def _together(record: PredictionRecord, batch: BatchCost) -> str:
    """How many tokens a minute several prompts make at once, and one at a time."""
    times = batch.tokens_a_minute / record.tokens_a_minute
    return (
        f"{batch.prompts} prompts a pass (ask --batch) make {batch.tokens_a_minute:,.1f} tokens a minute, "
        f"{times:.1f} times as many as one at a time"
    )


def _draft_tokens(number: int) -> str:
    return f"{number} draft token{'s' * (number != 1)}"


def _break_even(drafted: PassCost, further: PassCost, drafts: int) -> str:
    """From how many drafts that hold on a pass with some saves time."""
    tokens = drafted.latency / further.latency
    if tokens > 1 + drafts:
        return f"{_draft_tokens(drafts)} a pass save no time here, were all of them to hold"
    size = drafted.bytes / further.bytes
    return (
        f"{_draft_tokens(drafts)} a pass save time where more than {tokens - 1:.1f} of them hold on average, "
        f"and bytes where more than {size - 1:.1f} do"
    )


def _show_prepared(console: Console, record: PredictionRecord, prepared: PreparedRecord) -> None:
    """Both phases of a session with prepared products, and the same session without."""
    table = Table(
        title=(
            "products prepared before the prompt is known:"
            f" {record.tokens_in_words} and {prepared.new_tokens} new ones, {record.kernel_label}"
        ),
        title_justify="left",
        box=SIMPLE,
    )
    for column in ("", "MB", "messages", "rounds", "computing s", "in all s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def row(words: str, o: OperationCost | PassCost) -> None:
        sums = f"{o.messages:,.0f}", f"{o.rounds:,.0f}", f"{o.seconds:,.1f}", f"{o.latency:,.1f}"
        table.add_row(words, f"{o.bytes / 1e6:,.1f}", *sums)

    row("offline: set-up", prepared.set_up)
    for kind, operation in prepared.offline.by_operation().items():
        row(f"offline: {MATERIAL[kind]}", operation)
    table.add_section()
    row("online: set-up", prepared.online_set_up)
    row("online: prompt", prepared.prompt)
    if prepared.further is not None:
        row("online: each further token", prepared.further)
    if prepared.drafted is not None:
        row(f"online: with {_draft_tokens(record.draft_tokens)}", prepared.drafted)
    table.add_section()
    totals = prepared.totals()
    for name, words in PHASES.items():
        row(words, totals[name])
    console.print()
    console.print(table)
    console.print(
        f"material for {prepared.tokens:,} tokens, stored until it is used:"
        f" {_size(prepared.client_bytes)} at the client, {_size(prepared.server_bytes)} at the server"
    )
    online = prepared.prompt if prepared.further is None else prepared.further
    slowest = max(online.by_operation().values(), key=lambda operation: operation.latency)
    what = "the prompt's" if prepared.further is None else "a further token's"
    console.print(f"{slowest.name} is {slowest.latency / online.latency:.0%} of {what} time online")
    if prepared.drafted is not None and prepared.further is not None:
        console.print(f"online {_break_even(prepared.drafted, prepared.further, record.draft_tokens)}")


# How sums of a session with prepared products are named.
PHASES = {
    "offline": "offline in all",
    "online": "online in all",
    "both": "offline and online together",
    "unprepared": "the same session without preparation",
}


def _show_legend(console: Console, names: Iterable[str]) -> None:
    """What the named operations are, in the order in which they run."""
    console.print(f"\n{ROUNDS} The operations, as they run:")
    shown = set(names)
    for name, words in OPERATIONS.items():
        if name in shown:
            console.print(f"  {name:12} {words}")


def compare(reports: Sequence[CostReport]) -> None:
    """Several configurations side by side, on standard output."""
    console = _console()
    first = reports[0].prediction
    console.print(f"{first.protocol}: {first.trust}\n{first.network}; prices of {first.calibrated_on}\n")
    console.print(_side_by_side(reports))

    largest = max(report.prediction.prompt.bytes for report in reports) or 1.0
    names = []
    for report in reports:
        console.print(f"\n{report.name}, {report.prediction.kernel_label}")
        for o in report.prediction.prompt.by_operation().values():
            names.append(o.name)
            if bar := "█" * round(2 * _BAR * o.bytes / largest):
                console.print(f"  {o.name:12} {bar} {_size(o.bytes)}")
    _show_legend(console, names)

    for report in reports:
        if report.changes:
            best = report.changes[0]
            console.print(f"\n{report.name}: {_dominant(report)}; {best.words} would save {_size(best.saved_bytes)}")
    if any(report.paper is not None for report in reports):
        console.print(f"\n{advice.PAPER_REMARK}")


def _side_by_side(reports: Sequence[CostReport]) -> Table:
    table = Table(
        title="MB of the pass over the prompt, by operation; what dominates is marked *",
        title_justify="left",
        box=SIMPLE,
    )
    table.add_column("operation", no_wrap=True)
    for report in reports:
        table.add_column(f"{report.name}, {report.prediction.seq_len} tokens", justify="right")

    sums = [report.prediction.prompt.by_operation() for report in reports]
    for name in dict.fromkeys(name for operations in sums for name in operations):
        table.add_row(name, *(_megabytes(name, operations) for operations in sums))

    rows = (
        ("softmax kernel", lambda one: one.prediction.kernel_label),
        ("sum", lambda one: f"{one.prediction.prompt.bytes / 1e6:,.1f}"),
        ("the paper's, GB", lambda one: "" if one.paper is None else f"{one.paper[0]}"),
        ("messages", lambda one: f"{one.prediction.prompt.messages:,.0f}"),
        ("rounds", lambda one: f"{one.prediction.prompt.rounds:,.0f}"),
        ("computing s", lambda one: f"{one.prediction.prompt.seconds:,.1f}"),
        ("in all s", lambda one: f"{one.prediction.prompt.latency:,.1f}"),
        ("further token, MB", lambda one: _further(one.prediction)),
    )
    table.add_section()
    for name, cell in rows:
        table.add_row(name, *(cell(report) for report in reports))
    found = [report.prediction.prepared for report in reports]
    if prepared := [one for one in found if one is not None]:
        table.add_section()
        for name, number in _prepared_rows(prepared):
            table.add_row(name, *number)
    return table


def _prepared_rows(found: Sequence[PreparedRecord]) -> Iterator[tuple[str, list[str]]]:
    """Rows of a comparison on sessions with prepared products."""
    totals = [one.totals() for one in found]
    yield "prepared, new tokens", [str(one.new_tokens) for one in found]
    for phase, words in PHASES.items():
        yield f"{words}, MB", [f"{sums[phase].bytes / 1e6:,.1f}" for sums in totals]
        yield f"{words}, s", [f"{sums[phase].latency:,.1f}" for sums in totals]
    yield "online: prompt, MB", [f"{one.prompt.bytes / 1e6:,.1f}" for one in found]
    yield "online: prompt, s", [f"{one.prompt.latency:,.1f}" for one in found]
    further = [one.further for one in found]
    yield "online: further token, MB", ["" if one is None else f"{one.bytes / 1e6:,.1f}" for one in further]
    yield "online: further token, s", ["" if one is None else f"{one.latency:,.1f}" for one in further]
    yield "stored at the client, MB", [f"{one.client_bytes / 1e6:,.1f}" for one in found]
    yield "stored at the server, MB", [f"{one.server_bytes / 1e6:,.1f}" for one in found]


def _megabytes(name: str, operations: dict[str, OperationCost]) -> str:
    if name not in operations:
        return ""
    mark = "*" if name == next(iter(operations)) else ""
    return f"{mark}{operations[name].bytes / 1e6:,.1f}"


def _dominant(report: CostReport) -> str:
    prompt = report.prediction.prompt
    dominant = next(iter(prompt.by_operation().values()))
    return f"{dominant.name} is {dominant.bytes / prompt.bytes:.0%} of the bytes"


def show_search(found: Search, text: str, seq_len: int) -> None:
    """What fits a budget, on standard output; if nothing does, the cheapest that was looked at."""
    console = _console()
    if not found.fitting:
        console.print(
            f"nothing that was searched answers a prompt of {seq_len} tokens within {text}; "
            f"the cheapest is {_in_words(found.cheapest)}"
        )
        console.print(_searched())
        return
    table = Table(
        title=(
            f"the deepest of every width within {text} for {seq_len} tokens, most parameters first;"
            f" {found.fitting[0].prediction.kernel}"
        ),
        title_justify="left",
        box=SIMPLE,
    )
    for column in ("architecture", "layers", "width", "parameters in layers", "MB", "in all s", "further token, MB"):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for one in found.fitting:
        table.add_row(
            one.shape.architecture,
            str(one.shape.num_hidden_layers),
            str(one.shape.hidden_size),
            f"{one.parameters / 1e6:,.1f} M",
            f"{one.prediction.prompt.bytes / 1e6:,.1f}",
            f"{one.prediction.prompt.latency:,.1f}",
            _further(one.prediction),
        )
    console.print(table)
    console.print(_searched())


def _searched() -> str:
    """What a search tries, in a sentence."""
    widths, depths = (", ".join(map(str, sizes)) for sizes in (budget.WIDTHS, budget.DEPTHS))
    names = ", ".join(budget.SEARCHED)
    return f"searched: {names} with heads of {budget.HEAD} columns, widths {widths} and layers {depths}"


def _in_words(one: Candidate) -> str:
    prompt = one.prediction.prompt
    return (
        f"{one.shape.architecture} with {one.shape.num_hidden_layers} layers of width {one.shape.hidden_size}: "
        f"{_size(prompt.bytes)} and {prompt.latency:,.1f} s; {one.prediction.kernel}"
    )


def _further(prediction: PredictionRecord) -> str:
    return "" if prediction.further is None else f"{prediction.further.bytes / 1e6:,.1f}"


def _flops(count: float) -> str:
    return f"{count / 1e9:.1f} G" if count >= 1e8 or not count else f"{count / 1e6:.1f} M"


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _console() -> Console:
    """Standard output; a file is as wide as a table needs."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, emoji=False, soft_wrap=True, width=_FILE_WIDTH)
