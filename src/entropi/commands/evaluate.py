"""`entropi evaluate`: perplexity of a model."""

from __future__ import annotations

from typing import Literal

from entropi.commands.common import Command, print_json


def run(
    model: str,
    corpus: str | None = None,
    packing: Literal["stream", "document"] | None = None,
    batch_size: int = 32,
    softmax: str | None = None,
    sequences: int | None = None,
    context_length: int | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a model on text that it was not trained on.

    Args:
        model: run folder, saved model, the folder or GGUF file of any Hugging Face causal language model, or OWNER/NAME
            on the hub (also hf://OWNER/NAME)
        corpus: "stdlib", a text file or folder, or what else entropi train takes; its held-out part is used, and all of
            a file or folder for models that are not entropi's; by default the run's own, and else stdlib
        packing: cut sequences from one stream of all documents, or from each document; by default as the model of a run
            folder was trained, and else from a stream
        batch_size: sequences at a time
        softmax: exact, or power-1 to power-8, the (1 + x/2^t)^(2^t) that private inference evaluates; by default what
            the model was trained with
        sequences: how many to use; by default all, and for models that are not entropi's 32 of a data set
        context_length: tokens a sequence; by default what the model takes, and for models that are not entropi's at
            most 1024
        json: print one JSON object
    """
    from entropi.downloads import on_disk
    from entropi.training.loading import evaluate_heldout, open_with_text

    opened = open_with_text(on_disk(model), corpus, softmax, sequences, context_length, packing, all_of_plain_text=True)
    result = evaluate_heldout(opened, batch_size, entropies=False)

    length = opened.blocks.shape[1]
    if json:
        print_json(
            {
                "cross_entropy": result.cross_entropy,
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "corpus": opened.corpus,
                "text": opened.source,
                "context_length": length,
            }
        )
        return
    print(
        f"perplexity {result.perplexity:.3f}, cross-entropy {result.cross_entropy:.4f} nats a token, "
        f"{result.tokens:,} tokens; {opened.source} of {length:,} tokens"
    )


COMMAND = Command(run, place=3)
