"""The commands: one function each, whose signature and docstring are its options and help.

A command imports what it needs when it runs, so that `entropi ask` loads no torch. The parser would undo that in two
ways, which is why this module has no `if TYPE_CHECKING` (the parser executes it) and no function named like a public
name of the package, such as `fold` (the parser looks its functions up there, which imports their homes).
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from entropi import record_files, records
from entropi.console import ProgressLine, escaped_json, make_console, without_controls
from entropi.errors import UserError
from entropi.temporary import swept_folder
from entropi.training.recipe import Recipe

ANSWER_CONTROLS = "\n\t"  # of an answer's control characters, those that belong to text; --json has all of them


def train(
    run: Path,
    recipe: Recipe,
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none",
    shard: bool = False,
    prepare_only: bool = False,
) -> None:
    """Train a model into the run folder RUN; `entropi train RUN` alone continues it after an interruption.

    On several devices: torchrun --nproc-per-node N -m entropi train RUN ...

    Args:
        run: folder of the run: configuration, records, checkpoints, the trained model
        recipe: every other option
        shard: share the model out between the processes (FSDP2) instead of giving each a copy (DDP)
        prepare_only: read and tokenise the corpus, say where the tokens are, and train nothing
        report_to: tracker to show the training in while it runs; TensorBoard's files go to the run folder, Trackio's
            stay on this machine
    """
    from entropi.training import distributed
    from entropi.training.build import prepare_corpus
    from entropi.training.run import train as train_run

    if prepare_only:
        packed = prepare_corpus(recipe, make_console()).packed
        place = packed.train.streams[0].path.parent
        print(
            f"{len(packed.train):,} sequences to train on and {len(packed.heldout):,} held out, of "
            f"{packed.train_tokens + packed.heldout_tokens:,} tokens in {place}"
        )
        return
    live = None
    if report_to != "none":
        with _extra("report"):
            from entropi.report import figures
        from entropi.training.live import Live

        def draw(entropy: records.Matrix) -> Any:
            top = math.log(recipe.context_length)  # the scale of reports
            return figures.to_pixels(figures.entropy_heatmap(entropy, top, recipe.architecture))

        live = Live(report_to, draw)
    folder = train_run(recipe, run, live, shard=shard)
    distributed.disconnect()
    if not distributed.is_main():
        return
    found = [r for r in record_files.read(run / record_files.RECORDS_FILE) if isinstance(r, records.Evaluation)]
    if found:
        print(f"held-out perplexity {found[-1].perplexity:.2f} ({found[-1].cross_entropy:.4f} nats a token)", end="; ")
    print(f"model in {folder}")


def evaluate(
    model: str,
    corpus: str | None = None,
    packing: Literal["stream", "document"] | None = None,
    batch_size: int = 32,
    exp_iterations: int | None = None,
    sequences: int | None = None,
    context_length: int | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a model on text that it was not trained on.

    Args:
        model: run folder, saved model, the folder of any Hugging Face causal language model, or hf://OWNER/NAME
        corpus: "stdlib", a text file or folder, or what else entropi train takes; its held-out part is used, and all of
            a file or folder for models that are not entropi's; by default the run's own, and else stdlib
        packing: cut sequences from one stream of all documents, or from each document; by default as the model of a run
            folder was trained, and else from a stream
        batch_size: sequences at a time
        exp_iterations: evaluate with the softmax kernel (1 + x/2^t)^(2^t) of private inference, 0 for the exact
            softmax; by default what the model was trained with
        sequences: how many to use; by default all, and for models that are not entropi's 32 of a data set
        context_length: tokens a sequence; by default what the model takes, and for models that are not entropi's at
            most 1024
        json: print one JSON object
    """
    from entropi.downloads import on_disk
    from entropi.training.loading import evaluate_heldout, open_with_text

    opened = open_with_text(
        on_disk(model), corpus, exp_iterations, sequences, context_length, packing, all_of_plain_text=True
    )
    result = evaluate_heldout(opened, batch_size, entropies=False)
    if json:
        _print_json(
            {
                "cross_entropy": result.cross_entropy,
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "corpus": opened.corpus,
                "text": opened.source,
                "context_length": opened.blocks.shape[1],
            }
        )
    else:
        print(
            f"perplexity {result.perplexity:.3f}, cross-entropy {result.cross_entropy:.4f} nats a token, "
            f"{result.tokens:,} tokens; {opened.source} of {opened.blocks.shape[1]:,} tokens"
        )


