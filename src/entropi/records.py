"""The types of records: what every stage of a run tells, and the report reads.

Entropies are in nats, sizes in bytes, times in seconds; matrices are nested lists, layers first, heads second; where
layers differ in their number of heads, rows differ in length. `record_files` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import msgspec

from entropi.softmax import SoftmaxForm

SCHEMA_VERSION = 1

Matrix: TypeAlias = list[list[float]]


class Base(msgspec.Struct, tag_field="kind", forbid_unknown_fields=False, kw_only=True):
    """What all records carry."""

    version: int = SCHEMA_VERSION


class CorpusSource(msgspec.Struct, frozen=True):
    """Where part of a corpus comes from, and under which licence."""

    name: str  # with its version
    licence: str  # as the source itself states it
    part: str  # train or held-out


class RunStarted(Base, tag="run"):
    """The first record of a training run, written again whenever the run is resumed."""

    time: str  # ISO 8601, UTC
    name: str  # as the user wrote it, for example "EReg(SM(t)+ScFuFFN)"
    architecture: str  # the model's own, for example "SM(t)+ScFuFFN"
    parameters: int
    layers: int
    heads: int
    hidden_size: int
    vocab_size: int
    context_length: int
    train_tokens: int  # in the corpus
    heldout_tokens: int
    corpus: str
    corpus_hash: str  # SHA-256 over paths and texts
    tokens_per_step: int
    total_steps: int
    precision: str
    tokenizer_hash: str = ""  # SHA-256; empty in runs begun before it was recorded
    corpus_sources: list[CorpusSource] = []  # where they are known
    resumed_at: int = 0  # the step whose checkpoint was taken up; 0 for a fresh start
    teacher: str = ""  # of a tapering, the model that it began as
    teacher_hash: str = ""  # SHA-256 over its configuration and weights


class TrainingStep(Base, tag="step"):
    """Means over the updates since the previous such record, refused ones left out."""

    step: int
    cross_entropy: float  # nats per token; NaN if every update was refused
    entropy_penalty: float | None  # lambda * L_entropy as added to the loss (Algorithm 1); None without it
    learning_rate: float  # of the last update, as the next one
    grad_norm: float | None  # before clipping
    tokens_per_second: float


class EntropySnapshot(Base, tag="entropy"):
    """Mean attention entropy of every head over the sequences of a step (Eq. 5-7), before its update."""

    step: int
    entropy: Matrix  # (L, H), nats
    threshold: Matrix | None = None  # (L, H), fraction of the maximum entropy (Algorithm 1, theta)
    temperature: Matrix | None = None  # (L, H), mean over positions


class TaperSnapshot(Base, tag="taper"):
    """Where a tapering stands at a step, and how far the model is from its teacher, before its update."""

    step: int
    stage: str  # the operation that leaves: "activation", "norm", "softmax", "final_norm"; "before", "after" all
    gates: dict[str, list[float]]  # by operation, 1 to 0 for each layer; of the final norm one
    distance: Matrix  # (L, H), nats, mean over rows of the difference of a row's entropies
    divergence: float  # nats per token, Kullback-Leibler, of the next token's distribution from the teacher's
    hidden: float | None  # relative mean square of the difference of hidden states; None where it has no weight


class Evaluation(Base, tag="evaluation"):
    """Held-out text at a step."""

    step: int
    cross_entropy: float  # nats per token
    perplexity: float
    tokens: int
    entropy: Matrix  # (L, H), nats


class SkippedUpdate(Base, tag="skipped"):
    """An optimizer step that was refused because a gradient or the loss was not finite."""

    step: int
    reason: str


class RolledBack(Base, tag="rollback"):
    """The run went back to a checkpoint because it had diverged; later records were dropped."""

    step: int  # of the checkpoint; 0 for the start
    from_step: int  # at which it was noticed
    reason: str
    rate_factor: float  # by which the recipe's learning rates are multiplied from here on


class DiagnosisRecord(Base, tag="diagnosis"):
    """Section 3 and Fig. 2a of the paper for one model."""

    entropy: Matrix  # a row a layer that has attention, a number a head of it, nats
    context_length: int
    max_observed: float  # M, nats
    max_possible: float  # log T, nats
    quartile_shares: list[float]  # of heads in [0,M/4), [M/4,M/2), [M/2,3M/4), [3M/4,M]
    overloaded: list[tuple[int, int]]  # (layer, head), the layer by the model's own number
    collapsed: list[tuple[int, int]]
    verdict: str
    layers: list[int] = []  # the model's number of each row's layer; empty in older records: 0, 1, ...
    source: str = ""  # what text it was measured on, in words
    model: str = ""  # name of its class, where no `RunStarted` tells what the model is
    parameters: int = 0  # likewise; 0 where it is not known


class AttentionPattern(Base, tag="attention"):
    """Where the heads look, and how their entropy grows with the position: means over held-out sequences.

    Matrices have a row a layer and, but for the last, a column a head of it. Weights are means over query rows from the
    third on, so that the first token, the previous one and the row's own are three different ones.
    """

    sequences: int
    context_length: int
    distance: Matrix  # tokens back, sum_j a_ij (i - j)
    on_first: Matrix  # share of a row's weight on the first token of the sequence
    on_previous: Matrix
    on_itself: Matrix
    positions: list[int]  # the first query position of each of P stretches of equal length, counted from 0
    entropy_by_position: Matrix  # (L, P), nats, mean over the heads of a layer and the rows of a stretch
    layers: list[int] = []  # as in `DiagnosisRecord`


class OperationCount(msgspec.Struct, kw_only=True):
    """`count` evaluations of a nonlinear operation on tensors of shape `shape`."""

    operation: (
        str  # "softmax", "powers", "layernorm", "rmsnorm", "gelu", "relu", "leaky_relu", "square", "bilinear", "swiglu"
    )
    count: int
    shape: tuple[int, int]


class CountRecord(Base, tag="cost"):
    """Exact counts for one forward pass of `seq_len` tokens."""

    architecture: str
    seq_len: int
    parameters: int
    nonlinear: list[OperationCount]
    ffn_flops: int
    attention_flops: int
    folded: bool = False  # counted on the folded form


# What the operations of the private program compute, by the names that records and tables have; in the order in which
# they run.
OPERATIONS = {
    "setup": "keys and the first oblivious transfers, once a session",
    "embedding": "rows of the token table, and positions",
    "norm": "LayerNorm or RMSNorm: division by the root of the mean square",
    "qkv": "queries, keys and values: one matrix product, and rotary positions",
    "temperature": "queries times the inverse temperatures of SM(t)",
    "length": "queries times the gains of log-length scaling",
    "scores": "attention logits: queries times keys",
    "power": "polynomial attention weights: powers of the logits",
    "max": "maximum of every row of logits, which is subtracted",
    "exp": "what stands for the exponential: the softmax kernel (1 + x/2^t)^(2^t), or the quartic exponential",
    "values": "attention weights times values, and the sum of every row of weights; prepared, the division by it too",
    "normalise": "the softmax's division by those sums",
    "average": "the weighted values over the number of keys or a constant, which are public: nothing is divided",
    "output": "the heads' results put together: one matrix product; prepared, that of the next layer's \"qkv\" too",
    "ffn": "matrix products of the feed-forward network",
    "activation": "the feed-forward network's nonlinearity",
    "centre": "one matrix product before the final norm: what folding left over, and the mean subtracted",
    "head": "logits of the vocabulary: one matrix product",
    "choose": "the likeliest tokens, where the server reveals no more",
    "round": "the logits' last binary places dropped",
    "keep": "keys and values of drafts that did not hold are forgotten: nothing is sent",
    "reveal": "the server's share of what the client learns, sent to the client: 8 bytes a logit",
}


MATERIAL = {
    "times_matrix": "rows times the server's matrices",
    "times_table": "one-hot rows times the server's token table",
    "scores": "queries times keys",
    "mix": "attention weights times values",
    "square": "squares of numbers",
    "times": "products of numbers",
    "scale_rows": "rows times a factor each",
    "sums_of_squares": "sums of the squares of rows",
    "truncate": "bits for truncations",
    "signs": "bits for the signs of numbers, and their products",
    "winners": "bits for the largest of a few numbers, and their products",
    "bits": "bits as numbers, for what follows from a sign",
    "kept": "numbers that are kept or not, by their sign",
}


class OperationCost(msgspec.Struct, kw_only=True):
    """What one operation of one pass is predicted to cost all parties together."""

    name: str  # "scores", "exp", ...
    layer: int  # -1 outside the layers
    bytes: float
    messages: float  # asynchronous ones
    rounds: float  # message latencies, one way, that wait for each other: two a round trip
    seconds: float  # computing, on the calibrated machine with all parties on it
    latency: float  # seconds, the network's part included

    def __add__(self, other: OperationCost) -> OperationCost:
        """Both together, under the first one's name."""
        return OperationCost(
            name=self.name,
            layer=self.layer if self.layer == other.layer else -1,
            bytes=self.bytes + other.bytes,
            messages=self.messages + other.messages,
            rounds=self.rounds + other.rounds,
            seconds=self.seconds + other.seconds,
            latency=self.latency + other.latency,
        )


class PassCost(msgspec.Struct, kw_only=True):
    """A pass through the model, by operation in the order in which they run."""

    operations: list[OperationCost]

    @property
    def bytes(self) -> float:
        return sum(operation.bytes for operation in self.operations)

    @property
    def messages(self) -> float:
        return sum(operation.messages for operation in self.operations)

    @property
    def rounds(self) -> float:
        return sum(operation.rounds for operation in self.operations)

    @property
    def seconds(self) -> float:
        return sum(operation.seconds for operation in self.operations)

    @property
    def latency(self) -> float:
        return sum(operation.latency for operation in self.operations)

    def by_operation(self) -> dict[str, OperationCost]:
        """Summed over layers, the operation with most bytes first."""
        sums: dict[str, OperationCost] = {}
        for operation in self.operations:
            name = operation.name
            sums[name] = sums[name] + operation if name in sums else operation
        return dict(sorted(sums.items(), key=lambda item: item[1].bytes, reverse=True))


class PreparedRecord(msgspec.Struct, kw_only=True):
    """What a session whose products are prepared will cost; nothing was run."""

    new_tokens: int  # the last of which is not computed with
    tokens: int  # that material is prepared for: prefix, prompt and all new ones but the last
    set_up: PassCost  # once for preparing
    offline: PassCost  # before the prompt is known, by kind of product
    client_bytes: int  # kept until the session
    server_bytes: int
    online_set_up: PassCost  # once for the session
    prompt: PassCost  # online
    further: PassCost | None  # the first token after the prompt, where more than one is asked for
    drafted: PassCost | None = None  # one token after the prompt and drafts of those behind it, where asked for
    all_further: PassCost  # all of them together
    unprepared: PassCost  # the same session without preparation, its set-up included

    def totals(self) -> dict[str, OperationCost]:
        """Sums of the session: offline and online, each with its set-up, both, and what they take the place of."""
        offline = _total("offline", self.set_up, self.offline)
        online = _total("online", self.online_set_up, self.prompt, self.all_further)
        both = msgspec.structs.replace(offline + online, name="both")
        return {one.name: one for one in (offline, online, both, _total("unprepared", self.unprepared))}