def diagnose_heads(
    model: str,
    corpus: str | None = None,
    batch_size: int = 32,
    exp_iterations: int | None = None,
    sequences: int | None = None,
    context_length: int | None = None,
    heatmap: Path | None = None,
    html: Path | None = None,
    json: bool = False,
) -> None:
    """Where the attention heads of a model stand between collapse and overload, and where they look.

    Args:
        model: run folder, saved model, the folder of any Hugging Face causal language model, or hf://OWNER/NAME
        corpus: "stdlib", a text file or folder, or what else entropi train takes; its held-out part is used, and all of
            a file or folder for models that are not entropi's; by default the run's own, and else stdlib
        batch_size: sequences at a time
        exp_iterations: t of the softmax kernel of private inference, 0 for the exact softmax; by default the model's
        sequences: how many to use; by default all, and 32 for models that are not entropi's
        context_length: tokens a sequence; by default what the model takes, and for models that are not entropi's at
            most 1024
        heatmap: PNG or SVG to write; by default entropy.png in a run folder, and for other models NAME-entropy.png here
        html: page to write, with everything that entropi report shows of a run
        json: print one JSON object
    """
    with _extra("report"):
        from entropi.report import figures
        from entropi.report.formatting import pattern_in_words, table_of_heads
        from entropi.report.page import write_diagnosis
    from entropi.downloads import name_of, on_disk
    from entropi.training.evaluation import PATTERN_SEQUENCES, diagnose_heldout, observe_patterns
    from entropi.training.loading import evaluate_heldout, failures_in_one_line, is_run_folder, open_with_text

    for path in (heatmap, html):
        if path is not None:
            _check_parent(path)
    folder, name = on_disk(model), name_of(model)
    picture = heatmap or (folder / "entropy.png" if is_run_folder(folder) else Path(f"{name}-entropy.png"))
    opened = open_with_text(folder, corpus, exp_iterations, sequences, context_length)
    loaded, blocks = opened.model, opened.blocks
    result = evaluate_heldout(opened, batch_size, entropies=True)
    found = diagnose_heldout(result, blocks.shape[1], opened.source)
    found.model, found.parameters = type(loaded).__name__, loaded.num_parameters()
    figure = figures.entropy_heatmap(found.entropy, found.max_possible, name, found.layers)
    figures.write_figure(figure, picture)
    with (
        failures_in_one_line(opened, "diagnosed"),
        ProgressLine("looking where the heads look", min(len(blocks), PATTERN_SEQUENCES)) as line,
    ):
        pattern = observe_patterns(loaded, blocks[:PATTERN_SEQUENCES], line.update)
    if html is not None:
        evaluation = records.Evaluation(
            step=0,
            cross_entropy=result.cross_entropy,
            perplexity=result.perplexity,
            tokens=result.tokens,
            entropy=found.entropy,
        )
        write_diagnosis(folder, [evaluation, found, pattern], html, name)
    if json:
        more = {"corpus": opened.corpus, "perplexity": result.perplexity, "attention": msgspec.to_builtins(pattern)}
        _print_json(msgspec.to_builtins(found) | more)
        return
    console = make_console()
    if (lines := table_of_heads(found, console.width)) is None:
        console.print(
            f"{max(map(len, found.entropy))} heads a layer do not fit {console.width} columns: the picture and --json "
            "have them all"
        )
    else:
        console.print("mean entropy of every head in nats, by layer (+ overloaded, - collapsed)", *lines, sep="\n")
    print(f"measured on {opened.source} of {found.context_length:,} tokens")
    shares = " / ".join(f"{share:.0%}" for share in found.quartile_shares)
    print(f"quartile shares of the largest entropy {found.max_observed:.3f} nats: {shares}")
    print(found.verdict)
    print(pattern_in_words(pattern))
    print(f"heatmap in {picture}" + (f", page in {html}" if html is not None else ""))