def _total(name: str, *passes: PassCost) -> OperationCost:
    nothing = OperationCost(name=name, layer=-1, bytes=0, messages=0, rounds=0, seconds=0, latency=0)
    return sum((operation for one in passes for operation in one.operations), nothing)


class BatchCost(msgspec.Struct, kw_only=True):
    """What passes cost that several prompts of equal length share (ask --batch)."""

    prompts: int
    prompt: PassCost  # of all prompts
    further: PassCost | None  # one more token of each

    @property
    def tokens_a_minute(self) -> float:
        """Of all answers, once the prompts are read."""
        return 60 * self.prompts / self.further.latency if self.further is not None else 0.0


class PredictionRecord(Base, tag="prediction"):
    """What a session of private inference will cost by `entropi cost`; nothing was run."""

    architecture: str
    layers: int
    heads: int
    hidden_size: int
    vocab_size: int
    seq_len: int  # of the prompt
    protocol: str
    trust: str  # its trust model in words
    network: str
    embedding: str  # "private" or "public"
    softmax: str  # that is evaluated, as `entropi.softmax` names it
    calibrated_on: str  # machine
    set_up: PassCost  # keys and first transfers, once a session
    prompt: PassCost
    further: PassCost | None  # one token after the prompt
    prefix_tokens: int = 0  # public ones that the prompt continues
    own_kernel: bool | None = None  # whether the model is trained with this softmax; None in older records
    prepared: PreparedRecord | None = None  # the same model with prepared products, where that was asked for
    draft_tokens: int = 0
    drafted: PassCost | None = None  # one token after the prompt and so many drafts of those behind it
    batch: BatchCost | None = None  # several such prompts at once, where asked for

    def __post_init__(self) -> None:
        SoftmaxForm.parse(self.softmax)

    @property
    def tokens_a_minute(self) -> float:
        """Of an answer, once the prompt is read."""
        return 60 / self.further.latency if self.further is not None else 0.0

    @property
    def tokens_in_words(self) -> str:
        """The length of the prompt, and of the public prefix if there is one."""
        return f"{self.seq_len} tokens" + (f" after {self.prefix_tokens} public ones" if self.prefix_tokens else "")

    @property
    def kernel(self) -> str:
        """What stands for the softmax's exponential, in words."""
        whose = {
            None: "",
            True: ", the model's own",
            False: " for a model trained with the exact softmax",
        }[self.own_kernel]
        return f"{SoftmaxForm.parse(self.softmax).words}{whose}"

    @property
    def kernel_label(self) -> str:
        """The same, short enough to stand beside a figure."""
        whose = {None: "", True: " (its own)", False: " (trained exact)"}[self.own_kernel]
        return f"{SoftmaxForm.parse(self.softmax).label}{whose}"