def cost_of(
    architecture: str | None = None,
    compare: list[str] | None = None,
    seq_len: int = 128,
    layers: int | None = None,
    heads: int | None = None,
    hidden_size: int | None = None,
    vocab_size: int | None = None,
    bias: Literal["qk", "all", "none"] | None = None,
    protocol: Literal["cheetah", "semi2k", "aby3"] = "cheetah",
    network: str = "wan",
    embedding: Literal["private", "public"] = "private",
    exp_iterations: int | None = None,
    polynomial: bool = False,
    budget: str | None = None,
    runs: list[Path] | None = None,
    picture: Path | None = None,
    calibration: Path | None = None,
    calibrate: Path | None = None,
    record: bool = False,
    json: bool = False,
) -> None:
    """What a model costs: its operations exactly, and the bytes and time of its private inference predicted.

    Nothing is run. The defaults are GPT-2 small's sizes.

    Args:
        architecture: one of the paper's names, SM(t)+ScFuFFN by default; or the config.json of a GPT-2, GPT-NeoX, Llama
            or entropi model, a folder that holds one, or hf://OWNER/NAME, which bring their own sizes
        compare: several of these side by side
        seq_len: tokens of the prompt, T
        layers: number of layers, L; 12 by default
        heads: attention heads a layer, H; 12 by default
        hidden_size: width of the model, d; 768 by default
        vocab_size: entries of the tokenizer, V; 50257 by default
        bias: linear layers with a bias; those of queries and keys, qk, by default
        protocol: cheetah (two parties), semi2k (two and a trusted dealer) or aby3 (three parties)
        network: lan (1 Gbit/s, 0.5 ms), wan (100 Mbit/s, 80 ms), or a rate and a round trip such as 300Mbps,20ms
        embedding: token table private to the server, or public
        exp_iterations: t of the softmax kernel, for models that were trained with the exact softmax; 8 by default, or 1
            with --polynomial
        polynomial: attention weights are (1 + s/2^t)^(2^t) of the logits, with which a model has to be trained
        budget: list what answers the prompt within so much, such as 2GB or 30s
        runs: run folders with measured perplexities, to set predicted cost against perplexity
        picture: write a picture (PNG, SVG or PDF): bytes by operation, or cost against perplexity with --runs
        calibration: file of prices measured by --calibrate, in place of those that come with the package
        calibrate: measure this machine's prices (some minutes) and write them to this file
        record: add the prediction to the records of the run folder that --architecture names, for its report
        json: print one JSON object
    """
    if picture is not None:
        _check_parent(picture)
    if calibrate is not None:
        _check_parent(calibrate)
    chosen_modes = {"--architecture": architecture, "--compare": compare, "--budget": budget, "--runs": runs}
    modes = [name for name, value in chosen_modes.items() if value is not None]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} exclude each other")
    recorded = Path(architecture or "") / record_files.RECORDS_FILE
    if record and (architecture is None or not recorded.is_file()):
        raise UserError("--record needs --architecture with one run folder, to whose records the prediction is added")
    if budget is not None and picture is not None:
        raise UserError("--picture has nothing to draw with --budget")
    with _extra("private"):
        from entropi import costing
        from entropi.costs import calibration as prices
        from entropi.costs.prediction import Options, line_of
    from entropi.model.shape import Shape

    if calibrate is not None:
        with ProgressLine(f"measuring {protocol}", 100) as progress:
            measured = prices.calibrate(protocol, progress=lambda share: progress.update(round(100 * share), ""))
        prices.write(measured, calibrate)
        print(f"prices of {measured.protocol} on {measured.machine} in {calibrate}")
        return
    sizes = {
        name: value
        for name, value in (
            ("layers", layers),
            ("heads", heads),
            ("hidden_size", hidden_size),
            ("vocab_size", vocab_size),
            ("bias", bias),
        )
        if value is not None
    }
    searched = [f"--{name.replace('_', '-')}" for name in ("layers", "heads", "hidden_size") if name in sizes]
    if budget is not None and searched:
        raise UserError(f"{', '.join(searched)} would be ignored: --budget searches for the sizes")
    words = [str(run) for run in runs] if runs else compare or [architecture or "SM(t)+ScFuFFN"]
    costing.refuse_ignored(words, list(sizes), polynomial=polynomial)
    asked_iterations = exp_iterations
    if exp_iterations is None:
        exp_iterations = 1 if polynomial else 8
    if not 1 <= exp_iterations <= 8:
        raise UserError(f"exp_iterations is {exp_iterations}, 1 to 8 are possible")
    line = line_of(network)
    if calibration is None:
        chosen = prices.shipped(protocol)
    else:
        chosen = prices.read(calibration.read_bytes(), str(calibration))
        if chosen.protocol != protocol:
            raise UserError(f"{calibration} holds prices of {chosen.protocol}, not of {protocol}")
    options = Options(embedding=embedding, exp_iterations=exp_iterations, fraction_bits=chosen.fraction_bits)
    base = Shape(
        vocab_size=50257 if vocab_size is None else vocab_size,
        hidden_size=768 if hidden_size is None else hidden_size,
        num_hidden_layers=12 if layers is None else layers,
        num_attention_heads=12 if heads is None else heads,
        max_position_embeddings=max(seq_len, 1024),
        bias=bias or "qk",
        exp_iterations=exp_iterations if polynomial else None,
        polynomial=polynomial,
    )
    if runs:
        with _extra("report"):
            from entropi.report import figures

            placed = costing.against_perplexity(runs, seq_len, chosen, line, options, asked_iterations)
        points = {name: (one.megabytes, one.perplexity) for name, one in placed.items()}
        best = figures.frontier(points)
        if picture is not None:
            labels = {name: one.kernel_label for name, one in placed.items()}
            axis = "predicted bytes of the prompt's pass (MB)"
            figures.write_figure(figures.pareto(points, axis, labels), picture)
        if json:
            _print_json(
                [
                    {
                        "run": name,
                        "MB": one.megabytes,
                        "kernel": one.kernel,
                        "perplexity": one.perplexity,
                        "on_frontier": name in best,
                    }
                    for name, one in placed.items()
                ]
            )
            return
        for name, one in sorted(placed.items(), key=lambda item: points[item[0]]):
            remark = "" if name in best else ", another is better"
            print(f"{name}: {one.megabytes:,.1f} MB at {one.kernel_label}, perplexity {one.perplexity:.2f}{remark}")
        if picture is not None:
            print(f"picture in {picture}")
        return
    if budget is not None:
        fits = costing.within(budget, base, seq_len, chosen, line, options)
        if json:
            _print_json(
                [
                    {
                        **msgspec.to_builtins(one.prediction),
                        "kernel": one.prediction.kernel,
                        "parameters": one.parameters,
                    }
                    for one in fits
                ]
            )
        else:
            costing.show_fitting(fits, budget, seq_len)
        return
    shapes = [costing.shape_of(word, base) for word in words]
    if not polynomial:
        costing.refuse_other_kernel(shapes, asked_iterations)
    found = [costing.costed(name, shape, seq_len, chosen, line, options) for name, shape in shapes]
    if record:
        record_files.append(recorded, found[0].prediction)
    if picture is not None:
        with _extra("report"):
            from entropi.report import figures
        figures.write_figure(figures.predicted_bytes({one.name: one.prediction for one in found}), picture)
    if json:
        _print_json([one.to_json() for one in found] if compare else found[0].to_json())
    elif compare:
        costing.compare(found)
    else:
        costing.show(found[0])
    if picture is not None and not json:
        print(f"picture in {picture}")


def fold_model(model: Path, output: Path) -> None:
    """Fold a model: everything linear disappears into neighbouring matrices.

    Args:
        model: run folder or saved model
        output: folder for folded.safetensors and folded.json, readable without torch
    """
    from entropi.model.folding import fold
    from entropi.training.loading import open_model

    loaded, _, folder = open_model(model)
    folded = fold(loaded)
    folded.save(output)
    shutil.copy(folder / "tokenizer.json", output)
    explicit = folded.description["explicit_ffn"]
    if not loaded.config.parts.softmax_only:
        kept = "gains, biases and scalings folded away; norms and activations remain"
    elif explicit:
        kept = f"linear feed-forward networks kept in layers {', '.join(map(str, explicit))}, folded away in the others"
    else:
        kept = "every feed-forward network folded away"
    print(f"{kept}; condition numbers up to {max(folded.conditions):.1f}; written to {output}")


def serve(
    model: Path,
    listen: str = "127.0.0.1:9000",
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    clients_ca: Path | None = None,
    metrics: str = "127.0.0.1:0",
    log: Literal["text", "json"] = "text",
    max_sessions: int = 1,
    max_queue: int = 8,
    queue_seconds: float = 600.0,
    max_new_tokens: int = 64,
    session_seconds: float = 3600.0,
    stall_seconds: float = 600.0,
    memory_gb: float | None = None,
    client_sessions: int | None = None,
    client_tokens: int | None = None,
    max_startups: int = 64,
    source_startups: int = 48,
    revoked: Path | None = None,
    audit_log: Path | None = None,
    quota_store: str | None = None,
    output: Literal["logits", "top_k", "argmax"] = "logits",
    choices: int = 8,
    round_logits: int | None = None,
    embedding: Literal["private", "public"] = "private",
    exp_iterations: int = 8,
    fraction_bits: int | None = None,
    self_test: Literal["none", "ref2k", "cheetah"] = "ref2k",
    canary: str | None = None,
) -> None:
    """Answer prompts without seeing them: the model owner's side.

    Args:
        model: run folder, saved model, or the output of `entropi fold`; softmax-only
        listen: HOST:PORT; anything but a loopback address needs the three TLS files; port 0 takes a free one
        tls_cert: certificate of this server, PEM (see `entropi certificates`)
        tls_key: its private key
        clients_ca: certificate of the authority whose clients are answered
        metrics: HOST:PORT for /health and /metrics, loopback only; port 0 takes a free one, which the log names
        log: lines for people, or JSON objects for programs
        max_sessions: sessions at a time
        max_queue: clients that may wait for one
        queue_seconds: how long they may wait
        max_new_tokens: most tokens a session may ask for
        session_seconds: time limit of a session
        stall_seconds: time limit of a session in which nothing happens
        memory_gb: most memory of a session's process, in GB; by default what the model needs, with room; 0: no limit
        client_sessions: sessions at a time of one client certificate; no limit by default
        client_tokens: tokens within 24 hours of one client certificate; no limit by default
        max_startups: connections that have no session yet; beyond these the oldest are ended for new ones
        source_startups: of these, of one address or one client certificate
        revoked: file of revoked certificates: a revocation list (see `entropi certificates`), fingerprints, or both;
            read again, like the TLS files, when it changes and on SIGHUP
        audit_log: file to add one JSON object to for every refusal and session; by default they go to the log
        quota_store: file, or redis://HOST:PORT/NUMBER for several servers, that keeps what clients use of their two
            limits; by default entropi/quotas.sqlite in the user's state folder
        output: what the client learns of each token: all logits, the likeliest tokens with theirs, or the likeliest
        choices: how many tokens top_k reveals, 1 to 16
        round_logits: binary places that the logits a client learns are rounded to, 0 to 8: 3 for steps of 1/8
        embedding: public gives the token embeddings to every client and saves their part of the computation
        exp_iterations: t of the softmax kernel (1 + x/2^t)^(2^t), up to 8: more bytes, less error
        fraction_bits: of fixed-point numbers, 12 to 22: more precision, less range; by default chosen for the model,
            otherwise checked, and refused with the numbers if values could overflow or get lost
        self_test: before anybody is answered, compare the program's logits on a known prompt with plaintext's: ref2k in
            the engine's fixed-point numbers, cheetah also with the cryptography
        canary: public prompt whose answer clients are told, so that they can check what they receive (ask --canary)
    """
    with _extra("private"):
        from entropi.private.admission import Limits
        from entropi.private.certificates import tls_files
        from entropi.private.messages import Settings
        from entropi.private.monitoring import JsonLines, PlainLines
        from entropi.private.server import serve as serve_folder
        from entropi.private.session import parse_address
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines() if log == "json" else PlainLines())
    chosen = {
        "exp_iterations": exp_iterations,
        **({} if fraction_bits is None else {"fraction_bits": fraction_bits}),
        "embedding": embedding,
        "output": output,
        "choices": choices,
        "logit_bits": round_logits,
    }
    try:
        settings = msgspec.convert(chosen, Settings)
    except msgspec.ValidationError as error:
        raise UserError(f"these settings are not possible: {error}") from None
    limits = Limits(
        max_sessions,
        max_queue,
        queue_seconds,
        max_new_tokens,
        session_seconds,
        stall_seconds,
        memory_gb,
        client_sessions,
        client_tokens,
        max_startups,
        source_startups,
    )
    tls = tls_files(tls_cert, tls_key, clients_ca, "--clients-ca")
    for path in (audit_log, None if quota_store is None or "://" in quota_store else Path(quota_store)):
        if path is not None:
            _check_parent(path)
    parse_address(listen, tls=tls is not None)  # before a model is folded, which takes a while
    parse_address(metrics)
    if tls is not None:
        tls.server_context()
    with _terminated_like_interrupted(), swept_folder("entropi-serve-") as temporary:
        folder = model
        if not (model / "folded.json").exists():
            folder = temporary
            fold_model(model, folder)
        try:
            tokenizer = (folder / "tokenizer.json").read_bytes().decode()  # as it is, for its hash
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the tokenizer of {model}: {error}") from None
        choose = fraction_bits is None
        tests: dict[str, tuple[Literal["ref2k", "cheetah"], ...]]
        tests = {"none": (), "ref2k": ("ref2k",), "cheetah": ("ref2k", "cheetah")}
        serve_folder(
            folder,
            tokenizer,
            listen,
            settings,
            limits,
            tls,
            metrics,
            choose_fraction_bits=choose,
            revoked=revoked,
            audit_log=audit_log,
            quota_store=quota_store,
            self_tests=tests[self_test],
            canary=canary,
        )