class StageCommunication(msgspec.Struct, kw_only=True):
    """What one operation of one pass cost one party, as that party's engine counted it."""

    name: str  # "scores", "exp", ...
    layer: int  # -1 outside the layers
    token: (
        int  # 0 for the pass over the prompt, else the new tokens before the pass: 1, 2, ..., fewer where drafts held
    )
    seconds: float
    sent_bytes: int
    received_bytes: int
    sent_messages: int
    received_messages: int

    @property
    def bytes(self) -> int:
        """Both directions."""
        return self.sent_bytes + self.received_bytes

    @property
    def messages(self) -> int:
        """Both directions; asynchronous messages, not rounds."""
        return self.sent_messages + self.received_messages


def combined(parts: Sequence[StageCommunication]) -> StageCommunication:
    """What parts of one operation cost together, under the name of the first."""
    first = parts[0]
    sums = ("seconds", "sent_bytes", "received_bytes", "sent_messages", "received_messages")
    return msgspec.structs.replace(first, **{name: sum(getattr(part, name) for part in parts) for name in sums})


class PrivateRun(Base, tag="private"):
    """One private generation as the client saw it. The prompt is the client's own and stays on its side."""

    protocol: str  # "cheetah"
    trust: str  # its trust model in words
    server: str
    prompt: str
    prompt_tokens: list[int]
    new_tokens: list[int]
    new_text: str
    stages: list[StageCommunication]
    setup_seconds: float
    setup_bytes: int  # input sharing and key exchange counted by the link, where the engine tells; else 0
    reveal_bytes: int  # the server's shares of the logits
    seconds: float  # from the first message to the last token, set-up included
    ring_bits: int
    fraction_bits: int
    softmax: str  # that was evaluated, as `entropi.softmax` names it
    padding_tokens: int = 0  # put before the prompt, so that its length tells less
    prefix_tokens: int = 0  # public ones that the server put before both
    past_tokens: int = 0  # of the conversation before this message
    # What had been prepared for this run's sessions took so much before, both directions, set-ups included; not in
    # `bytes` and `seconds`.
    prepared_bytes: int = 0
    prepared_seconds: float = 0.0
    drafted_tokens: int = 0  # computed with before it was known whether they are the answer's
    held_tokens: int = 0  # of these
    # Prompts that shared this one's passes, whose stages, bytes and seconds are those of all; and the new tokens of all
    # of them when this one's answer was finished, in the same session.
    batch_prompts: int = 1
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        SoftmaxForm.parse(self.softmax)

    @property
    def passes(self) -> int:
        """How many the new tokens took, the one over the prompt included; fewer than tokens where drafts held."""
        return len({stage.token for stage in self.stages})

    @property
    def kernel(self) -> str:
        """What stood for the softmax's exponential, in words."""
        return SoftmaxForm.parse(self.softmax).words

    @property
    def kernel_label(self) -> str:
        """The same, short enough to stand beside a figure."""
        return SoftmaxForm.parse(self.softmax).label

    @property
    def bytes(self) -> int:
        """Everything the engines exchanged, both directions: stages, set-up and the revealed shares."""
        return sum(stage.bytes for stage in self.stages) + self.setup_bytes + self.reveal_bytes

    @property
    def messages(self) -> int:
        """Of all stages, both directions; asynchronous messages, not rounds."""
        return sum(stage.messages for stage in self.stages)

    @property
    def all_new_tokens(self) -> int:
        """How many all prompts that shared the passes have got."""
        return self.batch_tokens or len(self.new_tokens)

    @property
    def tokens_a_minute(self) -> float:
        """New ones of all prompts that shared the passes, set-up included."""
        return 60 * self.all_new_tokens / self.seconds if self.seconds else 0.0