def ask(
    prompt: str | None = None,
    server: str = "127.0.0.1:9000",
    max_new_tokens: int = 8,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    server_ca: Path | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    tokenizer: Path | None = None,
    tokenizer_sha256: str | None = None,
    pad_to: int = 1,
    pad_with: Path | None = None,
    stop: list[str] | None = None,
    full_length: bool = False,
    canary: bool = False,
    retries: int = 0,
    memory_gb: float | None = None,
    json: bool = False,
    record: Path | None = None,
    logits: Path | None = None,
) -> None:
    """Let a server's model continue PROMPT without showing it the prompt or the answer.

    Args:
        prompt: text to continue, or - for standard input (the list of processes shows command lines to other users
            of this machine); it does not leave this machine in readable form
        server: HOST:PORT of an `entropi serve`
        max_new_tokens: tokens to generate
        tls_cert: certificate of this client, PEM (see `entropi certificates`); not needed on the server's machine
        tls_key: its private key
        server_ca: certificate of the authority that the server's certificate is from
        temperature: of sampling, which happens here; 0 takes the likeliest token
        top_k: sample from so many of the likeliest tokens; by default from all that the server reveals
        seed: of sampling
        tokenizer: tokenizer.json of the model, to use in place of the one that the server sends
        tokenizer_sha256: hash of the tokenizer.json that the server must send; without one of these two options only
            tokenizers are applied that can neither change a prompt nor spell it out by their number of tokens
        pad_to: fill the prompt up, at its front, to a multiple of so many tokens: the server sees that length; the
            model reads the filling, which changes the answer
        pad_with: file with text to fill up with; public text of the prompt's kind changes answers least, and by default
            it is the token that ends a text
        stop: names of the tokens that end an answer; by default those that usually end a text
        full_length: ask for all tokens and cut the answer afterwards, so that its length tells the server nothing
        canary: ask the public prompt that the server names, and compare the answer with the one it published
        retries: how often a broken session is continued in a new one, which costs a pass over prompt and answer so far
        memory_gb: most memory of this side's process, in GB; by default what the model needs, with room; 0: no limit
        json: print the whole record as one JSON object instead of the text
        record: run folder to add the record to, for its report
        logits: .npy file for the logits (tokens, V)
    """
    with _extra("private"):
        from entropi.private.canary import complaint
        from entropi.private.certificates import tls_files
        from entropi.private.client import Privacy, Sampling, Watcher, connect
        from entropi.private.client import ask as ask_server
        from entropi.private.tokenization import MAX_PROMPT
        from entropi.private.versions import engine_version

        engine_version()  # the engine itself runs in a process of its own
    sampling = Sampling(temperature, top_k, seed)
    own = _read_text(tokenizer, "the tokenizer") if tokenizer is not None else None
    filling = _read_text(pad_with, "the filling") if pad_with is not None else None
    privacy = Privacy(own, tokenizer_sha256, pad_to, filling, tuple(stop) if stop else None, full_length)
    tls = tls_files(tls_cert, tls_key, server_ca, "--server-ca")
    published = None
    if canary:
        if prompt is not None:
            raise UserError("the canary's prompt is the server's: give either PROMPT or --canary")
        serving = connect(server, tls)
        if (published := serving.canary) is None:
            raise UserError(f"{server} has published no canary")
        prompt, max_new_tokens = published.prompt, len(published.tokens)
        sampling, privacy = Sampling(), replace(privacy, pad_to=1, full_length=True)
    if prompt is None:
        raise UserError("PROMPT is missing (see entropi ask --help)")
    source = "standard input" if prompt == "-" else "the prompt"
    try:
        prompt = sys.stdin.read(MAX_PROMPT + 1) if prompt == "-" else prompt  # more is refused, whatever it is
        prompt.encode()  # bytes that could not be decoded may have arrived as lone surrogates
    except UnicodeError:
        raise UserError(f"{source} is not UTF-8 text") from None
    if logits is not None:
        _check_parent(logits)
    if record is not None and not record.is_dir():
        raise UserError(f"there is no run folder {record} to add the record to")
    console = make_console()
    line: list[ProgressLine] = []
    moved = [0]
    received, printed = [""], [0]

    def begin(total: int) -> None:
        if line:
            line[0].expect(total)
        else:
            line.append(ProgressLine("private inference", total, console=console).__enter__())

    def stage(done: int, traffic: records.StageTraffic) -> None:
        moved[0] += traffic.bytes
        layer = f"layer {traffic.layer} " if traffic.layer >= 0 else ""
        line[0].update(done, f"token {traffic.token + 1}, {layer}{traffic.name}, {moved[0] / 1e6:.1f} MB")

    def text(piece: str) -> None:
        received[0] += without_controls(piece, ANSWER_CONTROLS)
        if json:
            return
        if sys.stdout.isatty():  # there it would run into the progress bar
            line[0].show(received[0])
        else:
            print(received[0][printed[0] :], end="", flush=True)
            printed[0] = len(received[0])

    def status(happening: str) -> None:
        console.print(without_controls(happening), markup=False)

    finished = False
    try:
        watcher = Watcher(begin, stage, text, status)
        with _terminated_like_interrupted():  # nothing stays in the temporary folder
            answer = ask_server(
                server,
                prompt,
                max_new_tokens,
                watcher,
                tls=tls,
                sampling=sampling,
                retries=retries,
                privacy=privacy,
                memory_gb=memory_gb,
            )
        received[0], finished = without_controls(answer.record.new_text, ANSWER_CONTROLS), True
    finally:
        for shown in line:
            shown.__exit__(None, None, None)
        if not json and (finished or received[0]):  # after a failure, what had been received
            print(received[0][printed[0] :], flush=True)
    if published is not None and (difference := complaint(published, answer, serving.settings)) is not None:
        raise UserError(f"the canary does not hold: {difference}; do not rely on this server's answers")
    if logits is not None:
        import numpy as np

        if not answer.logits:
            raise UserError(f"{server} reveals no logits")
        with open(logits, "wb") as file:
            np.save(file, np.stack(answer.logits))
    if record is not None:
        record_files.append(record / record_files.RECORDS_FILE, answer.record)
    if json:
        _print_json(answer.record)
        return
    console.print(summary_of_private_run(answer.record), markup=False)
    if published is not None:
        console.print(f"the canary holds: {len(published.tokens)} tokens as published")


def certificates(folder: Path, server: list[str], client: list[str], revoke: list[str], days: int = 365) -> None:
    """Make an authority in FOLDER, or use the one there, and let it certify servers and clients for TLS.

    Args:
        folder: of the authority; ca-key.pem in it can certify anybody, so it belongs on neither machine
        server: host names and addresses under which clients reach one server
        client: names of clients, one certificate each
        revoke: names whose certificates in FOLDER are added to its revocation list, revoked.pem, for `serve --revoked`
        days: for which the certificates are valid
    """
    with _extra("private"):
        from entropi.private import certificates as authority

    if server or client or not revoke:
        for path in authority.issue(folder, server, client, days):
            print(path)
    if revoke:
        print(authority.revoke(folder, revoke))


def summary_of_private_run(run: records.PrivateRun) -> str:
    """Bytes, messages and seconds of a private generation, in one line."""
    return (
        f"{len(run.new_tokens)} tokens in {run.seconds:.1f} s, {run.bytes / 1e6:.1f} MB both directions "
        f"(set-up {run.setup_bytes / 1e6:.1f} MB), {run.messages:,} messages, softmax kernel t={run.exp_iterations}"
    )


def study(file: Path, folder: Path | None = None, parallel: int = 0, json: bool = False) -> None:
    """Train every run of the study FILE and compare them; run it again to continue after an interruption.

    Args:
        file: YAML file with the settings of all runs, the rows to compare and the claims to test
        folder: where the run folders, the tables and the page go; by default runs/NAME for a file NAME.yaml
        parallel: runs at a time, which share the processor's cores or take the GPUs in turn; by default one for each
            GPU, or one
        json: print one JSON object
    """
    with _extra("report"):
        from entropi.report.study import in_words, write_study
    from entropi.training.study import load_study, run_study

    if parallel < 0:
        raise UserError(f"parallel is {parallel}, it cannot be negative")
    planned, folder = load_study(file), folder or Path("runs") / file.stem
    try:
        with _terminated_like_interrupted():
            found = run_study(planned, folder, parallel)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues the study") from None
    page = write_study(folder)
    if json:
        rows = [r for r in found if isinstance(r, records.StudyRow)]
        claims = [r for r in found if isinstance(r, records.StudyClaim)]
        _print_json({"folder": str(folder), "rows": rows, "claims": claims})
        return
    print(in_words(found))
    print(f"page in {page}")