class PlaintextComparison(Base, tag="comparison"):
    """Private logits against the plaintext model's on the same tokens."""

    max_logit_error: list[float]  # one a generated token
    same_top1: list[bool]
    plaintext_tokens: list[int]


class StudyRun(Base, tag="study_run"):
    """One training of a study that has come to an end, be it a divergence."""

    row: str
    seed: int
    folder: str  # of the run, below the study's
    diverged: bool  # or stopped because its attention had collapsed, where its recipe asks for that
    step: int  # the last one; of a divergence, the one at which it was noticed
    cross_entropy: float  # held-out nats per token; NaN after a divergence
    perplexity: float
    tokens_per_second: float  # median over the records of the training
    reason: str = ""  # of a divergence, in words
    layer: int | None = None  # where a divergence began or its gradient was largest, if it can be told


class Spread(msgspec.Struct, kw_only=True):
    """Mean and sample standard deviation over the `n` seeds that did not diverge; NaN where there are too few."""

    mean: float
    std: float
    n: int


class StudyRow(Base, tag="study_row"):
    """A row of a study's tables: one recipe over its seeds (Tables 2, 3, 5 and 6), and the data of its figures.

    Means are over seeds that did not diverge. Where there is none, series over the training are means over all, up to
    the first divergence, and matrices are empty.
    """

    name: str
    settings: dict[str, str]  # those in which the rows of the study differ
    seeds: list[int]
    diverged: list[int]  # of these seeds
    cross_entropy: Spread  # held-out nats per token
    perplexity: Spread
    layers: int
    heads: int
    hidden_size: int
    context_length: int
    tokens: int  # seen in training
    parameters: int
    nonlinear: list[OperationCount]
    ffn_flops: int
    attention_flops: int
    quartile_shares: list[Spread]  # of heads in [0,M/4), [M/4,M/2), [M/2,3M/4), [3M/4,M] (Fig. 2a and 7)
    overloaded: list[float]  # share of each layer's heads
    collapsed: list[float]
    entropy: Matrix  # (L, H), nats, on held-out text (Fig. 3)
    threshold: Matrix  # (L, H), learned theta at the end; empty without the regulariser (Fig. 6)
    entropy_steps: list[int]
    layer_entropy: Matrix  # (steps, L), nats, mean over heads (Fig. 5 and 8)
    layer_entropy_std: Matrix  # over seeds
    loss_steps: list[int]
    loss: list[float]  # training cross-entropy (Fig. 2b)
    loss_std: list[float]
    folded_ffn_flops: int = 0  # what private inference computes of them
    predicted_bytes: float | None = None  # of a private prompt of the context length (`entropi cost`), where known
    predicted_kernel: str = ""  # the softmax kernel that they are for, in words; empty in older records


class StudyClaim(Base, tag="study_claim"):
    """Whether row `lower` has a lower perplexity than row `higher`, tested over the seeds that both have.

    The test is exact and one-sided. "sign flips": of all 2^n ways to give the differences signs, the share whose mean
    is at least the observed one. "signs": where a run diverged and has no difference, the same for the number of
    seeds that speak for the claim.
    """

    lower: str
    higher: str
    seeds: list[int]
    # Cross-entropy of `higher` minus that of `lower`, nats; infinite where one diverged, NaN where both did.
    differences: list[float]
    mean: float  # of the differences; NaN if a run diverged
    std: float
    test: str
    p: float
    least_p: float  # what so many seeds can attain at best


Record: TypeAlias = (
    RunStarted
    | TrainingStep
    | EntropySnapshot
    | TaperSnapshot
    | Evaluation
    | SkippedUpdate
    | RolledBack
    | DiagnosisRecord
    | AttentionPattern
    | CountRecord
    | PredictionRecord
    | PrivateRun
    | PlaintextComparison
    | StudyRun
    | StudyRow
    | StudyClaim
)

R = TypeVar("R", bound=Base)