def report(runs: list[Path], output: Path | None = None) -> None:
    """One self-contained HTML page of one or more run folders, or of a study.

    Args:
        runs: run folders, or the folder of one study
        output: file to write; by default report.html in the first folder
    """
    with _extra("report"):
        from entropi.report.page import write_report
        from entropi.report.study import is_study, write_study
    if len(runs) == 1 and is_study(runs[0]):
        print(f"report in {write_study(runs[0], output)}")
        return
    path = write_report(runs, output or runs[0] / "report.html")
    print(f"report in {path}")


def demo(folder: Path = Path("runs/demo"), steps: int = 600) -> None:
    """Everything once, small and real: train two models, diagnose them, answer a prompt in private, write the report.

    Args:
        folder: where the two run folders and the report go
        steps: optimizer updates of each training
    """
    with _extra("private"):
        import entropi.private.client
        from entropi.private.versions import engine_version

        engine_version()
    with _extra("report"):
        import entropi.report.page  # noqa: F401
    from entropi.demo import run_demo

    run_demo(folder, steps)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does: folded weights must not stay behind in a temporary folder."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is asked about signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a missing optional dependency into advice."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "entropi":
            raise
        raise UserError(f"{package} is not installed: pip install 'entropi[{name}]'") from None
    except ImportError as error:  # there, but it does not load
        reason = " ".join(str(error).split())
        raise UserError(f"{reason}; the extra has to be installed anew: pip install 'entropi[{name}]'") from None


def _read_text(path: Path, what: str) -> str:
    """The content of a file that has to be UTF-8 text."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from None


def _check_parent(path: Path) -> None:
    """Refuse, before long work, a file to write whose folder does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def _print_json(value: Any) -> None:
    print(escaped_json(record_files.encode(value).decode()))
